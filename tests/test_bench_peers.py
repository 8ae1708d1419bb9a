"""The usual ways. That they give ours' answers, test_bench.py asks of bench.py itself."""

import math

import numpy as np
import pytest
import torch

import bench_peers as peers
import data
import simipu


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
