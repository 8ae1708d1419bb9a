"""Labelled frames for 3D detection, and MoCA: objects pasted from other frames, with their points and their pixels.

MoCA (Zhang et al. 2020, as the official release has it): a bank holds the cars, pedestrians and cyclists of the
training frames that are seen well enough, with the points in the box of each and the pixels in its rectangle. A frame
gets some of them, where they collide with nothing, and all objects are drawn far to near, the frame's own among them.

Loading processes do what needs the points: read, paste, move the cloud by one similarity T, cut it to the range, find
the voxels of every stage. The device augments images, as in pre-training: lidar2img holds T^-1, so that a moved point
keeps its pixel. Frames hold different numbers of points and boxes: points of a batch lie end to end, boxes are padded.
"""

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import data
import data_kitti
import ops_boxes
import ops_sparse
import runtime
from anchors import PROTOCOLS
from files import BadInput, writing

KITTI = PROTOCOLS["kitti"]
CLASSES = KITTI.classes  # the only ones that are pasted
PASTED = {"Car": 12, "Pedestrian": 6, "Cyclist": 6}  # at most in a frame after pasting; in this order (release)
LEAST_POINTS = {"Car": 5, "Pedestrian": 10, "Cyclist": 10}  # of an object that is pasted (release)
OVERLAPS = (0.0, 0.3, 0.5, 0.7)  # the share of a patch that any other object may have too; drawn per class (release)
NEAR = 0.5  # metres before a camera: nearer corners of a box have no pixel to speak of
HARD = (25, 2, 0.5)  # height above, occlusion and truncation at most: KITTI's "hard"; what is harder is not pasted
ROWS = (8, 256)  # of a LiDAR, at least and at most


# -----------------------------------------------------------------------------
# space


class Layout:
    """Where voxels and the cells of the head are, metres in the LiDAR's frame; what a point has and an object may be.

    c: finetune_det3d.Config.

    Raises ValueError where the range is too small for the encoder's strides.
    """

    def __init__(self, c):
        self.range, self.voxel = c.point_range, c.voxel
        self.protocol = PROTOCOLS[c.protocol]
        self.columns = 4 + c.elongation  # numbers of a point
        cells = [round((high - low) / size) for low, high, size in zip(self.range, self.range[3:], self.voxel)]
        self.grid = ops_sparse.Grid((cells[2] + 1, cells[1], cells[0]))  # one more above, as in the release
        half = functools.partial(ops_sparse.Window, (3, 3, 3), (2, 2, 2))
        flat = ops_sparse.Window((3, 1, 1), (2, 1, 1), (0, 0, 0))
        self.windows = [half((1, 1, 1)), half((1, 1, 1)), half((0, 1, 1)), flat]
        self.grids = [self.grid]  # of every stage
        for window in self.windows:
            self.grids.append(self.grids[-1].after(window))
        self.stride = 8 / c.upsample[0]  # of the head's cells, in voxels
        self.cells = cells[0] // 8 * c.upsample[0], cells[1] // 8 * c.upsample[0]  # along x, y


# -----------------------------------------------------------------------------
# frames with their labels


@dataclass
class Scene:
    """A frame and its objects. Boxes are those of ops_boxes, in the LiDAR frame; rects left, top, right, bottom,
    pixels.
    """

    image: np.ndarray  # (H, W, 3) uint8
    points: np.ndarray  # (N, 4) float32, or (N, 5) with elongation; of KITTI, those in the camera's view
    lidar2img: np.ndarray  # (3, 4) float64
    boxes: np.ndarray  # (n, 7) float64
    classes: np.ndarray  # (n,) index into names, -1 for everything else: Van, Truck, ...
    rects: np.ndarray  # (n, 4) float64
    names: tuple = CLASSES


def read_scene(frame, keep_rows=1, protocol=KITTI, columns=4, labelled=True):
    """A frame -> Scene, with its objects if it is to be `labelled`; nobody has those of testing/.

    keep_rows: only every n-th row of the LiDAR. columns: numbers of a point.
    Raises BadInput, which names the file.
    """
    image, points, lidar2img = frame.read_image(), frame.read_points(columns), frame.lidar2img()
    if keep_rows > 1:  # before the sweep is cut: its order tells the rows
        rows = lidar_rows(points)
        if not ROWS[0] <= rows[0] + 1 <= ROWS[1]:
            raise BadInput(f"{frame.cloud}: does not lie row by row, as KITTI's sweeps do; leave out --keep-rows")
        points = points[rows % keep_rows == 0]
    if protocol.in_view:
        uv, depth = data.project(points.astype(np.float64), lidar2img)
        points = points[data.inside_image(uv, depth, image.shape[1], image.shape[0])]
    types, numbers, boxes = np.zeros(0, "U1"), np.zeros((0, 14)), np.zeros((0, 7))
    if labelled and not frame.name.startswith("testing/"):
        types, numbers = data_kitti.read_labels(frame.label)
        _, velo2cam = data_kitti.split_projection(frame)
        boxes = ops_boxes.label_to_box(numbers[:, 7:14], velo2cam)
    names = protocol.classes
    classes = np.array([names.index(t) if t in names else -1 for t in types], np.int64)
    return Scene(image, points, lidar2img, boxes, classes, numbers[:, 3:7], names)


def lidar_rows(points):
    """Which of the sensor's rows each of points (N, 3+) is from: (N,) int64, the lowest is 0.

    By their order, as KITTI's files have it: rows from the highest to the lowest, each from right to left. A whole
    sweep begins each row straight ahead; a cut one, as the built-in scenes are, may begin it at its right border.
    Angles alone do not tell rows apart: a sensor's lasers are mounted some centimetres from each other.
    """
    bearing = np.arctan2(points[:, 1], points[:, 0])
    elevation = np.arctan2(points[:, 2], np.hypot(points[:, 0], points[:, 1]))
    ahead = (bearing[:-1] < 0) & (bearing[1:] >= 0)
    border = np.diff(bearing) < -0.5  # radians: from left to right, or past what lies straight behind
    falls = np.diff(elevation) < -0.001  # to the next row; within a row this is as rare as a rise
    share = lambda at: falls[at].mean() if at.any() else 0.0
    begins = ahead if share(ahead) > share(border) else border
    return np.append(begins[::-1].cumsum()[::-1], 0)


def find_frames(roots, splits, skip_missing=False):
    """Frames that have labels, as `pool_frames` finds them."""
    return pool_frames(roots, splits, skip_missing)[0]


def pool_frames(roots, splits, skip_missing=False, flag="--splits", limit=0):
    """Frames of several roots that have labels -> frames, notes to print. flag: what the splits were given with.
    limit: at most so many, evenly spread; 0 for all.

    Raises BadInput as data_kitti.pool_frames does, and for a root of another layout, a frame without its label, and a
    line in one that is none: before a run begins, not in its middle.
    """
    check_layout(roots)
    frames, notes = data_kitti.pool_frames(roots, splits, skip_missing=skip_missing, flag=flag, limit=limit)
    for f in frames:
        if not f.label.is_file():
            raise BadInput(f"{f.label}: missing; it holds the boxes of frame {f.name}")
        data_kitti.read_labels(f.label)
    return frames, notes


def check_layout(roots):
    """Raises BadInput for a root that is not in KITTI's object layout."""
    for root in roots:
        if Path(root).is_dir() and not data_kitti.is_object_layout(root):
            raise BadInput(f"{root}: no training/ in it; labels are in KITTI's object layout alone")


def inventory(frames, clouds=True):
    """data.inventory with the bytes of the labels: what a run was trained on."""
    return [f"{line} {f.label.stat().st_size}" for line, f in zip(data.inventory(frames, clouds), frames)]


def projected_rect(boxes, lidar2img):
    """The rectangles that hold the corners of boxes (n, 7) in an image -> (n, 4) left, top, right, bottom, pixels.

    Not cut to the image. Corners behind the camera count as if they were a centimetre before it.
    """
    corners = ops_boxes.corners(boxes)  # (n, 8, 3)
    uvw = corners @ lidar2img[:, :3].T + lidar2img[:, 3]
    uv = uvw[..., :2] / np.maximum(uvw[..., 2:], 0.01)
    return np.concatenate([uv.min(-2), uv.max(-2)], -1)


# -----------------------------------------------------------------------------
# the bank: all objects of the training frames, in one file

ENTRY = np.dtype(
    [
        ("type", "i4"),  # index into CLASSES
        ("frame", "i4"),
        ("count", "i4"),  # of its points
        ("rect", "i4", 4),  # whole pixels of its source image: left, top, right, bottom, the last two not included
        ("at", "i8"),  # where its points begin in the file; the patch follows them
        ("box", "f8", 7),
        ("lidar2img", "f8", (3, 4)),  # of its source
    ]
)


def is_hard_or_easier(numbers):
    """Which labels, numbers (n, 14) as data_kitti.read_labels has them, KITTI's "hard" includes: (n,) bool."""
    height = numbers[:, 6] - numbers[:, 4]
    return (height > HARD[0]) & (numbers[:, 1] <= HARD[1]) & (numbers[:, 0] <= HARD[2])


def objects_of(frame, number, keep_rows):
    """The objects of a frame that may be pasted -> [(ENTRY without `at`, points (n, 4) float32, patch (h, w, 3)
    uint8)].
    """
    scene = read_scene(frame, keep_rows)
    _, numbers = data_kitti.read_labels(frame.label)  # in the order of the scene's boxes
    height, width = scene.image.shape[:2]
    inside = ops_boxes.points_in_boxes(scene.points.astype(np.float64), scene.boxes)  # (N, n)
    found = []
    for i in np.flatnonzero((scene.classes >= 0) & is_hard_or_easier(numbers)):
        points = scene.points[inside[:, i]]
        low = np.floor(scene.rects[i, :2]).clip(0, [width, height])
        high = np.ceil(scene.rects[i, 2:] + 1).clip(0, [width, height])  # KITTI's rectangles include their last pixel
        left, top, right, bottom = rect = np.concatenate([low, high]).astype(int)
        if len(points) < LEAST_POINTS[CLASSES[scene.classes[i]]] or right - left < 2 or bottom - top < 2:
            continue
        entry = (scene.classes[i], number, len(points), rect, 0, scene.boxes[i], scene.lidar2img)
        found.append((np.array(entry, ENTRY), points, scene.image[top:bottom, left:right]))
    return found


def write_bank(frames, path, keep_rows=1):
    """One file: points and patches of all objects end to end, then their table, then how many there are (int64).

    The same frames give the same bytes. Raises BadInput, as read_scene does.
    """
    entries, end = [], 0
    found = runtime.ahead(lambda job: objects_of(job[1], job[0], keep_rows), enumerate(frames), os.cpu_count())
    bar = tqdm(found, "objects", len(frames), dynamic_ncols=True, mininterval=1, disable=len(frames) < 100)
    with writing(path) as temporary, open(temporary, "wb") as f:
        for objects in bar:
            for entry, points, patch in objects:
                entry["at"] = end
                end += f.write(points.tobytes()) + f.write(np.ascontiguousarray(patch).tobytes())
                entries.append(entry)
        f.write(np.array(entries, ENTRY).tobytes())
        f.write(np.int64(len(entries)).tobytes())


class Bank:
    """The objects in a file of write_bank, mapped into memory: all loading processes share its pages.

    Raises BadInput for a file that is missing, cut off, or of another program.
    """

    def __init__(self, path):
        self.path = path
        if not path.is_file():
            raise BadInput(f"{path}: missing; is --out on a disk that all nodes share?")
        size = path.stat().st_size
        if size < 8:
            raise BadInput(f"{path}: not a whole file of objects")
        self.bytes = np.memmap(path, np.uint8, "r")
        count = int(self.bytes[-8:].view(np.int64)[0])
        start = size - 8 - count * ENTRY.itemsize  # of the table
        if count < 0 or start < 0:
            raise BadInput(f"{path}: not a whole file of objects")
        self.entries = np.frombuffer(self.bytes[start : size - 8].tobytes(), ENTRY)
        left, top, right, bottom = self.entries["rect"].astype(np.int64).T
        self.ends = self.entries["at"] + 16 * self.entries["count"] + 3 * (bottom - top) * (right - left)
        if start != self.ends.max(initial=0):
            raise BadInput(f"{path}: not a whole file of objects")
        self.of_class = [np.flatnonzero(self.entries["type"] == k) for k in range(len(CLASSES))]

    def __reduce__(self):
        """Processes that are not forked open the file, too, instead of copying it."""
        return Bank, (self.path,)

    def read(self, i):
        """-> points (n, 4) float32 in its source's LiDAR frame, patch (h, w, 3) uint8."""
        entry = self.entries[i]
        left, top, right, bottom = entry["rect"]
        at, middle = int(entry["at"]), int(entry["at"]) + 16 * int(entry["count"])
        points = np.frombuffer(self.bytes[at:middle].tobytes(), np.float32).reshape(-1, 4)
        patch = self.bytes[middle : int(self.ends[i])]
        return points, np.array(patch).reshape(bottom - top, right - left, 3)


def open_bank(frames, folder, keep_rows, run):
    """The bank of these frames, kept in `folder`. Rank 0 writes it where it is not there yet, or is not whole.

    A broken frame, a BadInput, leaves no folder that was not there.
    """
    path = Path(folder) / f"objects_{data.fingerprint([*inventory(frames), str(keep_rows)])}.bin"
    if run.main and not _is_whole(path):
        new = [place for place in path.parents if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write_bank(frames, path, keep_rows)
        except BadInput:
            for place in new:
                place.rmdir()
            raise
    run.any(False)  # a barrier: the others wait for the file
    return Bank(path)


def _is_whole(path):
    try:
        Bank(path)
    except BadInput:
        return False
    return True


# -----------------------------------------------------------------------------
# pasting


def paste(scene, bank, rng, limits=PASTED):
    """Objects of the bank into a scene, up to `limits` of each class -> a new Scene.

    An object keeps its place in the LiDAR's frame. Its patch goes where the box projects to with the scene's own
    calibration: moved and scaled by the map between the projected rectangles of both. It is left out where its box
    meets any other, where its patch has more than a drawn share of its area in common with another object's rectangle,
    and where the patch is not in the image whole. The frame's points in its box give way to its own.
    """
    height, width = scene.image.shape[:2]
    boxes, classes, rects = list(scene.boxes), list(scene.classes), list(scene.rects)
    chosen = []  # of the bank
    for name, limit in limits.items():
        k = CLASSES.index(name)
        missing = limit - int((scene.classes == k).sum())
        share = OVERLAPS[rng.integers(len(OVERLAPS))]
        candidates = rng.permutation(bank.of_class[k])[: max(missing, 0)]
        for i in candidates:
            box = bank.entries["box"][i]
            rect = target_rect(bank.entries[i], scene.lidar2img)
            if rect is None or outside(rect, width, height) or collides(box, boxes) or shares(rect, rects, share):
                continue
            boxes.append(box)
            classes.append(k)
            rects.append(rect)
            chosen.append(i)
    if not chosen:
        return scene
    pasted = [bank.read(i) for i in chosen]
    image = draw_far_to_near(scene, np.array(rects), np.array(boxes), [patch for _, patch in pasted])
    own = scene.points
    replaced = ops_boxes.points_in_boxes(own.astype(np.float64), np.array(boxes[len(scene.boxes) :])).any(1)
    points = np.concatenate([own[~replaced], *(points for points, _ in pasted)])
    return Scene(image, points, scene.lidar2img, np.array(boxes), np.array(classes), np.array(rects))


def target_rect(entry, lidar2img):
    """Where an object's patch belongs in an image with this calibration: (4,) pixels, the last two not included.

    None for a box that reaches behind one of the cameras, and has no rectangle there.
    """
    rect = entry["rect"].astype(float)
    if np.allclose(entry["lidar2img"], lidar2img):
        return rect
    corners = ops_boxes.corners(entry["box"])
    if min(data.project(corners, matrix)[1].min() for matrix in (entry["lidar2img"], lidar2img)) < NEAR:
        return None
    old = projected_rect(entry["box"][None], entry["lidar2img"])[0]
    new = projected_rect(entry["box"][None], lidar2img)[0]
    scale = (new[2:] - new[:2]) / (old[2:] - old[:2])
    rect = np.rint(np.concatenate([new[:2] + (corner - old[:2]) * scale for corner in (rect[:2], rect[2:])]))
    return rect if (rect[2:] - rect[:2] >= 2).all() else None


def outside(rect, width, height):
    """Whether a rectangle does not lie in the image whole: a cut patch would show less than its points say."""
    return rect[0] < 0 or rect[1] < 0 or rect[2] > width or rect[3] > height


def collides(box, boxes):
    """Whether a box meets any of the others, seen from above."""
    if not boxes:
        return False
    return bool((ops_boxes.bev_intersection(box[None], np.array(boxes)) > 1e-6).any())


def shares(rect, rects, share):
    """Whether a patch has more than this share of its own area in common with any of the other rectangles."""
    if not rects:
        return False
    others = np.array(rects)
    sides = np.minimum(rect[2:], others[:, 2:]) - np.maximum(rect[:2], others[:, :2])
    common = sides.clip(0).prod(1)
    return bool((common / (rect[2:] - rect[:2]).prod() > share).any())


def draw_far_to_near(scene, rects, boxes, patches):
    """The image with all objects, the scene's own first in `rects`, drawn in the order of their distance."""
    image, height, width = scene.image.copy(), *scene.image.shape[:2]
    own = len(rects) - len(patches)
    distance = np.linalg.norm(boxes[:, :2], axis=1)
    for i in np.argsort(-distance, kind="stable"):
        left, top, right, bottom = (int(v) for v in np.rint(rects[i]))
        if i < own:  # puts back its own pixels
            left, top, right, bottom = max(left, 0), max(top, 0), min(right + 1, width), min(bottom + 1, height)
            image[top:bottom, left:right] = scene.image[top:bottom, left:right]
            continue
        patch = patches[i - own]
        if patch.shape[:2] != (bottom - top, right - left):
            patch = np.asarray(Image.fromarray(patch).resize((right - left, bottom - top), Image.Resampling.BILINEAR))
        image[top:bottom, left:right] = patch
    return image


# -----------------------------------------------------------------------------
# the data set


class DetectionFrames(torch.utils.data.Dataset):
    """Frames with all their randomness, by (epoch, index). `c` is finetune_det3d.Config. A broken frame is a BadInput.

    training False: nothing is pasted, moved or flipped.
    """

    def __init__(self, frames, c, layout, bank=None, training=True):
        self.frames, self.c, self.layout, self.bank, self.training = frames, c, layout, bank, training

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key
        c = self.c
        rng = np.random.default_rng([data.SAMPLE, c.seed, epoch, index])
        try:
            scene = read_scene(self.frames[index], c.keep_rows, self.layout.protocol, self.layout.columns)
        except BadInput as e:
            return e
        flip, T = False, np.eye(4)
        if self.training:
            if self.bank is not None:
                scene = paste(scene, self.bank, rng)
            flip = bool(rng.random() < c.flip)
            T = data.random_view(rng, np.zeros(3), c.rotation, c.scale, (c.translation,) * 3, flip)
        sample = move(scene, T, self.layout)
        count = len(sample["points"])
        if count < data.MIN_POINTS:
            frame, seen = self.frames[index], " in the camera's view" if self.layout.protocol.in_view else ""
            there = f"{count} of its {len(scene.points)} points{seen} lie within --point-range"
            why = f"fewer than {data.MIN_POINTS}; wrong range, or wrong calibration ({frame.calib[0]})?"
            return BadInput(f"{frame.cloud}: {there}, {why}")
        if c.max_points and count > c.max_points:
            chosen = np.sort(rng.choice(count, c.max_points, replace=False))
            sample["points"] = sample["points"][chosen]
        return sample | voxels(sample["points"], self.layout) | {"flip": flip, "window": data.WHOLE, "index": index}


def move(scene, T, layout):
    """A scene seen through the similarity T (4, 4): points and boxes moved, and cut to the range; lidar2img holds T^-1.

    -> dict(image, lidar2img (3, 4) float64, points (n, columns) float32, boxes (m, 7) float32, classes (m,) int64).
    """
    xyz = scene.points[:, :3] @ T[:3, :3].T + T[:3, 3]
    low, high = np.array(layout.range[:3]), np.array(layout.range[3:])
    inside = ((xyz >= low) & (xyz < high)).all(1)
    points = np.concatenate([xyz, scene.points[:, 3:]], 1)[inside].astype(np.float32)
    known = scene.classes >= 0
    boxes = ops_boxes.transform_boxes(scene.boxes[known], T)
    kept = ((boxes[:, :2] >= low[:2]) & (boxes[:, :2] < high[:2])).all(1)
    return {
        "image": scene.image,
        "lidar2img": scene.lidar2img @ np.linalg.inv(T),
        "points": points,
        "boxes": boxes[kept].astype(np.float32),
        "classes": scene.classes[known][kept],
    }


def voxels(points, layout):
    """-> dict(rows (n,): the voxel of each point; keys: sorted keys of the voxels of every stage)."""
    xyz, frame = torch.from_numpy(points[:, :3]), torch.zeros(len(points), dtype=torch.int64)
    keys, rows = ops_sparse.voxelize(xyz, frame, layout.range[:3], layout.voxel, layout.grid)
    return {"rows": rows, "keys": ops_sparse.pyramid_keys(keys, layout.grid, layout.windows)}


def collate(layout, samples):
    """Samples to one batch. -> as data.collate, and

    points (N, columns), all frames' end to end; frame (N,), which each is of; slot (N,): its place among B x L, L the
    most points of a frame, `longest`; rows (N,), its voxel; keys: of every stage; boxes (B, M, 7), classes (B, M), -1
    where there is no box.
    """
    for s in samples:
        if isinstance(s, BadInput):
            return s
    fixed = ("image", "lidar2img", "flip", "window", "index")
    batch = data.collate([{k: s[k] for k in fixed} for s in samples])
    counts = [len(s["points"]) for s in samples]
    longest = max(counts)
    most = max(1, *(len(s["boxes"]) for s in samples))
    boxes, classes = torch.zeros(len(samples), most, 7), torch.full((len(samples), most), -1)
    rows, slots, before = [], [], 0
    for b, s in enumerate(samples):
        boxes[b, : len(s["boxes"])] = torch.from_numpy(s["boxes"])
        classes[b, : len(s["boxes"])] = torch.from_numpy(s["classes"])
        rows.append(s["rows"] + before)
        slots.append(torch.arange(counts[b]) + b * longest)
        before += len(s["keys"][0])
    return batch | {
        "points": torch.from_numpy(np.concatenate([s["points"] for s in samples])),
        "frame": torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(counts)),
        "slot": torch.cat(slots),
        "longest": longest,
        "rows": torch.cat(rows),
        "keys": [ops_sparse.batch_keys([s["keys"][i] for s in samples], grid) for i, grid in enumerate(layout.grids)],
        "boxes": boxes,
        "classes": classes,
    }


# -----------------------------------------------------------------------------
# on the device


def augment(batch, box, layout, device):
    """A collated batch to what the model reads, on `device`, images resized into `box` (width, height).

    -> dict: image (B, 3, H, W) float32 normalised; lidar2img (B, 3, 4), points to pixels of `image`; levels: the tables
    of the sparse encoder; and points, frame, slot, rows, boxes, classes, longest, index of `collate`.
    """
    A, resized = data.image_affine(batch["size"], box, batch["flip"], batch["window"])
    out_size = [-(-int(edge) // data.SIZE_DIVISOR) * data.SIZE_DIVISOR for edge in resized.amax(0)]
    there = {k: batch[k].to(device, non_blocking=True) for k in ("points", "frame", "slot", "rows", "boxes", "classes")}
    keys = [k.to(device, non_blocking=True) for k in batch["keys"]]
    no_colour = torch.eye(3, 4, dtype=torch.float64).expand(len(A), 3, 4)
    image = data.warp_images(batch["image"].to(device, non_blocking=True), batch["size"], A, no_colour, out_size)
    return there | {
        "image": image,
        "lidar2img": (A @ batch["lidar2img"]).float().to(device, non_blocking=True),
        "levels": ops_sparse.pyramid(keys, layout.grid, layout.windows),
        "longest": batch["longest"],
        "index": batch["index"],
    }
