"""Depth fine-tuning: decoder, loss and schedule against transcriptions of the toolbox's, the real script in miniature,
and what it refuses.
"""

import contextlib
import dataclasses
import io
import json
import shutil
import signal
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_gpu
from PIL import Image

import data_depth
import encoders
import eval as evaluate
import eval_depth
import finetune_depth
import loop
from finetune_depth import Config, DenseDepth, DepthNet, one_cycle, sig_loss

SMALL = ["--decoder-width", 64, "--image-scale", 0.25, "--workers", 0, "--log-every", 1, "--batch-size", 2]
RESNET50 = (64, 256, 512, 1024, 2048)


# -----------------------------------------------------------------------------
# network


def grown(x, height, width):
    """Bilinear enlarging with corners aligned, as two matrices of float64."""
    matrices = []
    for old, new in zip(x.shape[2:], (height, width)):
        at = np.linspace(0, old - 1, new)
        low = np.floor(at).astype(int).clip(0, max(old - 2, 0))
        m = np.zeros((new, old))
        m[range(new), low] += 1 - (at - low)
        m[range(new), np.minimum(low + 1, old - 1)] += at - low
        matrices.append(torch.from_numpy(m))
    return torch.einsum("ij,bcjk,lk->bcil", matrices[0], x.double(), matrices[1])


def decoder_by_hand(w, maps):
    """densedepth_head.py from a state dict, in float64. -> logits"""
    w, maps = {k: v.double() for k, v in w.items()}, [m.double() for m in maps]
    x = F.conv2d(maps[4], w["conv_list.0.conv.weight"], w["conv_list.0.conv.bias"])
    for i in range(1, 5):
        skip = maps[4 - i]
        x = torch.cat([grown(x, *skip.shape[2:]), skip], 1)
        for part in "AB":
            x = F.conv2d(
                x, w[f"conv_list.{i}.conv{part}.conv.weight"], w[f"conv_list.{i}.conv{part}.conv.bias"], padding=1
            ).clamp(min=0)
    return F.conv2d(x, w["conv_depth.weight"], w["conv_depth.bias"], padding=1)


def test_decoder_is_the_toolboxs():
    """Parameters: those of the toolbox's own DenseDepthHead, configured as configs/_base_/models/densedepth.py has it,
    built with a stand-in for mmcv's ConvModule: 54,262,657 in 20 tensors. With equal weights that head's output times
    was bit for bit this one's.
    """
    with torch.device("meta"):
        head = DenseDepth(RESNET50)
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert len(shapes) == 20 and sum(p.numel() for p in head.parameters()) == 54_262_657
    wanted = {
        "conv_list.0.conv.weight": (2048, 2048, 1, 1),
        "conv_list.1.convA.conv.weight": (1024, 3072, 3, 3),
        "conv_list.2.convB.conv.bias": (512,),
    }
    wanted |= {
        "conv_list.4.convA.conv.weight": (128, 320, 3, 3),
        "conv_list.4.convB.conv.weight": (128, 128, 3, 3),
        "conv_depth.weight": (1, 128, 3, 3),
    }
    assert wanted.items() <= shapes.items()
    torch.manual_seed(0)
    for channels, width in ((RESNET50, 0), ((64, 64, 128, 256, 512), 64)):
        head, sizes = DenseDepth(channels, width), ((13, 17), (7, 9), (4, 5), (2, 3), (1, 2))
        for name, p in head.named_parameters():
            assert "conv_depth" in name or not name.endswith("bias") or not p.any()  # mmcv's start
            p.data += 0.02 * torch.randn(p.shape) if name.endswith("bias") else 0
        maps = [torch.randn(2, n, *size) for n, size in zip(channels, sizes)]
        with torch.no_grad():
            torch.testing.assert_close(
                head(maps).double(), decoder_by_hand(head.state_dict(), maps), rtol=1e-4, atol=1e-4
            )
        weight = (
            DenseDepth(channels, width).conv_list[4].convB.conv.weight if width else head.conv_list[4].convB.conv.weight
        )
        assert weight.std().item() == pytest.approx((2 / (9 * weight.shape[0])) ** 0.5, rel=0.15)  # He's, over outputs


def test_any_size_and_float32_metres_under_autocast():
    torch.manual_seed(0)
    model = DepthNet(Config(image_encoder="resnet18", decoder_width=64, max_depth=10.0)).eval()
    image = torch.randn(1, 3, 97, 131)
    with torch.no_grad():
        depth = model.depth(image)
        model.decode_head.conv_depth.weight *= 300
        extreme = model.depth(image)
        model.decode_head.conv_depth.weight /= 300
        with torch.autocast("cpu", torch.bfloat16):
            half = model.depth(image)
            loss, stats = model({"image": image, "depth": torch.rand(1, 97, 131) * 9 + 1})
    assert depth.shape == (1, 1, 49, 66) and depth.dtype == half.dtype == loss.dtype == torch.float32
    assert 0 < depth.min() < depth.max() < 10 and 0 <= extreme.min() < 0.1 and 9.9 < extreme.max() <= 10
    assert 0 < (half - depth).abs().mean() < 0.2
    logit = torch.logit(half.double() / 10).float()
    rounding = (logit - logit.bfloat16().float()).abs() / logit.abs()
    assert rounding.mean() > 2**-11, "the answer itself was rounded to bfloat16"
    assert stats["known"] == 1 and stats["abs_rel"] > 0


# -----------------------------------------------------------------------------
# loss and schedule


def sig_loss_by_hand(prediction, truth):
    known = truth > 0
    g = torch.log(prediction.double()[known] + 1e-3) - torch.log(truth.double()[known] + 1e-3)
    mean = g.sum() / len(g)
    return (((g - mean) ** 2).sum() / (len(g) - 1) + 0.15 * mean**2) ** 0.5


@pytest.mark.parametrize("shape, share", [((2, 30, 40), 0.3), ((1, 20, 20), 1.0), ((1, 2, 3), 0.5)])
def test_sig_loss_equals_the_equation(shape, share):
    torch.manual_seed(1)
    truth = torch.rand(shape) * 80 + 0.1
    truth[torch.rand(shape) >= share] = 0
    truth[0, 0, :2] = torch.tensor([3.0, 90.0])
    one, other = [p.requires_grad_() for p in [torch.rand(shape) * 79 + 0.5] for p in (p.clone(), p.clone())]
    loss, wanted = sig_loss(one, truth), sig_loss_by_hand(other, truth)
    loss.backward()
    wanted.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert not one.grad[truth == 0].any()


@pytest.mark.parametrize("known", [0, 1])
def test_too_little_ground_truth_is_no_loss(known):
    truth, prediction = torch.zeros(2, 4, 5), torch.rand(2, 4, 5).requires_grad_()
    truth[:known, 1, 1] = 7.0
    loss = sig_loss(prediction, truth)
    loss.backward()
    assert loss.item() == 0 and prediction.grad is not None and (prediction.grad == 0).all()


def test_sig_loss_has_a_finite_gradient_everywhere():
    truth = torch.rand(1, 8, 9) * 50 + 1
    for values in (
        truth.clone(),
        torch.full_like(truth, 1e-30),
        torch.zeros_like(truth),
        truth * 2,
        truth * (1 + 1e-7),
    ):
        prediction = values.requires_grad_()
        loss = sig_loss(prediction, truth)
        loss.backward()
        assert loss.isfinite() and prediction.grad.isfinite().all()
    assert sig_loss(truth, truth) < 1e-5
    assert sig_loss(truth * 2, truth).item() == pytest.approx(
        0.15**0.5 * np.log(2), rel=1e-2
    )  # a wrong scale costs less than a wrong shape
    assert sig_loss(prediction.bfloat16(), truth).dtype == torch.float32


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 10, 150])
def test_one_cycle_is_pytorchs(steps):
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps, pct_start=0.3, div_factor=25, final_div_factor=100, cycle_momentum=False
    )
    for step in range(steps):
        assert 2e-3 * one_cycle(step, steps) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        if step < steps - 1:
            schedule.step()


def test_one_cycle_is_the_toolboxs_log():
    """Epoch, iteration and rate to five digits, of scratch_kitti_24e.txt: lines where the rate changes, and the ones
    before them. All 672 lines were compared.
    """
    seen = [
        (1, 650, 0.0),
        (1, 700, 1e-5),
        (3, 300, 2e-5),
        (3, 350, 3e-5),
        (7, 200, 9e-5),
        (7, 250, 1e-4),
        (10, 850, 1e-4),
        (10, 900, 9e-5),
    ]
    seen += [
        (15, 50, 6e-5),
        (16, 50, 6e-5),
        (16, 100, 5e-5),
        (20, 1050, 2e-5),
        (20, 1100, 1e-5),
        (22, 850, 1e-5),
        (22, 900, 0.0),
        (24, 1400, 0.0),
    ]
    for epoch, iteration, rate in seen:
        assert round(1e-4 * one_cycle((epoch - 1) * 1447 + iteration - 1, 24 * 1447), 5) == rate, (epoch, iteration)


# -----------------------------------------------------------------------------
# the script in miniature


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def steps_of(folder, without=("data_ms", "step_ms", "samples_per_s")):
    """The log without headers and times."""
    return [{k: v for k, v in line.items() if k not in without} for line in read_log(folder) if "git" not in line]


def row(out, name):
    """The nine figures that a table has for `name`."""
    return [line.split()[-9:] for line in out.splitlines() if line.split()[:1] == [name] and len(line.split()) == 10][0]


def load(path):
    return torch.load(path, weights_only=True)


def tensors(state):
    """All tensors in nested dicts and lists."""
    if torch.is_tensor(state):
        return [state]
    return (
        [t for v in (state.values() if isinstance(state, dict) else state) for t in tensors(v)]
        if isinstance(state, (dict, list))
        else []
    )


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """A run of 14 steps -> its folder, what it said. Ends with judging two held-out scenes."""
    folder, said = tmp_path_factory.mktemp("trained"), io.StringIO()
    arguments = [
        "demo",
        "--data-root",
        scenes,
        *SMALL,
        "--batch-size",
        6,
        "--max-steps",
        14,
        "--lr",
        3e-3,
        "--eval-every",
        7,
    ]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [finetune_depth.__file__, *map(str, arguments)])
        finetune_depth.main()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return folder / "out" / "depth_demo", said.getvalue()


def test_demo_in_miniature(trained):
    out, said = trained
    assert sorted(p.name for p in out.iterdir()) == ["curves.png", "depth.png", "last.pt", "log.jsonl"]
    assert all((out / picture).read_bytes()[:4] == b"\x89PNG" for picture in ("curves.png", "depth.png"))
    log = [line for line in read_log(out) if "lr" in line]
    assert [line["step"] for line in log] == list(range(1, 15)) and log[3]["epoch"] == 3
    losses = [line["loss"] for line in log]
    assert np.mean(losses[-4:]) < np.mean(losses[:2]) - 0.1, losses
    assert all(
        line["lr"][0] == pytest.approx(3e-3 * one_cycle(line["step"] - 1, 14)) and line["grad_norm"] > 0 for line in log
    )
    assert all(0.5 < line["known"] <= 1 for line in log)
    judged = [line for line in read_log(out) if "depth" in line]
    assert (
        [line["step"] for line in judged] == [7, 14]
        and judged[1]["depth"]["images"] == 2
        and judged[1]["depth"]["left_out"] == 0
    )
    assert (
        "6 pairs, 2 held out" in said
        and "a step: 6 frames = 1 processes x 1 passes x 6 frames" in said
        and "depth on 2 images" in said
    )
    found = [judged[1]["depth"]["eigen"][k] for k in eval_depth.EIGEN]
    assert [float(v) for v in row(said, "depth_demo")] == pytest.approx(found, abs=6e-3) and len(found) == 9
    saved = load(out / "last.pt")
    assert (
        saved["step"] == 14
        and saved["script"] == "finetune_depth.py"
        and saved["data"]["frames"] == 6 == len(saved["inventory"])
    )


def test_eval_depth_says_the_same(trained, run_here, scenes, tmp_path):
    """Of last.pt, of a checkpoint as the toolbox has it, and of the maps it wrote, but for the rounding of 16 bits."""
    out, said = trained
    status, first, err = run_here(evaluate, "depth", out / "last.pt", "--save", tmp_path / "maps", "--drawn", 1)
    assert status == 0, err
    assert row(first, "depth_demo") == row(said, "depth_demo")
    bench = [[line for line in text.splitlines() if "KITTI's benchmark" in line] for text in (first, said)]
    assert bench[0] == bench[1] and len(bench[0]) == 1
    maps = sorted((tmp_path / "maps").glob("*.png"))
    pictures = list((tmp_path / "maps" / "pictures").iterdir())
    assert [p.name for p in maps] == [
        f"training_{i}.png" for i in (scenes / "ImageSets" / "val.txt").read_text().split()
    ] and len(pictures) == 1
    assert "wrote 2 predictions and 1 pictures" in first and pictures[0].name == maps[0].name
    with Image.open(maps[0]) as image:
        assert image.mode == "I;16" and image.size == (416, 128)

    status, again, err = run_here(evaluate, "depth", tmp_path / "maps", "--preset", "demo", "--data-root", scenes)
    assert status == 0, err
    assert [float(v) for v in row(again, "maps")] == pytest.approx(
        [float(v) for v in row(first, "depth_demo")], rel=2e-3, abs=2e-3
    )

    # zeros where there is ground truth: Eigen-style figures take them for 1 mm, the benchmark's are left out for that
    # image, which is said
    with Image.open(maps[0]) as image:
        holed = np.array(image)
    holed[::7] = 0
    Image.fromarray(holed).save(maps[0])
    status, again, err = run_here(evaluate, "depth", tmp_path / "maps", "--preset", "demo", "--data-root", scenes)
    assert (
        status == 0
        and "SILog" in again
        and "without 1 images where a prediction is 0" in again
        and row(again, "maps") != row(first, "depth_demo")
    ), err

    model, c, trained_on = evaluate.load_depth_run(out / "last.pt", None, "cpu")
    assert (
        not model.training
        and c.data_root == (str(scenes),)
        and c.image_encoder == "resnet18"
        and c.crop == (704, 352)
        and len(trained_on) == 6
    )


def test_on_other_data(trained, run_here, scenes):
    """--preset judges a network on another data set, sweeps of the same frames; frames that it was trained on are
    said.
    """
    last = trained[0] / "last.pt"
    status, dense, err = run_here(evaluate, "depth", last, "--splits", "train")
    assert status == 0 and f"note: {last} was trained on 6 of these 6 images: its figures will flatter" in dense, err
    status, sweeps, err = run_here(
        evaluate, "depth", last, "--preset", "kitti_lidar", "--data-root", scenes, "--splits", "train"
    )
    assert status == 0 and "crop garg" in sweeps and "crop none" in dense and "depth on 6 images" in sweeps, err
    assert row(sweeps, "depth_demo") != row(dense, "depth_demo")


def test_published_rows_stand_beside_their_images_alone():
    """By the images' names, which here are rebuilt from nothing but their fingerprints, and the range of depth."""
    figures = {
        "eigen": dict.fromkeys(eval_depth.EIGEN, 0.5),
        "benchmark": dict.fromkeys(eval_depth.BENCHMARK, 1.0),
        "images": 652,
        "left_out": 0,
        "zeros": 0,
    }
    standard = eval_depth.STANDARD["kitti"][0]
    for c, names, expected in (
        (Config(), standard, 4),
        (Config(), "other", 0),
        (Config(max_depth=50.0), standard, 0),
        (Config(dataset="scenes"), standard, 0),
    ):
        lines = eval_depth.report(c, {"mine": figures | {"names": names}})
        assert sum("published" in line for line in lines) == expected
    scored = [(figures["eigen"], None, True), (None, None, False), (figures["eigen"], figures["benchmark"], False)]
    total = eval_depth.summary(scored, ["b", "x", "a"])
    assert total == eval_depth.summary(scored[::-1], ["a", "x", "b"]) and total["names"] == eval_depth.data.fingerprint(
        ["a", "b"]
    )
    assert (total["images"], total["left_out"], total["zeros"]) == (2, 1, 1)


def test_toolbox_checkpoints(trained, run_here, tmp_path, monkeypatch):
    """{"state_dict", "meta"} with --preset, whose network it must hold."""
    out, said = trained
    saved = load(out / "last.pt")
    torch.save({"meta": {"epoch": 24}, "state_dict": saved["model"]}, tmp_path / "latest.pth")
    data_root = ("--data-root", saved["config"]["data_root"][0])
    status, _, err = run_here(evaluate, "depth", "latest.pth", *data_root)
    assert (
        status == 1
        and err == "error: latest.pth: a checkpoint of the toolbox; --preset must say of what: kitti or nyu\n"
    )
    status, _, err = run_here(evaluate, "depth", "latest.pth", "--preset", "kitti", *data_root)
    assert status == 1 and err == "error: latest.pth: its weights are not those of its config\n"
    preset = dataclasses.replace(finetune_depth.PRESETS["demo"][1], decoder_width=64, image_scale=0.25)
    monkeypatch.setitem(finetune_depth.PRESETS, "demo", ("", preset))
    status, found, err = run_here(evaluate, "depth", "latest.pth", "--preset", "demo", *data_root)
    assert status == 0, err
    assert row(found, tmp_path.name) == row(said, "depth_demo")


def test_the_mirror_image_is_averaged(trained):
    """predict() by its parts, at a size with odd edges: both maps, cut to the range, enlarged, the second mirrored
    back.
    """
    model, c, _ = evaluate.load_depth_run(trained[0] / "last.pt", None, "cpu")
    c = dataclasses.replace(c, image_scale=1.0, min_depth=9.0, max_depth=80.0)
    image = np.random.default_rng(0).integers(0, 256, (33, 71, 3), dtype=np.uint8)
    found = eval_depth.predict(model, image, c, torch.device("cpu"))
    x = (
        (torch.from_numpy(image).float() / 255 - torch.tensor([0.485, 0.456, 0.406]))
        / torch.tensor([0.229, 0.224, 0.225])
    ).permute(2, 0, 1)[None]
    with torch.no_grad():
        a, b = (grown(model.depth(view).clamp(9.0, 80.0), 33, 71)[0, 0] for view in (x, x.flip(3)))
    assert found.dtype == np.float32 and found.shape == (33, 71) and found.min() >= 9.0
    np.testing.assert_allclose(found, (a + b.flip(1)).numpy() / 2, rtol=1e-4)
    assert np.abs(found - a.numpy()).max() > 1e-3
    model.eval()
    mirrored = eval_depth.predict(model, image[:, ::-1], c, torch.device("cpu"))
    np.testing.assert_allclose(mirrored[:, ::-1], found, rtol=1e-4)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=needs_gpu)])
def test_on_a_gpu(trained, run_script, scenes, tmp_path, device):
    """In float32 the first loss is a CPU's; in bfloat16, with the data on the card, it learns, judges and draws."""
    arguments = ["demo", "--data-root", scenes, *SMALL, "--batch-size", 6, "--lr", 3e-3, "--device", device]
    done = run_script(
        "finetune_depth.py", *arguments, "--no-amp", "--max-steps", 1, "--eval-splits", "--name", "float32"
    )
    assert done.returncode == 0, done.stderr
    first = [
        next(line for line in read_log(folder) if "lr" in line) for folder in (trained[0], tmp_path / "out" / "float32")
    ]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=0.01) and first[1]["grad_norm"] == pytest.approx(
        first[0]["grad_norm"], rel=0.05
    )
    done = run_script("finetune_depth.py", *arguments, "--max-steps", 14, "--resident", "--name", "bfloat16")
    assert done.returncode == 0, done.stderr
    losses = [line["loss"] for line in read_log(tmp_path / "out" / "bfloat16") if "lr" in line]
    assert np.mean(losses[-4:]) < np.mean(losses[:2]) - 0.1 and row(done.stdout, "bfloat16"), losses
    assert (tmp_path / "out" / "bfloat16" / "depth.png").exists()


def test_finished_runs_and_other_programs_files(trained, run_here, tmp_path):
    """Started again, a finished run judges again, and changes nothing; another learning rate is refused, and so are
    files of others.
    """
    out, said = trained
    shutil.copytree(out, tmp_path / "out" / "depth_demo")
    here, scenes = tmp_path / "out" / "depth_demo", load(out / "last.pt")["config"]["data_root"][0]
    same = ["demo", "--data-root", scenes, *SMALL, "--batch-size", 6, "--max-steps", 14, "--eval-every", 7]
    before = (here / "last.pt").read_bytes()
    status, again, err = run_here(finetune_depth, *same, "--lr", 3e-3)
    assert status == 0, err
    assert row(again, "depth_demo") == row(said, "depth_demo") and (here / "last.pt").read_bytes() == before
    assert [line["step"] for line in steps_of(here) if "depth" in line] == [7, 14, 14]
    log = (here / "log.jsonl").read_text()
    for changed, named in ((["--lr", 2e-3], "lr=0.003, not 0.002"), (["--lr", 3e-3, "--seed", 5], "seed=0, not 5")):
        status, _, err = run_here(finetune_depth, *same, *changed)
        assert status == 1 and err.count("\n") == 1 and named in err and "give another --name" in err
    status, _, err = run_here(evaluate, "match", here / "last.pt")
    assert status == 1 and err == f"error: {here / 'last.pt'}: not a last.pt of simipu.py\n"
    torch.save({"model": {}, "config": {}, "step": 1, "identity": {}, "script": "simipu.py"}, tmp_path / "pre.pt")
    status, _, err = run_here(evaluate, "depth", tmp_path / "pre.pt")
    assert status == 1 and err == f"error: {tmp_path / 'pre.pt'}: not a last.pt of finetune_depth.py\n"
    assert (here / "log.jsonl").read_text() == log


RESUMED = [*SMALL, "--group", 1, "--max-steps", 6, "--save-every", 2, "--eval-every", 3]


def test_resumes_exactly(run_here, scenes, tmp_path, monkeypatch):
    """Killed in step 5, after the checkpoint of step 4, it goes on to the same bits, whoever loads the images. The same
    seed is the same run, another seed is not.
    """
    arguments = ["demo", "--data-root", scenes, *RESUMED]
    status, _, err = run_here(finetune_depth, *arguments, "--name", "whole")
    assert status == 0, err
    report = loop.Loop.report

    def until_5(loop, epoch, stats):
        stats = report(loop, epoch, stats)
        if loop.done == 5:
            raise SystemExit(137)
        return stats

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "report", until_5)
        assert run_here(finetune_depth, *arguments)[0] == 137
    out, whole = tmp_path / "out" / "depth_demo", tmp_path / "out" / "whole"
    assert load(out / "last.pt")["step"] == 4 and steps_of(out)[-1]["step"] == 5
    status, said, err = run_here(finetune_depth, *arguments, "--resident")
    assert status == 0 and "steps 4 to 6" in said, err
    assert steps_of(out) == steps_of(whole) and [line["step"] for line in steps_of(out) if "depth" in line] == [3, 6]
    a, b = load(out / "last.pt"), load(whole / "last.pt")
    for part in ("model", "optimizers"):
        assert len(tensors(a[part])) == len(tensors(b[part])) > 100
        assert all(torch.equal(one, other) for one, other in zip(tensors(a[part]), tensors(b[part])))
    status, _, err = run_here(
        finetune_depth, *arguments, "--name", "other", "--seed", 1, "--eval-splits", "--max-steps", 1
    )
    assert status == 0 and steps_of(tmp_path / "out" / "other")[0]["loss"] != steps_of(whole)[0]["loss"], err


def test_a_broken_held_out_file_costs_no_step(run_here, scenes, tmp_path):
    """A step is saved before it is judged; judged it is when the file was mended, in the middle of a run and at its
    end, once.
    """
    shutil.copytree(scenes, tmp_path / "scenes")
    held_out = (scenes / "ImageSets" / "val.txt").read_text().split()
    truth = tmp_path / "scenes" / "training" / "depth_2" / f"{held_out[-1]}.png"
    whole = truth.read_bytes()
    truth.write_bytes(whole[:400])
    out = tmp_path / "out" / "depth_demo"
    judged = lambda: [line["step"] for line in steps_of(out) if "depth" in line]
    arguments = [
        "demo",
        "--data-root",
        tmp_path / "scenes",
        *SMALL,
        "--max-steps",
        4,
        "--eval-every",
        2,
        "--save-every",
        2,
    ]

    def ends_at(step):
        status, _, err = run_here(finetune_depth, *arguments)
        assert status == 1 and f"error: {truth}: not a readable PNG" in err and "Traceback" not in err
        assert load(out / "last.pt")["step"] == step

    ends_at(2)
    ends_at(2)  # before another step
    assert judged() == []
    truth.write_bytes(whole)
    status, said, err = run_here(finetune_depth, *arguments)
    assert status == 0 and "depth on 2 images" in said, err
    assert judged() == [2, 4]
    lines = [line for line in (out / "log.jsonl").read_text().splitlines(keepends=True) if '"depth": {' not in line]
    (out / "log.jsonl").write_text("".join(lines))  # as if it had been killed while judging the last step
    status, again, err = run_here(finetune_depth, *arguments)
    assert status == 0 and again.splitlines()[-1] == said.splitlines()[-1] and judged() == [4], err


def test_init_loads_an_encoder(run_here, scenes, tmp_path):
    """At a rate of next to nothing the first checkpoint holds the file's encoder, and the decoder of a run from
    scratch.
    """
    torch.manual_seed(7)
    encoder = encoders.build_image_encoder("resnet18").state_dict()
    for name in encoder:
        encoder[name] += torch.rand(encoder[name].shape) if "running" in name else 0
    about = {
        "arch": "resnet18",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "channels": "RGB",
        "step": 1,
    }
    torch.save({"state_dict": encoder, **about}, tmp_path / "backbone.pt")
    arguments = ["demo", "--data-root", scenes, *SMALL, "--max-steps", 1, "--lr", 1e-12, "--eval-splits"]
    found = {}
    for init in ("none", "backbone.pt"):
        status, said, err = run_here(finetune_depth, *arguments, "--init", init, "--name", init.split(".")[0])
        assert status == 0 and ("100% of the parameters" in said) == (init != "none"), err
        assert "depth on" not in said and "0 held out" in said
        found[init] = load(tmp_path / "out" / init.split(".")[0] / "last.pt")["model"]
    for name, value in encoder.items():
        if "running" in name or name.endswith("num_batches_tracked"):
            continue
        torch.testing.assert_close(found["backbone.pt"]["backbone." + name], value, rtol=0, atol=1e-9)
    assert not torch.allclose(found["none"]["backbone.conv1.weight"], encoder["conv1.weight"], atol=1e-3)
    for name, value in found["none"].items():
        if name.startswith("decode_head."):
            torch.testing.assert_close(found["backbone.pt"][name], value, rtol=0, atol=1e-9)

    shutil.copy(tmp_path / "backbone.pt", tmp_path / "moved.pt")  # the same weights elsewhere are the same run
    assert run_here(finetune_depth, *arguments, "--init", "moved.pt", "--name", "backbone")[0] == 0
    encoder["conv1.weight"][0] += 1
    torch.save({"state_dict": encoder, **about}, tmp_path / "moved.pt")
    for init in ("moved.pt", "none"):
        status, _, err = run_here(finetune_depth, *arguments, "--init", init, "--name", "backbone")
        assert status == 1 and "made with init=" in err and err.count("\n") == 1, err


def test_two_processes(run_script, run_here, scenes, tmp_path):
    """One table, with the figures that its checkpoint has alone: rank 0's batch statistics, and every image once."""
    arguments = [
        "demo",
        "--data-root",
        scenes,
        *SMALL,
        "--batch-size",
        4,
        "--group",
        2,
        "--max-steps",
        2,
        "--eval-splits",
        "val",
    ]
    done = run_script("finetune_depth.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    assert (
        "a step: 4 frames = 2 processes x 1 passes x 2 frames" in done.stdout
        and done.stdout.count("depth on 2 images") == 1
    )
    status, said, err = run_here(evaluate, "depth", tmp_path / "out" / "depth_demo" / "last.pt")
    assert status == 0, err
    assert row(said, "depth_demo") == row(done.stdout, "depth_demo")


# -----------------------------------------------------------------------------
# can it learn?


def test_overfits_eight_frames_from_scratch(run_here, scenes, tmp_path):
    """Within 5 % on the frames it was trained on, judged as all runs are. Small built-in scenes, smooth, for want of
    resolution, and symmetric, so that the mirror image, which judging looks at too, is nothing new. As they are, eight
    scenes of 104 x 32 need ten minutes of a core: .047 with --image-scale 2 --rotation-p 0 --colour-p 0 --max-steps
    1500 --lr 2e-3 --decoder-width 256.
    """
    shutil.copytree(scenes, tmp_path / "tiny")
    for file in (tmp_path / "tiny" / "training" / "depth_2").iterdir():
        depth = data_depth.read_depth(file).astype(np.float32) / 256
        log = np.asarray(
            Image.fromarray(np.log(np.where(depth == 0, 80, depth)))
            .resize((7, 3), Image.Resampling.BOX)
            .resize((64, 32), Image.Resampling.BICUBIC)
        )
        Image.fromarray(np.rint(256 * np.exp((log + log[:, ::-1]) / 2).clip(2, 79)).astype(np.uint16)).save(file)
        photo = tmp_path / "tiny" / "training" / "image_2" / file.name
        pixels = np.array(Image.open(photo).resize((64, 32), Image.Resampling.BOX))
        pixels[:, 32:] = pixels[:, 31::-1]
        Image.fromarray(pixels).save(photo)
    arguments = [
        "demo",
        "--data-root",
        tmp_path / "tiny",
        "--splits",
        "trainval",
        "--eval-splits",
        "--resident",
        "--image-scale",
        1,
        "--decoder-width",
        128,
    ]
    arguments += [
        "--rotation-p",
        0,
        "--flip",
        0,
        "--colour-p",
        0,
        "--max-steps",
        120,
        "--lr",
        4e-3,
        "--save-every",
        500,
    ]
    status, _, err = run_here(finetune_depth, *arguments)
    assert status == 0, err
    status, said, err = run_here(evaluate, "depth", tmp_path / "out" / "depth_demo" / "last.pt", "--splits", "trainval")
    assert status == 0, err
    a1, abs_rel = (float(row(said, "depth_demo")[i]) for i in (0, 3))
    assert abs_rel < 0.05 and a1 > 0.95, said


# -----------------------------------------------------------------------------
# real frames, and what is refused


LIDAR = ["kitti_lidar", "--image-encoder", "resnet18", *SMALL, "--max-steps", 2]


def test_kitti_lidar(run_here, kitti, tmp_path):
    root = kitti.resolve()
    status, said, err = run_here(finetune_depth, *LIDAR, "--data-root", root)
    assert status == 0, err
    assert "22 pairs, 8 held out" in said and "depth on 8 images" in said and "crop garg" in said
    log = steps_of(tmp_path / "out" / "depth_kitti_lidar")
    assert [line["step"] for line in log] == [1, 2, 2] and all(
        np.isfinite(line["loss"]) and 0.01 < line["known"] < 0.5 for line in log[:2]
    )
    eigen = log[2]["depth"]["eigen"]
    assert len(eigen) == 9 and 0 < eigen["abs_rel"] < 20 and log[2]["depth"]["images"] == 8

    status, _, err = run_here(
        evaluate, "depth", tmp_path / "out" / "depth_kitti_lidar" / "last.pt", "--frames", 1, "--save", "maps"
    )
    assert status == 0, err
    name = data_depth.find_pairs("kitti_lidar", [root], "", ["val"])[0][0].name.replace("/", "_") + ".png"
    with Image.open(tmp_path / "maps" / name) as image:
        depth = np.asarray(image)
    folder = ["depth", tmp_path / "maps", "--preset", "kitti_lidar", "--data-root", root, "--frames", 1]
    assert run_here(evaluate, *folder)[0] == 0
    Image.fromarray(depth[:-1]).save(tmp_path / "maps" / name)
    status, out, err = run_here(evaluate, *folder, "--save", tmp_path / "never")
    assert (
        status == 1
        and err.splitlines()[-1].startswith("error: ")
        and "ground truth is 37" in err.splitlines()[-1]
        and "Traceback" not in err
    )
    assert not out and not (tmp_path / "never").exists()


WRONG = {
    "no split file": (
        ["kitti", "--data-root", "DATA", "--splits", "nowhere.txt"],
        "nowhere.txt: not a readable split file",
    ),
    "no split": (["demo", "--data-root", "DATA", *SMALL, "--splits", "nowhere"], "nowhere.txt: missing"),
    "no labels": (["demo", "--data-root", "DATA", *SMALL, "--labels", 0], "--labels 0.0: must be above 0"),
    "too many labels": (["demo", "--data-root", "DATA", *SMALL, "--labels", 2], "--labels 2.0: must be from 0 to 1"),
    "few labels": (
        ["demo", "--data-root", "DATA", *SMALL, "--labels", 0.1],
        "--batch-size 2: the 1 pairs found are too few",
    ),
    "depths": (
        ["demo", "--data-root", "DATA", *SMALL, "--min-depth", 80],
        "--min-depth 80.0: must be below --max-depth 80",
    ),
    "width": (
        ["demo", "--data-root", "DATA", *SMALL, "--decoder-width", 40],
        "--decoder-width 40: must be a multiple of 16",
    ),
    "batch": (
        ["demo", "--data-root", "DATA", *SMALL, "--batch-size", 3, "--group", 2],
        "--batch-size 3: not a multiple of --group 2",
    ),
    "gamma": (
        ["demo", "--data-root", "DATA", *SMALL, "--gamma", 1.1, 0.9],
        "--gamma 1.1 0.9: must be above 0, the smaller first",
    ),
    "seen": (
        ["demo", "--data-root", "DATA", *SMALL, "--eval-splits", "trainval"],
        "--eval-splits trainval: 6 of its frames are trained on, training/00000",
    ),
    "too small": (
        ["nyu", "--data-root", "SMALL", "--image-encoder", "resnet18", *SMALL, "--eval-splits"],
        "small/a.png: a map of 32 x 64 (height x width), where NYU has 480 x 640",
    ),
    "no init": (["demo", "--data-root", "DATA", *SMALL, "--init", "nowhere.pt"], "nowhere.pt: no such file"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line_and_leaves_no_trace(run_here, scenes, tmp_path, what):
    arguments, words = WRONG[what]
    (tmp_path / "small").mkdir()
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(tmp_path / "small" / "a.png")
    Image.fromarray(np.full((32, 64), 1000, np.uint16)).save(tmp_path / "small" / "b.png")
    (tmp_path / "small" / "nyu_train.txt").write_text("a.png b.png 518.8\n" * 2)
    status, out, err = run_here(finetune_depth, *[{"DATA": scenes, "SMALL": "small"}.get(a, a) for a in arguments])
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1 and words in err, err
    assert not (tmp_path / "out").exists()


def test_scratch_starts_as_identities(run_here, scenes, tmp_path):
    """The toolbox's start: the last batch norm of every residual block is 0, and its gradient is not; or at 1, where
    asked for.
    """
    arguments = ["demo", "--data-root", scenes, *SMALL, "--max-steps", 1, "--lr", 1e-3, "--eval-splits"]
    for flag, start in (("--zero-init-residual", 0), ("--no-zero-init-residual", 1)):
        status, said, err = run_here(finetune_depth, *arguments, flag, "--name", f"from_{start}")
        assert status == 0 and "image encoder: from scratch" in said, err
        state = load(tmp_path / "out" / f"from_{start}" / "last.pt")["model"]
        weights = [v for k, v in state.items() if k.startswith("backbone.") and k.endswith("bn2.weight")]
        assert len(weights) == 8 and all(0 < (w - start).abs().max() < 1e-3 for w in weights)  # one step away


def test_wrong_predictions_are_one_line(run_here, scenes, tmp_path):
    maps = tmp_path / "maps"
    maps.mkdir()
    start = ["depth", maps, "--data-root", scenes]
    status, _, err = run_here(evaluate, *start)
    assert (
        status == 1
        and err == f"error: {maps}: a folder of predictions; --preset must say of what: demo, kitti, nyu, kitti_lidar\n"
    )
    start += ["--preset", "demo", "--save", tmp_path / "new"]
    first, second = (scenes / "ImageSets" / "val.txt").read_text().split()
    flat = np.full((128, 416), 2560, np.uint16)
    Image.fromarray(flat).save(maps / f"training_{first}.png")
    status, out, err = run_here(evaluate, *start)  # the second of two is missing
    assert (
        status == 1 and not out and err == f"error: {maps}: no training/{second}.png in it, nor training_{second}.png\n"
    )
    for name in (first, second):
        Image.fromarray(flat[:, 1:]).save(maps / f"training_{name}.png")
    status, out, err = run_here(evaluate, *start)
    words = f"error: {maps / f'training_{first}.png'}: 128 x 415 (height x width), ground truth is 128 x 416"
    assert status == 1 and not out and err.splitlines()[-1].startswith(words)
    for arguments, words in (
        (["--frames", -1], "--frames -1"),
        (["--drawn", -2], "--drawn -2"),
        (["--frame-stride", 0], "--frame-stride 0"),
    ):
        status, _, err = run_here(evaluate, *start, *arguments)
        assert status == 1 and err.startswith("error: ") and f"{words}: must be" in err
    status, _, err = run_here(evaluate, "depth", tmp_path / "nothing.pt")
    assert status == 1 and err == f"error: {tmp_path / 'nothing.pt'}: no such file\n"
    assert not (tmp_path / "new").exists()
