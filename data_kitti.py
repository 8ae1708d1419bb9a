"""KITTI's layouts, calibration, labels and boxes, as they come: no info files, no reduced clouds.

Two layouts are understood, told apart by what the folder holds:

    object   ROOT/{training,testing}/{image_2,velodyne,calib}/000000.*, ROOT/ImageSets/{train,val,test,...}.txt
    raw      ROOT/DATE/DATE_drive_NNNN_sync/{image_02,velodyne_points}/data/*, ROOT/DATE/calib_*.txt
             (ROOT may also be one DATE folder, or one drive's folder)
"""

import functools
from pathlib import Path

import numpy as np

import data
from files import BadInput, read_text

# range: the release's and KITTI's own; centre: its middle (release `points_center`); the LiDAR is 1.73 m above the road
RIG = data.Rig((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), center=(35.2, 0.0, -1.0), ground=-1.7, box=(1242, 375))

CORNERS = (
    np.array(np.meshgrid([-0.5, 0.5], [-1, 0], [-0.5, 0.5], indexing="ij")).reshape(3, 8).T
)  # length, height, width
BOX_EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (CORNERS[a] != CORNERS[b]).sum() == 1])  # (12, 2)


# -----------------------------------------------------------------------------
# frames


class ObjectFrame(data.Frame):
    """Of the object layout: one calibration file, and a label where training/label_2 has one."""

    def lidar2img(self):
        """LiDAR metres to pixels of the left colour camera, float64 (3, 4). Raises BadInput."""
        return read_object_calib(self.calib[0])

    @property
    def label(self):
        """Where its label would lie."""
        return self.image.parents[1] / "label_2" / f"{self.cloud.stem}.txt"


class RawFrame(data.Frame):
    """Of a raw drive: calib_cam_to_cam.txt and calib_velo_to_cam.txt of its day. Raw drives have no labels."""

    label = None

    def lidar2img(self):
        """As ObjectFrame's."""
        return read_raw_calib(*self.calib)


def find_frames(root, splits=("train",), frame_stride=1, skip_missing=False):
    """All frames of `splits` under `root` (object layout), or of every drive under it (raw), in file order.

    frame_stride keeps every n-th frame of a raw drive: neighbours in a sequence are near copies of each other.
    skip_missing leaves out frames that lack an image or a cloud (raw drive 2011_09_26_drive_0009 lacks four clouds).
    Raises BadInput for a missing root, an unknown layout, an empty split, a missing file, a truncated cloud.
    """
    frames = list_frames(root, splits, frame_stride, skip_missing)
    if skip_missing:
        frames = [f for f in frames if f.image.exists() and f.cloud.exists()]
    for frame in frames:
        for error in frame.file_errors():
            raise error
    if not frames:
        where = f"splits {', '.join(splits)}" if is_object_layout(root) else "it"
        raise BadInput(f"{root}: no frames in {where}")
    return frames


def list_frames(root, splits=("train",), frame_stride=1, skip_missing=False):
    """The frames that lists and folders name, whether or not all their files are there.

    Raises BadInput for a missing root, an unknown layout, an empty split.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder")
    if is_object_layout(root):
        return [frame for split in splits for frame in _object_frames(root, split)]
    return _raw_frames(root, frame_stride, skip_missing)


def is_object_layout(root):
    return (Path(root) / "training").is_dir() or (Path(root) / "testing").is_dir()


def _object_frames(root, split):
    folder = root / ("testing" if split == "test" else "training")
    listing = root / "ImageSets" / f"{split}.txt"
    if listing.is_file():
        ids = read_text(listing).split()
    elif split in ("test", "trainval"):  # the whole folder; KITTI itself comes without ImageSets
        ids = sorted(p.stem for p in (folder / "velodyne").glob("*.bin"))
    else:
        advice = "--splits trainval takes the whole training folder"
        raise BadInput(f"{listing}: missing; it lists the frames of split '{split}', one id a line ({advice})")
    if not ids:
        raise BadInput(f"{listing}: split '{split}' is empty")
    drives = _object_drives(root) if folder.name == "training" else {}
    frames = []
    for i in ids:
        image, cloud = _png_or_jpg(folder / "image_2" / i), folder / "velodyne" / f"{i}.bin"
        calib = (folder / "calib" / f"{i}.txt",)
        frames.append(ObjectFrame(f"{folder.name}/{i}", image, cloud, calib, RIG, drives.get(i)))
    return frames


def _object_drives(root):
    """{frame: drive} of the object layout's training folder, where a user put the `mapping` folder of KITTI's devkit.

    Line n of train_mapping.txt is a raw frame, and number i of train_rand.txt says which line frame i is, counted from
    1.
    """
    for folder in (root / "mapping", root / "devkit" / "mapping", root / "devkit_object" / "mapping"):
        mapping, order = folder / "train_mapping.txt", folder / "train_rand.txt"
        if mapping.is_file() and order.is_file():
            try:
                drives = [line.split()[1] for line in read_text(mapping).splitlines()]
                lines = read_text(order).replace(",", " ").split()
                return {f"{i:06d}": drives[int(n) - 1] for i, n in enumerate(lines)}
            except (IndexError, ValueError):
                raise BadInput(f"{folder}: train_mapping.txt and train_rand.txt do not fit each other") from None
    return {}


def _raw_frames(root, frame_stride, skip_missing):
    patterns = ("velodyne_points", "*/velodyne_points", "*/*/velodyne_points")
    drives = sorted(p.parent for pattern in patterns for p in root.glob(pattern))
    if not drives:
        layouts = "KITTI object (training/, testing/) nor KITTI raw (DATE/DATE_drive_NNNN_sync/)"
        raise BadInput(f"{root}: neither {layouts} lies here")
    frames = []
    for drive in drives:
        clouds = {p.stem for p in (drive / "velodyne_points" / "data").glob("*.bin")}
        images = {p.stem for p in (drive / "image_02" / "data").glob("*") if p.suffix in (".png", ".jpg")}
        if len(clouds) != len(images) and not skip_missing:
            counts = f"{len(images)} images but {len(clouds)} clouds"
            raise BadInput(f"{drive}: {counts}; --skip-missing keeps the frames that have both")
        calib = (drive.parent / "calib_cam_to_cam.txt", drive.parent / "calib_velo_to_cam.txt")
        for i in sorted(clouds | images)[::frame_stride]:
            image = _png_or_jpg(drive / "image_02" / "data" / i)
            cloud = drive / "velodyne_points" / "data" / f"{i}.bin"
            frames.append(RawFrame(f"{drive.name}/{i}", image, cloud, calib, RIG, drive.name))
    return frames


def _png_or_jpg(stem):
    jpg = stem.with_name(stem.name + ".jpg")
    return jpg if jpg.exists() else stem.with_name(stem.name + ".png")


# -----------------------------------------------------------------------------
# calibration: lidar2img = P2 @ R0_rect @ Tr_velo_to_cam


@functools.cache
def read_object_calib(path):
    """LiDAR metres to pixels of the left colour camera, float64 (3, 4), from an object frame's calib file."""
    calib = _read_calib(path)
    p2, r0 = _entry(path, calib, "P2", (3, 4)), _entry(path, calib, "R0_rect", (3, 3))
    return p2 @ _to_4x4(r0) @ _to_4x4(_entry(path, calib, "Tr_velo_to_cam", (3, 4)))


@functools.cache
def read_raw_calib(cam_to_cam, velo_to_cam):
    """The same from the two files of a day of raw drives."""
    cameras, velodyne = _read_calib(cam_to_cam), _read_calib(velo_to_cam)
    p2, r0 = _entry(cam_to_cam, cameras, "P_rect_02", (3, 4)), _entry(cam_to_cam, cameras, "R_rect_00", (3, 3))
    rotation, translation = _entry(velo_to_cam, velodyne, "R", (3, 3)), _entry(velo_to_cam, velodyne, "T", (3, 1))
    return p2 @ _to_4x4(r0) @ _to_4x4(np.hstack([rotation, translation]))


def _read_calib(path):
    return dict(line.split(":", 1) for line in read_text(path).splitlines() if ":" in line)


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


def split_projection(frame):
    """P2 (3, 4), and LiDAR to rectified camera 0 (3, 4), of an object frame; their product is its lidar2img."""
    path = frame.calib[0]
    p2 = _entry(path, _read_calib(path), "P2", (3, 4))
    rest = frame.lidar2img().copy()
    rest[:, 3] -= p2[:, 3]
    return p2, np.linalg.solve(p2[:, :3], rest)


# -----------------------------------------------------------------------------
# labels


def read_labels(path, dont_care=False):
    """KITTI's label_2. dont_care: with regions of that type. -> types (n,) and numbers float64 (n, 14).

    The numbers are truncated, occluded, alpha, left, top, right, bottom, h, w, l, x, y, z, ry: pixels, metres and
    radians, of camera 0, rectified. Raises BadInput for a line that is no label.
    """
    types, numbers = [], []
    for i, words in enumerate(map(str.split, read_text(path).splitlines()), start=1):
        try:
            values = [float(word) for word in words[1:15]]
        except ValueError:
            values = []
        if words and (len(values) < 14 or not np.isfinite(values).all()):
            raise BadInput(f"{path}: line {i} is no label (a type and 14 numbers)")
        if words and (dont_care or words[0] != "DontCare"):
            types.append(words[0])
            numbers.append(values)
    return np.array(types), np.array(numbers).reshape(-1, 14)


def box_axes(label):
    """(3, 3): columns are a box's length, height and width in the camera's axes."""
    c, s = np.cos(label[13]), np.sin(label[13])
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def box_corners(label):
    """(8, 3) metres, rectified camera 0."""
    return CORNERS * label[[9, 7, 8]] @ box_axes(label).T + label[10:13]
