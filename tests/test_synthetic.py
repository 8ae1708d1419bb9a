"""The built-in scenes: same bytes, KITTI's formats, exact geometry, labels that fit."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import finetune_depth
import simipu
import synthetic
import synthetic_street
from files import BadInput
from synthetic_street import BALL, HULL, MATERIAL_ID, ROD

SMALL = {"width": 320, "height": 96}
SIZES = {  # height, width, length: from and to
    "Car": ((1.3, 1.5, 3.3), (2.0, 2.2, 5.2)),
    "Van": ((1.8, 1.8, 4.5), (2.7, 2.3, 6.0)),
    "Pedestrian": ((1.5, 0.4, 0.2), (2.0, 0.8, 1.0)),
    "Cyclist": ((1.5, 0.4, 1.6), (1.9, 0.8, 2.0)),
}
MARGIN = 0.06  # metres: three sigma of the range noise


def digests(root):
    """{relative path: SHA-256} of every file."""
    files = [p for p in root.rglob("*") if p.is_file()]
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def homogeneous(m):
    full = np.eye(4)
    full[:3, : m.shape[1]] = m
    return full


def matrices(calib):
    """{name: matrix} of the text of a calibration file."""
    rows = (line.split(":") for line in calib.splitlines() if line)
    return {name: np.array(numbers.split(), float).reshape(3, -1) for name, numbers in rows}


def read(root, name):
    """One frame as any KITTI reader would see it, written apart from the repository's own reader."""
    t = root / "training"
    calib = matrices((t / "calib" / f"{name}.txt").read_text())
    velo_to_rect = homogeneous(calib["R0_rect"]) @ homogeneous(calib["Tr_velo_to_cam"])
    points = np.fromfile(t / "velodyne" / f"{name}.bin", np.float32).reshape(-1, 4)
    rect = velo_to_rect @ np.c_[points[:, :3], np.ones(len(points))].T  # (4, N)
    u, v, depth = calib["P2"] @ rect
    objects = [line.split() for line in (t / "label_2" / f"{name}.txt").read_text().splitlines()]
    return {
        "calib": calib,
        "points": points,
        "rect": rect[:3],
        "u": u / depth,
        "v": v / depth,
        "depth_of_points": depth,
        "picture": Image.open(t / "image_2" / f"{name}.png"),
        "depth": Image.open(t / "depth_2" / f"{name}.png"),
        "objects": [o for o in objects if o[0] != "DontCare"],
        "ignored": [o for o in objects if o[0] == "DontCare"],
    }


def in_box(rect, o, margin=0.0):
    """Which points (3, N) of rectified camera 0 lie inside an object's 3D box, made smaller by the margin."""
    h, w, l, x, y, z, ry = map(float, o[8:15])
    dx, dy, dz = rect - np.array([[x], [y], [z]])
    along, aside = np.cos(ry) * dx - np.sin(ry) * dz, np.sin(ry) * dx + np.cos(ry) * dz
    return (np.abs(along) < l / 2 - margin) & (np.abs(aside) < w / 2 - margin) & (-dy > margin) & (-dy < h - margin)


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Three frames at KITTI's own size."""
    root = tmp_path_factory.mktemp("synthetic") / "big"
    synthetic.write_dataset(root, frames=3, seed=5, progress=False)
    return root


@pytest.fixture(scope="module")
def frames():
    """Six small frames with the truth behind them."""
    return [synthetic.frame(11, i, **SMALL) for i in range(6)]


def test_bytes_depend_on_seed_and_number_only(tmp_path):
    synthetic.write_dataset(tmp_path / "a", frames=3, seed=1, workers=1, progress=False, **SMALL)
    synthetic.write_dataset(tmp_path / "b", frames=5, seed=1, workers=2, progress=False, **SMALL)
    synthetic.write_dataset(tmp_path / "c", frames=1, seed=2, workers=1, progress=False, **SMALL)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert len(a) == 3 * 5 + 3 and len(b) == 5 * 5 + 3
    for name, digest in a.items():
        if name.startswith("training"):
            assert b[name] == digest, f"{name} depends on the number of frames or of workers"
    for name, digest in c.items():
        if name.startswith("training"):
            assert a[name] != digest, f"{name} does not depend on the seed"
    assert len({digest for name, digest in b.items() if "image_2" in name}) == 5  # no street twice


def test_formats(big):
    ids = {name: (big / "ImageSets" / f"{name}.txt").read_text().split() for name in ("train", "val", "trainval")}
    assert ids["trainval"] == ["000000", "000001", "000002"]
    assert sorted(ids["train"] + ids["val"]) == ids["trainval"]
    endings = {"image_2": "png", "depth_2": "png", "velodyne": "bin", "calib": "txt", "label_2": "txt"}
    for folder, ending in endings.items():
        names = sorted(p.name for p in (big / "training" / folder).iterdir())
        assert names == [f"{i}.{ending}" for i in ids["trainval"]]
    for name in ids["trainval"]:
        f = read(big, name)
        assert f["picture"].mode == "RGB" and f["picture"].size == (1242, 375)
        depth = np.asarray(f["depth"])
        assert depth.dtype == np.uint16 and depth.shape == (375, 1242) and depth.max() <= 80 * 256
        assert (depth == 0).any() and (depth > 0).mean() > 0.4  # there is a sky, and not only
        shapes = {k: m.shape for k, m in f["calib"].items()}
        assert shapes.pop("R0_rect") == (3, 3)
        assert shapes == dict.fromkeys(["P0", "P1", "P2", "P3", "Tr_velo_to_cam", "Tr_imu_to_velo"], (3, 4))
        for m in (f["calib"]["R0_rect"], f["calib"]["Tr_velo_to_cam"][:, :3]):
            assert np.abs(m @ m.T - np.eye(3)).max() < 1e-11 and np.linalg.det(m) > 0
        p = f["points"]
        assert p[:, 3].min() >= 0 and p[:, 3].max() <= 1 and len(np.unique(p[:, 3])) > 30
        ranges = np.linalg.norm(p[:, :3], axis=1)
        assert 1.9 < ranges.min() and ranges.max() < 80.2
        in_view = (f["depth_of_points"] > 0) & (np.abs(f["u"] - 620.5) < 621) & (np.abs(f["v"] - 187) < 187.5)
        assert in_view.sum() > 14000  # as in KITTI, where training samples 16384 of 17 to 20 thousand
        for o in f["objects"] + f["ignored"]:
            assert len(o) == 15
        for o in f["objects"]:
            kind, truncated, occluded, alpha, *numbers = [o[0], *map(float, o[1:])]
            left, top, right, bottom, h, w, l, x, y, z, ry = numbers
            assert kind in ("Car", "Van", "Pedestrian", "Cyclist") and 0 <= truncated < 1 and occluded in (0, 1, 2, 3)
            assert 0 <= left < right <= 1241 and 0 <= top < bottom <= 374 and z > 0
            assert abs(ry) < 3.15 and abs(alpha) < 3.15
            assert abs(np.sin(alpha - ry + np.arctan2(x, z))) < 0.02 and np.cos(alpha - ry + np.arctan2(x, z)) > 0.9
            low, high = SIZES[kind]
            assert all(a <= b <= c for a, b, c in zip(low, (h, w, l), high)), (kind, h, w, l)


def test_cloud_agrees_with_the_depth_picture(big):
    """Through the written calibration. Where 3 x 3 pixels are one smooth surface, both sensors mostly see the same."""
    for name in ("000000", "000001", "000002"):
        f = read(big, name)
        depth = np.asarray(f["depth"]) / 256
        u, v = np.round(f["u"]).astype(int), np.round(f["v"]).astype(int)
        keep = (f["depth_of_points"] > 0) & (u > 0) & (v > 0) & (u < 1241) & (v < 374)
        u, v, expected = u[keep], v[keep], f["depth_of_points"][keep]
        around = np.stack([depth[v + j, u + i] for i in (-1, 0, 1) for j in (-1, 0, 1)])
        smooth = (around.min(0) > 0) & (np.ptp(around, axis=0) < 0.02 * around.mean(0))
        error = np.abs(expected - depth[v, u])[smooth]
        assert smooth.mean() > 0.6
        assert np.median(error) < 0.03, "noise has 2 cm, so that the median is 1.3 cm and a pixel's slope"
        assert (error < 0.25).mean() > 0.93


def scene_of(*parts):
    return synthetic_street.freeze(list(parts), None, np.random.default_rng(0))


def test_closed_forms():
    black, nowhere = (0, 0, 0), np.zeros((3, 1))
    unit = np.array([[0.6], [0.0], [0.8]])
    plate = scene_of(synthetic_street.box((0, 0, -1), (900, 900, 1), "wall", black))  # a ground plane at 0
    down = synthetic.intersect(plate, 0, np.array([[0], [0], [1.73]]), unit * [[1], [1], [-1]])
    assert down[0] == pytest.approx(1.73 / 0.8, abs=1e-12)
    ball = scene_of(synthetic_street.ball((30, 0, 40), (2, 2, 2), "wall", black))
    assert synthetic.intersect(ball, 0, nowhere, unit)[0] == pytest.approx(48, abs=1e-9)
    tube = scene_of(synthetic_street.rod((50, 0, -5), (50, 0, 5), 0.04, "wall", black))
    rays = np.array(
        [[1.0, 1, 1, 50], [0, 5e-4, 1e-3, 0], [0, 0, 0, 5.1]]
    )  # middle, flank, miss; down on the lid's plane
    t = synthetic.intersect(tube, 0, nowhere, rays)
    a, b, c = 1 + 5e-4**2, -50.0, 50**2 - 0.04**2
    assert t[:2] == pytest.approx([49.96, (-b - np.sqrt(b * b - a * c)) / a], abs=1e-7) and np.isinf(t[2:]).all()


@pytest.mark.parametrize("kind", [HULL, BALL, ROD])
def test_intersections_against_marching(kind):
    """In small steps along each ray, asking of every point whether it is inside."""
    rng = np.random.default_rng(kind)
    R = synthetic_street.rotation(*rng.uniform(-1, 1, 3))
    half, taper = np.array([1.5, 0.7, 0.4]), (0.5, 0.3, 0.4)
    if kind == ROD:
        half[1] = half[0]
    scene = scene_of(synthetic_street.part(kind, (9, 1, 0), half, "wall", (0, 0, 0), taper, R))
    direction = np.array([[9.0], [1], [0]]) / 9 + 0.1 * rng.standard_normal((3, 400))
    t = synthetic.intersect(scene, 0, np.zeros((3, 1)), direction)
    steps = np.arange(0, 25, 0.004)
    away = direction[:, :, None] * steps - np.array([9, 1, 0])[:, None, None]
    x, y, z = np.einsum("ji,jnk->ink", R, away) / half[:, None, None]
    up = (z + 1) / 2  # 0 at the bottom, 1 at the top
    inside = {
        HULL: (np.abs(z) < 1) & (x < 1 - taper[0] * up) & (-x < 1 - taper[1] * up) & (np.abs(y) < 1 - taper[2] * up),
        BALL: x**2 + y**2 + z**2 < 1,
        ROD: (np.abs(z) < 1) & (x**2 + y**2 < 1),
    }[kind]
    found = inside.any(1)
    assert found.mean() > 0.1 and not found.all()
    assert (np.isfinite(t) >= found).all() and (np.isfinite(t) == found).mean() > 0.97  # marching misses grazing rays
    first = steps[inside.argmax(1)]
    assert (first[found] >= t[found] - 1e-9).all() and (first[found] <= t[found] + 0.004).all()


def test_windows_lose_no_hit(frames):
    """Each primitive tried on the rays inside its window gives what trying it on all rays would."""
    f = frames[1]
    R = synthetic_street.rotation(0.05, 0.01, -0.01)
    elevation, azimuth = np.deg2rad(np.linspace(2, -24, 20)), np.deg2rad(np.arange(-48, 48, 1.1))
    lidar = synthetic.lidar_rays(elevation, azimuth, R.T, -R.T @ [0, 0, 1.8])
    sun = synthetic.sun_rays(np.array([0.6, -0.48, 0.64]), np.geomspace(6, 86, 60) - 6, np.linspace(-32, 32, 50))
    for rays in (f.camera, lidar, sun):
        t, index = synthetic.cast(rays, f.scene)
        everything = [0, rays.shape[0], 0, rays.shape[1]]
        rays_all = SimpleNamespace(origin=rays.origin, direction=rays.direction, shape=rays.shape)
        rays_all.windows = lambda edges, window=everything: [window] * len(edges)
        t_all, index_all = synthetic.cast(rays_all, f.scene)
        assert np.array_equal(t, t_all) and np.array_equal(index, index_all)
        assert len(np.unique(index)) > 30


def test_camera_rays_follow_the_written_calibration(frames):
    """Hit points, carried through the matrices in the file, return to their own pixels and depths."""
    f = frames[0]
    m = matrices(f.calib)
    t, index = synthetic.cast(f.camera, f.scene)
    world = (f.camera.origin + t * f.camera.direction)[:, index >= 0]
    velo = f.R_velo.T @ (world - f.place_velo[:, None])
    rect = homogeneous(m["R0_rect"]) @ homogeneous(m["Tr_velo_to_cam"]) @ np.vstack([velo, np.ones(velo.shape[1])])
    u, v, depth = m["P2"] @ rect
    row, column = np.nonzero(index >= 0)
    assert np.abs(u / depth - column).max() < 1e-6 and np.abs(v / depth - row).max() < 1e-6
    assert np.abs(depth - t[index >= 0]).max() < 1e-6


def test_points_inside_3d_boxes_project_into_2d_boxes(big, scenes):
    inside = outside = near = 0
    for root in (big, scenes):
        for path in sorted((root / "training" / "label_2").iterdir()):
            f = read(root, path.stem)
            width, height = f["picture"].size
            u, v = f["u"], f["v"]
            visible = (f["depth_of_points"] > 0) & (u >= 0) & (u <= width - 1) & (v >= 0) & (v <= height - 1)
            for o in f["objects"]:
                left, top, right, bottom = map(float, o[4:8])
                own = in_box(f["rect"], o, MARGIN) & visible
                hit = (u >= left) & (u <= right) & (v >= top) & (v <= bottom)
                inside += (own & hit).sum()
                outside += (own & ~hit).sum()
                if o[2] == "0" and float(o[1]) < 0.3 and float(o[13]) < 25:
                    near += 1
                    assert in_box(f["rect"], o).sum() >= 8, f"{path} has a near, visible {o[0]} without points: {o}"
    assert inside > 1000 and near > 10
    assert inside / (inside + outside) > 0.98


def test_objects_fit_their_boxes_and_meet_nothing(frames):
    seen = 0
    standing = [MATERIAL_ID[name] for name in ("facade", "wall", "bark", "sign")]  # houses, walls, trunks, poles
    for f in frames:
        m = matrices(f.calib)
        to_rect = homogeneous(m["R0_rect"]) @ homogeneous(m["Tr_velo_to_cam"])
        R = to_rect[:3, :3] @ f.R_velo.T  # world to rectified camera
        fixed = np.flatnonzero(np.isin(f.scene.material, standing))
        taken = []
        for name, members, yaw in f.objects:
            box = synthetic.box_3d(f.scene, members, yaw, R, to_rect[:3, 3] - R @ f.place_velo)
            h, w, l, x, y, z, ry = box
            t, index = synthetic.cast(f.camera, f.scene, members)
            world = (f.camera.origin + t * f.camera.direction)[:, index >= 0]
            rect = R @ (world - f.place_velo[:, None]) + to_rect[:3, 3:]
            assert in_box(rect, [name, *[0] * 7, *box], -0.006).all(), f"a part of a {name} sticks out of its box"
            seen += rect.shape[1] > 0

            # tight: the parts reach every face to a few centimetres
            for axis, size in zip(synthetic_street.rotation(pitch=ry).T, (l, h, w)):
                low, high = synthetic_street.extent(f.scene, members, axis @ R)
                assert 0 <= size - (high - low) < 0.021

            # nothing that stands fast is inside
            unit = np.array(np.meshgrid(*[np.linspace(-0.5, 0.5, 12)] * 3)).reshape(3, -1)
            inside = unit * [[l], [h], [w]] - [[0], [h / 2], [0]]
            body = synthetic_street.rotation(pitch=ry) @ inside + np.array([[x], [y], [z]])
            body = R.T @ (body - to_rect[:3, 3:]) + f.place_velo[:, None]
            for i in fixed:
                q = f.scene.M[i] @ (body - f.scene.centre[i][:, None])
                planes = f.scene.planes[i]
                assert not (planes[:, :3] @ q < planes[:, 3:]).all(0).any(), f"a {name} stands in {f.scene.material[i]}"

            spot = (x, -z, l / 2, w / 2, ry)  # x, z as a plane whose yaw turns as is_free's
            assert not taken or synthetic_street.is_free(spot, np.array(taken))
            taken.append(spot)
    assert seen > 15


def test_occlusion_levels(frames):
    """Against the share of an object's own pixels which the finished picture shows."""
    levels = []
    for f in frames:
        _, index = synthetic.cast(f.camera, f.scene)
        shares = {}
        for name, members, _ in f.objects:
            alone = synthetic.cast(f.camera, f.scene, members)[1] >= 0
            if alone.any():
                shares.setdefault(name, []).append(1 - (np.isin(index, members) & alone).sum() / alone.sum())
        for line in f.labels:
            kind, _, level, *_ = line.split()
            if kind != "DontCare":
                low, high = [(0, 0.1), (0.1, 0.5), (0.5, 0.9), (0.9, 1)][int(level)]
                assert any(low <= s <= high for s in shares[kind]), line
                levels.append(int(level))
    assert {0, 1, 2} <= set(levels)


def test_command_line(run_script, tmp_path):
    arguments = ["--frames", 4, "--width", 160, "--height", 48, "--val", 0.5, "--seed", 3]
    done = run_script("synthetic.py", "--root", "made/here", *arguments)
    assert done.returncode == 0, done.stderr
    root = tmp_path / "made" / "here"
    assert (root / "ImageSets" / "val.txt").read_text() == "000001\n000003\n"
    assert [p.name for p in (tmp_path / "made").iterdir()] == ["here"]  # nothing temporary is left
    before = digests(root)
    again = run_script("synthetic.py", "--root", "made/here", "--frames", 4)
    assert again.returncode == 1 and "made/here exists already" in again.stderr and len(again.stderr.splitlines()) == 1
    assert digests(root) == before


@pytest.mark.parametrize(
    "flag, value",
    [("frames", 0), ("seed", -1), ("width", 31), ("height", 10**5), ("val", 1.0), ("val", np.nan), ("workers", -2)],
)
def test_a_value_out_of_range_names_its_flag(flag, value, tmp_path):
    with pytest.raises(BadInput, match=f"^--{flag} {value}: must be from "):
        synthetic.write_dataset(tmp_path / "data", **{flag: value}, progress=False)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_one_line(tmp_path):
    """No file may exceed 8 KB here: pictures and clouds do."""
    command = ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", sys.executable, "synthetic.py"]
    command += ["--root", tmp_path / "it", "--frames", "2", "--no-progress"]
    for width, height in (("160", "48"), ("64", "32")):  # ends at a picture, at a cloud
        done = subprocess.run([*command, "--width", width, "--height", height], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"error: {tmp_path / 'it'}: not written (File too large)\n")
        assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="file/it: not written"):
        synthetic.write_dataset(tmp_path / "file" / "it", frames=1, progress=False)


def test_a_run_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def broken(seed, number, *size):
        raise RuntimeError(json.dumps([seed, number]))

    monkeypatch.setattr(synthetic, "frame", broken)
    with pytest.raises(RuntimeError):
        synthetic.write_dataset(tmp_path / "data", frames=2, progress=False, **SMALL)
    monkeypatch.setattr(synthetic, "frame", lambda *_: os._exit(9))  # as when memory runs out
    with pytest.raises(BadInput, match="data: a process that wrote frames was killed"):
        synthetic.write_dataset(tmp_path / "data", frames=2, progress=False, **SMALL)
    assert not list(tmp_path.iterdir())


def test_sigterm_leaves_neither_files_nor_processes(tmp_path):
    """Whichever script wrote the scenes: its own processes used to wait for work for ever."""
    code = f"import synthetic; synthetic.write_dataset({str(tmp_path / 'it')!r}, 1000, width=32, height=32, workers=2)"
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, stderr=subprocess.DEVNULL)
    while run.poll() is None and not list(tmp_path.rglob("000000.txt")):
        time.sleep(0.1)
    run.terminate()
    assert run.wait(60) == 143 and not list(tmp_path.iterdir())
    with pytest.raises(ProcessLookupError):  # nobody is left of its group
        os.killpg(run.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "roots, frames, rank, written",
    [
        (["data/synthetic"], 64, 0, True),
        (["data/synthetic/", "data/more"], 64, 0, True),
        (["data/synthetic"], 0, 0, False),
        (["data/synthetic"], 64, 1, False),
        (["data/synthetik"], 64, 0, False),
        (["."], 64, 0, False),
    ],
)
def test_scenes_are_written_to_the_presets_own_folder_alone(roots, frames, rank, written, tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(synthetic, "write_dataset", lambda **kwargs: asked.append(kwargs))
    run = SimpleNamespace(main=rank == 0, any=lambda flag: flag)
    config = SimpleNamespace(synthetic_frames=frames, data_root=tuple(roots))
    synthetic.write_scenes(config, run)
    assert asked == ([{"frames": 64}] if written else [])
    (tmp_path / "data" / "synthetic").mkdir(parents=True)
    synthetic.write_scenes(config, run)
    assert len(asked) == written  # none again


@pytest.mark.parametrize("script", [simipu, finetune_depth])
def test_a_mistyped_folder_is_not_filled_with_scenes(script, run_here, tmp_path):
    status, _, said = run_here(script, "demo", "--data-root", "data/kiti")
    assert status == 1 and said.splitlines()[-1] == "error: data/kiti: no such folder"
    assert not (tmp_path / "data").exists()
