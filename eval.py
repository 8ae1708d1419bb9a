"""Is it learning, and is it right: figures on frames never trained on, and pictures.

    python eval.py match out/demo/last.pt --control out/wrong/last.pt       # does a place point out its own pixel?
    python eval.py probe out/demo/last.pt --also imagenet.pth               # how much depth can be read off the features?
    python eval.py show out/demo/last.pt --frame 3                          # four pictures of a frame
    python eval.py depth out/depth_demo/last.pt                             # of finetune_depth.py: eval_depth.py says what
    python eval.py export out/demo/last.pt --format mmdet --out mmdet.pth   # the weights, for other people's code

`match` asks of every place in an unseen frame how well the trained image encoder points it out: the place's own image
feature is ranked among all of the frame's by its similarity to the place's point feature. Asked twice, of the right image
and of *another frame's image at the same pixels*. A fixed camera lets a network guess depth from the pixel's position
alone, which lowers both; only the gap between the two is what the network sees in the image.

`probe` fits a ridge regression of log-depth on frozen features at the pixels of LiDAR points. Position, which every row has for
free, explains most of it, and a network trained on wrong pairs lifts it nearly as much as one trained on true ones: so it is
never shown without its baselines, and differences under .03 are noise.
"""

import copy
import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro

import data
import eval_depth
import ops_triton as ops
import pictures
import runtime
import simipu
import weights
from data import BadInput


RECALIBRATE = 32  # frames that batch norm statistics are taken from
FEW = 8  # the same, for pictures


def load_run(path, device="cpu"):
    """A run's last.pt: the whole model, in eval mode, its Config, and all that the file says. Raises BadInput for any other file."""
    saved = runtime.read_checkpoint(path)
    c = runtime.config_of(saved, simipu.Config, path, "simipu.py")
    model = simipu.SimIPU(c)
    runtime.load_exactly(model, saved["model"], path, saved.get("git"))
    return model.to(device).eval(), c, saved


def names_of(paths, taken=()):
    """{name for a table: path}: a run's folder, or a file, with as much of the path before it as makes all of them different."""
    tails = [p.parent.parts if p.name in ("last.pt", "backbone.pt") else p.parts for p in paths]
    for length in range(1, max(map(len, tails), default=0) + 1):
        names = ["/".join(t[-length:]) for t in tails]
        if len({*names, *taken}) == len(names) + len(taken) and not any(n.isdigit() for n in names):
            return dict(zip(names, paths))
    return {str(p) if str(p) not in taken else f"{p} (2)": p for p in paths}


def choose_frames(c, runs, data_root=(), splits=(), limit=0, frame_stride=1):
    """The frames to judge on, by default the run's own --eval-splits. -> frames, notes to print: what the runs, {name: contents of
    a last.pt}, were trained on is said. Raises BadInput for fewer than two."""
    if limit < 0 or frame_stride < 1:
        raise BadInput(f"--frames {limit} --frame-stride {frame_stride}: must be above 0")
    if not (data_root or splits or c.eval_root or c.eval_splits):
        raise BadInput("--data-root, --splits: the run has no --eval-splits, so say which frames to judge on")
    roots, splits = data_root or c.eval_root or c.data_root, splits or c.eval_splits
    frames = [f for root in roots for f in data.find_frames(root, splits, frame_stride, c.skip_missing)]
    frames = data.evenly_spread(frames, limit or c.eval_frames)
    if len(frames) < 2:
        raise BadInput(f"--data-root {' '.join(map(str, roots))}: {len(frames)} frames chosen; judging needs two or more, for the other frame's image")
    notes = []
    for name, saved in runs.items():
        seen = set(data.inventory(frames)) & set(saved.get("inventory", ()))
        drives = {f.drive for f in frames} & set(saved.get("drives", ()))
        if seen:
            notes.append(f"note: {name} was trained on {len(seen)} of these {len(frames)} frames: its figures will flatter")
        elif drives:
            notes.append(f"note: {name} was trained on other frames of {len(drives)} of these drives, {min(drives)} among them: its figures will flatter")
    return frames, notes


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
        return data.view(self.frames, [(0, i) for i in indices], self.box, self.device)

    def groups(self, indices):
        """Batches as training makes them, for batch norm."""
        group = self.frames.c.group
        return (self.batch(indices[i : i + group]) for i in range(0, len(indices), group))


@torch.no_grad()
def recalibrated(model, inputs, *arguments):
    """A copy of the model, in eval mode, whose batch norm statistics are the average over model(input, *arguments), input by input.
    Networks trained for a hundred steps, and ones not trained at all, are judged alike only this way."""
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
    at a time, two where images are swapped. The other image is that of a frame half the list away, for neighbours may be near copies.
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
                key = model.mlp_cross_img(ops.bilinear_sample(feature_map, uv / model.img_backbone.stride)[0][seen])
                found[which][i] = ranks(query, key, c.temperature)
        if c.intra_weight:
            partner = simipu.match_in_background(places[:1], places[1:], batch["T"], torch.ones(1, c.places), c.matching)()[0][0]
            found["intra"][i] = ranks(model.mlp_intro_points(features[0]), model.mlp_intro_points(features[1])[partner], c.temperature)

    half = -(-len(frames) // 2)
    for i in range(half):
        pair = (i, (i + half) % len(frames))
        batches = [unseen.batch([k]) for k in pair]
        maps = [model.img_backbone(b["image"].contiguous(memory_format=torch.channels_last))[-1] if c.inter_weight else None for b in batches]
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


def match_random(c, frames, device):
    """`match` of a network that has not been trained: the run's own, at step 0."""
    torch.manual_seed(c.seed)
    return match(simipu.SimIPU(c).to(device), frames, c, device)


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
# spatial probe: how much depth can be read off frozen features

DEGREE = 5  # of the polynomial in (u, v) that every row of the probe has for free
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, on features of variance 1; which one decides the result
FOLDS = 5
OFF_GROUND = -1.2  # metres, z of a point in KITTI's LiDAR frame, 1.73 m above the road


def positions(uv, width, height):
    """All products of powers of (u, v), in [-1, 1], up to DEGREE together. uv (n, 2) pixels -> (n, 21) float64."""
    u, v = (2 * (uv[:, i].double() + 0.5) / size - 1 for i, size in ((0, width), (1, height)))
    return torch.stack([u**i * v**j for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)], 1)


def standardised(gram, free):
    """From inner products of columns (a constant first, target last) to those with the columns behind the first `free` centred and
    scaled to variance 1, divided by the number of rows. -> gram, mean, scale. A column that never changes gets scale 0."""
    n = gram[0, 0].clone()
    mean, scale = gram[0] / n, torch.ones(len(gram), dtype=gram.dtype)
    mean[:free], mean[-1] = 0, 0
    variance = gram.diagonal() / n - mean**2
    scale[free:-1] = torch.where(variance > 1e-9 * gram.diagonal() / n, variance.clamp(min=0).rsqrt(), 0.0)[free:-1]
    centred = gram - mean[:, None] * gram[0] - gram[:, :1] * mean + n * mean[:, None] * mean
    return centred * scale[:, None] * scale / n, mean, scale


def ridge(gram, free, strengths):
    """Least squares with a ridge on all but the first `free` columns. gram (free + C + 1, same): inner products of all columns, a
    constant first and the target last. -> {strength: weights (free + C,)}, to be applied to the columns as they were."""
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
    """Errors of a ridge regression on frames that it was not fitted on. columns: a tensor (n, free + C) float32 a frame, target: one
    (n,) each. -> squared errors, a tensor (n,) a frame. Frames are split into FOLDS runs of neighbours; the strength for a fold is
    the one with the least error in cross-validation among the others."""
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
    """R^2 of log-depth from position and frozen features at the pixels of LiDAR points, on frames the regression has not seen.

    encoders: {name: image encoder}; the first is also asked of another frame's image at the same pixels ("wrong image"). Position,
    a polynomial of degree 5, is free in every row and has a row of its own. Batch norm is recalibrated alike for all. Features
    are those of the last map, or the last but one where images have fewer than 128 rows (stage 3 or 4 says otherwise). c: image
    size and point sampling. -> {name: dict(all, off_ground: R^2 over all points and those above the ground; *_interval: 95 % over
    frames; *_gain: R^2 less that of position, and *_gain_interval)}.
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
        high.append((alpha[0, :, 2] > OFF_GROUND).cpu())
        base.append(positions(uv[0].cpu(), width, height).float())
        pixels.append(uv)
    free = base[0].shape[1]

    def sampled(encoder, offset):
        out = []
        for i in range(len(frames)):
            image = unseen.batch([(i + offset) % len(frames)])["image"].contiguous(memory_format=torch.channels_last)
            at = stage or (4 if image.shape[2] >= 128 else 3)
            maps = encoder(image)
            stride = encoder.stride // 2 ** (4 - at)
            out.append(ops.bilinear_sample(maps[at - 5], pixels[i] / stride)[0].float().cpu())
        return [torch.cat([b, f], 1) for b, f in zip(base, out)]

    columns = {"position": base}
    for k, (name, encoder) in enumerate(encoders.items()):
        images = (batch["image"].contiguous(memory_format=torch.channels_last) for batch in unseen.groups(few))
        encoder = recalibrated(encoder, images)
        columns[name] = sampled(encoder, 0)
        if k == 0:
            columns[f"{name}, wrong image"] = sampled(encoder, half)

    # per frame: number, sum of squared errors, sum of target, sum of its squares, over all points and over those off the ground
    sums = {}
    for name, Z in columns.items():
        errors = fit_and_score(Z, target, free)
        kept = {"all": [torch.ones_like(h) for h in high], "off_ground": high}
        sums[name] = {k: np.array([[float(m.sum()), float(e[m].sum()), float(t[m].sum()), float((t[m] ** 2).sum())] for e, t, m in zip(errors, target, masks)]) for k, masks in kept.items()}

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
                cells.append(f"{r[key]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})" if r is not rows["position"] or not sign else "-")
        lines.append(f"{name:<{width}}  " + "".join(f"{c:<26}" for c in cells).rstrip())
    return lines


# -----------------------------------------------------------------------------
# commands


def match_command(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]],
    control: Path | None = None,
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int = 0,
    frame_stride: int = 1,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """Does a place point out its own pixel, on frames of drives not trained on? Beside a random network, always.

    Args:
        checkpoints: A run's last.pt, or several.
        control: last.pt of a run with --pairs wrong and the same budget: what the pixel's position alone teaches.
        data_root: Folders with the frames; by default those of the first run.
        splits: Their splits; by default the first run's --eval-splits.
        frames: At most so many, evenly spread; by default the first run's --eval-frames.
        frame_stride: Of the raw layout, keep every n-th frame of a drive.
        device: auto is the GPU if there is one.
    """
    if not checkpoints:
        raise BadInput("match: no checkpoint given")
    device = runtime.start_run(device).device
    loaded = {name: load_run(path, device) for name, path in names_of(checkpoints, ("random", "wrong pairs")).items()}
    _, c, saved = next(iter(loaded.values()))
    if control:
        loaded = {"wrong pairs": load_run(control, device)} | loaded
    chosen, notes = choose_frames(c, {name: run[2] for name, run in loaded.items()}, data_root, splits, frames, frame_stride)
    for name, (_, other, _) in loaded.items():
        differ = [field for field in ("places", "num_points", "image_scale") if getattr(other, field) != getattr(c, field)]
        if differ:
            notes.append(f"note: {name} is judged with its own {', '.join(differ)}, others than the first run's")
    if control:
        _, wrong, budget = loaded["wrong pairs"]
        if wrong.pairs != "wrong":
            raise BadInput(f"--control {control}: that run was not trained with --pairs wrong")
        if budget["step"] * wrong.batch_size != saved["step"] * c.batch_size:
            notes.append(f"note: the control has seen {budget['step'] * wrong.batch_size} frames, the first run {saved['step'] * c.batch_size}")
    rows = {"random": match_random(c, chosen, device)}
    rows |= {name: match(model, chosen, c, device) for name, (model, c, _) in loaded.items()}
    print("\n".join(notes + match_table(rows)))


def probe_command(
    checkpoint: tyro.conf.Positional[Path],
    also: tuple[Path, ...] = (),
    data_root: tuple[str, ...] = (),
    splits: tuple[str, ...] = (),
    frames: int = 0,
    frame_stride: int = 1,
    points: int = 512,
    stage: Literal[0, 3, 4] = 0,
    device: Literal["auto", "cuda", "cpu"] = "auto",
):
    """How much depth can be read off frozen features, beyond what the pixel's position says? Differences under .03 are noise.

    Args:
        checkpoint: A run's last.pt.
        also: Other weights of the same architecture, anything that --init takes: imagenet.pth, the last.pt of a control.
        data_root: Folders with the frames; by default those of the run.
        splits: Their splits; by default the run's --eval-splits.
        frames: At most so many, evenly spread; by default the run's --eval-frames.
        frame_stride: Of the raw layout, keep every n-th frame of a drive.
        points: LiDAR points per frame.
        stage: Of the image encoder. 0 is the last, or the one before where images have fewer than 128 rows.
        device: auto is the GPU if there is one.
    """
    device = runtime.start_run(device).device
    model, c, saved = load_run(checkpoint, device)
    if not c.inter_weight:
        raise BadInput(f"{checkpoint}: trained without an image encoder (--inter-weight 0)")
    names = names_of([checkpoint, *also], ("position", "random"))
    files = {name: saved if path == checkpoint else runtime.read_checkpoint(path) for name, path in names.items()}
    runs = {name: file for name, file in files.items() if isinstance(file, dict) and "inventory" in file}
    chosen, notes = choose_frames(c, runs, data_root, splits, frames, frame_stride)
    if points < 1:
        raise BadInput(f"--points {points}: must be above 0")
    if len(chosen) < 3:
        raise BadInput(f"--frames {len(chosen)}: probing needs three frames or more, to fit, to choose the ridge's strength, and to score")
    torch.manual_seed(c.seed)
    encoders = {next(iter(names)): model.img_backbone, "random": simipu.build_image_encoder(c.image_encoder).to(device)}
    for name, path in list(names.items())[1:]:
        encoders[name] = simipu.build_image_encoder(c.image_encoder)
        notes.append(weights.load_image_encoder(encoders[name], path))
        encoders[name].to(device)
    rows = probe(encoders, chosen, c, device, points, stage)
    print("\n".join([*notes, f"fitted and scored on {len(chosen)} frames, {min(points, c.num_points)} points each", *probe_table(rows)]))


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
    model, c, _ = load_run(checkpoint)
    run = runtime.start_run(device, seed)
    judged = c.eval_root or c.data_root if c.eval_splits or c.eval_root else c.data_root
    roots, splits = [data_root] if data_root else judged, [split] if split else c.eval_splits or c.splits
    if seed < 0:
        raise BadInput(f"--seed {seed}: must be 0 or more")
    frames = [f for root in roots for f in data.find_frames(root, splits, c.frame_stride, c.skip_missing)]
    index = find_frame(frames, frame)
    few = [i % len(frames) for i in range(index, index + min(len(frames), FEW))]  # as `match` does, from fewer frames
    unseen = Unseen(frames, c, run.device)
    model = recalibrated(model.to(run.device), unseen.groups(few), False)

    # as training sees it, and as it is judged
    sample = data.PretrainFrames(frames, dataclasses.replace(c, seed=seed, pairs="true"))[(0, index)]
    if isinstance(sample, BadInput):
        raise sample
    box = data.random_image_scale(c.image_scale, seed, 0)
    trained_on = data.augment(data.collate([sample]), box, run.device)
    plain = unseen.batch([index])
    found, (height, width) = pictures.embed(model, plain), plain["image"].shape[2:]
    place, chosen = pictures.choose_place(found, height, width, point, pixel)

    # nothing was written so far: wrong input leaves no trace
    name = frames[index].name
    folder = out or checkpoint.parent / "show" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise BadInput(f"--out {folder}: {e.strerror}") from None
    pairs = functools.partial(simipu.match_places, method=c.matching)
    old, new = sample["image"].shape[1::-1], trained_on["image"].shape[:1:-1]
    scale = min(b / o for b, o in zip(box, old))
    how = f"{name} as training sees it with seed {seed}: {old[0]} x {old[1]} pixels scaled by {scale:.2f}, "
    left, top, size = sample["window"]
    how += f"the part from {left:.0%}, {top:.0%} on of {size:.0%} of its edges, " * (size != 1 or any(c.shift))
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
    runtime.commands({"match": match_command, "probe": probe_command, "show": show, "depth": eval_depth.depth, "export": weights.export}, __doc__)


if __name__ == "__main__":
    main()
