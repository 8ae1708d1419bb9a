"""Weights in and out: what `simipu.py --init` and `--init-points` understand, and `eval.py export`.

    python simipu.py kitti --init imagenet                          # the paper's double fine-tuning
    python simipu.py kitti --init moco_v2_800ep_pretrain.pth.tar
    python simipu.py kitti --init SimIPU_kitti_50e.pth --init-points SimIPU_kitti_50e.pth
    python eval.py export out/kitti/last.pt --format mmdet3d --out simipu.pth       # and simipu.json beside it

weights_named.py has the names that stand for files, such as imagenet.

Loading takes one network out of a file and says which: among all dicts of tensors in the file, and all prefixes of
their names, the one that fits best. Among equals a known one comes first: the query encoder of MoCo and DenseCL, DINO's
teacher, the release's `img_backbone.`. Key encoders are never taken, `module.` and `_orig_mod.` mean nothing, and
nothing else in a file can overwrite the network, whatever its name. Less than 90 % of the parameters, another shape, a
deeper network, or values that are not finite are refused.

Pixels are normalised differently everywhere, and a network fed with the wrong ones fails quietly. Here they are x =
(rgb / 255 - mean) / std with ImageNet's mean and std. A file that says otherwise (this repo's do, mmcv's config text
does), or the release's (BGR, 0..255, mean only), is converted exactly in its first convolution. A file that says
nothing is taken to be as here, and the summary says so, unless its first layer contradicts (`pixel_scale`): then
`--init-pixels` must tell.

Tested on fabricated files with these names, not on the downloaded originals.
"""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors.torch
import torch
from torch import nn

import data
import encoders
import weights_named
from files import BadInput, read_any, read_checkpoint, save_atomically, writing

# of equals the first is taken: OpenSelfSup's MoCo and DenseCL; MoCo; mmdet3d; mmdet, DINO; plain; then all others
IMAGE_BRANCHES = ("encoder_q.0.", "encoder_q.", "img_backbone.", "backbone.", "")
POINT_BRANCHES = ("pts_backbone.", "")
WRAPPERS = ("teacher", "state_dict", "model")  # DINO holds student and teacher, and is used by its teacher
NESTED = 6  # dicts in dicts are looked into so deep
ENOUGH = 0.9  # of the parameters
KEY_ENCODER = r"(encoder|backbone)_k\.|momentum|^ema_"  # a running mean of the network that learned
KINDS = {
    "queue": r"queue",
    "key encoder": KEY_ENCODER,
    "predictor": r"pred",
    "point encoder": r"^pts_backbone\.",
    "image encoder": r"^(img_)?backbone\.",
    "head or classifier": r"(^|\.)(fc|head|heads|classifier|neck|projector|mlp\w*)\.|^encoder_q\.1\.",
}
UNDIVIDED = (1 / 255,) * 3  # the deviation, in 0..1, of pixels in 0..255 less a mean
PIXELS = {  # channel order, deviation of 0..1 values in RGB order; the mean is ImageNet's in all
    "rgb": ("RGB", data.IMAGENET_STD),
    "bgr": ("BGR", data.IMAGENET_STD),
    "rgb_mean": ("RGB", UNDIVIDED),
    "bgr_mean": ("BGR", UNDIVIDED),
}
OUR_PIXELS = {"mean": data.IMAGENET_MEAN, "std": data.IMAGENET_STD, "channels": "RGB"}
PIXEL_SCALE = 30  # between the two kinds of `pixel_scale`
RELEASE_EPS, EPS = 1e-3, 1e-5  # of the image encoder's batch norms: the release's config, and here


# -----------------------------------------------------------------------------
# loading


def load_image_encoder(encoder, path, pixels="auto", flag="--init"):
    """Load anybody's weights of the same network into `encoder`, so that it makes of pixels normalised as here what it
    made of theirs.

    encoder: encoders.ResNet, or one of timm's; names may be its own or those of timm's whole network. path: the file,
    or a name of weights_named.py. pixels: a key of PIXELS, how the file's pixels were normalised where it does not say;
    "auto" for the release's by their names, and else as here. flag: which gave the path, for messages.
    -> lines for the user: what was taken from where, what was ignored, and what the pixels were, said, converted or
    assumed. Raises BadInput, one line, for a file that is unreadable, holds less than 90 % of the parameters, other
    shapes, a deeper network or values that are not finite; and for pixels that cannot be converted (another mean) or
    contradict the file.

    Key names: facebookresearch/moco and dino, WXinlong/DenseCL, and zhyever/SimIPU (`Inter_Intro_moco_better`).
    """
    found = weights_named.find(path, encoder.arch, flag)
    path = found.path
    contents, left_out = read_any(path)
    if isinstance(contents, dict):
        contents = contents | found.pixels
    network = _choose(encoder, path, contents, left_out, IMAGE_BRANCHES)
    _refuse_misfits(path, network, "the image encoder of --image-encoder")
    weights = _sound_weights(path, network)
    # our heads have the same names as the release's, but no biases
    release = network.prefix == "img_backbone." and "mlp_cross_img.layer1.0.bias" in network.table
    notes = _convert_pixels(encoder, path, weights, contents, pixels, release)
    if release:
        _move_eps(weights)
        notes.append(f"batch norm's eps {RELEASE_EPS:g} (the release's config) moved into the running variances")
    encoder.load_state_dict(weights, strict=False)
    return "\n  ".join([*_summary(path, network), *notes])


def load_point_encoder(encoder, path):
    """Load an encoders.PointEncoder from this repo's last.pt, an export that holds points, or the release's file.

    The release has biases before its batch norms, which change nothing but the mean that batch norm takes away: each is
    subtracted from the running mean, which is exact. -> lines for the user. Raises BadInput as `load_image_encoder`
    does.
    """
    path = weights_named.find(path, "resnet50", "--init-points").path
    contents, left_out = read_any(path)
    network = _choose(encoder, path, contents, left_out, POINT_BRANCHES)
    _refuse_misfits(path, network, "a point encoder of the same --use-xyz and --point-features")
    encoder.load_state_dict(_sound_weights(path, network), strict=False)
    return "\n  ".join(_summary(path, network))


def _move_eps(weights):
    """Make batch norms with our eps the functions that they were with the release's."""
    for name in weights:
        if name.endswith("running_var"):
            weights[name] = weights[name] + (RELEASE_EPS - EPS)


# -----------------------------------------------------------------------------
# which network


@dataclasses.dataclass
class Network:
    """One network of a file, held against the encoder: tensors of one dict whose names have one prefix."""

    own: dict  # the encoder's tensors, by name
    where: tuple[str, ...]  # keys on the way to the dict, ("state_dict",)
    table: dict  # all tensors of that dict, by name
    prefix: str  # "encoder_q."
    branch: dict  # the tensors with that prefix, by name without it
    fits: dict  # those of them that the encoder has, in its shape
    share: float  # of the encoder's parameters that are in `fits`
    biases: list  # names in the branch of biases before a batch norm, which the encoder does without
    rivals: list = dataclasses.field(default_factory=list)  # labels of others that fit as well
    left_out: list = dataclasses.field(default_factory=list)  # classes of objects in the file that were not read

    @property
    def label(self):
        return ".".join([*self.where, self.prefix]) + "*"

    @property
    def named(self):
        """The share of names in common, in whatever shape, of those of the smaller network."""
        return len(self.own.keys() & self.branch.keys()) / min(len(self.own), len(self.branch) or 1)

    @property
    def missing(self):
        return [name for name in self.own if name not in self.fits]

    @property
    def unexpected(self):
        used = {self.prefix + name for name in (*self.fits, *self.biases)}
        return [name for name in self.table if name not in used]

    @property
    def counts(self):
        loaded = f"{len(self.fits)} tensors loaded ({self.share:.0%} of the parameters)"
        return f"{loaded}, {len(self.missing)} missing, {len(self.unexpected)} unexpected"


def _choose(encoder, path, contents, left_out, branches):
    """The Network in a file that fits `encoder` best. branches: prefixes that come first among equals.

    Raises BadInput for a file without tensors by name.
    """
    if not isinstance(contents, dict):
        raise BadInput(f"{path}: holds a {type(contents).__name__}, not tensors by name")
    tables = [(where, *_named_tensors(entries)) for where, entries in _dicts(contents)]
    tables = [(where, table, twice) for where, table, twice in tables if table]
    if not tables:
        objects = f", but objects of {_few(left_out)}: save the state_dict() alone" if left_out else ""
        raise BadInput(f"{path}: holds no tensors by name{objects}")
    own = encoder.state_dict()
    if getattr(encoder, "arch", "").startswith("timm:"):
        tables = [(where, weights_named.as_features(table, own), twice) for where, table, twice in tables]
    networks = []
    for where, table, _ in tables:
        for prefix in _prefixes(table, own):
            if not _is_key_encoder(where, prefix):
                networks.append(_network(encoder, own, where, table, prefix))
    if not networks:  # the largest dict, to show its names
        where, table, _ = max(tables, key=lambda entry: len(entry[1]))
        networks.append(_network(encoder, own, where, table, ""))
    networks.sort(key=lambda network: (*_unfit(network), *_rank(network, branches)))
    best = networks[0]
    best.rivals = [other.label for other in networks[1:] if _unfit(other) == _unfit(best)]
    best.left_out = left_out
    for where, _, twice in tables:
        if where == best.where and twice:
            raise BadInput(f"{path}: holds {twice} twice, once wrapped and once not")
    return best


def _dicts(entries, where=()):
    """Every dict within a dict, from the outermost inwards -> (keys on the way, the dict)."""
    yield where, entries
    for key, value in entries.items():
        if isinstance(value, dict) and len(where) < NESTED:
            yield from _dicts(value, (*where, _name(key)))


def _named_tensors(entries):
    """The tensors of a dict by name, without the wrappers' prefixes -> them, a name that came twice or None."""
    table, twice = {}, None
    for key, value in entries.items():
        tensor = _tensor(value)
        if tensor is not None:
            name = ".".join(part for part in _name(key).split(".") if part not in ("module", "_orig_mod"))
            if name in table:
                twice = name
            table[name] = tensor
    return table, twice


def _name(key):
    return key.decode("utf-8", "replace") if isinstance(key, bytes) else str(key)


def _tensor(value):
    """A dense tensor, also of a numpy array of numbers; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.dtype.itemsize <= 8:
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    if torch.is_tensor(value) and value.layout == torch.strided and not (value.is_quantized or value.is_meta):
        return value
    return None


def _prefixes(table, own):
    """All that stands before names which are also the encoder's own, in the file's order."""
    found = {}
    for name in table:
        parts = name.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in own:
                found[".".join([*parts[:i], ""])] = True
    return list(found)


def _is_key_encoder(where, prefix):
    return any(re.search(KEY_ENCODER, part) for part in (prefix, *(f"{key}." for key in where)))


def _unfit(network):
    """Smaller for a better fit: by the parameters, then by all tensors (an optimiser's moments by name have no running
    means), then by the names.
    """
    return -network.share, -len(network.fits), -network.named


def _rank(network, branches):
    """What comes first among networks that fit equally well: students last, then by the dict, then by the prefix."""
    by_dict = min(_place(key, WRAPPERS) for key in (*network.where, ""))
    return "student" in network.label, by_dict, _place(network.prefix, branches)


def _place(value, order):
    return order.index(value) if value in order else len(order)


def _network(encoder, own, where, table, prefix):
    branch = {name[len(prefix) :]: value for name, value in table.items() if name.startswith(prefix)}
    fits = {name: value for name, value in branch.items() if name in own and not _misfit(value, own[name])}
    sizes = {name: parameter.numel() for name, parameter in encoder.named_parameters()}
    share = sum(sizes[name] for name in sizes.keys() & fits.keys()) / sum(sizes.values())
    biases = [name for name in branch if name not in own and _bias_of(name, branch, fits)]
    return Network(own, where, table, prefix, branch, fits, share, biases)


def _misfit(value, own):
    """What is wrong with a tensor that is to take the place of `own`, or None."""
    if value.shape != own.shape:
        return f"is {tuple(value.shape)}, not {tuple(own.shape)}"
    if own.is_floating_point() and not value.is_floating_point():
        return f"is {value.dtype}, not {own.dtype}"
    return None


def _bias_of(name, branch, fits):
    """The running mean that a bias before batch norm can be taken off: (conv x + b, then batch norm) is (conv x, then
    batch norm with b taken off its running mean). None where there is none.
    """
    mean = name.removesuffix("conv.bias") + "bn.running_mean"
    if name.endswith(".conv.bias") and mean in fits and fits[mean].shape == branch[name].shape:
        return mean
    return None


def _refuse_misfits(path, network, what):
    """Raises BadInput for another network than `what`: too few parameters, another shape, a deeper one."""
    own, wrong = network.own, []
    for name, value in network.branch.items():
        if name in own and name not in network.fits:
            wrong.append(f"{network.prefix}{name} {_misfit(value, own[name])}")
    begins = {name.split(".")[0] for name in own}
    for name in network.branch:
        if name not in own and name not in network.biases and name.split(".")[0] in begins:
            wrong.append(f"{network.prefix}{name} has no place")
    if network.share >= ENOUGH and not wrong:
        return
    if wrong and network.named > 0.8:
        said = wrong[:1]
    else:
        said = _names_that_differ(network)
    raise BadInput("; ".join([f"{path}: {network.counts}", *said, f"is this {what}?"]))


def _names_that_differ(network):
    """Parts of a message for a network that is hardly there: what is, beside what should be."""
    said = [f"wanted, but not in it: {_few(network.missing)}"]
    if network.unexpected:
        said.append(f"in it, but not wanted: {_few(network.unexpected)}")
    for prefix in _prefixes(network.table, network.own)[:1]:
        if _is_key_encoder(network.where, prefix):
            said.append(f"{prefix}* is a key encoder, which is never taken")
    if network.left_out:
        said.append(f"not read: objects of {_few(network.left_out)}")
    return said


def _few(names):
    """The first three names of a list."""
    return ", ".join([*names[:3], "..."] if len(names) > 3 else names)


def _sound_weights(path, network):
    """The weights of a network in the encoder's own number formats, biases before batch norm moved into the running
    means. Raises BadInput for values that are not finite.
    """
    weights = {name: value.to(network.own[name].dtype) for name, value in network.fits.items()}
    for name in network.biases:
        mean = _bias_of(name, network.branch, network.fits)
        weights[mean] = weights[mean] - network.branch[name].to(weights[mean].dtype)
    for name, value in weights.items():
        broken = int((~value.isfinite()).sum())
        if broken:
            which = f"{broken} of {value.numel()} values are not finite (nan or inf)"
            raise BadInput(f"{path}: {network.prefix}{name}: {which}")
    return weights


def _summary(path, network):
    """Lines for the user: how much was taken, from where, and what was ignored."""
    taken = f"taken: {network.prefix}*" if network.prefix else "taken: names without prefix"
    rivals = network.rivals
    if network.where == ("teacher",) and rivals and all(label.startswith("student.") for label in rivals):
        taken += " of the teacher; its student is left"
        rivals = []
    elif network.where:
        taken += f" of {'.'.join(network.where)}"
    if rivals:
        taken += f"; as good, and left: {_few(rivals)}"
    if network.biases:
        taken += f"; {len(network.biases)} biases before batch norm moved into the running means"
    lines = [f"{path}: {network.counts}", taken]
    kinds = Counter(_kind(name) for name in network.unexpected)
    if kinds:
        lines.append("ignored: " + ", ".join(f"{n} {kind}" for kind, n in kinds.items()))
    if network.left_out:
        lines.append(f"not read: objects of {_few(network.left_out)}")
    return lines


def _kind(name):
    """What a tensor that nobody wanted belongs to, by its name."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, name):
            return kind
    return "other"


# -----------------------------------------------------------------------------
# which pixels


@dataclasses.dataclass
class Pixels:
    """How pixels were normalised: x = (rgb / 255 - mean) / std, then put in the order of `channels`."""

    channels: str  # RGB or BGR
    mean: tuple[float, ...]  # of 0..1 values, in RGB order
    std: tuple[float, ...]
    by: str  # who says so

    @property
    def undivided(self):
        return max(self.std) < 0.05

    def __str__(self):
        how = "0..255 less the mean" if self.undivided else "mean and deviation"
        return f"{self.channels}, {how}"


def pixel_scale(weights):
    """Which pixels the first layer of a ResNet has seen: the median over filters of bn1.running_var / |filter|^2, the
    variance of a filter's answer per unit of filter. About 1 for pixels divided by their deviation, about 58^2 for
    0..255 less a mean.

    Measured on KITTI: random filters 1.2 and 4040, Gabor filters 0.35 and 1160. None where nothing can be told: no such
    layer, or variances as they were initialised.
    """
    filters, var = weights.get("conv1.weight"), weights.get("bn1.running_var")
    if filters is None or var is None or bool((var == 1).all()):
        return None
    power = filters.float().flatten(1).square().sum(1)
    if not bool((power > 0).any()):
        return None
    return (var.float() / power)[power > 0].median().item()


def _convert_pixels(encoder, path, weights, contents, flag, release):
    """Rewrite the first convolution in `weights` for pixels as they are here. -> lines for the user. Raises BadInput
    where the file, its first layer and `flag` contradict each other, or the means differ.
    """
    bottleneck = "layer1.0.conv3.weight" in weights
    if bottleneck and re.search(r"style\s*=\s*['\"]caffe", str(contents.get("meta"))):
        where = "whose strides lie in other convolutions"
        raise BadInput(f"{path}: a Caffe-style ResNet, {where}; here the same weights are another function")
    stated = _stated(path, contents)
    pixels = stated or _assumed(flag, release)
    if stated and flag != "auto":
        _check_flag(path, stated, flag)
    if max(abs(a - b) for a, b in zip(pixels.mean, data.IMAGENET_MEAN)) > 1e-3:
        mean = ", ".join(f"{v:.4g}" for v in pixels.mean)
        why = "not ImageNet's mean; that cannot be converted exactly"
        raise BadInput(f"{path}: pixels less {mean} (RGB, of 0..1), {why}")
    lines = [f"pixels: {pixels} ({pixels.by})"]
    lines += _doubts(path, weights, pixels, open_question=not stated and flag == "auto")
    if pixels.undivided and flag != "auto" and not release and bottleneck:
        caffe = "a Caffe-style ResNet (strides in the first 1x1 convolutions) would be another function here"
        lines.append(f"WARNING: {caffe}; weights do not show which it is")
    return lines + _convert_first_convolution(encoder, path, weights, pixels)


def _stated(path, contents):
    """Pixels as the file says, or None where it does not. Raises BadInput where it says so in a way that is not
    understood.
    """
    if {"config", "identity"} <= contents.keys():
        by = f"a last.pt of {contents.get('script', 'simipu.py')}"
        return Pixels("RGB", data.IMAGENET_MEAN, data.IMAGENET_STD, by)
    metas = [contents.get(key) for key in ("meta", "__metadata__")]
    metas = [meta for meta in metas if isinstance(meta, dict)]
    for said in (contents, *metas):
        if {"mean", "std", "channels"} <= said.keys():
            return _understood(path, said["channels"], said["mean"], said["std"], 1, said.get("by", "the file says"))
    for meta in metas:
        found = re.search(r"img_norm_cfg\s*=\s*dict\((.*?)\)", str(meta.get("config", "")), re.DOTALL)
        if found:
            return _of_mmcv(path, found[1])
    return None


def _of_mmcv(path, text):
    """Pixels as the text of a config says, which mmcv keeps: mean=[...], std=[...], to_rgb=...; None where it is
    incomplete.
    """
    values = dict(re.findall(r"(mean|std)\s*=\s*\[(.*?)\]", text, re.DOTALL))
    if len(values) < 2:
        return None
    channels = "BGR" if re.search(r"to_rgb\s*=\s*False", text) else "RGB"
    return _understood(path, channels, values["mean"], values["std"], 255, "the config in the file says")


def _understood(path, channels, mean, std, scale, by):
    """mean, std: three numbers each in the order of `channels`, or text that lists them; `scale` is white."""
    try:
        mean, std = _numbers(mean, scale), _numbers(std, scale)
    except (TypeError, ValueError):
        mean = std = ()
    sound = len(mean) == len(std) == 3 and min(std) > 0 and np.isfinite([*mean, *std]).all()
    if channels not in ("RGB", "BGR") or not sound:
        raise BadInput(f"{path}: says mean, std and channels of its pixels in a way that is not understood")
    if channels == "BGR":
        mean, std = mean[::-1], std[::-1]
    return Pixels(channels, mean, std, by)


def _numbers(said, scale):
    if isinstance(said, str):
        said = re.sub(r"[][(),]", " ", said).split()
    return tuple(float(value) / scale for value in said)


def _assumed(flag, release):
    """Pixels of a file that does not say."""
    key, by = flag, "as --init-pixels says"
    if flag == "auto" and release:
        key, by = "bgr_mean", "known of the release's files"
    elif flag == "auto":
        key, by = "rgb", "assumed: the file does not say"
    channels, std = PIXELS[key]
    return Pixels(channels, data.IMAGENET_MEAN, std, by)


def _check_flag(path, stated, flag):
    """Raises BadInput where --init-pixels contradicts the file."""
    channels, std = PIXELS[flag]
    if stated.channels != channels or not np.allclose(stated.std, std, rtol=0.02, atol=0):
        own = ", ".join(f"{v:.3g}" for v in stated.std)
        raise BadInput(f"--init-pixels {flag}: {path} itself says {stated.channels}, std {own}")


def _doubts(path, weights, pixels, open_question):
    """A warning, in a list, where the first layer has seen other pixels. Raises BadInput where it is an open question
    which: neither the file nor the user says.
    """
    scale = pixel_scale(weights)
    if scale is None or (scale > PIXEL_SCALE) == pixels.undivided:
        return []
    seen, flags = "divided by their deviation", "rgb or bgr"
    if scale > PIXEL_SCALE:
        seen, flags = "in 0..255, less a mean only", "bgr_mean or rgb_mean"
    seen = f"pixels {seen} (bn1.running_var / |conv1|^2 is {scale:.3g})"
    if open_question:
        raise BadInput(f"{path}: its first layer has seen {seen}; only --init-pixels {flags} can say which")
    return [f"WARNING: its first layer seems to have seen {seen}"]


def _convert_first_convolution(encoder, path, weights, pixels):
    """With x = (rgb / 255 - mean) / std here and x' = (rgb / 255 - mean) / std' there, x' = x std / std'; so a filter's
    channel is multiplied by std / std', after the channels were put in order. Exact, at the zero padding too; another
    mean could not be. -> lines for the user.
    """
    factor = torch.tensor(data.IMAGENET_STD) / torch.tensor(pixels.std)
    if pixels.channels == "RGB" and (factor - 1).abs().max() <= 1e-3:
        return []
    first = None
    for name, layer in encoder.named_modules():
        if first is None and isinstance(layer, nn.Conv2d) and layer.in_channels == 3:
            first = f"{name}.weight"
    if first not in weights:
        raise BadInput(f"{path}: {pixels}, and no first convolution that could be converted")
    filters = weights[first].float()
    if pixels.channels == "BGR":
        filters = filters.flip(1)
    weights[first] = filters * factor.view(1, 3, 1, 1)
    return [f"{first} converted to RGB, mean and deviation"]


# -----------------------------------------------------------------------------
# export


def save_backbone(encoder, arch, about, path):
    """backbone.pt: the image encoder alone, with torchvision's key names, and what pixels it wants. about: more to
    keep.
    """
    state_dict = {name: value.cpu().contiguous() for name, value in encoder.state_dict().items()}
    save_atomically({"state_dict": state_dict, "arch": arch, **about, **OUR_PIXELS}, path)


@dataclasses.dataclass
class Trained:
    """What a run learned, as its last.pt or backbone.pt says."""

    image: dict  # the image encoder's weights by torchvision's names, {} without one
    points: dict  # the point encoder's, {} where it was neither trained nor loaded
    about: dict  # arch, mean, std, channels
    config: dict  # {} from a backbone.pt
    step: int
    git: str | None


def export(checkpoint: Path, /, *, format: Literal["torchvision", "timm", "mmdet", "mmdet3d", "points"], out: Path):
    """Write the trained encoders for other people's code: {"state_dict", "meta"}, and the meta as JSON beside it. To a
    name that ends in .safetensors, the tensors with the meta as that format's own.

    meta says arch, step, git revision and how pixels were normalised: mean and std of 0..1 values, channels; for mmdet
    and mmdet3d also img_norm_cfg, of 0..255 values. Zero biases stand where the release's point layers have some.

    Args:
        checkpoint: last.pt or backbone.pt of a run; points need last.pt.
        format: torchvision and timm have a ResNet's own names; mmdet has backbone. before them; mmdet3d img_backbone.,
            and from a last.pt pts_backbone. too; points has pts_backbone. alone, the release's names.
        out: the file to write; FILE.pth has FILE.json beside it.
    """
    run = _trained(checkpoint)
    with_points = format == "points" or (format == "mmdet3d" and bool(run.points))
    _refuse_format(checkpoint, run, format, with_points)
    _refuse_place(checkpoint, out)
    weights = {}
    if format != "points":
        prefix = {"mmdet": "backbone.", "mmdet3d": "img_backbone."}.get(format, "")
        named = run.image
        if run.about["arch"].startswith("timm:"):
            named = weights_named.as_whole(named, run.about["arch"])
        weights |= {prefix + name: value for name, value in named.items()}
    if with_points:
        weights |= _points_of_release(run.points)
    meta = _meta(checkpoint, run, format, with_points)
    beside = out.with_suffix(".json")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {out}: {e.strerror}") from None
    with writing(beside) as temporary:
        temporary.write_text(json.dumps(meta, indent=1) + "\n")
        state_dict = {name: value.cpu().contiguous() for name, value in weights.items()}
        if out.suffix == ".safetensors":
            said = {key: value if isinstance(value, str) else json.dumps(value) for key, value in meta.items()}
            with writing(out) as whole:
                whole.write_bytes(safetensors.torch.save(state_dict, said | {"format": "pt"}))  # as others say it
        else:
            save_atomically({"state_dict": state_dict, "meta": meta}, out)
    print(f"{out}: {len(weights)} tensors of {checkpoint}, step {run.step}; ", end="")
    print(f"{beside}: how its pixels are normalised and where it comes from")


def _trained(checkpoint):
    """A last.pt of simipu.py, or any backbone.pt, moco.py's too -> Trained. Raises BadInput for other files."""
    saved = read_checkpoint(checkpoint)
    if isinstance(saved, dict) and saved.get("script", "simipu.py") == "simipu.py":
        if {"model", "config", "step", "identity"} <= saved.keys():
            config = saved["config"]
            points = _part(saved["model"], "pts_backbone.")
            if not (config["intra_weight"] or config.get("init_points")):
                points = {}  # neither trained nor loaded
            about = {"arch": config["image_encoder"], **OUR_PIXELS}
            image = _part(saved["model"], "img_backbone.")
            return Trained(image, points, about, config, saved["step"], saved.get("git"))
        if {"state_dict", "arch", "mean", "std", "channels", "step"} <= saved.keys():
            about = {key: saved[key] for key in ("arch", "mean", "std", "channels")}
            return Trained(saved["state_dict"], {}, about, {}, saved["step"], saved.get("git"))
    raise BadInput(f"{checkpoint}: not a last.pt of simipu.py, nor a backbone.pt")


def _part(state_dict, prefix):
    return {name[len(prefix) :]: value for name, value in state_dict.items() if name.startswith(prefix)}


def _refuse_format(checkpoint, run, format, with_points):
    """Raises BadInput for a format that this run cannot have."""
    arch = run.about["arch"]
    if format == "points" and not run.points:
        why = f" (--intra-weight {run.config['intra_weight']:g})" if run.config else "; export last.pt"
        raise BadInput(f"{checkpoint}: holds no trained point encoder{why}")
    if with_points and run.config["use_xyz"]:
        why = "trained with --use-xyz, which the release's point encoder has no weights for"
        hint = "; export backbone.pt for the image encoder alone" if format == "mmdet3d" else ""
        raise BadInput(f"{checkpoint}: {why}{hint}")
    if format != "points" and not run.image:
        raise BadInput(f"{checkpoint}: trained with --inter-weight 0, holds no image encoder")
    if arch.startswith("timm:") and format not in ("timm", "points"):
        raise BadInput(f"--format {format}: {checkpoint} is of {arch}, whose names only timm knows; give --format timm")


def _refuse_place(checkpoint, out):
    """Raises BadInput for an --out that would not be a file of its own."""
    if out.is_dir():
        raise BadInput(f"--out {out}: is a folder")
    if out.suffix == ".json":
        raise BadInput(f"--out {out}: the JSON goes there")
    if out.resolve() == checkpoint.resolve():
        raise BadInput(f"--out {out}: is the checkpoint itself")


def _meta(checkpoint, run, format, with_points):
    """What stands beside the weights, as JSON can hold it."""
    meta = {"format": format, "step": run.step, "git": run.git, "from": checkpoint.name}
    if format != "points":
        meta |= run.about | {key: list(run.about[key]) for key in ("mean", "std")}
    if format in ("mmdet", "mmdet3d"):
        of_255 = {key: [round(255 * value, 3) for value in run.about[key]] for key in ("mean", "std")}
        meta["img_norm_cfg"] = {**of_255, "to_rgb": run.about["channels"] == "RGB"}
    if with_points:
        features = run.config.get("point_features", ["reflectance"])
        channels = [channel for name in features for channel in encoders.POINT_FEATURES[name]]
        places = run.config["places"]
        meta["points"] = {"arch": "PointNet2SAMSG", "input": ["x", "y", "z", *channels], "places": places}
    return meta


def _points_of_release(points):
    """The point encoder by the release's names, with zeros where its layers have biases before batch norm."""
    weights = {}
    for name, value in points.items():
        weights[f"pts_backbone.{name}"] = value
        if name.endswith(".conv.weight"):
            weights[f"pts_backbone.{name.removesuffix('weight')}bias"] = torch.zeros(len(value))
    return weights
