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


def image_box(c):
    """The size images are judged at: the training size, or KITTI's own where training draws from a range."""
    return tuple(c.image_scale) if len(c.image_scale) == 2 else (1242, 375)


class Unseen:
    """Frames as evaluation sees them: whole images with their own colours, the same points and the same second view every time."""

    def __init__(self, frames, c, device):
        plain = {"seed": 0, "pairs": "true", "flip": 0.0, "crop": (1.0, 1.0), "shift": (0.0, 0.0), "jitter": (0.0,) * 4}
        self.frames = data.PretrainFrames(frames, dataclasses.replace(c, **plain))
        self.box, self.device = image_box(c), device

    def batch(self, indices):
        batch = data.collate([self.frames[(0, i)] for i in indices])
        if isinstance(batch, BadInput):
            raise batch
        return data.augment(batch, self.box, self.device)


@torch.no_grad()
def recalibrated(model, batches):
    """A copy of the model, in eval mode, whose batch norm statistics are the average over `batches` (of data.augment).
    Networks trained for a hundred steps, and ones not trained at all, are judged alike only this way."""
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for i, batch in enumerate(batches):
        for norm in norms:
            norm.momentum = 1 / (i + 1)
        model(batch, report=False)
    return model.eval()


# -----------------------------------------------------------------------------
# matching on frames never trained on


def ranks(query, key, temperature):
    """How well each query (n, D) points out its own key (n, D) among all. -> (3, n): share of the other keys that beat it, in
    percent; whether none does (a tie is no success); cross-entropy less its chance level ln n. l2-normalised here."""
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature  # (n, n)
    own = logits.diagonal()[:, None]
    beaten_by = ((logits > own).sum(1) + ((logits == own).sum(1) - 1) / 2) / max(len(logits) - 1, 1)
    excess = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none") - math.log(len(logits))
    return torch.stack([100 * beaten_by, ((logits >= own).sum(1) == 1).float(), excess]).cpu()


@torch.no_grad()
def match(model, frames, c, device):
    """Does a place point out its own pixel, and its own partner in the other view, on these frames (two or more)?

    -> dict of, for `right` (the frame's image) and `wrong` (another frame's image at the same pixels): _rank, the median over
    places of the share of candidates, the frame's places, that beat the true one, in percent (50 is chance, 0 perfect); _top1,
    the share of places whose true one is the best; _excess, mean cross-entropy less its chance level ln(candidates). `gap` is
    wrong_rank - right_rank, in points, and `gap_interval` its 95 % interval over frames (bootstrap). The same three for `intra`,
    against the matched places of the other view. A branch that the model lacks has no figures. Deterministic; one frame is held
    at a time. The other image is that of a frame half the list away, for neighbours may be near copies.
    """
    unseen = Unseen(frames, c, device)
    few = range(min(len(frames), RECALIBRATE))
    model = recalibrated(model, (unseen.batch(few[i : i + c.group]) for i in range(0, len(few), c.group)))

    half = -(-len(frames) // 2)
    order = sorted(range(len(frames)), key=lambda i: (i % half, i))  # 0, half, 1, half + 1, ...: the frame before is half the list away
    see = lambda batch: model.img_backbone(batch["image"].contiguous(memory_format=torch.channels_last))[-1]
    other = see(unseen.batch([order[-1]])) if c.inter_weight else None
    found = {"right": {}, "wrong": {}, "intra": {}}
    for i in order:
        batch = unseen.batch([i])
        views = torch.cat([batch["alpha"], batch["beta"]]) if c.intra_weight else batch["alpha"]
        places, features = model.pts_backbone(views)
        if c.inter_weight:
            uv, depth = data.project(places[:1], batch["lidar2img"])
            seen = data.inside_image(uv, depth, *batch["image"].shape[:1:-1])[0]
            query, own = model.mlp_cross_points(features[0][seen]), see(batch)
            for which, feature_map in (("right", own), ("wrong", other)):
                key = model.mlp_cross_img(ops.bilinear_sample(feature_map, uv / model.img_backbone.stride)[0][seen])
                found[which][i] = ranks(query, key, c.temperature)
            other = own
        if c.intra_weight:
            partner = simipu.match_in_background(places[:1], places[1:], batch["T"], torch.ones(1, c.places), c.matching)()[0][0]
            found["intra"][i] = ranks(model.mlp_intro_points(features[0]), model.mlp_intro_points(features[1])[partner], c.temperature)

    def median_rank(which, chosen):
        return torch.cat([found[which][i][0] for i in chosen]).median().item()

    out = {"frames": len(frames)}
    for which, per_frame in found.items():
        if per_frame:
            _, top1, excess = torch.cat(list(per_frame.values()), 1).mean(1).tolist()
            out |= {f"{which}_rank": median_rank(which, order), f"{which}_top1": top1, f"{which}_excess": excess}
    if c.inter_weight:
        rng = np.random.default_rng(0)
        draws = [rng.integers(len(frames), size=len(frames)) for _ in range(200)]
        gaps = [median_rank("wrong", d) - median_rank("right", d) for d in draws]
        out |= {"gap": out["wrong_rank"] - out["right_rank"], "gap_interval": np.percentile(gaps, [2.5, 97.5]).tolist()}
    return {k: [round(x, 4) for x in v] if isinstance(v, list) else round(v, 4) for k, v in out.items()}


def match_table(rows):
    """Lines of text for {name: result of `match`}."""
    width = max(map(len, rows))
    lines = [
        f"matching on {next(iter(rows.values()))['frames']} frames: median rank of the true one among a frame's places (0 best, 50 % chance), top1, cross-entropy less chance",
        f"{'':>{width}}        right image            another's image      gap in rank (95 %)    other view's places",
    ]
    for name, r in rows.items():
        cells = [
            f"{r[w + '_rank']:6.1f} % {100 * r[w + '_top1']:5.1f} % {r[w + '_excess']:+6.2f}" if w + "_rank" in r else f"{'-':>23}" for w in ("right", "wrong", "intra")
        ]
        gap = f"{r['gap']:5.1f} ({r['gap_interval'][0]:.1f} to {r['gap_interval'][1]:.1f})" if "gap" in r else "-"
        lines.append(f"{name:>{width}} {cells[0]} {cells[1]}  {gap:^22}{cells[2]}")
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
    log = [line for line in map(json.loads, log_path.read_text().splitlines()) if "lr" in line]
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
