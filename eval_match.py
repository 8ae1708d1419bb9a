"""Figures of a pre-trained model on frames that it was never trained on: `match` and `probe`, and their tables.

`match` asks of every place in an unseen frame how well the trained image encoder points it out: the place's own image
feature is ranked among all of the frame's by its similarity to the place's point feature. It asks twice, of the right
image and of *another frame's image at the same pixels*. A fixed camera lets a network guess depth from the pixel's
position alone, which lowers both. Only the gap between the two is what the network sees in the image.

`probe` fits a ridge regression of log-depth on frozen features at the pixels of LiDAR points. Position, which every row
has for free, explains most of it, and a network trained on wrong pairs lifts it nearly as much as one trained on true
ones. So it is never shown without its baselines, and differences under .03 are noise.

Both are functions of a model (simipu.SimIPU) and frames.
"""

import copy
import dataclasses
import itertools
import math

import numpy as np
import torch
import torch.nn.functional as F

import data
import encoders
import ops_triton as ops

RECALIBRATE = 32  # frames that batch norm statistics are taken from


# -----------------------------------------------------------------------------
# frames and models as they are judged


def image_box(c, rig):
    """The size (width, height) that images are judged at: the training size, or the rig's where training draws
    sizes.
    """
    return tuple(c.image_scale) if len(c.image_scale) == 2 else rig.box


class Unseen:
    """Frames as evaluation sees them: whole images with their own colours, the same points and the same second view
    every time.
    """

    def __init__(self, frames, c, device):
        plain = {"seed": 0, "pairs": "true", "flip": 0.0, "crop": (1.0, 1.0), "shift": (0.0, 0.0), "jitter": (0.0,) * 4}
        self.frames = data.PretrainFrames(frames, dataclasses.replace(c, **plain))
        self.box, self.device = image_box(c, frames[0].rig), device

    def batch(self, indices):
        return data.view(self.frames, [(0, i) for i in indices], self.box, self.device)

    def groups(self, indices):
        """Batches as training makes them, for batch norm."""
        group = self.frames.c.group
        return (self.batch(indices[i : i + group]) for i in range(0, len(indices), group))


@torch.no_grad()
def recalibrated(model, inputs, *arguments):
    """A copy of the model, in eval mode, whose batch norm statistics are the average over model(input, *arguments),
    input by input. Networks trained for a hundred steps, and ones not trained at all, are judged alike only this
    way.
    """
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for i, x in enumerate(inputs):
        for norm in norms:
            norm.momentum = 1 / (i + 1)
        model(x, *arguments)
    return model.eval()


# -----------------------------------------------------------------------------
# matching on frames never trained on


def ranks(query, key, temperature):
    """How well each query (n, D) points out its own key (n, D) among all. -> (3, n): share of the other keys that beat
    it, in percent; whether none does (a tie is no success); cross-entropy less its chance level ln n. l2-normalised
    here.
    """
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature  # (n, n)
    own = logits.diagonal()[:, None]
    beaten_by = ((logits > own).sum(1) + ((logits == own).sum(1) - 1) / 2) / max(len(logits) - 1, 1)
    excess = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device), reduction="none") - math.log(
        len(logits)
    )
    return torch.stack([100 * beaten_by, ((logits >= own).sum(1) == 1).float(), excess]).cpu()


@torch.no_grad()
def match(model, frames, c, device):
    """Does a place point out its own pixel, and its own partner in the other view, on these frames (two or more)?

    -> dict of, for `right` (the frame's image) and `wrong` (another frame's image at the same pixels): _rank, the
    median over places of the share of candidates, the frame's places, that beat the true one, in percent (50 is chance,
    0 perfect); _top1, the share of places whose true one is the best; _excess, mean cross-entropy less its chance level
    ln(candidates). `gap` is wrong_rank - right_rank, in points, and `gap_interval` its 95 % interval over frames
    (bootstrap). The same three for `intra`, against the matched places of the other view. A branch that the model lacks
    has no figures. Deterministic; one frame is held at a time, two where images are swapped. The other image is that of
    a frame half the list away, for neighbours may be near copies.
    """
    unseen = Unseen(frames, c, device)
    few = range(min(len(frames), RECALIBRATE))
    model = recalibrated(model, unseen.groups(few), False)

    found = {"right": {}, "wrong": {}, "intra": {}}

    def judge(i, batch, own, other):
        views = torch.cat([batch["alpha"], batch["beta"]]) if c.intra_weight else batch["alpha"]
        places, features = model.pts_backbone(views)
        if c.inter_weight:
            uv, depth = data.project(places[:1], batch["lidar2img"])
            seen = data.inside_image(uv, depth, *batch["image"].shape[:1:-1])[0]
            query = model.mlp_cross_points(features[0][seen])
            for which, feature_map in (("right", own), ("wrong", other)):
                key = model.mlp_cross_img(ops.bilinear_sample(feature_map, encoders.cells(model.img_backbone, uv))[0][seen])
                found[which][i] = ranks(query, key, c.temperature)
        if c.intra_weight:
            partner = model.match(places[:1], places[1:], batch["T"], torch.ones(1, c.places))()[0][0]
            found["intra"][i] = ranks(
                model.mlp_intro_points(features[0]), model.mlp_intro_points(features[1])[partner], c.temperature
            )

    half = -(-len(frames) // 2)
    for i in range(half):
        pair = (i, (i + half) % len(frames))
        batches = [unseen.batch([k]) for k in pair]
        maps = [
            model.img_backbone(b["image"].contiguous(memory_format=torch.channels_last))[-1] if c.inter_weight else None
            for b in batches
        ]
        judge(pair[0], batches[0], maps[0], maps[1])
        if pair[1] >= half:  # an odd one out was paired with frame 0, which has its own
            judge(pair[1], batches[1], maps[1], maps[0])

    def median_rank(which, chosen):
        return torch.cat([found[which][i][0] for i in chosen]).median().item()

    out = {"frames": len(frames)}
    for which, per_frame in found.items():
        if per_frame:
            _, top1, excess = torch.cat(list(per_frame.values()), 1).mean(1).tolist()
            out |= {f"{which}_rank": median_rank(which, per_frame), f"{which}_top1": top1, f"{which}_excess": excess}
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
            f"{r[w + '_rank']:6.1f} % {100 * r[w + '_top1']:5.1f} % {r[w + '_excess']:+6.2f}"
            if w + "_rank" in r
            else f"{'-':>23}"
            for w in ("right", "wrong", "intra")
        ]
        gap = f"{r['gap']:5.1f} ({r['gap_interval'][0]:.1f} to {r['gap_interval'][1]:.1f})" if "gap" in r else "-"
        lines.append(f"{name:>{width}} {cells[0]} {cells[1]}  {gap:^22}{cells[2]}")
    return lines


# -----------------------------------------------------------------------------
# spatial probe: how much depth can be read off frozen features

DEGREE = 5  # of the polynomial in (u, v) that every row of the probe has for free
STRENGTHS = (
    0.01,
    0.03,
    0.1,
    0.3,
    1.0,
    3.0,
    10.0,
)  # of the ridge, on features of variance 1; which one decides the result
FOLDS = 5


def positions(uv, width, height):
    """All products of powers of (u, v), in [-1, 1], up to DEGREE together. uv (n, 2) pixels -> (n, 21) float64."""
    u, v = (2 * (uv[:, i].double() + 0.5) / size - 1 for i, size in ((0, width), (1, height)))
    return torch.stack([u**i * v**j for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)], 1)


def standardised(gram, free):
    """From inner products of columns (a constant first, target last) to those with the columns behind the first `free`
    centred and scaled to variance 1, divided by the number of rows. -> gram, mean, scale. A column that never changes
    gets scale 0.
    """
    n = gram[0, 0].clone()
    mean, scale = gram[0] / n, torch.ones(len(gram), dtype=gram.dtype)
    mean[:free], mean[-1] = 0, 0
    variance = gram.diagonal() / n - mean**2
    scale[free:-1] = torch.where(variance > 1e-9 * gram.diagonal() / n, variance.clamp(min=0).rsqrt(), 0.0)[free:-1]
    centred = gram - mean[:, None] * gram[0] - gram[:, :1] * mean + n * mean[:, None] * mean
    return centred * scale[:, None] * scale / n, mean, scale


def ridge(gram, free, strengths):
    """Least squares with a ridge on all but the first `free` columns. gram (free + C + 1, same): inner products of all
    columns, a constant first and the target last. -> {strength: weights (free + C,)}, to be applied to the columns as
    they were.
    """
    A, mean, scale = standardised(gram, free)
    out = {}
    for strength in strengths:
        penalty = torch.full((len(A) - 1,), strength, dtype=A.dtype)
        penalty[:free] = 1e-9
        w = torch.linalg.solve(A[:-1, :-1] + torch.diag(penalty), A[:-1, -1]) * scale[:-1]
        w[0] -= (w * mean[:-1]).sum()
        out[strength] = w
    return out


def fit_and_score(columns, target, free):
    """Errors of a ridge regression on frames that it was not fitted on. columns: a tensor (n, free + C) float32 a
    frame, target: one (n,) each. -> squared errors, a tensor (n,) a frame. Frames are split into FOLDS runs of
    neighbours; the strength for a fold is the one with the least error in cross-validation among the others.
    """
    folds = [list(map(int, fold)) for fold in np.array_split(np.arange(len(columns)), min(FOLDS, len(columns)))]
    grams = []
    for fold in folds:
        Z = torch.cat([torch.cat([columns[i], target[i][:, None]], 1) for i in fold]).double()
        grams.append(Z.T @ Z)
    total, strengths = sum(grams), STRENGTHS if columns[0].shape[1] > free and len(folds) > 2 else STRENGTHS[:1]

    def error(w, fold):  # sum of squares, from inner products alone
        w = torch.cat([w, -torch.ones(1, dtype=w.dtype)])
        return float(w @ grams[fold] @ w)

    # fitted without folds j and k, the error on j decides the strength for k, and the other way round
    loss = np.zeros((len(folds), len(strengths)))
    if len(strengths) > 1:
        for j, k in itertools.combinations(range(len(folds)), 2):
            for s, w in enumerate(ridge(total - grams[j] - grams[k], free, strengths).values()):
                loss[k, s] += error(w, j)
                loss[j, s] += error(w, k)
    errors = [None] * len(columns)
    for k, fold in enumerate(folds):
        strength = strengths[loss[k].argmin()]
        w = ridge(total - grams[k], free, [strength])[strength]
        for i in fold:
            errors[i] = (columns[i].double() @ w - target[i]) ** 2
    return errors


@torch.no_grad()
def probe(encoders, frames, c, device, points=512, stage=0):
    """R^2 of log-depth from position and frozen features at the pixels of LiDAR points, on frames the regression has
    not seen.

    encoders: {name: image encoder}; the first is also asked of another frame's image at the same pixels ("wrong
    image"). Position, a polynomial of degree 5, is free in every row and has a row of its own. Batch norm is
    recalibrated alike for all. Features are those of the last map, or the last but one where images have fewer than 128
    rows (stage 3 or 4 says otherwise). c: image size and point sampling. -> {name: dict(all, off_ground: R^2 over all
    points and those above the ground; *_interval: 95 % over frames; *_gain: R^2 less that of position, and
    *_gain_interval)}.
    """
    unseen = Unseen(frames, c, device)
    rng = np.random.default_rng(0)
    half = len(frames) // 2
    few = range(min(len(frames), RECALIBRATE))
    target, high, base, pixels = [], [], [], []
    for i in range(len(frames)):
        batch = unseen.batch([i])
        chosen = torch.from_numpy(rng.choice(c.num_points, min(points, c.num_points), replace=False)).to(device)
        alpha = batch["alpha"][:, chosen]
        uv, depth = data.project(alpha, batch["lidar2img"])
        height, width = batch["image"].shape[2:]
        target.append(depth[0].double().log().cpu())
        high.append((alpha[0, :, 2] > frames[i].rig.things).cpu())
        base.append(positions(uv[0].cpu(), width, height).float())
        pixels.append(uv)
    free = base[0].shape[1]

    def sampled(encoder, offset):
        out = []
        for i in range(len(frames)):
            image = unseen.batch([(i + offset) % len(frames)])["image"].contiguous(memory_format=torch.channels_last)
            at = stage or (4 if image.shape[2] >= 128 else 3)
            maps = encoder(image)
            where = encoders.cells(encoder, pixels[i], at - 5)
            out.append(ops.bilinear_sample(maps[at - 5], where)[0].float().cpu())
        return [torch.cat([b, f], 1) for b, f in zip(base, out)]

    columns = {"position": base}
    for k, (name, encoder) in enumerate(encoders.items()):
        images = (batch["image"].contiguous(memory_format=torch.channels_last) for batch in unseen.groups(few))
        encoder = recalibrated(encoder, images)
        columns[name] = sampled(encoder, 0)
        if k == 0:
            columns[f"{name}, wrong image"] = sampled(encoder, half)

    # per frame: number, sum of squared errors, sum of target, sum of its squares, over all points and over those off
    # the ground
    sums = {}
    for name, Z in columns.items():
        errors = fit_and_score(Z, target, free)
        kept = {"all": [torch.ones_like(h) for h in high], "off_ground": high}
        sums[name] = {
            k: np.array(
                [
                    [float(m.sum()), float(e[m].sum()), float(t[m].sum()), float((t[m] ** 2).sum())]
                    for e, t, m in zip(errors, target, masks)
                ]
            )
            for k, masks in kept.items()
        }

    def r2(rows):
        n, error, first, second = rows.sum(0)
        return 1 - error / (second - first**2 / n)

    out, draws = {}, [rng.integers(len(frames), size=len(frames)) for _ in range(1000)]
    for name in sums:
        out[name] = {}
        for subset, rows in sums[name].items():
            floor = sums["position"][subset]
            out[name][subset], out[name][f"{subset}_gain"] = r2(rows), r2(rows) - r2(floor)
            resampled = np.array([[r2(rows[d]), r2(rows[d]) - r2(floor[d])] for d in draws])
            for column, key in enumerate((f"{subset}_interval", f"{subset}_gain_interval")):
                out[name][key] = np.percentile(resampled[:, column], [2.5, 97.5]).tolist()
    return out


def probe_table(rows):
    """Lines of text for the result of `probe`."""
    width = max(23, *map(len, rows))
    titles = ("all points", "over position", "off the ground", "over position")
    lines = [f"{'R^2 of log-depth (95 %)':<{width}}  " + "".join(f"{t:<26}" for t in titles).rstrip()]
    for name, r in rows.items():
        cells = []
        for subset in ("all", "off_ground"):
            for key, sign in ((subset, ""), (subset + "_gain", "+")):
                low, high = r[key + "_interval"]
                cells.append(
                    f"{r[key]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"
                    if r is not rows["position"] or not sign
                    else "-"
                )
        lines.append(f"{name:<{width}}  " + "".join(f"{c:<26}" for c in cells).rstrip())
    return lines
