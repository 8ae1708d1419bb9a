"""What the tests share: the repository on the path, data, and scripts run as a user starts them."""
# ruff: noqa: E402  what is set in the environment must stand before the imports that read it

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: small work, on machines that often run something else too

import torch
from PIL import Image

GPU = torch.cuda.is_available()
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
is_available = torch.cuda.is_available  # kept for the tests marked `gpu`; the others see a substitute
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run in its interpreter
REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))

import numpy as np
import pytest

import data_kitti
import data_waymo
import eval_waymo
import ops_boxes
import ops_triton
import synthetic

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not GPU, reason="no GPU")]
needs_triton = pytest.mark.skipif(ops_triton.triton is None, reason="Triton is not installed")


# -----------------------------------------------------------------------------
# what a run has left


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder):
    """The log without headers and times."""
    times = ("data_ms", "step_ms", "samples_per_s")
    return [{k: v for k, v in line.items() if k not in times} for line in read_log(folder) if "git" not in line]


def load(path):
    return torch.load(path, weights_only=True)


def tensors(state):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return [state]
    inside = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [t for v in inside for t in tensors(v)]


def pytest_report_header():
    return f"kernels: {'compiled, run on a GPU' if GPU else 'interpreted, no GPU'}"


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """Eight small built-in scenes, six for training and two held out, in KITTI's object layout."""
    root = tmp_path_factory.mktemp("data") / "synthetic"
    synthetic.write_dataset(root, frames=8, seed=0, width=416, height=128, progress=False)
    return root


@pytest.fixture(scope="session")
def waymo_scenes(scenes, tmp_path_factory):
    """The same as data_waymo.py leaves Waymo's frames, whole and with elongation: a segment to train on, one held out.

    What the camera sees is there once more, mirrored, behind it. The road is at z = 0, and the camera looks 20 degrees
    to the left of where the car does.
    """
    root = tmp_path_factory.mktemp("data") / "waymo"
    options = data_waymo.Options(every=1, cameras=("FRONT",), whole=True, elongation=True)
    data_waymo.begin(root, options, {"training", "validation"})
    up, turn = np.eye(4), np.eye(4)
    up[2, 3] = 1.73
    c, s = np.cos(0.35), np.sin(0.35)
    turn[:2, :2] = [[c, s], [-s, c]]
    for split, name, segment in (("training", "train", "10_000_020_000"), ("validation", "val", "20_000_040_000")):
        ids = []
        for i, frame in enumerate(data_kitti.find_frames(scenes, [name])):
            rng, image = np.random.default_rng(i), frame.read_image()
            p2, velo2cam = data_kitti.split_projection(frame)
            camera_from_cloud = np.vstack([velo2cam, [0, 0, 0, 1]]) @ np.linalg.inv(up)
            view = data_waymo.View(turn, camera_from_cloud, p2, image.shape[1], image.shape[0])
            to_vehicle = np.linalg.inv(turn) @ up
            points = frame.read_points().astype(float)
            points = np.concatenate([points, points * [-1, 1, 1, 1]])
            rest = np.stack([points[:, 3], rng.random(len(points)), rng.random(len(points)) < 0.01], 1)
            vehicle_points = np.hstack([data_waymo.move(points[:, :3], to_vehicle), rest])
            types, numbers = data_kitti.read_labels(frame.label)
            known = np.isin(types, ["Car", "Van", "Pedestrian", "Cyclist"])
            kinds = [{"Pedestrian": 2, "Cyclist": 4}.get(kind, 1) for kind in types[known]]
            boxes = ops_boxes.label_to_box(numbers[known, 7:14], velo2cam)
            behind = boxes * [-1, 1, 1, 1, 1, 1, -1] + [0, 0, 0, 0, 0, 0, np.pi]
            boxes, kinds = ops_boxes.transform_boxes(np.concatenate([boxes, behind]), to_vehicle), kinds * 2
            columns = {"points": ops_boxes.points_in_boxes(vehicle_points, boxes).sum(0)}
            columns["id"] = [f"object {j}" for j in range(len(boxes))]
            stamp = 1_500_000_000_000_000 + 100_000 * i
            labels = eval_waymo.make_objects([(segment, stamp)], np.zeros(len(boxes)), kinds, boxes, **columns)
            ids.append(f"{segment}_{stamp}_FRONT")
            jpeg = io.BytesIO()
            Image.fromarray(image).save(jpeg, "JPEG", quality=95)
            files = data_waymo.frame_files(ids[-1], view, jpeg.getvalue(), vehicle_points, labels, options)
            for path, content in files:
                (root / "training" / path).write_bytes(content)
        (root / "segments" / split / f"{segment}.txt").write_text("".join(f"{i}\n" for i in ids))
    data_waymo.write_lists(root)
    return root


def folder_from(variable):
    """The folder that an environment variable names, from the repository on. Skips the test where it names none."""
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set")
    return REPO / os.environ[variable]  # whole, for scripts start elsewhere


@pytest.fixture(scope="session")
def kitti():
    """A KITTI object root with real frames in train, val and test."""
    return folder_from("SIMIPU_KITTI")


@pytest.fixture(scope="session")
def waymo():
    """A folder of Waymo's Parquet files with a frame to train on, and its metric tool's own fixture."""
    return folder_from("SIMIPU_WAYMO")


@pytest.fixture(scope="session")
def golden():
    """A folder of what official evaluators print, beside what they were given."""
    return folder_from("SIMIPU_GOLDEN")


@pytest.fixture(scope="session")
def raw_drive(scenes, tmp_path_factory):
    """Four built-in scenes as a KITTI raw drive: DATE/drive/{image_02,velodyne_points}/data, two calibrations."""
    training = scenes / "training"
    date = tmp_path_factory.mktemp("raw") / "2011_09_26"
    drive = date / "2011_09_26_drive_0001_sync"
    for part, folder, suffix in (("image_02", "image_2", "png"), ("velodyne_points", "velodyne", "bin")):
        target = drive / part / "data"
        target.mkdir(parents=True)
        for i in range(4):
            source = training / folder / f"{i:06d}.{suffix}"
            (target / f"{i:010d}.{suffix}").write_bytes(source.read_bytes())

    lines = (training / "calib" / "000000.txt").read_text().splitlines()
    calib = dict(line.split(": ") for line in lines if line)
    camera = f"calib_time: today\nP_rect_02: {calib['P2']}\nR_rect_00: {calib['R0_rect']}\n"
    (date / "calib_cam_to_cam.txt").write_text(camera)
    velo = calib["Tr_velo_to_cam"].split()
    rotation = " ".join(velo[i] for i in (0, 1, 2, 4, 5, 6, 8, 9, 10))
    (date / "calib_velo_to_cam.txt").write_text(f"R: {rotation}\nT: {velo[3]} {velo[7]} {velo[11]}\n")
    return date.parent


@pytest.fixture(scope="session", autouse=True)
def no_gpu():
    """Scripts and their children run on the CPU: two runs are equal bit for bit, several processes find room."""
    with pytest.MonkeyPatch.context() as patch:
        if GPU:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def gpu(request, monkeypatch):
    """Tests marked `gpu` see what the others do not."""
    if GPU and request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "is_available", is_available)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        if VISIBLE is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", VISIBLE)


@pytest.fixture(autouse=True)
def usual_signals():
    """Every test has signals as in a terminal: nohup and a shell's `&` start programs that ignore some."""
    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in usual.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def in_repo():
    """Every test starts where the repository is, wherever the last one left off."""
    os.chdir(REPO)


@pytest.fixture
def run_script(tmp_path):
    """run_script("simipu.py", "demo", ..., processes=2): a script as a user starts it, in an empty folder."""

    def run(script, *arguments, processes=0, timeout=1500, env=()):
        command = [sys.executable]
        if processes:
            command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += [str(REPO / script), *map(str, arguments)]
        env = os.environ | dict(env)
        if processes > 1:
            env["OMP_NUM_THREADS"] = "1"
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout, env=env)

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch, capsys):
    """run_here(module, "demo", ...): the same without the seconds that a process needs to start.

    -> (exit status, stdout, stderr), as the shell would see them.
    """

    def run(module, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        capsys.readouterr()
        status, last_words = 0, ""
        try:
            module.main()
        except SystemExit as e:
            status = e.code or 0
            if isinstance(e.code, str):  # what Python prints to stderr, with status 1
                status, last_words = 1, f"{e.code}\n"
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        said = capsys.readouterr()
        return status, said.out, said.err + last_words

    return run
