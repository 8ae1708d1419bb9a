"""Labelled images for monocular 3D detection: a camera, what it sees, and where that is in the camera's own axes.

A camera's axes are x right, y down, z ahead, metres. A box in them is 7 numbers, (..., 7):

    x, y, z                 its centre; z is its depth
    length, height, width   metres, in mmdetection3d's order
    ry                      of the heading, radians, 0 along +x and growing from there to -z, as KITTI's

`to_camera` and `from_camera` take boxes of ops_boxes there and back. Labels are KITTI's, of three classes, or
nuScenes', of ten, with velocities and attributes. Sweeps are not read.

Loading processes read; the device augments, as in pre-training. A mirrored image is one of a mirrored world: boxes,
headings, velocities and the camera's matrix change with it, and everything keeps its pixel.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

import data
import data_det3d
import data_kitti
import data_nuscenes
import data_sets
import ops_boxes
from files import BadInput

KITTI_CLASSES = {"Car": "car", "Pedestrian": "pedestrian", "Cyclist": "bicycle"}  # KITTI's names, nuScenes' names
CLASSES = {"kitti": tuple(KITTI_CLASSES.values()), "nuscenes": data_nuscenes.CLASSES}  # by dataset, channel by channel
NO_ATTRIBUTE = len(data_nuscenes.ATTRIBUTES)  # the channel for objects without one
BEHIND = 0.01  # metres before the camera: nearer corners of a box have no pixel
LEVEL = ((0.0, -1, 0, 0), (0, 0, -1, 0), (1, 0, 0, 0))  # x ahead, y left, z up to the camera's axes


# -----------------------------------------------------------------------------
# geometry, numpy and torch alike


def to_camera(boxes, lidar2cam):
    """Boxes of ops_boxes (..., 7) in a camera's axes, (..., 7). lidar2cam (..., 3, 4)."""
    xp = torch if torch.is_tensor(boxes) else np
    labels = ops_boxes.box_to_label(boxes, lidar2cam)
    h, w, length, x, bottom, z, ry = (labels[..., i] for i in range(7))
    return xp.stack([x, bottom - h / 2, z, length, h, w, ry], -1)


def from_camera(boxes, lidar2cam):
    """The inverse of `to_camera`. It inverts a matrix, for which a GPU is waited for."""
    xp = torch if torch.is_tensor(boxes) else np
    x, y, z, length, h, w, ry = (boxes[..., i] for i in range(7))
    return ops_boxes.label_to_box(xp.stack([h, w, length, x, y + h / 2, z, ry], -1), lidar2cam)


def velocity_to_camera(velocity, lidar2cam):
    """Level velocities (n, 2) of the LiDAR's frame along the camera's x and z, (n, 2), metres a second."""
    return velocity @ lidar2cam[::2, :2].T


def velocity_from_camera(velocity, lidar2cam):
    """The inverse of `velocity_to_camera`."""
    return velocity @ np.linalg.inv(lidar2cam[::2, :2]).T


def mirror(boxes, velocity):
    """Boxes (..., 7) and velocities (..., 2) of the camera's axes in a world whose x points the other way."""
    ry = torch.remainder(2 * math.pi - boxes[..., 6], 2 * math.pi) - math.pi
    boxes = torch.cat([-boxes[..., :1], boxes[..., 1:6], ry[..., None]], -1)
    return boxes, velocity * velocity.new_tensor([-1.0, 1.0])


# -----------------------------------------------------------------------------
# frames


def pool_frames(c, roots, splits, flag="--splits", frame_stride=1):
    """Labelled frames of the data set of c, finetune_mono3d.Config -> frames, notes to print.

    frame_stride: of nuScenes, keep every n-th sample. Raises BadInput.
    """
    if c.dataset == "kitti":
        data_sets.refuse_waymo(roots)
        return data_det3d.pool_frames(roots, splits, c.skip_missing, flag)
    rules = c.cameras, c.version, frame_stride, c.skip_missing, flag
    frames, notes = data_nuscenes.pool_frames(roots, splits, *rules, clouds=False)
    for tables in frames.sources:
        _ = tables.labels  # read now, before processes are forked
    return frames, notes


def token_of(frame):
    """The name of the sample that a frame is of: nuScenes' token, or the name of a frame of KITTI's."""
    return frame.token if isinstance(frame, data_nuscenes.Frame) else frame.name


def samples_of(frames):
    """{token: indices of its frames}, in their order."""
    samples = {}
    for i, frame in enumerate(frames):
        samples.setdefault(token_of(frame), []).append(i)
    return samples


def few_samples(frames, limit):
    """The frames of at most so many samples, evenly spread; of all for 0."""
    if not limit:
        return frames
    samples = list(samples_of(frames).values())
    return data.take(frames, [i for own in data.evenly_spread(samples, limit) for i in own])


def inventory(frames):
    """One line a frame: its name, the bytes of its image and, for KITTI, of its label."""
    if len(frames) and isinstance(frames[0], data_nuscenes.Frame):
        return data.inventory(frames, clouds=False)
    return data_det3d.inventory(frames, clouds=False)


# -----------------------------------------------------------------------------
# one frame


@dataclass
class View:
    """A camera's image and its labelled objects: those of which it sees something, and whose centre is before it."""

    image: np.ndarray  # (H, W, 3) uint8
    intrinsic: np.ndarray  # (3, 3), camera's axes to pixels
    lidar2cam: np.ndarray  # (3, 4)
    boxes: np.ndarray  # (n, 7), camera's axes
    velocity: np.ndarray  # (n, 2), along the camera's x and z; NaN where not known
    kinds: np.ndarray  # (n,) of CLASSES
    attributes: np.ndarray  # (n,) of data_nuscenes.ATTRIBUTES, then NO_ATTRIBUTE
    rects: np.ndarray  # (n, 4) left, top, right, bottom of what of the box is in the image, pixels


def camera_of(frame):
    """The camera's axes to pixels, (3, 3), and LiDAR metres to its axes, (3, 4)."""
    if isinstance(frame, data_nuscenes.Frame):
        return frame.intrinsic(), frame.lidar2cam()
    p2, _ = data_kitti.split_projection(frame)
    return p2[:, :3], np.linalg.solve(p2[:, :3], frame.lidar2img())


def labels_of(frame):
    """All labelled objects of CLASSES -> boxes (n, 7) of ops_boxes in the frame's LiDAR axes, velocity (n, 2) there,
    kinds (n,), attributes (n,).
    """
    if isinstance(frame, data_nuscenes.Frame):
        labels = frame.labels()
        attributes = np.where(labels.attribute < 0, NO_ATTRIBUTE, labels.attribute)
        return labels.boxes, labels.velocity, labels.kind.astype(np.int64), attributes.astype(np.int64)
    types, numbers = data_kitti.read_labels(frame.label)
    names = list(KITTI_CLASSES)
    kinds = np.array([names.index(t) if t in names else -1 for t in types], np.int64)
    _, velo2cam = data_kitti.split_projection(frame)
    boxes = ops_boxes.label_to_box(numbers[:, 7:14], velo2cam)[kinds >= 0]
    kinds = kinds[kinds >= 0]
    return boxes, np.full((len(kinds), 2), np.nan), kinds, np.full(len(kinds), NO_ATTRIBUTE)


def read_view(frame):
    """A labelled frame -> View. Raises BadInput, which names the file."""
    image = frame.read_image()
    intrinsic, lidar2cam = camera_of(frame)
    boxes, velocity, kinds, attributes = labels_of(frame)
    rects = rects_of(boxes, intrinsic @ lidar2cam, image.shape[1], image.shape[0])
    depth = boxes[:, :3] @ lidar2cam[2, :3] + lidar2cam[2, 3]
    seen = (depth > BEHIND) & (rects[:, 2:] - rects[:, :2] >= 1).all(1)
    own = to_camera(boxes[seen], lidar2cam), velocity_to_camera(velocity[seen], lidar2cam)
    return View(image, intrinsic, lidar2cam, *own, kinds[seen], attributes[seen], rects[seen])


def rects_of(boxes, lidar2img, width, height):
    """The rectangles, cut to the image, that hold those corners of boxes (n, 7) of ops_boxes which lie before the
    camera -> (n, 4) left, top, right, bottom, pixels; without any area where there are none.
    """
    uv, depth = data.project(ops_boxes.corners(boxes), lidar2img)  # (n, 8, 2), (n, 8)
    before = (depth > BEHIND)[..., None]
    low, high = np.where(before, uv, np.inf).min(1), np.where(before, uv, -np.inf).max(1)
    return np.concatenate([low, high], 1).clip(0, [width - 1, height - 1, width - 1, height - 1])


# -----------------------------------------------------------------------------
# the data set

RAGGED = {"boxes": (7,), "velocity": (2,), "kinds": (), "attributes": (), "rects": (4,)}  # an object's, by name


class MonoFrames(torch.utils.data.Dataset):
    """Frames with their randomness, a coin for mirroring, by (epoch, index). A broken frame is a BadInput.

    `c` is finetune_mono3d.Config. training False: nothing is mirrored.
    """

    def __init__(self, frames, c, training=True):
        self.frames, self.c, self.training = frames, c, training

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([data.SAMPLE, self.c.seed, epoch, index])
        try:
            view = read_view(self.frames[index])
        except BadInput as e:
            return e
        flip = bool(self.training and rng.random() < self.c.flip)
        return vars(view) | {"flip": flip, "window": data.WHOLE, "index": index}


def collate(samples):
    """Samples to one batch, or the first BadInput among them. -> as data.collate, and boxes (B, M, 7), velocity (B, M,
    2), rects (B, M, 4) float64, kinds (B, M), -1 where there is no object, attributes (B, M).
    """
    for s in samples:
        if isinstance(s, BadInput):
            return s
    batch = data.collate([{k: v for k, v in s.items() if k not in RAGGED} for s in samples])
    most = max(1, *(len(s["kinds"]) for s in samples))
    for name, shape in RAGGED.items():
        kind = torch.float64 if shape else torch.int64
        rows = torch.full((len(samples), most, *shape), -1 if name == "kinds" else 0, dtype=kind)
        for row, s in zip(rows, samples):
            row[: len(s["kinds"])] = torch.from_numpy(s[name])
        batch[name] = rows
    return batch


def augment(batch, box, device):
    """A collated batch to what the model reads, on `device`, images resized into `box` (width, height), and mirrored
    where `flip` says so.

    -> dict: image (B, 3, H, W) float32 normalised; intrinsic (B, 3, 3), camera's axes to pixels of `image`; boxes,
    velocity, rects, all float32, kinds and attributes of `collate`; index (B,).
    """
    A, resized = data.image_affine(batch["size"], box, batch["flip"], batch["window"])
    out_size = [-(-int(edge) // data.SIZE_DIVISOR) * data.SIZE_DIVISOR for edge in resized.amax(0)]
    no_colour = torch.eye(3, 4, dtype=torch.float64).expand(len(A), 3, 4)
    there = batch["image"].to(device, non_blocking=True)
    image = data.warp_images(there, batch["size"], A, no_colour, out_size)
    mirrored = torch.eye(3, dtype=torch.float64).repeat(len(A), 1, 1)
    mirrored[batch["flip"], 0, 0] = -1.0  # the world's x: the image's flip is undone in the camera's matrix
    boxes, velocity = mirror(batch["boxes"], batch["velocity"])
    flip = batch["flip"][:, None, None]
    sides = batch["rects"].unflatten(2, (2, 2)) * torch.stack([A[:, 0, 0], A[:, 1, 1]], 1)[:, None, None]
    sides = sides + A[:, None, None, :2, 2]  # (B, M, 2, 2): both corners, u and v
    moved = {
        "intrinsic": A @ batch["intrinsic"] @ mirrored,
        "boxes": torch.where(flip, boxes, batch["boxes"]),
        "velocity": torch.where(flip, velocity, batch["velocity"]),
        "rects": torch.cat([sides.amin(2), sides.amax(2)], 2),
    }
    moved = {name: values.float().to(device, non_blocking=True) for name, values in moved.items()}
    kinds, attributes = (batch[name].to(device, non_blocking=True) for name in ("kinds", "attributes"))
    return {"image": image, **moved, "kinds": kinds, "attributes": attributes, "index": batch["index"]}
