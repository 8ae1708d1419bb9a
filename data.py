"""Camera + LiDAR frames, whatever data set they are from, and augmentation as matrices.

The work is split where the hardware splits. Loading processes decode: they read a frame, crop its cloud to the range
and the camera's view, draw N points, and draw the frame's random numbers (`PretrainFrames`). The device augments:
`augment` turns a collated batch of raw uint8 images into the resized, flipped, normalised batch and the two views of
the cloud.

Every augmentation is a matrix. Image changes are one 3x3 affine A, so that A @ lidar2img is always true of the image as
it is now. The second view of a cloud is one 4x4 similarity T, so that p_beta = T p_alpha.

Pixels are (u, v) with (0, 0) at the centre of the top-left pixel. Points are x, y, z in metres and reflectance in [0,
1]. Wrong input raises `BadInput`, one line that names the file. A data set's layout, calibration and labels are the
business of its own file: data_kitti.py.
"""

import collections.abc
import contextlib
import dataclasses
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.spatial import cKDTree

from files import IMAGES, BadInput, file_size, unless_bad, why_unread

WHOLE = np.array([0.0, 0.0, 1.0])  # the window (random_window) that shows all of an image
MIN_POINTS = 16  # fewer in view: the calibration or cloud is broken, and farthest point sampling has nothing to do
SHAPED_BY = 16  # nearest points, itself among them, whose spread is the local shape of a point
SIZE_DIVISOR = 32  # images are padded to multiples of the deepest stride, or feature cells would hang over the edge
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # RGB, of values in [0, 1]
IMAGENET_STD = (0.229, 0.224, 0.225)
SAMPLE, ORDER, SCALE = range(3)  # first word of every random seed: three streams that never meet


# -----------------------------------------------------------------------------
# frames


@dataclass(frozen=True)
class Rig:
    """What is true of all frames that one car's sensors have recorded. Metres are those of its LiDAR's frame."""

    point_range: tuple[float, ...]  # x, y, z minima, then maxima: points outside are left out
    center: tuple[float, float, float]  # about which a view of the cloud turns
    ground: float  # z of the road
    box: tuple[int, int]  # width, height that images are judged at, where training draws sizes from a range
    columns: int = 4  # float32 numbers of a point in a cloud's file: x, y, z, reflectance, and perhaps more

    @property
    def things(self):
        """z, half a metre above the road: what lies higher stands on it."""
        return self.ground + 0.5

    def in_range(self, points):
        """Which of points (N, 3+) lie inside point_range: (N,) bool."""
        low, high = np.float32(self.point_range[:3]), np.float32(self.point_range[3:])
        return ((points[:, :3] >= low) & (points[:, :3] <= high)).all(1)


@dataclass(frozen=True)
class Frame:
    """An image with its sweep, which knows how to read itself. Each data set's own kind adds `lidar2img()`."""

    name: str
    image: Path
    cloud: Path
    calib: tuple[Path, ...]  # the files that its calibration is read from
    rig: Rig
    drive: str | None = None  # the recording it is from, where that is known

    label = None  # where its labels would lie, in KITTI's layouts that have any
    suffixes = IMAGES  # that its image is looked for with; none where a table names the file

    @property
    def calibrations(self):
        """A path that frames with the same calibration share: data_check.py judges them together."""
        return self.calib[0].parent

    @property
    def files(self):
        """What its data are: their sizes tell two data sets apart."""
        return self.image, self.cloud

    def whole(self, clouds=True):
        """Whether it has an image and a cloud that are not empty: what --skip-missing asks for. clouds=False: an image
        is enough.
        """
        return all(file_size(path)[0] for path in (self.files if clouds else [self.image]))

    def file_errors(self, clouds=True):
        """What is wrong with its files as far as their names and sizes tell: BadInputs, one a file. clouds=False: with
        its image.
        """
        errors = []
        for path in (self.image, self.cloud, *self.calib) if clouds else (self.image,):
            size, wrong = file_size(path)
            if wrong:
                errors.append(BadInput(f"{path}: {wrong} (of frame {self.name}; {self._advice(path)})"))
            elif path == self.cloud and size % (4 * self.rig.columns):
                errors.append(truncated(path, size, self.rig.columns))
        return errors

    def _advice(self, path):
        if path in self.calib:
            return "its calibration must lie there"
        by_suffix = path == self.image and self.suffixes
        looked_for = f"{', '.join(self.suffixes)} are looked for; " if by_suffix else ""
        return f"{looked_for}--skip-missing leaves out frames without image or cloud"

    def read_image(self):
        return read_image(self.image)

    def read_points(self, columns=4):
        """float32 (N, columns): the first so many numbers of each point."""
        return read_cloud(self.cloud, self.rig.columns, kept=columns)


class Frames(collections.abc.Sequence):
    """Frames that are made when they are asked for: a hundred thousand of them would be hundreds of megabytes, in every
    loading process again. Some bytes of each are kept, in arrays that these share.

    sources: what knows frames. A source has frame(*cell), and of many at once, cells (n, k): names(cells), a list;
    images(cells), a list of paths without links in them; sizes(cells) (n, 2), bytes of images and clouds;
    drives(cells), a set; sweeps(cells) (n,), equal for those of one cloud. cells (N, 1 + k) int32: which source, then
    its cell. make: what is handed out is make(frame).
    """

    def __init__(self, sources, cells, make=None):
        self.sources, self.cells, self.make = sources, cells, make

    def __len__(self):
        return len(self.cells)

    def __getitem__(self, i):
        """One, or for a slice or an array of indices Frames."""
        if isinstance(i, slice | np.ndarray):
            return Frames(self.sources, self.cells[i], self.make)
        which, *cell = self.cells[i].tolist()
        frame = self.sources[which].frame(*cell)
        return self.make(frame) if self.make else frame

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def parts(self):
        """(source, where its frames stand (n,), their cells), source by source."""
        for which, source in enumerate(self.sources):
            where = np.flatnonzero(self.cells[:, 0] == which)
            if len(where):
                yield source, where, self.cells[where, 1:]

    def ask(self, what, dtype=object):
        """what(source, cells), a list or an array, of all frames in their order: (N,)."""
        answers = np.empty(len(self), dtype)
        for source, where, cells in self.parts():
            answers[where] = what(source, cells)
        return answers


def join(parts):
    """Frames of several lists of Frames, one after another. A source that several have stays one."""
    sources, cells = {}, []
    for frames in parts:
        numbers = np.array([sources.setdefault(source, len(sources)) for source in frames.sources], np.int32)
        own = frames.cells.copy()
        own[:, 0] = numbers[own[:, 0]] if len(own) else 0
        cells.append(own)
    return Frames(list(sources), np.concatenate(cells) if cells else np.zeros((0, 2), np.int32))


class Names(collections.abc.Sequence):
    """Names of frames, each when it is asked for."""

    def __init__(self, frames):
        self.frames = frames

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, i):
        return self.frames[i].name


def names_of(frames):
    """All names at once, a list."""
    if isinstance(frames, Frames):
        return frames.ask(lambda source, cells: source.names(cells)).tolist()
    return [f.name for f in frames]


def drives_of(frames):
    """The recordings that they are from, a set, as far as that is known."""
    if isinstance(frames, Frames):
        return {drive for source, _, cells in frames.parts() for drive in source.drives(cells) if drive}
    return {f.drive for f in frames if f.drive}


def without_repeats(frames):
    """Frames, or Pairs, less those whose image has come before, be it by another path. -> the rest; what was left out.

    Folders are resolved once each; a path costs the disk one question, whether it is a link, and Frames know that.
    """
    if isinstance(frames, Frames):
        images = frames.ask(lambda source, cells: source.images(cells)).tolist()
    else:
        images, folders = [], {}
        for folder, name in (os.path.split(f.image) for f in frames):
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            image = os.path.join(folders[folder], name)
            images.append(os.path.realpath(image) if os.path.islink(image) else image)
    seen, kept, repeats = set(), [], []
    for i, image in enumerate(images):
        (repeats if image in seen else kept).append(i)
        seen.add(image)
    return (take(frames, kept), take(frames, repeats)) if repeats else (frames, frames[:0])


def take(frames, indices):
    """These of the frames: Frames, or a list."""
    if isinstance(frames, Frames):
        return frames[np.array(indices, np.int64)]
    return [frames[i] for i in indices]


def note_repeats(repeats, flag):
    """A note to print where frames were left out by `without_repeats`, else none: a list."""
    if not repeats:
        return []
    what = f"{len(repeats)} frames that are listed twice, {repeats[0].name} among them, are taken once"
    return [f"note: {flag}: {what}"]


def evenly_spread(items, limit):
    """As many of the items, in order, or all if there are no more."""
    keep = min(limit, len(items))
    return take(items, [i * len(items) // keep for i in range(keep)])


def share_of(items, share):
    """The share of the items, evenly spread, one at least: what --labels leaves."""
    return evenly_spread(items, max(1, round(share * len(items))))


def inventory(frames, clouds=True):
    """One line a frame, in order: its name, and the bytes of its files. Equal lines are equal data, wherever they
    lie. clouds=False: of its image alone.
    """
    if isinstance(frames, Frames):
        images = frames.ask(lambda source, cells: source.sizes(cells)[:, 0], np.int64).tolist()
        columns = [names_of(frames), images]
        if clouds:
            columns.append(frames.ask(lambda source, cells: source.sizes(cells)[:, 1], np.int64).tolist())
        return [" ".join(map(str, line)) for line in zip(*columns)]
    files_of = lambda f: f.files if clouds else [f.image]
    return [" ".join([f.name, *(str(path.stat().st_size) for path in files_of(f))]) for f in frames]


def fingerprint(lines):
    """A short hash of an inventory: which frames, of which sizes, in which order. The same is the same run."""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def digests(lines):
    """An inventory as a checkpoint holds it, to know its frames again: a hash of eight bytes each, int64 (n,)."""
    hashed = [hashlib.blake2b(line.encode(), digest_size=8).digest() for line in lines]
    return torch.from_numpy(np.frombuffer(b"".join(hashed), "<i8").copy())


def count_seen(lines, known):
    """How many of an inventory's lines are in that of a checkpoint, `digests` or, as it was once, lines."""
    known = known if torch.is_tensor(known) else digests(known)
    return len(set(digests(lines).tolist()) & set(known.tolist()))


def check_unseen(frames, held_out, flag, inventory=inventory):
    """Raises BadInput, naming the flag, for held-out frames with the name and the bytes, which `inventory` asks for, of
    one that is trained on.
    """
    both = names_of(frames), names_of(held_out)
    names = set(both[0]).intersection(both[1])  # usually none: nothing is asked of the disk
    trained, judged = (
        set(inventory(take(some, [i for i, name in enumerate(own) if name in names])))
        for some, own in zip((frames, held_out), both)
    )
    seen = sorted(trained & judged)
    if seen:
        first = seen[0].split()[0]
        raise BadInput(f"{flag}: {len(seen)} of its frames are trained on, {first} among them")


def shared_drives(frames, held_out, flag):
    """A note to print, a list, where held-out frames are of drives that are trained on; else none."""
    drives = sorted(drives_of(frames) & drives_of(held_out))
    if not drives:
        return []
    return [f"note: {flag} shares {len(drives)} drives with training, {drives[0]} among them: its figures will flatter"]


# -----------------------------------------------------------------------------
# reading one frame


@contextlib.contextmanager
def opened(path, what="image"):
    """A picture as Pillow opens it. Raises BadInput for all that it does not like, in the block, too.

    what: what it should be, for messages.
    """
    try:
        with Image.open(path) as image:
            yield image
    except BadInput:
        raise
    except Exception as e:  # Pillow answers a broken file with a dozen types
        if isinstance(e, FileNotFoundError):
            raise BadInput(f"{path}: {why_unread(path, e)}") from None
        said = getattr(e, "strerror", None) or str(e) or type(e).__name__
        raise BadInput(f"{path}: not a readable {what} ({said.splitlines()[0]})") from None


def read_image(path):
    """RGB uint8 (H, W, 3). 16-bit grey is scaled to 8 bits: Pillow itself would cut it off at 255."""
    with opened(path) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # Pillow's names for it
            grey = np.rint(np.asarray(image) / 257).astype(np.uint8)
            return np.repeat(grey[..., None], 3, 2)
        if image.mode in ("I", "F"):
            raise BadInput(f"{path}: a {image.format} of 32 bits a pixel; 8 or 16 bits are wanted")
        return np.asarray(image.convert("RGB"))


def read_cloud(path, columns=4, full_scale=1.0, kept=4):
    """float32 (N, kept): x, y, z in metres, reflectance in [0, 1]. columns: float32 numbers of a point in the file.

    full_scale: what the file has for a reflectance of 1. kept: how many of a point's numbers are wanted, the first.
    Raises BadInput for a file that cannot be that, and says what it looks like instead.
    """
    try:
        raw = np.fromfile(path, np.uint8)
    except OSError as e:
        raise BadInput(f"{path}: {why_unread(path, e)}") from None
    if raw.size % (4 * columns) or not raw.size:
        raise truncated(path, raw.size, columns)
    points = np.ascontiguousarray(raw.view(np.float32).reshape(-1, columns)[:, :kept])
    bad = (~np.isfinite(points)).any(1).sum()
    if bad:
        raise BadInput(f"{path}: {bad} of {len(points)} points are NaN or infinite{hint(raw, columns)}")
    points[:, 3] /= full_scale
    low, high = points[:, 3].min(), points[:, 3].max()
    if low < 0 or high > 1:
        question = "; is it float64, or of 3 or 5 columns?"
        raise BadInput(f"{path}: reflectance {low:g} to {high:g}, not within [0, 1]{hint(raw, columns) or question}")
    return points


def truncated(path, size, columns):
    """The BadInput for a cloud of so many bytes. Reads it, once more perhaps, to see what it could be."""
    raw = np.zeros(0, np.uint8)
    with contextlib.suppress(OSError):
        raw = np.fromfile(path, np.uint8)
    why = f"{size} bytes is no whole number of points (x, y, z, reflectance in float32)"
    return BadInput(f"{path}: truncated, {why}{hint(raw, columns)}")


def hint(raw, columns):
    """What the bytes of a refused cloud look like instead, in words that end its message; "" if like nothing known."""
    found, wanted = layout(raw), f"{columns} columns of float32"
    if found == wanted:
        return "; its columns look right, so divide reflectance by its full scale, which is mostly 255"
    return f"; it looks like {found}, where {wanted} are wanted" if found else ""


def layout(raw):
    """How bytes are to be read to make a cloud, in words; None if in no way that is tried."""
    for kind in ("float32", "float64"):
        for count in (4, 5, 3):
            whole = raw.size > 0 and raw.size % (count * np.dtype(kind).itemsize) == 0
            if whole and looks_like_cloud(raw.view(kind).reshape(-1, count)):
                return f"{count} columns of {kind}"
    return None


def looks_like_cloud(points):
    """Whether numbers (N, 3+) may be metres, flatter than wide, and then a reflectance of any unit."""
    if not np.isfinite(points).all() or np.abs(points[:, :3]).max() > 1000:
        return False
    x, y, z = np.percentile(np.abs(points[:, :3]), 95, axis=0)
    reflectance = points[:, 3:4]
    return z < 0.5 * max(x, y) and (reflectance >= 0).all() and (reflectance <= 255).all()


def project(points, lidar2img):
    """Pixels and depth of LiDAR points. points (..., 3+), lidar2img (..., 3, 4) -> uv (..., 2), depth (...), metres.

    numpy or torch. A point at or behind the camera has depth <= 0, and its uv means nothing.
    """
    x, y, z = points[..., 0], points[..., 1], points[..., 2]

    def row(r):
        # sums of products by hand: a matrix product may run in TF32 on a GPU, and three digits are not a projection
        m = lidar2img[..., None, r, :]
        return m[..., 0] * x + m[..., 1] * y + m[..., 2] * z + m[..., 3]

    u, v, depth = row(0), row(1), row(2)
    library = torch if torch.is_tensor(points) else np
    ahead = library.where(depth > 1e-6, depth, 1e-6)
    return library.stack([u / ahead, v / ahead], -1), depth


def inside_image(uv, depth, width, height):
    """Which projections fall on the image's area: half a pixel beyond the outermost pixel centres."""
    u, v = uv[..., 0], uv[..., 1]
    return (depth > 0) & (u > -0.5) & (v > -0.5) & (u < width - 0.5) & (v < height - 0.5)


def load_frame(frame, num_points, rng, shape=False):
    """A frame, its cloud cropped to the rig's range and the camera's view, and exactly num_points points in random
    order.

    They are drawn with replacement when fewer are in view, as the release does. shape: their `local_shape`, among all
    that are in view, is in four further columns.
    -> dict(image (H, W, 3) uint8, points (num_points, 4 or 8) float32, lidar2img (3, 4) float64). Raises BadInput.
    """
    image, points, lidar2img = frame.read_image(), frame.read_points(), frame.lidar2img()
    points = points[frame.rig.in_range(points)]
    uv, depth = project(points.astype(np.float64), lidar2img)
    points = points[inside_image(uv, depth, image.shape[1], image.shape[0])]
    if len(points) < MIN_POINTS:
        raise BadInput(too_few_in_view(frame, len(points)))
    chosen = rng.choice(len(points), num_points, replace=len(points) < num_points)
    sampled = points[chosen]
    if shape:
        different, place = np.unique(chosen, return_inverse=True)
        sampled = np.hstack([sampled, local_shape(points[:, :3], different)[place]])
    return {"image": image, "points": sampled, "lidar2img": lidar2img}


def local_shape(xyz, asked):
    """How the nearest 16 points, itself among them, spread around a point: whatever turns the cloud about z, mirrors or
    scales it, changes nothing. 72 ms for 16384 points on one thread of an AMD EPYC.

    xyz (N, 3) metres, asked (n,) indices -> (n, 4) float32 in [0, 1]: linearity (l1 - l2) / l1, planarity (l2 - l3) /
    l1 and scattering l3 / l1 of the covariance's eigenvalues l1 >= l2 >= l3 (Weinmann et al. 2015), and the absolute z
    of the normal, the direction of l3. All 0 where all 16 coincide.
    """
    xyz = xyz.astype(np.float64)
    tree = cKDTree(xyz, balanced_tree=False, compact_nodes=False)  # built in half the time
    _, nearest = tree.query(xyz[asked], min(SHAPED_BY, len(xyz)))  # (n, 16)
    spread = xyz[nearest] - xyz[asked][:, None]
    spread -= spread.mean(1, keepdims=True)
    values, directions = np.linalg.eigh(spread.transpose(0, 2, 1) @ spread)  # rising, (n, 3) and (n, 3, 3)
    l3, l2, l1 = values.clip(0).T
    somewhere = l1 > 0
    shape = np.stack([l1 - l2, l2 - l3, l3, l1 * abs(directions[:, 2, 0])], 1)
    return (shape / np.where(somewhere, l1, 1.0)[:, None] * somewhere[:, None]).astype(np.float32)


def too_few_in_view(frame, count):
    why = f"wrong calibration ({frame.calib[0]})?"
    return f"{frame.cloud}: {count} points in the camera's view, fewer than {MIN_POINTS}; {why}"


# -----------------------------------------------------------------------------
# random numbers, all drawn on the host: a pure function of (seed, epoch, frame), or of (seed, step)


def random_view(rng, center, rotation, scale, translation, flip):
    """The similarity T (4, 4) float64 of the second view.

    In this order: rotation about z through `center` by U(-rotation, rotation) degrees, scale U(*scale) about the
    sensor, translation N(0, translation) metres, and y -> -y where `flip`.
    """
    angle = np.radians(rng.uniform(-rotation, rotation))
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:3, 3] = center - turn[:3, :3] @ center
    T = np.diag([*[rng.uniform(*scale)] * 3, 1.0]) @ turn
    T[:3, 3] += rng.normal(0.0, 1.0, 3) * translation
    return np.diag([1.0, -1.0 if flip else 1.0, 1.0, 1.0]) @ T


def random_window(rng, crop, shift):
    """The part of the image that a network gets to see: (left, top, size) in shares of the image's width and height.

    Its size is U(*crop), above 1 to look from further away; its place inside (or around) the image is U, then moved by
    U(-1, 1) * shift.
    """
    size = rng.uniform(*crop)
    corner = rng.uniform(0, 1, 2) * (1 - size) + rng.uniform(-1, 1, 2) * shift
    return np.array([*corner, size])


def random_colour(rng, jitter):
    """Colour jitter as one affine map of RGB in [0, 1], (3, 4) float64.

    jitter: strengths x of brightness, contrast (about mid-grey) and saturation, each a factor U(1 - x, 1 + x); and of
    hue, a turn about the grey axis by U(-x, x) of a circle.
    """
    brightness, contrast, saturation = rng.uniform(-1, 1, 3) * jitter[:3] + 1
    angle = 2 * np.pi * rng.uniform(-1, 1) * jitter[3]
    axis = np.ones(3) / np.sqrt(3)
    cross = np.cross(np.eye(3), axis)
    hue = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)  # Rodrigues
    grey = np.outer(np.ones(3), (0.299, 0.587, 0.114))
    M = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * grey) @ hue
    return np.hstack([M, np.full((3, 1), 0.5 * (1 - contrast))])


def random_image_scale(image_scale, seed, step):
    """The (width, height) box that every image of this step is resized into.

    Two numbers: always that box. Four: long edge U(first, third), short edge U(second, fourth), as mmdetection's
    `multiscale_mode="range"` draws them.
    """
    if len(image_scale) == 2:
        return tuple(image_scale)
    rng = np.random.default_rng([SCALE, seed, step])
    return tuple(int(rng.integers(low, high + 1)) for low, high in zip(image_scale[:2], image_scale[2:]))


def check_image_scale(box):
    """Raises BadInput for an --image-scale that `random_image_scale` cannot draw from."""
    if len(box) not in (2, 4) or min(box) < 32 or any(low > high for low, high in zip(box, box[2:])):
        wanted = "two numbers (width height) or four (smallest, then largest), from 32 on"
        raise BadInput(f"--image-scale {' '.join(map(str, box))}: {wanted}")


class Batches:
    """Which frames this rank sees at every step, for a DataLoader's batch_sampler: lists of (epoch, frame index).

    The global batch of a step is `batch_size` frames of the epoch's shuffle, cut into groups of `group` frames: what
    one forward pass holds, and what the losses take their negatives from. Group g of a step goes to rank g % world as
    its (g // world)-th micro-batch, so the groups are the same on one GPU as on eight. An incomplete last batch is
    dropped.

    sweeps (num_frames,): numbers of `sweeps_of`. No group holds two frames of one sweep then: their places would be one
    another's negatives. Raises BadInput, on the first batch, where there are too few sweeps for that.
    """

    def __init__(self, num_frames, batch_size, group, seed, rank=0, world=1, start=0, steps=0, sweeps=None):
        self.steps_per_epoch = num_frames // batch_size
        self.num_frames, self.batch_size, self.group, self.seed = num_frames, batch_size, group, seed
        self.rank, self.world, self.start, self.steps, self.sweeps = rank, world, start, steps, sweeps

    def __len__(self):
        return (self.steps - self.start) * self.batch_size // (self.group * self.world)

    def __iter__(self):
        for step in range(self.start, self.steps):
            epoch, position = divmod(step, self.steps_per_epoch)
            if position == 0 or step == self.start:
                order = np.random.default_rng([ORDER, self.seed, epoch]).permutation(self.num_frames)
                if self.sweeps is not None:
                    part_sweeps(order, self.sweeps, self.group, self.steps_per_epoch * self.batch_size)
            batch = order[position * self.batch_size :][: self.batch_size].reshape(-1, self.world, self.group)
            for micro in batch[:, self.rank]:
                yield [(epoch, int(i)) for i in micro]


def sweeps_of(frames):
    """A number (n,) for each frame, equal for those of one cloud."""
    if isinstance(frames, Frames):
        numbers, taken = np.zeros(len(frames), np.int64), 0
        for source, where, cells in frames.parts():
            own = source.sweeps(cells)
            numbers[where] = taken + own
            taken += own.max() + 1
        return numbers
    numbers = {}
    return np.array([numbers.setdefault(str(f.cloud), len(numbers)) for f in frames])


def part_sweeps(order, sweeps, group, used):
    """Swap frames of an order, in place, until none of its groups has two of one sweep. An order that has no such group
    stays as it is.

    order (n,) frames, of which the first `used` are cut into groups; sweeps (n,) of the frames. While there are groups
    at fault, some swap mends one if any order is without fault. Raises BadInput if not.
    """
    while True:
        grid = np.sort(sweeps[order[:used]].reshape(-1, group), 1)
        at_fault = np.flatnonzero((grid[:, 1:] == grid[:, :-1]).any(1))
        if not len(at_fault):
            return
        if not sum(swap_out(order, sweeps, group, used, g) for g in at_fault):
            few = f"{len(np.unique(sweeps))} sweeps are too few for groups without two frames of one"
            raise BadInput(f"--group {group}: {few}; --same-sweep allows them")


def swap_out(order, sweeps, group, used, g):
    """Swap each frame whose sweep group g has once already for the next, around the end, whose sweep it lacks, and
    whose own group lacks that of the first. -> how many were swapped.
    """
    places, swapped = np.arange(len(order)), 0
    for place in range(g * group, (g + 1) * group):
        sweep_at = sweeps[order]
        own = sweep_at[g * group : (g + 1) * group]
        if (sweep_at[g * group : place] == sweep_at[place]).any():
            has_it = np.unique(places[:used][sweep_at[:used] == sweep_at[place]] // group)
            free = np.flatnonzero(~np.isin(places // group, has_it) & ~np.isin(sweep_at, own))
            if len(free):
                other = free[np.searchsorted(free, place) % len(free)]
                order[[place, other]] = order[[other, place]]
                swapped += 1
    return swapped


class PretrainFrames(torch.utils.data.Dataset):
    """Frames with all their randomness, by (epoch, index).

    `c` is simipu.Config, of which these are read: num_points, point_features, pairs, seed, and what stands under "the
    second view of a cloud, and the image". A broken frame comes back as a BadInput instead of a sample, so that the
    process that owns the terminal can report it in one line: the exception of a loading process would arrive as a page
    of traceback.
    """

    def __init__(self, frames, c):
        self.frames, self.c = frames, c

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, key):
        epoch, index = key
        c = self.c
        rng = np.random.default_rng([SAMPLE, c.seed, epoch, index])
        frame = self.frames[index]
        if c.pairs == "wrong" and len(self.frames) > 1:
            other = (index + rng.integers(1, len(self.frames))) % len(self.frames)
            frame = dataclasses.replace(frame, image=self.frames[other].image)
        try:
            sample = load_frame(frame, c.num_points, rng, "shape" in c.point_features)
        except BadInput as e:
            return e
        sample["flip"] = bool(rng.random() < c.flip)  # one coin for the image and for view beta, as in the release
        sample["T"] = random_view(rng, frame.rig.center, c.rotation, c.scale, c.translation, sample["flip"])
        sample["shuffle"] = rng.permutation(c.num_points)
        sample["window"] = random_window(rng, c.crop, c.shift)
        sample["colour"] = random_colour(rng, c.jitter)
        sample["index"] = index
        return sample


def collate(samples):
    """Samples to one batch of tensors, or the first BadInput among them.

    Images of different sizes (and their depths) share a canvas; `size` (B, 2) says (width, height) of each.
    """
    for s in samples:
        if isinstance(s, BadInput):
            return s
    height, width = (max(s["image"].shape[axis] for s in samples) for axis in (0, 1))
    batch = {"size": torch.tensor([s["image"].shape[1::-1] for s in samples])}
    for key, first in samples[0].items():
        if key in ("image", "depth"):
            canvas = np.zeros((len(samples), height, width, *first.shape[2:]), first.dtype)
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
    batch = unless_bad(collate([dataset[key] for key in keys]))
    return augment(batch, box, device)


def image_affine(size, box, flip, window):
    """The affine A of an image's augmentation: resize to fit into `box`, keeping the ratio; show the `window` alone, in
    that same size; flip where asked.

    size (B, 2) (width, height), box (width, height), flip (B,) bool, window (B, 3) of `random_window` -> A (B, 3, 3)
    float64, old pixels to new; resized size (B, 2) int64. Resize by s maps u to (u + 0.5) s - 0.5; a flip maps u to
    W - 1 - u.
    """
    ratio = (torch.tensor(box, dtype=torch.float64) / size).amin(1, keepdim=True)
    resized = (size * ratio).round().long().clamp_(min=1)
    s = resized / size.double() / window[:, 2:]
    A = torch.eye(3, dtype=torch.float64).repeat(len(size), 1, 1)
    A[:, 0, 0], A[:, 1, 1] = s[:, 0], s[:, 1]
    A[:, :2, 2] = (0.5 - window[:, :2] * size) * s - 0.5
    mirror = torch.eye(3, dtype=torch.float64).repeat(len(size), 1, 1)
    mirror[flip, 0, 0] = -1.0
    mirror[flip, 0, 2] = (resized[flip, 0] - 1).double()
    return mirror @ A, resized


def source_pixels(A, size, out_size, device):
    """Where each pixel of the result comes from, and whether that lies inside the image.

    A (B, 3, 3) old pixels to new, size (B, 2) (width, height) of the old images, out_size (width, height)
    -> x, y (B, height, width) float32, old pixels; inside, bool.
    """
    width, height = out_size
    inverse = torch.linalg.inv(A.double()).to(device, torch.float32, non_blocking=True)[:, :, :, None, None]
    v, u = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    x, y = (inverse[:, r, 0] * u + inverse[:, r, 1] * v + inverse[:, r, 2] for r in range(2))
    w, h = on_device(size, device).view(-1, 2, 1, 1).unbind(1)
    return x, y, (x > -0.5) & (y > -0.5) & (x < w - 0.5) & (y < h - 0.5)


def on_device(values, device):
    """A few numbers of the host, float32, without waiting for the device."""
    return values.to(device, torch.float32, non_blocking=True)


def warp_images(images, size, A, colour, out_size, gamma=None):
    """Bilinear resampling by one affine an image, its colours changed, normalised by ImageNet's mean and deviation.

    images (B, 3, H, W) uint8 on a shared canvas, size (B, 2) (width, height), A (B, 3, 3) old pixels to new, colour
    (B, 3, 4) of `random_colour`, out_size (width, height), gamma (B,): powers of values in [0, 1], taken before, if any
    -> (B, 3, height, width) float32; 0, the mean colour, outside the image.
    """
    device = images.device
    x, y, inside = source_pixels(A, size, out_size, device)
    # clamped to the image's own edge, or the canvas behind a smaller neighbour would bleed into its last row
    w, h = on_device(size, device).view(-1, 2, 1, 1).unbind(1)
    x, y = torch.minimum(x.clamp(min=0), w - 1), torch.minimum(y.clamp(min=0), h - 1)
    canvas_height, canvas_width = images.shape[2:]
    grid = torch.stack([x * 2 / (canvas_width - 1) - 1, y * 2 / (canvas_height - 1) - 1], -1)
    warped = F.grid_sample(images.float(), grid, mode="bilinear", align_corners=True)  # (B, 3, height, width), 0..255

    # asked on the host, where gamma and colour are: no GPU is waited for
    if gamma is not None and (gamma != 1).any():
        warped = (warped / 255) ** on_device(gamma, device).view(-1, 1, 1, 1) * 255
    if (colour != torch.eye(3, 4)).any():
        M = on_device(colour * torch.tensor([1.0, 1.0, 1.0, 255.0]), device)
        warped = (torch.einsum("bij,bjhw->bihw", M[:, :, :3], warped) + M[:, :, 3, None, None]).clamp_(0, 255)
    mean, std = (on_device(255 * torch.tensor(t).view(3, 1, 1), device) for t in (IMAGENET_MEAN, IMAGENET_STD))
    return (warped - mean) / std * inside[:, None]


def transform(points, T):
    """points (B, N, 3 + C) by T (B, 4, 4); further channels stay. By hand, for `project`'s reason."""
    xyz = (T[:, None, :3, :3] * points[:, :, None, :3]).sum(-1) + T[:, None, :3, 3]
    return torch.cat([xyz, points[..., 3:]], -1)


def augment(batch, box, device):
    """A collated batch of raw frames to what the model reads, on `device`, with every image resized into `box`.

    -> dict: image (B, 3, H, W) float32 normalised, H and W multiples of 32; alpha, beta (B, N, 4 or 8), the two views,
    shuffled independently; T (B, 4, 4), alpha to beta; lidar2img (B, 3, 4), alpha to pixels of `image`; index (B,),
    the frames.
    """
    A, resized = image_affine(batch["size"], box, batch["flip"], batch["window"])
    out_size = [-(-int(edge) // SIZE_DIVISOR) * SIZE_DIVISOR for edge in resized.amax(0)]
    lidar2img = (A @ batch["lidar2img"]).float().to(device, non_blocking=True)
    T = batch["T"].float().to(device, non_blocking=True)
    alpha = batch["points"].to(device, non_blocking=True)
    shuffle = batch["shuffle"].to(device, non_blocking=True)
    beta = transform(alpha, T).gather(1, shuffle[..., None].expand_as(alpha))
    image = warp_images(batch["image"].to(device, non_blocking=True), batch["size"], A, batch["colour"], out_size)
    return {"image": image, "alpha": alpha, "beta": beta, "T": T, "lidar2img": lidar2img, "index": batch["index"]}
