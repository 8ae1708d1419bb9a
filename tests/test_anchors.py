"""Anchors: where they sit, codes, targets, losses and answers, against plain loops, by KITTI's and Waymo's protocol."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_finetune_det3d import C

import data_det3d
import data_kitti
import eval_boxes
import finetune_det3d
import ops_boxes
import ops_sparse
import synthetic
from anchors import PROTOCOLS, anchor_grid, assign, decode, detection_losses, direction_bin, encode, select
from data_det3d import CLASSES
from finetune_det3d import Config

KITTI = PROTOCOLS["kitti"]
both = pytest.mark.parametrize("name", PROTOCOLS)


def layout_of(name, **fields):
    return data_det3d.Layout(dataclasses.replace(C, protocol=name, **fields))


# -----------------------------------------------------------------------------
# anchors and codes


def test_anchors_sit_on_their_cells():
    """A voxel that the encoder's layers hand on to one cell of the map seen from above lies where that cell's anchors
    do, or, where the map is enlarged, in the middle of those that the cell becomes.
    """
    for upsample in ((1, 2), (2, 4)):
        c = dataclasses.replace(C, upsample=upsample)
        layout = data_det3d.Layout(c)
        anchors = anchor_grid(layout)
        Y, X = layout.cells[::-1]
        assert anchors.shape == (Y, X, 3, 2, 7) and Y == X == 24 * upsample[0]
        y, x = 8 * 5, 8 * 17
        key = layout.grid.encode(torch.tensor([0]), *(torch.tensor([cell]) for cell in (9, y, x)))
        keys = ops_sparse.pyramid_keys(key, layout.grid, layout.windows)[-1]
        _, _, rows, columns = layout.grids[-1].decode(keys)
        assert set(rows.tolist()) == {5} and set(columns.tolist()) == {17}
        n = upsample[0]
        mine = anchors[n * 5 : n * 6, n * 17 : n * 18, 0, 0, :2].flatten(0, 1).mean(0)
        place = [(cell + 0.5) * 0.1 + start for cell, start in ((x, 0.0), (y, -9.6))]
        torch.testing.assert_close(mine, torch.tensor(place))
        assert (anchors[0, 1:, 0, 0, 0] - anchors[0, :-1, 0, 0, 0]).allclose(torch.tensor(0.8 / n))


SIZES = {
    "kitti": ((0.6, 0.8, 1.73, -0.6), (0.6, 1.76, 1.73, -0.6), (1.6, 3.9, 1.56, -1.78)),
    "waymo": ((2.08, 4.73, 1.77, -0.0345), (0.84, 0.91, 1.74, 0), (0.84, 1.81, 1.77, -0.1188)),
}


@both
def test_anchors_are_mmdetection3ds(name):
    """Its sizes (along x and y at yaw 0), bottoms and yaws, which turn clockwise from -y."""
    anchors = anchor_grid(layout_of(name)).double()
    sizes = SIZES[name]
    for k, (along_x, along_y, height, bottom) in enumerate(sizes):
        across, along = ops_boxes.corners(anchors[3, 4, k]) - anchors[3, 4, k, :, None, :3]
        np.testing.assert_allclose(across.amax(0), [along_x / 2, along_y / 2, height / 2], atol=1e-6)
        np.testing.assert_allclose(along.amax(0), [along_y / 2, along_x / 2, height / 2], atol=1e-6)
        np.testing.assert_allclose(anchors[3, 4, k, :, 2] - height / 2, bottom, atol=1e-6)
        np.testing.assert_allclose(-math.pi / 2 - anchors[3, 4, k, :, 6], [0, math.pi / 2], atol=1e-6)


def test_grids_of_the_recipes():
    full = data_det3d.Layout(Config())
    assert full.grid.shape == (41, 1600, 1408) and full.cells == (176, 200)
    assert full.grids[-1].shape == (2, 200, 176)
    full = data_det3d.Layout(finetune_det3d.PRESETS["waymo"][1])
    assert full.grid.shape == (61, 1280, 1920) and full.cells == (240, 160)
    assert full.grids[-1].shape == (3, 160, 240)


QUARTERS = [i * math.pi / 2 for i in range(-2, 3)]


@both
def test_codes_and_bins_at_all_quarter_turns(name):
    """Codes are mmdetection3d's, of boxes with its yaw; decoded, with the bin, they are the boxes again, at every
    heading but the two where the bins meet: there a rounding decides, so .01 beside them.
    """
    generator, protocol = torch.Generator().manual_seed(0), PROTOCOLS[name]
    anchors = anchor_grid(layout_of(name))[::5, ::7].flatten(0, 3)
    offset = {"kitti": 0.0, "waymo": math.pi / 4}[name]  # mmdetection3d's dir_offset, of its yaw
    meeting = [-math.pi / 2 - offset, math.pi / 2 - offset]
    yaws = [yaw for yaw in QUARTERS if yaw not in meeting] + [m + d for m in meeting for d in (-0.01, 0.01)]
    for yaw in (*yaws, *(math.tau * torch.rand(4, generator=generator) - math.pi).tolist()):
        boxes = anchors + torch.randn(anchors.shape, generator=generator) * torch.tensor([1, 1, 0.5, 0, 0, 0, 0])
        boxes[:, 3:6] *= 1 + 0.5 * torch.rand(len(boxes), 3, generator=generator)
        boxes[:, 6] = yaw
        codes = encode(boxes, anchors)
        (xa, ya, za, la, wa, ha, ra), (xg, yg, zg, lg, wg, hg, rg) = anchors.T, boxes.T
        diagonal = (la**2 + wa**2).sqrt()
        theirs = [(xg - xa) / diagonal, (yg - ya) / diagonal, (zg - za) / ha]
        theirs += [(wg / wa).log(), (lg / la).log(), (hg / ha).log()]
        theirs += [(-math.pi / 2 - rg) - (-math.pi / 2 - ra)]
        torch.testing.assert_close(codes, torch.stack(theirs, 1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decode(codes, anchors), boxes, rtol=1e-4, atol=1e-5)
        # its bin: the half turns in its yaw, from the offset on
        bins = direction_bin(boxes[:, 6], protocol)
        assert (bins == math.floor(((-math.pi / 2 - yaw - offset) % math.tau) / math.pi)).all()

        n = 10  # one frame for each box, so that no box is in another's way
        scores, directions = torch.full((n, len(anchors), 3), -9.0), torch.zeros(n, len(anchors), 2)
        pick = torch.randperm(len(anchors), generator=generator)[:n]
        scores[torch.arange(n), pick, 1] = 4.0
        directions[torch.arange(n), pick, bins[pick]] = 3.0
        turned = codes + torch.tensor([0, 0, 0, 0, 0, 0, math.pi])  # what the loss, a sine, cannot tell
        for told in (codes, turned, codes - (turned - codes)):
            found, score, classes = select(scores, told.expand(n, -1, -1), directions, anchors, protocol)
            assert (score[:, 0] > 0.9).all() and (score[:, 1:] == 0).all() and (classes[:, 0] == 1).all()
            off = found[:, 0] - boxes[pick]
            assert off[:, :6].abs().max() < 1e-3 and (off[:, 6].cos() > 1 - 1e-5).all()


# -----------------------------------------------------------------------------
# which anchor answers for which box


def random_boxes(generator, frames, each, c, protocol):
    """Of all classes, a tenth of them none; sizes within a fifth of the anchors', any place, any yaw."""
    classes = torch.randint(0, 30, (frames, each), generator=generator).clamp(max=29) // 9
    classes = torch.where(classes == 3, -1, classes)
    low, high = torch.tensor(c.point_range[:2]), torch.tensor(c.point_range[3:5])
    sizes = [(a.width, a.length, a.height, a.bottom) for a in protocol.anchors.values()]
    sizes = torch.tensor(sizes)[classes.clamp(min=0)]
    boxes = torch.zeros(frames, each, 7)
    boxes[..., :2] = low + (high - low) * torch.rand(frames, each, 2, generator=generator)
    boxes[..., 3:6] = sizes[..., [1, 0, 2]] * (0.8 + 0.4 * torch.rand(frames, each, 3, generator=generator))
    boxes[..., 2] = sizes[..., 3] + boxes[..., 5] / 2
    boxes[..., 6] = math.tau * torch.rand(frames, each, generator=generator) - math.pi
    return boxes, classes


def assigned_by_hand(anchors, boxes, classes, protocol):
    """One frame, by MaxIoUAssigner's steps: background, neither, the best box if it is enough; then to each box the
    anchors that overlap it most, the box with the least overlap first. -> class, owner of each anchor (A,)
    """
    label, owner = torch.full(anchors.shape[:-1], -2), torch.zeros(anchors.shape[:-1], dtype=torch.long)
    for k, anchor in enumerate(protocol.anchors.values()):
        positive, negative, least = anchor.positive, anchor.negative, anchor.least
        flat, mine = anchors[:, :, k].flatten(0, 2), torch.nonzero(classes == k)[:, 0]
        found, best = torch.full((len(flat),), -1), torch.zeros(len(flat), dtype=torch.long)
        if len(mine):
            overlap = ops_boxes.pairwise(ops_boxes.nearest_bev_iou, flat, boxes[mine])
            most, which = overlap.max(1)
            found[most >= negative] = -2
            found[most >= positive] = k
            best = mine[which]
            for i in overlap.max(0).values.argsort():
                top = overlap[:, i].max()
                if top >= least:
                    found[overlap[:, i] == top] = k
                    best[overlap[:, i] == top] = mine[i]
        label[:, :, k], owner[:, :, k] = (x.view(anchors.shape[:2] + (2,)) for x in (found, best))
    return label.flatten(), owner.flatten()


@both
def test_assignment_is_the_plain_loops(name):
    generator, protocol = torch.Generator().manual_seed(1), PROTOCOLS[name]
    anchors = anchor_grid(layout_of(name, upsample=(1, 2)))
    boxes, classes = random_boxes(generator, 20, 14, C, protocol)
    boxes[:3, 1] = boxes[:3, 0] + 0.05  # two that want the same anchors
    classes[:3, 1] = classes[:3, 0]
    classes[5] = -1  # an empty frame
    target = assign(anchors, boxes, classes, protocol)
    rescued = 0
    for b in range(len(boxes)):
        label, owner = assigned_by_hand(anchors, boxes[b], classes[b], protocol)
        assert torch.equal(target["classes"][b], label)
        positive = label >= 0
        assert torch.equal(target["boxes"][b][positive], boxes[b][owner[positive]])
        overlap = ops_boxes.nearest_bev_iou(anchors.flatten(0, 3)[positive], boxes[b][owner[positive]])
        enough = torch.tensor([a.positive for a in protocol.anchors.values()])[label[positive]]
        rescued += (overlap < enough).sum()
    label = target["classes"]
    assert all((label == k).sum() > 15 for k in (-2, 0, 1, 2)) and rescued > 5 and (label[5] == -1).all()


@both
def test_losses_are_the_plain_loops(name):
    """Focal (2, .25), smooth L1 (1/9) with the sine of the yaws' difference, times 2 (Waymo: 1), cross-entropy times
    .2; over the positive anchors, one a frame at least; of mmdetection3d's head, in float64.
    """
    generator, protocol = torch.Generator().manual_seed(2), PROTOCOLS[name]
    weight = {"kitti": 2, "waymo": 1}[name]
    anchors = anchor_grid(layout_of(name)).flatten(0, 3)[:40]
    A, B = len(anchors), 3
    scores, codes, directions = (torch.randn(B, A, n, generator=generator) for n in (3, 7, 2))
    label = torch.randint(-2, 3, (B, A), generator=generator)
    label[1] = -1
    boxes = anchors.repeat(B, 1, 1) * (1 + 0.3 * torch.rand(B, A, 7, generator=generator))
    boxes[label < 0] = 0  # log of 0: must be nobody's
    raw = [x.requires_grad_() for x in (scores, codes, directions)]
    found = detection_losses(*raw, anchors, {"classes": label, "boxes": boxes}, protocol)
    sum(found.values()).backward()
    assert all(x.grad.isfinite().all() for x in raw)

    wanted = dict.fromkeys(("classes", "boxes", "direction"), 0.0)
    for b in range(B):
        for a in range(A):
            k = int(label[b, a])
            for j in range(3):
                p = 1 / (1 + math.exp(-scores[b, a, j].item()))
                if k == j:
                    wanted["classes"] -= 0.25 * (1 - p) ** 2 * math.log(p)
                elif k != -2:
                    wanted["classes"] -= 0.75 * p**2 * math.log(1 - p)
            if k >= 0:
                code = encode(boxes[b, a].double(), anchors[a].double())
                for i in range(7):
                    off = codes[b, a, i].item() - code[i].item()
                    off = abs(math.sin(off) if i == 6 else off)
                    wanted["boxes"] += weight * (off**2 / 2 * 9 if off < 1 / 9 else off - 1 / 18)
                truth = int(direction_bin(boxes[b, a, 6], protocol))
                wanted["direction"] -= 0.2 * directions[b, a].double().log_softmax(0)[truth].item()
    count = sum(max(int((row >= 0).sum()), 1) for row in label)
    assert all(found[part].item() == pytest.approx(wanted[part] / count, rel=1e-4) for part in wanted)
    assert not scores.grad[label == -2].any() and not codes.grad[label < 0].any() and codes.grad[label >= 0].any()


def test_targets_as_predictions_score_100(tmp_path):
    """Labels of more than 40 objects a class, through boxes, targets, decoding, suppression, result files and the
    evaluator: nothing is lost, turned, or moved by more than the files' digits.
    """
    rng = np.random.default_rng(3)
    c = dataclasses.replace(finetune_det3d.PRESETS["demo"][1])
    layout = data_det3d.Layout(c)
    anchors = anchor_grid(layout)
    width, height, truths, results = 1242, 375, [], []
    for n in range(16):
        calib = tmp_path / f"{n:06d}.txt"
        calib.write_text(synthetic.mount(rng, 0.0, width, height)[0])
        files = Path("none.png"), Path("none.bin"), (calib,)
        frame = data_kitti.ObjectFrame(f"training/{n:06d}", *files, data_kitti.RIG)
        _, velo2cam = data_kitti.split_projection(frame)
        rows = []
        while len(rows) < 9:
            name = CLASSES[len(rows) % 3]
            anchor = KITTI.anchors[name]
            w, length, h, bottom = anchor.width, anchor.length, anchor.height, anchor.bottom
            x, y = rng.uniform(7, 22), rng.uniform(-9, 9)
            size = np.array([length, w, h]) * rng.uniform(0.85, 1.15, 3)
            yaw = rng.uniform(-math.pi, math.pi)
            box = np.array([x, y, bottom + size[2] / 2, *size, yaw])
            rect = data_det3d.projected_rect(box[None], frame.lidar2img())[0]
            apart = all(np.hypot(*(box[:2] - other[:2])) > 4.6 for _, other, _ in rows)
            if abs(math.cos(yaw)) > 0.01 and apart and rect.min() > 0 and rect[2] < width - 1 and rect[3] < height - 1:
                if rect[3] - rect[1] > 41:
                    rows.append((name, box, rect))
        lines = []
        for name, box, rect in rows:
            h, w, length, x, y, z, ry = ops_boxes.box_to_label(box, velo2cam)
            alpha = (ry - math.atan2(x, z) + math.pi) % math.tau - math.pi
            numbers = (0, 0, alpha, *rect, h, w, length, x, y, z, ry)
            lines.append(" ".join([name, *(f"{v:.6f}" for v in numbers)]))
        label = tmp_path / f"label_{n}.txt"
        label.write_text("\n".join(lines) + "\n")

        types, numbers = data_kitti.read_labels(label)
        boxes = torch.from_numpy(ops_boxes.label_to_box(numbers[:, 7:14], velo2cam)).float()[None]
        classes = torch.tensor([[CLASSES.index(t) for t in types]])
        target = assign(anchors, boxes, classes, KITTI)
        positive = target["classes"] >= 0
        flat = anchors.flatten(0, 3)
        codes = torch.where(positive[..., None], encode(target["boxes"].clamp(min=-1e9), flat), 0)
        scores = torch.full((1, len(flat), 3), -8.0)
        hits = positive[0].nonzero()[:, 0]
        scores[0, hits, target["classes"][0, hits]] = 2 + torch.from_numpy(rng.random(len(hits))).float()
        directions = torch.nn.functional.one_hot(direction_bin(target["boxes"][..., 6], KITTI), 2).float()
        found, score, kinds = (x[0] for x in select(scores, codes, directions, flat, KITTI))
        there = score > 0
        assert len(hits) < KITTI.before_nms and there.sum() == 9
        detections = (x[there].numpy() for x in (found.double(), score, kinds))
        path = tmp_path / f"result_{n}.txt"
        eval_boxes.write_results(path, *eval_boxes.as_results(frame, (width, height), *detections))
        truths.append((types, numbers))
        results.append(eval_boxes.read_results(path))
    figures = eval_boxes.evaluate(truths, results)
    for name in CLASSES:
        assert figures[name]["n"] == [48] * 3
        for metric in eval_boxes.TITLES:
            np.testing.assert_allclose(figures[name][metric]["AP40"], 100, atol=0.01, err_msg=f"{name} {metric}")
