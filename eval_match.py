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
from dataclasses import dataclass

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
    """The size (width, height) that images are judged at: that of training, or the rig's where training draws sizes."""
    return tuple(c.image_scale) if len(c.image_scale) == 2 else rig.box


class Unseen:
    """Frames as evaluation sees them: whole images with their own colours, and the same points and second view every
    time. c: simipu.Config.
    """

    def __init__(self, frames, c, device):
        plain = {"seed": 0, "pairs": "true", "flip": 0.0, "crop": (1.0, 1.0), "shift": (0.0, 0.0), "jitter": (0.0,) * 4}
        self.frames, self.device = frames, device
        self.dataset = data.PretrainFrames(frames, dataclasses.replace(c, **plain))
        self.box = image_box(c, frames[0].rig)

    def batch(self, indices):
        """These frames as one batch of data.augment."""
        return data.view(self.dataset, [(0, i) for i in indices], self.box, self.device)

    def groups(self, indices):
        """Batches as large as training makes them, for batch norm."""
        group = self.dataset.c.group
        return (self.batch(indices[i : i + group]) for i in range(0, len(indices), group))

    def first_groups(self):
        """`groups` of the frames that statistics are taken from where all are judged."""
        return self.groups(range(min(len(self.frames), RECALIBRATE)))


@torch.no_grad()
def recalibrated(model, inputs, *arguments):
    """A copy of the model, in eval mode, whose batch norm statistics are the average over model(input, *arguments),
    input by input. Only so are networks trained for a hundred steps, and ones not trained at all, judged alike.
    """
    model = copy.deepcopy(model).train()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    for i, x in enumerate(inputs):
        for norm in norms:
            norm.momentum = 1 / (i + 1)
        model(x, *arguments)
    return model.eval()


def image_input(batch):
    """A batch's images as convolutions like them."""
    return batch["image"].contiguous(memory_format=torch.channels_last)


# -----------------------------------------------------------------------------
# matching on frames never trained on


def ranks(query, key, temperature):
    """How well each query (n, D) points out its own key (n, D) among all; both are l2-normalised here.

    -> (3, n): the share of the other keys that beat it, in percent, equals sharing a rank; 1 where none does, and a tie
    is no success; cross-entropy less its chance level ln n.
    """
    logits = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T / temperature  # (n, n)
    n = len(logits)
    own = logits.diagonal()[:, None]
    better, equal = (logits > own).sum(1), (logits == own).sum(1)  # its own key is among the equal ones
    beaten_by = (better + (equal - 1) / 2) / max(n - 1, 1)
    top1 = (better + equal == 1).float()
    entropy = F.cross_entropy(logits, torch.arange(n, device=logits.device), reduction="none")
    return torch.stack([100 * beaten_by, top1, entropy - math.log(n)]).cpu()


@torch.no_grad()
def match(model, frames, c, device, run=None):
    """Does a place point out its own pixel, and its own partner in the other view, on these frames (two or more)?

    -> dict of, for `right` (the frame's image) and `wrong` (another frame's image at the same pixels): _rank, the
    median over places of the share of candidates, the frame's places, that beat the true one, in percent (50 is chance,
    0 perfect); _top1, the share of places whose true one is the best; _excess, mean cross-entropy less its chance level
    ln(candidates). `gap` is wrong_rank - right_rank, in points, and `gap_interval` its 95 % interval over frames
    (bootstrap). The same three for `intra`, against the matched places of the other view. A branch that the model lacks
    has no figures.

    Deterministic. The other image is that of a frame half the list away, for neighbours may be near copies. Only two
    frames are held at a time. run: the processes (runtime.Run), each of which takes its share; all of them call this,
    with the same model.
    """
    unseen = Unseen(frames, c, device)
    model = recalibrated(model, unseen.first_groups(), False)
    encode = lambda batch: model.img_backbone(image_input(batch))[-1] if c.inter_weight else None

    found = {}  # frame: result of `match_frame`
    half = -(-len(frames) // 2)
    for i in range(half) if run is None else range(run.rank, half, run.world):
        j = (i + half) % len(frames)
        batches = [unseen.batch([i]), unseen.batch([j])]
        maps = [encode(batch) for batch in batches]
        found[i] = match_frame(model, batches[0], maps[0], maps[1], c)
        if j >= half:  # the odd one out is paired with frame 0, which has been asked
            found[j] = match_frame(model, batches[1], maps[1], maps[0], c)
    if run is not None:
        found = dict(run.gather(list(found.items())))
    return match_figures(dict(sorted(found.items())))


def match_frame(model, batch, own_map, other_map, c):
    """The question of `match` for a batch of one frame, of its own image's feature map (1, C, h, w) and another's. ->
    {"right", "wrong", "intra": (3, n) of `ranks`, for n places}, without those that the model has no branch for.
    """
    found = {}
    views = torch.cat([batch["alpha"], batch["beta"]]) if c.intra_weight else batch["alpha"]
    places, features = model.pts_backbone(views)
    if c.inter_weight:
        height, width = batch["image"].shape[2:]
        uv, depth = data.project(places[:1], batch["lidar2img"])
        seen = data.inside_image(uv, depth, width, height)[0]
        query = model.mlp_cross_points(features[0][seen])
        for which, feature_map in (("right", own_map), ("wrong", other_map)):
            sampled = ops.bilinear_sample(feature_map, encoders.cells(model.img_backbone, uv))[0]
            found[which] = ranks(query, model.mlp_cross_img(sampled[seen]), c.temperature)
    if c.intra_weight:
        everywhere = torch.ones(1, c.places)
        partner = model.match(places[:1], places[1:], batch["T"], everywhere)()[0][0]
        query, key = model.mlp_intro_points(features[0]), model.mlp_intro_points(features[1])[partner]
        found["intra"] = ranks(query, key, c.temperature)
    return found


def match_figures(found):
    """{frame: result of `match_frame`}, of all frames from 0 on -> result of `match`, rounded to four digits."""
    figures = {"frames": len(found)}
    for which in found[0]:
        all_places = torch.cat([frame[which] for frame in found.values()], 1)
        _, top1, excess = all_places.mean(1).tolist()
        figures[f"{which}_rank"] = median_rank(found, which, found)
        figures[f"{which}_top1"] = top1
        figures[f"{which}_excess"] = excess
    if "right" in found[0]:
        rng = np.random.default_rng(0)
        draws = [rng.integers(len(found), size=len(found)) for _ in range(200)]
        gaps = [median_rank(found, "wrong", draw) - median_rank(found, "right", draw) for draw in draws]
        figures["gap"] = figures["wrong_rank"] - figures["right_rank"]
        figures["gap_interval"] = np.percentile(gaps, [2.5, 97.5]).tolist()
    for key, value in figures.items():
        figures[key] = [round(x, 4) for x in value] if isinstance(value, list) else round(value, 4)
    return figures


def median_rank(found, which, frames):
    """Over all places of these frames, one that is named twice counting twice."""
    return torch.cat([found[int(i)][which][0] for i in frames]).median().item()


def match_table(rows):
    """Lines of text for {name: result of `match`}."""
    width = max(map(len, rows))
    frames = next(iter(rows.values()))["frames"]
    of = "median rank of the true one among a frame's places (0 best, 50 % chance), top1, cross-entropy less chance"
    lines = [
        f"matching on {frames} frames: {of}",
        f"{'':>{width}}        right image            another's image      gap in rank (95 %)    other view's places",
    ]
    for name, figures in rows.items():
        right, wrong, intra = (_match_cell(figures, which) for which in ("right", "wrong", "intra"))
        gap = "-"
        if "gap" in figures:
            low, high = figures["gap_interval"]
            gap = f"{figures['gap']:5.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"{name:>{width}} {right} {wrong}  {gap:^22}{intra}")
    return lines


def _match_cell(figures, which):
    if f"{which}_rank" not in figures:
        return f"{'-':>23}"
    rank, top1, excess = (figures[f"{which}_{figure}"] for figure in ("rank", "top1", "excess"))
    return f"{rank:6.1f} % {100 * top1:5.1f} % {excess:+6.2f}"


# -----------------------------------------------------------------------------
# spatial probe: how much depth can be read off frozen features

DEGREE = 5  # of the polynomial in (u, v) that every row of the probe has for free
STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # of the ridge, on features of variance 1; it decides the result
FOLDS = 5
DRAWS = 1000  # of frames, with replacement, for the intervals
SUBSETS = ("all", "off_ground")


@torch.no_grad()
def probe(networks, frames, c, device, points=512, stage=0):
    """R^2 of log-depth from position and frozen features at the pixels of LiDAR points, on frames that the regression
    has not seen.

    networks: {name: image encoder}; the first is also asked of another frame's image at the same pixels ("wrong
    image"). Position, a polynomial of degree 5, is free in every row and has a row of its own. Batch norm is
    recalibrated alike for all. Features are those of the last map, or the last but one where images have fewer than 128
    rows (stage 3 or 4 says otherwise). c: image size and point sampling. -> {name: dict(all, off_ground: R^2 over all
    points and those above the ground; *_interval: 95 % over frames; *_gain: R^2 less that of position, and
    *_gain_interval)}.
    """
    unseen = Unseen(frames, c, device)
    rng = np.random.default_rng(0)
    probed = [collect_points(unseen, i, min(points, c.num_points), rng) for i in range(len(frames))]

    columns = {"position": [p.position for p in probed]}
    for name, encoder in networks.items():
        encoder = recalibrated(encoder, (image_input(batch) for batch in unseen.first_groups()))
        columns[name] = sample_features(encoder, unseen, probed, stage)
        if len(columns) == 2:
            columns[f"{name}, wrong image"] = sample_features(encoder, unseen, probed, stage, len(frames) // 2)

    free = probed[0].position.shape[1]
    target = [p.log_depth for p in probed]
    sums = {name: sum_errors(fit_and_score(Z, target, free), probed) for name, Z in columns.items()}
    draws = [rng.integers(len(frames), size=len(frames)) for _ in range(DRAWS)]
    return {name: bootstrap(own, sums["position"], draws) for name, own in sums.items()}


@dataclass
class Probed:
    """The n points of a frame that are asked about."""

    uv: torch.Tensor  # (1, n, 2) pixels, on the device
    log_depth: torch.Tensor  # (n,) float64
    position: torch.Tensor  # (n, 21) of `positions`, float32
    off_ground: torch.Tensor  # (n,) bool


def collect_points(unseen, i, points, rng):
    """So many of frame i's points, drawn. -> Probed."""
    batch = unseen.batch([i])
    chosen = torch.from_numpy(rng.choice(batch["alpha"].shape[1], points, replace=False)).to(unseen.device)
    alpha = batch["alpha"][:, chosen]
    uv, depth = data.project(alpha, batch["lidar2img"])
    height, width = batch["image"].shape[2:]
    return Probed(
        uv,
        log_depth=depth[0].double().log().cpu(),
        position=positions(uv[0].cpu(), width, height).float(),
        off_ground=(alpha[0, :, 2] > unseen.frames[i].rig.things).cpu(),
    )


def sample_features(encoder, unseen, probed, stage, offset=0):
    """The columns of the regression, position and then features, a tensor (n, 21 + C) a frame. offset: features are
    those of the image so many frames further on, at the frame's own pixels.
    """
    columns = []
    for i, points in enumerate(probed):
        image = image_input(unseen.batch([(i + offset) % len(probed)]))
        at = stage or (4 if image.shape[2] >= 128 else 3)
        feature_map = encoder(image)[at - 5]
        where = encoders.cells(encoder, points.uv, at - 5)
        features = ops.bilinear_sample(feature_map, where)[0].float().cpu()
        columns.append(torch.cat([points.position, features], 1))
    return columns


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
    frame, target: one (n,) each. -> squared errors, a tensor (n,) a frame.

    Frames are split into FOLDS runs of neighbours. The strength for a fold is the one with the least error in
    cross-validation among the others.
    """
    folds = [fold.tolist() for fold in np.array_split(np.arange(len(columns)), min(FOLDS, len(columns)))]
    grams = []
    for fold in folds:
        Z = torch.cat([torch.cat([columns[i], target[i][:, None]], 1) for i in fold]).double()
        grams.append(Z.T @ Z)
    total = sum(grams)
    errors = [None] * len(columns)
    chosen = choose_strengths(grams, free)
    for fold, gram, strength in zip(folds, grams, chosen):
        w = ridge(total - gram, free, [strength])[strength]
        for i in fold:
            errors[i] = (columns[i].double() @ w - target[i]) ** 2
    return errors


def choose_strengths(grams, free):
    """For each fold, of inner products `grams`, the strength that serves the other folds best, asked of one another."""
    features = len(grams[0]) - 1 - free
    if not features or len(grams) < 3:
        return [STRENGTHS[0]] * len(grams)
    total = sum(grams)
    # fitted without folds j and k, the error on j decides the strength for k, and the other way round
    loss = np.zeros((len(grams), len(STRENGTHS)))
    for j, k in itertools.combinations(range(len(grams)), 2):
        weights = ridge(total - grams[j] - grams[k], free, STRENGTHS)
        for s, w in enumerate(weights.values()):
            loss[k, s] += squared_error(w, grams[j])
            loss[j, s] += squared_error(w, grams[k])
    return [STRENGTHS[best] for best in loss.argmin(1)]


def squared_error(w, gram):
    """The sum of squared errors of weights w on rows with these inner products, from those alone."""
    w = torch.cat([w, -torch.ones(1, dtype=w.dtype)])
    return float(w @ gram @ w)


def sum_errors(errors, probed):
    """All that an R^2 over any choice of frames needs: {subset: (frames, 4)} of the number of points, the sum of their
    squared errors, of the target, and of its square. errors: a tensor (n,) a frame.
    """
    rows = {subset: [] for subset in SUBSETS}
    for error, points in zip(errors, probed):
        for subset, mask in (("all", torch.ones_like(points.off_ground)), ("off_ground", points.off_ground)):
            e, t = error[mask], points.log_depth[mask]
            rows[subset].append([float(mask.sum()), float(e.sum()), float(t.sum()), float((t**2).sum())])
    return {subset: np.array(values) for subset, values in rows.items()}


def r_squared(rows):
    """Of rows of `sum_errors`."""
    n, error, first, second = rows.sum(0)
    return 1 - error / (second - first**2 / n)


def bootstrap(own, position, draws):
    """A row of `probe`, from its `sum_errors` and those of position alone. draws: choices of frames."""
    figures = {}
    for subset in SUBSETS:
        r2, floor = r_squared(own[subset]), r_squared(position[subset])
        r2s = np.array([r_squared(own[subset][draw]) for draw in draws])
        floors = np.array([r_squared(position[subset][draw]) for draw in draws])
        figures[subset] = r2
        figures[f"{subset}_interval"] = np.percentile(r2s, [2.5, 97.5]).tolist()
        figures[f"{subset}_gain"] = r2 - floor
        figures[f"{subset}_gain_interval"] = np.percentile(r2s - floors, [2.5, 97.5]).tolist()
    return figures


def probe_table(rows):
    """Lines of text for the result of `probe`."""
    width = max(23, *map(len, rows))
    titles = ("all points", "over position", "off the ground", "over position")
    lines = [_probe_line("R^2 of log-depth (95 %)", titles, width)]
    for name, figures in rows.items():
        cells = []
        for subset in SUBSETS:
            gain = "-" if name == "position" else _probe_cell(figures, f"{subset}_gain", "+")
            cells += [_probe_cell(figures, subset, ""), gain]
        lines.append(_probe_line(name, cells, width))
    return lines


def _probe_cell(figures, key, sign):
    low, high = figures[f"{key}_interval"]
    return f"{figures[key]:{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


def _probe_line(name, cells, width):
    columns = "".join(f"{cell:<26}" for cell in cells)
    return f"{name:<{width}}  {columns}".rstrip()
