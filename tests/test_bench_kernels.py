"""Of a GPU's ways what can be seen without one.

The kernels compile, with no fused multiply-adds, and a training step never reads the device.
"""

import contextlib
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import REPO, needs_triton

import bench as benchmark
import data
import data_depth
import data_kitti
import finetune_depth
import ops_triton as ops
import runtime
import simipu


@needs_triton
def test_every_kernel_compiles(run_script):
    done = run_script("bench.py", "kernels", env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    _, _, names, _, *lines = (line.strip("| ").split("|") for line in done.stdout.splitlines() if line)
    rows = [dict(zip((name.strip() for name in names), (cell.strip() for cell in line))) for line in lines]
    kernels = re.findall(r"^def _(\w+_kernel)\(", Path(ops.__file__).read_text(), re.M)
    assert {row["kernel"] for row in rows} == set(kernels)
    assert {row["type"] for row in rows if row["kernel"].startswith(("bilinear", "gather"))} == {"bfloat16", "float32"}
    for row in rows:
        assert int(row["fused"]) == 0, row  # one of them, and indices differ from torch's
        # a register or two: bilinear's backward pass in bfloat16, and in Triton 3.6 ball query
        assert int(row["stack, bytes"]) <= 8, row
        assert 0 < int(row["registers"]) <= 255
        assert int(row["resident warps"].split()[0]) >= int(row["warps"])


@pytest.mark.parametrize(
    "warps, registers, shared, resident",
    [
        (4, 32, 0, 64),  # as many as there may be
        (4, 33, 0, 48),  # 1280 registers a warp, for they come by the 256
        (8, 255, 32, 8),
        (4, 16, 100 * 1024, 8),
        (1, 16, 0, 32),  # 32 programs
    ],
)
def test_resident_warps(warps, registers, shared, resident):
    assert benchmark.resident_warps(warps, registers, shared) == resident


@needs_triton
@pytest.mark.parametrize(
    "interpret, arguments, message",
    [
        ("1", [], "TRITON_INTERPRET=1: kernels would be interpreted, not compiled"),
        ("0", ["--num-points", 100], "cannot pick m = 4096 of 100 points"),
        ("0", ["--samples", -1], "--samples -1: must be above 0"),
    ],
)
def test_what_cannot_be_compiled_is_one_line(run_here, monkeypatch, interpret, arguments, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    status, _, error = run_here(benchmark, "kernels", *arguments)
    assert (status, error) == (1, f"error: {message}\n")


def test_without_triton(tmp_path):
    """bench.py can be imported, and `kernels` is one line."""
    code = "import sys; sys.modules['triton'] = None; import bench; sys.argv[1:] = ['kernels']; bench.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "error: Triton is not installed\n")


@needs_triton
def test_triton_is_as_before_once_kernels_are_compiled():
    triton = benchmark.triton
    driver, run, use_triton = triton.runtime.driver, triton.runtime.JITFunction.run, ops._use_triton
    before = dict(vars(driver))
    with benchmark.launches():
        assert driver.active.get_current_target().arch == 90
        assert driver.active.get_current_device() == -1  # kernels are kept by device: never those of a real one
    assert vars(driver) == before
    assert triton.runtime.JITFunction.run is run and ops._use_triton is use_triton


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Meta tensors take a GPU's way, up to the kernels.

    Whatever brings a value of theirs to the host, and so would wait for a GPU, raises; and so does a mixture of
    devices. -> the kernels launched, and the devices of their arguments.
    """
    launched, autocast = [], torch.autocast

    def launch(kernel, grid, *args, **meta):
        launched.append((kernel.__name__, {t.device.type for t in args if isinstance(t, torch.Tensor)}))

    def no_autocast_of_meta(device, *args, **kwargs):
        return contextlib.nullcontext() if device == "meta" else autocast(device, *args, **kwargs)

    monkeypatch.setattr(ops, "_use_triton", lambda *_: True)
    monkeypatch.setattr(ops, "_launch", launch)
    monkeypatch.setattr(torch, "autocast", no_autocast_of_meta)
    return launched


def raw_batch(dataset):
    return data.collate([dataset[(0, i)] for i in range(2)])


@needs_triton
def test_a_pretraining_step_never_reads_the_device(scenes, as_on_a_gpu, monkeypatch):
    def match(alpha, beta, T, visible, method):  # the one thing that does, while both encoders run
        B, P, _ = alpha.shape
        place = lambda *shape: torch.empty(shape, dtype=torch.long, device="meta")
        return lambda: (place(B, P), torch.empty(B, P, device="meta"), place(B * P - 5))

    views = {"crop": (0.5, 1.0), "shift": (0.0, 0.25), "jitter": (0.4, 0.4, 0.4, 0.1)}
    c = dataclasses.replace(simipu.PRESETS["kitti"][1], batch_size=2, group=2, **views)
    raw = raw_batch(data.PretrainFrames(data_kitti.find_frames(scenes), c))
    batch = data.augment(raw, (1242, 375), torch.device("meta"))
    monkeypatch.setattr(simipu, "match_in_background", match)
    model = simipu.SimIPU(c).to("meta").train()
    loss, stats = model(batch, False)
    loss.backward()
    assert loss.device.type == "meta" and set(stats) == {"intra", "inter", "match_m", "visible"}
    names = {name for name, _ in as_on_a_gpu}
    assert len(names) == 7 and all(devices == {"meta"} for _, devices in as_on_a_gpu)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@needs_triton
def test_a_depth_step_never_reads_the_device(scenes, as_on_a_gpu):
    c = dataclasses.replace(finetune_depth.PRESETS["demo"][1], data_root=(str(scenes),), batch_size=2, group=2)
    frames, _, _ = finetune_depth.load_frames(c, runtime.start_run("cpu"))
    raw = raw_batch(data_depth.DepthFrames(frames, c))
    batch = data_depth.augment(raw, data_depth.SCALE[c.dataset], torch.device("meta"))
    model = finetune_depth.DepthNet(c).to("meta").train()
    loss, stats = model(batch, False)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    assert loss.device.type == "meta" and not stats and not as_on_a_gpu
