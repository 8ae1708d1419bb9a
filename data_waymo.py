"""Waymo Open Dataset 2.0 (Parquet) to KITTI's object layout, which every command here reads.

    python data_waymo.py convert --root waymo_v2 --out data/waymo                  # front camera, one frame in five
    python data_waymo.py convert --root waymo_v2 --out data/waymo --check          # is it what the source gives?
    python data_waymo.py convert --root waymo_v2 --out data/waymo_all --every 1 --cameras FRONT FRONT_LEFT FRONT_RIGHT
    python data_waymo.py convert --root waymo_v2 --out data/waymo_360 --whole --elongation      # for detection

ROOT/{training,validation,testing}/TABLE/SEGMENT.parquet becomes, for each frame and camera,

    OUT/training/image_2/ID.jpg     Waymo's bytes                    (OUT/testing for segments of testing)
                 velodyne/ID.bin    float32 x, y, z, reflectance[, elongation] of all five LiDARs and both returns
                 calib/ID.txt       KITTI's; Tr_imu_to_velo is "vehicle to cloud"
                 label_2/ID.txt     KITTI's, of types Vehicle, Pedestrian, Sign, Cyclist
                 truth/ID.bin       the same objects as Waymo's metric wants them (eval_waymo.read_objects)
                 no_label/ID.bin    float32 x, y, z: the points in no-label zones, where there are any
    OUT/ImageSets/{train,val,test,trainval}.txt, OUT/rig.json (data.Rig), OUT/conversion.json (what it was made with)
    OUT/segments/SPLIT/SEGMENT.txt  the ids of a segment that is done

An ID is SEGMENT_TIMESTAMP_CAMERA: nothing else is needed to find a frame again, or to convert on many machines.

A cloud is in the vehicle's frame, turned about z so that its camera looks along +x: z = 0 is the road, and the origin
is near the rear axle. Calibrations hold the car's motion between the time of the cloud and that of the image. They have
no lens distortion, which moves a pixel by 3 of 1920 on average, and by up to 31 in a corner.

Formats and formulas: waymo-research/waymo-open-dataset (v2 components, utils/range_image_utils.py). It takes pyarrow.
Wrong input raises `BadInput`, one line that names the file or the flag.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import dataclasses
import json
import multiprocessing
import os
import threading
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import eval_waymo
import ops_boxes
import runtime
from files import BadInput, disk_errors, read_text, remove_stale, writing

try:
    import pyarrow
    from pyarrow import parquet
except ImportError:
    pyarrow = parquet = None

CAMERAS = {"FRONT": 1, "FRONT_LEFT": 2, "FRONT_RIGHT": 3, "SIDE_LEFT": 4, "SIDE_RIGHT": 5}
TOP = 1  # the LiDAR whose pixels have poses of their own
SPLITS = {"training": ("training", "train"), "validation": ("training", "val"), "testing": ("testing", "test")}

STALE = 3600  # seconds: no file takes so long to write, on any of the machines that convert into one folder

# What lies before the camera, of the range that is usual for detection on Waymo (mmdetection3d: 76.8 m, 51.2 m; z from
# -2 to 4). z = 0 is the road. Half of a front image's edges
RIG = data.Rig((0.0, -51.2, -2.0, 76.8, 51.2, 4.0), center=(38.4, 0.0, 1.0), ground=0.0, box=(960, 640))

# Waymo's camera axes (x ahead, y left, z up) to KITTI's (x right, y down, z ahead)
AXES = np.array([[0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
GRID = np.stack(np.meshgrid(*[np.linspace(-0.5, 0.5, 5)] * 3), -1).reshape(-1, 3)  # points of a box, corners included


# -----------------------------------------------------------------------------
# reading Parquet

COMPONENTS = {
    "camera_image": "CameraImageComponent",
    "camera_calibration": "CameraCalibrationComponent",
    "lidar": "LiDARComponent",
    "lidar_calibration": "LiDARCalibrationComponent",
    "lidar_pose": "LiDARPoseComponent",
    "vehicle_pose": "VehiclePoseComponent",
    "lidar_box": "LiDARBoxComponent",
}
STAMP = "key.frame_timestamp_micros"
ROWS = 5  # read at once: a frame of five LiDARs, 20 MB


@contextlib.contextmanager
def opened(path):
    """A Parquet file. Raises BadInput, naming it, for whatever goes wrong while it is read."""
    try:
        # with small reads a process needs 0.4 GB, by default 1.5 GB more, and is no faster
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise BadInput(f"{path}: missing") from None
    except (pyarrow.ArrowException, OSError) as e:
        first = str(e).strip().splitlines()[0]
        raise BadInput(f"{path}: not a whole Parquet file ({first})") from None


def full_names(file, path, names):
    """Columns as the file calls them: those of keys stand as they are. Raises BadInput for one that it lacks."""
    component = COMPONENTS[path.parent.name]
    full = [n if n.startswith("key.") else f"[{component}].{n}" for n in names]
    missing = [n for n in full if n not in file.schema_arrow.names]
    if missing:
        raise BadInput(f"{path}: no column {missing[0]}")
    return full


def read_columns(path, names):
    """A small table whole: {name: array of one row a row}; lists of numbers are rows of an array, or None."""
    with opened(path) as file:
        full = full_names(file, path, names)
        table = file.read(columns=full, use_threads=False)
    lists = pyarrow.types.is_fixed_size_list
    values = {}
    for name, column in zip(names, map(table.column, full)):
        rows = column.to_pylist() if lists(column.type) else column.to_numpy(zero_copy_only=False)
        values[name] = np.array(rows)
    return values


def frames_of(path, names, wanted):
    """A large table frame by frame: yields (timestamp, [{name: value}, one a row]) for timestamps in `wanted`, as soon
    as all rows of one were read. In a file in order of time, that needs the memory of a frame or two."""
    with opened(path) as file:
        full = full_names(file, path, names)
        left = Counter(file.read(columns=[STAMP], use_threads=False).column(0).to_pylist())
        rows = defaultdict(list)
        for batch in file.iter_batches(ROWS, columns=[STAMP, *full], use_threads=False):
            columns = [batch.column(n) for n in full]
            for i, stamp in enumerate(batch.column(STAMP).to_pylist()):
                if stamp not in wanted:
                    continue
                rows[stamp].append({n: column[i] for n, column in zip(names, columns)})
                left[stamp] -= 1
                if not left[stamp]:
                    yield stamp, rows.pop(stamp)


def side_by_side(tables, stamps):
    """Several of `frames_of` at once, {path: names}: yields (timestamp, [rows of each]) in the order of `stamps`.
    Raises BadInput for a table that lacks a frame."""
    streams = {path: frames_of(path, names, set(stamps)) for path, names in tables.items()}
    waiting = {path: {} for path in tables}
    for stamp in stamps:
        for path, stream in streams.items():
            while stamp not in waiting[path]:
                found, rows = next(stream, (None, None))
                if found is None:
                    raise BadInput(f"{path}: no rows of frame {stamp}")
                waiting[path][found] = rows
        yield stamp, [waiting[path].pop(stamp) for path in tables]


def as_image(path, values, shape, channels):
    """A range image, or one of poses, (H, W, channels), of the list of its numbers and its shape: pyarrow's scalars."""
    shape = tuple(shape.as_py() or ())
    values = values.values.to_numpy(zero_copy_only=False) if values.is_valid else np.zeros(0)
    if len(shape) != 3 or shape[2] != channels or np.prod(shape) != len(values):
        raise BadInput(f"{path}: an image of {len(values)} numbers, not {shape} with {channels} channels")
    return values.reshape(shape)


# -----------------------------------------------------------------------------
# points


def beam_angles(low, high, values, rows):
    """Elevation of each row of a range image, radians, the first row's first: the highest.

    values: of the rows, lowest first; without them they are spread evenly between low and high.
    """
    if values is None:
        values = low + (np.arange(rows) + 0.5) / rows * (high - low)
    return np.asarray(values, np.float64)[::-1]


def to_points(image, beams, extrinsic, poses=None, vehicle_from_world=None):
    """Points of a range image in the vehicle's frame at the time of the frame.

    image (H, W, 4): range in metres (missing where <= 0), intensity, elongation, 1 in a no-label zone; beams (H,) of
    `beam_angles`; extrinsic (4, 4): laser to vehicle. poses (H, W, 6): roll, pitch, yaw, x, y, z, vehicle to world at
    the time of each pixel; vehicle_from_world (4, 4) at the time of the frame: with them the car's motion during the
    sweep is taken out.
    -> (n, 6) float64: x, y, z, intensity, elongation, in a no-label zone; row by row.

    In float64: world coordinates of 1e4 m leave float32, in which Waymo's own code computes, 1 cm.
    """
    row, column = np.nonzero(image[..., 0] > 0)
    pixel = image[row, column].astype(np.float64)
    width = image.shape[1]
    azimuth = ((width - column - 0.5) / width * 2 - 1) * np.pi - np.arctan2(extrinsic[1, 0], extrinsic[0, 0])
    beam = beams[row]
    level = np.cos(beam) * pixel[:, 0]
    xyz = np.stack([np.cos(azimuth) * level, np.sin(azimuth) * level, np.sin(beam) * pixel[:, 0]], -1)
    xyz = move(xyz, extrinsic)
    if poses is not None:
        roll, pitch, yaw, *place = poses[row, column].astype(np.float64).T
        x, y, z = xyz.T
        c, s = np.cos(roll), np.sin(roll)
        y, z = c * y - s * z, s * y + c * z
        c, s = np.cos(pitch), np.sin(pitch)
        x, z = c * x + s * z, c * z - s * x
        c, s = np.cos(yaw), np.sin(yaw)
        x, y = c * x - s * y, s * x + c * y
        xyz = move(np.stack([x, y, z], -1) + np.stack(place, -1), vehicle_from_world)
    return np.column_stack([xyz, pixel[:, 1:3], pixel[:, 3] > 0])


def move(points, matrix):
    """points (N, 3) by a (4, 4)."""
    return points @ matrix[:3, :3].T + matrix[:3, 3]


LIDAR = ["key.laser_name"]
LIDAR += [f"range_image_return{i}.{part}" for i in (1, 2) for part in ("values", "shape")]
POSES = ["range_image_return1.values", "range_image_return1.shape"]


def sweep(rows, pose_rows, lasers, vehicle_from_world, lidar_path, pose_path):
    """All points of a frame, of all LiDARs in order and of both returns, as `to_points` has them.

    rows: of the table lidar; pose_rows: of lidar_pose; lasers: {number: (extrinsic, low, high, beams)}.
    """
    numbers = [row[LIDAR[0]].as_py() for row in rows]
    for number in {TOP, *numbers}:
        if number not in numbers or number not in lasers:
            raise BadInput(f"{lidar_path}: LiDAR {number} is not both in a frame and in lidar_calibration")
    poses = as_image(pose_path, *(pose_rows[0][name] for name in POSES), 6)
    points = []
    for number, row in sorted(zip(numbers, rows), key=lambda pair: pair[0]):
        extrinsic, *angles = lasers[number]
        for values, shape in (LIDAR[1:3], LIDAR[3:5]):
            if not row[values].is_valid:
                continue
            image = as_image(lidar_path, row[values], row[shape], 4)
            beams = beam_angles(*angles, len(image))
            if len(beams) != len(image):
                raise BadInput(f"{lidar_path}: {len(image)} rows of LiDAR {number}, but it has {len(beams)} beams")
            if number == TOP and poses.shape[:2] != image.shape[:2]:
                raise BadInput(f"{pose_path}: {poses.shape[:2]} poses of {image.shape[:2]} pixels")
            motion = (poses, vehicle_from_world) if number == TOP else ()
            points.append(to_points(image, beams, extrinsic, *motion))
    return np.concatenate(points)


# -----------------------------------------------------------------------------
# one frame of one camera, as KITTI has it


@dataclass(frozen=True)
class View:
    """How a cloud and an image belong together."""

    cloud_from_vehicle: np.ndarray  # (4, 4): a turn about z
    camera_from_cloud: np.ndarray  # (4, 4): to KITTI's camera (x right, y down, z ahead) at the time of the image
    projection: np.ndarray  # (3, 4): from there to pixels, (0, 0) the centre of the first
    width: int
    height: int

    @property
    def lidar2img(self):
        return self.projection @ self.camera_from_cloud


def make_view(extrinsic, intrinsic, size, motion):
    """extrinsic (4, 4): camera (x ahead) to vehicle; intrinsic: f_u, f_v, c_u, c_v, of pixels counted from the image's
    edge; motion (4, 4): the vehicle's frame at the time of the cloud to that at the time of the image."""
    ahead = np.hypot(extrinsic[0, 0], extrinsic[1, 0])
    c, s = extrinsic[0, 0] / ahead, extrinsic[1, 0] / ahead
    turn = np.eye(4)
    turn[:2, :2] = [[c, s], [-s, c]]
    fu, fv, cu, cv = intrinsic
    projection = np.array([[fu, 0, cu - 0.5, 0], [0, fv, cv - 0.5, 0], [0, 0, 1.0, 0]])
    return View(turn, AXES @ np.linalg.inv(extrinsic) @ motion @ turn.T, projection, *size)


def calib_text(view):
    """KITTI's calibration file. All four cameras are this one; the IMU is the vehicle."""
    matrices = dict.fromkeys(("P0", "P1", "P2", "P3"), view.projection)
    matrices |= {"R0_rect": np.eye(3), "Tr_velo_to_cam": view.camera_from_cloud[:3]}
    matrices |= {"Tr_imu_to_velo": view.cloud_from_vehicle[:3]}
    lines = [f"{name}: " + " ".join(f"{x:.12e}" for x in matrix.ravel()) for name, matrix in matrices.items()]
    return "\n".join(lines) + "\n"


def label_text(view, types, levels, boxes):
    """KITTI's label file. boxes (n, 7) in the cloud's frame.

    truncated is the share of the box outside the image. occluded, which Waymo does not tell, is 0 at its difficulty 1
    and 2 at 2. A box that the image shows nothing of has a rectangle of zeros.
    """
    labels = ops_boxes.box_to_label(boxes, view.camera_from_cloud)  # (n, 7): h, w, l, x, y, z, ry
    alpha = labels[:, 6] - np.arctan2(labels[:, 3], labels[:, 5])
    alpha = np.remainder(alpha + np.pi, 2 * np.pi) - np.pi
    seen = seen_share(view, boxes)
    rects = rectangles(view, boxes) * (seen > 0)[:, None]
    lines = []
    for i, (kind, level) in enumerate(zip(types, levels)):
        numbers = [alpha[i], *rects[i], *labels[i]]
        columns = [eval_waymo.TYPES[kind].title(), f"{1 - seen[i]:.2f}", "0" if level == 1 else "2"]
        lines.append(" ".join([*columns, *(f"{x:.4f}" for x in numbers)]) + "\n")
    return "".join(lines)


def seen_share(view, boxes):
    """The share of each of boxes (n, 7) that lies before the image, occluded or not: (n,)."""
    c, s = np.cos(boxes[:, 6, None]), np.sin(boxes[:, 6, None])
    ahead, left, up = np.moveaxis(GRID * boxes[:, None, 3:6], -1, 0)  # (n, 125)
    points = np.stack([c * ahead - s * left, s * ahead + c * left, up], -1) + boxes[:, None, :3]
    uv, depth = data.project(points, view.lidar2img)
    return data.inside_image(uv, depth, view.width, view.height).mean(1)


def rectangles(view, boxes):
    """What boxes (n, 7) cover of the image: (n, 4) left, top, right, bottom. Corners behind the camera count as if they
    were a centimetre before it."""
    uvw = ops_boxes.corners(boxes) @ view.lidar2img[:, :3].T + view.lidar2img[:, 3]
    uv = uvw[..., :2] / np.maximum(uvw[..., 2:], 0.01)
    return np.concatenate([uv.min(1), uv.max(1)], -1).clip(0, np.tile([view.width - 1, view.height - 1], 2))


def frame_files(name, view, image, points, labels, o):
    """The files of a frame of one camera: yields (path below OUT/training or OUT/testing, bytes).

    points (N, 6) of `sweep`, labels: Objects of the whole frame or None, o: Options.
    """
    xyz = move(points[:, :3], view.cloud_from_vehicle).astype(np.float32)
    chosen = slice(None)
    if not o.whole:
        uv, depth = data.project(xyz.astype(np.float64), view.lidar2img)
        chosen = RIG.in_range(xyz) & data.inside_image(uv, depth, view.width, view.height)
    xyz, rest = xyz[chosen], points[chosen, 3:].astype(np.float32)
    reflectance = np.tanh(rest[:, :1].clip(0))  # intensity has no bound; most is below 1
    cloud = np.hstack([xyz, reflectance, rest[:, 1:2]])[:, : o.columns]
    yield f"image_2/{name}.jpg", image
    yield f"velodyne/{name}.bin", cloud.tobytes()
    yield f"calib/{name}.txt", calib_text(view).encode()
    zone = xyz[rest[:, 2] > 0]
    if len(zone):
        yield f"no_label/{name}.bin", zone.tobytes()
    if labels is not None:
        boxes = ops_boxes.transform_boxes(labels.box, view.cloud_from_vehicle)
        held = labels.points > 0
        if not o.whole:
            held &= ops_boxes.points_in_boxes(xyz.astype(np.float64), boxes).any(0)
        labels, boxes = labels[held], boxes[held]
        yield f"label_2/{name}.txt", label_text(view, labels.type, eval_waymo.difficulty(labels), boxes).encode()
        yield f"truth/{name}.bin", eval_waymo.pack_objects(labels)


# -----------------------------------------------------------------------------
# one segment


@dataclass(frozen=True)
class Options:
    """What changes the files that a conversion writes."""

    every: int
    cameras: tuple
    whole: bool
    elongation: bool

    @property
    def columns(self):
        return 5 if self.elongation else 4


TABLES = ("camera_image", "camera_calibration", "lidar", "lidar_calibration", "lidar_pose", "vehicle_pose")
INTRINSIC = [f"intrinsic.{name}" for name in ("f_u", "f_v", "c_u", "c_v")]
BOX = [f"box.{name}" for name in ("center.x", "center.y", "center.z", "size.x", "size.y", "size.z", "heading")]
IMAGE = ["key.camera_name", "image", "pose.transform"]


def segment_files(folder, segment, labelled, o):
    """All files of a segment, frame by frame: yields (id, [(path, bytes)]).

    folder: ROOT/SPLIT. Raises BadInput, naming the file, for what is missing or broken in it.
    """
    path = {tag: folder / tag / f"{segment}.parquet" for tag in COMPONENTS}
    poses = read_columns(path["vehicle_pose"], [STAMP, "world_from_vehicle.transform"])
    world_from_vehicle = dict(zip(poses[STAMP].tolist(), poses["world_from_vehicle.transform"].reshape(-1, 4, 4)))
    stamps = sorted(world_from_vehicle)[:: o.every]
    cameras, lasers = read_cameras(path["camera_calibration"], o.cameras), read_lasers(path["lidar_calibration"])
    labels = read_boxes(path["lidar_box"], segment, stamps) if labelled else {}
    tables = {path["lidar"]: LIDAR, path["lidar_pose"]: POSES, path["camera_image"]: IMAGE}
    for stamp, (lidar, pixel_poses, images) in side_by_side(tables, stamps):
        vehicle_from_world = np.linalg.inv(world_from_vehicle[stamp])
        points = sweep(lidar, pixel_poses, lasers, vehicle_from_world, path["lidar"], path["lidar_pose"])
        images = {row[IMAGE[0]].as_py(): row for row in images}
        for camera, (extrinsic, intrinsic, size) in cameras.items():
            image = images.get(CAMERAS[camera])
            if image is None or not image["image"].is_valid:
                raise BadInput(f"{path['camera_image']}: frame {stamp} has no image of {camera}")
            world_from_image = np.array(image["pose.transform"].as_py()).reshape(4, 4)
            motion = np.linalg.inv(world_from_image) @ world_from_vehicle[stamp]
            view = make_view(extrinsic, intrinsic, size, motion)
            name = f"{segment}_{stamp}_{camera}"
            yield name, list(frame_files(name, view, image["image"].as_py(), points, labels.get(stamp), o))


def read_cameras(path, wanted):
    """{camera: (extrinsic (4, 4), [f_u, f_v, c_u, c_v], [width, height])}. Raises BadInput for one that is missing."""
    found = read_columns(path, ["key.camera_name", "extrinsic.transform", *INTRINSIC, "width", "height"])
    rows = {number: i for i, number in enumerate(found["key.camera_name"].tolist())}
    cameras = {}
    for camera in wanted:
        if CAMERAS[camera] not in rows:
            raise BadInput(f"{path}: no camera {camera}")
        i = rows[CAMERAS[camera]]
        size = int(found["width"][i]), int(found["height"][i])
        cameras[camera] = found["extrinsic.transform"][i].reshape(4, 4), [found[n][i] for n in INTRINSIC], size
    return cameras


def read_lasers(path):
    """{number: (extrinsic (4, 4), lowest, highest, elevations or None)}, radians."""
    angles = [f"beam_inclination.{name}" for name in ("min", "max", "values")]
    found = read_columns(path, ["key.laser_name", "extrinsic.transform", *angles])
    rows = zip(found["key.laser_name"].tolist(), found["extrinsic.transform"], *(found[name] for name in angles))
    return {number: (extrinsic.reshape(4, 4), *beams) for number, extrinsic, *beams in rows}


def read_boxes(path, segment, stamps):
    """{timestamp: Objects} of the labels of all frames in `stamps`, those without any too."""
    names = [STAMP, "key.laser_object_id", *BOX, "type", "num_lidar_points_in_box", "difficulty_level.detection"]
    found = read_columns(path, names)
    level = np.nan_to_num(found["difficulty_level.detection"].astype(float))  # most are null
    boxes = np.stack([found[name] for name in BOX], -1)
    labels = {}
    for stamp in stamps:
        rows = np.flatnonzero(found[STAMP] == stamp)
        rows = rows[np.argsort(found["key.laser_object_id"][rows])]
        columns = {"points": found["num_lidar_points_in_box"][rows], "level": level[rows]}
        columns["id"] = found["key.laser_object_id"][rows]
        frame = np.zeros(len(rows))
        kind = found["type"][rows]
        labels[stamp] = eval_waymo.make_objects([(segment, stamp)], frame, kind, boxes[rows], **columns)
        eval_waymo.check_objects(labels[stamp], path)
    return labels


# -----------------------------------------------------------------------------
# all segments


def list_segments(root, splits):
    """[(split, segment)] of root/SPLIT/TABLE/SEGMENT.parquet, of all splits there are where none is asked for.

    Raises BadInput for a root, split or table that is missing, and for a segment that one of the tables lacks.
    """
    if not root.is_dir():
        raise BadInput(f"{root}: no such folder")
    unknown = [split for split in splits if split not in SPLITS]
    if unknown:
        raise BadInput(f"--splits {unknown[0]}: must be of {', '.join(SPLITS)}")
    splits = splits or [split for split in SPLITS if (root / split).is_dir()]
    if not splits:
        raise BadInput(f"{root}: none of {', '.join(SPLITS)} lies here, the folders of Waymo's Parquet files")
    found = []
    for split in splits:
        tables = [root / split / tag for tag in needed_tables(split)]
        for table in tables:
            if not table.is_dir():
                raise BadInput(f"{table}: missing; conversion needs {', '.join(needed_tables(split))}")
        names = {table: {path.stem for path in table.glob("*.parquet")} for table in tables}
        segments = sorted(set().union(*names.values()))
        if not segments:
            raise BadInput(f"{root / split}: no segment in it (TABLE/SEGMENT.parquet)")
        for segment in segments:
            for table in tables:
                if segment not in names[table]:
                    raise BadInput(f"{table / segment}.parquet: missing; other tables have this segment")
            found.append((split, segment))
    return found


def needed_tables(split):
    return TABLES if split == "testing" else (*TABLES, "lidar_box")


@dataclass(frozen=True)
class Job:
    """A segment to convert or to check: what a process is given."""

    root: Path
    out: Path
    split: str
    segment: str
    options: Options

    @property
    def done(self):
        """The file that says that the segment is done: the ids of its frames."""
        return self.out / "segments" / self.split / f"{self.segment}.txt"

    def files(self):
        """As `segment_files`, with paths from here."""
        folder, labelled = self.out / SPLITS[self.split][0], self.split != "testing"
        for name, files in segment_files(self.root / self.split, self.segment, labelled, self.options):
            yield name, [(folder / path, content) for path, content in files]


def convert_segment(job):
    """Write a segment, the list that says so last. -> a BadInput, or None."""
    ids = []
    try:
        for name, files in job.files():
            for path, content in files:
                with writing(path) as temporary:
                    temporary.write_bytes(content)
            ids.append(name)
        with writing(job.done) as temporary:
            temporary.write_text("".join(f"{name}\n" for name in ids))
    except BadInput as e:
        return e


def check_segment(job):
    """Read the source of a segment that is done again. -> a BadInput that names the first file that differs, or
    None."""
    ids = []
    try:
        for name, files in job.files():
            for path, content in files:
                if not path.is_file():
                    raise BadInput(f"{path}: missing")
                if path.read_bytes() != content:
                    raise BadInput(f"{path}: is not what {job.root / job.split} gives")
            ids.append(name)
        if read_text(job.done).split() != ids:
            raise BadInput(f"{job.done}: does not list the {len(ids)} frames that there are")
    except BadInput as e:
        return e


def end_with_parent():
    """A process of the pool ends when the one that started it does, even if that is killed; Ctrl-C is that one's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sentinel = multiprocessing.parent_process().sentinel

    def watch():
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def in_processes(function, jobs, workers, title):
    """function(job) of each, in any order, with a bar; -> the BadInputs among what they return."""
    if not jobs:
        return []
    # fork, where there is such a thing: it starts at once, and does not import torch again
    context = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    pool = ProcessPoolExecutor(min(workers, len(jobs)), context, end_with_parent)
    errors = []
    try:
        futures = [pool.submit(function, job) for job in jobs]
        for future in tqdm(as_completed(futures), title, len(jobs), unit="segment", dynamic_ncols=True):
            error = future.result()
            if error:
                tqdm.write(f"broken: {error}")
                errors.append(error)
    except BrokenProcessPool:
        raise BadInput(f"--workers {workers}: one of them was killed; fewer need less memory") from None
    except KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return errors


def read_options(out):
    """The Options that OUT was converted with, None where nothing was. Raises BadInput."""
    path = out / "conversion.json"
    if not path.is_file():
        return None
    try:
        fields = json.loads(read_text(path))
        return Options(**fields | {"cameras": tuple(fields["cameras"])})
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{path}: not what data_waymo.py wrote; without it nobody knows how {out} was made") from None


def begin(out, o, splits):
    """Make the folders, without what a killed conversion left half-written, and write what this one is made with, and
    the rig of its frames. Raises BadInput for a folder with other data."""
    had = read_options(out)
    if had is not None and had != o:
        difference = runtime.differences(dataclasses.asdict(had), dataclasses.asdict(o))
        raise BadInput(f"--out {out}: was converted with {difference}; choose another folder")
    if had is None and ((out / "training").exists() or (out / "testing").exists()):
        raise BadInput(f"--out {out}: holds other data")
    folders = ["ImageSets", *(f"segments/{split}" for split in splits)]
    parts = ("image_2", "velodyne", "calib", "label_2", "truth", "no_label")
    folders += [f"{SPLITS[split][0]}/{part}" for split in splits for part in parts]
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    rig = dataclasses.replace(RIG, columns=o.columns)
    for name, content in (("rig.json", rig), ("conversion.json", o)):
        with writing(out / name) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(content), indent=1) + "\n")
    for folder in folders:
        with disk_errors(out):
            (out / folder).mkdir(parents=True, exist_ok=True)
            remove_stale(out / folder, age=STALE)


def write_lists(out):
    """ImageSets/ of all segments that are done, in order. -> {list: number of frames}."""
    lists = {}
    for split, (folder, name) in SPLITS.items():
        done = sorted((out / "segments" / split).glob("*.txt"))
        ids = [i for path in done for i in read_text(path).split()]
        if ids:
            lists[name] = ids
            if folder == "training":
                lists["trainval"] = lists.get("trainval", []) + ids
    for name, ids in lists.items():
        with writing(out / "ImageSets" / f"{name}.txt") as temporary:
            temporary.write_text("".join(f"{i}\n" for i in ids))
    return {name: len(ids) for name, ids in lists.items()}


def convert(
    root: Path,
    out: Path,
    every: int = 5,
    cameras: tuple[str, ...] = ("FRONT",),
    splits: tuple[str, ...] = (),
    whole: bool = False,
    elongation: bool = False,
    check: bool = False,
    workers: int = os.cpu_count() or 1,
) -> None:
    """Waymo's Parquet files to KITTI's object layout, segments in parallel.

    Run it again to go on where it stopped: a segment whose list in OUT/segments/ is there is done. The lists in
    OUT/ImageSets/ are written at the end, when all segments are.

    Args:
        root: Waymo's folders training/, validation/, testing/, with camera_image, camera_calibration, lidar,
            lidar_calibration, lidar_pose, vehicle_pose and, but for testing, lidar_box.
        out: Folder to write to.
        every: Keep every n-th frame of a segment, 10 a second; 5 is the paper's.
        cameras: FRONT, FRONT_LEFT, FRONT_RIGHT, SIDE_LEFT, SIDE_RIGHT; each makes frames of its own.
        splits: Of training, validation, testing; by default those there are.
        whole: Keep the whole sweep and all its labels, not what lies before the camera alone.
        elongation: Write it as a fifth number of each point.
        check: Write nothing; read the source again and compare every file. What OUT was made with is known.
        workers: Processes; by default one per core, some 0.4 GB each beside what all share.
    """
    if pyarrow is None:
        raise BadInput("data_waymo.py convert: needs pyarrow, which is not installed: pip install pyarrow")
    unknown = [camera for camera in cameras if camera not in CAMERAS]
    if unknown or not cameras:
        raise BadInput(f"--cameras {' '.join(unknown)}: must be of {', '.join(CAMERAS)}")
    for flag, value in (("--every", every), ("--workers", workers)):
        if value < 1:
            raise BadInput(f"{flag} {value}: must be 1 or more")
    segments = list_segments(root, splits)
    o = Options(every, tuple(c for c in CAMERAS if c in cameras), whole, elongation)
    if check:
        o = read_options(out)
        if o is None:
            raise BadInput(f"--out {out}: nothing was converted there that could be checked")
    else:
        begin(out, o, {split for split, _ in segments})
    jobs = [Job(root, out, split, segment, o) for split, segment in segments]
    done = [job for job in jobs if job.done.is_file()]
    todo = [job for job in jobs if not job.done.is_file()]
    if check:
        finish(in_processes(check_segment, done, workers, f"checking {out}"), "differ")
        if todo:
            raise BadInput(f"{todo[0].done}: missing; {len(todo)} of {len(jobs)} segments are not converted yet")
        print(f"OK: all files of {len(done)} segments in {out} are what {root} gives")
        return
    finish(in_processes(convert_segment, todo, workers, f"converting {root}"), "are broken; the others are done")
    counts = ", ".join(f"{name} {n}" for name, n in write_lists(out).items())
    print(f"{out}: {len(todo)} segments converted, {len(done)} were done before; frames: {counts}")


def finish(errors, what):
    """Raises BadInput, the first of the errors, where there are any."""
    if errors:
        raise BadInput(f"{errors[0]} ({len(errors)} segments {what})")


def main():
    runtime.commands({"convert": convert}, __doc__)


if __name__ == "__main__":
    main()
