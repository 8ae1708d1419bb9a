"""nuScenes: geometry beside the devkit's own arithmetic, splits, the index, groups of distinct sweeps, bad input.

`SIMIPU_NUSCENES` names a root of real tables (v1.0-mini) and of some real files. Everything else is tried on a small
root that `write_root` makes up.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

import data
import data_index
import data_nuscenes
import ops_boxes
import simipu
from data_nuscenes import CAMERAS, CLASSES, SPLITS
from files import BadInput, file_size

AIMS = dict(zip(CAMERAS, (0, -55, -110, 180, 110, 55)))  # degrees from ahead, to the left
WIDTH, HEIGHT = 160, 90
K = [[126.0, 0, 80.0], [0, 126.0, 45.0], [0, 0, 1]]
ATTRIBUTE = {"vehicle.car": "vehicle.moving", "human.pedestrian.adult": "pedestrian.standing"}
OBJECTS = {  # metres ahead, left and up at the first sample; width, length, height; yaw; metres a second
    "vehicle.car": ((12, 3, 0.8), (1.9, 4.5, 1.6), 0.3, (4.0, 1.0)),
    "human.pedestrian.adult": ((-9, -4, 0.9), (0.6, 0.7, 1.8), 2.0, (0.0, 1.0)),
    "static_object.bicycle_rack": ((8, -8, 0.5), (2.0, 8.0, 1.0), 0.5, (0.0, 0.0)),
    "vehicle.bicycle": ((8, -8.5, 0.5), (0.6, 1.7, 1.1), 0.6, (0.0, 0.0)),
    "animal": ((20, 0, 0.5), (0.5, 0.5, 1.0), 0.0, (1.0, 0.0)),
}

# of the lists in the devkit's utils/splits.py, sorted
DIGESTS = {
    "train": "10b2148caad20bbd",
    "val": "d3693b41245bb2a3",
    "test": "bd0a56fac042147b",
    "mini_train": "495168bc114d0864",
    "mini_val": "f6a4a1c573ec4c6c",
}


# -----------------------------------------------------------------------------
# a small root, and the real one


def w_x_y_z(rotation):
    return np.roll(rotation.as_quat(), 1).tolist()


def write_root(root, scenes, version="v1.0-mini", seed=0):
    """Tables and files of made-up scenes {name: samples}: a car that drives and turns, five objects."""
    rng = np.random.default_rng(seed)
    names = "log scene sample sample_data ego_pose calibrated_sensor sensor sample_annotation instance category"
    t = {name: [] for name in [*names.split(), "attribute", "visibility"]}
    t["log"] = [{"token": "log-a", "logfile": "n015-a"}, {"token": "log-b", "logfile": "n008-b"}]
    t["category"] = [{"token": f"category {name}", "name": name} for name in OBJECTS]
    t["attribute"] = [{"token": f"attribute {name}", "name": name} for name in data_nuscenes.ATTRIBUTES]
    t["visibility"] = [{"token": str(i), "level": "v"} for i in range(1, 5)]
    for channel in (*data_nuscenes.CHANNELS, "RADAR_FRONT"):
        if channel in AIMS:
            level = Rotation.from_matrix([[0, 0, 1], [-1, 0, 0], [0, -1, 0]])  # x right, y down, z ahead
            rotation = Rotation.from_euler("zyx", [AIMS[channel], 0.4, 0.3], degrees=True) * level
            place, matrix = (rotation.as_matrix()[:, 2] * 0.8 + [0.9, 0, 1.5]).tolist(), K
        else:
            rotation = Rotation.from_euler("xyz", [0.6, -0.9, -89.7], degrees=True)
            place, matrix = [0.9, 0.0, 1.84], []
        calib = {"token": f"calib {channel}", "sensor_token": f"sensor {channel}", "translation": place}
        t["calibrated_sensor"].append(calib | {"rotation": w_x_y_z(rotation), "camera_intrinsic": matrix})
        t["sensor"].append({"token": f"sensor {channel}", "channel": channel})
    for number, (scene, samples) in enumerate(scenes.items()):
        t["scene"].append({"token": f"token {scene}", "name": scene, "log_token": f"log-{'ab'[number % 2]}"})
        for i in range(samples):
            write_sample(root, t, rng, scene, number, i)
            add_objects(t, scene, number, i, samples)
    for name, rows in t.items():
        (root / version).mkdir(parents=True, exist_ok=True)
        (root / version / f"{name}.json").write_text(json.dumps(rows, indent=0))
    return root


def write_sample(root, t, rng, scene, number, i):
    """One keyframe of every sensor, and an image between two, which is nobody's."""
    token, time = f"sample {scene} {i}", 10**15 + 10**12 * number + 500_000 * i
    t["sample"].append({"token": token, "scene_token": f"token {scene}", "timestamp": time})
    shots = [*zip(data_nuscenes.CHANNELS, range(0, 70_000, 10_000)), ("RADAR_FRONT", 5000), ("CAM_FRONT", -80_000)]
    for channel, late in shots:
        seconds = 0.5 * i + late * 1e-6
        pose = Rotation.from_euler("zyx", [0.4 + 0.3 * seconds, 0.01, 0.008])
        name, folder = f"{scene} {channel} {time + late}", "samples" if late >= 0 else "sweeps"
        suffix = "jpg" if channel in AIMS else "pcd.bin"
        file = f"{folder}/{channel}/{scene}__{channel}__{time + late}.{suffix}"
        place = [600 + 100 * number + 8 * seconds, 1600 - 3 * seconds, 0.0]
        t["ego_pose"].append({"token": f"pose {name}", "translation": place, "rotation": w_x_y_z(pose)})
        shot = {"token": name, "sample_token": token, "ego_pose_token": f"pose {name}", "filename": file}
        shot |= {"calibrated_sensor_token": f"calib {channel}", "is_key_frame": late >= 0}
        t["sample_data"].append(shot)
        if late >= 0 and channel != "RADAR_FRONT":
            (root / folder / channel).mkdir(parents=True, exist_ok=True)
            write_file(root / file, rng)


def add_objects(t, scene, number, i, samples):
    for category, (place, size, yaw, velocity) in OBJECTS.items():
        instance = f"{scene} {category}"
        if i == 0:
            t["instance"].append({"token": instance, "category_token": f"category {category}"})
        place = np.array([600 + 100 * number, 1600, 0]) + place + 0.5 * i * np.array([*velocity, 0])
        attribute = [f"attribute {ATTRIBUTE[category]}"] if category in ATTRIBUTE else []
        row = {"token": f"{instance} {i}", "sample_token": f"sample {scene} {i}", "instance_token": instance}
        row |= {"attribute_tokens": attribute, "translation": place.tolist(), "size": size, "visibility_token": "3"}
        row |= {"rotation": w_x_y_z(Rotation.from_euler("z", yaw)), "num_lidar_pts": 7 + i, "num_radar_pts": 1}
        row |= {"prev": f"{instance} {i - 1}" if i else "", "next": f"{instance} {i + 1}" if i + 1 < samples else ""}
        t["sample_annotation"].append(row)


def write_file(path, rng):
    if path.suffix == ".jpg":
        Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)).save(path)
    else:
        points = rng.uniform([-40, -40, -1.9, 0, 0], [40, 40, 3, 255, 31], (8000, 5))
        points[:500, :3] *= 0.01  # the car's own roof
        points.astype(np.float32).tofile(path)


@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """Five samples of a scene of mini_train, two of one of mini_val."""
    return write_root(tmp_path_factory.mktemp("nuscenes"), {"scene-0061": 5, "scene-0103": 2})


@pytest.fixture
def copy(made_up, tmp_path):
    """made_up, for spoiling."""
    return Path(shutil.copytree(made_up, tmp_path / "root", ignore=shutil.ignore_patterns("*.index")))


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The root that SIMIPU_NUSCENES names, seen from a folder that may be written to."""
    if "SIMIPU_NUSCENES" not in os.environ:
        pytest.skip("SIMIPU_NUSCENES is not set")
    root = tmp_path_factory.mktemp("real")
    for entry in Path(os.environ["SIMIPU_NUSCENES"]).resolve().iterdir():
        (root / entry.name).symlink_to(entry)
    return root


def with_files(root):
    """All frames of v1.0-mini whose files are there, whatever their scene."""
    tables = data_nuscenes.open_tables(root, "v1.0-mini")
    rows = np.arange(len(tables.frames.sample))
    cells = np.stack(np.meshgrid(rows, np.arange(6), indexing="ij"), -1).reshape(-1, 2)
    return data.Frames([tables], np.insert(data_nuscenes._on_disk(tables, cells, True, clouds=True), 0, 0, axis=1))


class Devkit:
    """The tables as the devkit has them: rows by token."""

    def __init__(self, root, version="v1.0-mini"):
        self.rows = {path.stem: json.loads(path.read_text()) for path in (root / version).glob("*.json")}
        self.by_token = {name: {row["token"]: row for row in rows} for name, rows in self.rows.items()}

    def get(self, table, token):
        return self.by_token[table][token]

    def shots(self, sample):
        """{channel: row of sample_data} of a keyframe."""
        rows = [row for row in self.rows["sample_data"] if row["sample_token"] == sample and row["is_key_frame"]]
        sensors = [self.get("calibrated_sensor", row["calibrated_sensor_token"])["sensor_token"] for row in rows]
        return {self.get("sensor", token)["channel"]: row for token, row in zip(sensors, rows)}

    def project(self, points, sample, camera):
        """map_pointcloud_to_image: LiDAR points (n, 3) to pixels (n, 2) and depth (n,), step by step, in float64."""
        shots = self.shots(sample)
        for table, key in (("calibrated_sensor", "calibrated_sensor_token"), ("ego_pose", "ego_pose_token")):
            row = self.get(table, shots["LIDAR_TOP"][key])
            points = points @ rotation_of(row).T + row["translation"]
        for table, key in (("ego_pose", "ego_pose_token"), ("calibrated_sensor", "calibrated_sensor_token")):
            row = self.get(table, shots[camera][key])
            points = (points - row["translation"]) @ rotation_of(row)
        uvw = points @ np.array(row["camera_intrinsic"]).T
        return uvw[:, :2] / uvw[:, 2:], points[:, 2]

    def velocity(self, token):
        """box_velocity, x and y."""
        now = self.get("sample_annotation", token)
        if not now["prev"] and not now["next"]:
            return np.full(2, np.nan)
        first, last = (self.get("sample_annotation", now[k]) if now[k] else now for k in ("prev", "next"))
        times = [1e-6 * self.get("sample", row["sample_token"])["timestamp"] for row in (first, last)]
        longest = 3.0 if now["prev"] and now["next"] else 1.5
        if times[1] - times[0] > longest:
            return np.full(2, np.nan)
        return (np.array(last["translation"]) - first["translation"])[:2] / (times[1] - times[0])


def rotation_of(row):
    return Rotation.from_quat(np.roll(row["rotation"], -1)).as_matrix()


# -----------------------------------------------------------------------------
# geometry


def check_projection(frames, devkit):
    for frame in frames:
        raw = np.fromfile(frame.cloud, np.float32).reshape(-1, 5).astype(np.float64)
        raw = raw[np.hypot(raw[:, 0], raw[:, 1]) >= 1]
        expected, expected_depth = devkit.project(raw[:, :3], frame.token, frame.camera)
        points = frame.read_points()
        uv, depth = data.project(points.astype(np.float64), frame.lidar2img())
        height, width = frame.read_image().shape[:2]
        seen = (expected_depth > 1) & data.inside_image(expected, expected_depth, width, height)  # as the devkit
        assert seen.sum() > 200
        np.testing.assert_allclose(uv[seen], expected[seen], atol=1e-3)
        np.testing.assert_allclose(depth, expected_depth, atol=1e-4)
        assert (points[seen, 0] > 0).all()
        np.testing.assert_allclose(points[:, 3], raw[:, 3] / 255, atol=1e-6)


def test_points_land_where_the_devkit_puts_them(made_up):
    frames = data_nuscenes.find_frames([made_up], ["mini_train"])
    check_projection(frames[:12], Devkit(made_up))


def test_real_points_land_where_the_devkit_puts_them(real):
    frames = with_files(real)
    assert len(frames) == 12
    check_projection(frames, Devkit(real))


def check_axes(frames):
    for frame in frames:
        axis = frame.lidar2cam()[2, :3]  # the camera's, in the frame of the points
        assert axis[0] > 0.99 and abs(axis[1]) < 1e-12
        left, right = (data.project(np.array([[20.0, y, -1.0]]), frame.lidar2img())[0][0, 0] for y in (1, -1))
        assert left < right  # y points to the left
        turn = frame.turn()
        np.testing.assert_allclose(turn @ turn.T, np.eye(4), atol=1e-12)
        assert np.linalg.det(turn) > 0


def test_every_camera_looks_along_x(made_up):
    frames = data_nuscenes.find_frames([made_up], ["mini_val"])
    assert [f.camera for f in frames[:6]] == list(CAMERAS)
    check_axes(frames)
    turned = [np.degrees(np.arctan2(f.turn()[1, 0], f.turn()[0, 0])) for f in frames[:6]]
    # the LiDAR's y is ahead, so the front camera turns by -90 degrees, and the others by what they look aside
    wanted = np.array([-90 - aim for aim in AIMS.values()])
    assert (abs((turned - wanted + 180) % 360 - 180) < 2).all()


def test_every_real_camera_looks_along_x(real):
    tables = data_nuscenes.open_tables(real, "v1.0-mini")
    check_axes(data.Frames([tables], np.array([[0, row, column] for row in (0, 40, 82) for column in range(6)])))


def test_boxes_turn_with_the_points(made_up):
    devkit = Devkit(made_up)
    for frame in data_nuscenes.find_frames([made_up], ["mini_train"])[:12]:
        found = frame.labels()
        rows = [row for row in devkit.rows["sample_annotation"] if row["sample_token"] == frame.token]
        rows = [row for row in rows if not row["instance_token"].endswith(("animal", "rack"))]
        assert [CLASSES[k] for k in found.kind] == ["car", "pedestrian", "bicycle"]
        names = [data_nuscenes.ATTRIBUTES[k] if k >= 0 else "" for k in found.attribute]
        assert names == ["vehicle.moving", "pedestrian.standing", ""] and set(found.visibility) == {3}
        for box, velocity, row in zip(found.boxes, found.velocity, rows):
            np.testing.assert_allclose(box[[4, 3, 5]], row["size"])
            # the corners, by way of the global frame
            local = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
            corners = local * np.array(row["size"])[[1, 0, 2]] @ rotation_of(row).T + row["translation"]
            back = np.linalg.inv(frame.lidar2global())
            expected = corners @ back[:3, :3].T + back[:3, 3]
            gap = np.linalg.norm(ops_boxes.corners(box)[:, None] - expected, axis=-1).min(1)
            assert gap.max() < 0.08  # the LiDAR leans, upright boxes do not
            np.testing.assert_allclose(
                frame.lidar2global()[:2, :2] @ velocity, devkit.velocity(row["token"]), atol=1e-9
            )


def test_real_boxes_hold_their_points_and_project_into_the_images(real):
    checked = 0
    for frame in with_files(real):
        found, points = frame.labels(), frame.read_points().astype(np.float64)
        inside = ops_boxes.points_in_boxes(points, found.boxes)
        assert (abs(inside.sum(0) - found.lidar_points) <= 2 + 0.2 * found.lidar_points).mean() > 0.95
        assert abs(inside.sum() / found.lidar_points.sum() - 1) < 0.03
        uv, depth = data.project(points, frame.lidar2img())
        seen = data.inside_image(uv, depth, 1600, 900)
        corners, ahead = data.project(ops_boxes.corners(found.boxes).reshape(-1, 3), frame.lidar2img())
        corners, ahead = corners.reshape(-1, 8, 2), ahead.reshape(-1, 8)
        for k in np.flatnonzero((ahead > 0.5).all(1)):
            own = uv[inside[:, k] & seen]
            checked += len(own)
            assert (own >= corners[k].min(0) - 1e-3).all() and (own <= corners[k].max(0) + 1e-3).all()
    assert checked > 1000


def test_global_and_back(made_up):
    frame, rng = data_nuscenes.find_frames([made_up], ["mini_train"])[3], np.random.default_rng(0)
    boxes = np.column_stack([rng.normal(0, 20, (50, 3)), rng.uniform(1, 4, (50, 3)), rng.uniform(-3.1, 3.1, 50)])
    velocity = rng.normal(0, 5, (50, 2))
    there = data_nuscenes.to_global(boxes, velocity, frame.lidar2global())
    back = data_nuscenes.from_global(there, frame.lidar2global())
    np.testing.assert_allclose(back[0], boxes, atol=1e-9)
    np.testing.assert_allclose(back[1], velocity, atol=1e-9)
    assert abs(there.translation[:, 0] - 600).max() < 100


def test_real_velocities_are_the_devkits(real):
    """Every annotation of the tables: some have no neighbour, or none in time."""
    labels, devkit = data_nuscenes.open_tables(real, "v1.0-mini").labels, Devkit(real)
    order = {row["token"]: i for i, row in enumerate(devkit.rows["sample"])}
    rows = sorted(devkit.rows["sample_annotation"], key=lambda row: order[row["sample_token"]])
    expected = np.array([devkit.velocity(row["token"]) for row in rows])
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(labels.velocity, expected)


@pytest.mark.parametrize(("seconds", "lost"), [(0.9, 0), (1.5, 5), (2.6, 10)])
def test_velocity_needs_a_neighbour_in_time(copy, seconds, lost):
    """1.5 seconds to one neighbour, 3 between both: five objects each of the first samples lose theirs."""
    rewrite(copy, "sample", lambda rows: rows[0].update(timestamp=rows[0]["timestamp"] - round(1e6 * seconds)))
    devkit, tables = Devkit(copy), data_nuscenes.open_tables(copy, "v1.0-mini")
    expected = np.array([devkit.velocity(row["token"]) for row in devkit.rows["sample_annotation"]])
    assert np.isnan(expected).any(1).tolist() == [True] * lost + [False] * (len(expected) - lost)
    np.testing.assert_array_equal(tables.labels.velocity, expected)


# -----------------------------------------------------------------------------
# splits and lists of frames


def test_splits_are_the_devkits():
    scenes = {split: data_nuscenes.scenes_of(split) for split in SPLITS}
    assert [len(names) for names in scenes.values()] == [700, 150, 150, 8, 2]
    big = {name for split in ("train", "val", "test") for name in scenes[split]}
    assert len(big) == 1000 and {*scenes["mini_train"], *scenes["mini_val"]} <= big
    assert scenes["mini_val"] == ["scene-0103", "scene-0916"] and "scene-0003" in scenes["val"]
    assert {k: hashlib.sha256(" ".join(sorted(v)).encode()).hexdigest()[:16] for k, v in scenes.items()} == DIGESTS


def test_six_frames_of_a_sweep_share_its_cloud(made_up):
    frames = data_nuscenes.find_frames([made_up], ["mini_train", "mini_val"])
    assert len(frames) == 7 * 6 and len({f.name for f in frames}) == 42
    assert [len({f.cloud for f in frames[i : i + 6]}) for i in range(0, 42, 6)] == [1] * 7
    assert len({f.cloud for f in frames}) == 7 and {f.drive for f in frames} == {"n015-a", "n008-b"}
    assert data.sweeps_of(frames).tolist() == np.repeat(np.arange(7), 6).tolist()
    assert not any(f.file_errors() for f in frames)
    assert frames[-1] == frames[41] and frames[np.int64(41)].token == "sample scene-0103 1"
    with pytest.raises(IndexError):
        frames[42]


def test_cameras_stride_and_what_is_missing(copy):
    find = lambda **kwargs: [f.name for f in data_nuscenes.find_frames([copy], ["mini_train"], **kwargs)]
    rear = find(cameras=("CAM_BACK",))
    assert len(rear) == 5 and all("CAM_BACK__" in name for name in rear)
    assert find(cameras=("CAM_BACK",), frame_stride=2) == rear[::2]
    assert len(find(cameras=("CAM_BACK", "CAM_FRONT", "CAM_BACK"))) == 10
    image = copy / "samples" / "CAM_BACK" / f"{rear[1]}.jpg"
    image.unlink()
    assert find(cameras=("CAM_BACK",), skip_missing=True) == [rear[0], *rear[2:]]
    _, notes = data_nuscenes.pool_frames([copy], ["mini_train"], skip_missing=True)
    assert notes == [f"note: {copy}/v1.0-mini: 29 frames of --splits mini_train, 1 without image or cloud left out"]
    with pytest.raises(BadInput, match=rf"^{image}: missing \(CAM_BACK of sample sample scene-0061 1; --skip-missing"):
        find()
    shutil.rmtree(copy / "samples" / "CAM_BACK")
    first = copy / "samples" / "CAM_BACK" / f"{rear[0]}.jpg"
    lack = "v1.0-mini: no frames of --splits mini_train: all {} lack their image or cloud, the first one {}$"
    with pytest.raises(BadInput, match=lack.format(5, first)):
        find(cameras=("CAM_BACK",), skip_missing=True)
    sweeps = copy / "samples" / "LIDAR_TOP"
    shutil.rmtree(sweeps)
    with pytest.raises(BadInput, match=lack.format(5, f"{sweeps}/.*")):
        find(cameras=("CAM_FRONT",), skip_missing=True)


def test_several_roots_and_versions_are_pooled(copy, tmp_path):
    write_root(tmp_path / "other", {"scene-0001": 1}, "v1.0-trainval", seed=1)
    write_root(tmp_path / "other", {"scene-0077": 1}, "v1.0-test", seed=2)
    frames = data_nuscenes.find_frames([tmp_path / "other"], ["train", "test"])
    assert [f.image.name[:10] for f in frames] == ["scene-0001"] * 6 + ["scene-0077"] * 6
    assert len(data_nuscenes.find_frames([copy, copy], ["mini_train", "mini_train"])) == 30


# -----------------------------------------------------------------------------
# groups


def groups_of(batches):
    return [[i for _, i in batch] for batch in batches]


CASES = [(4, 6, 4, 8), (9, 6, 4, 16), (40, 6, 8, 32), (5, 3, 5, 5)]


@pytest.mark.parametrize(("sweeps", "cameras", "group", "batch"), CASES)
def test_groups_have_distinct_sweeps(sweeps, cameras, group, batch):
    ids = np.repeat(np.arange(sweeps), cameras)
    per_epoch = len(ids) // batch
    make = lambda **kwargs: data.Batches(len(ids), batch, group, 3, steps=5 * per_epoch, sweeps=ids, **kwargs)
    found = groups_of(make())
    assert all(len(set(ids[g])) == group for g in found)
    for epoch in np.array(found).reshape(5, -1):  # no frame twice
        assert len(set(epoch)) == per_epoch * batch
    assert found == groups_of(make()) and found[-batch // group :] == groups_of(make(start=5 * per_epoch - 1))
    if batch // group % 2 == 0:
        halves = [groups_of(make(rank=rank, world=2)) for rank in (0, 1)]
        assert [g for pair in zip(*halves) for g in pair] == found


def test_batches_without_shared_sweeps_are_as_ever():
    plain = list(data.Batches(50, 16, 4, seed=1, steps=7))
    assert list(data.Batches(50, 16, 4, seed=1, steps=7, sweeps=np.arange(50))) == plain


def test_few_frames_are_moved():
    """The epoch's order is that without sweeps, but for the groups that needed another."""
    ids = np.repeat(np.arange(3000), 6)
    plain = np.array(groups_of(data.Batches(len(ids), 32, 8, 0, steps=562)))
    parted = np.array(groups_of(data.Batches(len(ids), 32, 8, 0, steps=562, sweeps=ids)))
    faults = sum(len(set(ids[g])) < 8 for g in plain)
    assert 5 < faults < 200 and 0 < (plain != parted).sum() <= 3 * faults


def test_too_few_sweeps_for_a_group():
    with pytest.raises(BadInput, match="--group 4: 3 sweeps are too few .*; --same-sweep allows them"):
        next(iter(data.Batches(18, 4, 4, seed=0, steps=2, sweeps=np.repeat(np.arange(3), 6))))


# -----------------------------------------------------------------------------
# the index


def names_and_matrices(root):
    data_nuscenes.open_tables.cache_clear()
    frames = data_nuscenes.find_frames([root], ["mini_train"])
    boxes = np.concatenate([f.labels().boxes for f in frames])
    return [f.name for f in frames], np.array([f.lidar2img() for f in frames]), boxes


def test_tables_are_read_once(copy, monkeypatch, capsys):
    before = names_and_matrices(copy)
    assert sorted(path.name for path in copy.glob("*.*x")) == ["v1.0-mini.frames.index", "v1.0-mini.labels.index"]
    monkeypatch.setattr(data_nuscenes, "read_rows", None)
    after = names_and_matrices(copy)
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])
    np.testing.assert_array_equal(before[2], after[2])
    assert capsys.readouterr().err == ""


def test_labels_are_not_read_for_who_does_not_ask(copy):
    (copy / "v1.0-mini" / "sample_annotation.json").unlink()
    frames = data_nuscenes.find_frames([copy], ["mini_train"])
    assert not (copy / "v1.0-mini.labels.index").exists()
    with pytest.raises(BadInput, match=r"sample_annotation.json: missing; it is a table of nuScenes"):
        frames[0].labels()


def test_other_tables_make_another_index(copy, capsys):
    names = names_and_matrices(copy)[0]
    for table in ("sample_data", "sample_annotation"):
        rewrite(copy, table, lambda rows: leave_out(rows, "sample_token", "sample scene-0061 0"))
    rewrite(copy, "sample_annotation", lambda rows: [row.update(prev="") for row in rows[:5]])
    rewrite(copy, "sample", lambda rows: leave_out(rows, "token", "sample scene-0061 0"))
    assert names_and_matrices(copy)[0] == names[6:]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all("made of other files than these; it is made anew" in line for line in said)


def test_a_table_of_the_same_size_and_another_time_makes_another_index(copy, capsys):
    names_and_matrices(copy)
    path = copy / "v1.0-mini" / "calibrated_sensor.json"
    path.write_text(path.read_text().replace("126.0", "136.0"))
    os.utime(path, ns=(1, 1))
    names_and_matrices(copy)
    assert "frames.index: made of other files" in capsys.readouterr().err
    assert data_nuscenes.find_frames([copy], ["mini_train"])[0].intrinsic()[0, 0] == 136


@pytest.mark.parametrize("spoil", ["cut", "flip", "empty", "text", "other"])
def test_a_broken_index_is_a_line_and_made_anew(copy, capsys, spoil):
    before = names_and_matrices(copy)
    index = copy / "v1.0-mini.frames.index"
    raw = bytearray(index.read_bytes())
    size = len(raw)
    if spoil == "flip":
        raw[size // 2] ^= 255  # within the matrices
    broken = {"cut": raw[: size // 2], "flip": raw, "empty": b"", "text": b"once upon a time"}
    if spoil == "other":
        data_index.write(index, None, {"scene": np.zeros(3)})
    else:
        index.write_bytes(broken[spoil])
    after = names_and_matrices(copy)
    assert before[0] == after[0]
    np.testing.assert_array_equal(before[1], after[1])
    said = capsys.readouterr().err.splitlines()
    wrong = "made of other files than these" if spoil == "other" else "not a readable index"
    assert len(said) == 1 and said[0].startswith(f"note: {index}: {wrong}")
    assert index.stat().st_size == size


def test_sizes_of_many_files_have_an_index(copy, capsys, monkeypatch):
    """The same frames, and the same is missing, with and without; later nothing is asked but of some."""
    found = lambda: data_nuscenes.find_frames([copy], ["mini_train"])
    asked = []
    monkeypatch.setattr(data_nuscenes, "file_size", lambda path: (asked.append(path), file_size(path))[1])
    plain, lines = found(), data.inventory(found())
    monkeypatch.setattr(data_nuscenes, "INDEXED", 10)
    monkeypatch.setattr(data_nuscenes, "SAMPLED", 3)
    for times in (7 * 7, 3):
        asked.clear()
        data_nuscenes.open_tables.cache_clear()
        assert found() == plain and data.inventory(found()) == lines and len(asked) == times
    assert (copy / "v1.0-mini.sizes.index").exists()
    plain[4].image.unlink()
    data_nuscenes.open_tables.cache_clear()
    with pytest.raises(BadInput, match=f"^{plain[4].image}: missing "):
        found()
    assert "sizes.index: made of other files than these" in capsys.readouterr().err


def test_rows_come_whole_from_any_chunks(tmp_path, monkeypatch):
    texts = ["", 'a "] [{, é', 'a "] [{, éa "] [{, é']
    rows = [{"token": f"{i:x}", "text": texts[i % 3], "matrix": [[1.5, -2e-7], []]} for i in range(40)]
    path = tmp_path / "table.json"
    for indent in (None, 0, 2):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
        for size in (140, 200, 2**20):
            monkeypatch.setattr(data_nuscenes, "CHUNK", size)
            assert list(data_nuscenes.read_rows(path)) == rows
    path.write_text(" [ ]\n")
    assert list(data_nuscenes.read_rows(path)) == []


# -----------------------------------------------------------------------------
# bad input: one line that names it


def rewrite(root, table, change, version="v1.0-mini"):
    """change(rows) in place."""
    path = root / version / f"{table}.json"
    rows = json.loads(path.read_text())
    change(rows)
    path.write_text(json.dumps(rows))


def leave_out(rows, key, value):
    rows[:] = [row for row in rows if row[key] != value]


DANGLING = [
    ("sample_data", "sample_token", "sample"),
    ("sample_data", "ego_pose_token", "ego_pose"),
    ("sample_data", "calibrated_sensor_token", "calibrated_sensor"),
    ("calibrated_sensor", "sensor_token", "sensor"),
    ("sample", "scene_token", "scene"),
    ("sample_annotation", "sample_token", "sample"),
    ("sample_annotation", "instance_token", "instance"),
    ("sample_annotation", "prev", "sample_annotation"),
    ("instance", "category_token", "category"),
]


def complaint(root, **kwargs):
    data_nuscenes.open_tables.cache_clear()
    with pytest.raises(BadInput) as caught:
        frames = data_nuscenes.find_frames([root], **{"splits": ["mini_train"], **kwargs})
        frames[0].labels()
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.mark.parametrize(("table", "key", "other"), DANGLING)
def test_a_token_that_leads_nowhere(copy, table, key, other):
    rewrite(copy, table, lambda rows: rows[3].update({key: "nowhere"}))
    said = complaint(copy)
    assert said.startswith(f"{copy}/v1.0-mini/{table}.json: ") and f"nowhere is not in {other}.json" in said


@pytest.mark.parametrize("table", ["sample_data", "ego_pose", "scene", "category"])
def test_a_table_that_is_missing_or_cut_off(copy, table):
    path = copy / "v1.0-mini" / f"{table}.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    assert f"{path}: cut off, or no table: near" in complaint(copy)
    path.write_bytes(b"\xff\xfe" + whole)
    assert complaint(copy) == f"{path}: not text"
    path.write_text("404: not found")
    assert f"{path}: cut off, or no table" in complaint(copy)
    path.unlink()
    assert f"{path}: missing; it is a table of nuScenes" in complaint(copy)


def test_rows_that_are_not_as_they_should_be(copy):
    path = copy / "v1.0-mini" / "ego_pose.json"
    whole = path.read_bytes()
    rewrite(copy, "ego_pose", lambda rows: rows[2].pop("rotation"))
    assert complaint(copy) == f"{path}: row 2: no 'rotation'"
    rewrite(copy, "ego_pose", lambda rows: rows[2].update(rotation=["north"] * 4))
    assert f"{path}: at row" in complaint(copy)
    rewrite(copy, "ego_pose", lambda rows: rows.__setitem__(1, "pose"))
    assert f"{path}: row 1: not as nuScenes has it" in complaint(copy)
    path.write_bytes(whole)
    rewrite(copy, "sample_data", lambda rows: rows.pop(0))
    assert "sample_data.json: no keyframe of LIDAR_TOP of sample sample scene-0061 0" in complaint(copy)
    data_nuscenes.open_tables.cache_clear()
    assert len(data_nuscenes.find_frames([copy], ["mini_train"], skip_missing=True)) == 24


def test_what_is_unknown_is_named(made_up, tmp_path):
    assert complaint(made_up, cameras=("CAM_FORNT",)).startswith("--cameras CAM_FORNT: must be of CAM_FRONT, ")
    none = f"{made_up}: no folder v2.0, which --version asks for; there is v1.0-mini"
    assert complaint(made_up, version="v2.0") == none
    assert complaint(made_up, splits=["vall"]).startswith("--splits vall: must be of train, val")
    none = f"{made_up}: no folder v1.0-trainval, of which --splits val is; there is v1.0-mini"
    assert complaint(made_up, splits=["val"]) == none
    other = "--splits val: not of --version v1.0-mini, whose splits are mini_train, mini_val"
    assert complaint(made_up, splits=["val"], version="v1.0-mini") == other
    assert complaint(tmp_path / "none") == f"{tmp_path}/none: no such folder"
    assert complaint(tmp_path).endswith("; there is none of any version")
    assert complaint(made_up, splits=[]).startswith("--splits: none given; it takes train, val")


def test_a_cloud_of_another_shape(copy):
    frame = data_nuscenes.find_frames([copy], ["mini_train"])[0]
    frame.cloud.write_bytes(frame.cloud.read_bytes()[:-4])
    with pytest.raises(BadInput, match=f"{frame.cloud}: truncated"):
        frame.read_points()


# -----------------------------------------------------------------------------
# pre-training

TINY = "--image-encoder resnet18 --places 16 --num-points 64 --point-hidden 32 --image-hidden 32 --image-scale 96 64"
TINY += " --log-every 1 --workers 0 --device cpu --max-steps 2"


def test_two_steps_of_pretraining(copy, run_script, tmp_path):
    """On two processes, of which one reads the tables."""
    flags = f"{TINY} --splits mini_train --eval-splits mini_val --eval-frames 2 --batch-size 8 --group 4".split()
    run = run_script("simipu.py", "nuscenes", "--data-root", copy, *flags, processes=2)
    assert run.returncode == 0, run.stderr
    assert "nuscenes: 30 frames" in run.stdout
    assert "made anew" not in run.stderr and "not written" not in run.stderr
    lines = (tmp_path / "out" / "nuscenes" / "log.jsonl").read_text().splitlines()
    log = [line for line in map(json.loads, lines) if "inter" in line]
    assert [line["step"] for line in log] == [1, 2]
    assert all(np.isfinite(line["inter"] + line["intra"]) for line in log)


def test_two_steps_on_real_frames(real, run_here):
    flags = f"{TINY} --splits mini_train --eval-splits --batch-size 6 --group 3".split()
    status, _, said = run_here(simipu, "nuscenes", "--data-root", real, *flags)
    assert status == 1 and said.startswith("error: --group 3: 1 sweeps are too few") and said.count("\n") == 1
    status, _, said = run_here(simipu, "nuscenes", "--data-root", real, *flags, "--same-sweep")
    assert status == 0, said


def test_a_mistake_is_one_line_of_the_command(made_up, run_here, tmp_path):
    status, _, said = run_here(simipu, "nuscenes", "--data-root", made_up, *TINY.split(), "--cameras", "CAM_FORNT")
    assert status == 1 and said.startswith("error: --cameras CAM_FORNT: must be of") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()
