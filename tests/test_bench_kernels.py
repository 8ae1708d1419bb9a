"""Of a GPU's ways what can be seen without one: the kernels compile, with no fused multiply-adds, and a step never reads the device."""

import contextlib
import dataclasses
import re

import pytest
import torch
from conftest import needs_triton

import data
import data_depth
import data_kitti
import finetune_depth
import ops_triton as ops
import runtime
import simipu


@needs_triton
def test_every_kernel_compiles(run_script):
    done = run_script("kernels.py", env={"TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr
    _, _, names, _, *lines = (line.strip("| ").split("|") for line in done.stdout.splitlines() if line)
    rows = [dict(zip((name.strip() for name in names), (cell.strip() for cell in line))) for line in lines]
    assert {row["kernel"] for row in rows} == set(re.findall(r"^def _(\w+_kernel)\(", open(ops.__file__).read(), re.M))
    assert {row["type"] for row in rows if row["kernel"].startswith(("bilinear", "gather"))} == {"bfloat16", "float32"}
    for row in rows:
        assert int(row["fused"]) == 0, row  # one of them, and indices differ from torch's
        assert int(row["stack, bytes"]) <= 8, row  # a register or two: bilinear's backward pass in bfloat16, and in Triton 3.6 ball query
        assert 0 < int(row["registers"]) <= 255 and int(row["resident warps"].split()[0]) >= int(row["warps"])


@needs_triton
@pytest.mark.parametrize(
    "interpret, arguments, message",
    [("1", [], "TRITON_INTERPRET=1: kernels would be interpreted, not compiled"), ("0", ["--num-points", 100], "cannot pick m = 4096 of 100 points")],
)
def test_what_cannot_be_compiled_is_one_line(run_script, interpret, arguments, message):
    done = run_script("kernels.py", *arguments, env={"TRITON_INTERPRET": interpret})
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Meta tensors take a GPU's way, up to the kernels. Whatever brings a value of theirs to the host, and so would wait for a GPU, raises; and
    so does a mixture of devices. -> the kernels launched, and the devices of their arguments."""
    launched, autocast = [], torch.autocast
    monkeypatch.setattr(ops, "_use_triton", lambda *_: True)
    devices = lambda args: {t.device.type for t in args if isinstance(t, torch.Tensor)}
    monkeypatch.setattr(ops, "_launch", lambda kernel, grid, *args, **meta: launched.append((kernel.__name__, devices(args))))
    monkeypatch.setattr(torch, "autocast", lambda device, *a, **k: contextlib.nullcontext() if device == "meta" else autocast(device, *a, **k))
    return launched


def raw_batch(dataset):
    return data.collate([dataset[(0, i)] for i in range(2)])


@needs_triton
def test_a_pretraining_step_never_reads_the_device(scenes, as_on_a_gpu, monkeypatch):
    def match(alpha, beta, T, visible, method):  # the one thing that does, while the image encoder runs
        B, P, _ = alpha.shape
        place = lambda *shape: torch.empty(shape, dtype=torch.long, device="meta")
        return lambda: (place(B, P), torch.empty(B, P, device="meta"), place(B * P - 5))

    c = dataclasses.replace(simipu.PRESETS["kitti"][1], batch_size=2, group=2, crop=(0.5, 1.0), shift=(0.0, 0.25), jitter=(0.4, 0.4, 0.4, 0.1))
    batch = data.augment(raw_batch(data.PretrainFrames(data_kitti.find_frames(scenes), c)), (1242, 375), torch.device("meta"))
    monkeypatch.setattr(simipu, "match_in_background", match)
    model = simipu.SimIPU(c).to("meta").train()
    loss, stats = model(batch, False)
    loss.backward()
    for optimizer in simipu.build_optimizers(model, c):
        optimizer.step()
    assert loss.device.type == "meta" and set(stats) == {"intra", "inter", "match_m", "visible"}
    names = {name for name, _ in as_on_a_gpu}
    assert len(names) == 7 and all(devices == {"meta"} for _, devices in as_on_a_gpu)
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@needs_triton
def test_a_depth_step_never_reads_the_device(scenes, as_on_a_gpu):
    c = dataclasses.replace(finetune_depth.PRESETS["demo"][1], data_root=(str(scenes),), batch_size=2, group=2)
    frames, _, _ = finetune_depth.load_frames(c, runtime.start_run("cpu"))
    batch = data_depth.augment(raw_batch(data_depth.DepthFrames(frames, c)), data_depth.SCALE[c.dataset], torch.device("meta"))
    model = finetune_depth.DepthNet(c).to("meta").train()
    loss, stats = model(batch, False)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), c.clip)
    assert loss.device.type == "meta" and not stats and not as_on_a_gpu
