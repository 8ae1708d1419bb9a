"""finetune_mono3d.py and eval.py mono3d as a user starts them, in miniature: what they write, exact resuming, two
processes, what they refuse.
"""

import json

import numpy as np
import pytest
import torch
from conftest import load, read_log, steps_of, tensors
from test_data_nuscenes import made_up  # noqa: F401  a fixture
from test_finetune_mono3d import SMALL

import ablate
import eval as commands
import finetune_mono3d
import loop
from eval_nuscenes import ERRORS


def test_demo_in_miniature_resumes_exactly(run_here, scenes, tmp_path, monkeypatch):
    """Killed in step 3, after the checkpoint of step 2, it goes on to the same bits; two passes a step."""
    own = ["--group", "1", "--max-steps", "4", "--save-every", "2"]
    arguments = ["demo", "--data-root", scenes, *ablate.overridden([str(word) for word in SMALL], own)]
    status, said, err = run_here(finetune_mono3d, *arguments, "--name", "whole")
    assert status == 0, err
    whole = tmp_path / "out" / "whole"
    assert sorted(p.name for p in whole.iterdir()) == ["curves.png", "last.pt", "log.jsonl", "mono3d.png"]
    assert all((whole / name).read_bytes()[:4] == b"\x89PNG" for name in ("curves.png", "mono3d.png"))
    log = [line for line in read_log(whole) if "lr" in line]
    parts = ("classes", "offset", "depth", "size", "yaw", "direction", "centreness")
    for line in log:
        assert line["loss"] == pytest.approx(sum(line[part] for part in parts), rel=1e-3)
        assert line["positives"] > 3 and line["grad_norm"] > 0
        lr = finetune_mono3d.PRESETS["demo"][1].lr * finetune_mono3d.rate(line["step"] - 1, 4, 18)
        assert line["lr"] == pytest.approx([lr, 2 * lr])
    assert "6 images, 2 held out" in said and "a step: 2 frames = 1 processes x 2 passes x 1 frames" in said
    assert "nuScenes detection on 2 samples, val, KITTI's labels: mAP" in said and "mono3d.png: car" in said
    judged = read_log(whole)[-1]["mono3d"]
    row = ablate.row("x", [judged], ablate.TASKS["mono3d"])
    assert row.startswith(f"| x | {100 * judged['mean_ap']:.1f} [") and row.endswith("| – |")

    report = loop.Loop.report

    def until_3(run, epoch, stats):
        stats = report(run, epoch, stats)
        if run.done == 3:
            raise SystemExit(137)
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "report", until_3)
        assert run_here(finetune_mono3d, *arguments)[0] == 137
    out = tmp_path / "out" / "mono3d_demo"
    assert load(out / "last.pt")["step"] == 2 and steps_of(out)[-1]["step"] == 3
    status, said, err = run_here(finetune_mono3d, *arguments)
    assert status == 0 and "steps 2 to 4" in said, err
    assert steps_of(out) == steps_of(whole) and len(steps_of(out)) == 5
    a, b = load(out / "last.pt"), load(whole / "last.pt")
    for part in ("model", "optimizers"):
        assert len(tensors(a[part])) == len(tensors(b[part])) > 100
        assert all(torch.equal(one, other) for one, other in zip(tensors(a[part]), tensors(b[part])))


@pytest.fixture(scope="module")
def small_nuscenes():
    """The preset with everything in it, deformable convolutions included, at a size for tests."""
    own = ["--image-scale", "160", "90", "--image-encoder", "resnet18", "--max-steps", "2", "--splits", "mini_train"]
    own += ["--eval-splits", "mini_val", "--eval-frames", "2", "--save-every", "1"]
    return ["nuscenes", *ablate.overridden([str(word) for word in SMALL], own)]


def test_two_processes_are_one_and_their_results_are_scored(
    run_script, run_here, made_up, small_nuscenes, tmp_path, monkeypatch  # noqa: F811
):  # fmt: skip
    """nuScenes in miniature: a step of two processes is that of one which makes two passes; eval.py judges its
    checkpoint, writes results and scores them to the same figures.
    """
    monkeypatch.setattr(finetune_mono3d, "MIN_SCORE", 0.001)  # or two steps would find nothing
    monkeypatch.setattr(finetune_mono3d, "BEFORE_NMS", 40)
    arguments = [*ablate.overridden(small_nuscenes, ["--group", "1"]), "--data-root", made_up]
    done = run_script("finetune_mono3d.py", *arguments, "--name", "two", processes=2)
    assert done.returncode == 0 and "2 processes x 1 passes x 1 frames" in done.stdout, done.stderr
    status, said, err = run_here(finetune_mono3d, *arguments, "--name", "one")
    assert status == 0 and "1 processes x 2 passes x 1 frames" in said, err
    one, two = (tmp_path / "out" / name for name in ("one", "two"))
    for a, b in zip(tensors(load(one / "last.pt")["optimizers"]), tensors(load(two / "last.pt")["optimizers"])):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    assert "NDS" in said and "velocity" in steps_of(one)[0] and "attributes" in steps_of(one)[0]

    saved = tmp_path / "found"
    arguments = ["--json", tmp_path / "a.json", "--save", saved, "--drawn", 1]
    status, said, err = run_here(commands, "mono3d", one / "last.pt", *arguments)
    assert status == 0 and "wrote results.json and 1 pictures" in said and "SimIPU, Waymo" in said, err
    assert len(list((saved / "pictures").iterdir())) == 1
    content = json.loads((saved / "results.json").read_text())
    assert content["meta"]["use_camera"] and [len(boxes) > 40 for boxes in content["results"].values()] == [True, True]
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["tp_errors"].keys() == ERRORS.keys() and figures["cfg"]["dist_th_tp"] == 2
    judged = read_log(one)[-1]["mono3d"]
    assert judged["mean_ap"] == figures["mean_ap"] and judged["nd_score"] == figures["nd_score"]

    arguments = ["--data-root", made_up, "--version", "v1.0-mini", "--splits", "mini_val"]
    status, again, err = run_here(commands, "mono3d", saved / "results.json", *arguments)
    assert status == 0 and again.splitlines()[0] == said.splitlines()[1], err
    for wrong, words in WRONG_RESULTS:
        status, out, err = run_here(commands, "mono3d", saved / "results.json", *wrong(made_up))
        assert status == 1 and not out and err.count("\n") == 1 and words in err, err


WRONG_RESULTS = [
    (lambda root: ["--data-root", root, "--splits", "mini_train"], "results.json: 2 samples are not of mini_train of"),
    (lambda root: ["--splits", "mini_val"], "results.json: a results file; --data-root must say of what, one folder"),
    (lambda root: ["--data-root", root], "no folder v1.0-trainval, of which --splits val is"),
    (
        lambda root: ["--data-root", root, "--splits", "mini_val", "--frames", 1],
        "--frames and --save are for detectors",
    ),
]

WRONG = {
    "another encoder": (["--init", "ENCODER"], "; is this the image encoder of --image-encoder?"),
    "seen": (["--eval-splits", "trainval"], "--eval-splits trainval: 6 of its frames are trained on, training/00000"),
    "few frames": (["--batch-size", 8, "--group", 8], "--batch-size 8: the 6 frames found are too few"),
    "width": (["--width", 40], "--width 40: must be a multiple of 32"),
    "centre": (["--centre-width", 0], "--centre-width 0: must be a multiple of 32"),
    "ranges": (["--ranges", 8, 4, 32, 64], "--ranges 8.0 4.0 32.0 64.0: must be from 1 on, rising"),
    "sizes": (["--image-scale", 64, 64, 208, 208], "--image-scale 64 64 208 208: must be two numbers"),
    "bent timm": (["--deformable", "--image-encoder", "timm:x"], "deformable stages are of ResNets; give --no-defor"),
    "roots": (["--dataset", "nuscenes", "--data-root", "a", "b"], "--data-root, --eval-root: one folder of nuScenes"),
    "no nuScenes": (
        ["--dataset", "nuscenes", "--splits", "val"],
        ": no folder v1.0-trainval, of which --splits val is",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_leaves_no_trace(run_here, scenes, tmp_path, what):
    arguments, words = WRONG[what]
    encoder = tmp_path / "resnet34.pt"
    if "ENCODER" in arguments:
        torch.save({"layer1.0.conv1.weight": torch.zeros(3)}, encoder)
    usual = ["--data-root", scenes, *SMALL, "--max-steps", 3]
    own = [str(encoder) if a == "ENCODER" else str(a) for a in arguments]
    status, out, err = run_here(finetune_mono3d, "demo", *ablate.overridden([str(word) for word in usual], own))
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()


def test_real_frames(run_here, kitti, tmp_path):
    """The preset on KITTI's frames; for the time's sake a smaller network and images."""
    arguments = ["kitti", "--data-root", kitti.resolve(), "--max-steps", 1, "--batch-size", 2, "--width", 32]
    arguments += ["--image-encoder", "resnet18", "--image-scale", 310, 96, "--eval-frames", 1, "--workers", 0]
    status, said, err = run_here(finetune_mono3d, *arguments, "--log-every", 1)
    assert status == 0 and "22 images, 1 held out" in said, err
    log = steps_of(tmp_path / "out" / "mono3d_kitti")
    assert np.isfinite(log[0]["loss"]) and log[0]["positives"] > 1
