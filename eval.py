"""Is it learning, and is it right: matching on frames never trained on, and pictures of one frame.

    python eval.py show out/demo/last.pt --split val --frame 3       # four PNGs into out/demo/show/; every flag: --help

`match` asks of every place in an unseen frame how well the trained image encoder points it out: the place's own image
feature is ranked among all of the frame's by its similarity to the place's point feature. Asked twice, of the right image
and of *another frame's image at the same pixels*. A fixed camera lets a network guess depth from the pixel's position
alone, which lowers both; only the gap between the two is what the network sees in the image.
"""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

import data
import ops_triton as ops
import pictures
import runtime
import simipu
from data import BadInput


RECALIBRATE = 32  # frames that batch norm statistics are taken from
FEW = 8  # the same, for pictures


def load_model(path, device="cpu"):
    """The whole model of a run's last.pt, in eval mode, and its Config. Raises BadInput for any other file."""
    saved = runtime.read_checkpoint(path)
    if not isinstance(saved, dict) or not {"model", "config"} <= saved.keys():
        raise BadInput(f"{path}: not a last.pt of simipu.py")
    known = {f.name: f for f in dataclasses.fields(simipu.Config)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items() if k in known}
    c = simipu.Config(**values)
    model = simipu.SimIPU(c)
    model.load_state_dict(saved["model"])
    return model.to(device).eval(), c


def load_unseen(frame, index, c):
    """One frame for evaluation: no rotation, scale or flip, and the same points every time."""
    rng = np.random.default_rng([data.SAMPLE, 0, 0, index])
    sample = data.load_frame(frame, c.num_points, rng)
    return sample | {"flip": False, "T": np.eye(4), "shuffle": rng.permutation(c.num_points), "index": index}


def image_box(c):
    """The size images are judged at: the training size, or KITTI's own where training draws from a range."""
    return tuple(c.image_scale) if len(c.image_scale) == 2 else (1242, 375)


@torch.no_grad()
def recalibrated(model, batches):
    """A copy of the model, in eval mode, whose batch norm statistics are the average over `batches` (of data.augment).
    Networks trained for a hundred steps, and ones not trained at all, are judged alike only this way."""
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for i, batch in enumerate(batches):
        for norm in norms:
            norm.momentum = 1 / (i + 1)
        model(batch)
    return model.eval()


@torch.no_grad()
def match(model, frames, c, device):
    """Rank of the true image feature, for the right image and for another frame's. Needs both branches of the model.

    -> dict of right and wrong, each dict of rank: median over places of the share of candidates that beat the true one, in
    percent (50 is chance, 0 perfect); top1: share of places whose true feature is the best; excess: mean cross-entropy less
    its chance level ln(candidates). Further gap: median rank wrong - right, in points, with its 95 % interval over frames
    (bootstrap). Deterministic. One frame is held at a time; the other image is the frame's before it.
    """
    view = lambda chosen: data.augment(data.collate([load_unseen(frames[i], i, c) for i in chosen]), image_box(c), device)
    few = range(min(len(frames), RECALIBRATE))
    model = recalibrated(model, (view(few[i : i + c.group]) for i in range(0, len(few), c.group)))

    per_frame = {"right": [], "wrong": []}
    other = model.img_backbone(view([len(frames) - 1])["image"])[-1]
    for i in range(len(frames)):
        v = view([i])
        own = model.img_backbone(v["image"])[-1]
        places, features = model.pts_backbone(v["alpha"])
        uv, depth = data.project(places, v["lidar2img"])
        seen = data.inside_image(uv, depth, *v["image"].shape[:1:-1])[0]
        query = F.normalize(model.mlp_cross_points(features[0][seen]), dim=1)  # (n, 128)
        for which, feature_map in (("right", own), ("wrong", other)):
            sampled = ops.bilinear_sample(feature_map, uv / model.img_backbone.stride)[0][seen]
            logits = query @ F.normalize(model.mlp_cross_img(sampled), dim=1).T / c.temperature  # (n, n)
            true = logits.diagonal()[:, None]
            beaten_by = ((logits > true).sum(1) + ((logits == true).sum(1) - 1) / 2) / max(len(logits) - 1, 1)
            excess = F.cross_entropy(logits, torch.arange(len(logits), device=device), reduction="none") - math.log(len(logits))
            per_frame[which].append(torch.stack([100 * beaten_by, ((logits >= true).sum(1) == 1).float(), excess]).cpu())
        other = own

    def summary(chosen):
        out = {}
        for which, found in per_frame.items():
            rank, top1, excess = torch.cat([found[i] for i in chosen], 1)
            out[which] = {"rank": rank.median().item(), "top1": top1.mean().item(), "excess": excess.mean().item()}
        return out | {"gap": out["wrong"]["rank"] - out["right"]["rank"]}

    rng = np.random.default_rng(0)
    gaps = [summary(rng.integers(len(frames), size=len(frames)))["gap"] for _ in range(200)]
    return summary(range(len(frames))) | {"gap_interval": tuple(np.percentile(gaps, [2.5, 97.5]).tolist()), "frames": len(frames)}


def match_table(rows):
    """Lines of text for {name: result of `match`}."""
    lines = [f"{'':>10}   right image: rank   top1  excess   another's: rank   top1  excess   gap (95 %)"]
    for name, r in rows.items():
        cells = [f"{r[w]['rank']:>{width}.1f} % {100 * r[w]['top1']:5.1f} % {r[w]['excess']:+7.2f}" for w, width in (("right", 17), ("wrong", 16))]
        lines.append(f"{name:>10} {cells[0]} {cells[1]}   {r['gap']:.1f} ({r['gap_interval'][0]:.1f} to {r['gap_interval'][1]:.1f})")
    return lines


# -----------------------------------------------------------------------------
# commands


def find_frame(frames, wanted):
    """Index of the frame that `wanted` (text) names: an index, a name such as training/000003, or the end of one name. Raises BadInput."""
    named = [i for i, f in enumerate(frames) if wanted == f.name] or [i for i, f in enumerate(frames) if f.name.endswith("/" + wanted)]
    if len(named) == 1:
        return named[0]
    if wanted in map(str, range(len(frames))) and not named:
        return int(wanted)
    what = f"{len(named)} frames of that name" if named else "no such frame"
    raise BadInput(f"--frame {wanted}: {what}; there are 0 to {len(frames) - 1}, {frames[0].name} to {frames[-1].name}")


def show(
    checkpoint: Path,
    /,
    data_root: Path | None = None,
    split: str | None = None,
    frame: str = "0",
    seed: int = 0,
    point: tuple[float, float, float] | None = None,
    pixel: tuple[float, float] | None = None,
    out: Path | None = None,
    device: Literal["auto", "cuda", "cpu"] = "auto",
) -> None:
    """Four pictures of one frame: projection, pairs, features, similarity. No augmentation in the last two but the second view's.

    Args:
        checkpoint: last.pt of a run.
        data_root: Folder in KITTI's object or raw layout. Not given: the folders the run was trained on.
        split: Of the object layout: a file in ImageSets/. Not given: the run's --eval-splits, or its --splits.
        frame: Index into the split, or a frame's name, such as training/000003.
        seed: Of the augmentation that is drawn: another seed, another image scale, flip and second view.
        point: Metres in the LiDAR's frame (x forward, y left, z up). similarity.png asks about the place nearest to it.
        pixel: The same by pixel (u v) of similarity.png's image. Neither given: something near the middle.
        out: Folder for the PNGs. Not given: show/FRAME beside the checkpoint.
        device: auto is the GPU if there is one.
    """
    if point is not None and pixel is not None:
        raise BadInput("--point and --pixel: give one of them")
    model, c = load_model(checkpoint)
    run = runtime.start_run(device, seed)
    roots, splits = [data_root] if data_root else c.data_root, [split] if split else c.eval_splits or c.splits
    frames = [f for root in roots for f in data.find_frames(root, splits, c.frame_stride, c.skip_missing)]
    index = find_frame(frames, frame)
    few = [i % len(frames) for i in range(index, index + min(len(frames), FEW))]  # as `match` does, from fewer frames
    unseen = (data.augment(data.collate([load_unseen(frames[i], i, c) for i in few[k : k + c.group]]), image_box(c), run.device) for k in range(0, len(few), c.group))
    model = recalibrated(model.to(run.device), unseen)

    # the same points twice: as training sees them, and with the image as it is
    sample = data.PretrainFrames(frames, dataclasses.replace(c, seed=seed))[(0, index)]
    if isinstance(sample, BadInput):
        raise sample
    box = data.random_image_scale(c.image_scale, seed, 0)
    trained_on = data.augment(data.collate([sample]), box, run.device)
    plain = data.augment(data.collate([sample | {"flip": False}]), image_box(c), run.device)
    found, (height, width) = pictures.embed(model, plain), plain["image"].shape[2:]
    place, chosen = pictures.choose_place(found, height, width, point, pixel)

    # nothing was written so far: wrong input leaves no trace
    name = frames[index].name
    folder = out or checkpoint.parent / "show" / name
    folder.mkdir(parents=True, exist_ok=True)
    pairs = functools.partial(simipu.match_places, method=c.matching)
    old, new = sample["image"].shape[1::-1], trained_on["image"].shape[:1:-1]
    scale = min(b / o for b, o in zip(box, old))
    how = f"{name} as training sees it with seed {seed}: {old[0]} x {old[1]} pixels scaled by {scale:.2f}, "
    how += f"{'mirrored' if sample['flip'] else 'not mirrored'}, padded to {new[0]} x {new[1]}"
    at = "x {:.1f} m, y {:.1f} m, z {:.1f} m".format(*found["places"][place].tolist())
    said = {
        "projection.png": pictures.draw_projection(trained_on, folder / "projection.png", how),
        "pairs.png": pictures.draw_pairs(model, trained_on, folder / "pairs.png", pairs),
        "features.png": pictures.draw_features(plain, found, folder / "features.png", name, pairs),
        "similarity.png": pictures.draw_similarity(plain, found, folder / "similarity.png", place, f"{name}: what is like the place at {at} (star)?"),
    }
    said["similarity.png"] += f" (place at {at}: {chosen})"
    print(f"{folder}/")
    print("\n".join(f"  {picture:<15} {line}" for picture, line in said.items()))


def main():
    runtime.commands({"show": show}, __doc__)


if __name__ == "__main__":
    main()
