"""Deformable convolution: what it is with whole offsets, a plain loop over places between cells, all gradients, the
names of mmcv's weights.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, needs_gpu, needs_triton

import encoders
from ops_deform import DeformConv2d, deform_conv2d


def case(seed=0, B=2, C=5, H=6, W=7, O=4, size=3, stride=1, padding=1, dtype=torch.float32):
    """-> x, offset, mask, weight, bias; stride and padding as keywords."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)
    h, w = ((n + 2 * padding - size) // stride + 1 for n in (H, W))
    k = size * size
    inputs = random(B, C, H, W), random(B, 2 * k, h, w), random(B, k, h, w).sigmoid(), random(O, C, size, size)
    return (*inputs, random(O)), {"stride": stride, "padding": padding}


@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (3, 2, 1), (1, 1, 0), (3, 2, 0), (5, 3, 2)])
def test_zero_offsets_and_ones_for_masks_are_a_convolution(size, stride, padding):
    (x, offset, mask, weight, bias), how = case(size=size, stride=stride, padding=padding)
    found = deform_conv2d(x, 0 * offset, torch.ones_like(mask), weight, bias, **how)
    torch.testing.assert_close(found, F.conv2d(x, weight, bias, **how), rtol=1e-4, atol=1e-5)
    half = deform_conv2d(x, 0 * offset, torch.full_like(mask, 0.5), weight, **how)
    torch.testing.assert_close(half, F.conv2d(x, weight, **how) / 2, rtol=1e-4, atol=1e-5)


def test_whole_offsets_are_a_shifted_convolution():
    (x, offset, mask, weight, bias), how = case()
    down, right = 2, -1
    offset[:, 0::2], offset[:, 1::2] = down, right
    found = deform_conv2d(x, offset, torch.ones_like(mask), weight, bias, **how)
    shifted = F.pad(x, (1, 0, 0, down))[:, :, down:, : x.shape[3]]  # [v, u] is x[v + 2, u - 1], zero outside
    expected = F.conv2d(shifted, weight, bias, **how)
    # at the border the window's own padding is zero, where x still goes on
    torch.testing.assert_close(found[:, :, 1:-1, 1:-1], expected[:, :, 1:-1, 1:-1], rtol=1e-4, atol=1e-5)


def at(x, b, v, u):
    """The map of image b between cells, by the book; zero outside. -> (C,)"""
    total = torch.zeros_like(x[0, :, 0, 0])
    for j, i in ((j, i) for j in (0, 1) for i in (0, 1)):
        y, z = math.floor(v) + j, math.floor(u) + i
        if 0 <= y < x.shape[2] and 0 <= z < x.shape[3]:
            total += (1 - abs(v - y)) * (1 - abs(u - z)) * x[b, :, y, z]
    return total


def test_a_plain_loop():
    """Each tap has offsets of its own, down and then right, and a mask of its own: mmcv's order of channels."""
    (x, offset, mask, weight, bias), how = case(B=1, C=2, H=4, W=5, O=3, stride=2)
    found = deform_conv2d(x, offset, mask, weight, bias, **how)
    expected = bias[None, :, None, None].expand_as(found).clone()
    for j, i, t in ((j, i, t) for j in range(found.shape[2]) for i in range(found.shape[3]) for t in range(9)):
        v = 2 * j - 1 + t // 3 + float(offset[0, 2 * t, j, i])
        u = 2 * i - 1 + t % 3 + float(offset[0, 2 * t + 1, j, i])
        expected[0, :, j, i] += mask[0, t, j, i] * (weight[:, :, t // 3, t % 3] @ at(x, 0, v, u))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients():
    (inputs, how) = case(B=1, C=2, H=4, W=3, O=2, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(functools.partial(deform_conv2d, **how), inputs)


def check_kernel(device):
    (inputs, how) = case(C=9)
    inputs = [x.to(device).requires_grad_() for x in inputs]
    found, expected = (deform_conv2d(*inputs, **how, impl=impl) for impl in ("triton", "torch"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    upstream = torch.randn(found.shape, device=device)
    for mine, reference in zip(*(torch.autograd.grad(y, inputs, upstream) for y in (found, expected))):
        torch.testing.assert_close(mine, reference, rtol=1e-3, atol=1e-3)


@needs_triton
def test_through_the_kernel():
    """In Triton's interpreter where there is no GPU."""
    if GPU:
        pytest.skip("compiled kernels want tensors on the GPU")
    check_kernel("cpu")


@pytest.mark.gpu
@needs_gpu[1]
def test_through_the_kernel_on_a_gpu():
    check_kernel("cuda")


def test_what_the_taps_see_is_not_kept():
    """Nine times the map would be most of a network's memory."""
    layer = DeformConv2d(64, 64, 3, 1, 1)
    x = torch.randn(1, 64, 12, 12, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x).sum()
    assert max(kept) < 9 * x.numel()


def test_shapes_that_do_not_fit():
    (x, offset, mask, weight, _), how = case()
    with pytest.raises(ValueError, match=r"expected \(2, 18, 6, 7\) and \(2, 9, 6, 7\)"):
        deform_conv2d(x, offset[:, :9], mask, weight, **how)


def test_a_layer_starts_as_half_a_convolution_and_keeps_precision():
    layer = DeformConv2d(4, 6, 3, 2, 1)
    x = torch.randn(2, 4, 9, 8)
    plain = F.conv2d(x, layer.weight, None, 2, 1)
    torch.testing.assert_close(layer(x), plain / 2 + layer.bias[:, None, None], rtol=1e-4, atol=1e-5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        layer.conv_offset.bias.fill_(1.003)  # in bfloat16 it would be 1
        found = layer(x.bfloat16())
    layer.conv_offset.bias.data[18:] = 1.003
    expected = layer(x.bfloat16().float())
    assert (found.float() - expected).abs().max() < 0.03 * expected.abs().max()


def test_a_resnet_with_deformable_stages():
    """Names are mmdetection's; all else is the plain network, whose weights load; with zero offsets it is the same but
    for what a mask of one half does.
    """
    torch.manual_seed(0)
    plain, bent = encoders.ResNet(50), encoders.ResNet(50, (3, 4))
    more = set(bent.state_dict()) - set(plain.state_dict())
    blocks = [f"layer3.{i}" for i in range(6)] + [f"layer4.{i}" for i in range(3)]
    assert more == {f"{b}.conv2.conv_offset.{part}" for b in blocks for part in ("weight", "bias")}
    assert bent.layer3[0].conv2.conv_offset.weight.shape == (27, 256, 3, 3)
    bent.load_state_dict(plain.state_dict(), strict=False)
    for block in (*bent.layer3, *bent.layer4):
        block.conv2.conv_offset.bias.data[18:] = 50.0  # a mask of one
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for a, b in zip(plain.eval()(x), bent.eval()(x)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert encoders.ResNet(18, (4,)).layer4[0].conv2.conv_offset.weight.shape == (27, 512, 3, 3)


def test_a_pyramid_with_further_maps():
    """Two more levels by strided convolutions, a ReLU before the second alone."""
    torch.manual_seed(0)
    pyramid = encoders.FPN([4, 6, 8], 16, further=2)
    maps = [torch.randn(1, c, n, n) for c, n in ((4, 16), (6, 8), (8, 4))]
    found = pyramid(maps)
    assert [tuple(m.shape[1:]) for m in found] == [(16, n, n) for n in (16, 8, 4, 2, 1)]
    torch.testing.assert_close(found[3], pyramid.fpn_convs[3](found[2]))
    torch.testing.assert_close(found[4], pyramid.fpn_convs[4](found[3].relu()))
    assert "fpn_convs.4.conv.weight" in pyramid.state_dict()
