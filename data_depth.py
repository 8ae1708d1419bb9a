"""Images with their depth, from the datasets' original layouts, and augmentation that moves both alike.

    kitti          split files of lines `image depth focal` (BTS, AdaBins, the depth toolbox) or `folder index l|r`
    (monodepth2); raw drives
                   and annotated depth, where those projects and KITTI's own archives put them; png or jpg
    nyu            split files of lines `image depth focal`; BTS's folders, sync/ and official_splits/test/
    kitti_lidar    anything that data.py reads: the sweep, projected into the image, is the ground truth
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
from PIL import Image
from tqdm import tqdm

import data
import data_kitti
import runtime
from files import BadInput

SCALE = {"kitti": 256, "nyu": 1000, "kitti_lidar": 256, "scenes": 256}  # units of a depth file per metre
KB = (
    352,
    1216,
)  # height, width of KITTI's benchmark test images: what all of its sizes have in common, without the sky
NYU_INSIDE = (slice(45, 472), slice(43, 608))  # rows, columns of 480 x 640 inside the white frame of NYU's images
IMAGE_FOLDERS = {"kitti": ("", "input", "raw", "kitti_raw"), "nyu": ("", "sync", "official_splits/test")}
DEPTH_FOLDERS = {"kitti": ("", "gt_depth", "data_depth_annotated"), "nyu": IMAGE_FOLDERS["nyu"]}
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
    def files(self):  # for data.inventory
        return self.image, self.depth


def find_pairs(dataset, roots, depth_root="", splits=(), frame_stride=1, skip_missing=False):
    """All pairs of `splits`: split files for kitti and nyu (looked up in the roots, too), names of ImageSets/ for the
    other two.

    roots: folders of images; several are pooled. depth_root: folder of ground truth, "" for the same. -> pairs, notes
    to print. Raises BadInput for what is missing or cannot be understood; skip_missing leaves out pairs that lack one
    of their files.
    """
    if dataset in ("kitti", "nyu"):
        pairs, notes = [], []
        for split in splits:
            listings = [Path(split), *(Path(root) / split for root in roots)]
            listing = listings[_first(listings) or 0]
            found, left_out = _read_listing(dataset, listing, roots, depth_root, skip_missing)
            pairs += found
            notes += [f"{listing}: {len(found)} pairs, {left_out}"] if left_out else []
    else:
        frames = [f for root in roots for f in data_kitti.find_frames(root, splits, frame_stride, skip_missing)]
        if dataset == "scenes":
            pairs = [Pair(f.name, f.image, f.image.parent.parent / "depth_2" / (f.image.stem + ".png")) for f in frames]
            for pair in pairs:
                if not pair.depth.is_file():
                    raise BadInput(
                        f"{pair.depth}: missing; only synthetic.py's scenes come with dense depth (--dataset kitti_lidar projects sweeps)"
                    )
        else:
            pairs = [Pair(f.name, f.image, f.cloud, f) for f in frames]
        notes = []
    if not pairs:
        why = f" ({'; '.join(notes)})" if notes else ""
        raise BadInput(
            f"{' '.join(map(str, roots))}: no pairs of image and depth in splits {', '.join(map(str, splits)) or '(none given)'}{why}"
        )
    return pairs, notes


def _read_listing(dataset, listing, roots, depth_root, skip_missing):
    """-> pairs of a split file, and in words how many were left out."""
    try:
        lines = listing.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{listing}: not a readable split file ({getattr(e, 'strerror', None) or 'not text'})") from None
    pairs, no_depth, missing, depth_roots, last = [], 0, 0, [depth_root] if depth_root else roots, (0, 0)
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        if dataset == "kitti" and len(words) == 3 and words[2] in CAMERA and words[1].isdecimal():
            image = f"{words[0]}/{CAMERA[words[2]]}/data/{int(words[1]):010d}.png"
            depth = f"{Path(words[0]).name}/proj_depth/groundtruth/{CAMERA[words[2]]}/{int(words[1]):010d}.png"
        elif len(words) >= 2 and all(Path(word).name for word in words[:2]):
            image, depth = (word.lstrip("/") for word in words[:2])
        else:
            raise BadInput(
                f"{listing}: line {number}, {line.strip()[:60]!r}, is neither `image depth focal` nor `folder index l|r`"
            )
        if depth == "None":
            no_depth += 1
            continue
        images = [
            Path(root, folder, name)
            for root in roots
            for folder in IMAGE_FOLDERS[dataset]
            for name in (image, str(Path(image).with_suffix(".jpg")))
        ]
        depths = [
            Path(root, folder, part, depth)
            for root in depth_roots
            for folder in DEPTH_FOLDERS[dataset]
            for part in ("", "train", "val")
        ]
        if dataset == "kitti":  # monodepth2 unpacks it into the drives
            depths += [
                Path(root, folder, Path(image).parts[0], depth)
                for root in depth_roots
                for folder in IMAGE_FOLDERS[dataset]
            ]
        found = [_first(paths, i) for paths, i in zip((images, depths), last)]
        lost = [paths[0] for paths, i in zip((images, depths), found) if i is None]
        if lost and not skip_missing:
            raise BadInput(
                f"{lost[0]}: missing, there and in the other usual places (line {number} of {listing}; --skip-missing leaves out pairs that lack a file)"
            )
        if lost:
            missing += 1
            continue
        pairs.append(Pair(str(Path(image).with_suffix("")), images[found[0]], depths[found[1]]))
        last = found
    left_out = [f"{no_depth} without ground truth left out"] * bool(no_depth) + [
        f"{missing} with a missing file left out"
    ] * bool(missing)
    return pairs, ", ".join(left_out)


def _first(paths, last=0):
    """Number of the first path that is there, None for none; number `last`, where the line before had its file, is
    asked first.
    """
    return next((i for i in (last, *range(len(paths))) if paths[i].is_file()), None)


# -----------------------------------------------------------------------------
# reading one pair


def read_depth(path):
    """A PNG of 16 bits -> uint16 (H, W), 0 where nothing is known. Raises BadInput for a file that is missing, broken,
    or any other picture: 8-bit ones are often drawings of depth.
    """
    try:
        with Image.open(path) as image:
            kind = image.format, image.mode
            if kind in (("PNG", "I;16"), ("PNG", "I")):  # Pillow's names for 16-bit grey, now and before version 11
                return np.asarray(image).astype(np.uint16)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (
        OSError,
        SyntaxError,
        ValueError,
        Image.DecompressionBombError,
    ) as e:  # Pillow answers a broken png with any
        raise BadInput(
            f"{path}: not a readable PNG ({getattr(e, 'strerror', None) or str(e).splitlines()[0]})"
        ) from None
    raise BadInput(f"{path}: a {kind[0]} of mode {kind[1]}; depth must be a PNG of one 16-bit channel")


def sweep_depth(points, lidar2img, width, height):
    """A sweep as a sparse depth map: float32 (height, width), metres along the camera's axis, 0 where no point falls.
    The nearest point wins where several fall on one pixel. Sensors some decimetres apart see different things: points
    of the background may lie on a near thing's edge.

    points (N, 3+), lidar2img (3, 4): metres of the LiDAR to pixels.
    """
    uv, depth = data.project(points.astype(np.float64), lidar2img)
    inside = data.inside_image(uv, depth, width, height)
    u, v = (
        np.rint(uv[inside]).astype(int).T
    )  # never outside: exactly half a pixel beyond the outermost centres is not inside
    nearest = np.full(height * width, np.inf)
    np.minimum.at(nearest, v * width + u, depth[inside])
    return np.where(np.isinf(nearest), 0, nearest).astype(np.float32).reshape(height, width)


def load_pair(pair):
    """-> image (H, W, 3) uint8, depth (H, W) uint16. Raises BadInput."""
    image = data.read_image(pair.image)
    if pair.frame:
        metres = sweep_depth(pair.frame.read_points(), pair.frame.lidar2img(), image.shape[1], image.shape[0])
        units = np.rint(metres * SCALE["kitti_lidar"])
        depth = np.where(units < 2**16, units, 0).astype(np.uint16)  # beyond 256 m: not known, rather than wrong
    else:
        depth = read_depth(pair.depth)
    if depth.shape != image.shape[:2]:
        raise BadInput(
            f"{pair.depth}: {depth.shape[1]} x {depth.shape[0]} pixels, but {pair.image} has {image.shape[1]} x {image.shape[0]}"
        )
    return image, depth


def kb_window(height, width):
    """Rows and columns, as slices, of the KITTI crop: flush with the bottom, and in the middle. Raises BadInput for a
    smaller map.
    """
    if height < KB[0] or width < KB[1]:
        raise BadInput(f"a map of {height} x {width} (height x width): too small for KITTI's crop of {KB[0]} x {KB[1]}")
    left = int((width - KB[1]) / 2)
    return slice(height - KB[0], height), slice(left, left + KB[1])


def without_border(dataset, height, width, training):
    """What the network gets of an image, as slices of rows and columns: KITTI's crop, of all images of KITTI's; NYU's
    without its white frame, in training alone, since its test images are whole; else everything. Raises BadInput for
    images too small for that.
    """
    kitti_sized = (
        370 <= height <= 376 and 1224 <= width <= 1242
    )  # its drives' five sizes; other people's data are taken whole
    if dataset == "kitti" or dataset == "kitti_lidar" and kitti_sized:
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
    """The affine (3, 3) float64 that makes of a window (width, height), whose corner lies at pixel `corner`, an image
    of `size`.
    """
    sx, sy = size[0] / window[0], size[1] / window[1]
    return np.array([[sx, 0, (0.5 - corner[0]) * sx - 0.5], [0, sy, (0.5 - corner[1]) * sy - 0.5], [0, 0, 1]])


def random_affine(rng, width, height, rotation, rotation_p, flip, crop, scale):
    """Rotation about the image's centre by U(-rotation, rotation) degrees, with probability rotation_p; mirroring; a
    window of `crop` (width, height), 0 for the whole edge; the window times `scale`. -> A (3, 3) float64, pixels of the
    image to pixels of the result; its size.
    """
    angle = np.radians(rng.uniform(-rotation, rotation)) * (rng.random() < rotation_p)
    centre = np.array([(width - 1) / 2, (height - 1) / 2])
    turn = np.eye(3)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    turn[:2, 2] = centre - turn[:2, :2] @ centre
    mirror = np.array([[-1.0, 0, width - 1], [0, 1, 0], [0, 0, 1]]) if rng.random() < flip else np.eye(3)
    window = [min(c, edge) or edge for c, edge in zip(crop, (width, height))]
    corner = [int(rng.integers(0, edge - w + 1)) for edge, w in zip((width, height), window)]
    size = resized(window, scale)
    return resizing(window, size, corner) @ mirror @ turn, size


def random_colours(rng, p, gamma, brightness, channels):
    """The toolbox's ColorAug, with probability p: values of 0..255 to the power U(*gamma), times U(*brightness), times
    U(*channels) for each channel, cut at 255. -> gamma; the rest as an affine map (3, 4) of values of 0..1, as
    data.warp_images takes it. On values of 0..255, a power is mostly a change of brightness, by 255^(gamma - 1).
    """
    g, b, per_channel = rng.uniform(*gamma), rng.uniform(*brightness), rng.uniform(*channels, 3)
    if rng.random() >= p:
        return 1.0, np.eye(3, 4)
    return g, np.hstack([np.diag(255 ** (g - 1) * b * per_channel), np.zeros((3, 1))])


class DepthFrames(torch.utils.data.Dataset):
    """Pairs with all their randomness, by (epoch, index). `c` is finetune_depth.Config. A broken pair comes back as a
    BadInput.
    """

    def __init__(self, pairs, c):
        self.pairs, self.c = pairs, c

    def __len__(self):
        return len(self.pairs)

    def decoded(self, index):
        """Without what is drawn: image (H, W, 3) uint8, depth (H, W) int16 (of which 16 bits are meant), without the
        border.
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
        return sample | self.drawn(epoch, index, sample["image"].shape[1], sample["image"].shape[0])


def resident(dataset, batches, device):
    """Batches as runtime.stream makes them, from images and depths decoded once and kept on `device`, five bytes a
    pixel. Raises BadInput for a broken pair, and for images of different sizes, which have no place in one tensor.
    """
    decoded = runtime.ahead(dataset.decoded, range(len(dataset)), threads=os.cpu_count())
    for i, sample in enumerate(
        tqdm(decoded, "decoding", len(dataset), disable=len(dataset) < 1000, dynamic_ncols=True, mininterval=1)
    ):
        h, w = sample["depth"].shape
        if i == 0:
            height, width = h, w
            try:
                image = torch.empty(len(dataset), h, w, 3, dtype=torch.uint8, device=device)
                depth = torch.empty(len(dataset), h, w, dtype=torch.int16, device=device)
            except RuntimeError:  # of the GPU's memory, or the host's
                raise BadInput(
                    f"--resident: {len(dataset)} images of {w} x {h} take {len(dataset) * h * w * 5e-9:.0f} GB, which {device} does not have"
                ) from None
        if (h, w) != (height, width):
            first, other = dataset.pairs[0].image, dataset.pairs[i].image
            raise BadInput(
                f"{other}: --resident wants images of one size; of this one {w} x {h} pixels are used, of {first} {width} x {height}"
            )
        image[i], depth[i] = (
            torch.from_numpy(sample[key].copy()) for key in ("image", "depth")
        )  # torch wants them writable
    for keys in batches:
        batch = torch.utils.data.default_collate([dataset.drawn(epoch, i, width, height) for epoch, i in keys])
        at = batch["index"].to(device, non_blocking=True)
        yield batch | {
            "image": image[at].permute(0, 3, 1, 2),
            "depth": depth[at],
            "size": torch.tensor([[width, height]]).expand(len(keys), 2),
        }


# -----------------------------------------------------------------------------
# on the device


def warp_depth(depth, size, A, out_size):
    """The nearest pixel's depth under one affine a map, as data.warp_images moves its image. depth (B, H, W) integers
    on a shared canvas, size (B, 2) (width, height), A (B, 3, 3), out_size (width, height) -> (B, height, width), 0
    outside.
    """
    x, y, inside = data.source_pixels(A, size, out_size, depth.device)
    w, h = depth.shape[2], depth.shape[1]
    nearest = y.round().long().clamp_(0, h - 1) * w + x.round().long().clamp_(0, w - 1)
    return depth.flatten(1).gather(1, nearest.flatten(1)).view(nearest.shape) * inside


def augment(batch, scale, device):
    """A collated batch of DepthFrames to what the model reads, on `device`. scale: units per metre.

    -> dict: image (B, 3, H, W) float32 normalised; depth (B, H, W) float32 metres, 0 where nothing is known; index
    (B,).
    """
    out_size = batch["out_size"].amax(0).tolist()
    image = data.warp_images(
        batch["image"].to(device, non_blocking=True),
        batch["size"],
        batch["A"],
        batch["colour"],
        out_size,
        batch["gamma"],
    )
    depth = batch["depth"].to(device, non_blocking=True).int() & 0xFFFF
    return {
        "image": image,
        "depth": warp_depth(depth, batch["size"], batch["A"], out_size).float() / scale,
        "index": batch["index"],
    }
