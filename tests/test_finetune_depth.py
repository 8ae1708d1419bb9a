"""Depth fine-tuning: decoder, loss and schedule against transcriptions of the toolbox's, and the table of figures.

The script itself is run in test_finetune_depth_command.py.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import encoders
import eval_depth
import finetune_depth
import runtime
from files import BadInput
from finetune_depth import Config, DenseDepth, DepthNet, build_optimizer, one_cycle, sig_loss

RESNET50 = (64, 256, 512, 1024, 2048)


# -----------------------------------------------------------------------------
# network


def enlarging(old, new):
    """The (new, old) matrix of float64 that enlarges a line bilinearly, with its ends aligned."""
    at = np.linspace(0, old - 1, new)
    low = np.floor(at).astype(int).clip(0, max(old - 2, 0))
    high = np.minimum(low + 1, old - 1)
    matrix = np.zeros((new, old))
    matrix[range(new), low] += 1 - (at - low)
    matrix[range(new), high] += at - low
    return torch.from_numpy(matrix)


def grown(x, height, width):
    """Bilinear enlarging of (B, C, h, w) with corners aligned, in float64."""
    rows = enlarging(x.shape[2], height)
    columns = enlarging(x.shape[3], width)
    return torch.einsum("ij,bcjk,lk->bcil", rows, x.double(), columns)


def decoder_by_hand(weights, maps):
    """densedepth_head.py from a state dict, in float64. -> logits"""
    w = {name: value.double() for name, value in weights.items()}
    maps = [m.double() for m in maps]
    x = F.conv2d(maps[4], w["conv_list.0.conv.weight"], w["conv_list.0.conv.bias"])
    for i in range(1, 5):
        skip = maps[4 - i]
        x = torch.cat([grown(x, *skip.shape[2:]), skip], 1)
        for part in ("convA", "convB"):
            name = f"conv_list.{i}.{part}.conv"
            x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1).clamp(min=0)
    return F.conv2d(x, w["conv_depth.weight"], w["conv_depth.bias"], padding=1)


def test_decoder_is_the_toolboxs():
    """The toolbox's own DenseDepthHead has 54,262,657 parameters in 20 tensors, when it is configured as in
    configs/_base_/models/densedepth.py and built with a stand-in for mmcv's ConvModule. With equal weights its output
    was bit for bit this one's.
    """
    with torch.device("meta"):
        head = DenseDepth(RESNET50)
    shapes = {k: tuple(v.shape) for k, v in head.state_dict().items()}
    assert len(shapes) == 20
    assert sum(p.numel() for p in head.parameters()) == 54_262_657
    wanted = {
        "conv_list.0.conv.weight": (2048, 2048, 1, 1),
        "conv_list.1.convA.conv.weight": (1024, 3072, 3, 3),
        "conv_list.2.convB.conv.bias": (512,),
        "conv_list.4.convA.conv.weight": (128, 320, 3, 3),
        "conv_list.4.convB.conv.weight": (128, 128, 3, 3),
        "conv_depth.weight": (1, 128, 3, 3),
    }
    assert wanted.items() <= shapes.items()
    torch.manual_seed(0)
    sizes = ((13, 17), (7, 9), (4, 5), (2, 3), (1, 2))
    for channels, width in ((RESNET50, 0), ((64, 64, 128, 256, 512), 64)):
        head = DenseDepth(channels, width)
        for name, p in head.named_parameters():
            if not name.endswith("bias"):
                continue
            assert name == "conv_depth.bias" or not p.any()  # mmcv's start
            p.data += 0.02 * torch.randn(p.shape)
        maps = [torch.randn(2, n, *size) for n, size in zip(channels, sizes)]
        with torch.no_grad():
            found = head(maps).double()
            by_hand = decoder_by_hand(head.state_dict(), maps)
        torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-4)
        weight = head.conv_list[4].convB.conv.weight
        he = (2 / (9 * weight.shape[0])) ** 0.5  # He's, over outputs
        assert weight.std().item() == pytest.approx(he, rel=0.15)


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
    assert depth.shape == (1, 1, 49, 66)
    assert depth.dtype == half.dtype == loss.dtype == torch.float32
    assert 0 < depth.min() < depth.max() < 10
    assert 0 <= extreme.min() < 0.1
    assert 9.9 < extreme.max() <= 10
    assert 0 < (half - depth).abs().mean() < 0.2
    logit = torch.logit(half.double() / 10).float()
    rounding = (logit - logit.bfloat16().float()).abs() / logit.abs()
    assert rounding.mean() > 2**-11, "the answer itself was rounded to bfloat16"
    assert stats["known"] == 1
    assert stats["abs_rel"] > 0


@pytest.mark.parametrize("freeze", ["none", "first", "all"])
def test_what_is_frozen_stays_and_all_else_learns(freeze):
    c = Config(image_encoder="resnet18", decoder_width=32, freeze=freeze)
    model = DepthNet(c).train()
    optimizer = build_optimizer(model, c)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss, _ = model({"image": torch.randn(2, 3, 32, 64), "depth": torch.rand(2, 32, 64) * 9 + 1})
    loss.backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = {"none": (), "first": ("backbone.conv1.", "backbone.bn1.", "backbone.layer1."), "all": ("backbone.",)}
    assert moved == {name for name in before if not name.startswith(frozen[freeze])}


@pytest.mark.parametrize("freeze, said", [("first", "of ResNets alone"), (True, "--freeze True: expected none, first")])
def test_freezing_what_is_not_there(freeze, said):
    with pytest.raises(BadInput, match=said):
        encoders.freeze_parts(torch.nn.Conv2d(1, 1, 1), freeze)


# -----------------------------------------------------------------------------
# loss and schedule


def sig_loss_by_hand(prediction, truth):
    known = truth > 0
    g = torch.log(prediction.double()[known] + 1e-3) - torch.log(truth.double()[known] + 1e-3)
    mean = g.sum() / len(g)
    variance = ((g - mean) ** 2).sum() / (len(g) - 1)
    return (variance + 0.15 * mean**2) ** 0.5


@pytest.mark.parametrize("shape, share", [((2, 30, 40), 0.3), ((1, 20, 20), 1.0), ((1, 2, 3), 0.5)])
def test_sig_loss_equals_the_equation(shape, share):
    torch.manual_seed(1)
    truth = torch.rand(shape) * 80 + 0.1
    truth[torch.rand(shape) >= share] = 0
    truth[0, 0, :2] = torch.tensor([3.0, 90.0])
    prediction = torch.rand(shape) * 79 + 0.5
    one, other = prediction.clone().requires_grad_(), prediction.clone().requires_grad_()
    loss = sig_loss(one, truth)
    loss.backward()
    wanted = sig_loss_by_hand(other, truth)
    wanted.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-7)
    assert not one.grad[truth == 0].any()


@pytest.mark.parametrize("known", [0, 1])
def test_too_little_ground_truth_is_no_loss(known):
    truth = torch.zeros(2, 4, 5)
    truth[:known, 1, 1] = 7.0
    prediction = torch.rand(2, 4, 5).requires_grad_()
    loss = sig_loss(prediction, truth)
    loss.backward()
    assert loss.item() == 0
    assert prediction.grad is not None
    assert (prediction.grad == 0).all()


def test_sig_loss_has_a_finite_gradient_everywhere():
    truth = torch.rand(1, 8, 9) * 50 + 1
    tiny = torch.full_like(truth, 1e-30)
    nearly = truth * (1 + 1e-7)
    for values in (truth.clone(), tiny, torch.zeros_like(truth), truth * 2, nearly):
        prediction = values.requires_grad_()
        loss = sig_loss(prediction, truth)
        loss.backward()
        assert loss.isfinite()
        assert prediction.grad.isfinite().all()
    assert sig_loss(truth, truth) < 1e-5
    of_scale = sig_loss(truth * 2, truth).item()  # a wrong scale costs less than a wrong shape
    assert of_scale == pytest.approx(0.15**0.5 * np.log(2), rel=1e-2)
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
    """Epoch, iteration and rate to five digits, as scratch_kitti_24e.txt has them, where the rate changes and in the
    line before. All 672 lines of that log were compared.
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
        step = (epoch - 1) * 1447 + iteration - 1
        assert round(1e-4 * one_cycle(step, 24 * 1447), 5) == rate, (epoch, iteration)


# -----------------------------------------------------------------------------
# the table of figures


def test_published_rows_stand_beside_their_images_alone():
    """Published figures are of certain images in a certain range of depth. Here nothing is left of those images but the
    fingerprint of their names.
    """
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
    scored = [
        (figures["eigen"], None, True),
        (None, None, False),
        (figures["eigen"], figures["benchmark"], False),
    ]
    total = eval_depth.summary(scored, ["b", "x", "a"])
    assert total == eval_depth.summary(scored[::-1], ["a", "x", "b"])
    assert total["names"] == data.fingerprint(["a", "b"])
    assert (total["images"], total["left_out"], total["zeros"]) == (2, 1, 1)


# -----------------------------------------------------------------------------
# pairs


def test_drives_that_are_trained_and_judged_on_are_told(raw_drive, monkeypatch):
    monkeypatch.setattr(data, "check_unseen", lambda *_: None)  # the same frames are judged: never mind
    c = Config(dataset="lidar", data_root=(str(raw_drive),), splits=(), eval_splits=(), eval_root=(str(raw_drive),))
    _, held_out, note = finetune_depth.load_frames(c, runtime.Run(torch.device("cpu"), 0, 1))
    assert len(held_out) == 4
    assert note.endswith(
        "shares 1 drives with training, 2011_09_26_drive_0001_sync among them: its figures will flatter"
    )
