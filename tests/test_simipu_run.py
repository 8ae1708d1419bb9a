"""simipu.py as a user starts it: the demo, two processes, real frames."""

import json

import numpy as np
import pytest
import torch
from conftest import needs_gpu
from test_data_kitti import write_sequence
from test_loop import MINI, SMALL, figures, read_log

import data
import data_kitti
import simipu


def test_demo_in_miniature(run_script, run_here, tmp_path):
    """Writes its scenes, learns, draws, judges itself on held-out scenes, says what it was made with; the same seed has
    the same losses.
    """
    demo = ["demo", "--synthetic-frames", 8, *SMALL]
    done = run_script("simipu.py", *demo, "--epochs", 1, "--max-steps", 30, "--workers", 1, "--eval-every", 20)
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
        assert 1 <= log[0][loss + "_rank"] <= 32 and 1 <= log[0][loss + "_key_rank"] <= 32
    logged = "data_ms step_ms samples_per_s match_m visible intra_std inter_key_std inter_positive inter_negative"
    assert set(logged.split()) <= log[0].keys()

    # judged at step 20 and at the end, beside a random network
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    judged = [line for line in lines if "match" in line]
    assert [line["step"] for line in judged] == [20, 30] and judged[1]["match"]["frames"] == 2
    assert "matching on 2 frames" in done.stdout and "random" in done.stdout
    assert f"{judged[1]['match']['right_rank']:.1f} %" in done.stdout.splitlines()[-1]

    # started again for fewer steps than it has, it judges what it has
    status, again, said = run_here(simipu, *demo, "--workers", 0, "--max-steps", 29, "--eval-every", 20)
    assert status == 0 and again.splitlines()[-1] == done.stdout.splitlines()[-1], said

    # provenance: the log's first line, and the checkpoint
    saved = torch.load(out / "last.pt", weights_only=True)
    for about in (lines[0], saved):
        assert (
            about["packages"]["torch"] == torch.__version__
            and about["config"]["places"] == 32
            and about["data"]["frames"] == 6
        )
        assert len(about["data"]["fingerprint"]) == 16 and about["dirty"] in (True, False, None)
        assert about["machine"]["processes"] == 1
    first = [tmp_path / "data/synthetic/training" / part for part in ("image_2/000001.png", "velodyne/000001.bin")]
    line = "training/000001 {} {}".format(*(path.stat().st_size for path in first))
    assert data.digests([line])[0] in saved["inventory"] and len(saved["inventory"]) == 6

    # loaded by other processes
    again = run_script("simipu.py", *demo, "--name", "again", "--workers", 0, "--max-steps", 5, "--eval-splits")
    assert again.returncode == 0, again.stderr
    assert figures(tmp_path / "out" / "again") == figures(out)[:5]
    other = ["--name", "other", "--seed", 1, "--workers", 0, "--max-steps", 2, "--eval-splits"]
    status, _, said = run_here(simipu, *demo, *other)
    assert status == 0 and figures(tmp_path / "out" / "other")[1][2:] != figures(out)[1][2:], said


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_on_a_gpu(run_script, scenes, tmp_path, device):
    """In float32 the first losses are a CPU's; in bfloat16 it learns, and a run that ended goes on."""

    def log_of(name, *more):
        done = run_script("simipu.py", "demo", "--data-root", scenes, *MINI, "--name", name, *more)
        assert done.returncode == 0, done.stderr
        return read_log(tmp_path / "out" / name)

    one, other = (log_of(name, "--device", name, "--amp", "never", "--max-steps", 1)[0] for name in ("cpu", device))
    assert [other[k] for k in ("intra", "inter", "match_m")] == pytest.approx(
        [one[k] for k in ("intra", "inter", "match_m")], rel=0.01
    )
    log_of("bfloat16", "--device", device, "--max-steps", 10)
    log = log_of("bfloat16", "--device", device, "--max-steps", 30)
    assert [line["step"] for line in log] == list(range(1, 31)) and all(line["memory_gb"] > 0 for line in log)
    for loss in ("intra", "inter"):
        values = [line[loss] for line in log]
        assert np.mean(values[-6:]) < np.mean(values[:6]) - 0.1, values


def test_bfloat16_on_a_cpu(run_here, scenes, tmp_path):
    """`--amp always` rounds the networks, and no more than that; `gpu`, the default, does not."""

    def figures_of(amp):
        more = ["--amp", amp, "--name", amp, "--max-steps", 1, "--device", "cpu"]
        status, _, err = run_here(simipu, "demo", "--data-root", scenes, *MINI, *more)
        assert status == 0, err
        return [read_log(tmp_path / "out" / amp)[0][name] for name in ("intra", "inter", "match_m")]

    never, gpu, always = (figures_of(amp) for amp in ("never", "gpu", "always"))
    assert never == gpu != always
    assert always == pytest.approx(never, rel=0.1)  # features choose the places: a rounding may choose another


def test_checkpoints_that_do_not_fit(run_here, scenes, tmp_path):
    start = ["demo", "--data-root", scenes, *MINI, "--max-steps", 1]

    def refused(*arguments):
        status, _, err = run_here(simipu, *start, *arguments)
        assert status == 1 and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    assert run_here(simipu, *start)[0] == 0
    last = tmp_path / "out" / "demo" / "last.pt"
    before = last.read_bytes(), (last.parent / "log.jsonl").read_text()
    assert "out/demo/last.pt: made with temperature=0.07, not 0.1" in refused("--temperature", 0.1)
    assert (last.read_bytes(), (last.parent / "log.jsonl").read_text()) == before
    torch.save({"state_dict": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, tmp_path / "little.pth")
    assert "little.pth: " in refused("--name", "new", "--init", "little.pth")
    assert "frames=" in refused("--splits", "trainval", "--batch-size", 4)  # other frames, another order
    last.write_bytes(before[0][:1000])
    assert "last.pt: not a readable checkpoint" in refused()


def test_two_processes(run_script, scenes, tmp_path):
    done = run_script(
        "simipu.py", "demo", "--data-root", scenes, *MINI, "--max-steps", 20, "--gather-negatives", processes=2
    )
    assert done.returncode == 0, done.stderr
    assert "arning" not in done.stderr, done.stderr  # V13: torch's, of strides and of arguments
    assert "2 processes x 1 passes x 2 frames" in done.stdout
    log = read_log(tmp_path / "out" / "demo")
    assert [line["step"] for line in log] == list(range(1, 21))
    assert log[0]["intra_chance"] == pytest.approx(np.log(4 * 32), abs=1e-3)  # both ranks' pairs
    for loss in ("intra", "inter"):
        values = [line[loss] for line in log]
        assert np.mean(values[-5:]) < np.mean(values[:5]) - 0.1, values


@pytest.mark.parametrize("processes, log_every, rate", [(0, 10, "--point-lr"), (2, 1, "--image-lr")])
def test_a_loss_that_is_not_finite_stops_the_run(run_script, scenes, tmp_path, processes, log_every, rate):
    """An absurd learning rate: finite loss in step 1, and not after. One message names the step and the frames; the
    checkpoint of a good step stays. Found a step late where nothing was about to be written.
    """
    arguments = ["--data-root", scenes, *MINI, "--image-optimizer", "sgd", rate, 1e30]
    arguments += ["--log-every", log_every, "--save-every", log_every]
    done = run_script("simipu.py", "demo", *arguments, "--max-steps", 20, processes=processes)
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if "error: " in line and "not finite" in line]
    says = "error: step 2: the loss or its gradient is not finite; frames training/0000"
    assert len(errors) == 1 and errors[0].startswith(says), done.stderr
    assert len(set(errors[0].split("frames ")[1].split(";")[0].split(", "))) == 4  # all that were in that step
    out = tmp_path / "out" / "demo"
    assert processes or "Traceback" not in done.stderr
    assert all(np.isfinite(v) for line in read_log(out) for v in line.values() if isinstance(v, float))
    if processes:
        saved = torch.load(out / "last.pt", weights_only=True)
        assert saved["step"] == 1 and all(v.isfinite().all() for v in saved["model"].values())
    else:
        assert not (out / "last.pt").exists()


def test_weights_that_are_not_finite_are_not_saved(run_here, scenes, tmp_path, monkeypatch):
    """A finite loss, whose gradient was not, in the step that is saved: the checkpoint of the step before stays."""
    build, steps = simipu.build_optimizers, []

    def poisoned(model, c):
        optimizers = build(model, c)
        weight = optimizers[0].param_groups[0]["params"][0]

        def poison(*_):
            steps.append(1)
            if len(steps) == 3:
                weight.data.view(-1)[0] = float("nan")

        optimizers[0].register_step_post_hook(poison)
        return optimizers

    monkeypatch.setattr(simipu, "build_optimizers", poisoned)
    status, _, err = run_here(simipu, "demo", "--data-root", scenes, *MINI, "--max-steps", 9, "--save-every", 1)
    says = "error: step 3: the loss or its gradient is not finite; frames training/0000"
    assert status == 1 and err.splitlines()[-1].startswith(says)
    saved = torch.load(tmp_path / "out" / "demo" / "last.pt", weights_only=True)
    assert saved["step"] == 2 and all(v.isfinite().all() for v in saved["model"].values())


def test_two_processes_make_the_step_of_one_that_accumulates(run_script, run_here, scenes, tmp_path):
    """The same groups, so the same gradients, but for rounding (two threads or one) that may flip a sampled place:
    under 1 % where a wrong average or a wrong group makes them differ by their own size.
    """
    start = ["demo", "--data-root", scenes, *MINI, "--group", 2, "--max-steps", 1, "--image-optimizer", "sgd"]
    gradients = {}
    done = run_script("simipu.py", *start, "--name", "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert run_here(simipu, *start, "--name", "one")[0] == 0
    for name in ("one", "two"):
        optimizers = torch.load(tmp_path / "out" / name / "last.pt", weights_only=True)["optimizers"]
        states = [state for o in optimizers for state in o["state"].values()]
        first = [s["exp_avg"] / 0.05 if "exp_avg" in s else s["momentum_buffer"] for s in states]
        gradients[name] = torch.cat([gradient.flatten() for gradient in first])
        chance = read_log(tmp_path / "out" / name)[0]["intra_chance"]
        assert chance == pytest.approx(np.log(2 * 32), abs=1e-3)  # a pass's own pairs
    one, two = gradients.values()
    assert one.norm() > 1e-3 and (one - two).norm() < 0.05 * one.norm()


def test_kitti_mini(run_script, kitti, tmp_path):
    """The paper's networks and losses on real frames, on a CPU."""
    arguments = ["kitti", "--data-root", kitti.resolve(), "--splits", "train", "test", "--image-scale", 320, 96]
    arguments += ["--batch-size", 2, "--max-steps", 2]
    done = run_script("simipu.py", *arguments, "--workers", 1, "--log-every", 1, "--eval-splits")
    assert done.returncode == 0, done.stderr
    log = read_log(tmp_path / "out" / "kitti")
    assert [line["step"] for line in log] == [1, 2]
    assert log[0]["intra_chance"] == log[0]["inter_chance"] == pytest.approx(np.log(2 * 1024), abs=1e-3)
    assert all(line["visible"] == 1 and line["match_m"] < 1 for line in log)
    assert all(line["intra"] < line["intra_chance"] for line in log)  # reflectance alone tells something


def test_kitti_odometry(run_script, raw_drive, tmp_path):
    root = write_sequence(tmp_path, "04", data_kitti.find_frames(raw_drive)).parents[1]
    arguments = [*MINI, "--max-steps", 2, "--image-encoder", "resnet18", "--frame-stride", 1, "--splits", "04"]
    done = run_script("simipu.py", "kitti_odometry", "--data-root", root, *arguments)
    assert done.returncode == 0 and "kitti_odometry: 4 frames" in done.stdout, done.stderr
    assert len(read_log(tmp_path / "out" / "kitti_odometry")) == 2


def test_waymo(run_script, waymo_scenes, tmp_path):
    arguments = [*MINI, "--max-steps", 2, "--image-encoder", "resnet18"]
    done = run_script("simipu.py", "waymo", "--data-root", waymo_scenes, *arguments)
    assert done.returncode == 0 and "waymo: 6 frames" in done.stdout, done.stderr
    assert len(read_log(tmp_path / "out" / "waymo")) == 2


def test_kitti_raw(run_here, kitti, tmp_path):
    if not (kitti / "raw").is_dir():
        pytest.skip("no raw drives beside it")
    arguments = ["--data-root", (kitti / "raw").resolve(), *MINI, "--max-steps", 2, "--image-encoder", "resnet18"]
    status, _, err = run_here(simipu, "kitti_raw", *arguments)
    assert status == 0, err
    assert len(read_log(tmp_path / "out" / "kitti_raw")) == 2
