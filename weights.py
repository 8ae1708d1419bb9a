"""Weights in and out: what `simipu.py --init` and `--init-points` understand, and `eval.py export`.

    python simipu.py kitti --init resnet50-imagenet.pth             # the paper's double fine-tuning
    python simipu.py kitti --init SimIPU_kitti_50e.pth --init-points SimIPU_kitti_50e.pth
    python eval.py export out/kitti/last.pt --format mmdet3d --out simipu.pth       # and simipu.json beside it

Loading takes one network out of a file and says which. The network is found by its prefix (`module.`, `_orig_mod.` mean
nothing): the query encoder of MoCo and DenseCL, DINO's teacher, the release's `img_backbone.`. Nothing else in a file
can overwrite it, whatever its name. Less than 90 % of the parameters, another shape or a deeper network are refused.

Pixels are normalised differently everywhere, and a network fed with the wrong ones fails quietly. Here they are x =
(rgb / 255 - mean) / std with ImageNet's mean and std. A file that says otherwise (this repo's do, mmcv's config text
does), or the release's (BGR, 0..255, mean only), is converted exactly in its first convolution. A file that says
nothing is taken to be as here, and the summary says so, unless its first layer contradicts (`pixel_scale`): then
`--init-pixels` must tell.

Tested on fabricated files with these names, not on the downloaded originals.
"""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import data
from files import BadInput, read_checkpoint, save_atomically, writing

IMAGE_BRANCHES = (
    "encoder_q.0.",
    "encoder_q.",
    "img_backbone.",
    "backbone.",
    "",
)  # OpenSelfSup's MoCo and DenseCL; MoCo; mmdet3d; mmdet, DINO; plain
POINT_BRANCHES = ("pts_backbone.", "")
WRAPPERS = ("teacher", "state_dict", "model")  # DINO holds student and teacher, and is used by its teacher
KINDS = {
    "queue": r"queue",
    "key encoder": r"(encoder|backbone)_k\.|momentum|^ema_",
    "predictor": r"pred",
    "point encoder": r"^pts_backbone\.",
    "image encoder": r"^(img_)?backbone\.",
    "head or classifier": r"(^|\.)(fc|head|heads|classifier|neck|projector|mlp\w*)\.|^encoder_q\.1\.",
}
PIXELS = {  # channel order, deviation of 0..1 values in RGB order; the mean is ImageNet's in all
    "rgb": ("RGB", data.IMAGENET_STD),
    "bgr": ("BGR", data.IMAGENET_STD),
    "rgb_mean": ("RGB", (1 / 255,) * 3),
    "bgr_mean": ("BGR", (1 / 255,) * 3),
}
PIXEL_SCALE = 30  # between the two kinds of `pixel_scale`
RELEASE_EPS, EPS = 1e-3, 1e-5  # of the image encoder's batch norms: the release's config, and here


# -----------------------------------------------------------------------------
# loading


def load_image_encoder(encoder, path, pixels="auto"):
    """Load anybody's weights of the same network into `encoder`, so that it makes of pixels normalised as here what it
    made of theirs.

    encoder: encoders.ResNet, or a timm network with its own names. path: the file. pixels: a key of PIXELS, how the
    file's pixels were normalised where it does not say; "auto" for the release's by their names, and else as here.
    -> lines for the user: what was taken from where, what was ignored, and what the pixels were, said, converted or
    assumed. Raises BadInput, one line, for a file that is unreadable, holds less than 90 % of the parameters, other
    shapes or a deeper network; and for pixels that cannot be converted (another mean) or contradict the file.

    Key names: facebookresearch/moco and dino, WXinlong/DenseCL, and zhyever/SimIPU (`Inter_Intro_moco_better`).
    """
    tensors, about, wrapper = _read(path)
    prefix, weights, summary = _choose(
        encoder, path, tensors, wrapper, IMAGE_BRANCHES, "the image encoder of --image-encoder"
    )
    release = (
        prefix == "img_backbone." and "mlp_cross_img.layer1.0.bias" in tensors
    )  # our heads have the same names, but no biases
    notes = _convert_pixels(encoder, path, weights, about, pixels, release)
    if release:  # same function with our eps
        for name in weights:
            if name.endswith("running_var"):
                weights[name] = weights[name] + (RELEASE_EPS - EPS)
        notes.append(f"batch norm's eps {RELEASE_EPS:g} (the release's config) moved into the running variances")
    encoder.load_state_dict(weights, strict=False)
    return "\n  ".join([*summary, *notes])


def load_point_encoder(encoder, path):
    """Load a encoders.PointEncoder from this repo's last.pt, an export that holds points, or the release's file.

    The release has biases before its batch norms, which change nothing but the mean that batch norm takes away: each is
    subtracted from the running mean, which is exact. -> lines for the user. Raises BadInput as `load_image_encoder`
    does.
    """
    tensors, _, wrapper = _read(path)
    _, weights, summary = _choose(
        encoder, path, tensors, wrapper, POINT_BRANCHES, "a point encoder of the same --use-xyz"
    )
    encoder.load_state_dict(weights, strict=False)
    return "\n  ".join(summary)


def pixel_scale(weights):
    """Which pixels the first layer of a ResNet has seen: the median over filters of bn1.running_var / |filter|^2, the
    variance of a filter's answer per unit of filter. About 1 for pixels divided by their deviation, about 58^2 for
    0..255 less a mean.

    Measured on KITTI: random filters 1.2 and 4040, Gabor filters 0.35 and 1160. None where nothing can be told: no such
    layer, or variances as they were initialised.
    """
    filters, var = (weights.get(name) for name in ("conv1.weight", "bn1.running_var"))
    if filters is None or var is None or bool((var == 1).all()):
        return None
    power = filters.float().flatten(1).square().sum(1)
    return (var.float() / power)[power > 0].median().item() if bool((power > 0).any()) else None


def _read(path):
    """-> tensors of the file by name, without the wrappers' prefixes; all else that the file says, a dict; where they
    lay.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # DINO's files keep their arguments in one
        found = read_checkpoint(path)
    if not isinstance(found, dict):
        raise BadInput(f"{path}: holds a {type(found).__name__}, not tensors by name")
    wrapper = next((w for w in WRAPPERS if isinstance(found.get(w), dict)), None)
    tensors = {}
    for name, value in (found[wrapper] if wrapper else found).items():
        if torch.is_tensor(value):
            name = ".".join(part for part in str(name).split(".") if part not in ("module", "_orig_mod"))
            if name in tensors:
                raise BadInput(f"{path}: holds {name} twice, once wrapped and once not")
            tensors[name] = value
    about = {k: v for k, v in found.items() if k != wrapper and not torch.is_tensor(v)} if wrapper else {}
    return tensors, about, wrapper


def _choose(encoder, path, tensors, wrapper, branches, what):
    """The branch of `tensors` that fits `encoder` best, the first of equals; or BadInput. -> prefix, weights, lines for
    the user.
    """
    own, wanted = encoder.state_dict(), {name for name, _ in encoder.named_parameters()}
    found = {p: {k[len(p) :]: v for k, v in tensors.items() if k.startswith(p)} for p in branches}
    fits = {p: {k: v for k, v in branch.items() if k in own and v.shape == own[k].shape} for p, branch in found.items()}
    share = {
        p: sum(own[k].numel() for k in wanted & fits[p].keys()) / sum(own[k].numel() for k in wanted) for p in branches
    }
    prefix = max(branches, key=share.get)
    branch, weights = found[prefix], fits[prefix]

    folded = []  # (conv W + b, then batch norm) is (conv W, then batch norm with b taken off its running mean)
    for name in branch:
        mean = name.removesuffix("conv.bias") + "bn.running_mean"
        if (
            name.endswith(".conv.bias")
            and name not in own
            and mean in weights
            and weights[mean].shape == branch[name].shape
        ):
            weights[mean] = weights[mean] - branch[name]
            folded.append(name)
    used = {prefix + k for k in (*weights, *folded)}
    left = [k for k in tensors if k not in used]
    counts = f"{len(weights)} tensors loaded ({share[prefix]:.0%} of the parameters), {len(own.keys() - weights.keys())} missing, {len(left)} unexpected"
    misfits = [
        f"{k} is {tuple(v.shape)}, not {tuple(own[k].shape)}"
        for k, v in branch.items()
        if k in own and k not in weights
    ]
    deeper = [
        f"{k} has no place"
        for k in branch
        if k not in own and k not in folded and k.split(".")[0] in {k.split(".")[0] for k in own}
    ]
    if share[prefix] < 0.9 or misfits or deeper:
        raise BadInput("; ".join([f"{path}: {counts}", *(misfits + deeper)[:1], f"is this {what}?"]))

    taken = f"taken: {prefix}*" if prefix else "taken: names without prefix"
    taken += {"teacher": " of the teacher; its student is left", None: ""}.get(wrapper, f" of {wrapper}")
    lines = [
        f"{path}: {counts}",
        taken + (f"; {len(folded)} biases before batch norm moved into the running means" if folded else ""),
    ]
    kinds = Counter(next((kind for kind, pattern in KINDS.items() if re.search(pattern, k)), "other") for k in left)
    if kinds:
        lines.append("ignored: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    return prefix, weights, lines


def _stated(path, about):
    """(channels, mean, std, who says so) of 0..1 values in RGB order, if the file says; else None."""
    if {"config", "identity"} <= about.keys():
        return "RGB", data.IMAGENET_MEAN, data.IMAGENET_STD, "a last.pt of simipu.py"
    meta = about.get("meta") if isinstance(about.get("meta"), dict) else {}
    said = next((d for d in (about, meta) if {"mean", "std", "channels"} <= d.keys()), None)
    if said:
        channels, mean, std, by = said["channels"], said["mean"], said["std"], "the file says"
    else:  # mmcv keeps the config's text
        text = re.search(r"img_norm_cfg\s*=\s*dict\((.*?)\)", str(meta.get("config", "")), re.DOTALL)
        values = dict(re.findall(r"(mean|std)\s*=\s*\[(.*?)\]", text[1], re.DOTALL)) if text else {}
        if len(values) < 2:
            return None
        channels, by = "BGR" if re.search(r"to_rgb\s*=\s*False", text[1]) else "RGB", "the config in the file says"
        mean, std = (values[key].strip(" \n,").split(",") for key in ("mean", "std"))
    try:
        mean, std = (tuple(float(v) / (1 if said else 255) for v in values) for values in (mean, std))
    except (TypeError, ValueError):
        mean = std = ()
    if channels not in ("RGB", "BGR") or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise BadInput(f"{path}: says mean, std and channels of its pixels in a way that is not understood")
    return (channels, mean, std, by) if channels == "RGB" else (channels, mean[::-1], std[::-1], by)


def _convert_pixels(encoder, path, weights, about, pixels, release):
    """Rewrite the first convolution in `weights` for pixels as they are here. -> lines for the user. Raises BadInput
    where the file, its first layer and `pixels` contradict each other, or the means differ.

    With x = (rgb / 255 - mean) / std here and x' = (rgb / 255 - mean) / std' there, x' = x std / std'; so a filter's
    channel is multiplied by std / std', after the channels were put in order. Exact, at the zero padding too; another
    mean could not be.
    """
    if "layer1.0.conv3.weight" in weights and re.search(r"style\s*=\s*['\"]caffe", str(about.get("meta"))):
        raise BadInput(
            f"{path}: a Caffe-style ResNet, whose strides lie in other convolutions; here the same weights are another function"
        )
    stated, scale = _stated(path, about), pixel_scale(weights)
    said = PIXELS["bgr_mean" if release else "rgb"] if pixels == "auto" else PIXELS[pixels]
    channels, mean, std, by = stated or (said[0], data.IMAGENET_MEAN, said[1], "")
    if (
        stated
        and pixels != "auto"
        and (channels != said[0] or not torch.allclose(torch.tensor(std), torch.tensor(said[1]), rtol=0.02))
    ):
        raise BadInput(
            f"--init-pixels {pixels}: {path} itself says {channels}, std {', '.join(f'{v:.3g}' for v in std)}"
        )
    if max(abs(a - b) for a, b in zip(mean, data.IMAGENET_MEAN)) > 1e-3:
        raise BadInput(
            f"{path}: pixels less {', '.join(f'{v:.4g}' for v in mean)} (RGB, of 0..1), not ImageNet's mean; that cannot be converted exactly"
        )
    small = max(std) < 0.05
    by = by or (
        "as --init-pixels says"
        if pixels != "auto"
        else "known of the release's files"
        if release
        else "assumed: the file does not say"
    )
    kind = f"{channels}, {'0..255 less the mean' if small else 'mean and deviation'}"
    lines = [f"pixels: {kind} ({by})"]
    if scale is not None and (scale > PIXEL_SCALE) != small:
        seen = f"pixels {'in 0..255, less a mean only' if not small else 'divided by their deviation'} (bn1.running_var / |conv1|^2 is {scale:.3g})"
        if not stated and pixels == "auto":
            raise BadInput(
                f"{path}: its first layer has seen {seen}; say which by --init-pixels {'bgr_mean or rgb_mean' if not small else 'rgb or bgr'}"
            )
        lines.append(f"WARNING: its first layer seems to have seen {seen}")
    if small and pixels != "auto" and not release and "layer1.0.conv3.weight" in weights:
        lines.append(
            "WARNING: a Caffe-style ResNet (strides in the first 1x1 convolutions) would be another function here; weights do not show which it is"
        )
    factor = torch.tensor(data.IMAGENET_STD) / torch.tensor(std)
    if channels == "BGR" or (factor - 1).abs().max() > 1e-3:
        first = next(
            (f"{n}.weight" for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == 3), None
        )
        if first not in weights:
            raise BadInput(f"{path}: {kind}, and no first convolution that could be converted")
        w = weights[first].float()
        weights[first] = (w.flip(1) if channels == "BGR" else w) * factor.view(1, 3, 1, 1)
        lines.append(f"{first} converted to RGB, mean and deviation")
    return lines


# -----------------------------------------------------------------------------
# export


def save_backbone(encoder, arch, about, path):
    """backbone.pt: the image encoder alone, with torchvision's key names, and what pixels it wants. about: more to
    keep.
    """
    pixels = {"mean": data.IMAGENET_MEAN, "std": data.IMAGENET_STD, "channels": "RGB"}
    state_dict = {k: v.cpu().contiguous() for k, v in encoder.state_dict().items()}
    save_atomically({"state_dict": state_dict, "arch": arch, **about, **pixels}, path)


def export(checkpoint: Path, /, *, format: Literal["torchvision", "timm", "mmdet", "mmdet3d", "points"], out: Path):
    """Write the trained encoders for other people's code: {"state_dict", "meta"}, and the meta as JSON beside it.

    meta says arch, step, git revision and how pixels were normalised: mean and std of 0..1 values, channels; for mmdet
    and mmdet3d also img_norm_cfg, of 0..255 values. Zero biases stand where the release's point layers have some.

    Args:
        checkpoint: last.pt or backbone.pt of a run; points need last.pt. format: torchvision and timm have a ResNet's
        own names; mmdet has backbone. before them; mmdet3d img_backbone., and from
            a last.pt pts_backbone. too; points has pts_backbone. alone, the release's names.
        out: the file to write; FILE.pth has FILE.json beside it.
    """
    saved = read_checkpoint(checkpoint)
    if isinstance(saved, dict) and {"model", "config", "step", "identity"} <= saved.keys():
        config, part = saved["config"], lambda p: {k[len(p) :]: v for k, v in saved["model"].items() if k.startswith(p)}
        image, points = part("img_backbone."), part("pts_backbone.")
        about = {
            "arch": config["image_encoder"],
            "mean": data.IMAGENET_MEAN,
            "std": data.IMAGENET_STD,
            "channels": "RGB",
        }
        if not (config["intra_weight"] or config.get("init_points")):
            points = {}  # neither trained nor loaded
    elif isinstance(saved, dict) and {"state_dict", "arch", "mean", "std", "channels", "step"} <= saved.keys():
        config, image, points = {}, saved["state_dict"], {}
        about = {k: saved[k] for k in ("arch", "mean", "std", "channels")}
    else:
        raise BadInput(f"{checkpoint}: not a last.pt or backbone.pt of simipu.py")
    needs_points = format == "points" or format == "mmdet3d" and points
    if format == "points" and not points:
        raise BadInput(
            f"{checkpoint}: holds no trained point encoder"
            + (f" (--intra-weight {config['intra_weight']:g})" if config else "; export last.pt")
        )
    if needs_points and config["use_xyz"]:
        hint = "; export backbone.pt for the image encoder alone" if format == "mmdet3d" else ""
        raise BadInput(
            f"{checkpoint}: trained with --use-xyz, which the release's point encoder has no weights for{hint}"
        )
    if format != "points" and not image:
        raise BadInput(f"{checkpoint}: trained with --inter-weight 0, holds no image encoder")
    if about["arch"].startswith("timm:") and format not in ("timm", "points"):
        raise BadInput(
            f"--format {format}: {checkpoint} is of {about['arch']}, whose names only timm knows; give --format timm"
        )
    if out.is_dir() or out.suffix == ".json" or out.resolve() == checkpoint.resolve():
        raise BadInput(
            f"--out {out}: {'is a folder' if out.is_dir() else 'the JSON goes there' if out.suffix == '.json' else 'is the checkpoint itself'}"
        )
    beside = out.with_suffix(".json")

    meta = {"format": format, "step": saved["step"], "git": saved.get("git"), "from": checkpoint.name}
    if format != "points":
        meta |= {k: list(v) if isinstance(v, (tuple, list)) else v for k, v in about.items()}
    if format in ("mmdet", "mmdet3d"):
        meta["img_norm_cfg"] = {k: [round(255 * v, 3) for v in about[k]] for k in ("mean", "std")} | {
            "to_rgb": about["channels"] == "RGB"
        }
    prefix = {"mmdet": "backbone.", "mmdet3d": "img_backbone."}.get(format, "")
    weights = {} if format == "points" else {prefix + k: v for k, v in image.items()}
    if needs_points:
        meta["points"] = {"arch": "PointNet2SAMSG", "input": ["x", "y", "z", "reflectance"], "places": config["places"]}
        for name, value in points.items():
            weights["pts_backbone." + name] = value
            if name.endswith(".conv.weight"):
                weights["pts_backbone." + name.removesuffix("weight") + "bias"] = torch.zeros(len(value))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {out}: {e.strerror}") from None
    with writing(beside) as temporary:
        temporary.write_text(json.dumps(meta, indent=1) + "\n")
        save_atomically({"state_dict": {k: v.cpu().contiguous() for k, v in weights.items()}, "meta": meta}, out)
    print(
        f"{out}: {len(weights)} tensors of {checkpoint}, step {saved['step']}; {beside}: how its pixels are normalised and where it comes from"
    )
