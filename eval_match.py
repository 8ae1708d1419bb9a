"""Figures of a pre-trained model on frames that it was never trained on: `match` and `probe`, and their tables.

`match` asks of every place in an unseen frame how well the trained image encoder points it out: the place's own image
feature is to be found among all of the frame's by its similarity to the place's point feature. It asks twice, of the
right image and of *another frame's image at the same pixels*. A fixed camera lets a network guess depth from the
pixel's position alone, which helps in both. The gain, the cross-entropy with another's image less that with the right
one, is above 0 only for a network that sees something in the image. How much of it helps, and is not another's image
misleading, `advantage` over a network of wrong pairs says.

`probe` fits a ridge regression of log-depth on frozen features at the pixels of LiDAR points. Position, which every row
has for free, explains most of it, and a network trained on wrong pairs lifts it nearly as much as one trained on true
ones. So it is never shown without its baselines, and differences under .03 are noise.

Both are functions of a model (simipu.SimIPU) and frames.
"""

import copy
import dataclasses
import itertools
from dataclasses import dataclass
from typing import NamedTuple

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
        """Batches as large as a pass of training on one process, for batch norm."""
        group = min(self.dataset.c.group, self.dataset.c.batch_size)
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


# Inverse temperatures that a frame's cosines are read with, eight an octave. 0 reads nothing, and scores chance.
SHARPNESS = (0.0, *(2 ** (i / 8) for i in range(-16, 57)))
INTERVAL = 1000  # draws of frames, with replacement, behind the interval of the gain
RANK_DRAWS = 200  # of these, behind that of the gap: medians take longer than sums
POSITION_DEGREE = 4  # of the polynomial in (u, v) that the reader of `position_entropies` knows of a pixel
POSITION_PENALTY = 5.0  # on its squared weights, beside sums of cross-entropies
POSITION_PLACES = 128  # of a frame, at most, that it is fitted on


class Answers(NamedTuple):
    """What a frame's n places answered, on the CPU."""

    ranks: torch.Tensor  # (2, n) of `ranks`
    entropy: torch.Tensor  # (len(SHARPNESS),) of `entropy_sums`


class Positions(NamedTuple):
    """What the reader of `position_entropies` knows of a frame's n places, on the CPU."""

    query: torch.Tensor  # (n, 1 + D) a constant, and the point features in D dimensions, of length sqrt(D)
    where: torch.Tensor  # (n, 15) of `positions`, of their pixels


def answers(query, key):
    """How well each query (n, D) points out its own key (n, D) among all; both are l2-normalised here. -> Answers."""
    cosine = F.normalize(query, dim=1) @ F.normalize(key, dim=1).T  # (n, n)
    return Answers(ranks(cosine), entropy_sums(cosine))


def ranks(cosine):
    """Of each row's own column among all, by cosine (n, n).

    -> (2, n): the share of the other columns that beat it, in percent, equals sharing a rank; 1 where none does, and a
    tie is no success.
    """
    own = cosine.diagonal()[:, None]
    better, equal = (cosine > own).sum(1), (cosine == own).sum(1)  # its own column is among the equal ones
    beaten_by = (better + (equal - 1) / 2) / max(len(cosine) - 1, 1)
    top1 = (better + equal == 1).float()
    return torch.stack([100 * beaten_by, top1]).cpu()


def entropy_sums(logits):
    """Cross-entropy of the rows' own columns, logits (n, n), summed over rows, at each of SHARPNESS: (74,) float64."""
    own = torch.arange(len(logits), device=logits.device)
    sums = [F.cross_entropy(sharpness * logits, own, reduction="sum") for sharpness in SHARPNESS]
    return torch.stack(sums).double().cpu()


def distinct(places):
    """Indices of places (n, 3), in order, less those at a spot that came before: the point encoder keeps some points
    twice, and nobody could tell such twins apart.
    """
    _, first = np.unique(places.cpu().numpy(), axis=0, return_index=True)
    return torch.from_numpy(np.sort(first)).to(places.device)


@torch.no_grad()
def match(model, frames, c, device, run=None):
    """Does a place point out its own pixel, and its own partner in the other view, on these frames (two or more)?

    -> dict of `gain`, nats, mean cross-entropy with another frame's image at the same pixels less that with the right
    image, and `gain_interval`, its 95 % interval over frames (bootstrap); `chance`, mean ln(candidates), of a frame's
    places that differ; for `right` (the frame's image) and `wrong` (another's): _excess, mean cross-entropy less its
    chance level; _rank, the median over places of the share of candidates that beat the true one, in percent (50 is
    chance, 0 perfect); _top1, the share of places whose true one is the best. `gap` is wrong_rank - right_rank, in
    points, with `gap_interval`. `position_excess` is that of a reader who knows the point features, and of each pixel
    nothing but where it lies (`position_entropies`). The three figures of `intra` are against the matched places of the
    other view. `per_frame`: lists, a number for each frame: its places, and the sums over them of the cross-entropies
    right, wrong and position, nats. A branch that the model lacks has no figures.

    Cosines are divided by a temperature before a cross-entropy is taken: by one for right and wrong alike, and that is
    the one that is best for both together on the other half of the frames (even ones, odd ones). So neither the
    run's own temperature nor over-confidence decides.

    Deterministic. The other image is that of a frame half the list away, for neighbours may be near copies. Only two
    frames are held at a time. run: the processes (runtime.Run), each of which takes its share; all of them call this,
    with the same model.
    """
    unseen = Unseen(frames, c, device)
    model = recalibrated(model, unseen.first_groups(), False)
    encode = lambda batch: model.img_backbone(image_input(batch)) if c.inter_weight else None

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
    return match_figures(dict(sorted(found.items())), device)


def match_frame(model, batch, own_maps, other_maps, c):
    """The question of `match` for a batch of one frame, of its own image's maps, (1, C, h, w) each, and another's. ->
    {"right", "wrong", "intra": Answers, "position": Positions}, without those that the model has no branch for.
    """
    found = {}
    views = torch.cat([batch["alpha"], batch["beta"]]) if c.intra_weight else batch["alpha"]
    places, features = model.pts_backbone(views)
    differ = distinct(places[0])
    if c.inter_weight:
        height, width = batch["image"].shape[2:]
        uv, depth = data.project(places[:1], batch["lidar2img"])
        seen = data.inside_image(uv, depth, width, height)[0]
        asked = differ[seen[differ]]
        query = model.mlp_cross_points(features[0][asked])
        for which, maps in (("right", own_maps), ("wrong", other_maps)):
            found[which] = answers(query, model.mlp_cross_img(model.at_pixels(maps, uv)[0][asked]))
        constant = query.new_ones(len(query), 1)
        unit = F.normalize(query, dim=1) * query.shape[1] ** 0.5
        where = positions(uv[0][asked].cpu(), width, height, POSITION_DEGREE)
        found["position"] = Positions(torch.cat([constant, unit], 1).cpu(), where)
    if c.intra_weight:
        everywhere = torch.ones(1, c.places)
        partner = model.match(places[:1], places[1:], batch["T"], everywhere)()[0][0]
        query, key = model.mlp_intro_points(features[0]), model.mlp_intro_points(features[1])[partner]
        found["intra"] = answers(query[differ], key[differ])
    return found


def match_figures(found, device="cpu"):
    """{frame: result of `match_frame`}, of all frames from 0 on -> result of `match`, rounded to four digits."""
    frames = [found[i] for i in range(len(found))]
    figures, per_frame = {"frames": len(frames)}, {}
    rng = np.random.default_rng(0)
    if "right" in frames[0]:
        places = places_of(frames, "right")
        right, wrong = tempered([entropies_of(frames, which) for which in ("right", "wrong")])
        (position,) = tempered([position_entropies([frame["position"] for frame in frames], device)])
        per_frame = {"places": places, "right": right, "wrong": wrong, "position": position}
        draws = rng.integers(len(frames), size=(INTERVAL, len(frames)))
        gains = (wrong - right)[draws].sum(1) / places[draws].sum(1)
        figures["gain"] = (wrong - right).sum() / places.sum()
        figures["gain_interval"] = np.percentile(gains, [2.5, 97.5])
        figures["chance"] = chance_sums(places).sum() / places.sum()
        figures |= judged_answers(frames, "right", right) | judged_answers(frames, "wrong", wrong)
        figures["position_excess"] = excess(position, places)
        gaps = [median_rank(found, "wrong", draw) - median_rank(found, "right", draw) for draw in draws[:RANK_DRAWS]]
        figures["gap"] = figures["wrong_rank"] - figures["right_rank"]
        figures["gap_interval"] = np.percentile(gaps, [2.5, 97.5])
    if "intra" in frames[0]:
        figures |= judged_answers(frames, "intra", *tempered([entropies_of(frames, "intra")]))
    rounded = {key: np.round(value, 4).tolist() for key, value in figures.items()}
    if per_frame:
        rounded["per_frame"] = {key: np.round(value, 4).tolist() for key, value in per_frame.items()}
    return rounded


def judged_answers(frames, which, entropy):
    """The three figures of `which`, of all frames' Answers and their cross-entropies (F,), sums over places."""
    every = torch.cat([frame[which].ranks for frame in frames], 1)
    return {
        f"{which}_excess": excess(entropy, places_of(frames, which)),
        f"{which}_rank": every[0].median().item(),
        f"{which}_top1": every[1].mean().item(),
    }


def places_of(frames, which):
    """How many places of each frame were asked: (F,)."""
    return np.array([frame[which].ranks.shape[1] for frame in frames])


def entropies_of(frames, which):
    """(F, len(SHARPNESS)) cross-entropies, sums over a frame's places."""
    return torch.stack([frame[which].entropy for frame in frames]).numpy()


def excess(entropy, places):
    """Mean cross-entropy less its chance level, of sums over frames' places (F,) and their numbers (F,)."""
    return (entropy - chance_sums(places)).sum() / places.sum()


def chance_sums(places):
    """Cross-entropy of knowing nothing, summed over so many places (F,)."""
    return places * np.log(np.maximum(places, 1))


def halves(count):
    """So many frames in two halves, to fit on one and score on the other: pairs of indices (fitted, scored)."""
    even, odd = np.arange(0, count, 2), np.arange(1, count, 2)
    return (odd, even), (even, odd)


def tempered(curves):
    """Cross-entropies after one temperature, that which is best for all curves together on the other half of the
    frames. curves: (F, len(SHARPNESS)) each -> (F,) each.
    """
    together = sum(curves)
    out = [np.zeros(len(together)) for _ in curves]
    for fitted, scored in halves(len(together)):
        best = together[fitted].sum(0).argmin()
        for values, curve in zip(out, curves):
            values[scored] = curve[scored, best]
    return out


def position_entropies(frames, device="cpu"):
    """What can be told without any image: cross-entropies (F, len(SHARPNESS)), sums over a frame's places, of a reader
    who knows the network's point features, and of each pixel nothing but where it lies.

    frames: Positions each. A place's candidates compete by query W where, bilinear in point features and a polynomial
    in (u, v). W is fitted to one half of the frames and scored on the other.
    """
    frames = [Positions(*(part.to(device, torch.float64) for part in frame)) for frame in frames]
    out = np.zeros((len(frames), len(SHARPNESS)))
    for fitted, scored in halves(len(frames)):
        weight = fit_positions([frames[i] for i in fitted])
        for i in scored:
            out[i] = entropy_sums(frames[i].query @ weight @ frames[i].where.T).numpy()
    return out


def fit_positions(frames):
    """The W (1 + D, 15) that makes a ridge and the cross-entropies of these frames' places least."""
    thinned = []
    for query, where in frames:
        step = -(-len(query) // POSITION_PLACES) or 1
        thinned.append((query[::step], where[::step], torch.arange(len(query[::step]), device=query.device)))
    D, P = (part.shape[1] for part in frames[0])
    with torch.enable_grad():
        weight = frames[0].query.new_zeros(D, P).requires_grad_()
        optimizer = torch.optim.LBFGS([weight], max_iter=60, line_search_fn="strong_wolfe")

        def loss():
            optimizer.zero_grad()
            total = POSITION_PENALTY * weight.square().sum()
            for query, where, own in thinned:
                total = total + F.cross_entropy(query @ weight @ where.T, own, reduction="sum")
            total.backward()
            return total

        optimizer.step(loss)
    return weight.detach()


def advantage(own, control):
    """How much better a network reads the right image than a control does, with the same frames: mean cross-entropy of
    the control's answers less that of its own, nats, and the 95 % interval over frames (bootstrap). Above 0 it knows
    more than its control, which a gain does not say: a gain grows, too, where another's image misleads.

    own, control: results of `match`, one a seed. -> (mean, low, high).
    """
    sums = lambda found: np.sum([[run["per_frame"][key] for key in ("right", "places")] for run in found], 0)  # (2, F)
    (right, places), (theirs, asked) = sums(own), sums(control)
    draws = np.random.default_rng(0).integers(len(places), size=(INTERVAL, len(places)))
    mean = lambda total, count, at: total[at].sum(-1) / count[at].sum(-1)
    difference = lambda at: mean(theirs, asked, at) - mean(right, places, at)
    return difference(np.arange(len(places))), *np.percentile(difference(draws), [2.5, 97.5])


def median_rank(found, which, frames):
    """Over all places of these frames, one that is named twice counting twice."""
    return torch.cat([found[int(i)][which].ranks[0] for i in frames]).median().item()


def match_table(rows):
    """Lines of text for {name: result of `match`}."""
    width = max(map(len, rows))
    first = next(iter(rows.values()))
    chance = f" (chance: {first['chance']:.2f})" if "chance" in first else ""
    titles = "", "gain (95 %)", "right image", "another's image", "position", "other view's"
    lines = [
        f"matching on {first['frames']} frames; gain: cross-entropy with another's image less that with the right one",
        f"    in nats{chance}; then cross-entropy less chance, median rank (0 best, 50 % chance), top1",
        "{:{}} {:^22} {:^22}  {:^22} {:^8} {:^22}".format(titles[0], width, *titles[1:]).rstrip(),
    ]
    for name, figures in rows.items():
        right, wrong, intra = (_match_cell(figures, which) for which in ("right", "wrong", "intra"))
        gain, position = "-", "-"
        if "gain" in figures:
            low, high = figures["gain_interval"]
            gain = f"{figures['gain']:z.2f} ({low:z.2f} to {high:z.2f})"
            position = f"{figures['position_excess']:+z.2f}"
        lines.append(f"{name:>{width}} {gain:^22} {right}  {wrong} {position:^8} {intra}")
    return lines


def _match_cell(figures, which):
    if f"{which}_rank" not in figures:
        return f"{'-':>22}"
    rank, top1, over = (figures[f"{which}_{figure}"] for figure in ("rank", "top1", "excess"))
    return f"{over:+z6.2f} {rank:5.1f} % {100 * top1:5.1f} %"


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


def positions(uv, width, height, degree=DEGREE):
    """All products of powers of (u, v), in [-1, 1], up to `degree` together. uv (n, 2) pixels -> float64, (n, 21) of 5,
    (n, 15) of 4.
    """
    u, v = (2 * (uv[:, i].double() + 0.5) / size - 1 for i, size in ((0, width), (1, height)))
    return torch.stack([u**i * v**j for i in range(degree + 1) for j in range(degree + 1 - i)], 1)


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
