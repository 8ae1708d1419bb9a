"""MVX-Net: what it is given, names of mmdetection3d, two frames learned by heart, and what must not matter."""

import dataclasses
import json

import numpy as np
import pytest
import torch

import data
import data_det3d
import data_kitti
import eval_boxes
import finetune_det3d
import ops_boxes
import runtime
from data_det3d import CLASSES
from files import BadInput
from finetune_det3d import Config, Detector

CPU = torch.device("cpu")
SHAPE = {
    "point_range": (0.0, -9.6, -3.0, 19.2, 9.6, 1.0), "image_scale": (160, 64), "max_points": 4096,
    "fpn": 16, "fusion": 16, "vfe": 16, "sparse": (8, 8, 16, 16, 32), "second": (32, 64), "second_layers": 1,
    "neck": 32, "batch_size": 2, "workers": 0, "log_every": 1,
}  # fmt: skip
C = dataclasses.replace(finetune_det3d.PRESETS["demo"][1], **SHAPE)
SMALL = []  # the same as flags
for field, value in SHAPE.items():
    SMALL += ["--" + field.replace("_", "-"), *(value if isinstance(value, tuple) else (value,))]


def samples_of(scenes, c, split="val"):
    """Its frames as they are: nothing pasted, moved or mirrored."""
    frames = data_det3d.find_frames([scenes], [split])
    dataset = data_det3d.DetectionFrames(frames, c, data_det3d.Layout(c), training=False)
    return [dataset[(0, i)] for i in range(len(frames))]


def batch_of(samples, c):
    layout = data_det3d.Layout(c)
    batch = data_det3d.collate(layout, samples)
    return data_det3d.augment(batch, eval_boxes.judging_box(c), layout, CPU)


def build(c, seed=0):
    torch.manual_seed(seed)
    return Detector(c)


# -----------------------------------------------------------------------------
# points and pixels


def shortened(sample, layout, count=1000):
    points = sample["points"][:count]
    return sample | {"points": points} | data_det3d.voxels(points, layout)


def test_pixels_of_ragged_points(scenes):
    """Each frame's points in a row of its own, where the frame's own matrix puts them; nothing where there are none."""
    model, samples = build(C), samples_of(scenes, C)
    batch = batch_of([samples[1], shortened(samples[0], model.layout)], C)
    uv = model.pixels(batch)
    assert uv.shape == (2, 4096, 2) and (uv[1, 1000:] < -1000).all()
    for b, n in ((0, 4096), (1, 1000)):
        expected, _ = data.project(batch["points"][batch["frame"] == b], batch["lidar2img"][b])
        torch.testing.assert_close(uv[b, :n], expected, rtol=1e-4, atol=1e-2)


def test_voxels_see_their_points_and_their_points_pixels(scenes):
    """The VFE's ten numbers of a point by hand; a voxel is the maximum of its points; a brighter image is another
    answer, a point's own pixels alone.
    """
    model, samples = build(C), samples_of(scenes, C)
    batch = batch_of([shortened(samples[0], model.layout), samples[1]], C)
    points, rows, level = batch["points"], batch["rows"], batch["levels"][0]
    decorated = model.pts_voxel_encoder.decorated(points, rows, level)
    size, start = torch.tensor(C.voxel).double(), torch.tensor(C.point_range[:3]).double()
    for i in range(0, len(points), 997):
        xyz, told = points[i, :3].double(), decorated[i].double()
        torch.testing.assert_close(told[:4], points[i].double())
        torch.testing.assert_close(told[4:7], xyz - points[rows == rows[i], :3].double().mean(0), rtol=0, atol=1e-5)
        cell = (xyz - told[7:] - start) / size - 0.5
        assert (cell - cell.round()).abs().max() < 1e-3 and told[7:].abs().max() < 0.0501
    x = torch.randn(len(points), 5)
    top = finetune_det3d.voxel_max(x, rows, len(level.keys))
    for row in (0, 100, len(level.keys) - 1):
        assert torch.equal(top[row], x[rows == row].amax(0))

    fusion = model.pts_voxel_encoder.fusion_layer.eval()
    maps = [torch.zeros(2, C.fpn, 8, 8) for _ in range(5)]
    cells = [torch.full((2, batch["longest"], 2), 3.0) for _ in range(5)]
    features = torch.randn(len(points), C.vfe)
    dark = fusion(features, maps, batch, cells)
    maps[4][1] = 1.0  # the second frame's last map
    changed = (fusion(features, maps, batch, cells) != dark).any(1)
    assert not changed[batch["frame"] == 0].any() and changed[batch["frame"] == 1].float().mean() > 0.9


def test_bfloat16_keeps_places_and_losses_in_float32(scenes):
    model, batch = build(C), batch_of(samples_of(scenes, C), C)
    seen = []
    model.pts_voxel_encoder.vfe_layers[0].register_forward_hook(lambda _, inputs, out: seen.append((*inputs, out)))
    loss, _ = model(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half, stats = model(batch)
        raw = model.answers(batch)
    assert all(x.dtype == torch.float32 for x in (*raw, half, stats["boxes"], *seen[1])) and len(seen) == 3
    assert torch.equal(seen[0][1], seen[1][1]) and half.item() == pytest.approx(loss.item(), rel=0.1)
    half.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


# -----------------------------------------------------------------------------
# what learns


FROZEN = {"first": ("img_backbone.conv1.", "img_backbone.bn1.", "img_backbone.layer1."), "all": ("img_backbone.",)}


@pytest.mark.parametrize("freeze", FROZEN)
def test_what_is_frozen_stays_and_all_else_learns(scenes, freeze):
    """Weights and running figures, through two steps of training; every parameter that learns has a gradient; which
    optimiser has which, by name, and with what.
    """
    c = dataclasses.replace(C, freeze=freeze, image_optimizer="sgd", image_lr=5e-3, lr=3e-3)
    model, batch = build(c), batch_of(samples_of(scenes, c), c)
    adamw, sgd = finetune_det3d.build_optimizers(model, c)
    names = {id(p): name for name, p in model.named_parameters()}
    points, image = ([names[id(p)] for group in o.param_groups for p in group["params"]] for o in (adamw, sgd))
    assert all(name.startswith("pts_") for name in points)
    assert all(name.startswith(("img_backbone.", "img_neck.")) for name in image)
    assert "pts_voxel_encoder.fusion_layer.img_transform.0.weight" in points
    frozen = FROZEN[freeze]
    assert sorted(points + image) == sorted(name for name in names.values() if not name.startswith(frozen))
    assert [type(o).__name__ for o in (adamw, sgd)] == ["AdamW", "SGD"]
    of_adamw, of_sgd = (o.param_groups[0] for o in (adamw, sgd))
    assert {"lr": 3e-3, "betas": (0.95, 0.99), "weight_decay": 0.01}.items() <= of_adamw.items()
    assert {"lr": 5e-3, "momentum": 0.9, "weight_decay": 1e-4}.items() <= of_sgd.items()

    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        model.train()
        loss, _ = model(batch)
        loss.backward()
        learning = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
        missing = [name for name, grad in learning if grad is None or not grad.any()]
        assert not missing
        for optimizer in (adamw, sgd):
            optimizer.step()
            optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if not name.startswith(frozen)}
    if freeze == "first":
        assert len(before) - len(changed) == 6 + 2 * 2 * 6  # conv1, bn1 and two blocks of two convolutions and norms


def test_without_an_image_and_without_boxes(scenes):
    """--no-image: no image branch, all gradients. No object in any frame: the loss is finite and has all gradients."""
    for c in (dataclasses.replace(C, image=False), C):
        model, samples = build(c), samples_of(scenes, c)
        assert any(name.startswith("img_") for name, _ in model.named_parameters()) == c.image
        nothing = [s | {"boxes": s["boxes"][:0], "classes": s["classes"][:0]} for s in samples]
        for some in (samples, nothing):
            model.zero_grad()
            loss, stats = model(batch_of(some, c))
            loss.backward()
            grads = [p.grad for p in model.parameters()]
            assert loss.isfinite() and all(g is not None and g.isfinite().all() for g in grads)
            assert (stats["boxes"] > 0) == (stats["positives"] > 0) == (some is samples)
        optimizers = finetune_det3d.build_optimizers(model, c)
        assert len(optimizers) == 1 + c.image


def test_the_rate_rises_and_falls():
    """A straight line from a tenth, then a cosine to 1e-5; a run that is shorter than the rise, and one without it."""
    rates = [finetune_det3d.rate(step, 9280, 1000) for step in range(9280)]
    np.testing.assert_allclose(np.diff(rates[:1001]), 0.9 / 1000, rtol=1e-9)
    assert rates[0] == 0.1 and rates[1000] == 1 and rates[5140] == pytest.approx(0.5, abs=1e-5)
    assert (np.diff(rates[1000:]) < 0).all() and 1e-5 < rates[-1] < 1.01e-5
    assert finetune_det3d.rate(0, 10, 0) == 1 and finetune_det3d.rate(0, 1, 1000) == 1
    assert [finetune_det3d.rate(step, 3, 1000) for step in range(3)] == pytest.approx([0.1, 0.55, 1])


# -----------------------------------------------------------------------------
# weights of others


def norm_of(name, width):
    sizes = {"weight": width, "bias": width, "running_mean": width, "running_var": width}
    return {f"{name}.{k}": (n,) for k, n in sizes.items()} | {f"{name}.num_batches_tracked": ()}


def mmdetection3ds_names():
    """Name and shape of all tensors of the release's moca_r50_kitti.py: mmdetection3d 0.13's DynamicMVXFasterRCNN
    with mmdet's ResNet-50 and FPN, mmcv's ConvModule, spconv 1.x's weights (kernel z, y, x, in, out).
    """
    shapes = {"img_backbone.conv1.weight": (64, 3, 7, 7)} | norm_of("img_backbone.bn1", 64)
    cin = 64
    for stage, (blocks, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512)), 1):
        for i in range(blocks):
            name = f"img_backbone.layer{stage}.{i}"
            convs = ((cin, width, 1), (width, width, 3), (width, 4 * width, 1))
            for j, (a, b, size) in enumerate(convs, 1):
                shapes |= {f"{name}.conv{j}.weight": (b, a, size, size)} | norm_of(f"{name}.bn{j}", b)
            if i == 0:
                shapes |= {f"{name}.downsample.0.weight": (4 * width, cin, 1, 1)}
                shapes |= norm_of(f"{name}.downsample.1", 4 * width)
            cin = 4 * width
    for i, width in enumerate((256, 512, 1024, 2048)):
        for part, a, size in (("lateral_convs", width, 1), ("fpn_convs", 256, 3)):
            name = f"img_neck.{part}.{i}.conv"
            shapes |= {f"{name}.weight": (256, a, size, size), f"{name}.bias": (256,)}
    for i, (a, b) in enumerate(((10, 64), (128, 64))):
        name = f"pts_voxel_encoder.vfe_layers.{i}"
        shapes |= {f"{name}.0.weight": (b, a)} | norm_of(f"{name}.1", b)
    fusion = "pts_voxel_encoder.fusion_layer"
    for i in range(5):
        name = f"{fusion}.lateral_convs.{i}.conv"
        shapes |= {f"{name}.weight": (128, 256, 3, 3), f"{name}.bias": (128,)}
    for part, a in (("img_transform", 5 * 128), ("pts_transform", 64)):
        shapes |= {f"{fusion}.{part}.0.weight": (128, a), f"{fusion}.{part}.0.bias": (128,)}
        shapes |= norm_of(f"{fusion}.{part}.1", 128)
    sparse = [("conv_input", 3, 3, 128, 16), ("encoder_layers.encoder_layer1.0", 3, 3, 16, 16)]
    for stage, (a, b) in enumerate(((16, 32), (32, 64), (64, 64)), 2):
        for j in range(3):
            sparse.append((f"encoder_layers.encoder_layer{stage}.{j}", 3, 3, a if j == 0 else b, b))
    for name, depth, side, a, b in (*sparse, ("conv_out", 3, 1, 64, 128)):
        name = f"pts_middle_encoder.{name}"
        shapes |= {f"{name}.0.weight": (depth, side, side, a, b)} | norm_of(f"{name}.1", b)
    for i, (a, b) in enumerate(((256, 128), (128, 256))):
        for j in range(6):  # each with a norm and a ReLU behind it
            name = f"pts_backbone.blocks.{i}"
            shapes |= {f"{name}.{3 * j}.weight": (b, a if j == 0 else b, 3, 3)} | norm_of(f"{name}.{3 * j + 1}", b)
        size = i + 1
        shapes |= {f"pts_neck.deblocks.{i}.0.weight": (b, 256, size, size)} | norm_of(f"pts_neck.deblocks.{i}.1", 256)
    for name, outputs in (("conv_cls", 18), ("conv_reg", 42), ("conv_dir_cls", 12)):
        shapes |= {f"pts_bbox_head.{name}.weight": (outputs, 512, 1, 1), f"pts_bbox_head.{name}.bias": (outputs,)}
    return shapes


CONFIG_TEXT = """
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
"""


def test_mmdetection3ds_checkpoints_load(tmp_path):
    """A file with the names and shapes of the release's, whose text says BGR less a mean: all of it is taken, as it is
    but for the first convolution, and nothing of ours is left as it was.
    """
    generator = torch.Generator().manual_seed(5)
    shapes = mmdetection3ds_names()
    tensors = {k: torch.rand(s, generator=generator) if s else torch.tensor(7) for k, s in shapes.items()}
    torch.save({"meta": {"epoch": 40, "config": CONFIG_TEXT}, "state_dict": tensors}, tmp_path / "moca.pth")
    model = build(Config())
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    assert len(model.anchors.flatten(0, 3)) == 211_200 and 33.7e6 < sum(p.numel() for p in model.parameters()) < 33.9e6
    said = finetune_det3d.load_detector(model, tmp_path / "moca.pth", "auto")
    assert f"{len(shapes)} tensors of a detector loaded, 0 left" in said and "BGR, 0..255 less the mean" in said
    for name, value in model.state_dict().items():
        expected = tensors[name]
        if name == "img_backbone.conv1.weight":
            expected = expected.flip(1) * 255 * torch.tensor(data.IMAGENET_STD).view(1, 3, 1, 1)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=0)

    for change, words in (
        ({"pts_bbox_head.conv_cls.bias": torch.zeros(6)}, "pts_bbox_head.conv_cls.bias does not"),
        ({"pts_middle_encoder.conv_out.0.weight": None}, "pts_middle_encoder.conv_out.0.weight does not"),
    ):
        torch.save({"state_dict": tensors | change}, tmp_path / "other.pth")
        fit = f"other.pth: {len(shapes) - 1} of {len(shapes)} tensors fit, {words}; is it"
        with pytest.raises(BadInput, match=fit):
            finetune_det3d.load_detector(model, tmp_path / "other.pth", "auto")


# -----------------------------------------------------------------------------
# what it can learn, and what must not matter then


@pytest.fixture(scope="module")
def by_heart(scenes):
    """A small network, taught the two held-out scenes in 110 steps, half a minute -> model, samples, frames."""
    model, samples = build(C), samples_of(scenes, C)
    batch = batch_of(samples, C)
    optimizer = torch.optim.AdamW(model.parameters(), 8e-3, betas=(0.95, 0.99), weight_decay=0.01, fused=True)
    for step in range(110):
        optimizer.param_groups[0]["lr"] = 8e-3 * finetune_det3d.rate(step, 200, 20)
        loss, _ = model(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), samples, data_det3d.find_frames([scenes], ["val"])


@torch.no_grad()
def detected(model, samples):
    """-> of each frame: boxes, scores, classes, best first."""
    found = zip(*model.detect(batch_of(samples, C)))
    return [[x[scores > 0] for x in (boxes, scores, classes)] for boxes, scores, classes in found]


def assert_same_detections(one, other):
    for (boxes, scores, classes), (boxes2, scores2, classes2) in zip(one, other, strict=True):
        assert len(scores) > 3
        torch.testing.assert_close(scores, scores2, rtol=0, atol=1e-3)
        torch.testing.assert_close(boxes, boxes2, rtol=0, atol=1e-3)
        assert torch.equal(classes, classes2)


def test_two_frames_learned_by_heart(by_heart):
    """Every object is found, above .7 of overlap and of score, ahead being ahead; nothing else is above the cut."""
    model, samples, _ = by_heart
    for sample, (boxes, scores, classes) in zip(samples, detected(model, samples)):
        truth = torch.from_numpy(sample["boxes"])
        overlap = ops_boxes.pairwise(ops_boxes.iou_3d, truth, boxes)
        overlap[torch.from_numpy(sample["classes"])[:, None] != classes] = 0
        most, which = overlap.max(1)
        assert len(boxes) == len(truth) == len(set(which.tolist())) > 3 and (most > 0.7).all()
        assert (scores > 0.7).all() and ((boxes[which, 6] - truth[:, 6]).cos() > 0.9).all()


@torch.no_grad()
def test_a_batch_is_its_frames_one_by_one(by_heart):
    model, samples, _ = by_heart
    whole = model.answers(batch_of(samples, C))
    for b, sample in enumerate(samples):
        for raw, single in zip(whole, model.answers(batch_of([sample], C))):
            torch.testing.assert_close(raw[b : b + 1], single, rtol=1e-3, atol=1e-3)
    assert_same_detections(detected(model, samples), [detected(model, [s])[0] for s in samples])


def permuted(sample, rng, layout):
    points = sample["points"][rng.permutation(len(sample["points"]))]
    order = rng.permutation(len(sample["boxes"]))
    boxes, classes = sample["boxes"][order], sample["classes"][order]
    return sample | {"points": points, "boxes": boxes, "classes": classes} | data_det3d.voxels(points, layout)


def test_order_of_points_boxes_and_frames_does_not_matter(by_heart):
    """Neither to detections nor to the loss in training mode and its gradients: batch norm's figures are sums, too."""
    model, samples, _ = by_heart
    rng = np.random.default_rng(4)
    shuffled = [permuted(s, rng, model.layout) for s in samples]
    assert_same_detections(detected(model, samples), detected(model, shuffled))
    assert_same_detections(detected(model, samples), detected(model, samples[::-1])[::-1])
    figures = []
    for some in (samples, shuffled, samples[::-1], shuffled[::-1]):
        model = build(C)
        loss, stats = model(batch_of(some, C))
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        figures.append(torch.stack([stats[name] for name in sorted(stats)] + [norm]).detach())
    for other in figures[1:]:
        torch.testing.assert_close(other, figures[0], rtol=1e-3, atol=1e-5)


def test_judge_says_what_the_boxes_say(by_heart, tmp_path):
    """The figures of cars are those of the labels that lie in the network's range, which it knows."""
    model, _, frames = by_heart
    found = eval_boxes.judge(model, frames, C, runtime.Run(CPU, 0, 1))
    truths, results = [], []
    for frame in frames:
        types, numbers = data_kitti.read_labels(frame.label, dont_care=True)
        boxes = ops_boxes.label_to_box(numbers[:, 7:14], data_kitti.split_projection(frame)[1])
        near = (boxes[:, :2] >= [0, -9.6]).all(1) & (boxes[:, :2] < [19.2, 9.6]).all(1) & np.isin(types, CLASSES)
        truths.append((types, numbers))
        results.append((types[near], np.column_stack([numbers[near], np.linspace(0.9, 0.8, near.sum())])))
    wanted = eval_boxes.evaluate(truths, results)
    assert found["frames"] == 2 and found["Car"]["n"] == wanted["Car"]["n"] and found["Car"]["3d"]["AP40"][2] > 0
    for metric in ("bev", "3d", "bev loose", "3d loose"):
        assert found["Car"][metric] == wanted["Car"][metric]
    lines = eval_boxes.report(found, frames, C)
    assert "2 frames" in lines[0] and any(line.split()[:2] == ["Car", "3D"] for line in lines)
    said = eval_boxes.draw(model, frames, C, CPU, tmp_path / "det3d.png")
    assert "found" in said and (tmp_path / "det3d.png").read_bytes()[:4] == b"\x89PNG"


def gradients(folder):
    """Of a run's first step: AdamW's first moments are a twentieth of them."""
    optimizers = torch.load(folder / "last.pt", weights_only=True)["optimizers"]
    return torch.cat([state["exp_avg"].flatten() / 0.05 for o in optimizers for state in o["state"].values()])


def test_two_processes_make_the_step_of_one_and_judge_its_checkpoint(by_heart, run_script, run_here, scenes, tmp_path):
    """The same groups, so the same gradients but for rounding; and one table, of all frames: what last.pt has alone."""
    torch.save({"model": by_heart[0].state_dict()}, tmp_path / "heart.pt")
    arguments = ["demo", "--data-root", scenes, *SMALL, "--batch-size", 4, "--group", 2, "--max-steps", 1]
    arguments += ["--load", "heart.pt", "--lr", 1e-9, "--image-lr", 1e-9, "--clip", 0]
    done = run_script("finetune_det3d.py", *arguments, "--name", "two", processes=2)
    assert done.returncode == 0, done.stderr
    assert "a step: 4 frames = 2 processes x 1 passes x 2 frames" in done.stdout
    assert "tensors of a detector loaded, 0 left" in done.stdout and done.stdout.count("KITTI object on 2 frames") == 1
    status, _, err = run_here(finetune_det3d, *arguments, "--name", "one", "--eval-splits")
    assert status == 0, err
    one, two = (gradients(tmp_path / "out" / name) for name in ("one", "two"))
    assert one.norm() > 0.1 and (one - two).norm() < 1e-3 * one.norm()

    model = build(C)
    model.load_state_dict(torch.load(tmp_path / "out" / "two" / "last.pt", weights_only=True)["model"])
    logged = json.loads((tmp_path / "out" / "two" / "log.jsonl").read_text().splitlines()[-1])["det3d"]
    assert logged == eval_boxes.judge(model, by_heart[2], C, runtime.Run(CPU, 0, 1))
    assert logged["Car"]["3d loose"]["AP40"][2] > 0
