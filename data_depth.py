"""Images with their depth, from the datasets' original layouts, and augmentation that moves both alike.

    kitti          split files of lines `image depth focal` (BTS, AdaBins, the depth toolbox) or `folder index l|r`
                   (monodepth2); raw drives and annotated depth, where those projects and KITTI's own archives put them
    nyu            split files of lines `image depth focal`; BTS's folders, sync/ and official_splits/test/
    lidar          frames of any data set (data_sets.py): the sweep, projected into the image, is the ground truth
    scenes         synthetic.py's: depth_2/ beside image_2/

Depth is kept as files do, 16 bits of 1 / scale metres, 0 where nothing is known: 256 for KITTI, projected sweeps and
scenes, 1000 for NYU. As in pre-training, workers decode and draw random numbers, and the device augments; every change
of place is one affine A that image (bilinear) and depth (nearest) share. Pixels are (u, v) with (0, 0) at the centre of
the top-left one.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import data_sets
import runtime
from files import IMAGES, BadInput, Folders, file_size, read_lines

SCALE = {"kitti": 256, "nyu": 1000, "lidar": 256, "scenes": 256}  # units of a depth file per metre
KB = (352, 1216)  # height, width of KITTI's benchmark test images: what all its sizes have in common, without the sky
NYU_INSIDE = (slice(45, 472), slice(43, 608))  # rows, columns of 480 x 640 inside the white frame of NYU's images
IMAGE_FOLDERS = {"kitti": ("", "input", "raw", "kitti_raw"), "nyu": ("", "sync", "official_splits/test")}
DEPTH_FOLDERS = {"kitti": ("", "gt_depth", "data_depth_annotated"), "nyu": IMAGE_FOLDERS["nyu"]}
DEPTH_PARTS = ("", "train", "val")  # of KITTI's archive of annotated depth
CAMERA = {"l": "image_02", "r": "image_03"}  # monodepth2's sides


# -----------------------------------------------------------------------------
# finding pairs


@dataclass(frozen=True)
class Pair:
    name: str  # of the image, without suffix; what a saved prediction is called
    image: Path
    depth: Path  # a 16-bit PNG, or a sweep
    frame: data.Frame | None = None  # of a sweep

    @property
    def drive(self):  # for data.drives_of
        return self.frame.drive if self.frame else None

    @property
    def files(self):  # for data.inventory
        return self.image, self.depth


def find_pairs(
    dataset, roots, depth_root="", splits=(), frame_stride=1, skip_missing=False, flag="--splits", named=True, limit=0
):
    """All pairs of `splits`. -> pairs, notes to print.

    splits: split files for kitti and nyu (looked up in the roots, too), the data set's own for the other two.
    roots: folders of images; several are pooled. depth_root: folder of ground truth, "" for the same. skip_missing
    leaves out pairs that lack one of their files. flag, named, limit: as data_kitti.pool_frames takes them.
    Raises BadInput for what is missing or cannot be understood.
    """
    if dataset in ("kitti", "nyu"):
        pairs, notes = _listed_pairs(dataset, roots, depth_root, splits, skip_missing, flag)
    else:
        rules = {"frame_stride": frame_stride, "skip_missing": skip_missing, "flag": flag, "named": named}
        frames, notes = data_sets.pool_frames(roots, splits, **rules, limit=limit)
        if dataset == "scenes":
            pairs = [_scene(frame) for frame in frames]
        else:
            pairs = data.Frames(frames.sources, frames.cells, _sweep)
    pairs = data.evenly_spread(pairs, limit or len(pairs))
    if not len(pairs):
        where = f"{flag} {' '.join(map(str, splits)) or '(none given)'}"
        why = f" ({'; '.join(notes)})" if notes else ""
        raise BadInput(f"{' '.join(map(str, roots))}: no pairs of image and depth in {where}{why}")
    return pairs, notes


def _sweep(frame):
    return Pair(frame.name, frame.image, frame.cloud, frame)


def _scene(frame):
    depth = frame.image.parents[1] / "depth_2" / f"{frame.image.stem}.png"
    _, wrong = file_size(depth)
    if wrong:
        advice = "only synthetic.py's scenes come with dense depth (--dataset lidar projects sweeps)"
        raise BadInput(f"{depth}: {wrong}; {advice}")
    return Pair(frame.name, frame.image, depth)


def _listed_pairs(dataset, roots, depth_root, splits, skip_missing, flag):
    finder = PairFinder(dataset, roots, depth_root)
    pairs, notes = [], []
    for split in splits:
        listing = _find_listing(split, roots, flag)
        found, left_out = _read_listing(finder, listing, skip_missing)
        pairs += found
        if left_out:
            notes.append(f"{listing}: {len(found)} pairs, {left_out}")
    _, repeats = data.without_repeats(pairs)
    if repeats:  # no negatives here: a pair that somebody lists twice may be meant to count twice
        what = f"{len(repeats)} of {len(pairs)} pairs are listed before, {repeats[0].name} among them, and count again"
        notes.append(f"note: {flag} {' '.join(map(str, splits))}: {what}")
    return pairs, notes


def _find_listing(split, roots, flag):
    """A split file, here or in one of the roots."""
    places = [Path(split), *(Path(root, split) for root in roots)]
    for is_there in (os.path.isfile, os.path.lexists):  # a folder, or a link to nowhere, is named when it is read
        for place in places:
            if is_there(place):
                return place
    looked = ", ".join(map(str, roots))
    raise BadInput(f"{flag} {split}: not a readable split file (no such file, here or in {looked})")


def _read_listing(finder, listing, skip_missing):
    """-> pairs of a split file, and in words how many were left out."""
    pairs, no_depth, incomplete = [], 0, 0
    for number, line in enumerate(read_lines(listing), start=1):
        if not line.strip():
            continue
        image_name, depth_name = _names(finder.dataset, line, f"{listing}: line {number}")
        if depth_name == "None":
            no_depth += 1
            continue
        image, depth = finder.image(image_name), finder.depth(depth_name, image_name)
        lost = [path for path in (image, depth) if file_size(path)[1]]
        if lost and not skip_missing:
            raise BadInput(_lost(lost[0], lost[0] == image, f"line {number} of {listing}"))
        if lost:
            incomplete += 1
            continue
        pairs.append(Pair(os.path.splitext(image_name)[0].lstrip("/"), image, depth))
    left_out = []
    if no_depth:
        left_out.append(f"{no_depth} without ground truth left out")
    if incomplete:
        left_out.append(f"{incomplete} with a missing file left out")
    return pairs, ", ".join(left_out)


def _lost(path, is_image, where):
    """What to say of a file that is not there, or empty."""
    looked_for = f" as {', '.join(IMAGES)}," if is_image else ""
    advice = "--skip-missing leaves out pairs that lack a file"
    return f"{path}: {file_size(path)[1]},{looked_for} there and in the other usual places ({where}; {advice})"


def _names(dataset, line, where):
    """Names of image and depth in a line of a split file, as they stand there or as monodepth2's folders have them."""
    words = line.split()
    if dataset == "kitti" and len(words) == 3 and words[2] in CAMERA and words[1].isdecimal():
        folder, camera, number = words[0], CAMERA[words[2]], f"{int(words[1]):010d}.png"
        drive = os.path.basename(folder.rstrip("/"))
        return f"{folder}/{camera}/data/{number}", f"{drive}/proj_depth/groundtruth/{camera}/{number}"
    if len(words) < 2 or not all(os.path.basename(word) for word in words[:2]):
        shown = repr(line.strip()[:60])
        raise BadInput(f"{where}, {shown}, is neither `image depth focal` nor `folder index l|r`")
    return words[:2]


class PairFinder:
    """Where the files of a split file lie: in the places that people and archives put them, or where an absolute path
    says.
    """

    def __init__(self, dataset, roots, depth_root):
        self.dataset, self.roots, self.depth_roots = dataset, roots, [depth_root] if depth_root else roots
        self.folders = Folders()

    def image(self, name):
        """Its path, as .jpg or .png whatever the list says; where it should be, if it is in none of the places."""
        return self._first(name, self._places(self.roots, IMAGE_FOLDERS[self.dataset]), IMAGES)

    def depth(self, name, image_name):
        """The same of the depth for an image."""
        places = self._places(self.depth_roots, DEPTH_FOLDERS[self.dataset], DEPTH_PARTS)
        if self.dataset == "kitti":  # monodepth2 unpacks it into the drives
            day = Path(image_name.lstrip("/")).parts[0]
            places += self._places(self.depth_roots, IMAGE_FOLDERS[self.dataset], (day,))
        return self._first(name, places, ())

    def _places(self, roots, folders, parts=("",)):
        return [os.path.join(root, folder, part) for root in roots for folder in folders for part in parts]

    def _first(self, name, places, suffixes):
        """The file of that name in the first of the places that has it."""
        folder, name_here = os.path.split(name)
        stem, suffix = os.path.splitext(name_here)
        relative = folder.lstrip("/")  # NYU's lists begin with a slash, and mean the root
        candidates = [folder] if os.path.isabs(folder) else []
        candidates += [os.path.join(place, relative) for place in places]
        for candidate in candidates:
            found = self.folders.find(candidate, stem, (suffix.lower(), *suffixes))
            if found:
                return found
        if relative and os.path.isabs(folder) and os.path.isdir(folder):
            return Path(name)
        return Path(places[0], relative, name_here)


# -----------------------------------------------------------------------------
# reading one pair


def read_depth(path):
    """A PNG of 16 bits -> uint16 (H, W), 0 where nothing is known.

    Raises BadInput for a file that is missing, broken, or any other picture: 8-bit ones are often drawings of depth.
    """
    with data.opened(path, "PNG") as image:
        if image.format == "PNG" and image.mode in ("I;16", "I"):  # Pillow's names for 16-bit grey, now and before 11
            return np.asarray(image).astype(np.uint16)
        kind = f"a {image.format} of mode {image.mode}"
    raise BadInput(f"{path}: {kind}; depth must be a PNG of one 16-bit channel")


def sweep_depth(points, lidar2img, width, height):
    """A sweep as a sparse depth map: float32 (height, width), metres along the camera's axis, 0 where no point falls.

    points (N, 3+), lidar2img (3, 4): metres of the LiDAR to pixels. The nearest point wins where several fall on one
    pixel. Sensors some decimetres apart see different things: points of the background may lie on a near thing's edge.
    """
    uv, depth = data.project(points.astype(np.float64), lidar2img)
    inside = data.inside_image(uv, depth, width, height)
    u, v = np.rint(uv[inside]).astype(int).T  # on the map: exactly half a pixel beyond its outermost centres is outside
    nearest = np.full(height * width, np.inf)
    np.minimum.at(nearest, v * width + u, depth[inside])
    return np.where(np.isinf(nearest), 0, nearest).astype(np.float32).reshape(height, width)


def load_pair(pair):
    """-> image (H, W, 3) uint8, depth (H, W) uint16. Raises BadInput."""
    image = data.read_image(pair.image)
    height, width = image.shape[:2]
    if pair.frame:
        metres = sweep_depth(pair.frame.read_points(), pair.frame.lidar2img(), width, height)
        units = np.rint(metres * SCALE["lidar"])
        depth = np.where(units < 2**16, units, 0).astype(np.uint16)  # beyond 256 m: not known, rather than wrong
    else:
        depth = read_depth(pair.depth)
    if depth.shape != (height, width):
        sizes = f"{depth.shape[1]} x {depth.shape[0]} pixels, but {pair.image} has {width} x {height}"
        raise BadInput(f"{pair.depth}: {sizes}")
    return image, depth


def kb_window(height, width):
    """Rows and columns, as slices, of the KITTI crop: flush with the bottom, and in the middle.

    Raises BadInput for a smaller map.
    """
    if height < KB[0] or width < KB[1]:
        raise BadInput(f"a map of {height} x {width} (height x width): too small for KITTI's crop of {KB[0]} x {KB[1]}")
    left = int((width - KB[1]) / 2)
    return slice(height - KB[0], height), slice(left, left + KB[1])


def without_border(dataset, height, width, training):
    """What the network gets of an image, as slices of rows and columns. Raises BadInput for images too small for it.

    KITTI's crop, of all images of KITTI's; NYU's without its white frame, in training alone, since its test images are
    whole; else everything.
    """
    kitti_sized = 370 <= height <= 376 and 1224 <= width <= 1242  # its drives' five sizes
    if dataset == "kitti" or (dataset == "lidar" and kitti_sized):  # other people's sweeps are taken whole
        return kb_window(height, width)
    if dataset == "nyu" and training:
        if (height, width) != (480, 640):
            raise BadInput(f"a map of {height} x {width} (height x width), where NYU has 480 x 640")
        return NYU_INSIDE
    return slice(0, height), slice(0, width)


# -----------------------------------------------------------------------------
# random numbers, on the host: a pure function of (seed, epoch, pair)


def resized(size, scale):
    """Width and height of an image of `size` times `scale`, whole pixels."""
    return [max(1, round(edge * scale)) for edge in size]


def resizing(window, size, corner=(0, 0)):
    """The affine (3, 3) float64 that makes an image of `size` of a window (width, height) whose corner lies at pixel
    `corner`.
    """
    sx, sy = size[0] / window[0], size[1] / window[1]
    return np.array([[sx, 0, (0.5 - corner[0]) * sx - 0.5], [0, sy, (0.5 - corner[1]) * sy - 0.5], [0, 0, 1]])


def random_affine(rng, width, height, rotation, rotation_p, flip, crop, scale):
    """How an image is changed. -> A (3, 3) float64, its pixels to pixels of the result; width, height of the result.

    In this order: rotation about its centre by U(-rotation, rotation) degrees, with probability rotation_p; mirroring,
    with probability flip; a window of `crop` (width, height), 0 for the whole edge; the window times `scale`.
    """
    angle = np.radians(rng.uniform(-rotation, rotation)) * (rng.random() < rotation_p)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:2, 2] = centre - turn[:2, :2] @ centre
    mirror = np.eye(3)
    if rng.random() < flip:
        mirror[0] = -1, 0, width - 1
    window = [min(c, edge) or edge for c, edge in zip(crop, (width, height))]
    corner = [int(rng.integers(0, edge - w + 1)) for edge, w in zip((width, height), window)]
    size = resized(window, scale)
    return resizing(window, size, corner) @ mirror @ turn, size


def random_colours(rng, p, gamma, brightness, channels):
    """The toolbox's ColorAug, with probability p. -> gamma; the rest as an affine map (3, 4) of values of 0..1.

    Values of 0..255 to the power U(*gamma), times U(*brightness), times U(*channels) for each channel, cut at 255, in
    the form that data.warp_images takes. On values of 0..255, a power is mostly a change of brightness, by
    255^(gamma - 1).
    """
    g, b, per_channel = rng.uniform(*gamma), rng.uniform(*brightness), rng.uniform(*channels, 3)
    if rng.random() >= p:
        return 1.0, np.eye(3, 4)
    return g, np.hstack([np.diag(255 ** (g - 1) * b * per_channel), np.zeros((3, 1))])


class DepthFrames(torch.utils.data.Dataset):
    """Pairs with all their randomness, by (epoch, index). `c` is finetune_depth.Config.

    A broken pair comes back as a BadInput.
    """

    def __init__(self, pairs, c):
        self.pairs, self.c = pairs, c

    def __len__(self):
        return len(self.pairs)

    def decoded(self, index):
        """What is not drawn: image (H, W, 3) uint8, depth (H, W) int16, of which 16 bits are meant, both without the
        border. Raises BadInput.
        """
        pair = self.pairs[index]
        image, depth = load_pair(pair)
        try:
            part = without_border(self.c.dataset, *depth.shape, training=True)
        except BadInput as e:
            raise BadInput(f"{pair.image}: {e}") from None
        return {"image": image[part], "depth": depth[part].view(np.int16)}  # torch does little with uint16

    def drawn(self, epoch, index, width, height):
        """The random numbers of a pair in an epoch."""
        c, rng = self.c, np.random.default_rng([data.SAMPLE, self.c.seed, epoch, index])
        A, size = random_affine(rng, width, height, c.rotation, c.rotation_p, c.flip, c.crop, c.image_scale)
        gamma, colour = random_colours(rng, c.colour_p, c.gamma, c.brightness, c.channel_gain)
        return {"A": A, "out_size": np.array(size), "gamma": gamma, "colour": colour, "index": index}

    def __getitem__(self, key):
        epoch, index = key
        try:
            sample = self.decoded(index)
        except BadInput as e:
            return e
        height, width = sample["depth"].shape
        return sample | self.drawn(epoch, index, width, height)


def resident(dataset, batches, device):
    """Batches as loop.stream makes them, from images and depths decoded once and kept on `device`, five bytes a pixel.

    Raises BadInput for a broken pair, for images of different sizes, which have no place in one tensor, and for more
    of them than the device has memory for.
    """
    images, depths = _decode_onto(dataset, device)
    height, width = depths.shape[1:]
    for keys in batches:
        batch = torch.utils.data.default_collate([dataset.drawn(epoch, i, width, height) for epoch, i in keys])
        at = batch["index"].to(device, non_blocking=True)
        batch["image"], batch["depth"] = images[at].permute(0, 3, 1, 2), depths[at]
        batch["size"] = torch.tensor([[width, height]]).expand(len(keys), 2)
        yield batch


def _decode_onto(dataset, device):
    """-> all images (N, H, W, 3) uint8 and depths (N, H, W) int16 of a data set, on `device`."""
    count = len(dataset)
    decoded = runtime.ahead(dataset.decoded, range(count), threads=os.cpu_count())
    images = depths = None
    for i, sample in enumerate(tqdm(decoded, "decoding", count, disable=count < 1000, dynamic_ncols=True)):
        height, width = sample["depth"].shape
        if images is None:
            images, depths = _room_for(count, height, width, device)
        if (height, width) != depths.shape[1:]:
            other = f"{dataset.pairs[0].image} {depths.shape[2]} x {depths.shape[1]}"
            sizes = f"of this one {width} x {height} pixels are used, of {other}"
            raise BadInput(f"{dataset.pairs[i].image}: --resident wants images of one size; {sizes}")
        images[i] = torch.from_numpy(sample["image"].copy())  # torch wants them writable
        depths[i] = torch.from_numpy(sample["depth"].copy())
    return images, depths


def _room_for(count, height, width, device):
    try:
        images = torch.empty(count, height, width, 3, dtype=torch.uint8, device=device)
        return images, torch.empty(count, height, width, dtype=torch.int16, device=device)
    except RuntimeError:  # of the GPU's memory, or the host's
        size = f"{count} images of {width} x {height} take {count * height * width * 5e-9:.0f} GB"
        raise BadInput(f"--resident: {size}, which {device} does not have") from None


# -----------------------------------------------------------------------------
# on the device


def warp_depth(depth, size, A, out_size):
    """The nearest pixel's depth under one affine a map, as data.warp_images moves its image.

    depth (B, H, W) integers on a shared canvas, size (B, 2) (width, height), A (B, 3, 3), out_size (width, height)
    -> (B, height, width), 0 outside.
    """
    x, y, inside = data.source_pixels(A, size, out_size, depth.device)
    h, w = depth.shape[1:]
    nearest = y.round().long().clamp_(0, h - 1) * w + x.round().long().clamp_(0, w - 1)
    return depth.flatten(1).gather(1, nearest.flatten(1)).view(nearest.shape) * inside


def augment(batch, scale, device):
    """A collated batch of DepthFrames to what the model reads, on `device`. scale: units per metre.

    -> dict: image (B, 3, H, W) float32 normalised; depth (B, H, W) float32 metres, 0 where nothing is known; index
    (B,).
    """
    size, A, out_size = batch["size"], batch["A"], batch["out_size"].amax(0).tolist()
    image = batch["image"].to(device, non_blocking=True)
    image = data.warp_images(image, size, A, batch["colour"], out_size, batch["gamma"])
    depth = batch["depth"].to(device, non_blocking=True).int() & 0xFFFF
    depth = warp_depth(depth, size, A, out_size).float() / scale
    return {"image": image, "depth": depth, "index": batch["index"]}
