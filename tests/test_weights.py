"""Weights in and out. Foreign checkpoints are fabricated with their key names around a network whose function is known
on pixels normalised their way; what was loaded must compute the same of the same uint8 image, normalised ours.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
import torch.nn.functional as F
from test_loop import MINI

import encoders
import eval as evaluate
import runtime
import simipu
import weights
from files import BadInput

# part of the config that mmcv keeps as text
CONFIG = """model = dict(type='FCOS')
img_norm_cfg = dict(
    mean=[{}],
    std=[{}],
    to_rgb={})
train_pipeline = []"""
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, of 0..1, RGB


def pixels(image, channels="RGB", undivided=False):
    """(B, H, W, 3) uint8 RGB -> what a network of that convention is fed with."""
    x = image.permute(0, 3, 1, 2).float() - 255 * torch.tensor(MEAN).view(3, 1, 1)
    x = x if undivided else x / (255 * torch.tensor(STD).view(3, 1, 1))
    return x.flip(1) if channels == "BGR" else x


def an_image(seed=0):
    """Smooth colours, as photographs are; (2, 64, 96, 3) uint8."""
    g = torch.Generator().manual_seed(seed)
    x = F.interpolate(torch.rand(2, 3, 12, 18, generator=g), (64, 96), mode="bilinear")
    return (255 * x + 6 * torch.randn(x.shape, generator=g)).clamp(0, 255).round().byte().permute(0, 2, 3, 1)


@functools.cache  # nobody changes one
def network(depth=18, seed=0, eps=1e-5, **convention):
    """A random ResNet whose batch norms have seen images of that convention, in eval mode."""
    torch.manual_seed(seed)
    net = encoders.ResNet(depth)
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(m.weight, 0.5, 1.5)
            torch.nn.init.normal_(m.bias, 0, 0.2)
            m.momentum, m.eps = 1.0, eps
    with torch.no_grad():
        net.train()(pixels(an_image(99), **convention))
    return net.eval()


def named(net, prefix=""):
    return {prefix + k: v.clone() for k, v in net.state_dict().items()}


def assert_same_function(loaded, net, tolerance=1e-4, **convention):
    with torch.no_grad():
        own, theirs = loaded.eval()(pixels(an_image()))[-1], net(pixels(an_image(), **convention))[-1]
    assert theirs.std() > 0.05
    torch.testing.assert_close(own, theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


def load(content, path, depth=18, pixels="auto"):
    torch.save(content, path)
    encoder = encoders.ResNet(depth)
    return encoder, weights.load_image_encoder(encoder, path, pixels)


# -----------------------------------------------------------------------------
# other people's image encoders


def head(*names):
    return {name: torch.randn(8) for name in names}


# each -> the network that was trained, what is saved, words of the summary


def torchvision():
    net = network()
    return net, named(net) | head("fc.weight", "fc.bias"), "taken: names without prefix", "2 head or classifier"


def timm():
    net = network()
    content = {"state_dict": named(net) | head("fc.weight", "fc.bias"), "arch": "resnet18", "epoch": 3}
    return net, content, "taken: names without prefix of state_dict", "2 head or classifier"


def moco_v1():
    net, key = network(), network(seed=1)
    state = named(key, "module.encoder_k.") | named(net, "module.encoder_q.")
    state |= head("module.encoder_q.fc.weight", "module.encoder_q.fc.bias", "module.queue")
    content = {"epoch": 200, "arch": "resnet18", "state_dict": state}
    return net, content, "taken: encoder_q.* of state_dict", "120 key encoder, 2 head or classifier, 1 queue"


def moco_v2():
    net, key = network(), network(seed=1)
    state = named(net, "module.encoder_q.") | head("module.encoder_q.fc.0.weight", "module.encoder_q.fc.2.bias")
    state |= named(key, "module.encoder_k.") | head("module.encoder_k.fc.0.weight", "module.queue", "module.queue_ptr")
    content = {"state_dict": state, "optimizer": {"state": {}}}
    return net, content, "taken: encoder_q.* of state_dict", "2 head or classifier, 121 key encoder, 2 queue"


def densecl():
    net, key = network(), network(seed=1)
    state = head("queue", "queue_ptr", "queue2", "queue2_ptr", "encoder_q.1.mlp.0.weight", "encoder_q.1.mlp2.0.weight")
    state |= named(net, "encoder_q.0.") | named(key, "encoder_k.0.") | named(net, "backbone.")
    ignored = "4 queue, 2 head or classifier, 120 key encoder, 120 image encoder"
    return net, {"state_dict": state, "meta": {}}, "taken: encoder_q.0.* of state_dict", ignored


def densecl_wrapped():
    net, key = network(), network(seed=1)
    state = named(net, "module.encoder_q.") | named(key, "module.encoder_k.")
    return net, {"state_dict": state}, "taken: encoder_q.*", "120 key encoder"


def densecl_extracted():
    net = network()
    return net, {"state_dict": named(net), "author": "DenseCL"}, "taken: names without prefix", "assumed"


def dino():
    net = network(50)
    return net, named(net), "taken: names without prefix", "assumed"


def dino_full():
    net, student = network(), network(seed=1)
    teacher = named(net, "backbone.") | head("head.mlp.0.weight")
    content = {"student": named(student, "module.backbone."), "teacher": teacher}
    content |= {"args": argparse.Namespace(arch="resnet18"), "epoch": 9}
    return net, content, "taken: backbone.* of the teacher; its student is left", "1 head or classifier"


def dino_full_distributed():
    net, student = network(), network(seed=1)
    content = {"student": named(student, "module.backbone."), "teacher": named(net, "module.backbone.")}
    return net, content, "of the teacher", "assumed"


def compiled():
    net = network()
    return net, {"model": named(net, "_orig_mod.backbone.")}, "taken: backbone.* of model", "assumed"


FOREIGN = (torchvision, timm, moco_v1, moco_v2, densecl, densecl_wrapped, densecl_extracted)
FOREIGN += (dino, dino_full, dino_full_distributed, compiled)


@pytest.mark.parametrize("make", FOREIGN, ids=lambda f: f.__name__)
def test_foreign_checkpoints_compute_what_they_did(make, tmp_path):
    net, content, *said = make()
    encoder, summary = load(content, tmp_path / "it.pth", 50 if make is dino else 18)
    assert_same_function(encoder, net, 1e-6)
    assert "(100% of the parameters), 0 missing" in summary and "pixels: RGB, mean and deviation (assumed" in summary
    assert all(words in summary for words in said), summary


def release(depth=50, **convention):
    """As the release's Inter_Intro_moco_better with all its options saves itself. -> its image encoder, point encoder
    with biases, file.
    """
    convention = convention or {"channels": "BGR", "undivided": True}
    net, points = network(depth, eps=1e-3, **convention), PointsWithBiases()
    state = named(net, "img_backbone.") | points.named("pts_backbone.")
    state |= points.named("pts_backbone_k.", 1.0) | named(network(18, 1), "img_backbone_k.")
    heads = "mlp_cross_points mlp_cross_img mlp_intro_points mlp_intro_img mlp_cross_img_pred mlp_cross_pts_pred"
    for name in heads.split():
        state |= head(f"{name}.layer1.0.weight", f"{name}.layer1.0.bias", f"{name}.layer1.1.running_var")
    state |= head("img_conv1x1_1.weight", "img_conv1x1_2.bias", "queue", "queue_ptr", "img_queue", "img_queue_ptr")
    return net, points, {"state_dict": state, "meta": {"epoch": 50, "iter": 5800, "CLASSES": None}, "optimizer": {}}


def test_the_release(tmp_path):
    net, points, content = release()
    encoder, summary = load(content, tmp_path / "SimIPU_kitti_50e.pth", 50)
    assert_same_function(encoder, net, channels="BGR", undivided=True)
    assert "318 tensors loaded (100% of the parameters), 0 missing" in summary and "taken: img_backbone.*" in summary
    ignored = ("4 queue", f"{210 + 120} key encoder", "6 predictor", "210 point encoder", "12 head", "2 other")
    for words in (*ignored, "BGR, 0..255 less the mean", "converted"):
        assert words in summary, (words, summary)
    content["meta"]["config"] = CONFIG.format("103.53, 116.28, 123.675", "1.0, 1.0, 1.0", False)
    encoder, summary = load(content, tmp_path / "SimIPU_kitti_50e.pth", 50)
    assert_same_function(encoder, net, channels="BGR", undivided=True)
    assert "the config in the file says" in summary and "running variances" in summary
    loaded = encoders.PointEncoder(16)
    summary = weights.load_point_encoder(loaded, tmp_path / "SimIPU_kitti_50e.pth")
    assert "180 tensors loaded (100% of the parameters), 0 missing" in summary
    assert "30 biases" in summary and "318 image encoder" in summary
    points.assert_same_function(loaded)


def test_the_releases_names_around_other_pixels_are_refused(tmp_path):
    _, _, content = release(18, channels="RGB")
    with pytest.raises(BadInput, match="divided by their deviation.*--init-pixels rgb or bgr"):
        load(content, tmp_path / "it.pth")


@pytest.mark.parametrize("flag", ["bgr", "rgb_mean", "bgr_mean"])
def test_pixels_by_flag(flag, tmp_path):
    convention = {"channels": flag[:3].upper(), "undivided": flag.endswith("mean")}
    net = network(**convention)
    encoder, summary = load(named(net), tmp_path / "it.pth", pixels=flag)
    assert_same_function(encoder, net, **convention)
    assert "as --init-pixels says" in summary and "conv1.weight converted" in summary and "WARNING" not in summary
    for wrong in {"rgb", "bgr_mean"} - {flag}:  # the flag decides something
        encoder, summary = load(named(net), tmp_path / "it.pth", pixels=wrong)
        with pytest.raises(AssertionError):
            assert_same_function(encoder, net, **convention)
        assert ("WARNING" in summary) == (wrong.endswith("mean") != flag.endswith("mean"))


def test_undivided_pixels_are_not_taken_for_divided_ones(tmp_path):
    words = r"it\.pth: its first layer has seen pixels in 0\.\.255.*--init-pixels bgr_mean or rgb_mean"
    with pytest.raises(BadInput, match=words) as e:
        load(named(network(undivided=True)), tmp_path / "it.pth")
    assert "\n" not in str(e.value)
    fresh = encoders.ResNet(18).eval()  # its variances say nothing
    encoder, summary = load(named(fresh), tmp_path / "it.pth")
    assert weights.pixel_scale(fresh.state_dict()) is None
    assert "assumed" in summary and encoder.conv1.weight.equal(fresh.conv1.weight)


def test_pixels_by_the_config_in_the_file(tmp_path):
    def with_config(net, *said):
        return {"state_dict": named(net, "backbone."), "meta": {"config": CONFIG.format(*said)}}

    net = network(channels="BGR", undivided=True)
    encoder, summary = load(with_config(net, "103.53, 116.28, 123.675", "1.0, 1.0, 1.0", False), tmp_path / "it.pth")
    assert_same_function(encoder, net, channels="BGR", undivided=True)
    assert "the config in the file says" in summary
    divided = with_config(network(), "123.675, 116.28, 103.53", "58.395, 57.12, 57.375", True)
    for flag in ("auto", "rgb"):
        assert "converted" not in load(divided, tmp_path / "it.pth", pixels=flag)[1]
    with pytest.raises(BadInput, match="--init-pixels bgr_mean: .*itself says RGB"):
        load(divided, tmp_path / "it.pth", pixels="bgr_mean")
    with pytest.raises(BadInput, match="not ImageNet's mean"):
        load(with_config(net, "102.98, 115.95, 122.77", "1.0, 1.0, 1.0", False), tmp_path / "it.pth")
    caffe = with_config(network(50), "103.53, 116.28, 123.675", "1.0, 1.0, 1.0", False)
    caffe["meta"]["config"] += "\nbackbone = dict(style='caffe')"
    with pytest.raises(BadInput, match="Caffe"):
        load(caffe, tmp_path / "it.pth", 50)
    undivided = network(50, channels="BGR", undivided=True)
    assert "WARNING: a Caffe-style" in load(named(undivided), tmp_path / "it.pth", 50, "bgr_mean")[1]


def test_pixels_by_this_repos_own_words(tmp_path):
    net = network()
    own = {"state_dict": named(net), "arch": "resnet18", "mean": MEAN, "std": STD, "channels": "RGB", "step": 2}
    encoder, summary = load(own, tmp_path / "backbone.pt")
    assert_same_function(encoder, net, 1e-6)
    assert "assumed" not in summary and "converted" not in summary
    # a last.pt's model, saved again by someone: not the release's
    heads = head("mlp_cross_img.layer1.0.weight", "mlp_cross_points.layer1.0.weight")
    encoder, summary = load(named(net, "img_backbone.") | heads, tmp_path / "it.pth")
    assert_same_function(encoder, net, 1e-6)
    net = network(channels="BGR")
    meta = {"mean": MEAN[::-1], "std": STD[::-1], "channels": "BGR"}
    encoder, summary = load({"state_dict": named(net), "meta": meta}, tmp_path / "it.pth")
    assert_same_function(encoder, net, channels="BGR")
    for broken in ({"mean": (0.5,)}, {"std": "none"}, {"channels": "HSV"}):
        with pytest.raises(BadInput, match="not understood"):
            load({**own, **broken}, tmp_path / "it.pth")


def test_what_is_no_such_image_encoder(tmp_path):
    net = network()
    few = {k: v for k, v in named(net).items() if not k.startswith("layer4.1")}
    other_shape = {**named(net), "conv1.weight": torch.zeros(64, 3, 3, 3)}
    refused = {
        "0% of the parameters": {"state_dict": named(net, "module.encoder_k.")},
        "58% of the parameters": few,
        r"conv1.weight is \(64, 3, 3, 3\), not \(64, 3, 7, 7\)": other_shape,
        "layer1.2.conv1.weight has no place": named(network(34)),
        "holds conv1.weight twice": named(net) | {"module.conv1.weight": torch.zeros(1)},
        "holds a list": [1, 2],
    }
    for words, content in refused.items():
        with pytest.raises(BadInput, match=words) as e:
            load(content, tmp_path / "it.pth")
        assert str(tmp_path / "it.pth") in str(e.value) and "\n" not in str(e.value)
    before = encoders.ResNet(18)
    torch.save(few, tmp_path / "it.pth")
    state = named(before)
    with pytest.raises(BadInput):
        weights.load_image_encoder(before, tmp_path / "it.pth")
    assert all(v.equal(before.state_dict()[k]) for k, v in state.items())


# -----------------------------------------------------------------------------
# the point encoder


class PointsWithBiases:
    """The point encoder with the release's biases, computed as there: convolution with bias, batch norm, ReLU."""

    def __init__(self):
        torch.manual_seed(3)
        self.encoder, self.biases = encoders.PointEncoder(16), {}
        for name, layer in self.encoder.named_modules():
            if isinstance(layer, encoders.PointLayer):
                bias = self.biases[f"{name}.conv.bias"] = torch.randn(layer.conv.out_channels)
                torch.nn.init.uniform_(layer.bn.weight, 0.5, 1.5)
                layer.bn.running_mean.normal_(0, 0.3).add_(bias)
                layer.bn.running_var.uniform_(0.5, 1.5)
                layer.forward = lambda x, count=None, layer=layer, bias=bias: self.layer(x, layer, bias)

    def layer(self, x, layer, bias):
        kernel = layer.conv.weight.flatten(2)  # (out, in, 1), of a convolution over one dimension or two
        y = F.conv1d(x.reshape(1, -1, x.shape[-1]).mT, kernel, bias)
        bn = layer.bn
        y = F.relu(F.batch_norm(y, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))
        return y[0].mT.reshape(*x.shape[:-1], -1)

    def named(self, prefix, offset=0.0):
        tensors = self.encoder.state_dict() | self.biases
        return {prefix + k: v + offset if v.is_floating_point() else v.clone() for k, v in tensors.items()}

    def assert_same_function(self, loaded):
        cloud = torch.rand(1, 128, 4, generator=torch.Generator().manual_seed(4)) * torch.tensor([3, 3, 1, 1])
        with torch.no_grad():
            (places, features), (own_places, own) = self.encoder.eval()(cloud), loaded.eval()(cloud)
        assert features.std() > 0.05
        tolerance = 1e-4 * features.abs().max().item()
        torch.testing.assert_close((own_places, own), (places, features), rtol=0, atol=tolerance)


def test_points_refuse_what_does_not_fit(tmp_path):
    torch.save({"state_dict": named(encoders.PointEncoder(16, use_xyz=True), "pts_backbone.")}, tmp_path / "xyz.pth")
    words = r"xyz.pth: .* is \(32, 4, 1, 1\), not \(32, 1, 1, 1\).*--use-xyz"
    with pytest.raises(BadInput, match=words):  # though 90 % of the parameters fit
        weights.load_point_encoder(encoders.PointEncoder(16), tmp_path / "xyz.pth")
    with pytest.raises(BadInput, match="--point-features"):  # where another 0.3 z is wanted
        wanted = encoders.PointEncoder(16, point_features=("reflectance", "height"))
        torch.save({"state_dict": named(encoders.PointEncoder(16), "pts_backbone.")}, tmp_path / "release.pth")
        weights.load_point_encoder(wanted, tmp_path / "release.pth")
    torch.save(named(network()), tmp_path / "image.pth")
    with pytest.raises(BadInput, match="0% of the parameters"):
        weights.load_point_encoder(encoders.PointEncoder(16), tmp_path / "image.pth")


# -----------------------------------------------------------------------------
# export

BN = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def resnet_names(depth):
    names = {"conv1.weight", *(f"bn1.{p}" for p in BN)}
    for stage, blocks in enumerate({18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}[depth], start=1):
        for b in range(blocks):
            for i in (1, 2, 3) if depth == 50 else (1, 2):
                names |= {f"layer{stage}.{b}.conv{i}.weight", *(f"layer{stage}.{b}.bn{i}.{p}" for p in BN)}
        if depth == 50 or stage > 1:
            names |= {f"layer{stage}.0.downsample.0.weight", *(f"layer{stage}.0.downsample.1.{p}" for p in BN)}
    assert len(names) == {18: 120, 50: 318}[depth]
    return names


def release_point_shapes():
    """From the release's config: sa_channels, aggregation_channels, in_channels 4, ConvModules of name conv and bn, all
    with bias=True.
    """
    sa_channels = [[[32, 32, 64], [32, 32, 64], [64, 64, 128]], [[64, 64, 128], [64, 64, 128], [128, 128, 256]]]
    sa_channels += [[[128, 128, 256], [128, 128, 256], [256, 256, 512]]]
    shapes, cin = {}, 1

    def conv_module(name, a, b, ones):
        shapes.update({f"{name}.conv.weight": (b, a, *ones), f"{name}.conv.bias": (b,)})
        shapes.update({f"{name}.bn.num_batches_tracked": ()})
        shapes.update({f"{name}.bn.{p}": (b,) for p in BN[:4]})

    for s, (mlps, aggregation) in enumerate(zip(sa_channels, (128, 256, 1024))):
        for m, widths in enumerate(mlps):
            for i, (a, b) in enumerate(zip([cin, *widths], widths)):
                conv_module(f"pts_backbone.SA_modules.{s}.mlps.{m}.layer{i}", a, b, (1, 1))
        conv_module(f"pts_backbone.aggregation_mlps.{s}", sum(widths[-1] for widths in mlps), aggregation, (1,))
        cin = aggregation
    assert len(shapes) == 210
    return shapes


@pytest.fixture
def finished(tmp_path):
    """last.pt and backbone.pt as a run leaves them -> a function (changes of the config) -> folder, model."""

    def make(**changes):
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        c = simipu.Config(**{"places": 16, "point_hidden": 8, "image_hidden": 8, **changes})
        model = simipu.SimIPU(c).eval()
        if c.inter_weight:
            model.img_backbone.load_state_dict(network(50 if c.image_encoder == "resnet50" else 18).state_dict())
        for layer in model.pts_backbone.modules():
            if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm):
                layer.running_mean.normal_()
        last = {"model": model.state_dict(), "config": runtime.as_json(c), "optimizers": []}
        torch.save(last | {"identity": {}, "step": 7, "git": "abc"}, folder / "last.pt")
        if c.inter_weight:
            about = {"arch": c.image_encoder, "mean": MEAN, "std": STD, "channels": "RGB", "step": 7, "git": "abc"}
            torch.save({"state_dict": model.img_backbone.state_dict(), **about}, folder / "backbone.pt")
        return folder, model

    return make


EXPORTED = [(18, "last.pt", f) for f in ("torchvision", "timm", "mmdet", "mmdet3d", "points")]
EXPORTED += [(18, "backbone.pt", f) for f in ("mmdet", "mmdet3d")] + [(50, "last.pt", "mmdet3d")]


@pytest.mark.parametrize("depth", [18, 50])
def test_export(finished, tmp_path, depth):
    folder, model = finished(image_encoder=f"resnet{depth}")
    for _, source, format in [entry for entry in EXPORTED if entry[0] == depth]:
        out = tmp_path / source / f"{format}.pth"
        weights.export(folder / source, format=format, out=out)
        assert sorted(p.name for p in out.parent.glob(f"{format}.*")) == [f"{format}.json", f"{format}.pth"]
        saved = torch.load(out, weights_only=True)
        assert saved.keys() == {"state_dict", "meta"}
        assert saved["meta"] == json.loads(out.with_suffix(".json").read_text())
        check_exported(saved, format, depth, with_points=source == "last.pt")
        if format != "points":
            encoder = encoders.ResNet(depth)
            summary = weights.load_image_encoder(encoder, out)
            assert f"{len(resnet_names(depth))} tensors loaded (100% of the parameters), 0 missing" in summary
            assert "the file says" in summary and "converted" not in summary
            assert_same_function(encoder, model.img_backbone, 1e-7)
        if source == "last.pt" and format in ("mmdet3d", "points"):
            points = encoders.PointEncoder(16)
            summary = weights.load_point_encoder(points, out)
            assert "180 tensors loaded (100% of the parameters), 0 missing" in summary
            assert_same_weights(points, model.pts_backbone)
    # last.pt itself
    encoder, points = encoders.ResNet(depth), encoders.PointEncoder(16)
    assert "0 missing" in weights.load_image_encoder(encoder, folder / "last.pt")
    assert "0 missing" in weights.load_point_encoder(points, folder / "last.pt")
    assert_same_weights(encoder, model.img_backbone)
    assert_same_weights(points, model.pts_backbone)


def test_exported_points_say_what_they_see(finished, tmp_path):
    folder, model = finished(point_features=("height", "shape"))
    saved = torch.load(folder / "last.pt", weights_only=True)
    c = runtime.config_of(saved, simipu.Config, "last.pt", "simipu.py")
    assert c.point_features == ("height", "shape")
    runtime.load_exactly(simipu.SimIPU(c), saved["model"], "last.pt")
    weights.export(folder / "last.pt", format="points", out=tmp_path / "points.pth")
    meta = json.loads((tmp_path / "points.json").read_text())
    shape = ["linearity", "planarity", "scattering", "|normal z|"]
    assert meta["points"]["input"] == ["x", "y", "z", "0.3 z", *shape]
    points = encoders.PointEncoder(16, point_features=("height", "shape"))
    assert "100% of the parameters" in weights.load_point_encoder(points, tmp_path / "points.pth")
    assert_same_weights(points, model.pts_backbone)


def test_exported_as_safetensors(finished, tmp_path):
    """By the name of the file: the same tensors, and pixels as the format's own metadata says them."""
    folder, model = finished(image_encoder="resnet18")
    weights.export(folder / "last.pt", format="timm", out=tmp_path / "w.safetensors")
    with safetensors.safe_open(tmp_path / "w.safetensors", "pt") as f:
        said, names = f.metadata(), f.keys()
    assert set(names) == resnet_names(18) and (said["format"], said["step"], said["channels"]) == ("pt", "7", "RGB")
    encoder = encoders.ResNet(18)
    summary = weights.load_image_encoder(encoder, tmp_path / "w.safetensors")
    assert "pixels: RGB, mean and deviation (the file says)" in summary and "0 missing" in summary
    assert_same_weights(encoder, model.img_backbone)
    assert sorted(path.name for path in tmp_path.glob("w*")) == ["w.json", "w.safetensors"]


def assert_same_weights(loaded, trained):
    assert all(value.equal(loaded.state_dict()[name]) for name, value in trained.state_dict().items())


def check_exported(saved, format, depth, with_points):
    """Names, shapes and meta of an exported file."""
    image, points, state, meta = resnet_names(depth), release_point_shapes(), saved["state_dict"], saved["meta"]
    expected = {"torchvision": image, "timm": image, "mmdet": {"backbone." + k for k in image}}
    expected["mmdet3d"] = {"img_backbone." + k for k in image}
    expected["mmdet3d"] |= points.keys() if with_points else set()
    expected["points"] = points.keys()
    assert state.keys() == expected[format]
    assert (meta["step"], meta["git"], meta["format"]) == (7, "abc", format)
    if format != "points":
        assert (meta["arch"], meta["channels"]) == (f"resnet{depth}", "RGB")
        assert (meta["mean"], meta["std"]) == (list(MEAN), list(STD))
    norm = {"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375], "to_rgb": True}
    assert meta.get("img_norm_cfg") == (norm if format.startswith("mm") else None)
    exported = {name: value for name, value in state.items() if name.startswith("pts_")}
    if exported:
        assert {name: tuple(value.shape) for name, value in exported.items()} == points
        assert not any(value.any() for name, value in exported.items() if name.endswith("conv.bias"))


def test_export_refuses(finished, tmp_path, monkeypatch):
    folder, _ = finished(image_encoder="resnet18", use_xyz=True)
    no_image, _ = finished(inter_weight=0.0)
    no_points, _ = finished(image_encoder="resnet18", intra_weight=0.0)
    other = torch.load(folder / "backbone.pt", weights_only=True)
    torch.save({**other, "arch": "timm:regnety_032"}, tmp_path / "timm.pt")
    torch.save(other["state_dict"], tmp_path / "plain.pth")
    out = tmp_path / "new" / "it.pth"
    last, backbone, of_timm = folder / "last.pt", folder / "backbone.pt", tmp_path / "timm.pt"
    refused = [
        (tmp_path / "nowhere.pt", "mmdet", out, "nowhere.pt: no such file"),
        (tmp_path / "plain.pth", "mmdet", out, "plain.pth: not a last.pt of simipu.py, nor a backbone.pt"),
        (backbone, "points", out, "backbone.pt: holds no trained point encoder; export last.pt"),
        (last, "points", out, "--use-xyz"),
        (last, "mmdet3d", out, "--use-xyz.*backbone.pt"),
        (no_image / "last.pt", "mmdet", out, "--inter-weight 0"),
        (no_points / "last.pt", "points", out, "--intra-weight 0"),
        (of_timm, "torchvision", out, "--format torchvision: .*timm:regnety_032"),
        (of_timm, "mmdet", out, "--format mmdet: .*timm:regnety_032"),
        (of_timm, "mmdet3d", out, "--format mmdet3d: .*timm:regnety_032"),
        (of_timm, "timm", out, "--format timm: .*, which knows the names of timm:regnety_032"),
        (backbone, "timm", backbone, "is the checkpoint itself"),
        (backbone, "timm", folder, "is a folder"),
        (backbone, "timm", tmp_path / "it.json", "the JSON goes there"),
        (backbone, "timm", tmp_path / "plain.pth" / "it.pth", "--out .*plain.pth"),
    ]
    monkeypatch.setitem(sys.modules, "timm", None)  # not installed
    for checkpoint, format, to, words in refused:
        with pytest.raises(BadInput, match=words) as e:
            weights.export(checkpoint, format=format, out=to)
        assert "\n" not in str(e.value)
    assert not out.parent.exists()
    network = SimpleNamespace(
        state_dict=lambda: {name.replace("layer1.", "layer1_"): 0 for name in other["state_dict"]}
    )
    monkeypatch.setitem(sys.modules, "timm", SimpleNamespace(create_model=lambda name: {"regnety_032": network}[name]))
    weights.export(of_timm, format="timm", out=out)
    named = torch.load(out, weights_only=True)["state_dict"]
    assert named.keys() == network.state_dict().keys() != other["state_dict"].keys()
    weights.export(no_points / "last.pt", format="mmdet3d", out=out)  # an untrained point encoder stays out
    assert all(k.startswith("img_backbone.") for k in torch.load(out, weights_only=True)["state_dict"])


def test_the_commands(run_here, scenes, tmp_path):
    """A run's backbone.pt says what it is; the run is exported, and starts another run, whose first step is that of its
    weights.
    """
    start = ["demo", "--data-root", scenes, *MINI]
    assert run_here(simipu, *start, "--max-steps", 2)[0] == 0
    saved = torch.load(tmp_path / "out" / "demo" / "backbone.pt", weights_only=True)
    assert (saved["channels"], saved["arch"], saved["step"]) == ("RGB", "resnet18", 2)
    assert (tuple(saved["mean"]), tuple(saved["std"])) == (MEAN, STD)
    assert len(saved["state_dict"]) == 122 - 2  # torchvision's resnet18 has two more, of its classifier
    status, out, err = run_here(evaluate, "export", "out/demo/last.pt", "--format", "mmdet3d", "--out", "it.pth")
    assert status == 0, err
    assert out.startswith("it.pth: 330 tensors")
    assert json.loads((tmp_path / "it.json").read_text())["arch"] == "resnet18"
    refused = run_here(evaluate, "export", "out/demo/backbone.pt", "--format", "points", "--out", "points.pth")
    assert refused == (1, "", "error: out/demo/backbone.pt: holds no trained point encoder; export last.pt\n")
    assert not list(tmp_path.glob("points.*"))

    slow = ["--max-steps", 1, "--image-lr", 1e-12, "--point-lr", 1e-12]
    status, out, err = run_here(simipu, *start, *slow, "--name", "again", "--init", "it.pth", "--init-points", "it.pth")
    assert status == 0, err
    for tensors in (120, 180):
        assert f"it.pth: {tensors} tensors loaded (100% of the parameters)" in out
    before, after = (
        torch.load(tmp_path / "out" / name / "last.pt", weights_only=True)["model"] for name in ("demo", "again")
    )
    for name, value in before.items():
        if name.startswith(("img_backbone.", "pts_backbone.")) and name.endswith(("weight", "bias")):
            np.testing.assert_allclose(after[name], value, atol=1e-6)

    refused = run_here(simipu, *start, "--name", "new", "--init", "it.pth", "--init-pixels", "bgr_mean")
    assert refused == (1, "", "error: --init-pixels bgr_mean: it.pth itself says RGB, std 0.229, 0.224, 0.225\n")
    assert not Path(tmp_path / "out" / "new").exists()
