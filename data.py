"""Camera + LiDAR frames from the datasets' original layouts, and augmentation as matrices.

Nothing to prepare: no info files, no reduced clouds. Two layouts are understood, told apart by what the folder holds:

    KITTI object   ROOT/{training,testing}/{image_2,velodyne,calib}/000000.*, ROOT/ImageSets/{train,val,test,...}.txt
    KITTI raw      ROOT/DATE/DATE_drive_NNNN_sync/{image_02,velodyne_points}/data/*, ROOT/DATE/calib_*.txt
                   (ROOT may also be one DATE folder, or one drive's folder)

The work is split where the hardware splits. Workers decode: they read a frame, crop its cloud to the range and the
camera's view, draw N points, and draw the frame's random numbers (`PretrainFrames`). The device augments: `augment`
turns a collated batch of raw uint8 images into the resized, flipped, normalised batch and the two views of the cloud.
Every augmentation is a matrix: image changes are one 3x3 affine A, so that lidar2img = A P2 R0_rect Tr_velo_to_cam is
always true of the image as it is now; the second view of a cloud is one 4x4 similarity T, so that p_beta = T p_alpha.

Pixels are (u, v) with (0, 0) at the centre of the top-left pixel. Points are x, y, z in metres and reflectance in [0, 1].
Wrong input raises `BadInput`, one line that names the file.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

POINT_RANGE = (0.0, -40.0, -3.0, 70.4, 40.0, 1.0)  # x, y, z minima, then maxima, metres; the release's and KITTI's own
MIN_POINTS = 16  # fewer in view: the frame's calibration or cloud is broken, and farthest point sampling has nothing to do
ROTATION_CENTER = (35.2, 0.0, -1.0)  # metres; the middle of POINT_RANGE, about which a view turns (release `points_center`)
SIZE_DIVISOR = 32  # images are padded to multiples of the deepest stride, so that feature cells do not hang over the edge
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
SAMPLE, ORDER, SCALE = range(3)  # first word of every random seed: three streams that never meet


class BadInput(ValueError):
    """Something a user gave cannot be used. The message is one line that names the file or the flag."""


@contextlib.contextmanager
def disk_errors(path):
    """Raises BadInput, naming the file, for what the disk answers to a write."""
    try:
        yield
    except OSError as e:
        raise BadInput(f"{path}: not written ({e.strerror or e})") from None


@contextlib.contextmanager
def writing(path):
    """A file that appears whole or not at all: -> the path to write to instead, which takes its place at the end. Raises BadInput as
    `disk_errors` does."""
    path = Path(path)
    temporary = path.with_suffix(f".tmp{path.suffix}")
    try:
        with disk_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


# -----------------------------------------------------------------------------
# finding frames


@dataclass(frozen=True)
class Frame:
    name: str
    image: Path
    cloud: Path
    calib: tuple[Path, ...]  # one file: KITTI object; two: KITTI raw (cam_to_cam, velo_to_cam)
    drive: str | None = None  # the recording it is from, where that is known

    @property
    def files(self):
        return self.image, self.cloud


def find_frames(root, splits=("train",), frame_stride=1, skip_missing=False):
    """All frames of `splits` under `root` (KITTI object), or of every drive under it (KITTI raw), in file order.

    frame_stride keeps every n-th frame of a raw drive: neighbours in a sequence are near copies of each other.
    skip_missing leaves out frames that lack an image or a cloud (raw drive 2011_09_26_drive_0009 lacks four clouds).
    Raises BadInput for a missing root, an unknown layout, an empty split, a missing file, a truncated cloud.
    """
    frames = list_frames(root, splits, frame_stride, skip_missing)
    if skip_missing:
        frames = [f for f in frames if f.image.exists() and f.cloud.exists()]
    for error in (e for f in frames for e in file_errors(f)):
        raise error
    if not frames:
        raise BadInput(f"{root}: no frames in {'splits ' + ', '.join(splits) if is_object_layout(root) else 'it'}")
    return frames


def list_frames(root, splits=("train",), frame_stride=1, skip_missing=False):
    """The frames that lists and folders name, whether or not all their files are there. Raises BadInput for the rest of the above."""
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder")
    if is_object_layout(root):
        return [frame for split in splits for frame in _object_frames(root, split)]
    return _raw_frames(root, frame_stride, skip_missing)


def is_object_layout(root):
    return (Path(root) / "training").is_dir() or (Path(root) / "testing").is_dir()


def file_errors(frame):
    """What is wrong with a frame's files as far as their names and sizes tell: BadInputs, the most telling first."""
    missing = [path for path in (frame.image, frame.cloud, *frame.calib) if not path.is_file()]
    errors = [BadInput(f"{path}: missing (of frame {frame.name}; --skip-missing leaves out frames without image or cloud)") for path in missing]
    size = frame.cloud.stat().st_size if frame.cloud not in missing else 16
    if size % 16 or not size:
        errors.append(BadInput(f"{frame.cloud}: truncated, {size} bytes is no whole number of points (x, y, z, reflectance in float32)"))
    return errors


def evenly_spread(items, limit):
    """As many of the items, in order, or all if there are no more."""
    keep = min(limit, len(items))
    return [items[i * len(items) // keep] for i in range(keep)]


def check_unseen(frames, held_out, flag):
    """Raises BadInput, naming the flag, for held-out frames with the name and the bytes of one that is trained on."""
    names = {f.name for f in frames} & {f.name for f in held_out}  # usually none: nothing is asked of the disk
    seen = sorted(set.intersection(*(set(inventory([f for f in some if f.name in names])) for some in (frames, held_out))))
    if seen:
        raise BadInput(f"{flag}: {len(seen)} of its frames are trained on, {seen[0].split()[0]} among them")


def find_held_out(c, frames):
    """The frames of --eval-splits (`c` is simipu.Config), none of them among `frames`, which are trained on. -> frames, a note to
    print or None. Raises BadInput as `find_frames`, for frames that are trained on, and for fewer than two."""
    if not (c.eval_splits or c.eval_root):
        return [], None
    held_out = [f for root in c.eval_root or c.data_root for f in find_frames(root, c.eval_splits, c.frame_stride, c.skip_missing)]
    held_out = evenly_spread(held_out, c.eval_frames)
    splits = f"--eval-splits {' '.join(c.eval_splits)}" if c.eval_splits else f"--eval-root {' '.join(c.eval_root)}"
    check_unseen(frames, held_out, splits)
    if len(held_out) < 2:
        raise BadInput(f"{splits}: judging needs two frames or more, for the other frame's image")
    drives = sorted({f.drive for f in frames if f.drive} & {f.drive for f in held_out})
    return held_out, f"note: {splits} shares {len(drives)} drives with training, {drives[0]} among them: its figures will flatter" if drives else None


def _object_frames(root, split):
    folder = root / ("testing" if split == "test" else "training")
    listing = root / "ImageSets" / f"{split}.txt"
    if listing.is_file():
        ids = listing.read_text().split()
    elif split in ("test", "trainval"):  # the whole folder; KITTI itself comes without ImageSets
        ids = sorted(p.stem for p in (folder / "velodyne").glob("*.bin"))
    else:
        raise BadInput(f"{listing}: missing; it lists the frames of split '{split}', one id a line (--splits trainval takes the whole training folder)")
    if not ids:
        raise BadInput(f"{listing}: split '{split}' is empty")
    drives = _object_drives(root) if folder.name == "training" else {}
    return [
        Frame(f"{folder.name}/{i}", _png_or_jpg(folder / "image_2" / i), folder / "velodyne" / f"{i}.bin", (folder / "calib" / f"{i}.txt",), drives.get(i))
        for i in ids
    ]


def _object_drives(root):
    """{frame: drive} of the object layout's training folder, from the `mapping` folder of KITTI's devkit where a user put it here: line
    n of train_mapping.txt is a raw frame, and number i of train_rand.txt says which line frame i is, counted from 1."""
    for folder in (root / "mapping", root / "devkit" / "mapping", root / "devkit_object" / "mapping"):
        mapping, order = folder / "train_mapping.txt", folder / "train_rand.txt"
        if mapping.is_file() and order.is_file():
            try:
                drives = [line.split()[1] for line in mapping.read_text().splitlines()]
                return {f"{i:06d}": drives[int(n) - 1] for i, n in enumerate(order.read_text().replace(",", " ").split())}
            except (IndexError, ValueError):
                raise BadInput(f"{folder}: train_mapping.txt and train_rand.txt do not fit each other") from None
    return {}


def _raw_frames(root, frame_stride, skip_missing):
    drives = sorted(p.parent for pattern in ("velodyne_points", "*/velodyne_points", "*/*/velodyne_points") for p in root.glob(pattern))
    if not drives:
        raise BadInput(f"{root}: neither KITTI object (training/, testing/) nor KITTI raw (DATE/DATE_drive_NNNN_sync/) lies here")
    frames = []
    for drive in drives:
        clouds = {p.stem for p in (drive / "velodyne_points" / "data").glob("*.bin")}
        images = {p.stem for p in (drive / "image_02" / "data").glob("*") if p.suffix in (".png", ".jpg")}
        if len(clouds) != len(images) and not skip_missing:
            raise BadInput(f"{drive}: {len(images)} images but {len(clouds)} clouds; --skip-missing keeps the frames that have both")
        calib = (drive.parent / "calib_cam_to_cam.txt", drive.parent / "calib_velo_to_cam.txt")
        for i in sorted(clouds | images)[::frame_stride]:
            image = _png_or_jpg(drive / "image_02" / "data" / i)
            frames.append(Frame(f"{drive.name}/{i}", image, drive / "velodyne_points" / "data" / f"{i}.bin", calib, drive.name))
    return frames


def inventory(frames):
    """One line a frame, in order: its name, and the bytes of its files. Equal lines are equal data, wherever they lie."""
    return [" ".join([f.name, *(str(path.stat().st_size) for path in f.files)]) for f in frames]


def fingerprint(lines):
    """A short hash of an inventory: which frames, of which sizes, in which order. The same is the same run."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _png_or_jpg(stem):
    jpg = stem.with_name(stem.name + ".jpg")
    return jpg if jpg.exists() else stem.with_name(stem.name + ".png")


# -----------------------------------------------------------------------------
# reading one frame


def read_image(path):
    """RGB uint8 (H, W, 3)."""
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as e:  # Pillow answers a broken png with either
        raise BadInput(f"{path}: not a readable image ({e})") from None


def read_cloud(path):
    """float32 (N, 4): x, y, z in metres, reflectance."""
    try:
        points = np.fromfile(path, np.float32)
    except OSError as e:
        raise BadInput(f"{path}: not readable ({e.strerror})") from None
    if points.size % 4 or not points.size:
        raise BadInput(f"{path}: truncated, {4 * points.size} bytes is no whole number of points")
    bad = (~np.isfinite(points.reshape(-1, 4))).any(1).sum()
    if bad:
        raise BadInput(f"{path}: {bad} of {points.size // 4} points are NaN or infinite")
    return points.reshape(-1, 4)


@functools.lru_cache(maxsize=None)
def read_lidar2img(calib):
    """LiDAR metres to pixels of the left colour camera, float64 (3, 4), from `Frame.calib`."""
    if len(calib) == 1:
        object_calib = _read_calib(calib[0])
        p2, r0 = _entry(calib[0], object_calib, "P2", (3, 4)), _entry(calib[0], object_calib, "R0_rect", (3, 3))
        velo2cam = _entry(calib[0], object_calib, "Tr_velo_to_cam", (3, 4))
    else:
        cameras, velodyne = _read_calib(calib[0]), _read_calib(calib[1])
        p2, r0 = _entry(calib[0], cameras, "P_rect_02", (3, 4)), _entry(calib[0], cameras, "R_rect_00", (3, 3))
        velo2cam = np.hstack([_entry(calib[1], velodyne, "R", (3, 3)), _entry(calib[1], velodyne, "T", (3, 1))])
    return p2 @ _to_4x4(r0) @ _to_4x4(velo2cam)


def _read_calib(path):
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: not readable ({e})") from None
    return dict(line.split(":", 1) for line in lines if ":" in line)


def _entry(path, calib, key, shape):
    if key not in calib:
        raise BadInput(f"{path}: no {key}")
    try:
        return np.array(calib[key].split(), np.float64).reshape(shape)
    except ValueError:
        raise BadInput(f"{path}: {key} is not {shape[0]}x{shape[1]} numbers") from None


def _to_4x4(matrix):
    out = np.eye(4)
    out[: matrix.shape[0], : matrix.shape[1]] = matrix
    return out


def project(points, lidar2img):
    """Pixels and depth of LiDAR points. points (..., 3+), lidar2img (..., 3, 4) -> uv (..., 2), depth (...), metres.

    numpy or torch. A point at or behind the camera has depth <= 0, and its uv means nothing.
    """
    xyz1 = [points[..., i : i + 1] for i in range(3)]
    # sums of products by hand: a matrix product may run in TF32 on a GPU, and three digits are not a projection
    u, v, depth = (sum(lidar2img[..., None, r, i] * xyz1[i][..., 0] for i in range(3)) + lidar2img[..., None, r, 3] for r in range(3))
    stack, safe = (torch.stack, torch.where) if torch.is_tensor(points) else (np.stack, np.where)
    z = safe(depth > 1e-6, depth, depth * 0 + 1e-6)
    return stack([u / z, v / z], -1), depth


def inside_image(uv, depth, width, height):
    """Which projections fall on the image's area: half a pixel beyond the outermost pixel centres."""
    return (depth > 0) & (uv[..., 0] > -0.5) & (uv[..., 1] > -0.5) & (uv[..., 0] < width - 0.5) & (uv[..., 1] < height - 0.5)


def load_frame(frame, num_points, rng):
    """One frame with its cloud cropped to POINT_RANGE and the camera's view, and exactly num_points points in random order
    (drawn with replacement when fewer are in view, as the release does).

    -> dict(image (H, W, 3) uint8, points (num_points, 4) float32, lidar2img (3, 4) float64). Raises BadInput.
    """
    image, points, lidar2img = read_image(frame.image), read_cloud(frame.cloud), read_lidar2img(frame.calib)
    low, high = np.float32(POINT_RANGE[:3]), np.float32(POINT_RANGE[3:])
    points = points[((points[:, :3] >= low) & (points[:, :3] <= high)).all(1)]
    uv, depth = project(points.astype(np.float64), lidar2img)
    points = points[inside_image(uv, depth, image.shape[1], image.shape[0])]
    if len(points) < MIN_POINTS:
        raise BadInput(f"{frame.cloud}: {len(points)} points in the camera's view, fewer than {MIN_POINTS}; wrong calibration ({frame.calib[0]})?")
    return {"image": image, "points": points[rng.choice(len(points), num_points, replace=len(points) < num_points)], "lidar2img": lidar2img}


# -----------------------------------------------------------------------------
# random numbers, all drawn on the host: a pure function of (seed, epoch, frame), or of (seed, step)


def random_view(rng, rotation, scale, translation, flip):
    """The similarity T (4, 4) float64 of the second view: rotation about z through ROTATION_CENTER by U(-rotation, rotation)
    degrees, scale U(*scale) about the sensor, translation N(0, translation) metres, and y -> -y where `flip`."""
    angle = np.radians(rng.uniform(-rotation, rotation))
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = ROTATION_CENTER - turn[:3, :3] @ ROTATION_CENTER
    T = np.diag([*[rng.uniform(*scale)] * 3, 1.0]) @ turn
    T[:3, 3] += rng.normal(0.0, 1.0, 3) * translation
    return np.diag([1.0, -1.0 if flip else 1.0, 1.0, 1.0]) @ T


def random_window(rng, crop, shift):
    """The part of the image that a network gets to see, as (left, top, size) in shares of the image's width and height: its size
    U(*crop), above 1 to look from further away, its place inside (or around) the image U, then moved by U(-1, 1) * shift."""
    size = rng.uniform(*crop)
    corner = rng.uniform(0, 1, 2) * (1 - size) + rng.uniform(-1, 1, 2) * shift
    return np.array([*corner, size])


def random_colour(rng, jitter):
    """Colour jitter as one affine map of RGB in [0, 1], (3, 4) float64. jitter: brightness, contrast (about mid-grey), saturation,
    each a factor U(1 - x, 1 + x); and hue, a turn about the grey axis by U(-x, x) of a circle."""
    brightness, contrast, saturation = rng.uniform(-1, 1, 3) * jitter[:3] + 1
    angle = 2 * np.pi * rng.uniform(-1, 1) * jitter[3]
    axis = np.ones(3) / np.sqrt(3)
    cross = np.cross(np.eye(3), axis)
    hue = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)  # Rodrigues
    grey = np.outer(np.ones(3), (0.299, 0.587, 0.114))
    M = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ hue
    return np.hstack([M, np.full((3, 1), 0.5 * (1 - contrast))])


def random_image_scale(image_scale, seed, step):
    """The (width, height) box that every image of this step is resized into. Two numbers: always that box; four: long edge
    U(first, third), short edge U(second, fourth), as mmdetection's `multiscale_mode="range"` draws them."""
    if len(image_scale) == 2:
        return tuple(image_scale)
    rng = np.random.default_rng([SCALE, seed, step])
    return tuple(int(rng.integers(low, high + 1)) for low, high in zip(image_scale[:2], image_scale[2:]))


class Batches:
    """Which frames this rank sees at every step, for a DataLoader's batch_sampler: lists of (epoch, frame index).

    The global batch of a step is `batch_size` frames of the epoch's shuffle, cut into groups of `group` frames: what one
    forward pass holds, and what the losses take their negatives from. Group g of a step goes to rank g % world as its
    (g // world)-th micro-batch, so the groups are the same on one GPU as on eight. An incomplete last batch is dropped.
    """

    def __init__(self, num_frames, batch_size, group, seed, rank=0, world=1, start=0, steps=0):
        self.steps_per_epoch = num_frames // batch_size
        self.num_frames, self.batch_size, self.group, self.seed = num_frames, batch_size, group, seed
        self.rank, self.world, self.start, self.steps = rank, world, start, steps

    def __len__(self):
        return (self.steps - self.start) * self.batch_size // (self.group * self.world)

    def __iter__(self):
        for step in range(self.start, self.steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == self.start:
                order = np.random.default_rng([ORDER, self.seed, epoch]).permutation(self.num_frames)
            batch = order[position * self.batch_size :][: self.batch_size].reshape(-1, self.world, self.group)
            for micro in batch[:, self.rank]:
                yield [(epoch, int(i)) for i in micro]


class PretrainFrames(torch.utils.data.Dataset):
    """Frames with all their randomness, by (epoch, index). `c` is simipu.Config, of which the fields under "the second view" and
    "the image", num_points, pairs and seed are read. A broken frame comes back as a BadInput instead of a sample, so that the process that owns the
    terminal can report it in one line (a worker's exception would arrive as a page of traceback)."""

    def __init__(self, frames, c):
        self.frames, self.c = frames, c

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key
        rng = np.random.default_rng([SAMPLE, self.c.seed, epoch, index])
        frame = self.frames[index]
        if self.c.pairs == "wrong" and len(self.frames) > 1:
            frame = dataclasses.replace(frame, image=self.frames[(index + rng.integers(1, len(self.frames))) % len(self.frames)].image)
        try:
            sample = load_frame(frame, self.c.num_points, rng)
        except BadInput as e:
            return e
        sample["flip"] = bool(rng.random() < self.c.flip)  # one coin for the image and for view beta, as in the release
        sample["T"] = random_view(rng, self.c.rotation, self.c.scale, self.c.translation, sample["flip"])
        sample["shuffle"] = rng.permutation(self.c.num_points)
        sample["window"] = random_window(rng, self.c.crop, self.c.shift)
        sample["colour"] = random_colour(rng, self.c.jitter)
        sample["index"] = index
        return sample


def collate(samples):
    """Samples to one batch of tensors; images of different sizes (and their depths) share a canvas, `size` (B, 2) says (width, height) of each."""
    for s in samples:
        if isinstance(s, BadInput):
            return s
    h, w = (max(s["image"].shape[axis] for s in samples) for axis in (0, 1))
    batch = {"size": torch.tensor([s["image"].shape[1::-1] for s in samples])}
    for key, first in samples[0].items():
        if key in ("image", "depth"):
            canvas = np.zeros((len(samples), h, w, *first.shape[2:]), first.dtype)
            for part, s in zip(canvas, samples):
                part[: s[key].shape[0], : s[key].shape[1]] = s[key]
            batch[key] = torch.from_numpy(canvas)
        else:
            batch[key] = torch.from_numpy(np.stack([s[key] for s in samples]))
    batch["image"] = batch["image"].permute(0, 3, 1, 2)  # (B, 3, H, W), channels last in memory
    return batch


# -----------------------------------------------------------------------------
# on the device


def view(dataset, keys, box, device):
    """Items of PretrainFrames as one augmented batch. Raises the BadInput that one of them is."""
    batch = collate([dataset[key] for key in keys])
    if isinstance(batch, BadInput):
        raise batch
    return augment(batch, box, device)


def image_affine(size, box, flip, window):
    """The affine A that resizes images to fit into `box`, keeping their ratio, then shows their `window` alone, in that same size,
    and flips them where asked.

    size (B, 2) (width, height), box (width, height), flip (B,) bool, window (B, 3) of `random_window` -> A (B, 3, 3) float64,
    resized size (B, 2) int64. Resize by s maps u to (u + 0.5) s - 0.5; a flip maps u to W - 1 - u.
    """
    ratio = (torch.tensor(box, dtype=torch.float64) / size).amin(1, keepdim=True)
    resized = (size * ratio).round().long().clamp_(min=1)
    s = resized / size.double() / window[:, 2:]
    A = torch.eye(3, dtype=torch.float64).repeat(len(size), 1, 1)
    A[:, 0, 0], A[:, 1, 1], A[:, :2, 2] = s[:, 0], s[:, 1], (0.5 - window[:, :2] * size) * s - 0.5
    mirror = torch.eye(3, dtype=torch.float64).repeat(len(size), 1, 1)
    mirror[flip, 0, 0], mirror[flip, 0, 2] = -1.0, (resized[flip, 0] - 1).double()
    return mirror @ A, resized


def source_pixels(A, size, out_size, device):
    """Where each pixel of the result comes from. A (B, 3, 3) old pixels to new, size (B, 2) (width, height) of the old images, out_size
    (width, height) -> x, y (B, height, width) float32, old pixels; and which of them lie inside the image."""
    width, height = out_size
    inverse = torch.linalg.inv(A.double()).to(device, torch.float32, non_blocking=True)[:, :, :, None, None]
    v, u = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    x, y = (inverse[:, r, 0] * u + inverse[:, r, 1] * v + inverse[:, r, 2] for r in range(2))
    w, h = size.to(device, torch.float32, non_blocking=True).view(-1, 2, 1, 1).unbind(1)
    return x, y, (x > -0.5) & (y > -0.5) & (x < w - 0.5) & (y < h - 0.5)


def warp_images(images, size, A, colour, out_size, gamma=None):
    """Bilinear resampling by one affine an image. images (B, 3, H, W) uint8 on a shared canvas, size (B, 2) (width, height),
    A (B, 3, 3) old pixels to new, colour (B, 3, 4) of `random_colour`, out_size (width, height), gamma (B,) powers of values in [0, 1] before
    that, if any -> (B, 3, height, width) float32 normalised by ImageNet's mean and standard deviation; 0, the mean colour, outside the image."""
    x, y, inside = source_pixels(A, size, out_size, images.device)
    # clamped to the image's own edge, or the canvas behind a smaller neighbour would bleed into its last row
    w, h = size.to(images.device, torch.float32, non_blocking=True).view(-1, 2, 1, 1).unbind(1)
    x, y = torch.minimum(x.clamp(min=0), w - 1), torch.minimum(y.clamp(min=0), h - 1)
    grid = torch.stack([x * 2 / (images.shape[3] - 1) - 1, y * 2 / (images.shape[2] - 1) - 1], -1)
    warped = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=True)  # (B, 3, height, width)
    if gamma is not None and (gamma != 1).any():  # on the host, as below: no GPU is waited for
        warped = (warped / 255) ** gamma.to(images.device, torch.float32, non_blocking=True).view(-1, 1, 1, 1) * 255
    if (colour != torch.eye(3, 4)).any():
        M = (colour * torch.tensor([1.0, 1.0, 1.0, 255.0])).to(images.device, torch.float32, non_blocking=True)
        warped = (torch.einsum("bij,bjhw->bihw", M[:, :, :3], warped) + M[:, :, 3, None, None]).clamp_(0, 255)
    mean, std = (255 * torch.tensor(t).view(3, 1, 1).to(images.device, non_blocking=True) for t in (IMAGENET_MEAN, IMAGENET_STD))
    return (warped - mean) / std * inside[:, None]


def transform(points, T):
    """points (B, N, 3 + C) by T (B, 4, 4); further channels stay. By hand, for `project`'s reason."""
    xyz = (T[:, None, :3, :3] * points[:, :, None, :3]).sum(-1) + T[:, None, :3, 3]
    return torch.cat([xyz, points[..., 3:]], -1)


def augment(batch, box, device):
    """A collated batch of raw frames to what the model reads, on `device`, with every image resized into `box`.

    -> dict: image (B, 3, H, W) float32 normalised, H and W multiples of 32; alpha, beta (B, N, 4), the two views, shuffled
    independently; T (B, 4, 4), alpha to beta; lidar2img (B, 3, 4), alpha to pixels of `image`; index (B,), the frames.
    """
    A, resized = image_affine(batch["size"], box, batch["flip"], batch["window"])
    out_size = [-(-int(edge) // SIZE_DIVISOR) * SIZE_DIVISOR for edge in resized.amax(0)]
    lidar2img = (A @ batch["lidar2img"]).float().to(device, non_blocking=True)
    T = batch["T"].float().to(device, non_blocking=True)
    alpha = batch["points"].to(device, non_blocking=True)
    shuffle = batch["shuffle"].to(device, non_blocking=True)
    beta = transform(alpha, T).gather(1, shuffle[..., None].expand(-1, -1, 4))
    image = warp_images(batch["image"].to(device, non_blocking=True), batch["size"], A, batch["colour"], out_size)
    return {"image": image, "alpha": alpha, "beta": beta, "T": T, "lidar2img": lidar2img, "index": batch["index"]}


# -----------------------------------------------------------------------------
# python data.py check


def main():
    import check
    import runtime

    runtime.commands({"check": check.check}, "Data sets in their original layouts.")


if __name__ == "__main__":
    import data  # by its name: the BadInput of a script, __main__.BadInput, is not the one that everybody else catches

    data.main()
