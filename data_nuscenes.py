"""nuScenes as it comes: its tables, the keyframes of its six cameras with the LiDAR's, poses and labels.

    ROOT/{v1.0-trainval,v1.0-mini,v1.0-test}/*.json     tables
    ROOT/samples/CHANNEL/*                              images and clouds of the keyframes, two a second

Every pair of a sweep (LIDAR_TOP's cloud) and a camera is a `Frame`. A camera is triggered as the sweep passes it, so
both have an ego pose of their own, and points go to the image by way of the ground:

    lidar2img = K [camera <- ego] [ego, at the camera's time <- global] [global <- ego, at the LiDAR's] [ego <- LiDAR]

A Frame's points are those of the LiDAR, turned about its z so that the frame's camera looks along +x. Then a camera at
the rear is no special case: x is ahead of it, y to its left. `lidar2img`, boxes and velocities turn with the points.

The tables are large: trainval's sample_data has 2.6 million rows. They are read once, row by row, and what is needed of
them is kept in ROOT/VERSION.frames.index and, for who asks for labels, ROOT/VERSION.labels.index; the files' sizes in
ROOT/VERSION.sizes.index. The first two are made anew when one of their tables has another size or time, the last when a
folder of images or clouds has (data_index.py).

Facts: Caesar et al., nuScenes, CVPR 2020, and the conventions of its devkit. Quaternions are w, x, y, z.
"""

import dataclasses
import functools
import json
import operator
import os
import re
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import data
import data_index
from files import BadInput, file_size, why_unread

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_FRONT_LEFT")  # clockwise
LIDAR = "LIDAR_TOP"
CHANNELS = (LIDAR, *CAMERAS)

# what is detected, in the order of the channels of everybody's networks
CATEGORIES = {
    "car": ("vehicle.car",),
    "truck": ("vehicle.truck",),
    "trailer": ("vehicle.trailer",),
    "bus": ("vehicle.bus.bendy", "vehicle.bus.rigid"),
    "construction_vehicle": ("vehicle.construction",),
    "bicycle": ("vehicle.bicycle",),
    "motorcycle": ("vehicle.motorcycle",),
    "pedestrian": (
        "human.pedestrian.adult",
        "human.pedestrian.child",
        "human.pedestrian.construction_worker",
        "human.pedestrian.police_officer",
    ),
    "traffic_cone": ("movable_object.trafficcone",),
    "barrier": ("movable_object.barrier",),
}
CLASSES = tuple(CATEGORIES)
CLASS_OF = {category: CLASSES.index(name) for name, categories in CATEGORIES.items() for category in categories}
RACK = "static_object.bicycle_rack"
ATTRIBUTES = (
    "cycle.with_rider",
    "cycle.without_rider",
    "pedestrian.moving",
    "pedestrian.standing",
    "pedestrian.sitting_lying_down",
    "vehicle.moving",
    "vehicle.parked",
    "vehicle.stopped",
)

# numbers of the scenes of the devkit's splits, from first to last
SPLITS = {
    "train": """1-2 4-11 19-34 41-76 120-135 138-139 149-152 154-155 157-168 170-185 187-188 190-196 199-200 202-204
        206-214 218-220 222 224-264 283-306 315-318 321 323-324 328 347-386 388-403 405-408 410-459 461-465 467-469
        471-472 474-480 499-502 504-515 517-518 525-539 541-546 566 568 570-578 580 582-600 639-679 681 683-689 695-698
        700-701 703-719 726-728 730-731 733-741 744 746-747 749-752 757-765 767-769 786-787 789-792 803-806 808-813
        815-817 819-822 847-856 858 860-866 868-873 875-878 880 882-903 945 947 949 952-953 955-961 975-984 988-992
        994-1025 1044-1058 1074-1102 1104-1110""",
    "val": """3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775
        777-778 780-784 794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073""",
    "test": """77-91 111-119 140 142-148 265-266 279-282 307-314 333-343 481-498 547-551 601-604 606-624 827-831 833-842
        844-846 932-933 935-943 1026-1043""",
    "mini_train": "61 553 655 757 796 1077 1094 1100",
    "mini_val": "103 916",
}
VERSIONS = {  # the splits that each is made of
    "v1.0-trainval": ("train", "val"),
    "v1.0-mini": ("mini_train", "mini_val"),
    "v1.0-test": ("test",),
}

# as KITTI's range, about a LiDAR that stands .11 m higher; judged at 16 : 9 in whole strides
RIG = data.Rig((0.0, -40.0, -3.1, 70.4, 40.0, 0.9), center=(35.2, 0.0, -1.1), ground=-1.84, box=(1024, 576), columns=5)
OWN_CAR = 1.0  # metres about the LiDAR, seen from above: what returns from nearer is its own car
FULL_SCALE = 255  # of intensity

INDEXED = 10_000  # files that are asked for at once from which on their sizes are kept
SAMPLED = 1000  # of them are looked at again when there is an index
CHUNK = 2**24  # characters of a table that are looked at together; no row is longer
PIECE = 2**16  # rows that become arrays together
LONGEST = {True: 3.0, False: 1.5}  # seconds over which a velocity is taken: between both neighbours, or to one of them


# -----------------------------------------------------------------------------
# frames


@dataclass(frozen=True)
class Frame(data.Frame):
    """A camera's image at a keyframe, and the LiDAR's sweep of that keyframe."""

    tables: object = dataclasses.field(kw_only=True, repr=False, compare=False)  # Tables
    row: int = dataclasses.field(kw_only=True)  # of the sample, in the tables' arrays
    column: int = dataclasses.field(kw_only=True)  # of the camera, in CAMERAS

    suffixes = ()

    @property
    def token(self):
        """The sample that it is of, which results files name."""
        return self.tables.frames.sample[self.row].decode()

    @property
    def camera(self):
        return CAMERAS[self.column]

    @property
    def calibrations(self):
        return self.tables.folder / self.camera

    def turn(self):
        """The LiDAR's own frame to this one: a turn about z, (4, 4), that takes the camera's axis to +x."""
        x, y = self.tables.frames.lidar2cam[self.row, self.column, 2, :2]
        c, s = np.array([x, y]) / np.hypot(x, y)
        return np.array([[c, s, 0, 0], [-s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])

    def intrinsic(self):
        """The camera's axes (x right, y down, z ahead) to pixels, (3, 3)."""
        return self.tables.frames.intrinsic[self.row, self.column]

    def lidar2cam(self):
        """LiDAR metres, turned, to the camera's axes at the camera's time, (3, 4)."""
        return self.tables.frames.lidar2cam[self.row, self.column] @ self.turn().T

    def lidar2img(self):
        """LiDAR metres, turned, to pixels, float64 (3, 4)."""
        return self.intrinsic() @ self.lidar2cam()

    def lidar2global(self):
        """LiDAR metres, turned, to the frame that labels and results are in, (4, 4)."""
        return self.tables.frames.lidar2global[self.row] @ self.turn().T

    def read_points(self):
        """float32 (N, 4), turned, reflectance in [0, 1], without what the car itself reflects. Raises BadInput."""
        points = data.read_cloud(self.cloud, self.rig.columns, FULL_SCALE)
        points = points[np.hypot(points[:, 0], points[:, 1]) >= OWN_CAR]
        points[:, :2] = points[:, :2].astype(np.float64) @ self.turn()[:2, :2].T
        return points

    def labels(self):
        """All labelled objects about the car, seen by this camera or not. -> SimpleNamespace of arrays, n objects:

        boxes (n, 7) as ops_boxes has them, turned with the points; velocity (n, 2), metres a second, turned, NaN where
        the tables do not tell; kind (n,) of CLASSES; attribute (n,) of ATTRIBUTES, -1 for none; visibility (n,) in all
        cameras together, from 1 to 4, up to 40, 60, 80, 100 percent; lidar_points, radar_points (n,).
        """
        labels = self.tables.labels
        rows = slice(*labels.start[self.row : self.row + 2])
        found = {name: getattr(labels, name)[rows] for name in LABELS}
        chosen = found["kind"] >= 0
        found = SimpleNamespace(**{name: values[chosen] for name, values in found.items()})
        found.boxes, found.velocity = from_global(found, self.lidar2global())
        return found


LABELS = (
    "kind", "attribute", "visibility", "lidar_points", "radar_points", "translation", "size", "rotation", "velocity"
)  # fmt: skip


def find_frames(*args, **kwargs):
    """The frames of `pool_frames`, without its notes."""
    return pool_frames(*args, **kwargs)[0]


def pool_frames(
    roots,
    splits=("train",),
    cameras=CAMERAS,
    version="auto",
    frame_stride=1,
    skip_missing=False,
    flag="--splits",
    limit=0,
    clouds=True,
):
    """Frames of `splits` (of SPLITS) under each root, sample by sample in the tables' order. -> data.Frames, and notes
    to print.

    version: of the tables, a folder's name; auto takes the one that a split is of. frame_stride keeps every n-th
    sample; they are half a second apart. skip_missing leaves out frames that lack an image or a cloud. flag: what the
    splits were given with, for messages. limit, clouds: as data_kitti.pool_frames has them.
    Raises BadInput for an unknown split, camera or version, a split that is not of that version, a root or table that
    is missing, what is wrong within tables, a file that they name and that is not there, and where nothing is left.
    """
    unknown = [camera for camera in cameras if camera not in CAMERAS]
    if unknown or not cameras:
        raise BadInput(f"--cameras {' '.join(unknown)}: must be of {', '.join(CAMERAS)}")
    columns = [CAMERAS.index(camera) for camera in dict.fromkeys(cameras)]
    every, cells, notes = [], [], []
    for root in dict.fromkeys(roots):
        for split in dict.fromkeys(splits):
            tables = open_tables(root, version_of(root, split, version, flag))
            rows = tables.rows(split)[::frame_stride]
            grid = np.stack(np.meshgrid(rows, columns, indexing="ij"), -1).reshape(-1, 2)
            found = _on_disk(tables, grid, True, clouds) if skip_missing else grid
            if not len(found):
                raise BadInput(f"{tables.folder}: no frames of {flag} {split}{_of_many(tables, grid, clouds)}")
            if len(found) < len(grid):
                lacking = "image or cloud" if clouds else "image"
                left_out = f"{len(grid) - len(found)} without {lacking} left out"
                notes.append(f"note: {tables.folder}: {len(found)} frames of {flag} {split}, {left_out}")
            if tables not in every:
                every.append(tables)
            cells.append(np.insert(found, 0, every.index(tables), axis=1))
    if not cells:
        raise BadInput(f"{flag}: none given; it takes {', '.join(SPLITS)}")
    frames = data.Frames(every, np.concatenate(cells).astype(np.int32))
    frames = data.evenly_spread(frames, limit or len(frames))
    if not skip_missing:
        for tables, _, own in frames.parts():
            _on_disk(tables, own, False, clouds)
    return frames, notes


def list_frames(root, split, version="auto", frame_stride=1, flag="--splits"):
    """Frames of a split, of all cameras, that the tables name an image and a cloud of, be they there or not.

    Raises BadInput as pool_frames does, but for files.
    """
    tables = open_tables(root, version_of(root, split, version, flag))
    rows = tables.rows(split)[::frame_stride]
    cells = np.stack(np.meshgrid([0], rows, np.arange(len(CAMERAS)), indexing="ij"), -1).reshape(-1, 3)
    files = tables.frames.files
    named = (files[cells[:, 1], 0] != b"") & (files[cells[:, 1], 1 + cells[:, 2]] != b"")
    return data.Frames([tables], cells[named].astype(np.int32))


def splits_of(root):
    """Names of the splits that the tables under root have samples of."""
    there = [name for name in VERSIONS if (Path(root) / name).is_dir()]
    return [split for name in there for split in VERSIONS[name] if len(open_tables(root, name).rows(split))]


def _on_disk(tables, cells, skip_missing, clouds):
    """Those of the cells (n, 2), row and column, whose image and cloud are there; whose image is, with clouds=False.

    Raises BadInput for the first that is not, unless skip_missing.
    """
    missing = _missing(tables, cells, clouds)
    lacking = np.argwhere(missing)
    if len(lacking) and not skip_missing:
        i, k = lacking[0]
        row, column = cells[i]
        of = f"{(CAMERAS[column], LIDAR)[k]} of sample {tables.frames.sample[row].decode()}"
        if not tables.frames.files[row, (1 + column, 0)[k]]:
            raise BadInput(f"{tables.folder / 'sample_data.json'}: no keyframe of {of}; --skip-missing leaves it out")
        path = tables.paths(row, column)[k]
        wrong = file_size(path)[1]
        raise BadInput(f"{path}: {wrong} ({of}; --skip-missing leaves out frames without image or cloud)")
    return cells[~missing.any(1)]


def _missing(tables, cells, clouds):
    """Which files of cells (n, 2) are not there, (n, 2) bool: image, cloud; (n, 1), the image, with clouds=False."""
    return tables.sizes(cells)[:, : 1 + clouds] <= 0


def _of_many(tables, cells, clouds):
    """Words behind "no frames", of cells (n, 2) that all lack a file."""
    if not len(cells):
        return ""
    path = tables.paths(*cells[0])[_missing(tables, cells[:1], clouds)[0].argmax()]
    return f": all {len(cells)} lack their {'image or cloud' if clouds else 'image'}, the first one {path}"


# -----------------------------------------------------------------------------
# versions and splits


def scenes_of(split):
    """The names of a split's scenes."""
    names = []
    for words in SPLITS[split].split():
        first, _, last = words.partition("-")
        names += [f"scene-{i:04d}" for i in range(int(first), int(last or first) + 1)]
    return names


def version_of(root, split, version="auto", flag="--splits"):
    """The version, a folder of tables under root, that a split is read from. Raises BadInput."""
    if split not in SPLITS:
        raise BadInput(f"{flag} {split}: must be of {', '.join(SPLITS)}")
    if not Path(root).is_dir():
        raise BadInput(f"{root}: no such folder")
    own = next(name for name, splits in VERSIONS.items() if split in splits)
    there = sorted(path.name for path in Path(root).glob("v[0-9]*") if path.is_dir())
    chosen = own if version == "auto" else version
    if chosen not in there:
        wanted = f"of which {flag} {split} is" if version == "auto" else "which --version asks for"
        raise BadInput(f"{root}: no folder {chosen}, {wanted}; there is {', '.join(there) or 'none of any version'}")
    kind = next((name for name in VERSIONS if chosen.endswith(name.removeprefix("v1.0"))), None)
    if kind != own:
        splits = VERSIONS.get(kind, ())
        raise BadInput(
            f"{flag} {split}: not of --version {chosen}, whose splits are {', '.join(splits) or 'not known'}"
        )
    return chosen


class Tables:
    """What is needed of one version's tables, in arrays. N samples, S scenes:

    frames    scene (S,), log (S,) names; sample (N,) tokens, scene_of (N,), time (N,) microseconds;
              files (N, 7) names under ROOT, by CHANNELS, empty for none; ego (N, 3), the car in the global frame at the
              LiDAR's time; lidar2global (N, 4, 4), lidar2cam (N, 6, 3, 4), the latter between two times;
              intrinsic (N, 6, 3, 3)
    labels    start (N + 1,), where each sample's A annotations start; kind (A,) of CLASSES, or -1; rack (A,) whether of
              bicycles; translation, size (width, length, height), rotation (A, 3, 3, 4) in the global frame; velocity
              (A, 2), NaN where not known; attribute, visibility, lidar_points, radar_points (A,). They are read when
              first asked for: before processes are forked, ask.

    They are also a source of data.Frames: a cell is a sample's row and a camera's column.
    """

    def __init__(self, root, version):
        self.asked = root, version
        self.root, self.version, self.folder = Path(root), version, Path(root) / version
        self.calib = (self.folder / "calibrated_sensor.json",)
        self.size = None  # (N, 7), once many are asked for

    def __reduce__(self):
        """Frames go to other processes without a hundred megabytes of tables."""
        return open_tables, self.asked

    @functools.cached_property
    def frames(self):
        return _indexed(self, "frames", _read_frames, "scene log sample sample_data ego_pose calibrated_sensor sensor")

    @functools.cached_property
    def labels(self):
        tables = "sample sample_annotation instance category attribute visibility"
        return _indexed(self, "labels", functools.partial(_read_labels, frames=self.frames), tables)

    def rows(self, split):
        """Which samples are of a split."""
        wanted = np.isin(self.frames.scene, np.array(scenes_of(split), "S"))
        return np.flatnonzero(wanted[self.frames.scene_of])

    # ---- what data.Frames asks for ----

    def paths(self, row, column):
        """Of image and cloud."""
        image, cloud = self.frames.files[row, [1 + column, 0]].tolist()
        return self.root / image.decode(), self.root / cloud.decode()

    def frame(self, row, column):
        image, cloud = self.paths(row, column)
        drive = self.frames.log[self.frames.scene_of[row]].decode()
        place = {"tables": self, "row": row, "column": column}
        return Frame(image.name.rpartition(".")[0], image, cloud, self.calib, RIG, drive, **place)

    def names(self, cells):
        files = self.frames.files[cells[:, 0], 1 + cells[:, 1]].tolist()
        return [name.decode().rpartition("/")[2].rpartition(".")[0] for name in files]

    def sizes(self, cells):
        return np.stack([self.bytes_of(cells[:, 0], 1 + cells[:, 1]), self.bytes_of(cells[:, 0], 0 * cells[:, 1])], 1)

    def drives(self, cells):
        return {name.decode() for name in np.unique(self.frames.log[self.frames.scene_of[cells[:, 0]]]).tolist()}

    def sweeps(self, cells):
        return cells[:, 0]

    def bytes_of(self, rows, channels):
        """Bytes of files (n,), 0 for one that is missing, empty or not named. Many are asked of an index."""
        if self.size is None and len(rows) >= INDEXED:
            folders = [self.root / "samples" / name for name in CHANNELS]
            stamp = [[folder.name, *data_index.of_folder(folder)] for folder in folders]
            path = self.root / f"{self.version}.sizes.index"
            found = data_index.find(path, stamp, self.fits) or data_index.keep(path, stamp, self.all_bytes())
            self.size = found["size"]
        if self.size is not None:
            return self.size[rows, channels]
        return self.ask_bytes(rows, channels)

    def ask_bytes(self, rows, channels):
        names = self.frames.files[rows, channels].tolist()
        root = os.fsencode(self.root)
        return np.array([file_size(b"%s/%s" % (root, name))[0] if name else 0 for name in names], np.int64)

    def all_bytes(self):
        rows, channels = np.indices(self.frames.files.shape).reshape(2, -1)
        return {"size": self.ask_bytes(rows, channels).reshape(self.frames.files.shape)}

    def fits(self, found):
        """Whether the sizes of some are as they were, and of as many files."""
        if found["size"].shape != self.frames.files.shape:
            return False
        some = np.unique(np.linspace(0, found["size"].size - 1, SAMPLED).astype(int))
        rows, channels = np.unravel_index(some, found["size"].shape)
        return bool((found["size"][rows, channels] == self.ask_bytes(rows, channels)).all())


@functools.lru_cache(maxsize=4)
def open_tables(root, version):
    """Tables, the same when asked again."""
    return Tables(root, version)


# -----------------------------------------------------------------------------
# the index: tables are read once


def _indexed(tables, kind, read, names):
    """What read(folder) -> {name: array} reads, from the index where that is of these tables. -> SimpleNamespace."""
    path = tables.root / f"{tables.version}.{kind}.index"
    stamp = [[name, *_size_and_time(tables.folder / f"{name}.json")] for name in names.split()]
    return SimpleNamespace(**data_index.kept(path, stamp, lambda: read(tables.folder)))


def _size_and_time(path):
    try:
        status = path.stat()
    except OSError as e:
        raise BadInput(f"{path}: {why_unread(path, e, 'missing')}; it is a table of nuScenes") from None
    return status.st_size, status.st_mtime_ns


# -----------------------------------------------------------------------------
# reading tables


BETWEEN = re.compile(r"[\s,\[]*")  # rows


def read_rows(path):
    """The rows of a table, one after another: two million at once would be gigabytes. Raises BadInput for what is no
    table, or is cut off.
    """
    decoder = json.JSONDecoder()
    try:
        with open(path, encoding="utf-8") as file:
            text, place = file.read(CHUNK), 0
            is_list = text.lstrip().startswith("[")
            while is_list:
                place = BETWEEN.match(text, place).end()
                try:
                    row, place = decoder.raw_decode(text, place)
                except json.JSONDecodeError:  # the end of the text, mostly
                    more = file.read(CHUNK) if len(text) - place <= CHUNK else ""
                    if not more:
                        break
                    text, place = text[place:] + more, 0
                    continue
                yield row
    except OSError as e:
        raise BadInput(f"{path}: {why_unread(path, e)}") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not text") from None
    if not is_list or text[place:].strip() != "]":
        raise BadInput(f"{path}: cut off, or no table: near {text[place : place + 40]!r}")


def _columns(path, keep=None, **fields):
    """Fields of a table's rows, each as an array. keep(row): whether a row is wanted.

    fields: {name: dtype, or (dtype, function of the row's value)}. Raises BadInput for a row that lacks one.
    """
    pick = operator.itemgetter(*fields)
    kinds = [kind if isinstance(kind, tuple) else (kind, None) for kind in fields.values()]
    pieces, picked, number = [], [], -1

    def stack():
        columns = zip(*picked) if picked else [()] * len(fields)
        piece = []
        for values, (dtype, function) in zip(columns, kinds):
            piece.append(np.array([function(v) for v in values] if function else values, dtype))
        pieces.append(piece)
        picked.clear()

    try:
        for row in read_rows(path):
            number += 1
            if keep is None or keep(row):
                picked.append(pick(row))
            if len(picked) == PIECE:
                stack()
        if picked or not pieces:
            stack()
    except (KeyError, TypeError) as e:
        why = f"no {e}" if isinstance(e, KeyError) else "not as nuScenes has it"
        raise BadInput(f"{path}: row {number}: {why}") from None
    except (ValueError, OverflowError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{path}: at row {number} or before: a value is not as nuScenes has it ({e})") from None
    return SimpleNamespace(**{name: np.concatenate(column) for name, column in zip(fields, zip(*pieces))})


def _places(wanted, tokens, path, what, of):
    """Where each of the wanted tokens (n,) stands among `tokens` (m,): (n,). Raises BadInput for one that does not.

    path, what: the table that names it, and as what. of: the table that it should be in.
    """
    order = np.argsort(tokens)
    if not len(tokens):
        place = np.zeros(len(wanted), np.int64)
        absent = np.ones(len(wanted), bool)
    else:
        place = order[np.searchsorted(tokens, wanted, sorter=order).clip(max=len(tokens) - 1)]
        absent = tokens[place] != wanted
    if absent.any():
        raise BadInput(f"{path}: {what} {wanted[absent][0].decode()} is not in {of}.json")
    return place


def rotations(quaternions):
    """(n, 4) w, x, y, z of any length -> (n, 3, 3)."""
    q = quaternions.reshape(-1, 4)
    w, x, y, z = (q / np.linalg.norm(q, axis=1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _poses(t):
    """Rows with a rotation and a translation -> (n, 4, 4)."""
    out = np.zeros((len(t.rotation), 4, 4))
    out[:, :3, :3] = rotations(t.rotation)
    out[:, :3, 3] = t.translation.reshape(-1, 3)
    out[:, 3, 3] = 1
    return out


def _inverses(poses):
    """Of rigid motions (..., 4, 4)."""
    out = np.zeros_like(poses)
    back = poses[..., :3, :3].swapaxes(-1, -2)
    out[..., :3, :3] = back
    out[..., :3, 3] = -(back @ poses[..., :3, 3:])[..., 0]
    out[..., 3, 3] = 1
    return out


def _read_frames(folder):
    """{name: array} as Tables says, of `frames`."""
    table = {name: folder / f"{name}.json" for name in ("log", "scene", "sample", "sample_data", "ego_pose", "sensor")}
    calibrated = folder / "calibrated_sensor.json"
    log = _columns(table["log"], token="S", logfile="S")
    scene = _columns(table["scene"], token="S", name="S", log_token="S")
    sample = _columns(table["sample"], token="S", scene_token="S", timestamp=np.int64)
    sensor = _columns(table["sensor"], token="S", channel="S")
    intrinsic = (np.float64, lambda matrix: matrix or np.eye(3))  # a LiDAR has none
    pose = {"token": "S", "translation": np.float64, "rotation": np.float64}
    calib = _columns(calibrated, **pose, sensor_token="S", camera_intrinsic=intrinsic)

    of_sensor = _places(calib.sensor_token, sensor.token, calibrated, "sensor_token", "sensor")
    number = {name.encode(): i for i, name in enumerate(CHANNELS)}
    channel = np.array([number.get(name, -1) for name in sensor.channel.tolist()], np.int64)[of_sensor]  # of calib
    wanted = {token.decode() for token in calib.token[channel >= 0].tolist()}
    known = {token.decode() for token in calib.token.tolist()}

    def is_ours(row):
        token = row["calibrated_sensor_token"]
        if token not in known:
            raise BadInput(f"{table['sample_data']}: calibrated_sensor_token {token} is not in calibrated_sensor.json")
        return row["is_key_frame"] and token in wanted

    tokens = {"sample_token": "S", "ego_pose_token": "S", "calibrated_sensor_token": "S"}
    shot = _columns(table["sample_data"], is_ours, **tokens, filename="S")
    needed = {token.decode() for token in shot.ego_pose_token.tolist()}
    ego = _columns(table["ego_pose"], lambda row: row["token"] in needed, **pose)

    of_scene = _places(sample.scene_token, scene.token, table["sample"], "scene_token", "scene")
    of_log = _places(scene.log_token, log.token, table["scene"], "log_token", "log")
    row = _places(shot.sample_token, sample.token, table["sample_data"], "sample_token", "sample")
    of_ego = _places(shot.ego_pose_token, ego.token, table["sample_data"], "ego_pose_token", "ego_pose")
    of_calib = _places(
        shot.calibrated_sensor_token, calib.token, table["sample_data"], "calibrated_sensor_token", "calibrated_sensor"
    )

    N, column = len(sample.token), channel[of_calib]
    files = np.zeros((N, len(CHANNELS)), shot.filename.dtype)
    files[row, column] = shot.filename
    sensor2global = np.full((N, len(CHANNELS), 4, 4), np.nan)
    sensor2global[row, column] = _poses(ego)[of_ego] @ _poses(calib)[of_calib]
    intrinsics = np.full((N, len(CHANNELS), 3, 3), np.nan)
    intrinsics[row, column] = calib.camera_intrinsic.reshape(-1, 3, 3)[of_calib]
    car = np.full((N, 3), np.nan)
    swept = column == 0
    car[row[swept]] = ego.translation.reshape(-1, 3)[of_ego[swept]]
    lidar2cam = _inverses(sensor2global[:, 1:]) @ sensor2global[:, :1]
    return {
        "scene": scene.name,
        "log": log.logfile[of_log],
        "sample": sample.token,
        "scene_of": of_scene,
        "time": sample.timestamp,
        "files": files,
        "ego": car,
        "lidar2global": sensor2global[:, 0],
        "lidar2cam": lidar2cam[:, :, :3],
        "intrinsic": intrinsics[:, 1:],
    }


def _read_labels(folder, frames):
    """{name: array} as Tables says, of `labels`."""
    path = folder / "sample_annotation.json"
    category = _columns(folder / "category.json", token="S", name="S")
    attribute = _columns(folder / "attribute.json", token="S", name="S")
    instance = _columns(folder / "instance.json", token="S", category_token="S")
    first = ("S", lambda tokens: tokens[0] if tokens else "")
    a = _columns(
        path,
        token="S", sample_token="S", instance_token="S", prev="S", next="S", attribute_tokens=first,
        visibility_token=(np.int8, lambda token: int(token or 0)), num_lidar_pts=np.int32, num_radar_pts=np.int32,
        translation=np.float64, size=np.float64, rotation=np.float64,
    )  # fmt: skip
    translation = a.translation.reshape(-1, 3)
    row = _places(a.sample_token, frames.sample, path, "sample_token", "sample")
    of_instance = _places(a.instance_token, instance.token, path, "instance_token", "instance")
    of_category = _places(
        instance.category_token, category.token, folder / "instance.json", "category_token", "category"
    )
    name = category.name[of_category[of_instance]]
    kinds = np.array([CLASS_OF.get(n.decode(), -1) for n in category.name.tolist()], np.int8)
    numbers = {n.encode(): i for i, n in enumerate(ATTRIBUTES)}
    attributes = np.array([numbers.get(n, -1) for n in attribute.name.tolist()] + [-1], np.int8)
    # "" stands for no attribute
    tokens = np.append(attribute.token, np.array([b""], "S"))
    of_attribute = _places(a.attribute_tokens, tokens, path, "attribute_tokens", "attribute")

    # the velocity: from the neighbour before to the one behind, or from or to itself
    here = np.arange(len(row))
    ends = []
    for neighbour in (a.prev, a.next):
        has = neighbour != b""
        place = here.copy()
        place[has] = _places(neighbour[has], a.token, path, "prev or next", "sample_annotation")
        ends.append(place)
    seconds = 1e-6 * frames.time
    lasting = seconds[row[ends[1]]] - seconds[row[ends[0]]]
    longest = np.where((ends[0] != here) & (ends[1] != here), LONGEST[True], LONGEST[False])
    moved = (translation[ends[1]] - translation[ends[0]])[:, :2]
    known = (ends[0] != ends[1]) & (lasting <= longest)
    velocity = np.full_like(moved, np.nan)
    velocity[known] = moved[known] / lasting[known, None]

    order = np.argsort(row, kind="stable")  # within a sample as in the table: ties are broken by it
    found = {
        "kind": kinds[of_category[of_instance]],
        "rack": name == RACK.encode(),
        "translation": translation,
        "size": a.size.reshape(-1, 3),
        "rotation": a.rotation.reshape(-1, 4),
        "velocity": velocity,
        "attribute": attributes[of_attribute],
        "visibility": a.visibility_token,
        "lidar_points": a.num_lidar_pts,
        "radar_points": a.num_radar_pts,
    }
    start = np.searchsorted(row[order], np.arange(len(frames.sample) + 1))
    return {"start": start} | {key: values[order] for key, values in found.items()}


# -----------------------------------------------------------------------------
# boxes: the global frame has them upright, and so has a Frame, whose LiDAR leans by a degree or so


def headings(rotation):
    """Yaw (n,) of quaternions (n, 4): where the x axis points, seen from above."""
    ahead = rotations(rotation)[:, :2, 0]
    return np.arctan2(ahead[:, 1], ahead[:, 0])


def from_global(found, lidar2global):
    """Boxes (n, 7) of ops_boxes and velocities (n, 2) in the frame that lidar2global (4, 4) is from.

    found has translation (n, 3), size (n, 3), rotation (n, 4), velocity (n, 2), global. Centres move as points.
    Headings and velocities become the level directions that are seen as them from above: `to_global` is the inverse.
    """
    back = _inverses(lidar2global)
    centre = found.translation @ back[:3, :3].T + back[:3, 3]
    level = np.linalg.inv(lidar2global[:2, :2])
    yaw = headings(found.rotation)
    ahead = np.stack([np.cos(yaw), np.sin(yaw)], -1) @ level.T
    yaw = np.arctan2(ahead[:, 1], ahead[:, 0])
    width, length, height = found.size.T
    boxes = np.column_stack([centre, length, width, height, yaw])
    return boxes, found.velocity @ level.T


def to_global(boxes, velocity, lidar2global):
    """The inverse of `from_global`. -> SimpleNamespace of translation, size, rotation, velocity, as results have."""
    level = lidar2global[:2, :2]
    ahead = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], -1) @ level.T
    half = np.arctan2(ahead[:, 1], ahead[:, 0]) / 2
    zero = np.zeros_like(half)
    return SimpleNamespace(
        translation=boxes[:, :3] @ lidar2global[:3, :3].T + lidar2global[:3, 3],
        size=boxes[:, [4, 3, 5]],
        rotation=np.stack([np.cos(half), zero, zero, np.sin(half)], -1),
        velocity=velocity @ level.T,
    )
