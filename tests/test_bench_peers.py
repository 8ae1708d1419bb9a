"""The usual ways. That they give ours' answers, test_bench.py asks of bench.py itself."""

import math

import numpy as np
import pytest
import torch

import bench_peers as peers
import data
import ops_boxes
import simipu
from ops_deform import deform_conv2d


def test_padding():
    """The pixels of batches as data.py would resize and pad their images."""
    c, sizes = simipu.PRESETS["kitti"][1], np.array([[1242, 375], [1224, 370], [1242, 375]])
    whole, flip = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64), torch.tensor([False])

    def pixels(boxes):
        resized = [data.image_affine(torch.tensor(size[None]), box, flip, whole)[1] for size, box in zip(sizes, boxes)]
        width, height = (32 * math.ceil(edge / 32) for edge in torch.cat(resized).amax(0).tolist())
        return width * height

    draws = [[data.random_image_scale(c.image_scale, step, i) for i in range(3)] for step in range(1000)]
    ratio = sum(pixels(boxes) for boxes in draws) / sum(pixels(boxes[:1] * 3) for boxes in draws)
    assert peers.padding(sizes, c) == pytest.approx(ratio, rel=1e-3) and ratio > 1.2
    assert peers.padding(sizes, simipu.PRESETS["demo"][1]) == peers.padding(sizes[:1], c) == 1


def test_polygons():
    """Contained, half shifted, crossed, apart; and an odd angle, against the closed form. Coinciding edges are none."""
    box = lambda x, y, length, width, yaw: torch.tensor([x, y, 0.0, length, width, 1.0, yaw])
    a = box(50.0, -20.0, 4.0, 2.0, 0.3)
    pairs = [
        (box(50.1, -20.1, 2.0, 1.0, 0.5), 2 / 8),
        (box(50.0, -20.0, 2.0, 4.0, 0.3), 4 / 12),
        (box(50.0, -10.0, 4.0, 2.0, 0.3), 0.0),
    ]
    found = peers.polygon_iou(a, torch.stack([b for b, _ in pairs]))
    assert found.tolist() == pytest.approx([iou for _, iou in pairs], abs=1e-5)
    odd = box(51.0, -19.5, 3.0, 2.5, 2.1)
    assert peers.polygon_iou(a, odd).item() == pytest.approx(ops_boxes.bev_iou(a, odd).item(), abs=1e-5)


def test_greedy_suppression_is_ours():
    """Of one set, and of classes that share boxes; a score of -inf is no box."""
    torch.manual_seed(0)
    boxes = torch.cat([6 * torch.rand(2, 1, 30, 2), torch.rand(2, 1, 30, 5) + 0.5], 3)
    boxes = torch.cat([boxes[..., :2], boxes[..., :1] * 0, boxes[..., 2:6]], 3)  # x, y, z, sizes, yaw
    scores = torch.rand(2, 3, 30)
    scores[:, 1, :10] = -torch.inf
    ours = ops_boxes.nms(boxes, scores, 0.1)
    assert 0 < ours.float().mean() < 0.9
    for nms in (peers.greedy_nms, peers.polygon_nms):
        assert torch.equal(nms(boxes, scores, 0.1), ours)
        assert torch.equal(nms(boxes[1, 0], scores[1, 2], 0.1), ours[1, 2])


def test_gathered_deformable_convolution():
    """Between cells, on them, and far outside; with strides; gradients, too."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 7, 6), torch.randn(4, 3, 3, 3), torch.randn(4)
    offset, mask = 2 * torch.randn(2, 18, 4, 3), torch.rand(2, 9, 4, 3)
    offset[0, :4], offset[1, :2] = 0, 50
    inputs = [t.requires_grad_() for t in (x, offset, mask, weight, bias)]
    ours, theirs = (f(*inputs, stride=2, padding=1) for f in (deform_conv2d, peers.gathered_deform_conv2d))
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)
    upstream = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(out, inputs, upstream) for out in (theirs, ours))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
