"""Detected boxes beside labelled ones, scored as KITTI's object benchmark does: 2D, orientation (AOS), BEV and 3D.

    truths = [(types, numbers), ...]        one a frame, all that its label file has, DontCare included
    results = [read_results(path), ...]     one a frame; None where there is no file: that frame is not evaluated
    lines = table(evaluate(truths, results), number of frames that are)

types (n,) are KITTI's names. numbers (n, 14) are the label file's columns behind the type: truncated, occluded, alpha;
left, top, right, bottom, pixels; h, w, l, metres; x, y, z of the bottom's middle in the rectified camera, metres; ry.
Results have the score as a 15th.

Average precision (AP) is over 40 points of recall (AP40, today's) or over 11 (AP11, which older papers have). It is
read at one score for each object found, at most 41, of which AP40 leaves out the first. So on n objects, where n < 41,
the best that AP40 can be is (n - 1) / 40: read it with n beside it.

A detector is judged by the rules of its protocol, KITTI's or Waymo's (eval_waymo.py): `judge`, `report`, RULES.

KITTI's rules are those of its devkit (Geiger et al. 2012; 40 points: Simonelli et al. 2019), and the figures are those
that its C++ prints. Wrong input raises `BadInput`, one line.
"""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import data_det3d
import data_kitti
import eval_waymo
import ops_boxes
import pictures_boxes
import runtime
from anchors import PROTOCOLS
from files import BadInput, unless_bad, writing

TYPES = ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc")  # what may be detected
JUDGED = ("Car", "Pedestrian", "Cyclist")  # in the order of tables; a detector's is data_det3d.CLASSES
NEIGHBOURS = {"Car": "Van", "Pedestrian": "Person_sitting"}  # neither asked for nor counted as false
MIN_HEIGHT, MAX_OCCLUDED, MAX_TRUNCATED = (40, 25, 25), (0, 1, 2), (0.15, 0.3, 0.5)  # easy, moderate, hard
STRICT = {"Car": 0.7, "Pedestrian": 0.5, "Cyclist": 0.5}  # a detection's overlap must be above
LOOSE = {"Car": 0.5, "Pedestrian": 0.25, "Cyclist": 0.25}
METRICS = {
    "2d": ("2d", STRICT),
    "bev": ("bev", STRICT),
    "3d": ("3d", STRICT),
    "bev loose": ("bev", LOOSE),
    "3d loose": ("3d", LOOSE),
}
TITLES = {"2d": "2D", "aos": "AOS", "bev": "BEV", "3d": "3D", "bev loose": "BEV loose", "3d loose": "3D loose"}
POINTS = 41  # of recall: 0, 1/40 .. 1
TINY = 1e-9  # pixels squared; no box that is one
COUNTS, IGNORED, OTHER = 0, 1, 2  # ignored: may be matched, and is neither right nor wrong; other: not there

# 3D, AP11, val split, MVX-Net with MoCA, ResNet-50. Scratch: the paper's Table 1, which has the one figure. SimIPU: the
# release's log (resources/logs/moca_simipu_kitti.txt), which judges epochs 30 to 40. The release's README and the paper
# print the best, 31, and call it AP40; its evaluator averages 11 points.
PUBLISHED = {
    "scratch, paper": {"overall": (None, 68.58, None)},
    "SimIPU, best epoch": {
        "Car": (87.87, 77.37, 74.31),
        "Pedestrian": (71.26, 66.18, 60.24),
        "Cyclist": (84.84, 69.12, 64.04),
        "overall": (81.32, 70.89, 66.20),
    },
    "SimIPU, last epoch": {
        "Car": (88.38, 77.78, 74.87),
        "Pedestrian": (70.96, 63.20, 59.14),
        "Cyclist": (82.55, 68.56, 63.42),
        "overall": (80.63, 69.84, 65.81),
    },
}


# -----------------------------------------------------------------------------
# result files


def read_results(path):
    """One frame's detections: types (n,) and numbers (n, 15), the last the score. An empty file is a frame where
    nothing was found.

    Raises BadInput, naming file and line, for a line that is not 16 columns, not text, of an unknown type, or not all
    finite numbers.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as e:
        raise BadInput(f"{path}: not readable ({e.strerror or e})") from None
    types, numbers = [], []
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}: line {i}"
        try:
            name, *columns = line.decode().split()
        except UnicodeDecodeError:
            raise BadInput(f"{where} is not text") from None
        if len(columns) != 15:
            hint = " (a label has no score)" if len(columns) == 14 else ""
            raise BadInput(f"{where} has {len(columns) + 1} columns; must be 16, the score last{hint}")
        if name not in TYPES:
            raise BadInput(f"{where}: type '{name}' must be one of {', '.join(TYPES)}")
        try:
            row = [float(c) for c in columns]
        except ValueError:
            raise BadInput(f"{where}: not 15 numbers behind the type") from None
        if not np.isfinite(row).all():
            raise BadInput(f"{where}: a number is NaN or infinite")
        types.append(name)
        numbers.append(row)
    return np.array(types, "U16"), np.array(numbers, np.float64).reshape(-1, 15)


def write_results(path, types, numbers):
    """The file that `read_results` reads. Raises BadInput for NaN and infinite numbers, and for a path that cannot be
    written."""
    numbers = np.asarray(numbers, np.float64).reshape(len(types), 15)
    if not np.isfinite(numbers).all():
        raise BadInput(f"{path}: not written, a number is NaN or infinite")
    lines = []
    for name, (truncated, occluded, *places, score) in zip(types, numbers.tolist()):
        columns = [f"{truncated:g}", f"{occluded:g}", *(f"{p:.4f}" for p in places), f"{score:.8g}"]
        lines.append(" ".join([name, *columns]) + "\n")
    with writing(path) as temporary:
        temporary.write_text("".join(lines))


# -----------------------------------------------------------------------------
# what overlaps what


def _upright(numbers):
    """Boxes (n, 7) of ops_boxes from KITTI's columns: the camera's x, -z, -y are its x, y, z, so that ry turns as yaw
    does."""
    h, w, length, x, y, z, ry = numbers[:, 7:14].T
    return np.stack([x, -z, h / 2 - y, length, w, h, ry], -1)


def _image_areas(a, b):
    """Areas of 2D boxes a and b (..., 4), which broadcast: shared, of a, of b. No pixel is added, as in the devkit."""
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.where((sides > 0).all(-1), sides[..., 0] * sides[..., 1], 0)
    return shared, *((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))


def _collect(truths, results):
    """All frames with results in flat arrays, and the pairs of label and detection that overlap in some way."""
    frames = [(t, r) for t, r in zip(truths, results, strict=True) if r is not None]
    if not frames:
        raise BadInput(f"no results for any of {len(truths)} frames")
    pairs, covered, truth_start, found_start = [], [], 0, 0
    for (types, truth), (_, found) in frames:
        shared, area, area_found = _image_areas(truth[:, None, 3:7], found[:, 3:7])  # (G, D), (G, 1), (D,)
        stuff = np.asarray(types, "U16") == "DontCare"
        covered.append((shared[stuff] / np.maximum(area_found, TINY)).max(0, initial=0))
        reach, reach_found = (np.hypot(x[:, 8], x[:, 9]) / 2 for x in (truth, found))
        apart = np.hypot(truth[:, None, 10] - found[:, 10], truth[:, None, 12] - found[:, 12])
        g, d = np.nonzero((shared > 0) | (apart < reach[:, None] + reach_found))
        iou = shared / np.maximum(area + area_found - shared, TINY)
        pairs.append((g + truth_start, d + found_start, iou[g, d]))
        truth_start, found_start = truth_start + len(truth), found_start + len(found)
    s = SimpleNamespace(covered=np.concatenate(covered))  # the share of each detection that one DontCare covers
    s.truth, s.found = (np.concatenate([f[side][1] for f in frames]) for side in (0, 1))
    s.truth_types, s.found_types = (np.concatenate([np.asarray(f[side][0], "U16") for f in frames]) for side in (0, 1))
    s.frame = np.repeat(np.arange(len(frames)), [len(t) for (_, t), _ in frames])  # of each label
    s.g, s.d, iou = (np.concatenate(column) for column in zip(*pairs))
    a, b = _upright(s.truth)[s.g], _upright(s.found)[s.d]
    s.overlap = {"2d": iou, "bev": ops_boxes.bev_iou(a, b), "3d": ops_boxes.iou_3d(a, b)}
    return s


def _states(s, name, level):
    """Which labels and which detections count for a class at a level: COUNTS, IGNORED or OTHER of each."""
    truncated, occluded, height = s.truth[:, 0], s.truth[:, 1], s.truth[:, 6] - s.truth[:, 4]
    hard = (occluded > MAX_OCCLUDED[level]) | (truncated > MAX_TRUNCATED[level]) | (height <= MIN_HEIGHT[level])
    same, near = s.truth_types == name, s.truth_types == NEIGHBOURS.get(name)
    truth = np.select([same & ~hard, same | near], [COUNTS, IGNORED], OTHER)
    # asked before the class: a small detection of any class may be taken, as in the devkit
    small = abs(s.found[:, 6] - s.found[:, 4]) < MIN_HEIGHT[level]
    found = np.select([small, s.found_types == name], [IGNORED, COUNTS], OTHER)
    return truth, found


# -----------------------------------------------------------------------------
# matching and precision


def _take(wishes, turn, taken):
    """Labels take detections, one label of a frame after the other, each the first of its wishes that is still there.

    wishes (G, P) detections, best first, D for none; turn (G,): labels of one turn are of different frames;
    taken (T, D + 1) bool, at T thresholds, is updated; its last column is True. -> (T, G) detections, D for none.
    """
    chosen = np.empty((len(taken), len(wishes)), np.int64)
    for t in range(turn.max(initial=-1) + 1):
        rows = turn == t
        wish = wishes[rows]
        first = taken[:, wish].argmin(2)  # (T, g)
        pick = wish[np.arange(len(wish)), first]
        pick[np.take_along_axis(taken, pick, 1)] = taken.shape[1] - 1
        np.put_along_axis(taken, pick, True, 1)
        chosen[:, rows] = pick
    return chosen


def _place(groups):
    """The place of each item within its run of equal items, 0 for the first."""
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))


def _wishes(g, d, keys, none):
    """Pairs of label g and detection d as rows of d, one for each label, in the order of `keys`; `none` fills up."""
    order = np.lexsort([d, *keys[::-1], g])
    _, row = np.unique(g[order], return_inverse=True)
    place = _place(row)
    wishes = np.full((row.max(initial=-1) + 1, place.max(initial=0) + 1), none)
    wishes[row, place] = d[order]
    return wishes


def recall_thresholds(scores, n):
    """The scores at which precision is read, of those (m,) of the detections that are right, for n objects -> list,
    descending, at most 41. A score is skipped when the next one's recall is nearer to the recall wanted, which rises
    by 1/40 with each that is kept."""
    kept, wanted = [], 0.0
    scores = sorted(scores.tolist(), reverse=True)
    for i, score in enumerate(scores):
        here, following = (i + 1) / n, (i + 2) / n
        if i < len(scores) - 1 and following - wanted < wanted - here:
            continue
        kept.append(score)
        wanted += 1 / (POINTS - 1)
    return kept


def _curve(s, truth_state, found_state, kind, minimum):
    """Precision and orientation similarity at rising recall, (41,) each."""
    overlap, score, none = s.overlap[kind], s.found[:, 14], len(s.found)
    pair = (overlap > minimum) & (truth_state[s.g] != OTHER) & (found_state[s.d] != OTHER)
    g, d, overlap = s.g[pair], s.d[pair], overlap[pair]
    labels = np.unique(g)
    turn = _place(s.frame[labels])
    asked, usable = truth_state[labels] == COUNTS, np.append(found_state == COUNTS, False)

    # which scores to read precision at: the best detection in score goes to each label
    taken = np.append(np.zeros(none, bool), True)[None]
    chosen = _take(_wishes(g, d, [-score[d]], none), turn, taken)[0]
    thresholds = recall_thresholds(score[chosen[asked & usable[chosen]]], (truth_state == COUNTS).sum())

    # at each: the best detection in overlap, an ignored one only where there is no other
    taken = np.append(score, -np.inf) < np.reshape(thresholds, (-1, 1))
    taken[:, none] = True
    chosen = _take(_wishes(g, d, [~usable[d], -overlap], none), turn, taken)  # (T, labels)
    hit = asked & usable[chosen]
    false = usable[:none] & ~taken[:, :none]
    if kind == "2d":
        false &= s.covered <= minimum
    total = hit.sum(1) + false.sum(1)
    off = s.truth[labels, 2] - np.append(s.found[:, 2], 0)[chosen]
    alike = (hit * (1 + np.cos(off)) / 2).sum(1)
    return [_rising(x / np.maximum(total, 1)) for x in (hit.sum(1), alike)]


def _rising(values):
    """(41,) from the values at the thresholds: what is not reached is 0; then each is the best from there on."""
    curve = np.zeros(POINTS)
    curve[: len(values)] = values
    return np.maximum.accumulate(curve[::-1])[::-1]


def curves(truths, results, classes=JUDGED):
    """Precision over recall: -> {class: {"n": (3,) objects that count, one of TITLES: (3, 41)}}, easy, moderate, hard
    by recall 0, 1/40 .. 1. Arguments, errors, and when "aos" is None: as `evaluate`."""
    s = _collect(truths, results)
    found = {}
    for name in classes:
        states = [_states(s, name, level) for level in range(3)]
        found[name] = {"n": np.array([(truth == COUNTS).sum() for truth, _ in states])}
        for metric, (kind, minimum) in METRICS.items():
            pairs = [_curve(s, *state, kind, minimum[name]) for state in states]
            found[name][metric] = np.array([precision for precision, _ in pairs])
            if metric == "2d":
                found[name]["aos"] = None if (s.found[:, 2] == -10).any() else np.array([alike for _, alike in pairs])
    return found


def _averages(curve):
    return {"AP40": (100 * curve[:, 1:].mean(1)).tolist(), "AP11": (100 * curve[:, ::4].mean(1)).tolist()}


def evaluate(truths, results, classes=JUDGED):
    """KITTI's figures in percent. truths, results: as above, frame by frame.

    -> {class: {"n": [easy, moderate, hard], one of TITLES: {"AP40": [easy, moderate, hard], "AP11": the same}},
    "overall": the same, means over the classes, and sums of n}. n: objects that count. "2d", "aos", "bev", "3d" ask for
    an overlap of .7 for cars and .5 for the others, "bev loose" and "3d loose" for .5 and .25. Without objects AP is 0.
    "aos" is None where a result has alpha -10, which says that there is none. Raises BadInput where no frame has
    results.
    """
    found = {}
    for name, c in curves(truths, results, classes).items():
        found[name] = {"n": c["n"].tolist()}
        for figure in TITLES:
            curve = c[figure]
            found[name][figure] = None if curve is None else _averages(curve)
    rows = list(found.values())
    found["overall"] = {"n": np.sum([r["n"] for r in rows], 0).tolist()}
    for figure in TITLES:
        every = [r[figure] for r in rows]
        mean = None if None in every else {k: np.mean([r[k] for r in every], 0).tolist() for k in every[0]}
        found["overall"][figure] = mean
    return found


# -----------------------------------------------------------------------------
# table


def table(found, frames, published=False):
    """Lines of text for a result of `evaluate` on so many frames. published: with PUBLISHED, which is of KITTI's whole
    val split."""
    rows = []
    for name, r in found.items():
        for figure, title in TITLES.items():
            ap = r[figure] or {"AP40": None, "AP11": None}
            rows.append((f"{name} {title}", r["n"], ap["AP40"], ap["AP11"]))
    if published:
        rows += [(f"{who}: {name} 3D", None, None, ap) for who, r in PUBLISHED.items() for name, ap in r.items()]
    width = max(len(name) for name, *_ in rows)
    lines = [
        f"KITTI object on {frames} frames: AP in percent, n objects that count; each easy, moderate, hard",
        f"{'':{width}}{'n':^21}{'AP40':^27}{'AP11':^27}",
    ]
    for name, n, *columns in rows:
        counts = [f"{k:>7}" for k in n or "---"]
        asked = [k != 0 for k in n or "---"]
        cells = [f"{_percent(column, i, asked):>9}" for column in columns for i in range(3)]
        lines.append("".join([f"{name:>{width}}", *counts, *cells]))
    if published:
        lines.append(
            "The paper's and the release's rows are of the val split. They were printed as AP40, and are AP11."
        )
    return lines


def _percent(column, i, asked):
    """A figure, or a dash where it is not known or where there was nothing to find."""
    return f"{column[i]:.2f}" if column and asked[i] and column[i] is not None else "-"


# -----------------------------------------------------------------------------
# a detector's figures

WAYMO = PROTOCOLS["waymo"]
VAL_SPLIT = "94a5da87d7a4f0ea"  # data.fingerprint of the sorted names of the 3769 frames that papers judge on


def is_standard(frames):
    """Whether these are KITTI's val split (Chen et al. 2015), which published figures are of."""
    return data.fingerprint(sorted(f.name for f in frames)) == VAL_SPLIT


def check_numbers(frames):
    """Raises BadInput for frames of several folders that one result file would be of: files are named by number."""
    named = {}
    for frame in frames:
        other = named.setdefault(frame.cloud.stem, frame)
        if other is not frame:
            why = f"a result file {frame.cloud.stem}.txt would be of both; give one folder at a time"
            raise BadInput(f"{other.cloud} and {frame.cloud}: {why}")


def judging_box(c):
    """The size (width, height) that images are judged at: the training size, or its range's geometric middle."""
    if len(c.image_scale) == 2:
        return tuple(c.image_scale)
    return tuple(round(math.sqrt(low * high)) for low, high in zip(c.image_scale, c.image_scale[2:]))


@torch.no_grad()
def detections(model, frames, indices, c, device):
    """What a detector (finetune_det3d.Detector, in eval mode) finds in frames[i] of `indices`, one after another.

    -> boxes (n, 7) float64 in the LiDAR frame, scores (n,), classes (n,) of its protocol, best first.
    """
    dataset = data_det3d.DetectionFrames(frames, c, model.layout, training=False)
    for sample in runtime.ahead(lambda i: dataset[(0, i)], indices):
        batch = unless_bad(data_det3d.collate(model.layout, [sample]))
        batch = data_det3d.augment(batch, judging_box(c), model.layout, device)
        with runtime.mixed_precision(c.amp, device):
            boxes, scores, classes = (x[0].cpu() for x in model.detect(batch))
        found = scores > 0
        yield boxes[found].double().numpy(), scores[found].numpy(), classes[found].numpy()


def as_results(frame, size, boxes, scores, classes):
    """Detections in a frame as KITTI's result files have them. size: width, height of the image. -> types, numbers (n,
    15).

    The rectangle is that of the projected box, cut to the image; what does not reach into it, or has its centre behind
    the camera, is left out. Truncation and occlusion are not told (-1).
    """
    rects = data_det3d.projected_rect(boxes, frame.lidar2img())
    rects = rects.clip(0, np.tile(np.array(size) - 1, 2))
    _, depth = data.project(boxes, frame.lidar2img())
    seen = (rects[:, 2:] > rects[:, :2]).all(1) & (depth > 0)
    boxes, rects, scores, classes = boxes[seen], rects[seen], scores[seen], classes[seen]
    _, velo2cam = data_kitti.split_projection(frame)
    labels = ops_boxes.box_to_label(boxes, velo2cam)  # h, w, l, x, y, z, ry
    alpha = labels[:, 6] - np.arctan2(labels[:, 3], labels[:, 5])
    alpha = np.remainder(alpha + np.pi, 2 * np.pi) - np.pi
    unknown = np.full(len(boxes), -1.0)
    numbers = np.column_stack([unknown, unknown, alpha, rects, labels, scores])
    return np.array([data_det3d.CLASSES[k] for k in classes], "U16"), numbers.reshape(-1, 15)


def image_size(frame):
    """Width, height. Only the file's head is read."""
    with Image.open(frame.image) as image:
        return image.size


class Rules(NamedTuple):
    """How detections are judged, and in which files they are handed in. A frame's detections are boxes, scores and
    classes of `detections`; `found` are those of all frames, as `convert` leaves them."""

    convert: Callable  # frame, boxes, scores, classes -> found in that frame
    evaluate: Callable  # frames, found -> figures
    table: Callable  # figures, frames -> lines of text
    write: Callable  # folder, frames, found -> what was written, in words
    headline: Callable  # figures -> {class: percent} for the curves
    title: str  # of the headline


def _kitti_figures(frames, found):
    return evaluate([data_kitti.read_labels(f.label, dont_care=True) for f in frames], found)


def _kitti_files(folder, frames, found):
    for frame, result in zip(frames, found):
        write_results(folder / f"{frame.cloud.stem}.txt", *result)
    return f"{len(found)} result files"


def _waymo_objects(frame, boxes, scores, classes):
    return eval_waymo.as_objects(frame, boxes, scores, [WAYMO.classes[k] for k in classes])


def _waymo_joined(found):
    return eval_waymo.join_detections(found, WAYMO.nms_overlap)


def _waymo_figures(frames, found):
    return eval_waymo.evaluate(_waymo_joined(found), eval_waymo.read_truth(frames))


def _waymo_table(figures, frames):
    return eval_waymo.table(figures, eval_waymo.is_standard([eval_waymo.parse_id(f.name)[:2] for f in frames]))


def _waymo_files(folder, frames, found):
    eval_waymo.write_objects(folder / "predictions.bin", _waymo_joined(found))
    return "predictions.bin"


RULES = {
    "kitti": Rules(
        lambda frame, *found: as_results(frame, image_size(frame), *found),
        _kitti_figures,
        lambda figures, frames: table(figures, len(frames), is_standard(frames)),
        _kitti_files,
        lambda figures: {name: figures[name]["3d loose"]["AP40"][1] for name in JUDGED},
        "3D AP40, loose, moderate, %",
    ),
    "waymo": Rules(
        _waymo_objects,
        _waymo_figures,
        _waymo_table,
        _waymo_files,
        lambda figures: {name: 100 * figures[name]["LEVEL_2"]["mAP"] for name in eval_waymo.MEAN},
        "mAP, LEVEL_2, %",
    ),
}


def check_frames(frames, c, judged=()):
    """Raises BadInput, naming the first, for frames that a detector with Config c cannot be given, and for those of
    `judged` that lack what they are judged by."""
    waymo = c.protocol == "waymo"
    for frame in judged:
        if waymo and not eval_waymo.truth_of(frame).is_file():
            raise BadInput(f"{eval_waymo.truth_of(frame)}: missing; data_waymo.py writes it")
    for frame in (*frames, *judged):
        if waymo:
            eval_waymo.parse_id(frame.name)
        if c.elongation and frame.rig.columns < 5:
            lack = f"its points have {frame.rig.columns} numbers, no elongation"
            raise BadInput(f"{frame.cloud}: {lack}; convert with --elongation, or give --no-elongation")


def judge(model, frames, c, run):
    """A detector's figures on labelled frames, on every rank; each takes its share. -> figures of its protocol, and
    "frames", how many there are.

    The model is left in eval mode, and with rank 0's batch statistics, which are those that a checkpoint holds.
    """
    runtime.follow_main(model, run)
    model.eval()
    rules = RULES[c.protocol]
    mine, found = range(run.rank, len(frames), run.world), []
    bar = tqdm(mine, "judging", disable=not run.main, leave=False, dynamic_ncols=True, mininterval=1)
    for i, boxes in zip(bar, detections(model, frames, mine, c, run.device)):
        found.append((i, rules.convert(frames[i], *boxes)))
    found = [result for _, result in sorted(run.gather(found), key=lambda row: row[0])]
    return rules.evaluate(frames, found) | {"frames": len(frames)}


def report(found, frames, c):
    """Lines of text for a result of `judge` on these frames."""
    return RULES[c.protocol].table({k: v for k, v in found.items() if k != "frames"}, frames)


def draw(model, frames, c, device, path):
    """Picture of the frame with the most labelled objects; -> what was found, in words."""
    most = max(range(len(frames)), key=lambda i: len(data_kitti.read_labels(frames[i].label)[0]))
    ((boxes, scores, classes),) = detections(model.eval(), frames, [most], c, device)
    scene = data_det3d.read_scene(frames[most], c.keep_rows, model.layout.protocol, model.layout.columns)
    return pictures_boxes.draw_boxes(scene, boxes, scores, classes, path, frames[most].name)
