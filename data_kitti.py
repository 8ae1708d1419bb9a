"""KITTI's layouts, calibration, labels and boxes, as they come: no info files, no reduced clouds.

Three layouts are understood, told apart by what the folder holds:

    object   ROOT/{training,testing}/{image_2,velodyne,calib}/000000.*, ROOT/ImageSets/{train,val,test,...}.txt
    raw      ROOT/DATE/DATE_drive_NNNN_sync/{image_02,velodyne_points}/data/*, ROOT/DATE/calib_*.txt
             (ROOT may also be one DATE folder, or one drive's folder)
    odometry ROOT/sequences/NN/{image_2,velodyne}/000000.*, ROOT/sequences/NN/calib.txt; SemanticKITTI's is the same
             (ROOT may also be the folder that holds their `dataset/`)

A split is a list ImageSets/NAME.txt: of frames in the object layout, of drives in the raw one, where none is needed. Of
sequences it is one of SEQUENCES, or a sequence's number.
"""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np

import data
import data_index
from files import IMAGES, BadInput, file_size, list_folder, read_lines, read_text

# range: the release's and KITTI's own; centre: its middle (release `points_center`); the LiDAR is 1.73 m above the road
RIG = data.Rig((0.0, -40.0, -3.0, 70.4, 40.0, 1.0), center=(35.2, 0.0, -1.0), ground=-1.7, box=(1242, 375))

# SemanticKITTI's splits (Behley et al. 2019); poses and labels are public of the first eleven sequences alone
SEQUENCES = {
    "train": ("00", "01", "02", "03", "04", "05", "06", "07", "09", "10"),
    "val": ("08",),
    "test": tuple(f"{i:02d}" for i in range(11, 22)),
}
# the raw drives that the first eleven are cut from (the readme of KITTI's odometry devkit)
DRIVES = (
    "10_03_drive_0027", "10_03_drive_0042", "10_03_drive_0034", "09_26_drive_0067", "09_30_drive_0016",
    "09_30_drive_0018", "09_30_drive_0020", "09_30_drive_0027", "09_30_drive_0028", "09_30_drive_0033",
    "09_30_drive_0034",
)  # fmt: skip

CAPITALS = "_ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of Waymo's cameras
CALIBRATIONS = 1000  # kept in each process: of the object layout every frame has its own

# (8, 3): length, height, width, from the middle of a box's bottom; y points down
CORNERS = np.array(np.meshgrid([-0.5, 0.5], [-1, 0], [-0.5, 0.5], indexing="ij")).reshape(3, 8).T
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

    def lidar2img(self):
        """As ObjectFrame's."""
        return read_raw_calib(*self.calib)


class OdometryFrame(data.Frame):
    """Of a sequence, which has one calib.txt. Its labels, if it is SemanticKITTI's, are of points and are not read."""

    def lidar2img(self):
        """As ObjectFrame's."""
        return read_odometry_calib(self.calib[0])


INDEXED = 10_000  # files of a folder from which on it has an index; fewer are looked at at every start
SAMPLED = 1000  # frames that are looked at again when there is an index; who asks for no more does not make one


class Source:
    """Frames of a folder of images and one of clouds, by their stems, for data.Frames: a cell is a row.

    calib: the files that the calibration of all is read from, or a folder of one for each. drive: of all, or a function
    of a stem. Names and bytes of files are arrays; where there are many frames, they come from `index`, a file.
    """

    def __init__(self, kind, prefix, images, clouds, calib, rig, drive, index):
        self.kind, self.prefix, self.images_folder, self.clouds_folder = kind, prefix, images, clouds
        self.calib, self.rig, self.drive = calib, rig, drive
        folders = [images, clouds] + ([] if isinstance(calib, tuple) else [calib])
        self.index, self.stamp = index, [[folder.name, *data_index.of_folder(folder)] for folder in folders]
        self.large = any(count >= INDEXED for _, _, count in self.stamp)
        found = data_index.find(index, self.stamp, self.fits) if self.large else None
        self.indexed = found is not None
        self.take(found or self.listed())

    def take(self, arrays):
        self.stem, self.suffix, self.link, self.size = (arrays[k] for k in ("stem", "suffix", "link", "size"))
        self.sorted = len(self.stem)

    def listed(self):
        """{name: array}, of all frames in order: stem, suffix (n, 2) of image and cloud, which is empty where there is
        none; link, is the image one?; size (n, 3) of image, cloud and calibration: -1, for it was not asked for.
        """
        found = {}
        for column, (folder, suffixes) in enumerate(((self.images_folder, IMAGES), (self.clouds_folder, (".bin",)))):
            for stem, (suffix, link) in files_in(folder, suffixes).items():
                row = found.setdefault(stem, [b"", b"", False])
                row[column] = suffix
                row[2] |= link and column == 0
        stems = sorted(found)
        rows = [found[stem] for stem in stems]
        return {
            "stem": np.array(stems, "S"),
            "suffix": np.array([row[:2] for row in rows], "S").reshape(-1, 2),
            "link": np.array([row[2] for row in rows], bool),
            "size": np.full((len(stems), 3), -1, np.int64),
        }

    def make_index(self):
        """Ask for all sizes, and keep them."""
        self.size[:, :] = [self.ask_sizes(row) for row in range(len(self.stem))]
        there = slice(self.sorted)  # not what lists name and no folder has
        arrays = {name: getattr(self, name)[there] for name in ("stem", "suffix", "link", "size")}
        data_index.keep(self.index, self.stamp, arrays)

    def fits(self, found):
        """Whether the sizes of some are as they were: a file that is written over leaves its folder's time as it is."""
        self.take(found)
        rows = np.unique(np.linspace(0, len(self.stem) - 1, SAMPLED).astype(int)) if len(self.stem) else []
        return all(self.size[row].tolist() == self.ask_sizes(row) for row in rows)

    def rows(self, stems):
        """Where these stand, (n,). Those that no file is of get rows at the end."""
        wanted = np.array([os.fsencode(stem) for stem in stems], "S")
        at, absent = np.zeros(len(wanted), int), np.ones(len(wanted), bool)
        if self.sorted:
            at = np.searchsorted(self.stem[: self.sorted], wanted).clip(max=self.sorted - 1)
            absent = self.stem[at] != wanted
        if absent.any():
            new, place = np.unique(wanted[absent], return_inverse=True)
            at[absent] = place + len(self.stem)
            self.stem = np.concatenate([self.stem, new])
            self.suffix = np.concatenate([self.suffix, np.full((len(new), 2), b"", self.suffix.dtype)])
            self.link = np.concatenate([self.link, np.zeros(len(new), bool)])
            self.size = np.concatenate([self.size, np.full((len(new), 3), -1)])
        return at

    def listed_rows(self, clouds):
        """Where those that have a cloud stand; an image, with clouds=False."""
        return np.flatnonzero(self.suffix[:, 1 if clouds else 0] != b"")

    def all_rows(self, clouds):
        """Where those that have an image or a cloud stand; an image, with clouds=False."""
        return np.arange(len(self.stem)) if clouds else self.listed_rows(False)

    # ---- what data.Frames asks for ----

    def paths(self, row):
        """Of image, cloud and calibration, or where they would lie."""
        stem = decode(self.stem[row])
        image, cloud = (decode(suffix) for suffix in self.suffix[row])
        calib = self.calib if isinstance(self.calib, tuple) else (self.calib / f"{stem}.txt",)
        return self.images_folder / f"{stem}{image or '.png'}", self.clouds_folder / f"{stem}{cloud or '.bin'}", calib

    def frame(self, row):
        stem = decode(self.stem[row])
        drive = self.drive(stem) if callable(self.drive) else self.drive
        return self.kind(f"{self.prefix}/{stem}", *self.paths(row), self.rig, drive)

    def names(self, cells):
        return [f"{self.prefix}/{decode(stem)}" for stem in self.stem[cells[:, 0]].tolist()]

    def images(self, cells):
        stems, suffixes = self.stem[cells[:, 0]].tolist(), self.suffix[cells[:, 0], 0].tolist()
        folder = os.path.realpath(self.images_folder)
        paths = [f"{folder}/{decode(stem)}{decode(suffix or b'.png')}" for stem, suffix in zip(stems, suffixes)]
        for i in np.flatnonzero(self.link[cells[:, 0]]):
            paths[i] = os.path.realpath(paths[i])
        return paths

    def sizes(self, cells):
        return self.sizes_of(cells[:, 0])[:, :2]

    def drives(self, cells):
        if not callable(self.drive):
            return {self.drive}
        return {self.drive(decode(stem)) for stem in self.stem[cells[:, 0]].tolist()}

    def sweeps(self, cells):
        return cells[:, 0]

    def sizes_of(self, rows):
        """(n, 3): 0 for a file that is missing, empty or none. Each is asked for once."""
        unknown = np.unique(rows[self.size[rows, 0] < 0])
        if self.large and not self.indexed and len(unknown) > SAMPLED:
            self.make_index()
        elif len(unknown):
            self.size[unknown] = [self.ask_sizes(row) for row in unknown.tolist()]
        return self.size[rows]

    def ask_sizes(self, row):
        image, cloud, calib = self.paths(row)
        return [file_size(image)[0], file_size(cloud)[0], min(file_size(path)[0] for path in calib)]

    def whole(self, cells, clouds):
        """Which of them have an image and a cloud that are not empty; an image, with clouds=False."""
        return (self.sizes(cells)[:, : 1 + clouds] > 0).all(1)

    def sound(self, cells, clouds):
        """Which of them no Frame.file_errors would find fault with."""
        size = self.sizes_of(cells[:, 0])
        if not clouds:
            return size[:, 0] > 0
        return (size > 0).all(1) & (size[:, 1] % (4 * self.rig.columns) == 0)


def decode(name):
    """os.fsdecode, at half its time."""
    return name.decode("utf-8", "surrogateescape")


def files_in(folder, suffixes):
    """{stem: (suffix, is it a link?)}, bytes, of the files in a folder that have one of the suffixes, in any case; of
    two with one stem the one whose suffix comes first. Those with a dot in front are left out, as in files.list_folder.
    """
    found, order = {}, {suffix.encode(): i for i, suffix in enumerate(suffixes)}
    try:
        with os.scandir(os.fsencode(folder)) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                rank = order.get(suffix.lower())
                if rank is None or entry.name.startswith(b"."):
                    continue
                if stem not in found or rank < order[found[stem][0].lower()]:
                    found[stem] = suffix, entry.is_symlink()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as e:
        raise BadInput(f"{folder}: not readable ({e.strerror})") from None
    return found


def frames_of(source, rows):
    """data.Frames of rows of one source."""
    return data.Frames([source], np.stack([np.zeros(len(rows), np.int32), np.asarray(rows, np.int32)], 1))


def find_frames(root, splits=None, frame_stride=1, skip_missing=False):
    """Frames of one root, as `pool_frames` finds them."""
    return pool_frames([root], splits, frame_stride, skip_missing)[0]


def pool_frames(
    roots,
    splits=None,
    frame_stride=1,
    skip_missing=False,
    flag="--splits",
    named=True,
    limit=0,
    clouds=True,
):
    """Frames of several roots, in file order, none of them twice. -> data.Frames, notes to print.

    splits: names of lists in ImageSets/. () takes all drives of a raw root, None also the list `train` of an object
    root. frame_stride keeps every n-th frame of a raw drive or sequence: neighbours are near copies of each other.
    skip_missing leaves out frames that lack an image or a cloud (raw drive 2011_09_26_drive_0009 lacks four clouds),
    and sequences that are not there. flag: what the splits were given with, for messages. named: as `fitting_splits`
    takes it. limit: at most so many, evenly spread, 0 for all; files of the others are not asked for, unless
    skip_missing has to. clouds=False: images are enough, and clouds and calibrations may be missing.
    Raises BadInput for a missing root, an unknown layout, a list that is missing or empty, a missing file, a truncated
    cloud.
    """
    parts, notes, what = [], [], " ".join([flag, *(splits or ())])
    for root, own, more in fitting_splits(roots, splits, named):
        notes += more
        found = list_frames(root, own, frame_stride, skip_missing, flag, clouds)
        if skip_missing:
            whole = _whole_frames(root, found, clouds)
            if len(whole) < len(found):
                lacking = "without image or cloud" if clouds else "without image"
                left_out = f"{len(found) - len(whole)} {lacking} left out"
                notes.append(f"note: {what}: {len(whole)} frames in {root}, {left_out}")
            found = whole
        parts.append(found)
    frames = data.join(parts)
    if not len(frames):
        raise BadInput(f"{' '.join(map(str, roots))}: no frames in it")
    frames, repeats = data.without_repeats(frames)
    frames = data.evenly_spread(frames, limit or len(frames))
    _check_files(frames, clouds)
    return frames, notes + data.note_repeats(repeats, what)


def _whole_frames(root, frames, clouds):
    """Those that have an image and a cloud; an image, with clouds=False. Raises BadInput if none has."""
    whole = frames.ask(lambda source, cells: source.whole(cells, clouds), bool)
    if len(frames) and not whole.any():
        both = f"both image ({', '.join(IMAGES)}) and cloud (.bin)"
        example = f"the first would be {frames[0].image} and {frames[0].cloud}"
        raise BadInput(f"{root}: none of its {len(frames)} frames has {both}; {example}")
    return frames[np.flatnonzero(whole)]


def _check_files(frames, clouds):
    """Raises BadInput for the first file that is missing, or empty, or cannot be what it should."""
    sound = frames.ask(lambda source, cells: source.sound(cells, clouds), bool)
    for i in np.flatnonzero(~sound):
        for error in frames[i].file_errors(clouds):
            raise error


def list_frames(root, splits=None, frame_stride=1, skip_missing=False, flag="--splits", clouds=True):
    """The frames that lists and folders name, whether or not all their files are there. clouds=False: folders of images
    alone. -> data.Frames

    Raises BadInput for a missing root, an unknown layout, a list that is missing or empty.
    """
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder")
    if sequences_of(root):
        return _odometry_frames(root, splits, frame_stride, skip_missing, flag, clouds)
    if not is_object_layout(root):
        return _raw_frames(_raw_drives(root, splits, flag, clouds), frame_stride, skip_missing, clouds)
    splits = ("train",) if splits is None else splits
    if not splits:
        raise BadInput(f"{flag}: none given for {root}; it takes names of lists in ImageSets/")
    sources = {}
    return data.join([_object_frames(root, split, splits, flag, sources, clouds) for split in splits])


def is_object_layout(root):
    return (Path(root) / "training").is_dir() or (Path(root) / "testing").is_dir()


def sequences_of(root):
    """The folder of an odometry root's sequences; None for a root of another layout."""
    places = Path(root) / "sequences", Path(root) / "dataset" / "sequences"
    return next((place for place in places if place.is_dir()), None)


def fitting_splits(roots, splits, named=True):
    """What of the splits applies to each of the roots: [(root, splits, notes to print)]. Raises BadInput.

    named: whether they were given for these roots, rather than taken over from a run on others. All of them must apply
    then. But if they were not, or if there is a root of another layout beside it, a raw root may have lists of some
    alone, and one without any gives all of its drives.
    """
    others = [root for root in roots if is_object_layout(root) or sequences_of(root)]
    strict, fitting = named and not others, []
    for root in roots:
        own, notes = splits, []
        if splits and not strict and root not in others:
            own = [split for split in splits if os.path.lexists(_listing(root, split))]
            if not own and (Path(root) / "ImageSets").is_dir():
                raise BadInput(f"{root}/ImageSets: no list of drives in it is called {' or '.join(splits)}")
            if not own:
                notes = [f"note: {root}: all of its drives are taken, for it has no lists of them in ImageSets/"]
        fitting.append((root, own, notes))
    return fitting


def _listing(root, split):
    return Path(root) / "ImageSets" / f"{split}.txt"


def rig_of(root):
    """The Rig of an object root: that of its rig.json, which data_waymo.py writes, or KITTI's. Raises BadInput."""
    path = Path(root) / "rig.json"
    if not path.is_file():
        return RIG
    try:
        fields = json.loads(read_text(path))
        return data.Rig(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
    except (AttributeError, TypeError, ValueError) as e:
        if isinstance(e, BadInput):
            raise
        raise BadInput(f"{path}: not a rig as data_waymo.py writes it") from None


def _segment(name):
    """The recording that a frame of data_waymo.py's is from, by its name SEGMENT_MICROSECONDS_CAMERA; else None."""
    head = name.rstrip(CAPITALS)  # by hand, for it is asked of all of them
    camera, time = name[len(head) :], head[-17:]
    is_waymo = len(camera) > 1 and camera[0] == "_" and len(head) > 17 and time[0] == "_" and time[1:].isdecimal()
    return head[:-17] if is_waymo else None


def _object_frames(root, split, splits, flag, sources, clouds):
    """sources: {folder: Source}, of the splits before."""
    folder = root / ("testing" if split == "test" else "training")
    if folder not in sources:
        drives = _object_drives(root) if folder.name == "training" else {}
        sources[folder] = Source(
            ObjectFrame,
            folder.name,
            folder / "image_2",
            folder / "velodyne",
            folder / "calib",
            rig_of(root),
            functools.partial(_drive_of, drives),
            root / f"{folder.name}.index",
        )
    source = sources[folder]
    return frames_of(source, _object_rows(root, split, splits, flag, folder, source, clouds))


def _drive_of(drives, stem):
    return drives.get(stem) or _segment(stem)


def _object_rows(root, split, splits, flag, folder, source, clouds):
    """Rows of a split's frames: of its list, or of the whole folder, for KITTI itself comes without lists."""
    listing = _listing(root, split)
    if os.path.lexists(listing):
        return source.rows([_frame_id(word) for _, word in _words(listing, split)])
    if split not in ("test", "trainval"):
        advice = "--splits trainval takes the whole training folder"
        if flag != "--splits":
            advice = f"{flag} without a name judges on none"
        raise BadInput(f"{listing}: missing; it lists the frames of {flag} {split}, one id a line ({advice})")
    rows = source.listed_rows(clouds)
    if not len(rows):
        part, suffixes = ("velodyne", (".bin",)) if clouds else ("image_2", IMAGES)
        kinds = ", ".join(f"*{suffix}" for suffix in suffixes)
        others = " ".join(other for other in splits if other != split)
        advice = f" ({flag} {others} does without)" if others else ""
        raise BadInput(f"{folder / part}: no {kinds} in it, of which {flag} {split} takes all{advice}")
    return rows


def _words(listing, split):
    """[(number of its line, word)] of a list. Raises BadInput for one without any."""
    lines = enumerate(read_lines(listing), start=1)
    words = [(number, word) for number, line in lines for word in line.split()]
    if not words:
        raise BadInput(f"{listing}: split '{split}' is empty")
    return words


def _frame_id(word):
    """Some lists hold names of files."""
    stem, suffix = os.path.splitext(word) if "." in word else (word, "")
    return stem if suffix.lower() in (*IMAGES, ".bin", ".txt") else word


def _object_drives(root):
    """{frame: drive} of the object layout's training folder, where a user put the `mapping` folder of KITTI's devkit.

    Line n of train_mapping.txt is a raw frame, and number i of train_rand.txt says which line frame i is, counted from
    1.
    """
    for folder in (root / "mapping", root / "devkit" / "mapping", root / "devkit_object" / "mapping"):
        mapping, order = folder / "train_mapping.txt", folder / "train_rand.txt"
        if mapping.is_file() and order.is_file():
            names = [line.split() for line in read_lines(mapping)]
            numbers = read_text(order).replace(",", " ").split()  # one word of 40,000 characters, in KITTI's own
            try:
                return {f"{i:06d}": names[int(n) - 1][1] for i, n in enumerate(numbers)}
            except (IndexError, ValueError):
                raise BadInput(f"{folder}: train_mapping.txt and train_rand.txt do not fit each other") from None
    return {}


def _raw_frames(drives, frame_stride, skip_missing, need_clouds):
    parts = []
    for drive in drives:
        images, clouds = drive / "image_02" / "data", drive / "velodyne_points" / "data"
        calib = (drive.parent / "calib_cam_to_cam.txt", drive.parent / "calib_velo_to_cam.txt")
        name = drive.absolute().name
        source = Source(RawFrame, name, images, clouds, calib, RIG, name, drive / "frames.index")
        counts = (source.suffix != b"").sum(0)
        if need_clouds and counts[0] != counts[1] and not skip_missing:
            raise BadInput(_uneven(drive, images, clouds, *counts))
        parts.append(frames_of(source, source.all_rows(need_clouds)[::frame_stride]))
    return data.join(parts)


def _odometry_frames(root, splits, frame_stride, skip_missing, flag, need_clouds):
    parts = []
    for folder in _listed_sequences(root, splits, skip_missing, flag):
        images, clouds, calib = folder / "image_2", folder / "velodyne", (folder / "calib.txt",)
        drive = _drive_of_sequence(folder.name)
        source = Source(OdometryFrame, folder.name, images, clouds, calib, RIG, drive, folder / "frames.index")
        counts = (source.suffix != b"").sum(0)
        if not counts[: 1 + need_clouds].all():
            raise BadInput(_uneven(folder, images, clouds, *counts))
        parts.append(frames_of(source, source.all_rows(need_clouds)[::frame_stride]))
    return data.join(parts)


def sequences_there(root):
    """Numbers of the sequences that an odometry root has. Raises BadInput for none."""
    place = sequences_of(root)
    there = [name for name in list_folder(place) if re.fullmatch(r"\d\d", name) and (place / name).is_dir()]
    if not there:
        raise BadInput(f"{place}: no sequence in it, a folder such as 00")
    return there


def _listed_sequences(root, splits, skip_missing, flag):
    """Folders of the sequences that the splits name, or of all. skip_missing leaves out those that are not there."""
    place, there, wanted = sequences_of(root), sequences_there(root), []
    for split in splits or ():
        if split not in SEQUENCES and not re.fullmatch(r"\d\d", split):
            raise BadInput(f"{flag} {split}: of {root} it must be {', '.join(SEQUENCES)}, or a sequence such as 04")
        wanted += SEQUENCES.get(split, (split,))
    lacking = [name for name in wanted if name not in there]
    if lacking and not skip_missing:
        of = f"{flag} {' '.join(splits)} asks for it; --skip-missing leaves out what is not there"
        raise BadInput(f"{place / lacking[0]}: missing ({of})")
    return [place / name for name in dict.fromkeys(wanted or there) if name in there]


def _drive_of_sequence(number):
    """The raw drive that a sequence is cut from, as its folder is called; of the later ones, which nobody has told, a
    name of its own.
    """
    return f"2011_{DRIVES[int(number)]}_sync" if int(number) < len(DRIVES) else f"sequence {number}"


def _uneven(drive, image_folder, cloud_folder, images, clouds):
    """What to say of a drive or sequence that has not as many images as clouds, or none."""
    if not images:
        return f"{image_folder}: no {', '.join(IMAGES)} in it, but there are {clouds} clouds"
    if not clouds:
        return f"{cloud_folder}: no .bin in it, but there are {images} images"
    return f"{drive}: {images} images but {clouds} clouds; --skip-missing keeps the frames that have both"


def _raw_drives(root, splits, flag, need_clouds):
    """Folders of all drives, or of those that the splits' lists name."""
    drives, sensor = [], "velodyne_points" if need_clouds else "image_02"
    for pattern in (sensor, f"*/{sensor}", f"*/*/{sensor}"):
        for found in root.glob(pattern):
            if not any(part.startswith(".") for part in found.relative_to(root).parts):
                drives.append(found.parent)
    if not drives:
        kitti = "KITTI object (training/, testing/) nor odometry (sequences/) nor raw (DATE/DATE_drive_NNNN_sync/)"
        raise BadInput(f"{root}: neither {kitti} nor nuScenes (v1.0-trainval/) lies here")
    drives.sort()
    return _listed_drives(root, splits, drives, flag) if splits else drives


def _listed_drives(root, splits, drives, flag):
    by_name = {_drive_name(drive.absolute()): drive for drive in drives}
    listed = []
    for split in splits:
        listing = _listing(root, split)
        if not os.path.lexists(listing):
            advice = " (--splits without a name takes all drives)" if flag == "--splits" else ""
            raise BadInput(f"{listing}: missing; it lists the drives of {flag} {split}, one a line{advice}")
        for number, word in _words(listing, split):
            if _drive_name(word) not in by_name:
                raise BadInput(f"{listing}: line {number}, {word!r}: no such drive in {root}")
            listed.append(by_name[_drive_name(word)])
    return listed


def _drive_name(path):
    """Lists give a drive with its date's folder or without, with _sync at its end or without."""
    return Path(path).name.removesuffix("_sync")


# -----------------------------------------------------------------------------
# calibration: lidar2img = P2 @ R0_rect @ Tr_velo_to_cam, of sequences P2 @ Tr


@functools.lru_cache(CALIBRATIONS)
def read_object_calib(path):
    """LiDAR metres to pixels of the left colour camera, float64 (3, 4), from an object frame's calib file."""
    calib = _read_calib(path)
    p2, r0 = _entry(path, calib, "P2", (3, 4)), _entry(path, calib, "R0_rect", (3, 3))
    return _projection(path, p2 @ _to_4x4(r0) @ _to_4x4(_entry(path, calib, "Tr_velo_to_cam", (3, 4))))


@functools.lru_cache(CALIBRATIONS)
def read_raw_calib(cam_to_cam, velo_to_cam):
    """The same from the two files of a day of raw drives."""
    cameras, velodyne = _read_calib(cam_to_cam), _read_calib(velo_to_cam)
    p2, r0 = _entry(cam_to_cam, cameras, "P_rect_02", (3, 4)), _entry(cam_to_cam, cameras, "R_rect_00", (3, 3))
    rotation, translation = _entry(velo_to_cam, velodyne, "R", (3, 3)), _entry(velo_to_cam, velodyne, "T", (3, 1))
    return _projection(cam_to_cam, p2 @ _to_4x4(r0) @ _to_4x4(np.hstack([rotation, translation])))


@functools.lru_cache(CALIBRATIONS)
def read_odometry_calib(path):
    """The same from the calib.txt of a sequence, whose Tr takes LiDAR metres to rectified camera 0."""
    calib = _read_calib(path)
    p2 = _entry(path, calib, "P2", (3, 4))
    if "Tr" not in calib:
        raise BadInput(f"{path}: no Tr in it; KITTI's archive of odometry calibration files has it, others do not")
    return _projection(path, p2 @ _to_4x4(_entry(path, calib, "Tr", (3, 4))))


def _read_calib(path):
    """{key: text} of the lines `key: numbers`. Raises BadInput for a key that is there twice, with other numbers."""
    calib = {}
    for number, line in enumerate(read_lines(path), start=1):
        key, colon, values = (part.strip() for part in line.partition(":"))
        if colon and calib.setdefault(key, values) != values:
            raise BadInput(f"{path}: line {number} gives another {key} than a line before it")
    return calib


def _entry(path, calib, key, shape):
    if key not in calib:
        raise BadInput(f"{path}: no {key} in it (but {', '.join(list(calib)[:9]) or 'nothing'})")
    try:
        matrix = np.array(calib[key].split(), np.float64).reshape(shape)
    except ValueError:
        raise BadInput(f"{path}: {key} is not {shape[0]}x{shape[1]} numbers") from None
    if not np.isfinite(matrix).all():
        raise BadInput(f"{path}: {key} holds NaN or infinite numbers")
    return matrix


def _projection(path, lidar2img):
    """lidar2img itself. Raises BadInput where it maps space to no plane."""
    if np.linalg.matrix_rank(lidar2img[:, :3]) < 3:
        raise BadInput(f"{path}: its matrices do not make a projection (singular)")
    return lidar2img


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
    for i, words in enumerate(map(str.split, read_lines(path)), start=1):
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
