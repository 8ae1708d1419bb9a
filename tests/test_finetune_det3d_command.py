"""finetune_det3d.py as a user starts it, in miniature: what it writes, that it resumes exactly, what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import load, read_log, steps_of, tensors
from test_finetune_det3d import SMALL

import ablate
import anchors
import encoders
import eval as evaluate
import eval_boxes
import finetune_det3d
import loop


def test_demo_in_miniature(run_here, scenes, tmp_path):
    arguments = ["demo", "--data-root", scenes, *SMALL, "--max-steps", 3, "--eval-every", 2]
    status, said, err = run_here(finetune_det3d, *arguments)
    assert status == 0, err
    out = tmp_path / "out" / "det3d_demo"
    *files, objects = sorted(p.name for p in out.iterdir())
    assert files == ["curves.png", "det3d.png", "last.pt", "log.jsonl"] and objects.startswith("objects_")
    assert all((out / picture).read_bytes()[:4] == b"\x89PNG" for picture in files[:2])
    log = [line for line in read_log(out) if "lr" in line]
    assert [line["step"] for line in log] == [1, 2, 3] and [line["epoch"] for line in log] == [0, 0, 0]
    for line in log:
        assert line["loss"] == pytest.approx(line["classes"] + line["boxes"] + line["direction"], rel=1e-3)
        assert line["positives"] > 3 and line["grad_norm"] > 0
        assert line["lr"] == pytest.approx([3e-3 * finetune_det3d.rate(line["step"] - 1, 3, 156)] * 2)
    judged = [line for line in read_log(out) if "det3d" in line]
    assert [line["step"] for line in judged] == [2, 3] and judged[1]["det3d"]["frames"] == 2
    assert judged[1]["det3d"]["Car"].keys() == {"n", *eval_boxes.TITLES}
    assert "6 frames, 2 held out" in said and "objects to paste" in said and "AP in percent" in said
    assert "a step: 2 frames = 1 processes x 1 passes x 2 frames" in said and "det3d.png: Pedestrian" in said
    saved = load(out / "last.pt")
    assert saved["step"] == 3 and saved["script"] == "finetune_det3d.py" and len(saved["inventory"]) == 6

    status, again, err = run_here(finetune_det3d, *arguments)  # a finished run judges again
    assert status == 0 and again.splitlines()[-24:] == said.splitlines()[-24:], err
    assert "keep_rows=1, not 2" in run_here(finetune_det3d, *arguments, "--keep-rows", 2)[2]


def test_a_detector_and_its_files_are_judged_alike(run_here, scenes, tmp_path, monkeypatch):
    """`eval.py det3d` says what the run said: of last.pt, and of the result files that it writes. Pictures; frames
    without labels; files that are not there."""
    monkeypatch.setattr(anchors, "MIN_SCORE", 0.0)  # two steps teach nobody: let through what there is
    status, said, err = run_here(
        finetune_det3d, "demo", "--data-root", scenes, *SMALL, "--max-steps", 2, "--warm-up", 0
    )
    assert status == 0, err
    last = tmp_path / "out" / "det3d_demo" / "last.pt"
    figures = [line for line in read_log(last.parent) if "det3d" in line][-1]["det3d"]
    assert figures.pop("frames") == 2 and max(figures["Car"]["n"]) > 3
    assert any(max(figures["Car"][kind]["AP11"]) > 0 for kind in ("2d", "bev loose"))

    status, again, err = run_here(evaluate, "det3d", last, "--save", "found", "--json", "ap.json", "--drawn", 1)
    table = said[said.index("KITTI object on 2 frames") :].splitlines()[:26]
    assert status == 0 and again.splitlines()[:26] == table, err
    assert "wrote 2 result files and 1 pictures into found/" in again
    assert json.loads((tmp_path / "ap.json").read_text()) == figures
    assert len(list((tmp_path / "found" / "pictures").iterdir())) == 1
    command = ["det3d", "found", "--data-root", scenes, "--splits", "val"]
    status, said, err = run_here(evaluate, *command, "--json", "files.json")
    assert status == 0 and said.splitlines()[:2] == table[:2] and len(said.splitlines()) == 26, err
    of_files = json.loads((tmp_path / "files.json").read_text())
    for name in figures:  # files have four decimals
        assert of_files[name]["n"] == figures[name]["n"]
        for kind in eval_boxes.TITLES:
            assert of_files[name][kind]["AP11"] == pytest.approx(figures[name][kind]["AP11"], abs=0.5), (name, kind)

    # some files, none, broken ones; two frames of one number
    first, second = sorted((tmp_path / "found").glob("*.txt"))
    second.rename(tmp_path / "second.txt")
    status, said, err = run_here(evaluate, *command)
    assert status == 0 and "on 1 frames" in said and "1 of the 2 frames have no result file" in said, err
    line = first.read_text().splitlines()[0]
    refused = {
        "line 1 has 15 columns; must be 16": " ".join(line.split()[:-1]),
        "line 1": line.rsplit(" ", 1)[0] + " nan",
    }
    for words, text in refused.items():
        first.write_text(text + "\n")
        status, _, err = run_here(evaluate, *command)
        assert (
            status == 1 and err.startswith(f"error: found/{first.name}: ") and words in err and err.count("\n") == 1
        ), err
    other = shutil.copytree(scenes, tmp_path / "other")
    for photo in (other / "training" / "image_2").iterdir():
        photo.write_bytes(photo.read_bytes() + b" ")
    status, _, err = run_here(evaluate, "det3d", "found", "--data-root", scenes, other)
    assert status == 1 and f"a result file {first.name} would be of both" in err and err.count("\n") == 1, err
    status, _, err = run_here(evaluate, *command, "--save", "pictures")
    assert status == 1 and err == "error: found: a folder of result files; --save is for detectors\n"
    first.unlink()
    status, _, err = run_here(evaluate, *command)
    assert status == 1 and err == f"error: found: no result file of the 2 frames, such as {first.name}\n"

    # frames without labels: written, not judged
    root = shutil.copytree(scenes, tmp_path / "unlabelled")
    (root / "training").rename(root / "testing")
    shutil.rmtree(root / "testing" / "label_2")
    (root / "ImageSets" / "val.txt").rename(root / "ImageSets" / "test.txt")
    command = ["det3d", last, "--data-root", root, "--splits", "test", "--save", "unseen"]
    status, said, err = run_here(evaluate, *command)
    assert status == 0 and said.startswith("wrote 2 result files and 2 pictures") and said.count("\n") == 1, err
    assert (tmp_path / "unseen" / second.name).read_bytes() == (tmp_path / "second.txt").read_bytes()


def test_resumes_exactly(run_here, scenes, tmp_path, monkeypatch):
    """Killed in step 3, after the checkpoint of step 2, it goes on to the same bits: objects pasted, images of changing
    sizes, two passes a step.
    """
    own = ["--image-scale", "96", "32", "192", "64", "--image-optimizer", "sgd", "--group", "1", "--eval-splits"]
    arguments = ["demo", "--data-root", scenes, *ablate.overridden([str(word) for word in SMALL], own)]
    arguments += ["--max-steps", 4, "--save-every", 2]
    status, _, err = run_here(finetune_det3d, *arguments, "--name", "whole")
    assert status == 0, err
    report = loop.Loop.report

    def until_3(run, epoch, stats):
        stats = report(run, epoch, stats)
        if run.done == 3:
            raise SystemExit(137)
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "report", until_3)
        assert run_here(finetune_det3d, *arguments)[0] == 137
    out, whole = tmp_path / "out" / "det3d_demo", tmp_path / "out" / "whole"
    assert load(out / "last.pt")["step"] == 2 and steps_of(out)[-1]["step"] == 3
    status, said, err = run_here(finetune_det3d, *arguments)
    assert status == 0 and "steps 2 to 4" in said, err
    assert steps_of(out) == steps_of(whole) and len(steps_of(out)) == 4
    a, b = load(out / "last.pt"), load(whole / "last.pt")
    for part in ("model", "optimizers"):
        assert len(tensors(a[part])) == len(tensors(b[part])) > 100
        assert all(torch.equal(one, other) for one, other in zip(tensors(a[part]), tensors(b[part])))


def test_without_a_class_and_without_any_label(run_here, scenes, tmp_path):
    """No pedestrian anywhere, then nothing: it trains, and the table has dashes. A share of the frames, fewer rows."""
    shutil.copytree(scenes, tmp_path / "scenes")
    labels = list((tmp_path / "scenes" / "training" / "label_2").iterdir())
    arguments = ["demo", "--data-root", tmp_path / "scenes", *SMALL, "--max-steps", 1]
    arguments += ["--labels", 0.5, "--keep-rows", 2]
    for what, name in (("Pedestrian", "some"), ("", "none")):
        for label in labels:
            lines = label.read_text().splitlines(keepends=True)
            label.write_text("".join(line for line in lines if not line.startswith(what)))
        status, said, err = run_here(finetune_det3d, *arguments, "--name", name)
        assert status == 0 and "3 frames, 2 held out" in said, err
        rows = {" ".join(line.split()[:-9]): line.split()[-9:] for line in said.splitlines() if " 3D " in line}
        assert rows["Pedestrian 3D"] == ["0"] * 3 + ["-"] * 6
        assert (rows["Car 3D"] == rows["Pedestrian 3D"]) == (name == "none")
        first = steps_of(tmp_path / "out" / name)[0]
        assert np.isfinite(first["loss"]) and (first["positives"] == 0) == (name == "none")
    status, _, err = run_here(finetune_det3d, *arguments, "--name", "some")  # whose labels are others now
    assert status == 1 and "last.pt: made with frames=" in err and err.count("\n") == 1


WRONG = {
    "another encoder": (["--init", "ENCODER"], "; is this the image encoder of --image-encoder?"),
    "no detector": (["--load", "ENCODER"], " tensors fit, img_backbone.conv1.weight does not; is it a detector of"),
    "no file": (["--load", "nowhere.pt"], "nowhere.pt: no such file"),
    "init without image": (["--no-image", "--init", "ENCODER"], "--init: with --no-image there is no image encoder"),
    "init and load": (["--load", "a.pt", "--init", "b.pt"], "--init: the file of --load has an image encoder, too"),
    "raw drive": (["--data-root", "RAW"], ": no training/ in it; labels are in KITTI's object layout alone"),
    "seen": (["--eval-splits", "trainval"], "--eval-splits trainval: 6 of its frames are trained on, training/00000"),
    "few frames": (["--batch-size", 8, "--group", 8], "--batch-size 8: the 6 frames found are too few"),
    "broken label": (["--data-root", "BROKEN"], "000002.txt: line 3 is no label (a type and 14 numbers)"),
    "no label": (["--data-root", "LACKING"], "000004.txt: missing; it holds the boxes of frame training/000004"),
    "nothing there": (
        ["--point-range", 300, -9.6, -3, 319.2, 9.6, 1],
        " lie within --point-range, fewer than 16; wrong",
    ),
    "range": (["--point-range", 0, -9.6, -3, 19.3, 9.6, 1], "--point-range 0.0 -9.6 -3.0 19.3 9.6 1.0: must be whole"),
    "height": (
        ["--voxel", 0.1, 0.1, 0.2],
        "1.0: must be whole voxels: a multiple of 16 along x and y, 24 or more along z",
    ),
    "sixteens": (["--point-range", 0, -9.6, -3, 20, 9.6, 1], "must be whole voxels: a multiple of 16 along x and y"),
    "enlarged": (["--upsample", 2, 2], "--upsample 2 2: the second must be twice the first"),
    "sizes": (["--image-scale", 320, 96, 640], "--image-scale 320 96 640: two numbers (width height) or four"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_leaves_no_trace(run_here, scenes, raw_drive, tmp_path, what):
    arguments, words = WRONG[what]
    places = {"ENCODER": tmp_path / "resnet34.pt", "RAW": raw_drive}
    if "ENCODER" in arguments:
        torch.save(encoders.build_image_encoder("resnet34").state_dict(), places["ENCODER"])
    for place, name, text in (("BROKEN", "000002.txt", "\n\nCar 0 0\n"), ("LACKING", "000004.txt", None)):
        if place in arguments:
            places[place] = shutil.copytree(scenes, tmp_path / place)
            label = places[place] / "training" / "label_2" / name
            label.write_text(text) if text else label.unlink()
    usual = ["--data-root", scenes, *SMALL, "--max-steps", 3]
    own = [str(places.get(a, a)) for a in arguments]
    status, out, err = run_here(finetune_det3d, "demo", *ablate.overridden([str(word) for word in usual], own))
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()


def test_real_frames(run_here, kitti, tmp_path):
    """The full grid, all points, objects of other days pasted; for the time's sake fewer layers and smaller images."""
    arguments = ["kitti", "--data-root", kitti.resolve(), "--max-steps", 2, "--batch-size", 2, "--group", 2]
    arguments += ["--image-encoder", "resnet18", "--image-scale", 320, 96, "--second-layers", 1, "--eval-frames", 1]
    status, said, err = run_here(finetune_det3d, *arguments, "--workers", 0, "--log-every", 1)
    assert status == 0 and "22 frames, 1 held out" in said, err
    log = steps_of(tmp_path / "out" / "det3d_kitti")
    assert [line["step"] for line in log] == [1, 2, 2]
    assert all(np.isfinite(line["loss"]) and line["positives"] > 5 for line in log[:2])
    assert log[0]["lr"] == pytest.approx([3e-4, 5e-4])
