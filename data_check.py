"""Is this data fit for training? Every file is read, what is broken is named, and sweeps are drawn on their images.

    python data_check.py --data-root data/kitti                 # all that ImageSets/ lists, or both whole folders
    python data_check.py --data-root data/kitti --splits train val --out kitti.png
    python data_check.py --data-root data/kitti_raw --frame-stride 5 --skip-missing
    python data_check.py --data-root data/kitti data/kitti_raw --max-frames 500   # a sample, and it says so

Is the calibration right? Two questions that need no reference, both asked of all frames of a folder of calibrations
together (training/calib, testing/calib, a raw DATE).

Labels, where there are any. Does the projected 3D box cover the labelled 2D box (P2 alone)? Is it displaced sideways by
as many metres as another camera would be? Do 3D boxes hold more points at their place than when they are turned about
the camera by up to 8 degrees (R0_rect Tr_velo_to_cam alone)? How many points they hold is not asked: a LiDAR of 16 rows
leaves many without.

And for all: do points at depth jumps fall on edges of the image, and less so when they are shifted by a few pixels?

Thresholds stand between what was measured with the true calibration and with wrong ones. "train" and "test" are 30 and
20 real KITTI frames, "raw" 20 of a real drive, "astyx" 237 real frames of a LiDAR with 16 rows, "syn" 12 full-sized
scenes of synthetic.py and "small" 8 of 416 x 128. "Points kept" is the share of points that a box holds at its place,
of those that it holds at the best of its turns, on average over boxes.

    labels              box IoU, median          metres aside  points kept
                        train astyx small syn    train  syn    train astyx small syn
    true                .97   .98   1.0   1.0    -.009  .000   .96   .89   .99   .99
    P0 instead of P2    .93         .95   .94    .052   .061   .96         .99   .99
    20 px to the right  .48   .60   .00   .42    far    far    .96   .89   .99   .99
    yaw 1 degree        .97   .98   1.0   1.0    as true       .70   .66   .61   .63
    yaw 2 degrees       .97   .98   1.0   1.0    as true       .49   .50   .44   .46
    pitch 1 degree      .97   .98   1.0   1.0    as true       .94   .87   .98   .99
    roll 3 degrees      .97   .98   1.0   1.0    as true       .96   .88   .99   .99
    y mirrored          .97   .98   1.0   1.0    as true       .32   .32   .23   .26
    y and z swapped     .97   .98   1.0   1.0    as true       .19   .30   .27   .25

    edges               best shift, px of 1242: right, down
                        train    test     raw      small    syn
    true                0, -4    0, 0     0, 0     0, -4    0, -4
    P0 instead of P2    0, 0     0, 0     4, 0     4, -4    4, -4
    20 px to the right  -20, -4  -20, 0   -20, 0   off      -20, -4
    yaw 1 degree        12, -4   12, 0    12, 0    16, -4   16, -4
    yaw 2 degrees       28, -4   28, 0    24, 0    28, 0    28, 0
    pitch 1 degree      0, -16   0, -16   -4, -16  0, -16   0, -16
    roll 3 degrees      0, -8    0, 4     4, -4    4, 4     4, -4
    y mirrored          none near; .01 to .04 high
    y and z swapped     none near; .03 to .09

(The true calibrations' best is .07 to .18 high, above the median shift. "small" was moved by 20 of its own pixels,
beyond the search.)

Not caught, then: a roll of 3 degrees, less than 10 px of shift without labels, and P0 without labels. Of random subsets
of 8 frames with the true calibration none was called wrong, of 5 at most 3 % ("train"), of single frames 15 %: fewer
than 8 are not judged.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tyro
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

import data
import data_kitti
import data_nuscenes
import data_sets
import ops_boxes
import pictures
import runtime
from files import BadInput, file_size, list_folder

PRINTED = 50  # broken files and notes printed of each kind; all are counted
EDGE_FRAMES = 100  # of each folder of calibrations, for image edges against depth edges: half a second each
MIN_FRAMES, MIN_BOXES = 8, 20  # fewer do not tell a wrong calibration from an odd scene
MIN_IOU, MAX_ASIDE, MIN_KEPT = 0.8, 0.03, 0.7  # see the table above
MIN_HIT = 0.25  # of the boxes must hold a point, turned or not: 4 rows of 64 leave two thirds, wrong axes a tenth
TURNS = np.radians(np.arange(-8, 9))  # of boxes about the camera; a row of parked cars is twice as wide
SHIFT_U, SHIFT_V = np.arange(-40, 41, 4), np.arange(-20, 21, 4)  # pixels of an image 1242 wide
MAX_SHIFT = 9.0  # two steps of the search, and a diagonal one
USUAL_SPLITS = ("train", "val", "trainval", "test")
RING_EDGES = np.array([(i, (i + 1) % 4 + i // 4 * 4) for i in range(8)] + [(i, i + 4) for i in range(4)])  # of a box


# -----------------------------------------------------------------------------
# labels against calibration


def compare_labels(frame, labels, points, size):
    """How a frame's labels (n, 14) fit its calibration and its points (N, 3+). size: width, height of the image.

    -> arrays of: IoUs of projected and labelled boxes; metres that labelled boxes are to the right of projected ones;
    points in 3D boxes; the most points that each holds at one of TURNS. The first two are of whole boxes at least 25 px
    high (of 1242 wide), the others of unoccluded ones within 40 m.
    """
    p2, velo2cam = data_kitti.split_projection(frame)
    camera = points[:, :3] @ velo2cam[:, :3].T + velo2cam[:, 3]
    distance = np.hypot(camera[:, 0], camera[:, 2])
    fits, held = [], []
    for label in labels:
        truncated, occluded, z = label[0], label[1], label[12]
        _, top, _, bottom = label[3:7]
        corners = data_kitti.box_corners(label)
        if truncated == 0 and corners[:, 2].min() > 1 and bottom - top >= 25 * size[0] / 1242:
            fits.append(fit_of_boxes(label, corners, p2, size))
        if truncated < 0.3 and occluded == 0 and 0 < z < 40:
            held.append(points_when_turned(label, camera, distance))
    ious, aside = np.array(fits, float).reshape(-1, 2).T
    held = np.array(held, float).reshape(-1, len(TURNS))
    return ious, aside, held[:, len(TURNS) // 2], held.max(1)


def fit_of_boxes(label, corners, p2, size):
    """-> IoU of the projected 3D box and the labelled 2D box; metres that the labelled one is to the right."""
    width, height = size
    left, top, right, bottom = label[3:7]
    uvw = corners @ p2[:, :3].T + p2[:, 3]
    uv = uvw[:, :2] / uvw[:, 2:]
    low, high = (edge.clip(0, [width - 1, height - 1]) for edge in (uv.min(0), uv.max(0)))
    both = np.prod((np.minimum(high, [right, bottom]) - np.maximum(low, [left, top])).clip(0))
    union = np.prod(high - low) + (right - left) * (bottom - top) - both
    pixels = (left + right - uv[:, 0].min() - uv[:, 0].max()) / 2
    return both / union, pixels * label[12] / p2[0, 0]


def points_when_turned(label, camera, distance):
    """How many points the 3D box of a label holds, turned about the camera by each of TURNS.

    camera (N, 3): points in the camera's frame. distance (N,): theirs, over the ground.
    """
    ring = np.hypot(label[10], label[12])  # no turn leaves it
    near = camera[np.abs(distance - ring) <= np.hypot(label[8], label[9]) / 2]
    counts = []
    for c, s in zip(np.cos(TURNS), np.sin(TURNS)):
        turned = near @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])  # the points the other way
        inside = (turned - label[10:13]) @ data_kitti.box_axes(label) / label[[9, 7, 8]]
        counts.append((np.abs(inside + [0, 0.5, 0]) <= 0.5).all(1).sum())
    return counts


# -----------------------------------------------------------------------------
# image edges, depth edges


def depth_jumps(points):
    """Those of points (N, 4) that stand at least half a metre and a tenth in front of a neighbour in the sweep:
    outlines of things. From directions alone, so that no order of the cloud and no calibration matters.
    """
    r = np.linalg.norm(points[:, :3], axis=1)
    points, r = points[r > 2], r[r > 2]
    # beams lie four times as far apart as firings; the outline wanted is the one along the beam, which is dense
    direction = np.degrees(np.c_[np.arctan2(points[:, 1], points[:, 0]), 4 * np.arcsin(points[:, 2] / r)])
    if len(points) < 7:
        return points
    _, neighbours = cKDTree(direction).query(direction, k=7, distance_upper_bound=0.6)
    return points[np.append(r, 0)[neighbours].max(1) > 1.1 * r + 0.5]


def edge_agreement(image, points, lidar2img):
    """Mean rank (0 to 1) among the image's horizontal gradients of the pixels where depth jumps fall, for every shift
    of them: (len(SHIFT_V), len(SHIFT_U)), NaN where fewer than 50 stay on the image. Ranks, because contrast differs
    from image to image.
    """
    height, width = image.shape[:2]
    gradient = np.abs(gaussian_filter(image.mean(2, dtype=np.float32), 1.0, order=(0, 1)))
    rank = np.empty(gradient.size, np.float32)
    rank[gradient.ravel().argsort()] = np.linspace(0, 1, gradient.size, dtype=np.float32)
    uv, depth = data.project(depth_jumps(points).astype(np.float64), lidar2img)
    uv = uv[data.inside_image(uv, depth, width, height)]
    out = np.full((len(SHIFT_V), len(SHIFT_U)), np.nan)
    for i, v in enumerate(SHIFT_V):
        for j, u in enumerate(SHIFT_U):
            x, y = np.rint(uv + np.array([u, v]) * width / 1242).astype(int).T
            on = (x >= 0) & (y >= 0) & (x < width) & (y < height)
            if on.sum() >= 50:
                out[i, j] = rank.reshape(height, width)[y[on], x[on]].mean()
    return out


def best_shift(agreements):
    """(u, v) where the mean of many `edge_agreement` is best, pixels of an image 1242 wide; its excess over the median
    shift, there and unshifted. None if nothing could be compared.
    """
    agreements = [a for a in agreements if np.isfinite(a).any()]
    if not agreements:
        return None
    count = np.isfinite(agreements).sum(0)
    mean = np.where(count > 0, np.nansum(agreements, 0) / np.maximum(count, 1), np.nan)
    mean -= np.nanmedian(mean)
    v, u = np.unravel_index(np.nanargmax(mean), mean.shape)
    return SHIFT_U[u], SHIFT_V[v], mean[v, u], mean[len(SHIFT_V) // 2, len(SHIFT_U) // 2]


# -----------------------------------------------------------------------------
# one frame


def examine(job):
    """Read all of a frame and measure it: the job of a worker. job: Frame, must it have a label, are edges to be
    compared?

    -> dict(errors: a list of lines; and of what could be read: size, points, in_range, in_view, reflectance, labels,
    edges).
    """
    frame, labelled, edges = job
    found, errors = {}, [str(e) for e in frame.file_errors()]
    named = {line.split(": ")[0] for line in errors}

    def attempt(read, *paths):
        """read(), or None and an error; not even tried for files that are known to be broken."""
        if named.intersection(map(str, paths)):
            return None
        try:
            return read()
        except BadInput as e:
            errors.append(str(e))

    image = attempt(frame.read_image, frame.image)
    points = attempt(frame.read_points, frame.cloud)
    lidar2img = attempt(frame.lidar2img, *frame.calib)
    labels = None
    if labelled and frame.label.is_file():
        labels = attempt(lambda: data_kitti.read_labels(frame.label)[1])
    elif labelled and image is not None:
        wrong = file_size(frame.label)[1]
        errors.append(f"{frame.label}: {wrong} (of frame {frame.name}; others in the folder have labels)")
    if image is not None:
        found["size"] = image.shape[1::-1]
    if points is not None:
        reflectance = points[:, 3]
        found["points"], found["reflectance"] = len(points), (float(reflectance.min()), float(reflectance.max()))
    if image is not None and points is not None and lidar2img is not None:
        near = points[frame.rig.in_range(points)]
        uv, depth = data.project(near.astype(np.float64), lidar2img)
        found["in_range"], found["in_view"] = len(near), int(data.inside_image(uv, depth, *found["size"]).sum())
        if found["in_view"] < data.MIN_POINTS:
            errors.append(data.too_few_in_view(frame, found["in_view"]))
        if edges:
            found["edges"] = edge_agreement(image, near, lidar2img)
        if labels is not None:
            found["labels"] = compare_labels(frame, labels, points.astype(np.float64), found["size"])
    return found | {"errors": errors}


def examine_all(jobs, workers, title):
    """What `examine` finds, in order, with a bar on stderr."""
    bar = partial(tqdm, total=len(jobs), desc=title, unit="frame", dynamic_ncols=True)
    if workers < 2 or len(jobs) < 2:
        return list(bar(map(examine, jobs)))
    # fork, where there is such a thing: it starts at once, and does not import torch again
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("fork" if hasattr(os, "fork") else None))
    try:
        with runtime.blocked(signal.SIGINT):
            found = pool.map(examine, jobs, chunksize=4)
        return list(bar(found))
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# one root: what is in it


class Findings:
    """What is broken, and what is only worth knowing: a line each, no file twice."""

    def __init__(self):
        self.broken, self.notes = {}, {}

    def add(self, kind, line):
        kind.setdefault(line.split(": ")[0], line)

    def print(self):
        for kind, title in ((self.notes, "notes"), (self.broken, "broken")):
            lines = list(kind.values())
            if lines:
                print(f"\n{title}: {len(lines)}")
            for line in lines[:PRINTED]:
                print(f"  {line}")
            if len(lines) > PRINTED:
                print(f"  and {len(lines) - PRINTED} more")


def list_splits(root, splits, frame_stride, findings):
    """{split: frames}; of raw drives {"drives": frames} unless splits are asked for. `splits` () for all that applies.

    Raises BadInput as data_kitti.list_frames and data_nuscenes.list_frames do; but lists that nobody asked for by name
    are findings.
    """
    if data_sets.is_nuscenes(root):
        chosen = dict.fromkeys(splits or data_nuscenes.splits_of(root))
        return {split: data_nuscenes.list_frames(root, split, frame_stride=frame_stride) for split in chosen}
    if data_kitti.sequences_of(root):
        there = data_kitti.sequences_there(root)
        lacking = {split: set(names).difference(there) for split, names in data_kitti.SEQUENCES.items()}
        chosen = [split for split, names in data_kitti.SEQUENCES.items() if len(lacking[split]) < len(names)]
        chosen = list(dict.fromkeys(splits)) or chosen
        for split in chosen:
            if lacking.get(split):
                absent = f"sequences {', '.join(sorted(lacking[split]))} are not there"
                findings.add(findings.notes, f"{root}, {split}: {absent}; training wants them, or --skip-missing")
        return {split: data_kitti.list_frames(root, [split], frame_stride, True) for split in chosen}
    if splits:
        return {split: data_kitti.list_frames(root, [split], frame_stride, True) for split in dict.fromkeys(splits)}
    if not data_kitti.is_object_layout(root):
        return {"drives": data_kitti.list_frames(root, (), frame_stride, True)}
    out = {}
    for split in applicable_splits(root):
        listing, folder = root / "ImageSets" / f"{split}.txt", root / ("testing" if split == "test" else "training")
        if not folder.is_dir():
            findings.add(findings.notes, f"{listing}: left out, there is no {folder.name}/ here")
            continue
        try:
            frames = data_kitti.list_frames(root, [split])
        except BadInput as e:
            findings.add(findings.broken, str(e))
            continue
        if split not in USUAL_SPLITS and not any(f.image.exists() or f.cloud.exists() for f in frames):
            findings.add(findings.notes, f"{listing}: left out, none of what it lists is in {folder.name}/")
            continue
        out[split] = frames
    return out


def applicable_splits(root):
    """Names of the lists in ImageSets/, the usual ones first; and of whole folders that no list is of."""
    listed = texts_in(root / "ImageSets")
    listed = [split for split in USUAL_SPLITS if split in listed] + sorted(set(listed) - set(USUAL_SPLITS))
    whole = []
    if (root / "training").is_dir() and not any(split != "test" for split in listed):
        whole.append("trainval")
    if (root / "testing").is_dir() and "test" not in listed:
        whole.append("test")
    return listed + whole


def texts_in(folder):
    """Names of the text files in a folder, without their suffix."""
    return [name.removesuffix(".txt") for name in list_folder(folder) if name.endswith(".txt")]


def compare_splits(root, splits, findings):
    """Find frames that are listed twice, or that training and validation share."""
    names = {split: [f.name for f in frames] for split, frames in splits.items()}
    for split, listed in names.items():
        twice = [name for name, times in Counter(listed).items() if times > 1]
        if twice:
            extra = len(listed) - len(set(listed))
            findings.add(
                findings.notes, f"{root}, {split}: {extra} frames listed more than once, {', '.join(twice[:3])}"
            )
    if "train" not in names or "val" not in names:
        return
    shared = sorted(set(names["train"]) & set(names["val"]))
    if shared:
        findings.add(
            findings.broken, f"{root}, train and val: {len(shared)} frames are in both, {', '.join(shared[:3])}"
        )
    train, val = ({f.drive for f in splits[split] if f.drive} for split in ("train", "val"))
    shared = sorted(train & val)
    subject = f"{root}, recordings of train and val"
    if shared:
        few = ", ".join(shared[:3])
        findings.add(findings.notes, f"{subject}: {len(shared)} are in both, {few}; neighbours look alike")
    elif not train:
        would = "the object devkit's mapping/train_{mapping,rand}.txt would tell"
        findings.add(findings.notes, f"{subject}: not known ({would})")


# -----------------------------------------------------------------------------
# one root: what it measures


def spread(values, unit=""):
    if not len(values):
        return f"{'-':>9}"
    return " ".join(f"{x:9,.0f}" for x in (min(values), np.median(values), max(values))) + unit


def counts(items, limit=8):
    """'a 3, b 2' of [(name, n)], the rest summed."""
    rest = f", {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(f"{name} {n}" for name, n in items[:limit]) + rest


def row(name, text):
    print(f"  {name:<24} {text}")


def by_calibration(frames):
    """{folder of calibrations: its frames}: training/calib, testing/calib, a day of raw drives, a sequence, a camera of
    nuScenes.
    """
    folders = {}
    for f in frames:
        folders.setdefault(f.calibrations, []).append(f)
    return folders


def check_root(root, splits, frame_stride, max_frames, skip_missing, workers, findings):
    """Read, measure and print one root. -> [(Frame, what `examine` found)] of its good frames."""
    split_frames = list_splits(root, splits, frame_stride, findings)
    frames = list({f.name: f for fs in split_frames.values() for f in fs}.values())
    if skip_missing:
        whole = [f for f in frames if f.whole()]
        if len(whole) < len(frames):
            left_out = f"{len(frames) - len(whole)} frames left out that lack image or cloud"
            findings.add(findings.notes, f"{root}, --skip-missing: {left_out}")
        frames = whole
    if not frames:
        findings.add(findings.broken, f"{root}: no frames in it")
        return []
    compare_splits(root, split_frames, findings)
    listed = len(frames)
    if max_frames:
        frames = data.evenly_spread(frames, max_frames)

    folders = by_calibration(frames)
    labelled = {folder for folder, fs in folders.items() if fs[0].label and texts_in(fs[0].label.parent)}
    compared = {f.name for fs in folders.values() for f in data.evenly_spread(fs, EDGE_FRAMES)}
    jobs = [(f, f.calibrations in labelled, f.name in compared) for f in frames]
    found = examine_all(jobs, workers, f"reading {root}")
    for result in found:
        for line in result["errors"]:
            findings.add(findings.broken, line)

    print_summary(root, split_frames, frames, listed, frame_stride, found, findings)
    of = {f.name: result for f, result in zip(frames, found)}
    for folder, fs in folders.items():
        judge_calibration(folder, [(f, of[f.name]) for f in fs], findings)
    return [(f, result) for f, result in zip(frames, found) if not result["errors"]]


def print_summary(root, split_frames, frames, listed, frame_stride, found, findings):
    """What is in a root, in numbers. listed: how many frames there are; `frames` were read, and `found` is what of
    them.
    """
    print(f"\n{root}: {data_sets.name_of(root)}")
    has_splits = "drives" not in split_frames
    if has_splits:
        row("splits", counts([(split, len(fs)) for split, fs in split_frames.items()]))
    else:
        drives = Counter(f.name.split("/")[0] for f in frames)
        row("drives", f"{len(drives)}: {counts(list(drives.items()), 4)}")
    read = "every file read" if len(frames) == listed else f"only {len(frames)} of them read (--max-frames)"
    row("frames", f"{listed}, {read}")
    if frame_stride > 1 and not data_kitti.is_object_layout(root):
        row("", f"(one in {frame_stride} of each recording: --frame-stride)")
    sizes = Counter(result["size"] for result in found if "size" in result)
    row("image sizes", counts([(f"{width} x {height}:", n) for (width, height), n in sizes.most_common()]))
    seen = [result for result in found if "in_view" in result]
    row("", f"{'min':>9} {'median':>9} {'max':>9}")
    row("points per cloud", spread([result["points"] for result in found if "points" in result]))
    row("in range and view", spread([result["in_view"] for result in seen]))
    row("share of the cloud", spread([100 * result["in_view"] / result["points"] for result in seen], " %"))
    reflectance = np.array([result["reflectance"] for result in found if "reflectance" in result])
    if len(reflectance):
        row("reflectance", f"{reflectance[:, 0].min():9.2f} {'':9} {reflectance[:, 1].max():9.2f}")
        if reflectance[:, 1].max() == 0:
            findings.add(findings.notes, f"{root}, reflectance: 0 in every cloud; the fourth channel says nothing")


def judge_calibration(folder, frames, findings):
    """Print what labels and edges say of a folder of calibrations, frames [(Frame, found)], and add what is wrong."""
    name = folder.parent.name if folder.name == "calib" else folder.name
    wrong = judge_labels(name, [(f, found["labels"]) for f, found in frames if "labels" in found], findings)
    wrong += judge_edges(name, [found["edges"] for _, found in frames if "edges" in found])
    if wrong:
        findings.add(findings.broken, f"{folder}: wrong calibration? " + "; ".join(wrong))


def judge_labels(name, labels, findings):
    """-> what is wrong, in words, by the labels [(Frame, result of compare_labels)] of a folder of calibrations."""
    if not labels:
        return []
    wrong = []
    ious, aside, held, most = (np.concatenate([result[i] for _, result in labels]) for i in range(4))
    if len(ious):
        iou, off = np.median(ious), -np.median(aside)
        fit = f"median IoU of projected 3D with 2D box {iou:.3f}, {-off:+.3f} m aside"
        row(f"{name}: labelled boxes", f"{len(ious)} whole ones; {fit}")
        if len(ious) >= MIN_BOXES and iou < MIN_IOU:
            wrong.append(f"projected 3D boxes and 2D boxes of labels have a median IoU of {iou:.2f}, below {MIN_IOU}")
        elif len(ious) >= MIN_BOXES and abs(off) > MAX_ASIDE:
            where = f"3D boxes project {off:+.3f} m aside of 2D boxes of labels, more than {MAX_ASIDE}"
            wrong.append(f"{where}: the projection of another camera than P2's?")
    if len(held):
        boxes = f"of {len(held)} unoccluded boxes within 40 m hold 5 or more, median {np.median(held):.0f}"
        row(f"{name}: points in boxes", f"{(held >= 5).mean():.0%} {boxes}")
        hit = most > 0
        kept = np.mean(held[hit] / most[hit]) if hit.any() else 0.0
        row("", f"{kept:.0%} of the most that they hold when turned about the camera")
        if len(held) >= MIN_BOXES and hit.mean() < MIN_HIT:
            wrong.append(f"only {hit.mean():.0%} of unoccluded boxes within 40 m hold a point, turned or not")
        elif len(held) >= MIN_BOXES and kept < MIN_KEPT:
            share = f"{kept:.0%} of the points that they hold when turned, below {MIN_KEPT:.0%}"
            wrong.append(f"unoccluded boxes within 40 m hold only {share}")
    if not wrong:
        note_odd_frames(labels, findings)
    return wrong


def note_odd_frames(labels, findings):
    """Single frames whose boxes do not fit, though those of their folder do."""
    for frame, (ious, _, held, most) in labels:
        few = (held < most / 2).sum()
        if len(ious) > 1 and np.median(ious) < 0.3:
            odd = f"labelled boxes of this frame do not fit, median IoU {np.median(ious):.2f}"
        elif len(held) > 2 and few > len(held) / 2:
            odd = (
                f"{few} of {len(held)} boxes of this frame hold less than half of the points that they hold when turned"
            )
        else:
            continue
        findings.add(findings.notes, f"{frame.calib[0]}: {odd}; look at it")


def judge_edges(name, agreements):
    """-> what is wrong, in words, by the edges of a folder of calibrations."""
    best = best_shift(agreements)
    if best is None:
        return ["in no frame do 50 depth edges fall on the image"] if len(agreements) >= MIN_FRAMES else []
    u, v, there, here = best
    frames = f"{len(agreements)} frames"
    if len(agreements) < MIN_FRAMES:
        frames += f"; {MIN_FRAMES} are needed to judge"
    where = f"image and depth agree best {u:+d} px right, {v:+d} px down of the calibration"
    row(f"{name}: edges", f"{where}; here {here:+.3f}, there {there:+.3f} ({frames})")
    if len(agreements) < MIN_FRAMES or np.hypot(u, v) <= MAX_SHIFT or here >= 0.8 * there:
        return []
    fit = f"depth edges fit image edges better ({there:+.3f} over the median, here {here:+.3f})"
    return [f"{fit} when shifted by {u:+d}, {v:+d} px of 1242"]


def pick(good, n=4):
    """n of [(Frame, found)] to draw: one of each folder and image size first, then spread over the largest of these
    groups.
    """
    groups = {}
    for frame, found in good:
        kind = (frame.calibrations, frame.name.rpartition("/")[0], found["size"])
        groups.setdefault(kind, []).append((frame, found))
    groups = sorted(groups.values(), key=len, reverse=True)[:n]
    picked = []
    for i, group in enumerate(groups):
        share = n // len(groups) + (i < n % len(groups))  # the first groups take what does not come out even
        share = min(share, len(group))
        picked += [group[(2 * k + 1) * len(group) // (2 * share)] for k in range(share)]
    return picked


def labelled_boxes(frame):
    """Pixels (12, 2, 2) of the edges of each labelled box that is all before the camera; [] without labels."""
    if isinstance(frame, data_nuscenes.Frame):
        with contextlib.suppress(BadInput):  # labels are not what is checked here
            uv, depth = data.project(ops_boxes.corners(frame.labels().boxes), frame.lidar2img())
            return list(uv[(depth > 0.5).all(1)][:, RING_EDGES])
    if not frame.label or not frame.label.is_file():
        return []
    p2, _ = data_kitti.split_projection(frame)
    boxes = []
    for label in data_kitti.read_labels(frame.label)[1]:
        uvw = data_kitti.box_corners(label) @ p2[:, :3].T + p2[:, 3]
        if uvw[:, 2].min() > 0.5:
            boxes.append((uvw[:, :2] / uvw[:, 2:])[data_kitti.BOX_EDGES])
    return boxes


def to_draw(frame, found):
    """A frame as pictures.draw_overlay takes it."""
    image, points, lidar2img = frame.read_image(), frame.read_points(), frame.lidar2img()
    boxes = labelled_boxes(frame)
    share = found["in_view"] / found["points"]
    title = f"{frame.name}, {image.shape[1]} x {image.shape[0]}"
    title += f": {found['in_view']:,} of {found['points']:,} points in range and view ({share:.0%})"
    return title, image, points[frame.rig.in_range(points)], lidar2img, boxes


# -----------------------------------------------------------------------------
# the command


def check(
    data_root: tuple[Path, ...],
    splits: tuple[str, ...] = (),
    frame_stride: int = 1,
    max_frames: int = 0,
    skip_missing: bool = False,
    out: Path = Path("check.png"),
    workers: int = os.cpu_count() or 1,
) -> None:
    """Read data sets, name what is missing or broken, say whether calibrations fit, draw sweeps on their images.

    Exit status 1 if broken. Broken is: a file that is missing, truncated, unreadable, or holds NaN; fewer than 16
    points in view; reflectance outside [0, 1]; a frame in both train and val; an empty split; a calibration that labels
    or image edges speak against (at least 20 boxes, 8 frames). Only noted: a single frame whose boxes do not fit,
    frames listed twice, drives that train and val share, lists that do not apply.

    Args:
        data_root: one folder or more. What data set lies in it is seen: KITTI's object, raw or odometry layout, Waymo
            as data_waymo.py converts it, nuScenes.
        splits: lists in ImageSets/, of frames or of raw drives, or the splits of odometry and nuScenes; by default all,
            or the whole folders.
        frame_stride: keep every n-th frame of a raw drive or sequence, and of nuScenes' keyframes.
        max_frames: read at most so many frames of a root, evenly spread; 0 reads all.
        skip_missing: leave out frames that lack image or cloud, as training with this flag does.
        out: the picture.
        workers: processes; by default one per core.
    """
    for name, value, least in (
        ("frame-stride", frame_stride, 1),
        ("max-frames", max_frames, 0),
        ("workers", workers, 0),
    ):
        if value < least:
            raise BadInput(f"--{name} {value}: less than {least}")
    if not data_root:
        raise BadInput("--data-root: none given")
    if out.suffix.lower() not in (".png", ".jpg", ".pdf") or not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: not a .png, .jpg or .pdf in a folder that exists")
    for root in data_root:
        if not root.is_dir():
            raise BadInput(f"{root}: no such folder")
    findings, good = Findings(), []
    ours = [(root, splits, []) for root in data_root if data_sets.is_nuscenes(root)]
    others = [root for root in data_root if not data_sets.is_nuscenes(root)]
    for root, own, notes in ours + data_kitti.fitting_splits(others, splits):
        for note in notes:
            findings.add(findings.notes, note.removeprefix("note: "))
        good += check_root(root, own, frame_stride, max_frames, skip_missing, workers, findings)
    _, repeats = data.without_repeats([frame for frame, _ in good])
    if repeats:
        line = f"--data-root: {len(repeats)} frames are in two of them, {repeats[0].name} for one"
        findings.add(findings.notes, line)
    picked = pick(good)
    if picked:
        pictures.draw_overlay([to_draw(frame, found) for frame, found in picked], out)
    findings.print()
    picture = f"; look at {out}" if picked else ""
    if findings.broken:
        print(f"\nBROKEN: {len(findings.broken)} findings{picture}")
        raise SystemExit(1)
    print(f"\nOK: {len(good)} frames{picture}")


def main():
    runtime.command_line(lambda: tyro.cli(runtime.later(check)))


if __name__ == "__main__":
    main()
