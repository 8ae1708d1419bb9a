"""Is it learning, and is it right: matching on frames never trained on, and pictures.

`match` asks of every place in an unseen frame how well the trained image encoder points it out: the place's own image
feature is ranked among all of the frame's by its similarity to the place's point feature. Asked twice, of the right image
and of *another frame's image at the same pixels*. A fixed camera lets a network guess depth from the pixel's position
alone, which lowers both; only the gap between the two is what the network sees in the image.
"""

import copy
import dataclasses
import json
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
import ops_triton as ops
import runtime
import simipu
import weights
from data import BadInput


RECALIBRATE = 32  # frames that batch norm statistics are taken from


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
# pictures


def _figure(width, height):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, plt.figure(figsize=(width, height), layout="constrained")


def draw_curves(log_path, path):
    """Losses with their chance levels, top-1, and matched distance, from log.jsonl to a PNG."""
    log = [json.loads(line) for line in log_path.read_text().splitlines()]
    if not log:  # a finished run whose log was deleted
        return
    plt, figure = _figure(13, 3.6)
    left, middle, right = figure.subplots(1, 3)
    steps = [line["step"] for line in log]
    for loss, colour in (("intra", "tab:blue"), ("inter", "tab:orange")):
        if loss in log[0]:
            left.plot(steps, [line[loss] for line in log], color=colour, label=loss)
            left.plot(steps, [line[loss + "_chance"] for line in log], color=colour, ls=":", label=f"{loss}, chance")
            middle.plot(steps, [100 * line[loss + "_top1"] for line in log], color=colour, label=loss)
            right.plot(steps, [line[loss + "_positive"] for line in log], color=colour, label=f"{loss}, matched")
            right.plot(steps, [line[loss + "_negative"] for line in log], color=colour, ls=":", label=f"{loss}, unmatched")
    for axis, title in ((left, "InfoNCE loss"), (middle, "top-1, %"), (right, "mean cosine")):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@torch.no_grad()
def draw_pairs(model, view, path, match_places):
    """Are projection and matching right? One PNG of the first frame of `view` (a batch of data.augment). match_places
    (alpha, beta) is the matching to show, on float64 places (P, 3) in one frame.

    Above, the augmented image with the sweep on it, coloured by depth, and the encoder's places ringed: edges of things and
    jumps of colour must agree. Below, view alpha from above; view beta, each place in the colour of its match in alpha; and
    both in alpha's frame, beta brought back by T^-1, with a line for every match: the lines must be short.
    """
    model = copy.deepcopy(model).eval()
    clouds = [view[k][:1] for k in ("alpha", "beta")]
    a, b = (model.pts_backbone(cloud)[0][0].double().cpu().numpy() for cloud in clouds)
    alpha, beta = (cloud[0].double().cpu().numpy() for cloud in clouds)
    T, lidar2img = (view[k][0].double().cpu().numpy() for k in ("T", "lidar2img"))
    partner = match_places(a @ T[:3, :3].T + T[:3, 3], b)
    back = ((b - T[:3, 3]) @ np.linalg.inv(T[:3, :3]).T)[partner]  # view beta in the frame of view alpha
    distance = np.linalg.norm(a - back, axis=1)
    image = view["image"][0].cpu() * torch.tensor(data.IMAGENET_STD).view(3, 1, 1) + torch.tensor(data.IMAGENET_MEAN).view(3, 1, 1)

    plt, figure = _figure(14, 10)
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.42, 0.58])
    axis = top.subplots()
    axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy())
    for points, style in ((alpha, {"s": 1.2}), (a, {"s": 26, "edgecolors": "black", "linewidths": 0.8})):
        uv, depth = data.project(points, lidar2img)
        seen = data.inside_image(uv, depth, image.shape[2], image.shape[1])
        dots = axis.scatter(*uv[seen].T, c=depth[seen], cmap="turbo", vmin=0, vmax=50, **style)
    top.colorbar(dots, ax=axis, label="depth, m", shrink=0.7, pad=0.01)
    axis.set_title(f"view alpha on the augmented image, its {len(a)} places ringed")
    axis.axis("off")

    bearing = np.arctan2(a[:, 1], a[:, 0] - 25)  # around the middle of the scene, so that neighbours have like colours
    colours = plt.get_cmap("hsv")(bearing / (2 * np.pi) % 1)
    left, middle, right = bottom.subplots(1, 3)
    for axis, cloud, places, title in ((left, alpha, a, "view alpha from above"), (middle, beta, b[partner], "view beta, in the colours of its matches")):
        axis.scatter(-cloud[::4, 1], cloud[::4, 0], s=0.3, c="0.7")
        axis.scatter(-places[:, 1], places[:, 0], c=colours, s=10)
        axis.set_title(title)
    for p, q, colour in zip(a, back, colours):
        right.plot([-p[1], -q[1]], [p[0], q[0]], c=colour, lw=1)
    right.scatter(-a[:, 1], a[:, 0], c=colours, s=10)
    right.scatter(-back[:, 1], back[:, 0], facecolors="none", edgecolors="black", s=18, linewidths=0.5)
    right.set_title(f"both in alpha's frame: {distance.mean():.2f} m apart, {100 * (distance < 0.01).mean():.0f} % coincide")
    for axis in (left, middle, right):
        axis.set_aspect("equal")
        axis.set_xlabel("right, m")
    left.set_ylabel("forward, m")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    runtime.commands({"export": weights.export}, __doc__)


if __name__ == "__main__":
    main()
