"""The real script by subprocess: alone, with two processes, stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import simipu

SMALL = ["--places", 32, "--num-points", 1024, "--image-scale", 160, 64, "--point-hidden", 32, "--image-hidden", 32, "--embed-dim", 32]
SMALL += ["--batch-size", 4, "--log-every", 1]
MINI = ["--eval-splits", *SMALL, "--workers", 0]  # no splits: no evaluation at the end
SAME = ("intra", "inter", "intra_top1", "inter_top1", "match_m", "intra_positive", "inter_negative", "inter_std")


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def figures(folder):
    return [[line[k] for k in ("step", "epoch", *SAME)] for line in read_log(folder)]


def test_demo_in_miniature(run_script, tmp_path):
    """Writes its scenes, learns, draws, judges itself on held-out scenes; a second run with the same seed has the same losses."""
    demo = ["demo", "--synthetic-frames", 8, *SMALL]
    done = run_script("simipu.py", *demo, "--max-steps", 30, "--workers", 1)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out" / "demo"
    assert sorted(p.name for p in out.iterdir()) == ["backbone.pt", "curves.png", "last.pt", "log.jsonl", "pairs.png"]
    assert (tmp_path / "data" / "synthetic" / "ImageSets" / "val.txt").exists()
    assert all((out / picture).read_bytes()[:4] == b"\x89PNG" for picture in ("curves.png", "pairs.png"))
    log = read_log(out)
    assert [line["step"] for line in log] == list(range(1, 31))
    for loss in ("intra", "inter"):
        values = [line[loss] for line in log]
        assert log[0][loss + "_chance"] == pytest.approx(np.log(4 * 32), abs=1e-3)
        assert np.mean(values[-6:]) < np.mean(values[:6]) - 0.1, values
    assert {"lr", "data_ms", "step_ms", "samples_per_s", "match_m", "visible", "intra_std", "inter_positive", "inter_negative"} <= log[0].keys()
    assert "matching on 2 frames not trained on" in done.stdout and "untrained" in done.stdout
    again = run_script("simipu.py", *demo, "--name", "again", "--workers", 0, "--max-steps", 5)  # loaded by other processes
    assert again.returncode == 0, again.stderr
    assert figures(tmp_path / "out" / "again") == figures(out)[:5]
    other = run_script("simipu.py", *demo, "--name", "other", "--seed", 1, "--workers", 0, "--max-steps", 2)
    assert other.returncode == 0 and figures(tmp_path / "out" / "other")[1][2:] != figures(out)[1][2:]


def test_two_processes(run_script, scenes, tmp_path):
    done = run_script("simipu.py", "demo", "--data-root", scenes, *MINI, "--max-steps", 20, processes=2)
    assert done.returncode == 0, done.stderr
    assert "2 processes x 1 passes x 2 frames" in done.stdout
    log = read_log(tmp_path / "out" / "demo")
    assert [line["step"] for line in log] == list(range(1, 21))
    assert log[0]["intra_chance"] == pytest.approx(np.log(2 * 32), abs=1e-3)  # a rank's own pairs
    for loss in ("intra", "inter"):
        values = [line[loss] for line in log]
        assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.1, values
    gathered = run_script("simipu.py", "demo", "--data-root", scenes, *MINI, "--max-steps", 2, "--gather-negatives", "--name", "gathered", processes=2)
    assert gathered.returncode == 0, gathered.stderr
    assert read_log(tmp_path / "out" / "gathered")[0]["intra_chance"] == pytest.approx(np.log(4 * 32), abs=1e-3)


@pytest.mark.parametrize("processes", [0, 2])
def test_resume_is_exact(run_script, scenes, tmp_path, processes):
    """Stopped after 3 steps and started again: every later line of the log, and every bit of the last checkpoint's weights and
    optimisers, is that of the run that never stopped. Image sizes change from step to step, gradients accumulate."""
    start = ["demo", "--data-root", scenes, *MINI, "--group", 1, "--save-every", 3, "--image-scale", 96, 64, 192, 96]
    for arguments in (["--max-steps", 6, "--name", "whole"], ["--max-steps", 3], ["--max-steps", 6]):
        done = run_script("simipu.py", *start, *arguments, processes=processes)
        assert done.returncode == 0, done.stderr
    assert "steps 3 to 6" in done.stdout
    assert figures(tmp_path / "out" / "demo") == figures(tmp_path / "out" / "whole")
    stopped, whole = (torch.load(tmp_path / "out" / name / "last.pt", weights_only=True) for name in ("demo", "whole"))
    for part in ("model", "optimizers", "step"):
        assert flat(stopped[part]) == flat(whole[part]), part


def flat(state):
    """Nested dicts and lists of tensors as one comparable list."""
    if torch.is_tensor(state):
        return state.flatten().tolist()
    return [flat(v) for v in (state.values() if isinstance(state, dict) else state)] if isinstance(state, (dict, list)) else state


def test_two_processes_make_the_step_of_one_that_accumulates(run_script, scenes, tmp_path):
    """The same groups, so the same gradients, but for rounding (two threads or one) that may
    flip a sampled place: under 1 % where a wrong average or a wrong group makes them differ by their own size."""
    start = ["demo", "--data-root", scenes, *MINI, "--group", 2, "--max-steps", 1, "--image-optimizer", "sgd"]
    gradients = {}
    for name, processes in (("one", 0), ("two", 2)):
        done = run_script("simipu.py", *start, "--name", name, processes=processes)
        assert done.returncode == 0, done.stderr
        optimizers = torch.load(tmp_path / "out" / name / "last.pt", weights_only=True)["optimizers"]
        states = [state for o in optimizers for state in o["state"].values()]
        gradients[name] = torch.cat([(s["exp_avg"] / 0.05 if "exp_avg" in s else s["momentum_buffer"]).flatten() for s in states])
    one, two = gradients.values()
    assert one.norm() > 1e-3 and (one - two).norm() < 0.05 * one.norm()


def test_sigterm_saves_and_leaves(scenes, tmp_path):
    command = [sys.executable, simipu.__file__, "demo", "--data-root", scenes, *MINI, "--max-steps", 500]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ})
    log = tmp_path / "out" / "demo" / "log.jsonl"
    try:
        deadline = time.time() + 600
        while time.time() < deadline and not (log.exists() and len(log.read_text().splitlines()) >= 3):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(300) == 0
    finally:
        process.kill()
    saved = torch.load(tmp_path / "out" / "demo" / "last.pt", weights_only=True)
    assert saved["step"] == read_log(log.parent)[-1]["step"] < 500


def test_kitti_mini(run_script, kitti, tmp_path):
    """The paper's networks and losses on real frames, on a CPU."""
    arguments = ["kitti", "--data-root", kitti.resolve(), "--splits", "train", "test", "--batch-size", 4, "--max-steps", 8, "--image-scale", 640, 192]
    done = run_script("simipu.py", *arguments, "--workers", 1, "--log-every", 1)
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "out" / "kitti")
    assert [line["step"] for line in log] == list(range(1, 9))
    assert log[0]["intra_chance"] == log[0]["inter_chance"] == pytest.approx(8.318, abs=1e-3)
    assert log[-1]["intra"] < log[0]["intra"] and all(line["visible"] == 1 for line in log)


def test_kitti_raw(run_script, kitti, tmp_path):
    if not (kitti / "raw").is_dir():
        pytest.skip("no raw drives beside it")
    arguments = ["kitti_raw", "--data-root", (kitti / "raw").resolve(), *MINI, "--max-steps", 2, "--image-encoder", "resnet18"]
    done = run_script("simipu.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert len(read_log(tmp_path / "out" / "kitti_raw")) == 2


# -----------------------------------------------------------------------------
# --gather-negatives: two processes on halves of a batch are one process on all of it


def _gather_worker(rank, uneven, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=2)
    x, y, weight = _gather_problem()
    weight = torch.nn.Parameter(weight)
    cut = 9 if uneven else 12
    half = slice(0, cut) if rank == 0 else slice(cut, 24)
    loss, stats = simipu.info_nce(x[half] @ weight, y[half] @ weight, 0.07, gather=True)
    loss.backward()
    torch.distributed.all_reduce(weight.grad)  # what DDP does: the mean over ranks
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    if rank == 0:
        torch.save({"loss": total / 2, "grad": weight.grad / 2, "chance": stats["chance"]}, out)
    torch.distributed.destroy_process_group()


def _gather_problem():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(24, 6, generator=g, dtype=torch.float64)
    return x, x + torch.randn(24, 6, generator=g, dtype=torch.float64), torch.randn(6, 5, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("uneven", [False, True])
def test_gathered_negatives_equal_one_process_on_the_whole_batch(tmp_path, uneven):
    out = tmp_path / "result.pt"
    mp.spawn(_gather_worker, (uneven, out), nprocs=2)
    result = torch.load(out)
    x, y, weight = _gather_problem()
    weight.requires_grad_()
    loss, stats = simipu.info_nce(x @ weight, y @ weight, 0.07)
    loss.backward()
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result["grad"], weight.grad, rtol=1e-10, atol=1e-12)
    assert result["chance"] == stats["chance"]


# -----------------------------------------------------------------------------
# batch statistics shared between ranks, as on GPUs


def _sync_worker(rank, out):
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}.meet", rank=rank, world_size=2)
    layer, x, count, coefficients = _sync_problem()
    layer.sync = True
    half = slice(0, 7) if rank == 0 else slice(7, 20)
    part = x[half].clone().requires_grad_()
    (layer(part, count[half]) * coefficients[half]).sum().backward()
    grads = [p.grad for p in layer.parameters()]
    for g in grads:
        torch.distributed.all_reduce(g)
    torch.save({"dx": part.grad, "grads": grads, "mean": layer.bn.running_mean, "var": layer.bn.running_var}, f"{out}.{rank}")
    torch.distributed.destroy_process_group()


def _sync_problem():
    torch.manual_seed(0)
    layer = simipu.PointLayer(3, 4, dims=2, eps=1e-3).double()
    return layer, torch.randn(20, 3, dtype=torch.float64), torch.randint(0, 4, (20,)), torch.randn(20, 4, dtype=torch.float64)


def test_synchronised_point_layers_equal_one_process_on_all_rows(tmp_path):
    mp.spawn(_sync_worker, (tmp_path / "sync",), nprocs=2)
    ranks = [torch.load(tmp_path / f"sync.{rank}") for rank in range(2)]
    layer, x, count, coefficients = _sync_problem()
    x.requires_grad_()
    (layer(x, count) * coefficients).sum().backward()
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), x.grad)
    for r in ranks:
        torch.testing.assert_close(r["grads"], [p.grad for p in layer.parameters()])
        torch.testing.assert_close((r["mean"], r["var"]), (layer.bn.running_mean, layer.bn.running_var))
