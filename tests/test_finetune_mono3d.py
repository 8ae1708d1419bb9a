"""FCOS3D: targets and losses against plain loops, decoding as their inverse, what is found when all answers are right,
two images learned by heart, two processes that are one.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_data_nuscenes import made_up  # noqa: F401  a fixture

import data_det3d
import data_mono3d
import data_nuscenes
import eval_mono3d
import finetune_mono3d
import runtime
from data_mono3d import CLASSES
from finetune_mono3d import FCOS3D, Cells, assign, decode, detection_losses, direction_bin, select

CPU = torch.device("cpu")
SHAPE = {"image_scale": (208, 64), "width": 32, "centre_width": 32, "batch_size": 2, "group": 2, "workers": 0}
SHAPE |= {"ranges": (8.0, 16.0, 32.0, 64.0), "log_every": 1}
C = dataclasses.replace(finetune_mono3d.PRESETS["demo"][1], **SHAPE)
SMALL = []  # the same as flags
for field, value in SHAPE.items():
    SMALL += ["--" + field.replace("_", "-"), *(value if isinstance(value, tuple) else (value,))]
OF_NUSCENES = dataclasses.replace(C, dataset="nuscenes", image_scale=(160, 90), version="v1.0-mini")
RUN = runtime.Run(CPU, 0, 1)


def cells_of(height, width, ranges=(8.0, 16.0, 32.0, 64.0)):
    shapes = [(-(-height // stride), -(-width // stride)) for stride in finetune_mono3d.STRIDES]
    return Cells(shapes, [0] * 5, ranges, CPU)


def made_up_batch(seed=0, B=2, M=7, width=200, height=96, dtype=torch.float32):
    """Boxes of all headings before a camera, with rectangles around their projected centres."""
    generator = torch.Generator().manual_seed(seed)
    uniform = lambda low, high, *shape: low + (high - low) * torch.rand(*shape, generator=generator, dtype=dtype)
    intrinsic = torch.tensor([[150.0, 0, 97], [0, 140, 45], [0, 0, 1]], dtype=dtype).expand(B, 3, 3)
    depth = uniform(4, 60, B, M)
    uv = torch.stack([uniform(-5, width + 5, B, M), uniform(0, height, B, M)], -1)
    xy = (uv - intrinsic[0, :2, 2]) / intrinsic[0, (0, 1), (0, 1)] * depth[..., None]
    boxes = torch.cat([xy, depth[..., None], uniform(0.4, 5, B, M, 3), uniform(-math.pi, math.pi, B, M, 1)], -1)
    half = uniform(2, 60, B, M, 2)
    rects = torch.cat([(uv - half).clamp(min=0), torch.minimum(uv + half, torch.tensor([width - 1.0, height - 1]))], -1)
    kinds = torch.randint(0, 10, (B, M), generator=generator)
    kinds[0, -2:] = -1
    velocity = uniform(-5, 5, B, M, 2)
    velocity[:, 2:3] = math.nan
    attributes = torch.randint(0, 9, (B, M), generator=generator)
    batch = {"boxes": boxes, "rects": rects, "kinds": kinds, "velocity": velocity, "attributes": attributes}
    return batch | {"intrinsic": intrinsic}


def as_answers(target, classes):
    """What a network would say that is right about everything."""
    positive = target["classes"] >= 0
    sure = F.one_hot(target["classes"].clamp(min=0), classes) * positive[..., None]
    said = {name: target[name].nan_to_num(0.0) for name in ("offset", "depth", "size", "yaw", "velocity")}
    said["scores"] = 40.0 * sure - 20
    said["direction"] = 9.0 * F.one_hot(direction_bin(target["yaw"][..., 0]), 2)
    said["attributes"] = 9.0 * F.one_hot(target["attributes"], 9)
    said["centreness"] = torch.logit(target["centreness"].clamp(1e-4, 1 - 1e-4))[..., None]
    return said


# -----------------------------------------------------------------------------
# targets


def test_assignment_is_a_plain_loops():
    batch, cells = made_up_batch(), cells_of(96, 200)
    found = assign(cells, batch)
    limits = [-1, 8, 16, 32, 64, math.inf]
    row, several = 0, 0
    for level, stride in enumerate(finetune_mono3d.STRIDES):
        for v in range(0, -(-96 // stride) * stride, stride):
            for u in range(0, -(-200 // stride) * stride, stride):
                for b in range(2):
                    best, owner, candidates = math.inf, -1, 0
                    for m in range(7):
                        x, y, z = batch["boxes"][b, m, :3].tolist()
                        cu, cv = 150 * x / z + 97, 140 * y / z + 45
                        left, top, right, bottom = batch["rects"][b, m].tolist()
                        far = max(u - left, right - u, v - top, bottom - v)
                        near = max(abs(u - cu), abs(v - cv)) < 1.5 * stride
                        if batch["kinds"][b, m] < 0 or not near or not limits[level] <= far <= limits[level + 1]:
                            continue
                        candidates += 1
                        if math.hypot(u - cu, v - cv) < best:
                            best, owner, seen_at = math.hypot(u - cu, v - cv), m, math.atan2(cu - 97, 150)
                            offset = [(u - cu) / stride, (v - cv) / stride]
                    several += candidates > 1
                    label = int(batch["kinds"][b, owner]) if owner >= 0 else -1
                    assert int(found["classes"][b, row]) == label, (level, u, v, b)
                    if owner >= 0:
                        box = batch["boxes"][b, owner].tolist()
                        assert found["offset"][b, row].tolist() == pytest.approx(offset, abs=1e-4)
                        assert float(found["depth"][b, row]) == pytest.approx(box[2])
                        assert found["size"][b, row].tolist() == pytest.approx(box[3:6])
                        assert float(found["yaw"][b, row]) == pytest.approx(box[6] - seen_at, abs=1e-5)
                        assert int(found["attributes"][b, row]) == int(batch["attributes"][b, owner])
                        central = math.exp(-2.5 * best / (1.414 * 1.5 * stride))
                        assert float(found["centreness"][b, row]) == pytest.approx(central, rel=1e-4)
                row += 1
    assert row == len(cells.places) == sum(cells.counts) and several > 3
    assert len({int(k) for k in found["classes"].unique()}) > 5


def test_cells_are_those_of_the_maps():
    """A map's answer depends most on the pixels around its own place: the same pixel is asked, cell by cell."""
    cells = cells_of(64, 208)
    assert cells.counts == [8 * 26, 4 * 13, 2 * 7, 1 * 4, 1 * 2]
    assert cells.places[27].tolist() == [8, 8] and cells.places[208 + 14].tolist() == [16, 16]
    shifted = Cells([(2, 3)] + [(1, 1)] * 4, [3.5] * 5, (8.0, 16.0, 32.0, 64.0), CPU)
    assert shifted.places[5].tolist() == [19.5, 11.5] and shifted.low[0] == -1 and shifted.high[-1] == math.inf


def test_targets_decoded_are_the_boxes():
    """In all quadrants, with either bin; headings where the bins meet are left to rounding."""
    batch, cells = made_up_batch(seed=1, M=40), cells_of(96, 200)
    target = assign(cells, batch)
    said = as_answers(target, 10)
    places, strides = (x.expand(2, *x.shape) for x in (cells.places, cells.strides))
    boxes = decode(said, places, strides, batch["intrinsic"])
    positive = target["classes"] >= 0
    assert direction_bin(target["yaw"][positive]).float().mean().item() == pytest.approx(0.5, abs=0.3)
    quadrants = set()
    for b in range(2):
        own = boxes[b][positive[b]]
        away = (own[:, None] - batch["boxes"][b][None])[..., :6].abs().amax(-1)
        error, which = away.min(1)
        assert error.max() < 1e-3
        turn = own[:, 6] - batch["boxes"][b][which][:, 6]
        assert (turn.sin().abs() + 1 - turn.cos()).max() < 1e-4
        quadrants |= set((own[:, 6] // (math.pi / 2)).int().tolist())
    assert quadrants == {-2, -1, 0, 1}


def test_losses_are_a_plain_loops():
    """Of answers at random: sums over positive cells alone, each weighted as in the release."""
    batch, cells = made_up_batch(seed=2), cells_of(96, 200)
    target = assign(cells, batch)
    generator = torch.Generator().manual_seed(3)
    P = len(cells.places)
    shapes = {"scores": 10, "offset": 2, "depth": 1, "size": 3, "yaw": 1, "velocity": 2, "direction": 2}
    shapes |= {"attributes": 9, "centreness": 1}
    said = {name: torch.randn(2, P, n, generator=generator) for name, n in shapes.items()}
    found = {name: float(loss) for name, loss in detection_losses(said, target).items()}
    smooth = lambda x: x * x / 2 * 9 if abs(x) < 1 / 9 else abs(x) - 1 / 18
    total = dict.fromkeys(found, 0.0)
    count = weight = 0
    for b in range(2):
        for p in range(P):
            label = int(target["classes"][b, p])
            for k in range(10):
                s = 1 / (1 + math.exp(-float(said["scores"][b, p, k])))
                if k == label:
                    total["classes"] -= 0.25 * (1 - s) ** 2 * math.log(s)
                else:
                    total["classes"] -= 0.75 * s**2 * math.log(1 - s)
            if label < 0:
                continue
            count += 1
            for name, share in (("offset", 1), ("depth", 0.2), ("size", 1), ("velocity", 0.05), ("yaw", 1)):
                for x in (said[name][b, p] - target[name][b, p]).tolist():
                    x = math.sin(x) if name == "yaw" else x
                    total[name] += 0 if math.isnan(x) else share * smooth(x)
            yaw = (float(target["yaw"][b, p]) - math.pi / 4) % (2 * math.pi)
            central = float(target["centreness"][b, p])
            total["direction"] -= float(said["direction"][b, p].log_softmax(0)[int(yaw // math.pi)])
            s = torch.sigmoid(said["centreness"][b, p, 0])
            total["centreness"] -= float(central * s.log() + (1 - central) * (1 - s).log())
            said_attribute = said["attributes"][b, p].log_softmax(0)
            total["attributes"] -= central * float(said_attribute[int(target["attributes"][b, p])])
            weight += central
    assert count >= 20 and target["velocity"][target["classes"] >= 0].isnan().any()
    expected = {name: value / count for name, value in total.items()}
    expected |= {"classes": total["classes"] / (count + 2), "attributes": total["attributes"] / weight}
    assert found == pytest.approx(expected, rel=1e-4)


def test_no_object_is_no_box_loss():
    batch, cells = made_up_batch(), cells_of(96, 200)
    batch["kinds"] = torch.full_like(batch["kinds"], -1)
    target = assign(cells, batch)
    said = {name: x.clone().requires_grad_() for name, x in as_answers(target, 10).items() if name != "attributes"}
    losses = detection_losses(said, target)
    assert losses.keys() == {"classes", *finetune_mono3d.WEIGHTS, "direction", "centreness"}
    assert all(loss == 0 for name, loss in losses.items() if name != "classes")
    sum(losses.values()).backward()
    assert all(x.grad.isfinite().all() for x in said.values())


# -----------------------------------------------------------------------------
# what is found when every answer is right


class Oracle:
    """A detector whose answers are the targets."""

    def __init__(self, c):
        self.c = c

    def eval(self):
        return self

    def buffers(self):
        return []

    def detect(self, batch):
        cells = Cells(
            [(-(-batch["image"].shape[2] // s), -(-batch["image"].shape[3] // s)) for s in finetune_mono3d.STRIDES],
            [0] * 5, self.c.ranges, CPU,
        )  # fmt: skip
        said = as_answers(assign(cells, batch), len(CLASSES[self.c.dataset]))
        if self.c.dataset == "kitti":
            said = {name: x for name, x in said.items() if name not in ("velocity", "attributes")}
        return select(said, cells, batch["intrinsic"])


@pytest.fixture(scope="module")
def nuscenes_c(made_up):  # noqa: F811
    return dataclasses.replace(OF_NUSCENES, data_root=(str(made_up),), eval_splits=("mini_train",))


def test_right_answers_are_right_by_the_metric(made_up, nuscenes_c):  # noqa: F811
    """Through decoding, six cameras merged, suppression and the metric: what two cameras see counts once, velocities
    and attributes come back, bicycles in a rack are not asked for.
    """
    frames = data_nuscenes.find_frames([made_up], ["mini_train"])
    truth = eval_mono3d.read_truth(nuscenes_c, frames)
    figures = eval_mono3d.judge(Oracle(nuscenes_c), frames, truth, nuscenes_c, RUN)
    for name in ("car", "pedestrian"):
        assert figures["mean_dist_aps"][name] == pytest.approx(1), name
        errors = [error for error in figures["label_tp_errors"][name].values()]
        assert max(errors) < 1e-3, errors
    assert figures["mean_ap"] == pytest.approx(0.2) and figures["label_tp_errors"]["barrier"]["vel_err"] is None
    lines = eval_mono3d.report(nuscenes_c, figures, truth)
    assert "5 samples, mini_train of v1.0-mini: mAP 20.00, NDS" in lines[0] and "26.18   33.50" in lines[-3]
    samples = list(data_mono3d.samples_of(frames).items())[:1]
    counts = []
    seen = lambda i, found: counts.append(len(found.scores))
    ((token, merged),) = eval_mono3d.detect(Oracle(nuscenes_c), frames, samples, nuscenes_c, CPU, seen)
    assert token == "sample scene-0061 0" and len(counts) == 6 and len(merged.score) <= sum(counts)
    assert sorted(merged.kind.tolist()) == [0, 5, 7] and (np.diff(merged.score) <= 0).all()


def test_right_answers_on_kittis_labels(scenes):
    """Three classes, no velocities. At full size no cell stands between two objects."""
    c = dataclasses.replace(C, data_root=(str(scenes),), image_scale=(1248, 384), ranges=(48.0, 96.0, 192.0, 384.0))
    frames = data_det3d.find_frames([scenes], ["val"])
    truth = eval_mono3d.read_truth(c, frames)
    figures = eval_mono3d.judge(Oracle(c), frames, truth, c, RUN)
    there = [name for name in CLASSES["kitti"] if (truth.kind == CLASSES["nuscenes"].index(name)).any()]
    assert there and "nd_score" not in figures and set(figures["label_aps"]) == set(CLASSES["kitti"])
    for name in there:
        assert figures["mean_dist_aps"][name] > 0.9 and max(figures["label_tp_errors"][name].values()) < 1e-2
    assert figures["tp_errors"].keys() == {"trans_err", "scale_err", "orient_err"}
    assert (
        f"2 samples, val, KITTI's labels: mAP {100 * figures['mean_ap']:.2f}"
        in eval_mono3d.report(c, figures, truth)[0]
    )


def test_selection_keeps_the_best_and_drops_doubles():
    """Scores are class times centreness; a box that covers a surer one of its class by more than .8 goes."""
    batch, cells = made_up_batch(B=1, M=1), cells_of(96, 200)
    batch["rects"] = batch["rects"] * 0 + torch.tensor([80.0, 30, 100, 60])
    batch["boxes"] = torch.tensor([[[0.0, 0, 20, 4, 1.5, 2, 0.5]]])
    batch["kinds"] = torch.tensor([[3]])
    said = as_answers(assign(cells, batch), 10)
    found = select(said, cells, batch["intrinsic"])
    assert (found["scores"][0] > 0).sum() == 1 and found["classes"][0, 0] == 3
    torch.testing.assert_close(found["boxes"][0, :1], batch["boxes"][0], rtol=1e-4, atol=1e-3)
    target = assign(cells, batch)
    highest = target["centreness"][target["classes"] >= 0].max()
    assert 0.3 < float(highest) < 0.9 and float(found["scores"][0, 0]) == pytest.approx(float(highest), rel=1e-2)
    said["scores"] = said["scores"].clamp(max=-4.0)  # .018
    assert (select(said, cells, batch["intrinsic"])["scores"] == 0).all()


# -----------------------------------------------------------------------------
# the network

NAMES = """cls_convs.0.conv.weight cls_convs.0.gn.bias cls_convs.1.conv.conv_offset.weight reg_convs.1.conv.bias
    conv_cls_prev.0.conv.weight conv_cls.bias conv_reg_prevs.0.0.conv.weight conv_reg_prevs.3.0.gn.weight
    conv_regs.4.weight conv_dir_cls_prev.0.conv.weight conv_dir_cls.weight conv_attr_prev.0.gn.weight conv_attr.weight
    conv_centerness_prev.0.conv.weight conv_centerness.bias scales.4.2.scale""".split()


BENT = dataclasses.replace(OF_NUSCENES, deformable=True, freeze="first", optimizer="sgd", lr=0.008)


@pytest.fixture(scope="module")
def bent():
    """A network for nuScenes with deformable convolutions and a frozen stage."""
    return FCOS3D(BENT).train()


def test_names_are_mmdetection3ds(bent, by_heart):
    weights = bent.state_dict()
    assert [name for name in NAMES if f"bbox_head.{name}" not in weights] == []
    assert {name.split(".")[0] for name in weights} == {"backbone", "neck", "bbox_head"}
    assert weights["bbox_head.conv_regs.4.weight"].shape == (2, 32, 1, 1)
    assert weights["bbox_head.conv_attr.weight"].shape[0] == 9 and "neck.fpn_convs.4.conv.weight" in weights
    assert "backbone.layer4.1.conv2.conv_offset.bias" in weights
    of_kitti = by_heart[0].state_dict()
    assert not any("attr" in name or "regs.4" in name or "offset" in name for name in of_kitti)


def test_optimizer_and_rate(bent):
    """Twice the rate and no decay for biases, but for those of norms and deformable convolutions."""
    optimizer = finetune_mono3d.build_optimizer(bent, BENT)
    group = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    names = {n: group[id(p)]["lr"] for n, p in bent.named_parameters() if p.requires_grad}
    twice = {n for n, lr in names.items() if lr == 0.016}
    assert {"neck.fpn_convs.0.conv.bias", "bbox_head.conv_cls.bias", "bbox_head.cls_convs.0.conv.bias"} <= twice
    assert not any("gn" in n or "bn" in n or "offset" in n or "weight" in n for n in twice)
    assert "bbox_head.cls_convs.1.conv.bias" not in twice and not any(n.startswith("backbone.layer1.") for n in names)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [1e-4, 0]
    rate = finetune_mono3d.rate
    assert [rate(s, 1200, 500) for s in (0, 250, 500, 799)] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert [rate(s, 1200, 500) for s in (800, 1099, 1100, 1199)] == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_a_frozen_stage_stays(bent):
    encoder = bent.backbone
    assert not encoder.bn1.training and not encoder.layer1[0].bn1.training and encoder.layer2[0].bn1.training
    assert not encoder.conv1.weight.requires_grad and encoder.layer2[0].conv1.weight.requires_grad


# -----------------------------------------------------------------------------
# learning


@pytest.fixture(scope="module")
def by_heart(scenes):
    """Two images, learned from scratch. -> model, frames, losses of the first and the last steps, config."""
    c = dataclasses.replace(C, data_root=(str(scenes),), flip=0.0, lr=3e-3, eval_splits=("train",))
    torch.manual_seed(0)
    frames = data_det3d.find_frames([scenes], ["train"])[:2]
    dataset = data_mono3d.MonoFrames(frames, c)
    batch = data_mono3d.augment(data_mono3d.collate([dataset[(0, i)] for i in range(2)]), c.image_scale, CPU)
    model = FCOS3D(c).train()
    optimizer = finetune_mono3d.build_optimizer(model, c)
    rates, losses = [group["lr"] for group in optimizer.param_groups], []
    for step in range(40):
        for group, highest in zip(optimizer.param_groups, rates):
            group["lr"] = highest * finetune_mono3d.rate(step, 40, 5)
        loss, stats = model(batch, step == 39)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, frames, losses, stats, c


def test_two_images_learned_by_heart(by_heart):
    """Most of what is in them is found, where it is."""
    model, frames, losses, stats, c = by_heart
    assert losses[-1] < 0.3 * losses[0]
    truth = eval_mono3d.read_truth(c, frames)
    figures = eval_mono3d.judge(model, frames, truth, c, RUN)
    assert {"loss", "classes", "offset", "depth", "size", "yaw", "direction", "centreness"} < stats.keys()
    assert figures["label_aps"]["car"]["2.0"] > 0.5, figures["label_aps"]
