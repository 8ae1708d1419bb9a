"""data_waymo.py: Waymo's Parquet files to KITTI's layout, on tables that the tests write and on Waymo's own."""

import dataclasses
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import data
import data_kitti
import data_waymo
import eval_waymo
import files
import ops_boxes
from files import BadInput

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402

WAYMO = os.environ.get("SIMIPU_WAYMO")
needs_waymo = pytest.mark.skipif(not WAYMO, reason="SIMIPU_WAYMO names no folder")
SCRIPT = Path(data_waymo.__file__)
NAMES = {v: k for k, v in data_waymo.CAMERAS.items()}
SIZE = 192, 128


# -----------------------------------------------------------------------------
# tables as Waymo has them, small


def pose(x=0.0, y=0.0, z=0.0, yaw=0.0, pitch=0.0, roll=0.0):
    """(4, 4)."""
    out = np.eye(4)
    out[:3, :3] = Rotation.from_euler("xyz", [roll, pitch, yaw]).as_matrix()
    out[:3, 3] = x, y, z
    return out


def car(seconds):
    """Where the vehicle is in the world: at 12 m/s in a bend, far from the origin."""
    return pose(9000 + 12 * seconds, -4000 + 3 * seconds, 20, 0.4 + 0.3 * seconds, 0.01, -0.02)


CAMERA_POSES = {
    1: pose(1.5, 0, 2.1, 0.01, 0.002, -0.009),
    2: pose(1.5, 0.1, 2.1, 0.78),
    3: pose(1.5, -0.1, 2.1, -0.78),
    4: pose(1.4, 0.1, 2.1, 1.57),
    5: pose(1.4, -0.1, 2.1, -1.57),
}
LASER_POSES = {
    1: pose(1.43, 0, 2.18, 2.6),
    2: pose(4, 0, 0.7),
    3: pose(3.2, 1, 1, 1.5),
    4: pose(3.2, -1, 1, -1.5),
    5: pose(-1.2, 0, 0.5, 3.1),
}
SHAPES = {1: (12, 90), 2: (6, 40), 3: (6, 40), 4: (6, 40), 5: (6, 40)}
BEAMS = np.linspace(-0.3, 0.05, 12) ** 3 * 3 - np.linspace(0.1, 0, 12)


def write_table(folder, tag, segment, rows, order):
    """rows: [{short name: value}], which `order` shuffles; in groups of seven rows."""
    component = data_waymo.COMPONENTS[tag]
    rows = [rows[i] for i in order.permutation(len(rows))] if order is not None else rows
    full = {n: n if n.startswith("key.") else f"[{component}].{n}" for n in rows[0]}
    small = {"key.camera_name", "key.laser_name", "type", "difficulty_level.detection"}
    columns = {}
    for name in rows[0]:
        values = [row[name] for row in rows]
        kind = pyarrow.int8() if name in small else None
        kind = pyarrow.list_(pyarrow.float64(), 16) if name.endswith("transform") else kind
        kind = pyarrow.list_(pyarrow.float32()) if name.startswith("range_image") else kind
        kind = pyarrow.list_(pyarrow.int32(), 3) if name.endswith(".shape") else kind
        columns[full[name]] = pyarrow.array(values, kind)
    (folder / tag).mkdir(parents=True, exist_ok=True)
    parquet.write_table(
        pyarrow.table(columns), folder / tag / f"{segment}.parquet", row_group_size=7, compression="BROTLI"
    )


def range_image(rng, shape):
    image = np.stack([rng.uniform(2, 70, shape), rng.gamma(1, 0.5, shape), rng.random(shape), np.full(shape, -1.0)], -1)
    image[rng.random(shape) < 0.2] = -1  # nothing came back
    image[..., 3] = np.where(rng.random(shape) < 0.1, 1, -1)
    return image.astype(np.float32)


def write_segment(root, split="training", segment="10_000_020_000", frames=3, seed=0, shuffled=False):
    """All tables of a segment. -> what is in its range images, {(stamp, laser, return): (H, W, 4)}, and its poses of
    pixels, {stamp: (H, W, 6)}."""
    rng, folder = np.random.default_rng(seed), root / split
    order = np.random.default_rng(7) if shuffled else None
    stamps = [1_500_000_000_000_000 + 100_000 * i + seed for i in range(frames)]
    second = {stamp: i * 0.1 for i, stamp in enumerate(stamps)}
    tables = {tag: [] for tag in data_waymo.COMPONENTS}
    images, pixel_poses = {}, {}
    for stamp in stamps:
        keys = {"key.segment_context_name": segment, "key.frame_timestamp_micros": stamp}
        tables["vehicle_pose"].append(keys | {"world_from_vehicle.transform": car(second[stamp]).ravel()})
        for camera in CAMERA_POSES:
            jpeg = io.BytesIO()
            Image.fromarray(rng.integers(0, 255, (*SIZE[::-1], 3), np.uint8)).save(jpeg, "JPEG")
            row = {"key.camera_name": camera, "image": jpeg.getvalue()}
            row["pose.transform"] = car(second[stamp] + 0.01 * camera + 0.02).ravel()
            tables["camera_image"].append(keys | row)
        times = second[stamp] + np.linspace(-0.05, 0.05, SHAPES[1][1])
        turns = [Rotation.from_matrix(car(t)[:3, :3]).as_euler("xyz") for t in times]
        columns = np.array([[*turn, *car(t)[:3, 3]] for turn, t in zip(turns, times)])
        pixel_poses[stamp] = np.tile(columns, (SHAPES[1][0], 1, 1)).astype(np.float32)
        row = {"range_image_return1.values": pixel_poses[stamp].ravel()}
        row["range_image_return1.shape"] = pixel_poses[stamp].shape
        tables["lidar_pose"].append(keys | {"key.laser_name": 1} | row)
        for laser, shape in SHAPES.items():
            row = {"key.laser_name": laser}
            for i in (1, 2):
                image = images[stamp, laser, i] = range_image(rng, shape)
                row |= {f"range_image_return{i}.values": image.ravel(), f"range_image_return{i}.shape": image.shape}
            tables["lidar"].append(keys | row)
        for i in range(12):
            center = rng.uniform([-60, -40, 0], [60, 40, 2])
            size = rng.uniform([3, 3, 2], [12, 9, 4])
            row = {"key.laser_object_id": f"object {i}"}
            row |= dict(zip(data_waymo.BOX, [*center, *size, rng.uniform(-3, 3)]))
            row |= {"type": int(rng.integers(1, 5)), "num_lidar_points_in_box": int(rng.integers(0, 12))}
            row |= {"difficulty_level.detection": [None, 2][rng.integers(2)]}
            tables["lidar_box"].append(keys | row)
    for camera, extrinsic in CAMERA_POSES.items():
        row = {"key.segment_context_name": segment, "key.camera_name": camera, "extrinsic.transform": extrinsic.ravel()}
        row |= dict(zip(data_waymo.INTRINSIC, [204.0, 205.0, 95.0, 63.0 + camera]))
        tables["camera_calibration"].append(row | {"width": SIZE[0], "height": SIZE[1]})
    for laser, extrinsic in LASER_POSES.items():
        row = {"key.segment_context_name": segment, "key.laser_name": laser, "extrinsic.transform": extrinsic.ravel()}
        row |= {"beam_inclination.min": -0.5, "beam_inclination.max": 0.3}
        tables["lidar_calibration"].append(row | {"beam_inclination.values": BEAMS if laser == 1 else None})
    for tag, rows in tables.items():
        if tag != "lidar_box" or split != "testing":
            write_table(folder, tag, segment, rows, order)
    return images, pixel_poses


def convert(root, out, cameras=("FRONT",), every=1, workers=1, **flags):
    data_waymo.convert(root, out, every, cameras, workers=workers, **flags)


def tree(folder):
    """{path: bytes} of all files below."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def frames_in(out, split="train"):
    """As data_kitti has them, with the rig that lies beside them."""
    fields = json.loads((out / "rig.json").read_text())
    rig = data.Rig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    frames = [dataclasses.replace(f, rig=rig) for f in data_kitti.list_frames(out, [split])]
    assert not [e for f in frames for e in f.file_errors()]
    return frames


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two segments to train on, one to validate, one to test."""
    root = tmp_path_factory.mktemp("waymo")
    for i, split in enumerate(("training", "training", "validation", "testing")):
        write_segment(root, split, f"1{i}_000_020_000", seed=i)
    return root


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "waymo"
    convert(source, out, every=2, workers=2)
    return out


# -----------------------------------------------------------------------------
# points


def slow_point(image, i, j, extrinsic, beams, world_from_vehicle, pixel=None):
    """One pixel's point by matrices."""
    width = image.shape[1]
    azimuth = ((width - j - 0.5) / width * 2 - 1) * np.pi - Rotation.from_matrix(extrinsic[:3, :3]).as_euler("xyz")[2]
    turn = Rotation.from_euler("ZY", [azimuth, -beams[i]]).as_matrix()
    point = extrinsic @ [*(turn @ [image[i, j, 0], 0, 0]), 1]
    if pixel is not None:
        roll, pitch, yaw, x, y, z = pixel
        point = np.linalg.inv(world_from_vehicle) @ pose(x, y, z, yaw, pitch, roll) @ point
    return point[:3]


def test_points_are_where_matrices_put_them(tmp_path):
    """Every pixel of every LiDAR and return, in order, with the motion during the sweep taken out of TOP alone."""
    images, pixel_poses = write_segment(tmp_path, frames=1)
    convert(tmp_path, tmp_path / "out", whole=True, elongation=True)
    (frame,) = frames_in(tmp_path / "out")
    assert frame.rig.columns == 5
    cloud = np.fromfile(frame.cloud, np.float32).reshape(-1, 5)
    stamp = next(iter(pixel_poses))
    expected = []
    for laser, extrinsic in LASER_POSES.items():
        rows = SHAPES[laser][0]
        beams = np.linspace(-0.5, 0.3, 2 * rows + 1)[1::2] if laser > 1 else BEAMS
        for i in (1, 2):
            image = images[stamp, laser, i]
            for r, c in itertools.product(*map(range, SHAPES[laser])):
                if image[r, c, 0] > 0:
                    pixel = pixel_poses[stamp][r, c].astype(float) if laser == 1 else None
                    point = slow_point(image, r, c, extrinsic, beams[::-1], car(0), pixel)
                    expected.append([*point, np.tanh(image[r, c, 1]), image[r, c, 2]])
    expected = np.array(expected)
    vehicle = data_waymo.move(cloud[:, :3].astype(float), eval_waymo.vehicle_from_cloud(frame))
    assert abs(vehicle - expected[:, :3]).max() < 2e-5
    assert abs(cloud[:, 3:] - expected[:, 3:]).max() < 1e-6
    moved = slow_point(image, r, c, extrinsic, beams[::-1], car(0), pixel_poses[stamp][0, 0].astype(float))
    assert np.linalg.norm(moved - slow_point(image, r, c, extrinsic, beams[::-1], car(0))) > 0.3  # it matters


@needs_waymo
def test_points_are_waymos_own():
    """Beside what its TensorFlow code made of the same range images: 1e-4 m without, 1 cm with poses of pixels (its
    float32)."""
    folder, official = Path(WAYMO) / "training", np.load(Path(WAYMO) / "official_points.npz")
    (segment,) = [p.stem for p in (folder / "lidar").glob("*.parquet")]
    path = {tag: folder / tag / f"{segment}.parquet" for tag in data_waymo.COMPONENTS}
    lasers = data_waymo.read_lasers(path["lidar_calibration"])
    found = data_waymo.read_columns(path["vehicle_pose"], [data_waymo.STAMP, "world_from_vehicle.transform"])
    stamps = found[data_waymo.STAMP].tolist()
    vehicle_from_world = np.linalg.inv(found["world_from_vehicle.transform"].reshape(4, 4))
    tables = {path["lidar"]: data_waymo.LIDAR, path["lidar_pose"]: data_waymo.POSES}
    ((_, (rows, pose_rows)),) = data_waymo.side_by_side(tables, stamps)
    poses = data_waymo.as_image(path["lidar_pose"], *(pose_rows[0][n] for n in data_waymo.POSES), 6)
    compared = 0
    for row in rows:
        laser = row["key.laser_name"].as_py()
        extrinsic, *angles = lasers[laser]
        for i in (1, 2):
            values, shape = (row[f"range_image_return{i}.{n}"] for n in ("values", "shape"))
            image = data_waymo.as_image(path["lidar"], values, shape, 4)
            beams = data_waymo.beam_angles(*angles, len(image))
            for motion, suffix in (((), "_nopose" if laser == 1 else ""), ((poses, vehicle_from_world), "")):
                theirs = official.get(f"laser{laser}_ret{i}{suffix}")
                if theirs is None or (laser > 1 and motion):
                    continue
                points = data_waymo.to_points(image, beams, extrinsic, *motion)
                tolerance = 0.01 if motion else 1e-4
                assert abs(points[:, :3] - theirs[:, 3:]).max() < tolerance
                assert (points[:, 3:5] == theirs[:, 1:3]).all()
                compared += len(points)
    assert compared > 100_000


# -----------------------------------------------------------------------------
# frames


def test_a_point_of_the_world_is_where_the_moved_camera_sees_it(tmp_path):
    """From the cloud's frame to pixels of the image, which was taken later and elsewhere, written out for every
    camera."""
    write_segment(tmp_path, frames=2)
    convert(tmp_path, tmp_path / "out", tuple(data_waymo.CAMERAS))
    frames = frames_in(tmp_path / "out")
    assert len(frames) == 10
    moved = []
    for frame in frames:
        _, stamp, name = eval_waymo.parse_id(frame.name)
        camera, second = data_waymo.CAMERAS[name], (stamp - 1_500_000_000_000_000) / 1e6
        ahead = CAMERA_POSES[camera] @ [12, 1.5, -0.7, 1]  # of the camera, in the vehicle's frame
        world = car(second) @ ahead
        x, y, z, _ = np.linalg.inv(CAMERA_POSES[camera]) @ np.linalg.inv(car(second + 0.01 * camera + 0.02)) @ world
        u, v = 95.0 - 204.0 * y / x, 63.0 + camera - 205.0 * z / x  # of pixels that begin at the image's edge
        cloud = np.linalg.inv(eval_waymo.vehicle_from_cloud(frame)) @ ahead
        uv, depth = data.project(cloud[None, :3], frame.lidar2img())
        assert uv[0] == pytest.approx([u - 0.5, v - 0.5], abs=1e-6) and depth[0] == pytest.approx(x)
        moved.append(x - 12)
        p2, velo2cam = data_kitti.split_projection(frame)
        assert np.allclose(velo2cam[:, :3] @ velo2cam[:, :3].T, np.eye(3))
        assert velo2cam[2, 0] > 0.999  # it looks along +x
        image = np.asarray(Image.open(frame.image))
        assert image.shape[1::-1] == SIZE and p2[0, 0] == 204
    assert max(moved) > 0.1 and min(moved) < -0.4  # the car did


def test_a_cloud_is_what_lies_before_its_camera(tmp_path):
    write_segment(tmp_path, frames=1)
    cameras = ("FRONT", "SIDE_RIGHT")
    convert(tmp_path, tmp_path / "all", cameras, whole=True)
    convert(tmp_path, tmp_path / "some", cameras)
    for whole, part in zip(frames_in(tmp_path / "all"), frames_in(tmp_path / "some")):
        assert part.rig == data_waymo.RIG and part.name == whole.name
        points = whole.read_points()
        uv, depth = data.project(points.astype(float), whole.lidar2img())
        chosen = data_waymo.RIG.in_range(points) & data.inside_image(uv, depth, *SIZE)
        assert 50 < chosen.sum() < len(points) / 3 and (part.read_points() == points[chosen]).all()
        loaded = data.load_frame(part, 64, np.random.default_rng(0))
        assert loaded["points"][:, 0].min() > 0 and 0 <= loaded["points"][:, 3].min()


def test_labels_are_waymos_boxes(tmp_path):
    """label_2 by KITTI's rules and truth/ by Waymo's are the same objects: those with a point in the cloud."""
    write_segment(tmp_path, frames=1)
    convert(tmp_path, tmp_path / "some", tuple(data_waymo.CAMERAS))
    convert(tmp_path, tmp_path / "all", whole=True)
    segment, rows = frames_in(tmp_path / "all")[0], 0
    source = data_waymo.read_boxes(
        tmp_path / "training" / "lidar_box" / "10_000_020_000.parquet", "10_000_020_000", [1_500_000_000_000_000]
    )[1_500_000_000_000_000]
    by_id = {name: source[[i]] for i, name in enumerate(source.id)}
    assert set(eval_waymo.read_truth([segment]).id) == {name for name, o in by_id.items() if o.points[0] > 0}
    for frame in frames_in(tmp_path / "some"):
        types, numbers = data_kitti.read_labels(frame.label)
        truth = eval_waymo.read_truth([frame])
        assert len(truth) == len(types) and truth.frames == [("10_000_020_000", 1_500_000_000_000_000)]
        _, velo2cam = data_kitti.split_projection(frame)
        boxes = ops_boxes.label_to_box(numbers[:, 7:14], velo2cam)
        held = ops_boxes.points_in_boxes(frame.read_points().astype(float), boxes)
        assert held.any(0).all()
        vehicle = ops_boxes.transform_boxes(boxes, eval_waymo.vehicle_from_cloud(frame))
        for i, name in enumerate(truth.id):
            original = by_id[name]
            assert all(
                (getattr(truth[[i]], c) == getattr(original, c)).all() for c in ("box", "points", "level", "type")
            )
            off = vehicle[i] - original.box[0]
            off[6] = np.remainder(off[6] + np.pi, 2 * np.pi) - np.pi
            assert abs(off).max() < 1e-3  # four decimals
            assert types[i] == eval_waymo.TYPES[original.type[0]].title()
            hard = original.level[0] == 2 or original.points[0] <= 5
            truncated, occluded, alpha, left, top, right, bottom = numbers[i, :7]
            assert occluded == (2 if hard else 0) and 0 <= truncated <= 1 and abs(alpha) <= np.pi + 1e-4
            assert 0 <= left <= right <= SIZE[0] - 1 and 0 <= top <= bottom <= SIZE[1] - 1
            if truncated == 0:
                uv, _ = data.project(ops_boxes.corners(boxes[i]), frame.lidar2img())
                assert [left, top, right, bottom] == pytest.approx([*uv.min(0), *uv.max(0)], abs=0.2)
            rows += 1
    assert rows > 8


def test_boxes_go_back_to_the_vehicles_frame(converted):
    """A detector that answers with the labels, in each cloud's own frame, is right in everything."""
    frames = frames_in(converted, "val")
    found = []
    for frame in frames:
        types, numbers = data_kitti.read_labels(frame.label)
        _, velo2cam = data_kitti.split_projection(frame)
        boxes = ops_boxes.label_to_box(numbers[:, 7:14], velo2cam)
        found.append(eval_waymo.as_objects(frame, boxes, np.full(len(boxes), 0.5), types))
    predictions, truths = eval_waymo.join_objects(found), eval_waymo.read_truth(frames)
    assert eval_waymo.check_frames(predictions, truths, "x") is None
    figures = eval_waymo.evaluate(predictions, truths)
    present = [name for name in eval_waymo.TYPES[1:] if figures[name]["LEVEL_2"]["n"]]
    assert present
    for name in present:
        assert figures[name]["LEVEL_2"]["mAP"] == 1 and figures[name]["LEVEL_2"]["mAPH"] > 0.999


def test_no_label_zones_are_known(converted, source):
    """The flagged points of a cloud lie beside it, and a box that holds one is said to overlap a zone."""
    frame = frames_in(converted)[0]
    zone, points = eval_waymo.read_no_label(frame), frame.read_points()
    assert 0 < len(zone) < len(points) / 4
    assert {p.tobytes() for p in zone} <= {p.tobytes() for p in points[:, :3].copy()}
    clear = points[[(p != zone).any(1).all() for p in points[:, :3]]][0, :3]
    boxes = np.array([[*zone[0], 0.1, 0.1, 0.1, 0], [*clear, 1e-4, 1e-4, 1e-4, 0]])
    objects = eval_waymo.as_objects(frame, boxes, [0.5, 0.5], ["Vehicle", "cyclist"])
    assert objects.no_label.tolist() == [True, False] and objects.type.tolist() == [1, 4]
    bare = dataclasses.replace(frame, cloud=frame.cloud.with_name("other.bin"))
    assert eval_waymo.read_no_label(bare).shape == (0, 3)


@needs_waymo
def test_waymos_own_frame(tmp_path):
    """Boxes hold points and project where Waymo's own projections of them are: within .5 px with its lens distortion,
    which is written out here, and within 10 px without, as the calibrations have it."""
    convert(Path(WAYMO), tmp_path / "out", tuple(data_waymo.CAMERAS), every=5)
    convert(Path(WAYMO), tmp_path / "out", check=True)
    folder = Path(WAYMO) / "training"
    (segment,) = [p.stem for p in (folder / "lidar").glob("*.parquet")]
    rows = lambda tag: parquet.read_table(folder / tag / f"{segment}.parquet").to_pylist()
    short = lambda row: {name.split("].")[-1]: value for name, value in row.items()}
    calibrations = {row["key.camera_name"]: row for row in map(short, rows("camera_calibration"))}
    projected = {(r["key.camera_name"], r["key.laser_object_id"]): r for r in map(short, rows("projected_lidar_box"))}
    jpegs = {row["key.camera_name"]: row["image"] for row in map(short, rows("camera_image"))}
    off, off_undistorted, held = [], [], []
    for frame in frames_in(tmp_path / "out"):
        camera = data_waymo.CAMERAS[eval_waymo.parse_id(frame.name)[2]]
        assert frame.image.read_bytes() == jpegs[camera]
        c, lidar2img = calibrations[camera], frame.lidar2img()
        types, numbers = data_kitti.read_labels(frame.label)
        p2, velo2cam = data_kitti.split_projection(frame)
        boxes = ops_boxes.label_to_box(numbers[:, 7:14], velo2cam)
        larger = boxes + [0, 0, 0, 1e-3, 1e-3, 1e-3, 0]  # these points lie on faces, and labels have four decimals
        held += ops_boxes.points_in_boxes(frame.read_points().astype(float), larger).sum(0).tolist()
        for box, name, label in zip(boxes, eval_waymo.read_truth([frame]).id, numbers):
            if (camera, name) not in projected or label[0] > 0:
                continue
            theirs = projected[camera, name]
            middle, size = ([theirs[f"box.{what}.{axis}"] for axis in "xy"] for what in ("center", "size"))
            rect = np.array([*np.subtract(middle, np.divide(size, 2)), *np.add(middle, np.divide(size, 2))]) - 0.5
            uv, _ = data.project(ops_boxes.corners(box), lidar2img)
            off.append(abs(rect - [*uv.min(0), *uv.max(0)]).max())
            x, y = ((uv - p2[:2, 2]) / p2[[0, 1], [0, 1]]).T
            k1, k2, p, q = (c[f"intrinsic.{n}"] for n in ("k1", "k2", "p1", "p2"))
            square = x**2 + y**2
            radial = 1 + k1 * square + k2 * square**2
            bent = np.stack(
                [
                    x * radial + 2 * p * x * y + q * (square + 2 * x**2),
                    y * radial + p * (square + 2 * y**2) + 2 * q * x * y,
                ],
                -1,
            )
            bent = bent * p2[[0, 1], [0, 1]] + p2[:2, 2]
            off_undistorted.append(abs(rect - [*bent.min(0), *bent.max(0)]).max())
    assert len(off) > 15 and max(off_undistorted) < 0.5
    assert np.median(off) < 3 and max(off) < 10
    assert min(held) >= 1 and np.median(held) > 20


# -----------------------------------------------------------------------------
# the command


def test_lists_and_splits(converted):
    """Every second frame; training and validation in one folder; testing without labels."""
    lists = {p.stem: p.read_text().split() for p in (converted / "ImageSets").iterdir()}
    assert {name: len(ids) for name, ids in lists.items()} == {"train": 4, "val": 2, "test": 2, "trainval": 6}
    assert lists["train"] + lists["val"] == lists["trainval"] == sorted(lists["trainval"])
    assert eval_waymo.parse_id(lists["val"][1]) == ("12_000_020_000", 1_500_000_000_200_002, "FRONT")
    assert len(list((converted / "training" / "label_2").iterdir())) == 6
    assert not list((converted / "testing" / "label_2").iterdir()) and frames_in(converted, "test")
    frames = data_kitti.find_frames(converted, ["train", "val"])  # as they are, but for the rig
    assert [f.name for f in frames] == [f"training/{i}" for i in lists["trainval"]]


def test_the_order_of_rows_says_nothing(tmp_path):
    """Waymo's files are in order of time; one that is not gives the same."""
    for name, shuffled in (("a", False), ("b", True)):
        write_segment(tmp_path / name, frames=4, shuffled=shuffled)
        convert(tmp_path / name, tmp_path / f"{name}_out", tuple(data_waymo.CAMERAS))
    a, b = tree(tmp_path / "a_out"), tree(tmp_path / "b_out")
    assert a == b and len(a) > 100


class Killed(BaseException):
    pass


def test_a_conversion_killed_at_any_write_goes_on_to_the_same_bytes(source, converted, tmp_path, monkeypatch):
    """At the first write, and at later and later ones, before or after the file takes its place."""
    expected, real = tree(converted), os.replace
    out, deaths, writes = tmp_path / "out", 0, 0

    def dying(*names):
        nonlocal writes
        writes += 1
        if writes > deaths:
            if deaths % 2:
                real(*names)
            raise Killed
        real(*names)

    here = lambda function, jobs, workers, title: [e for e in map(function, jobs) if e]
    monkeypatch.setattr(data_waymo, "in_processes", here)
    monkeypatch.setattr(os, "replace", dying)
    nobody = 2**22 + 1  # no process has this number; what a kill may leave is named by the one that is dead
    torn = f"segments/training/99_000_020_000.{nobody}.tmp.txt"
    while True:
        try:
            convert(source, out, every=2)
            break
        except Killed:
            deaths, writes = deaths + 1, 0
            assert set(tree(out)) - {torn} <= set(expected)
            if (out / "segments" / "training").is_dir():
                (out / torn).write_text("an id\n")
                os.utime(out / torn, (0, 0))  # an hour ago or more
    assert deaths > 10
    assert tree(out) == expected


def test_a_killed_command_leaves_no_process_and_goes_on(tmp_path, capsys):
    """kill -9, for real: whatever it was doing."""
    root, out = tmp_path / "waymo", tmp_path / "out"
    for i in range(6):
        write_segment(root, segment=f"2{i}_000_020_000", frames=8, seed=i)
    command = [sys.executable, str(SCRIPT), "convert", "--root", str(root), "--out", str(out), "--workers", "2"]
    command += ["--every", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    marks = lambda: list((out / "segments" / "training").glob("2?_000_020_000.txt"))
    while not marks():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)  # ends when the last of its processes has
    assert len(marks()) < 6 and not (out / "ImageSets" / "train.txt").exists()
    convert(root, out, workers=2)
    assert "were done before; frames: train 48, trainval 48" in capsys.readouterr().out
    convert(root, tmp_path / "whole")
    left = tree(out)
    for name in set(left) - set(tree(tmp_path / "whole")):  # half a file stays while its number is a process again
        assert files.TEMPORARY.fullmatch(Path(name).name), name
        del left[name]
    assert left == tree(tmp_path / "whole")


@pytest.mark.parametrize("harm", ["changed", "missing", "list", "not done"])
def test_check_finds(harm, source, tmp_path, capsys):
    out = tmp_path / "out"
    convert(source, out, splits=("training",))
    convert(source, out, every=5, check=True, splits=("training",))  # what it was made with is known
    assert capsys.readouterr().out.splitlines()[-1] == f"OK: all files of 2 segments in {out} are what {source} gives"
    victim = sorted((out / "training" / "velodyne").iterdir())[1]
    if harm == "changed":
        content = bytearray(victim.read_bytes())
        content[100] ^= 1
        victim.write_bytes(content)
    elif harm == "missing":
        victim.unlink()
    else:
        victim = out / "segments" / "training" / "11_000_020_000.txt"
        victim.unlink() if harm == "not done" else victim.write_text("x\n")
    with pytest.raises(BadInput) as e:
        convert(source, out, check=True, splits=("training",))
    assert str(e.value).startswith(f"{victim}: ") and "\n" not in str(e.value)


def rewrite(path, change):
    parquet.write_table(change(parquet.read_table(path)), path)


def without_first(path):
    rewrite(path, lambda table: table.slice(1))


def cut_row_group(path):
    """Zeros where the last row group was: the footer behind it is whole."""
    content = bytearray(path.read_bytes())
    with parquet.ParquetFile(path) as file:
        start = file.metadata.row_group(file.num_row_groups - 1).column(0).dictionary_page_offset
    end = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def flip_bit(path):
    """In a file with checksums of pages; without them nobody could tell."""
    parquet.write_table(parquet.read_table(path), path, compression="BROTLI", write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def other_size(path):
    name = "[LiDARComponent].range_image_return2.shape"

    def change(table):
        shapes = pyarrow.array([[12, 91, 4]] * len(table), pyarrow.list_(pyarrow.int32(), 3))
        return table.set_column(table.schema.get_field_index(name), name, shapes)

    rewrite(path, change)


COLUMN = "[LiDARComponent].range_image_return1.values"
HARMS = [
    ("lidar", lambda p: p.write_bytes(p.read_bytes()[:-3000]), "not a whole Parquet file ("),
    ("lidar", cut_row_group, "not a whole Parquet file ("),
    ("lidar", flip_bit, "not a whole Parquet file ("),
    ("camera_image", lambda p: p.write_bytes(b"PAR1"), "not a whole Parquet file ("),
    ("lidar_box", lambda p: p.write_bytes(b""), "not a whole Parquet file ("),
    ("lidar", lambda p: rewrite(p, lambda table: table.drop_columns([COLUMN])), f"no column {COLUMN}"),
    ("lidar", other_size, "an image of 4320 numbers, not (12, 91, 4) with 4 channels"),
    ("lidar", without_first, "LiDAR 1 is not both in a frame and in lidar_calibration"),
    ("lidar_pose", without_first, "no rows of frame 1500000000000000"),
    ("camera_image", without_first, "frame 1500000000000000 has no image of FRONT"),
    ("camera_calibration", without_first, "no camera FRONT"),
]


@pytest.mark.parametrize("tag, harm, says", HARMS)
def test_a_broken_segment_is_one_line(tag, harm, says, tmp_path, capsys):
    """The file is named; the segment beside it is converted all the same; no list says that all is there."""
    root, out = tmp_path / "waymo", tmp_path / "out"
    for segment in ("10_000_020_000", "11_000_020_000"):
        write_segment(root, segment=segment, frames=2)
    path = root / "training" / tag / "10_000_020_000.parquet"
    harm(path)
    with pytest.raises(BadInput) as e:
        convert(root, out)
    assert str(e.value).startswith(f"{path}: {says}") and "\n" not in str(e.value)
    assert str(e.value).endswith("(1 segments are broken; the others are done)")
    assert f"broken: {path}: {says}" in "".join(capsys.readouterr())
    assert [p.name for p in (out / "segments" / "training").iterdir()] == ["11_000_020_000.txt"]
    assert not list(out.glob("ImageSets/*"))
    write_segment(root, segment="10_000_020_000", frames=2)  # mended
    convert(root, out)
    assert len((out / "ImageSets" / "train.txt").read_text().split()) == 4


def test_a_missing_table_is_one_line(tmp_path):
    """Before anything is written."""
    root, out = tmp_path / "waymo", tmp_path / "out"
    for segment in ("10_000_020_000", "11_000_020_000"):
        write_segment(root, segment=segment, frames=1)
    lidar = root / "training" / "lidar" / "11_000_020_000.parquet"
    lidar.rename(tmp_path / "aside")
    with pytest.raises(BadInput) as e:
        convert(root, out)
    assert str(e.value) == f"{lidar}: missing; other tables have this segment"
    (lidar.parent / "10_000_020_000.parquet").unlink()
    lidar.parent.rmdir()
    with pytest.raises(BadInput) as e:
        convert(root, out)
    assert str(e.value).startswith(f"{lidar.parent}: missing; conversion needs camera_image, ")
    assert not out.exists()


def test_wrong_arguments_are_one_line(source, converted, tmp_path, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "kitti" / "training").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    wrong = {
        "--cameras BACK: must be of FRONT, FRONT_LEFT": (source, out, {"cameras": ("FRONT", "BACK")}),
        "--cameras : must be of FRONT": (source, out, {"cameras": ()}),
        "--every 0: must be 1 or more": (source, out, {"every": 0}),
        "--workers 0: must be 1 or more": (source, out, {"workers": 0}),
        "--splits train: must be of training, validation, testing": (source, out, {"splits": ("train",)}),
        f"{tmp_path / 'nowhere'}: no such folder": (tmp_path / "nowhere", out, {}),
        f"{tmp_path / 'empty'}: none of training, validation, testing lies here": (tmp_path / "empty", out, {}),
        f"--out {tmp_path / 'kitti'}: holds other data": (source, tmp_path / "kitti", {}),
        f"--out {converted}: was converted with every=2, not 3": (source, converted, {"every": 3}),
        f"--out {out}: nothing was converted there": (source, out, {"check": True}),
    }
    before = tree(converted)
    for says, (root, to, flags) in wrong.items():
        with pytest.raises(BadInput) as e:
            convert(root, to, **flags)
        assert str(e.value).startswith(says) and "\n" not in str(e.value)
    assert not out.exists() and not (tmp_path / "kitti" / "rig.json").exists() and tree(converted) == before
    monkeypatch.setattr(data_waymo, "pyarrow", None)
    with pytest.raises(BadInput, match="needs pyarrow, which is not installed: pip install pyarrow"):
        convert(source, out)


def test_the_command_says_one_line(source, tmp_path, monkeypatch):
    arguments = ["--root", str(source), "--out", str(tmp_path / "out"), "--cameras", "FRONT", "BACK"]
    monkeypatch.setattr(sys, "argv", ["data_waymo.py", "convert", *arguments])
    with pytest.raises(SystemExit) as e:
        data_waymo.main()
    assert str(e.value).startswith("error: --cameras BACK: must be of FRONT, ")
