"""Is this data fit for training? Every file is read, what is broken is named, and sweeps are drawn on their images.

    python data.py check --data-root data/kitti                                # all that ImageSets/ lists, or both whole folders
    python data.py check --data-root data/kitti --splits train val --out kitti.png
    python data.py check --data-root data/kitti_raw --frame-stride 5 --skip-missing
    python data.py check --data-root data/kitti data/kitti_raw --max-frames 500   # a sample, and it says so

Is the calibration right? Two questions that need no reference, both asked of all frames of a folder of calibrations together
(training/calib, testing/calib, a raw DATE). Labels, where there are any: does the projected 3D box cover the labelled 2D box (P2 alone),
is it displaced sideways by as many metres as another camera would be, do points lie in the 3D box (R0_rect Tr_velo_to_cam alone)?
And for all: do points at depth jumps fall on edges of the image, and less so when they are shifted by a few pixels?

Thresholds stand between what was measured with the true calibration and with wrong ones. "train" and "test" are 30 and 20 real KITTI frames,
"raw" 20 of a real drive, "syn" 12 full-sized scenes of synthetic.py and "small" 8 of 416 x 128:

                        box IoU, median    metres aside     boxes with 5 points   best shift, px of 1242: right, down
                        train  small syn   train    syn     train  small  syn     train     test      raw       small     syn
    true                .97    1.0  1.0    -.009    .000    1.0    1.0    1.0     0, -4     0, 0      0, 0      0, -4     0, -4
    P0 instead of P2    .93    .95  .95     .052    .061    1.0    1.0    1.0     0, 0      0, 0      4, 0      4, -4     4, -4
    20 px to the right  .48    .20  .41    far             1.0    1.0    1.0     -20, -4   -20, 0    -20, 0    off       -20, -4
    yaw 1 degree        .97    1.0  1.0    as true          .97    .85    .91     12, -4    12, 0     12, 0     16, -4    16, -4
    yaw 2 degrees       .97    1.0  1.0    as true          .83    .85    .84     28, -4    28, 0     24, 0     28, 0     28, -4
    pitch 1 degree      .97    1.0  1.0    as true          1.0    1.0    1.0     0, -16    0, -16    -4, -16   0, -16    0, -16
    roll 3 degrees      .97    1.0  1.0    as true          1.0    1.0    1.0     0, -8     0, 4      4, -4     4, 4      4, 0
    y mirrored          .97    1.0  1.0    as true          .50    .53    .73     none near; .01 to .04 high
    y and z swapped     .97    1.0  1.0    as true          .14    .26    .29     none near; .03 to .09

(Shifts searched to 48 right, 16 down; the true calibrations' best is .07 to .18 high, above the median shift. "small" was moved by 20 of its own
pixels, beyond the search.)

Not caught, then: a roll of 3 degrees, less than 10 px of shift without labels, and P0 without labels. Of random subsets of 8 frames with the
true calibration none was called wrong, of 5 at most 3 % ("train"), of single frames 15 %: fewer than 8 are not judged.
"""

import os
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from tqdm import tqdm

import data
from data import BadInput

PRINTED = 50  # broken files and notes printed of each kind; all are counted
EDGE_FRAMES = 100  # of each folder of calibrations, for image edges against depth edges: half a second each
MIN_FRAMES, MIN_BOXES = 8, 20  # fewer do not tell a wrong calibration from an odd scene
MIN_IOU, MAX_ASIDE, MIN_FILLED = 0.8, 0.03, 0.9  # see the table above
SHIFT_U, SHIFT_V = np.arange(-40, 41, 4), np.arange(-20, 21, 4)  # pixels of an image 1242 wide
MAX_SHIFT = 9.0  # two steps of the search, and a diagonal one
CORNERS = np.array(np.meshgrid([-0.5, 0.5], [-1, 0], [-0.5, 0.5], indexing="ij")).reshape(3, 8).T  # (8, 3) of a box: length, height, width
BOX_EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (CORNERS[a] != CORNERS[b]).sum() == 1])  # (12, 2)


# -----------------------------------------------------------------------------
# labels


def read_labels(path):
    """KITTI's label_2: types (n,) and numbers float64 (n, 14) (truncated, occluded, alpha, left, top, right, bottom, h, w, l, x, y, z, ry;
    pixels, metres and radians, camera 0 rectified), without DontCare. Raises BadInput for a line that is none."""
    types, numbers = [], []
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: not readable ({e})") from None
    for i, words in enumerate(map(str.split, lines)):
        try:
            values = [float(word) for word in words[1:15]]
        except ValueError:
            values = []
        if words and (len(values) < 14 or not np.isfinite(values).all()):
            raise BadInput(f"{path}: line {i + 1} is no label (a type and 14 numbers)")
        if words and words[0] != "DontCare":
            types.append(words[0])
            numbers.append(values)
    return np.array(types), np.array(numbers).reshape(-1, 14)


def label_path(frame):
    """Where an object frame's label would lie; None for raw drives."""
    return frame.image.parents[1] / "label_2" / f"{frame.cloud.stem}.txt" if len(frame.calib) == 1 else None


def split_projection(frame):
    """P2 (3, 4), and LiDAR to rectified camera 0 (3, 4), of an object frame; the product of both is data.read_lidar2img."""
    p2 = data._entry(frame.calib[0], data._read_calib(frame.calib[0]), "P2", (3, 4))
    rest = data.read_lidar2img(frame.calib).copy()
    rest[:, 3] -= p2[:, 3]
    return p2, np.linalg.solve(p2[:, :3], rest)


def box_axes(label):
    """(3, 3): columns are a box's length, height and width in the camera's axes."""
    c, s = np.cos(label[13]), np.sin(label[13])
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def box_corners(label):
    """(8, 3) metres, rectified camera 0."""
    return CORNERS * label[[9, 7, 8]] @ box_axes(label).T + label[10:13]


def compare_labels(frame, labels, points, size):
    """-> IoUs of projected and labelled boxes, the labelled boxes' metres to the right of the projected ones, points in 3D boxes: an
    array each. The first two of whole boxes at least 25 px high (of 1242 wide), the last of unoccluded ones within 40 m."""
    p2, velo2cam = split_projection(frame)
    camera, (width, height) = points[:, :3] @ velo2cam[:, :3].T + velo2cam[:, 3], size
    ious, aside, held = [], [], []
    for label in labels:
        corners, (left, top, right, bottom), z = box_corners(label), label[3:7], label[12]
        if label[0] == 0 and corners[:, 2].min() > 1 and bottom - top >= 25 * width / 1242:
            uvw = corners @ p2[:, :3].T + p2[:, 3]
            uv = uvw[:, :2] / uvw[:, 2:]
            low, high = (edge.clip(0, [width - 1, height - 1]) for edge in (uv.min(0), uv.max(0)))
            both = np.prod((np.minimum(high, [right, bottom]) - np.maximum(low, [left, top])).clip(0))
            ious.append(both / (np.prod(high - low) + (right - left) * (bottom - top) - both))
            aside.append((left + right - uv[:, 0].min() - uv[:, 0].max()) / 2 * z / p2[0, 0])
        if label[0] < 0.3 and label[1] == 0 and 0 < z < 40:
            inside = (camera - label[10:13]) @ box_axes(label) / label[[9, 7, 8]]
            held.append((np.abs(inside + [0, 0.5, 0]) <= 0.5).all(1).sum())
    return tuple(np.array(x, float) for x in (ious, aside, held))


# -----------------------------------------------------------------------------
# image edges, depth edges


def depth_jumps(points):
    """Those of points (N, 4) that stand at least half a metre and a tenth in front of a neighbour in the sweep: outlines of things. From
    directions alone, so that no order of the cloud and no calibration matters."""
    r = np.linalg.norm(points[:, :3], axis=1)
    points, r = points[r > 2], r[r > 2]
    # beams lie four times as far apart as firings; the outline wanted is the one along the beam, which is dense
    direction = np.degrees(np.c_[np.arctan2(points[:, 1], points[:, 0]), 4 * np.arcsin(points[:, 2] / r)])
    if len(points) < 7:
        return points
    _, neighbours = cKDTree(direction).query(direction, k=7, distance_upper_bound=0.6)
    return points[np.append(r, 0)[neighbours].max(1) > 1.1 * r + 0.5]


def edge_agreement(image, points, lidar2img):
    """Mean rank (0 to 1) among the image's horizontal gradients of the pixels where depth jumps fall, for every shift of them:
    (len(SHIFT_V), len(SHIFT_U)), NaN where fewer than 50 stay on the image. Ranks, because contrast differs from image to image."""
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
    """(u, v) where the mean of many `edge_agreement` is best, pixels of an image 1242 wide; its excess over the median shift, there and
    unshifted. None if nothing could be compared."""
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
    """Read all of a frame and measure it; a worker's job. job (Frame, whether its label must be there, whether to compare edges)
    -> dict(errors, a list of lines, and of what could be read: size, points, in_range, in_view, reflectance, labels, edges)."""
    frame, labelled, edges = job
    found, lines = {}, [str(e) for e in data.file_errors(frame)]
    named = {line.split(": ")[0] for line in lines}

    def attempt(read, *paths):
        if not named.intersection(map(str, paths)):
            try:
                return read()
            except (BadInput, OSError) as e:
                lines.append(str(e))

    image = attempt(lambda: data.read_image(frame.image), frame.image)
    points = attempt(lambda: data.read_cloud(frame.cloud), frame.cloud)
    lidar2img = attempt(lambda: data.read_lidar2img(frame.calib), *frame.calib)
    if lidar2img is not None and not (np.isfinite(lidar2img).all() and np.linalg.matrix_rank(lidar2img[:, :3]) == 3):
        lines.append(f"{frame.calib[0]}: its matrices do not make a projection (not finite, or singular)")
        lidar2img = None
    label = label_path(frame)
    if labelled and image is not None and not label.is_file():
        lines.append(f"{label}: missing (of frame {frame.name}; others in the folder have labels)")
    labels = attempt(lambda: read_labels(label)[1]) if labelled and label.is_file() else None
    if image is not None:
        found["size"] = image.shape[1::-1]
    if points is not None:
        found["points"], found["reflectance"] = len(points), (float(points[:, 3].min()), float(points[:, 3].max()))
        if found["reflectance"][0] < 0 or found["reflectance"][1] > 1:
            lines.append(f"{frame.cloud}: reflectance {found['reflectance'][0]:g} to {found['reflectance'][1]:g}, not within [0, 1]")
    if image is not None and points is not None and lidar2img is not None:
        low, high = np.float32(data.POINT_RANGE[:3]), np.float32(data.POINT_RANGE[3:])
        near = points[((points[:, :3] >= low) & (points[:, :3] <= high)).all(1)]
        uv, depth = data.project(near.astype(np.float64), lidar2img)
        found["in_range"], found["in_view"] = len(near), int(data.inside_image(uv, depth, *found["size"]).sum())
        if found["in_view"] < data.MIN_POINTS:  # as data.load_frame says it
            lines.append(f"{frame.cloud}: {found['in_view']} points in the camera's view, fewer than {data.MIN_POINTS}; wrong calibration ({frame.calib[0]})?")
        if edges:
            found["edges"] = edge_agreement(image, near, lidar2img)
        if labels is not None:
            found["labels"] = compare_labels(frame, labels, points.astype(np.float64), found["size"])
    return found | {"errors": lines}


def examine_all(jobs, workers, title):
    """What `examine` finds, in order, with a bar on stderr."""
    bar = partial(tqdm, total=len(jobs), desc=title, unit="frame", dynamic_ncols=True)
    if workers < 2 or len(jobs) < 2:
        return list(bar(map(examine, jobs)))
    # fork, where there is such a thing: it starts at once, and does not import torch again
    pool = ProcessPoolExecutor(min(workers, len(jobs)), get_context("fork" if hasattr(os, "fork") else None))
    try:
        return list(bar(pool.map(examine, jobs, chunksize=4)))
    finally:
        pool.shutdown(cancel_futures=True)


# -----------------------------------------------------------------------------
# one root


class Findings:
    """What is broken, and what is only worth knowing: a line each, no file twice."""

    def __init__(self):
        self.broken, self.notes = {}, {}

    def add(self, kind, line):
        kind.setdefault(line.split(": ")[0] if ": " in line else line, line)


def list_splits(root, splits, frame_stride, findings):
    """{split: frames} of an object layout; {"drives": frames} of raw drives. Without `splits`, whatever ImageSets/ lists that fits what
    lies here. Raises BadInput as data.list_frames does; but lists nobody asked for by name are findings."""
    if not data.is_object_layout(root):
        return {"drives": data.list_frames(root, frame_stride=frame_stride, skip_missing=True)}
    if splits:
        return {split: data.list_frames(root, [split]) for split in dict.fromkeys(splits)}
    out = {}
    usual = ("train", "val", "trainval", "test")
    listed = sorted((p.stem for p in (root / "ImageSets").glob("*.txt")), key=lambda s: (usual.index(s) if s in usual else 9, s))
    whole = [s for s, folder in (("trainval", "training"), ("test", "testing")) if (root / folder).is_dir() and s not in listed]
    if any(split != "test" for split in listed):
        whole = [s for s in whole if s == "test"]
    for split in [*listed, *whole]:
        folder = root / ("testing" if split == "test" else "training")
        if not folder.is_dir():
            findings.add(findings.notes, f"{root / 'ImageSets' / split}.txt: left out, there is no {folder.name}/ here")
            continue
        try:
            frames = data.list_frames(root, [split])
        except BadInput as e:
            findings.add(findings.broken, str(e))
            continue
        if split not in usual and not any(f.image.exists() or f.cloud.exists() for f in frames):
            findings.add(findings.notes, f"{root / 'ImageSets' / split}.txt: left out, none of what it lists is in {folder.name}/")
            continue
        out[split] = frames
    return out


def compare_splits(root, splits, findings):
    """Frames that are listed twice, or that training and validation share."""
    names = {split: [f.name for f in frames] for split, frames in splits.items()}
    for split, n in names.items():
        if len(set(n)) < len(n):
            twice = [name for name, times in Counter(n).items() if times > 1]
            findings.add(findings.notes, f"{root}, {split}: {len(n) - len(set(n))} frames listed more than once, {', '.join(twice[:3])}")
    if "train" in names and "val" in names:
        shared = sorted(set(names["train"]) & set(names["val"]))
        if shared:
            findings.add(findings.broken, f"{root}, train and val: {len(shared)} frames are in both, {', '.join(shared[:3])}")
        train, val = ({f.drive for f in splits[split] if f.drive} for split in ("train", "val"))
        shared = sorted(train & val)
        if shared:
            findings.add(findings.notes, f"{root}, raw drives of train and val: {len(shared)} are in both, {', '.join(shared[:3])}; neighbours look alike")
        elif not train:
            findings.add(findings.notes, f"{root}, raw drives of train and val: not known (the object devkit's mapping/train_{{mapping,rand}}.txt would tell)")


def spread(values, unit=""):
    return " ".join(f"{x:9,.0f}" for x in (min(values), np.median(values), max(values))) + unit if len(values) else f"{'-':>9}"


def counts(items, limit=8):
    """'a 3, b 2' of [(name, n)], the rest summed."""
    rest = f", {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(f"{name} {n}" for name, n in items[:limit]) + rest


def row(name, text):
    print(f"  {name:<24} {text}")


def check_root(root, splits, frame_stride, max_frames, skip_missing, workers, findings):
    """Read, measure and print one root. -> [(Frame, what `examine` found)] of its good frames."""
    split_frames = list_splits(root, splits, frame_stride, findings)
    frames = list({f.name: f for fs in split_frames.values() for f in fs}.values())
    if skip_missing:
        whole = [f for f in frames if f.image.exists() and f.cloud.exists()]
        if len(whole) < len(frames):
            findings.add(findings.notes, f"{root}, --skip-missing: {len(frames) - len(whole)} frames left out that lack image or cloud")
        frames = whole
    if not frames:
        findings.add(findings.broken, f"{root}: no frames in it")
        return []
    compare_splits(root, split_frames, findings)
    listed = len(frames)
    if max_frames and listed > max_frames:
        frames = [frames[i * listed // max_frames] for i in range(max_frames)]
    folders = {}
    for f in frames:
        folders.setdefault(f.calib[0].parent, []).append(f)
    labelled = {folder for folder, fs in folders.items() if len(fs[0].calib) == 1 and any((folder.parent / "label_2").glob("*.txt"))}
    compared = {fs[i * len(fs) // EDGE_FRAMES] if len(fs) > EDGE_FRAMES else fs[i] for fs in folders.values() for i in range(min(len(fs), EDGE_FRAMES))}
    found = examine_all([(f, f.calib[0].parent in labelled, f in compared) for f in frames], workers, f"reading {root}")
    for line in (line for r in found for line in r["errors"]):
        findings.add(findings.broken, line)

    print(f"\n{root}: KITTI {'object' if data.is_object_layout(root) else 'raw'}")
    if not data.is_object_layout(root):
        drives = Counter(f.name.split("/")[0] for f in frames)
        row("drives", f"{len(drives)}: {counts(list(drives.items()), 4)}")
    else:
        row("splits", counts([(split, len(fs)) for split, fs in split_frames.items()]))
    row("frames", f"{listed}, every file read" if len(frames) == listed else f"{listed}, only {len(frames)} of them read (--max-frames)")
    if frame_stride > 1 and not data.is_object_layout(root):
        row("", f"(every {frame_stride}th of each drive: --frame-stride)")
    row("image sizes", counts([(f"{w} x {h}:", n) for (w, h), n in Counter(r["size"] for r in found if "size" in r).most_common()]))
    seen = [r for r in found if "in_view" in r]
    row("", f"{'min':>9} {'median':>9} {'max':>9}")
    row("points per cloud", spread([r["points"] for r in found if "points" in r]))
    row("in range and view", spread([r["in_view"] for r in seen]))
    row("share of the cloud", spread([100 * r["in_view"] / r["points"] for r in seen], " %"))
    reflectance = np.array([r["reflectance"] for r in found if "reflectance" in r])
    if len(reflectance):
        row("reflectance", f"{reflectance[:, 0].min():9.2f} {'':9} {reflectance[:, 1].max():9.2f}")
        if reflectance[:, 1].max() == 0:
            findings.add(findings.notes, f"{root}, reflectance: 0 in every cloud; the fourth channel says nothing")
    of = dict(zip(frames, found))
    for folder, fs in folders.items():
        judge_calibration(folder, [(f, of[f]) for f in fs], findings)
    return [(f, r) for f, r in zip(frames, found) if not r["errors"]]


def judge_calibration(folder, frames, findings):
    """Print what labels and edges say of a folder of calibrations, frames [(Frame, found)], and add what is wrong."""
    name, wrong = folder.parent.name if folder.name == "calib" else folder.name, []
    labels = [(f, r["labels"]) for f, r in frames if "labels" in r]
    if labels:
        ious, aside, held = (np.concatenate([x[i] for _, x in labels]) for i in range(3))
        if len(ious):
            row(f"{name}: labelled boxes", f"{len(ious)} whole ones; median IoU of projected 3D with 2D box {np.median(ious):.3f}, "
                f"{np.median(aside):+.3f} m aside")
        if len(ious) >= MIN_BOXES and np.median(ious) < MIN_IOU:
            wrong.append(f"projected 3D boxes and 2D boxes of labels have a median IoU of {np.median(ious):.2f}, below {MIN_IOU}")
        elif len(ious) >= MIN_BOXES and abs(np.median(aside)) > MAX_ASIDE:
            off = -np.median(aside)
            wrong.append(f"3D boxes project {off:+.3f} m aside of 2D boxes of labels, more than {MAX_ASIDE}: the projection of another camera than P2's?")
        if len(held):
            filled = (held >= 5).mean()
            row(f"{name}: points in boxes", f"{filled:.0%} of {len(held)} unoccluded boxes within 40 m hold 5 or more, median {np.median(held):.0f}")
            if len(held) >= MIN_BOXES and filled < MIN_FILLED:
                wrong.append(f"only {filled:.0%} of unoccluded boxes within 40 m hold 5 points, below {MIN_FILLED:.0%}")
        for f, (iou, _, points) in labels:
            if len(iou) > 1 and np.median(iou) < 0.3 and len(wrong) == 0:
                findings.add(findings.notes, f"{f.calib[0]}: labelled boxes of this frame do not fit, median IoU {np.median(iou):.2f}; look at it")
            elif len(points) > 2 and (points < 5).mean() > 0.5 and len(wrong) == 0:
                findings.add(findings.notes, f"{f.calib[0]}: {(points < 5).sum()} of {len(points)} boxes of this frame hold fewer than 5 points; look at it")
    agreements = [r["edges"] for _, r in frames if "edges" in r]
    best = best_shift(agreements)
    if best:
        u, v, there, here = best
        few = f"; {MIN_FRAMES} are needed to judge" if len(agreements) < MIN_FRAMES else ""
        where = f"image and depth agree best {u:+d} px right, {v:+d} px down of the calibration"
        row(f"{name}: edges", f"{where}; here {here:+.3f}, there {there:+.3f} ({len(agreements)} frames{few})")
        if len(agreements) >= MIN_FRAMES and np.hypot(u, v) > MAX_SHIFT and here < 0.8 * there:
            wrong.append(f"depth edges fit image edges better ({there:+.3f} over the median, here {here:+.3f}) when shifted by {u:+d}, {v:+d} px of 1242")
    elif agreements:
        wrong.append("in no frame do 50 depth edges fall on the image")
    if wrong:
        findings.add(findings.broken, f"{folder}: wrong calibration? " + "; ".join(wrong))


# -----------------------------------------------------------------------------
# the picture


def draw_overlay(picked, path):
    """One PNG: for each (Frame, what `examine` found), the sweep on its image, coloured by depth, and the labels' 3D boxes. Right when colour
    jumps at the outlines of things and boxes hug theirs."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    rows = sum(r["size"][1] / r["size"][0] for _, r in picked)
    figure = plt.figure(figsize=(13, 11.8 * rows + 0.25 * len(picked) + 0.4), layout="constrained")
    axes = figure.subplots(len(picked), 1, squeeze=False, height_ratios=[r["size"][1] / r["size"][0] for _, r in picked])[:, 0]
    for axis, (frame, r) in zip(axes, picked):
        image, points, lidar2img = data.read_image(frame.image), data.read_cloud(frame.cloud).astype(np.float64), data.read_lidar2img(frame.calib)
        width, height = r["size"]
        uv, depth = data.project(points, lidar2img)
        kept = ((points[:, :3] >= data.POINT_RANGE[:3]) & (points[:, :3] <= data.POINT_RANGE[3:])).all(1) & data.inside_image(uv, depth, width, height)
        axis.imshow(40 + 0.8 * image.mean(2), cmap="gray", vmin=0, vmax=255)  # grey, so that all colour is depth
        nearest_last = np.flatnonzero(kept)[depth[kept].argsort()[::-1]]
        dots = axis.scatter(*uv[nearest_last].T, c=depth[nearest_last], cmap="turbo_r", norm=LogNorm(4, 64), s=4, linewidths=0)
        label, boxes = label_path(frame), 0
        if label and label.is_file():
            p2 = split_projection(frame)[0]
            for box in read_labels(label)[1]:
                uvw = box_corners(box) @ p2[:, :3].T + p2[:, 3]
                if uvw[:, 2].min() > 0.5:
                    lines = (uvw[:, :2] / uvw[:, 2:])[BOX_EDGES]
                    axis.add_collection(LineCollection(lines, colors="black", linewidths=2.6))
                    axis.add_collection(LineCollection(lines, colors="white", linewidths=1.2))
                    boxes += 1
        share = f"{r['in_view']:,} of {r['points']:,} points in range and view ({r['in_view'] / r['points']:.0%})"
        axis.set_title(f"{frame.name}, {width} x {height}: {share}{f', {boxes} labelled boxes' if boxes else ''}", fontsize=11)
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
        axis.axis("off")
    bar = figure.colorbar(dots, ax=list(axes), label="depth of LiDAR points, m", shrink=0.6, pad=0.01, extend="both", ticks=[4, 8, 16, 32, 64], format="%d")
    bar.minorticks_off()
    figure.suptitle("Sweeps on their images: where the colour jumps, the image must have an outline" + ("; white: 3D boxes of the labels" if any(
        label_path(f) and label_path(f).is_file() for f, _ in picked) else ""), fontsize=12)
    with data.writing(path) as temporary:
        figure.savefig(temporary, dpi=100)
    plt.close(figure)


def pick(good, n=4):
    """n of [(Frame, found)], one of each folder and image size first, then spread over the rest."""
    groups = {}
    for f, r in good:
        groups.setdefault((f.calib[0].parent, f.name.split("/")[0], r["size"]), []).append((f, r))
    groups = sorted(groups.values(), key=len, reverse=True)[:n]
    share = [n // len(groups) + (i < n % len(groups)) for i in range(len(groups))] if groups else []
    return [g[(2 * i + 1) * len(g) // (2 * k)] for g, k in zip(groups, (min(k, len(g)) for k, g in zip(share, groups))) for i in range(k)]


# -----------------------------------------------------------------------------
# the command


def check(
    data_root: tuple[Path, ...], splits: tuple[str, ...] = (), frame_stride: int = 1, max_frames: int = 0, skip_missing: bool = False,
    out: Path = Path("check.png"), workers: int = os.cpu_count() or 1
) -> None:
    """Read data sets, name what is missing or broken, say whether calibrations fit, draw sweeps on their images. Exit status 1 if broken.

    Broken: a file that is missing, truncated, unreadable, or holds NaN; fewer than 16 points in view; reflectance outside [0, 1]; a frame in
    both train and val; an empty split; a calibration that labels or image edges speak against (at least 20 boxes, 8 frames).
    Only notes: a single frame whose boxes do not fit, frames listed twice, drives that train and val share, lists that do not apply.

    Args:
        data_root: one root or more, KITTI object or raw.
        splits: of the object layout; by default all that ImageSets/ lists, or the whole of training/ and testing/.
        frame_stride: keep every n-th frame of a raw drive.
        max_frames: read at most so many frames of a root, evenly spread; 0 reads all.
        skip_missing: leave out frames that lack image or cloud, as training with this flag does.
        out: the picture.
        workers: processes; by default one per core.
    """
    for name, value, least in (("--frame-stride", frame_stride, 1), ("--max-frames", max_frames, 0), ("--workers", workers, 0)):
        if value < least:
            raise BadInput(f"{name} {value}: less than {least}")
    if not data_root:
        raise BadInput("--data-root: none given")
    if out.suffix.lower() not in (".png", ".jpg", ".pdf") or not out.absolute().parent.is_dir():
        raise BadInput(f"--out {out}: not a .png, .jpg or .pdf in a folder that exists")
    for root in data_root:
        if not root.is_dir():
            raise BadInput(f"{root}: no such folder")
    findings, good = Findings(), []
    for root in data_root:
        good += check_root(root, splits, frame_stride, max_frames, skip_missing, workers, findings)
    picked = pick(good)
    if picked:
        draw_overlay(picked, out)
    for kind, title in ((findings.notes, "notes"), (findings.broken, "broken")):
        lines = list(kind.values())
        if lines:
            print(f"\n{title}: {len(lines)}")
            for line in lines[:PRINTED]:
                print(f"  {line}")
            if len(lines) > PRINTED:
                print(f"  and {len(lines) - PRINTED} more")
    picture = f"; look at {out}" if picked else ""
    print()
    if findings.broken:
        print(f"BROKEN: {len(findings.broken)} findings{picture}")
        raise SystemExit(1)
    print(f"OK: {len(good)} frames{picture}")
