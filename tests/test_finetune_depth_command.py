"""The real script of depth fine-tuning in miniature, `eval.py depth` on what it wrote, and what both refuse.

Network, loss and schedule are tested in test_finetune_depth.py.
"""

import contextlib
import dataclasses
import io
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import load, needs_gpu, read_log, steps_of, tensors
from PIL import Image
from test_finetune_depth import grown

import data_depth
import encoders
import eval as evaluate
import eval_depth
import finetune_depth
import loop
from finetune_depth import one_cycle

SMALL = ["--decoder-width", 64, "--image-scale", 0.25, "--workers", 0, "--log-every", 1, "--batch-size", 2]
TRAINED = ["--batch-size", 6, "--max-steps", 14, "--lr", 3e-3, "--eval-every", 7]  # of the fixture `trained`


def demo(root, *more):
    """Arguments of a small run on built-in scenes. Of a flag given twice the script takes the last."""
    return ["demo", "--data-root", root, *SMALL, *more]


def judged_at(folder):
    return [line["step"] for line in steps_of(folder) if "depth" in line]


def row(out, name):
    """The nine figures that a table has for `name`, as they are printed."""
    lines = [line.split() for line in out.splitlines()]
    rows = [words[1:] for words in lines if len(words) == 10 and words[0] == name]
    return rows[0]


def figures(out, name):
    return [float(word) for word in row(out, name)]


def names_of(scenes, split):
    return (scenes / "ImageSets" / f"{split}.txt").read_text().split()


@pytest.fixture
def undrawn(monkeypatch):
    """Pictures become empty files: drawing is most of what a run of few steps costs, and other tests look at them."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: Path(path).touch())


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """A run of 14 steps that ends with judging two held-out scenes -> its folder, what it said."""
    folder, said = tmp_path_factory.mktemp("trained"), io.StringIO()
    arguments = demo(scenes, *TRAINED)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [finetune_depth.__file__, *map(str, arguments)])
        finetune_depth.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder / "out" / "depth_demo", said.getvalue()


# -----------------------------------------------------------------------------
# a run, and judging it again


def test_demo_in_miniature(trained):
    out, said = trained
    assert sorted(p.name for p in out.iterdir()) == ["curves.png", "depth.png", "last.pt", "log.jsonl"]
    for picture in ("curves.png", "depth.png"):
        assert (out / picture).read_bytes()[:4] == b"\x89PNG"
    log = [line for line in read_log(out) if "lr" in line]
    assert [line["step"] for line in log] == list(range(1, 15))
    assert log[3]["epoch"] == 3
    losses = [line["loss"] for line in log]
    assert np.mean(losses[-4:]) < np.mean(losses[:2]) - 0.1, losses
    for line in log:
        assert line["lr"][0] == pytest.approx(3e-3 * one_cycle(line["step"] - 1, 14))
        assert line["grad_norm"] > 0
        assert 0.5 < line["known"] <= 1
    assert "6 pairs, 2 held out" in said
    assert "a step: 6 frames = 1 processes x 1 passes x 6 frames" in said
    assert "depth on 2 images" in said
    judged = [line for line in read_log(out) if "depth" in line]
    assert [line["step"] for line in judged] == [7, 14]
    last = judged[1]["depth"]
    assert last["images"] == 2
    assert last["left_out"] == 0
    found = [last["eigen"][k] for k in eval_depth.EIGEN]
    assert len(found) == 9
    assert figures(said, "depth_demo") == pytest.approx(found, abs=6e-3)
    saved = load(out / "last.pt")
    assert saved["step"] == 14
    assert saved["script"] == "finetune_depth.py"
    assert saved["data"]["frames"] == 6
    assert len(saved["inventory"]) == 6


def test_eval_depth_says_the_same(trained, run_here, scenes, tmp_path):
    """The figures of last.pt are those that the run ended with. Those of the maps that it wrote differ by the rounding
    to 16 bits.
    """
    out, said = trained
    status, first, err = run_here(evaluate, "depth", out / "last.pt", "--save", tmp_path / "maps", "--drawn", 1)
    assert status == 0, err
    assert row(first, "depth_demo") == row(said, "depth_demo")
    benchmark = [line for line in first.splitlines() if "KITTI's benchmark" in line]
    assert benchmark == [line for line in said.splitlines() if "KITTI's benchmark" in line]
    assert len(benchmark) == 1
    maps = sorted((tmp_path / "maps").glob("*.png"))
    assert [p.name for p in maps] == [f"training_{name}.png" for name in names_of(scenes, "val")]
    pictures = list((tmp_path / "maps" / "pictures").iterdir())
    assert [p.name for p in pictures] == [maps[0].name]
    assert "wrote 2 predictions and 1 pictures" in first
    with Image.open(maps[0]) as image:
        assert image.mode == "I;16"
        assert image.size == (416, 128)

    of_maps = ["depth", tmp_path / "maps", "--preset", "demo", "--data-root", scenes]
    status, again, err = run_here(evaluate, *of_maps)
    assert status == 0, err
    assert figures(again, "maps") == pytest.approx(figures(first, "depth_demo"), rel=2e-3, abs=2e-3)

    # zeros where there is ground truth: Eigen-style figures take them for 1 mm; the benchmark's are left out for that
    # image, and the table says so
    with Image.open(maps[0]) as image:
        holed = np.array(image)
    holed[::7] = 0
    Image.fromarray(holed).save(maps[0])
    status, again, err = run_here(evaluate, *of_maps)
    assert status == 0, err
    assert "SILog" in again
    assert "without 1 images where a prediction is 0" in again
    assert row(again, "maps") != row(first, "depth_demo")

    model, c, trained_on = evaluate.load_depth_run(out / "last.pt", None, "cpu")
    assert not model.training
    assert c.data_root == (str(scenes),)
    assert c.image_encoder == "resnet18"
    assert c.crop == (704, 352)
    assert len(trained_on) == 6


def test_on_other_data(trained, run_here, scenes):
    """--preset judges a network on another data set, here sweeps of the same frames. A note says how many of the images
    it was trained on.
    """
    last = trained[0] / "last.pt"
    status, dense, err = run_here(evaluate, "depth", last, "--splits", "train")
    assert status == 0, err
    assert f"note: {last} was trained on 6 of these 6 images: its figures will flatter" in dense
    assert "crop none" in dense
    on_sweeps = ["--preset", "lidar", "--data-root", scenes, "--splits", "train"]
    status, sweeps, err = run_here(evaluate, "depth", last, *on_sweeps)
    assert status == 0, err
    assert "crop garg" in sweeps
    assert "depth on 6 images" in sweeps
    assert row(sweeps, "depth_demo") != row(dense, "depth_demo")


def test_toolbox_checkpoints(trained, run_here, tmp_path, monkeypatch):
    """The toolbox's checkpoints are {"state_dict", "meta"}. They need --preset, and must hold the preset's network."""
    out, said = trained
    saved = load(out / "last.pt")
    torch.save({"meta": {"epoch": 24}, "state_dict": saved["model"]}, tmp_path / "latest.pth")
    data_root = ("--data-root", saved["config"]["data_root"][0])
    status, _, err = run_here(evaluate, "depth", "latest.pth", *data_root)
    assert status == 1
    assert err == "error: latest.pth: a checkpoint of the toolbox; --preset must say of what: kitti or nyu\n"
    status, _, err = run_here(evaluate, "depth", "latest.pth", "--preset", "kitti", *data_root)
    assert status == 1
    assert err == "error: latest.pth: its weights are not those of its config\n"
    preset = dataclasses.replace(finetune_depth.PRESETS["demo"][1], decoder_width=64, image_scale=0.25)
    monkeypatch.setitem(finetune_depth.PRESETS, "demo", ("", preset))
    status, found, err = run_here(evaluate, "depth", "latest.pth", "--preset", "demo", *data_root)
    assert status == 0, err
    assert row(found, tmp_path.name) == row(said, "depth_demo")


def test_the_mirror_image_is_averaged(trained):
    """predict() by its parts, at a size with odd edges: the maps of an image and of its mirror image, cut to the range
    and enlarged, the second mirrored back.
    """
    model, c, _ = evaluate.load_depth_run(trained[0] / "last.pt", None, "cpu")
    c = dataclasses.replace(c, image_scale=1.0, min_depth=9.0, max_depth=80.0)
    image = np.random.default_rng(0).integers(0, 256, (33, 71, 3), dtype=np.uint8)
    found = eval_depth.predict(model, image, c, torch.device("cpu"))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (torch.from_numpy(image).float() / 255 - mean) / std
    x = pixels.permute(2, 0, 1)[None]
    with torch.no_grad():
        a, b = (grown(model.depth(view).clamp(9.0, 80.0), 33, 71)[0, 0] for view in (x, x.flip(3)))
    assert found.dtype == np.float32
    assert found.shape == (33, 71)
    assert found.min() >= 9.0
    np.testing.assert_allclose(found, (a + b.flip(1)).numpy() / 2, rtol=1e-4)
    assert np.abs(found - a.numpy()).max() > 1e-3
    model.eval()
    mirrored = eval_depth.predict(model, image[:, ::-1], c, torch.device("cpu"))
    np.testing.assert_allclose(mirrored[:, ::-1], found, rtol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_on_a_gpu(trained, run_script, scenes, tmp_path, device):
    """In float32 the first loss is a CPU's. In bfloat16, with the data on the card, it learns, judges and draws."""
    arguments = demo(scenes, "--batch-size", 6, "--lr", 3e-3, "--device", device)
    one_step = ["--amp", "never", "--max-steps", 1, "--eval-splits", "--name", "float32"]
    done = run_script("finetune_depth.py", *arguments, *one_step)
    assert done.returncode == 0, done.stderr
    folders = (trained[0], tmp_path / "out" / "float32")
    cpu, gpu = (next(line for line in read_log(folder) if "lr" in line) for folder in folders)
    assert gpu["loss"] == pytest.approx(cpu["loss"], rel=0.01)
    assert gpu["grad_norm"] == pytest.approx(cpu["grad_norm"], rel=0.05)
    done = run_script("finetune_depth.py", *arguments, "--max-steps", 14, "--resident", "--name", "bfloat16")
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_log(tmp_path / "out" / "bfloat16") if "lr" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:2]) - 0.1, losses
    assert row(done.stdout, "bfloat16")
    assert (tmp_path / "out" / "bfloat16" / "depth.png").exists()


# -----------------------------------------------------------------------------
# started again


@pytest.mark.usefixtures("undrawn")
def test_finished_runs_and_other_programs_files(trained, run_here, tmp_path):
    """Started again, a finished run judges again and changes nothing. Another learning rate is refused, and so are
    files of other programs.
    """
    out, said = trained
    here = tmp_path / "out" / "depth_demo"
    shutil.copytree(out, here)
    same = demo(load(out / "last.pt")["config"]["data_root"][0], *TRAINED)
    before = (here / "last.pt").read_bytes()
    status, again, err = run_here(finetune_depth, *same)
    assert status == 0, err
    assert row(again, "depth_demo") == row(said, "depth_demo")
    assert (here / "last.pt").read_bytes() == before
    assert judged_at(here) == [7, 14, 14]
    log = (here / "log.jsonl").read_text()
    for changed, named in (
        (["--lr", 2e-3], "lr=0.003, not 0.002"),
        (["--seed", 5], "seed=0, not 5"),
    ):
        status, _, err = run_here(finetune_depth, *same, *changed)
        assert status == 1
        assert err.count("\n") == 1
        assert named in err
        assert "give another --name" in err
    status, _, err = run_here(evaluate, "match", here / "last.pt")
    assert status == 1
    assert err == f"error: {here / 'last.pt'}: not a last.pt of simipu.py\n"
    pretrained = {"model": {}, "config": {}, "step": 1, "identity": {}, "script": "simipu.py"}
    torch.save(pretrained, tmp_path / "pre.pt")
    status, _, err = run_here(evaluate, "depth", tmp_path / "pre.pt")
    assert status == 1
    assert err == f"error: {tmp_path / 'pre.pt'}: not a last.pt of finetune_depth.py\n"
    assert (here / "log.jsonl").read_text() == log


@pytest.mark.usefixtures("undrawn")
def test_resumes_exactly(run_here, scenes, tmp_path, monkeypatch):
    """A run that is killed in step 5, after the checkpoint of step 4, goes on to the same bits, whoever loads the
    images. The same seed is the same run, and another seed is not.
    """
    arguments = demo(scenes, "--group", 1, "--max-steps", 6, "--eval-every", 3)
    status, _, err = run_here(finetune_depth, *arguments, "--name", "whole")
    assert status == 0, err
    report = loop.Loop.report

    def until_5(self, epoch, stats):
        stats = report(self, epoch, stats)
        if self.done == 5:
            raise SystemExit(137)
        return stats

    out, whole = tmp_path / "out" / "depth_demo", tmp_path / "out" / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "report", until_5)
        assert run_here(finetune_depth, *arguments, "--save-every", 2)[0] == 137
    assert load(out / "last.pt")["step"] == 4
    assert steps_of(out)[-1]["step"] == 5
    status, said, err = run_here(finetune_depth, *arguments, "--save-every", 2, "--resident")
    assert status == 0, err
    assert "steps 4 to 6" in said
    assert steps_of(out) == steps_of(whole)
    assert judged_at(out) == [3, 6]
    a, b = load(out / "last.pt"), load(whole / "last.pt")
    for part in ("model", "optimizers"):
        resumed, uninterrupted = tensors(a[part]), tensors(b[part])
        assert len(resumed) == len(uninterrupted) > 100
        assert all(torch.equal(one, other) for one, other in zip(resumed, uninterrupted))
    another = ["--name", "other", "--seed", 1, "--eval-splits", "--max-steps", 1]
    status, _, err = run_here(finetune_depth, *arguments, *another)
    assert status == 0, err
    assert steps_of(tmp_path / "out" / "other")[0]["loss"] != steps_of(whole)[0]["loss"]


@pytest.mark.usefixtures("undrawn")
def test_a_broken_held_out_file_costs_no_step(run_here, scenes, tmp_path):
    """A step is saved before it is judged. Once the file is mended, it is judged, and once only: in the middle of a run
    and at its end.
    """
    root, out = tmp_path / "scenes", tmp_path / "out" / "depth_demo"
    shutil.copytree(scenes, root)
    truth = root / "training" / "depth_2" / f"{names_of(scenes, 'val')[-1]}.png"
    whole = truth.read_bytes()
    truth.write_bytes(whole[:400])
    arguments = demo(root, "--max-steps", 4, "--eval-every", 2, "--save-every", 2)
    for _ in range(2):  # the second time it ends before another step
        status, _, err = run_here(finetune_depth, *arguments)
        assert status == 1
        assert f"error: {truth}: not a readable PNG" in err
        assert "Traceback" not in err
        assert load(out / "last.pt")["step"] == 2
    assert judged_at(out) == []
    truth.write_bytes(whole)
    status, said, err = run_here(finetune_depth, *arguments)
    assert status == 0, err
    assert "depth on 2 images" in said
    assert judged_at(out) == [2, 4]
    log = (out / "log.jsonl").read_text().splitlines(keepends=True)
    unjudged = [line for line in log if '"depth": {' not in line]
    (out / "log.jsonl").write_text("".join(unjudged))  # as if it had been killed while judging the last step
    status, again, err = run_here(finetune_depth, *arguments)
    assert status == 0, err
    assert again.splitlines()[-1] == said.splitlines()[-1]
    assert judged_at(out) == [4]


# -----------------------------------------------------------------------------
# what a run starts from


@pytest.mark.usefixtures("undrawn")
def test_init_loads_an_encoder(run_here, scenes, tmp_path):
    """At a rate of next to nothing the first checkpoint holds the file's encoder, and the decoder of a run from
    scratch.
    """
    torch.manual_seed(7)
    encoder = encoders.build_image_encoder("resnet18").state_dict()
    for name in encoder:
        if "running" in name:
            encoder[name] += torch.rand(encoder[name].shape)
    about = {
        "arch": "resnet18",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "channels": "RGB",
        "step": 1,
    }
    torch.save({"state_dict": encoder, **about}, tmp_path / "backbone.pt")
    arguments = demo(scenes, "--max-steps", 1, "--lr", 1e-12, "--eval-splits")
    found = {}
    for init, name in (("none", "none"), ("backbone.pt", "backbone")):
        status, said, err = run_here(finetune_depth, *arguments, "--init", init, "--name", name)
        assert status == 0, err
        assert ("100% of the parameters" in said) == (init != "none")
        assert "depth on" not in said
        assert "0 held out" in said
        found[name] = load(tmp_path / "out" / name / "last.pt")["model"]
    learned = [name for name in encoder if "running" not in name and not name.endswith("num_batches_tracked")]
    for name in learned:
        torch.testing.assert_close(found["backbone"]["backbone." + name], encoder[name], rtol=0, atol=1e-9)
    assert not torch.allclose(found["none"]["backbone.conv1.weight"], encoder["conv1.weight"], atol=1e-3)
    for name, value in found["none"].items():
        if name.startswith("decode_head."):
            torch.testing.assert_close(found["backbone"][name], value, rtol=0, atol=1e-9)

    again = [*arguments, "--name", "backbone"]
    shutil.copy(tmp_path / "backbone.pt", tmp_path / "moved.pt")  # the same weights elsewhere are the same run
    assert run_here(finetune_depth, *again, "--init", "moved.pt")[0] == 0
    encoder["conv1.weight"][0] += 1
    torch.save({"state_dict": encoder, **about}, tmp_path / "moved.pt")
    for init in ("moved.pt", "none"):
        status, _, err = run_here(finetune_depth, *again, "--init", init)
        assert status == 1
        assert "made with init=" in err
        assert err.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_scratch_starts_as_identities(run_here, scenes, tmp_path):
    """The last batch norm of every residual block starts at 0, as in the toolbox, and its gradient is not 0; or it
    starts at 1, where asked for.
    """
    arguments = demo(scenes, "--max-steps", 1, "--lr", 1e-3, "--eval-splits")
    for flag, start in (("--zero-init-residual", 0), ("--no-zero-init-residual", 1)):
        status, said, err = run_here(finetune_depth, *arguments, flag, "--name", f"from_{start}")
        assert status == 0, err
        assert "image encoder: from scratch" in said
        state = load(tmp_path / "out" / f"from_{start}" / "last.pt")["model"]
        weights = [v for k, v in state.items() if k.startswith("backbone.") and k.endswith("bn2.weight")]
        assert len(weights) == 8
        for weight in weights:
            assert 0 < (weight - start).abs().max() < 1e-3  # one step away


# -----------------------------------------------------------------------------
# two processes


def test_two_processes(run_script, run_here, scenes, tmp_path):
    """They print one table, with the figures that its checkpoint has alone: rank 0's batch statistics, and every image
    once.
    """
    arguments = demo(scenes, "--batch-size", 4, "--group", 2, "--max-steps", 2, "--eval-splits", "val")
    done = run_script("finetune_depth.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert "a step: 4 frames = 2 processes x 1 passes x 2 frames" in done.stdout
    assert done.stdout.count("depth on 2 images") == 1
    status, said, err = run_here(evaluate, "depth", tmp_path / "out" / "depth_demo" / "last.pt")
    assert status == 0, err
    assert row(said, "depth_demo") == row(done.stdout, "depth_demo")


# -----------------------------------------------------------------------------
# can it learn?


def make_easy(root, name):
    """Make a scene easy to learn: 64 x 32 pixels, its depth smooth, for want of resolution, and both symmetric, so that
    the mirror image, which judging looks at too, is nothing new.
    """
    file = root / "training" / "depth_2" / name
    depth = data_depth.read_depth(file).astype(np.float32) / 256
    log = Image.fromarray(np.log(np.where(depth == 0, 80, depth)))
    coarse = log.resize((7, 3), Image.Resampling.BOX)
    smooth = np.asarray(coarse.resize((64, 32), Image.Resampling.BICUBIC))
    symmetric = (smooth + smooth[:, ::-1]) / 2
    metres = np.exp(symmetric).clip(2, 79)
    Image.fromarray(np.rint(256 * metres).astype(np.uint16)).save(file)
    photo = root / "training" / "image_2" / name
    pixels = np.array(Image.open(photo).resize((64, 32), Image.Resampling.BOX))
    pixels[:, 32:] = pixels[:, 31::-1]
    Image.fromarray(pixels).save(photo)


@pytest.mark.usefixtures("undrawn")
def test_overfits_eight_frames_from_scratch(run_here, scenes, tmp_path):
    """Depth is within 5 % on the frames that it was trained on, judged as all runs are. The scenes are made easy. As
    they are, eight scenes of 104 x 32 need ten minutes of a core: .047 with --image-scale 2 --rotation-p 0
    --colour-p 0 --max-steps 1500 --lr 2e-3 --decoder-width 256. With the toolbox's zeros in the residual blocks
    the easy ones take 100 steps instead of 80.
    """
    root = tmp_path / "tiny"
    shutil.copytree(scenes, root)
    for file in (root / "training" / "depth_2").iterdir():
        make_easy(root, file.name)
    arguments = ["demo", "--data-root", root, "--splits", "trainval", "--eval-splits", "--resident"]
    arguments += ["--image-scale", 1, "--decoder-width", 256, "--no-zero-init-residual"]
    arguments += ["--rotation-p", 0, "--flip", 0, "--colour-p", 0]
    arguments += ["--max-steps", 80, "--lr", 3e-3, "--save-every", 500]
    status, _, err = run_here(finetune_depth, *arguments)
    assert status == 0, err
    last = tmp_path / "out" / "depth_demo" / "last.pt"
    status, said, err = run_here(evaluate, "depth", last, "--splits", "trainval")
    assert status == 0, err
    a1, _, _, abs_rel, *_ = figures(said, "depth_demo")
    assert abs_rel < 0.05, said
    assert a1 > 0.95, said


# -----------------------------------------------------------------------------
# real frames


def test_lidar(run_here, kitti, tmp_path):
    root = kitti.resolve()
    arguments = ["--image-encoder", "resnet18", *SMALL, "--max-steps", 2, "--data-root", root]
    status, said, err = run_here(finetune_depth, "lidar", *arguments)
    assert status == 0, err
    assert "22 pairs, 8 held out" in said
    assert "depth on 8 images" in said
    assert "crop garg" in said
    out = tmp_path / "out" / "depth_lidar"
    log = steps_of(out)
    assert [line["step"] for line in log] == [1, 2, 2]
    for line in log[:2]:
        assert np.isfinite(line["loss"])
        assert 0.01 < line["known"] < 0.5
    eigen = log[2]["depth"]["eigen"]
    assert len(eigen) == 9
    assert 0 < eigen["abs_rel"] < 20
    assert log[2]["depth"]["images"] == 8

    maps = tmp_path / "maps"
    status, _, err = run_here(evaluate, "depth", out / "last.pt", "--frames", 1, "--save", maps)
    assert status == 0, err
    pairs, *_ = data_depth.find_pairs("lidar", [root], "", ["val"])
    file = maps / (pairs[0].name.replace("/", "_") + ".png")
    with Image.open(file) as image:
        depth = np.asarray(image)
    of_maps = ["depth", maps, "--preset", "lidar", "--data-root", root, "--frames", 1]
    assert run_here(evaluate, *of_maps)[0] == 0
    Image.fromarray(depth[:-1]).save(file)
    status, said, err = run_here(evaluate, *of_maps, "--save", tmp_path / "never")
    last_words = err.splitlines()[-1]
    assert status == 1
    assert last_words.startswith("error: ")
    assert "ground truth is 37" in last_words
    assert "Traceback" not in err
    assert not said
    assert not (tmp_path / "never").exists()


# -----------------------------------------------------------------------------
# what is refused


WRONG = {  # the preset and its flags, and what is said about them
    "no split file": ("kitti --splits nowhere.txt", "nowhere.txt: not a readable split file"),
    "no split": ("demo --splits nowhere", "nowhere.txt: missing"),
    "no labels": ("demo --labels 0", "--labels 0.0: must be above 0, and 1 or less"),
    "too many labels": ("demo --labels 2", "--labels 2.0: must be above 0, and 1 or less"),
    "few labels": ("demo --labels 0.1", "--batch-size 2: the 1 pairs found are too few"),
    "depths": ("demo --min-depth 80", "--min-depth 80.0: must be below --max-depth 80"),
    "width": ("demo --decoder-width 40", "--decoder-width 40: must be a multiple of 16"),
    "batch": ("demo --batch-size 3 --group 2", "--batch-size 3: not a multiple of 1 processes x passes of 2 frames"),
    "gamma": ("demo --gamma 1.1 0.9", "--gamma 1.1 0.9: must be above 0, the smaller first"),
    "seen": ("demo --eval-splits trainval", "--eval-splits trainval: 6 of its frames are trained on, training/00000"),
    "too small": (
        "nyu --data-root small --image-encoder resnet18 --eval-splits",
        "small/a.png: a map of 32 x 64 (height x width), where NYU has 480 x 640",
    ),
    "no init": ("demo --init nowhere.pt", "nowhere.pt: no such file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_leaves_no_trace(run_here, scenes, tmp_path, what):
    given, words = WRONG[what]
    preset, *flags = given.split()
    small = tmp_path / "small"
    small.mkdir()
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(small / "a.png")
    Image.fromarray(np.full((32, 64), 1000, np.uint16)).save(small / "b.png")
    (small / "nyu_train.txt").write_text("a.png b.png 518.8\n" * 2)
    root = [] if "--data-root" in flags else ["--data-root", scenes]
    status, out, err = run_here(finetune_depth, preset, *root, *SMALL, *flags)
    assert status == 1
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "out").exists()


def test_wrong_predictions_are_one_line(run_here, scenes, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    start = ["depth", maps, "--data-root", scenes]
    status, _, err = run_here(evaluate, *start)
    wanted = "--preset must say of what: demo, kitti, nyu, lidar"
    assert status == 1
    assert err == f"error: {maps}: a folder of predictions; {wanted}\n"
    start += ["--preset", "demo", "--save", tmp_path / "new"]
    first, second = names_of(scenes, "val")
    flat = np.full((128, 416), 2560, np.uint16)
    Image.fromarray(flat).save(maps / f"training_{first}.png")
    status, out, err = run_here(evaluate, *start)  # the second of two is missing
    assert status == 1
    assert not out
    assert err == f"error: {maps}: no training/{second}.png in it, nor training_{second}.png\n"
    for name in (first, second):
        Image.fromarray(flat[:, 1:]).save(maps / f"training_{name}.png")
    status, out, err = run_here(evaluate, *start)
    words = f"error: {maps / f'training_{first}.png'}: 128 x 415 (height x width), ground truth is 128 x 416"
    assert status == 1
    assert not out
    assert err.splitlines()[-1].startswith(words)
    for flag, value in (("--frames", -1), ("--drawn", -2), ("--frame-stride", 0)):
        status, _, err = run_here(evaluate, *start, flag, value)
        assert status == 1
        assert err.startswith("error: ")
        assert f"{flag} {value}: must be" in err
    status, _, err = run_here(evaluate, "depth", tmp_path / "nothing.pt")
    assert status == 1
    assert err == f"error: {tmp_path / 'nothing.pt'}: no such file\n"
    assert not (tmp_path / "new").exists()
