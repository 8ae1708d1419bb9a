"""The commands as a user gives them: match, probe and show of a run, depth where that is not finetune_depth's test."""

import inspect
import json
import re
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_nuscenes import write_root
from test_eval_match import TINY

import data
import data_kitti
import eval as evaluate
import eval_match
import simipu
from files import BadInput

PICTURES = ["features.png", "pairs.png", "projection.png", "similarity.png"]


@pytest.fixture(scope="module")
def runs(scenes, tmp_path_factory):
    """last.pt of a run on the built-in scenes, and of one on wrong pairs."""
    out = tmp_path_factory.mktemp("runs")
    c = replace(TINY, data_root=(str(scenes),), out=str(out), max_steps=2, workers=0, synthetic_frames=0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for name in ("true", "wrong"):
        simipu.train(replace(c, name=name, pairs=name, eval_splits=("val",)))
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return out / "true" / "last.pt", out / "wrong" / "last.pt"


@pytest.fixture(scope="module")
def stand_ins(runs, tmp_path_factory):
    """Words that stand for files in the arguments of the tests below."""
    odd = tmp_path_factory.mktemp("odd") / "odd.pt"
    torch.save({"model": {}, "config": None}, odd)  # as somebody else's code may write it
    return {"TRUE": runs[0], "WRONG": runs[1], "BACKBONE": runs[0].with_name("backbone.pt"), "ODD": odd}


# -----------------------------------------------------------------------------
# what the commands share


def test_names_in_tables():
    """As short as they can be and still be different from each other, and from the rows that are always there."""
    paths = [Path(p) for p in ("out/a/last.pt", "out/b/backbone.pt", "out/random/last.pt", "x/imagenet.pth")]
    assert list(evaluate.labels_of(paths)) == ["a", "b", "random", "imagenet.pth"]
    assert list(evaluate.labels_of(paths, ["random"])) == ["out/a", "out/b", "out/random", "x/imagenet.pth"]
    seeds = [Path("out/SimIPU/0/last.pt"), Path("out/SimIPU/1/last.pt")]
    assert list(evaluate.labels_of(seeds)) == ["SimIPU/0", "SimIPU/1"]
    assert list(evaluate.labels_of([Path("random")], ["random"])) == ["random (2)"]


@pytest.mark.parametrize("command", ["match", "probe", "show", "depth"])
def test_every_flag_has_its_help(command):
    """One argument a line: of two on one line, tyro takes the second for the first one's words."""
    function = evaluate.COMMANDS[command]
    for name in inspect.signature(function).parameters:
        assert re.search(rf"^ +{name}: \S", function.__doc__, re.MULTILINE), name


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["match"], "checkpoint"),
        (["match", "nowhere.pt"], "nowhere.pt: no such file"),
        (["match", "ODD"], "not a last.pt"),
        (["match", "BACKBONE"], "not a last.pt"),
        (["match", "TRUE", "--control", "TRUE"], "was not trained with --pairs wrong"),
        (["match", "TRUE", "--splits", "nonsense"], "nonsense.txt: missing"),
        (["match", "TRUE", "--frames", "1"], "1 frames chosen; judging needs two or more"),
        (["probe", "TRUE", "--frames", "2"], "probing needs three frames or more"),
        (["probe", "TRUE", "--splits", "trainval", "--also", "nowhere.pth"], "nowhere.pth: no such file"),
        (["probe", "TRUE", "--stage", "5"], "--stage"),
        (["show", "TRUE", "--point", "1", "2"], "--point"),
        (["show", "TRUE", "--point", "1", "2", "3", "--pixel", "5", "5"], "--point and --pixel: give one of them"),
        (["depth", "nowhere.pt"], "nowhere.pt: no such file"),
        (["depth", "x" * 300], "x" * 300),  # a name that is too long for a file
        (["guess"], "guess"),
    ],
)
def test_commands_that_cannot_work(run_here, stand_ins, arguments, says):
    status, out, err = run_here(evaluate, *(stand_ins.get(a, a) for a in arguments))
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, (out, err)


@pytest.mark.parametrize("command, flags", [("match TRUE", "frames frame-stride"), ("probe TRUE", "frames points")])
@pytest.mark.parametrize("value", ["-5", "0", "nan", "2.5"])
def test_numbers_that_cannot_be(run_here, stand_ins, command, flags, value):
    """Every numeric flag has a range: what is outside is one line that names flag and value (siblings of V10)."""
    for flag in flags.split():
        words = [stand_ins.get(word, word) for word in command.split()]
        status, out, err = run_here(evaluate, *words, f"--{flag}", value)
        assert status == 1 and out == "" and err.count("\n") == 1, err
        assert err.startswith("error: ") and f"--{flag}" in err and value in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["probe", "TRUE", "--frame-stride", "0"],
        ["show", "TRUE", "--seed", "-1"],
        ["show", "TRUE", "--seed", str(2**63)],
        ["show", "TRUE", "--point", "nan", "0.0", "0.0"],
        ["show", "TRUE", "--pixel", "5.0", "inf"],
        ["depth", "TRUE", "--frames", "-1"],
        ["depth", "TRUE", "--frame-stride", "0"],
        ["depth", "TRUE", "--drawn", "-1"],
    ],
)
def test_other_numbers_that_cannot_be(run_here, stand_ins, arguments):
    status, out, err = run_here(evaluate, *(stand_ins.get(a, a) for a in arguments))
    given = " ".join(arguments[2:])
    assert status == 1 and out == "" and err.startswith(f"error: {given}: ") and err.count("\n") == 1, err


# -----------------------------------------------------------------------------
# match and probe


def test_match_command(run_here, runs, scenes, tmp_path):
    true, wrong = runs
    status, out, err = run_here(evaluate, "match", true, "--control", wrong, "--json", tmp_path / "figures.json")
    assert status == 0, err
    lines = out.splitlines()
    assert "matching on 2 frames" in lines[0]
    *_, row, beside = lines
    assert [line.split()[0] for line in lines[3:-1]] == ["random", "wrong", "true"]
    model, c, _ = evaluate.load_run(true)
    expected = eval_match.match(model, data_kitti.find_frames(scenes, ["val"]), c, "cpu")
    assert f"{expected['right_rank']:.1f} %" in row and f"{expected['wrong_rank']:.1f} %" in row
    assert row.split()[1] == f"{expected['gain']:z.2f}"
    figures = json.loads((tmp_path / "figures.json").read_text())
    better, low, high = eval_match.advantage([figures["true"]], [figures["wrong pairs"]])
    expected_line = f"true reads the right image {better:z.2f} ({low:z.2f} to {high:z.2f}) nats better than wrong pairs"
    assert beside == expected_line
    assert list(figures) == ["random", "wrong pairs", "true"] and figures["true"] == expected
    status, out, _ = run_here(evaluate, "match", true, "--splits", "trainval")
    assert status == 0 and "note: true was trained on 6 of these 8 frames: its figures will flatter" in out
    again = true.parent / ".." / "true" / "last.pt"
    status, out, _ = run_here(evaluate, "match", true, again, "--control", wrong, "--splits", "train")
    assert status == 0 and "note: wrong pairs was trained on 6 of these 6 frames" in out
    assert len(out.splitlines()) == 3 + 3 + 4 + 2  # notes, titles, rows, beside the control


def test_two_processes_say_what_one_says(run_script, run_here, runs):
    """Once, and the same."""
    arguments = ["match", runs[0], "--splits", "trainval", "--frames", 6, "--device", "cpu"]
    done = run_script("eval.py", *arguments, processes=2)
    status, out, err = run_here(evaluate, *arguments)
    assert status == done.returncode == 0 and done.stdout == out, done.stderr + err


def test_a_run_is_judged_on_another_data_set(run_here, runs, tmp_path):
    """Seen by what lies in the folder; the run is of KITTI's layout."""
    root = write_root(tmp_path / "nuscenes", {"scene-0061": 1, "scene-0103": 1})
    where = ["--data-root", root, "--splits", "mini_train", "mini_val"]
    status, out, err = run_here(evaluate, "match", runs[0], *where, "--frames", 4)
    assert status == 0 and "matching on 4 frames" in out and "flatter" not in out, err
    status, out, err = run_here(evaluate, "probe", runs[0], *where, "--frames", 3, "--points", 50)
    assert status == 0 and "fitted and scored on 3 frames" in out, err
    status, out, err = run_here(evaluate, "show", runs[0], "--data-root", root, "--split", "mini_val", "--frame", 2)
    assert status == 0 and "CAM_BACK_RIGHT" in out, err
    status, out, err = run_here(evaluate, "match", runs[0], "--data-root", root)  # the run's val is another version's
    assert (
        status == 1 and err == f"error: {root}: no folder v1.0-trainval, of which --splits val is; there is v1.0-mini\n"
    )


def test_notes_of_match():
    """What makes two rows of a table different questions is said."""
    run = lambda step, **fields: evaluate.Trained(None, replace(TINY, **fields), {"step": step})
    first, other = run(10, batch_size=4), run(10, batch_size=8, places=64, num_points=1024)
    [note] = evaluate.other_settings({"first": first, "b": other}, first)
    assert note == "note: b is judged with its own places, num_points, others than the first run's"
    assert evaluate.unlike_control(run(20, batch_size=2), first) == []
    assert evaluate.unlike_control(other, first) == ["note: the control has seen 80 frames, the first run 40"]
    [note] = evaluate.unlike_control(run(10, batch_size=4, point_features=("height",), use_xyz=True), first)
    assert note == "note: the control has another point_features, use_xyz than the first run"
    frames = [data.Frame("a/0", Path(__file__), Path(__file__), (), data_kitti.RIG, "drive 7")]
    [seen] = evaluate.seen_in_training(frames, {"x": {"inventory": data.inventory(frames)}, "y": {}})
    assert seen == "note: x was trained on 1 of these 1 frames: its figures will flatter"  # as last.pt once had it
    digests = data.digests(data.inventory(frames))
    assert evaluate.seen_in_training(frames, {"x": {"inventory": digests}, "y": {"inventory": digests + 1}}) == [seen]
    images = data.digests(data.inventory(frames, clouds=False))
    assert evaluate.seen_in_training(frames, {"x": {"inventory": images}}) == [seen]  # as moco.py has it
    [drives] = evaluate.seen_in_training(frames, {"x": {"drives": ["drive 7", "drive 8"]}})
    assert "other frames of 1 of these drives, drive 7 among them" in drives


def test_probe_command(run_here, runs, scenes):
    true, wrong = runs
    judged = ["--data-root", scenes, "--splits", "trainval", "--points", 100]
    status, out, err = run_here(evaluate, "probe", true, "--also", wrong.with_name("backbone.pt"), *judged)
    assert status == 0, err
    lines = out.splitlines()
    assert any("was trained on 6 of these 8 frames" in line for line in lines)
    assert any("fitted and scored on 8 frames, 100 points each" in line for line in lines)
    rows = [re.match(r"(.*?) +(-?\d\.\d+) \(", line).groups() for line in lines[-5:]]
    assert [name for name, _ in rows] == ["position", "true", "true, wrong image", "random", "wrong"]
    position, *others = (float(r2) for _, r2 in rows)
    # an image's rows tell depth on a street
    assert 0.1 < position < 0.95 and all(abs(r2 - position) < 0.3 for r2 in others)


def test_other_weights_tell_nothing_of_their_training(tmp_path):
    """Whatever weights.py can load may stand beside a run, in files that are no checkpoint of torch's, too."""
    (tmp_path / "a.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    torch.save([1, 2], tmp_path / "list.pt")
    assert evaluate.contents_of_run(tmp_path / "a.safetensors") == evaluate.contents_of_run(tmp_path / "list.pt") == {}


# -----------------------------------------------------------------------------
# show


def test_four_pictures(run_here, runs, scenes):
    """By index, into show/FRAME beside the checkpoint; each a picture, with much of it drawn."""
    where = ["--data-root", scenes, "--split", "val", "--frame", 1]
    status, out, err = run_here(evaluate, "show", runs[0], *where, "--point", 12, -3, -1)
    assert status == 0, err
    name = data_kitti.find_frames(scenes, ["val"])[1].name
    folder = runs[0].parent / "show" / name
    assert sorted(p.name for p in folder.iterdir()) == PICTURES
    lines = out.splitlines()
    assert lines[0] == f"{folder}/" and sorted(line.split()[0] for line in lines[1:]) == PICTURES
    assert "nearest to --point" in out and "100.0 % in the image" in out
    for picture in PICTURES:
        pixels = np.asarray(Image.open(folder / picture).convert("RGB")).astype(float)
        assert pixels.shape[1] >= 1200 and pixels.shape[0] >= 500
        colourful = np.ptp(pixels, axis=2) > 30
        assert pixels.std() > 20 and colourful.mean() > 0.01, picture
        half = len(pixels) // 2
        assert colourful[:half].any() and colourful[half:].any(), picture


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--frame", 99], "--frame 99: no such frame; there are 0 to 1, training/"),
        (["--frame", "training/999999"], "--frame training/999999: no such frame"),
        (["--split", "nonsense"], "nonsense.txt: missing"),
        (["--pixel", 5000, 5], "--pixel 5000 5: outside the image, which is 160 x 64"),
    ],
)
def test_wrong_questions_leave_no_trace(run_here, runs, scenes, tmp_path, arguments, says):
    split = [] if "--split" in arguments else ["--split", "val"]
    where = ["--data-root", scenes, "--out", tmp_path / "pictures", *split]
    status, out, err = run_here(evaluate, "show", runs[0], *where, *arguments)
    assert status == 1 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and says in err, err
    assert not (tmp_path / "pictures").exists()


def test_a_folder_that_cannot_be_made(run_here, runs, scenes, tmp_path):
    (tmp_path / "file").write_text("")
    out = tmp_path / "file" / "pictures"
    status, _, err = run_here(evaluate, "show", runs[0], "--data-root", scenes, "--split", "val", "--out", out)
    assert status == 1 and err == f"error: --out {out}: Not a directory\n"


def test_wrong_file_by_subprocess(run_script, runs, scenes):
    backbone = runs[0].with_name("backbone.pt")
    done = run_script("eval.py", "show", backbone, "--data-root", scenes)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"error: {backbone}: not a last.pt of simipu.py\n"


def test_find_frame():
    names = ("training/000007", "training/000003", "testing/000007")
    frames = [data.Frame(name, Path(), Path(), (), data_kitti.RIG) for name in names]
    found = [evaluate.find_frame(frames, wanted) for wanted in ("0", "2", "testing/000007", "000003")]
    assert found == [0, 2, 2, 1]
    for wrong in ("000007", "000000", "3", "-1", "", "training"):  # two of that name; names that are not there
        with pytest.raises(BadInput, match=f"^--frame {wrong}"):
            evaluate.find_frame(frames, wrong)


def test_frames_are_those_that_the_run_was_judged_on(monkeypatch):
    asked = []

    def find(c, roots, splits, named=False, limit=0):
        asked.append((c.frame_stride, roots, tuple(splits), limit))
        return ["a", "b"]

    monkeypatch.setattr(simipu, "find_frames", find)
    c = replace(TINY, data_root=("r",), eval_root=("e",), splits=("train",), eval_splits=("val",), frame_stride=5)
    for more in (None, 2):
        evaluate.choose_frames(c, (), (), None, more)
    assert asked == [(5, ("e",), ("val",), c.eval_frames), (2, ("e",), ("val",), c.eval_frames)]
    del asked[:]
    for split in (None, "val", "train"):
        evaluate.frames_to_show(c, None, split)
    evaluate.frames_to_show(c, "own", "val")
    evaluate.frames_to_show(replace(c, eval_root=(), eval_splits=()), None, None)
    assert [row[:3] for row in asked] == [
        (5, ("e",), ("val",)),
        (5, ("e",), ("val",)),
        (5, ("r",), ("train",)),
        (5, ["own"], ("val",)),
        (5, ("r",), ("train",)),
    ]


def test_what_training_did_is_said(scenes):
    """The title of projection.png: sizes, window and flip are those of the batch that it is drawn from."""
    frames = data_kitti.find_frames(scenes, ["val"])
    batch, how = evaluate.augmented_frame(frames, 0, replace(TINY, flip=1.0, crop=(0.5, 0.5)), 3, "cpu")
    assert how.startswith("as training sees it with seed 3: 416 x 128 pixels scaled by 0.38, the part from ")
    assert how.endswith(" on of 50% of its edges, mirrored, padded to 160 x 64") and batch["image"].shape[2:] == (
        64,
        160,
    )
    _, how = evaluate.augmented_frame(frames, 0, replace(TINY, flip=0.0), 3, "cpu")
    assert how.endswith("416 x 128 pixels scaled by 0.38, not mirrored, padded to 160 x 64")
