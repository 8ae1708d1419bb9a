"""A table of variants: its figures are those of the runs, runs are not mixed, and what cannot work is said first."""

import dataclasses
import json

import pytest
from PIL import Image
from test_finetune_det3d import SMALL as SMALL_DETECTOR
from test_loop import SMALL

import ablate


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def rows_of(out):
    """The cells of a printed table, without its titles."""
    lines = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")]
    return lines[1:]


def test_ablation_table(run_here, scenes, tmp_path):
    """Means over two seeds. The second time nothing is run again, and a finished run with other flags is refused."""
    arguments = ["--name", "t", "--only", "SimIPU", "--data-root", scenes, *SMALL, "--max-steps", 1, "--workers", 0]
    status, out, err = run_here(ablate, "--seeds", 0, 1, *arguments, "--synthetic-frames", 0)
    assert status == 0, err
    rows = rows_of(out)
    assert [row[0] for row in rows] == ["random", "SimIPU"]
    mean, low, high = (float(x.strip("[],")) for x in rows[1][4].split())
    folders = [tmp_path / "out" / "t" / "SimIPU" / str(seed) for seed in (0, 1)]
    ranks = [log_of(folder)[-1]["match"]["right_rank"] for folder in folders]
    assert mean == pytest.approx(sum(ranks) / 2, abs=0.051)
    assert [low, high] == [round(x, 1) for x in sorted(ranks)]
    before = (folders[0] / "log.jsonl").stat().st_mtime
    assert run_here(ablate, "--seeds", 0, 1, *arguments)[1] == out
    assert (folders[0] / "log.jsonl").stat().st_mtime == before
    status, _, err = run_here(ablate, "--seeds", 0, *arguments, "--image-lr", 0.01)
    assert status == 1 and "image_lr=0.001, not 0.01; give another --name" in err


def test_more_frames(run_here, scenes, tmp_path):
    """A run for each number of frames, on that many, and a curve; depth from each, beside a start that needs none."""
    arguments = ["--name", "t", "--only", "SimIPU", "--data-root", scenes, *SMALL, "--max-steps", 1, "--workers", 0]
    curve = ["--frames", 4, 6, "--curve", tmp_path / "gain.png"]
    status, out, err = run_here(ablate, "--seeds", 0, *arguments, *curve)
    assert status == 0 and "wrote" in out, err
    assert [row[0].split(" `")[0] for row in rows_of(out)] == ["random", "SimIPU, 4 frames", "SimIPU, 6 frames"]
    for count in (4, 6):
        assert log_of(tmp_path / "out" / "t" / f"SimIPU_{count}_frames" / "0")[0]["data"]["frames"] == count
    assert Image.open(tmp_path / "gain.png").width == 660
    options = ablate.Options(task="depth", labels=(1.0,), inits=("none", "{frames}/{seed}.pt"), frames=(4, 6))
    variants = ablate.variants_of(options)
    assert variants["none, 1 of labels"] == "--init none --labels 1"
    assert variants["4/{seed}.pt, 1 of labels"] == "--init '4/{seed}.pt' --labels 1" and len(variants) == 3
    found = {(name, seed): {"eigen": {"abs_rel": 0.2}} for name in variants for seed in options.seeds}
    ablate.draw_curve(dataclasses.replace(options, curve=tmp_path / "depth.png"), found, ablate.TASKS["depth"])
    assert (tmp_path / "depth.png").exists()


def test_a_curve_of_what_some_lack(tmp_path, monkeypatch):
    """Without Eq. 7 there is no gain: its line is left out, or there is no picture."""
    drawn = []
    monkeypatch.setattr(ablate.pictures, "draw_against_frames", lambda lines, *_: drawn.append(lines))
    for only in (("SimIPU", "without inter"), ("without inter",)):
        options = ablate.Options(only=only, frames=(4, 6), seeds=(0,), curve=tmp_path / "x.png")
        names = ablate.variants_of(options)
        found = {(name, 0): {"gain": 0.5} if "SimIPU" in name else {"intra_rank": 1} for name in names}
        ablate.draw_curve(options, found, ablate.TASKS["match"])
    assert drawn == [{"SimIPU": {4: [0.5], 6: [0.5]}}]


def test_wrong_argument_by_subprocess(run_script):
    done = run_script("ablate.py", "--seeds", "x")
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "--seeds" in done.stderr


def test_ablation_of_depth(run_here, scenes, tmp_path):
    """One row for each initialisation and share of labels; the figures are those of the runs' last lines."""
    small = ["--image-scale", 0.25, "--decoder-width", 32, "--batch-size", 2, "--max-steps", 1, "--workers", 0]
    variants = ["--inits", "none", "--labels", 1, 0.5, "--seeds", 0]
    status, out, err = run_here(ablate, "--task", "depth", *variants, "--data-root", scenes, *small)
    assert status == 0, err
    rows = rows_of(out)
    assert [row[0] for row in rows] == ["none, 1 of labels", "none, 0.5 of labels"]
    assert out.startswith("6, 3 frames, 1 steps of 2, judged on 2 others;"), out
    for row, folder, pairs in zip(rows, ("none_1_of_labels", "none_0.5_of_labels"), (6, 3)):
        first, *_, last = log_of(tmp_path / "out" / "ablation" / folder / "0")
        assert first["data"]["frames"] == pairs
        eigen = last["depth"]["eigen"]
        assert float(row[1].split()[0]) == pytest.approx(100 * eigen["abs_rel"], abs=0.051)
        assert float(row[3].split()[0]) == pytest.approx(eigen["rmse"], abs=0.0051)


def test_ablation_of_detection(run_here, scenes, tmp_path):
    """No image, and a start from scratch: AP40, moderate, of the runs' last lines, and how many objects there are."""
    arguments = ["--task", "det3d", "--inits", "no-image", "none", "--labels", 1, "--seeds", 0, "--data-root", scenes]
    status, out, err = run_here(ablate, *arguments, *SMALL_DETECTOR, "--max-steps", 1)
    assert status == 0, err
    rows = rows_of(out)
    assert [row[0] for row in rows] == ["no-image, 1 of labels", "none, 1 of labels"]
    for row, folder, image in zip(rows, ("no_image_1_of_labels", "none_1_of_labels"), (False, True)):
        log = log_of(tmp_path / "out" / "ablation" / folder / "0")
        assert log[0]["config"]["image"] == image
        car = log[-1]["det3d"]["Car"]
        assert float(row[2].split()[0]) == pytest.approx(car["3d loose"]["AP40"][1], abs=0.051)
        assert row[5].split()[0] == str(car["n"][1]) and car["n"][1] > 0
    figures = {"Car": {"3d loose": {"AP40": [1, 2.5, 4]}, "n": [1, 7, 9]}, "Pedestrian": {"3d loose": None}}
    columns = ablate.TASKS["det3d"].columns
    found = [
        ablate.figure(figures, columns[name][0]) for name in ("Car 3D, loose", "objects: cars", "Cyclist 3D, loose")
    ]
    assert found == [2.5, 7, None]


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--only nonsense", "--only nonsense: the variants are SimIPU"),
        ("--only SimIPU --task depth", "--only: of --task match"),
        ("--placse 3", "--placse"),
        ("--only SimIPU --data-root nowhere", "nowhere: no such folder"),
        ("--seed 3", "--seed: give --seeds"),
        ("--seeds", "--seeds: nothing given"),
        ("--seeds 0 0", "out/ablation/SimIPU/0: 2 runs would be made there"),
        ("--eval-splits", "--eval-splits: an ablation needs frames to judge on"),
        ("--only SimIPU --frames 99", "--frames 99: there are 6"),
        ("--curve x.png", "--curve: give --frames"),
        ("--only SimIPU --control SGD", "--control SGD: not a variant of --only"),
        ("--task depth --frames 4", "--frames: wants {frames} in --inits"),
        ("--task depth --inits x{frames}", "--frames: wants {frames} in --inits"),
        ("--max-steps 1", "--max-steps 1: too few for groups of 8"),  # 0 would be as many as --epochs has
    ],
)
def test_ablations_that_cannot_work(run_here, scenes, arguments, says):
    where = [] if "--data-root" in arguments else ["--data-root", scenes]
    status, out, err = run_here(ablate, *arguments.split(), *where)
    assert status == 1 and out == "" and err.count("\n") == 1 and err.startswith("error: ") and says in err, err


@pytest.mark.parametrize("flag, values", [("seeds", "-1 99999999999999999999 nan"), ("jobs", "0 -2 nan")])
def test_numbers_that_cannot_be(run_here, scenes, flag, values):
    """Every numeric flag has a range: what is outside is one line that names flag and value (siblings of V10)."""
    for value in values.split():
        status, out, err = run_here(ablate, "--data-root", scenes, f"--{flag}", value)
        assert status == 1 and out == "" and err.count("\n") == 1, err
        assert err.startswith("error: ") and f"--{flag}" in err and value in err


@pytest.mark.parametrize("value", ["nan", "0.0", "-1.0", "2.0"])
def test_shares_of_labels_that_cannot_be(run_here, scenes, value):
    status, out, err = run_here(ablate, "--task", "depth", "--data-root", scenes, "--labels", value)
    assert status == 1 and out == "" and err == f"error: --labels {value}: must be above 0, and 1 at most\n"


@pytest.mark.parametrize("arguments", ["--frame-stride 0", "--max-steps -4", "--places 3"])
def test_flags_of_the_task_are_tried_before_anything_runs(run_here, scenes, tmp_path, arguments):
    """Not by the first of many runs, in whose last words they would come back."""
    status, out, err = run_here(ablate, "--data-root", scenes, *arguments.split())
    assert status == 1 and err.startswith(f"error: {arguments}: ") and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


def test_no_flag_stands_twice_in_a_command():
    """A variant's own flags take the place of the user's: a script may refuse what is given twice."""
    flags = ["--use_xyz", "--crop", "0.5", "1", "--image-lr=3", "--translation", "-1", "0", "0", "--places", "8"]
    own = ["--no-use-xyz", "--crop", "1", "2", "--image-lr", "2"]
    assert ablate.overridden(flags, own) == ["--translation", "-1", "0", "0", "--places", "8", *own]
    options = ablate.Options(name="n", seeds=(3,))
    words = ["--batch-size", "4", "--group", "4", "--max-steps", "10", "--seed", "7"]
    base = ablate.TASKS["match"].parse("demo", words)
    job = ablate.job_of(options, words, base, "groups of 8", "--batch-size 8 --group 8", 3)
    given = [word for word in job.arguments if word.startswith("--")]
    assert len(given) == len(set(given)) == 5
    assert (job.c.batch_size, job.c.group, job.c.max_steps, job.c.seed) == (8, 8, 5, 3)  # as many frames as the others
    assert str(job.folder) == "out/n/groups_of_8/3" and job.c.name == "n/groups_of_8/3"


def test_row():
    """mean [smallest, largest], a dash where no run has the figure."""
    found = [
        {"gain": -0.001, "intra_rank": 1.0, "intra_top1": 0.5},
        {"gain": 0.0, "intra_rank": 2.0, "intra_top1": 0.25},
    ]
    row = ablate.row("x", found, ablate.TASKS["match"])
    cells = "0.00 [0.00, 0.00] | – | – | – | – | – | – | 1.5 [1.0, 2.0] | 37.5 [25.0, 50.0]"
    assert row == f"| x | {cells} |"  # and no -0.00


def test_control():
    """A last column, of what stands beside the control frame by frame; a dash for itself, and without an image."""
    run = lambda right: [{"gain": 0.1, "per_frame": {"places": [10, 10], "right": right}}]
    rows = {"good": run([10.0, 5.0]), "wrong pairs": run([20.0, 20.0]), "without inter": [{"intra_rank": 3.0}]}
    head, _, *lines = ablate.table(rows, ablate.TASKS["match"], rows["wrong pairs"], "wrong pairs")
    last = [line.split(" | ")[-1].strip(" |") for line in (head, *lines)]
    assert last == ["beyond wrong pairs", "1.25 [1.00, 1.50]", "–", "–"]
