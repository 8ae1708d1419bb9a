"""Deformable convolution with modulation (DCNv2, Zhu et al. 2019), on `ops_triton.bilinear_sample`.

An ordinary convolution looks at a fixed grid of cells. Here each tap, at each place, looks `offset` cells further, in
between cells if need be, and what it sees is multiplied by its `mask`. Both are made of the map itself.

Names and layout of the weights are mmcv's (ModulatedDeformConv2dPack), so that checkpoints of others fit. One group.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import ops_triton as ops


def deform_conv2d(x, offset, mask, weight, bias=None, stride=1, padding=0, impl="auto"):
    """x (B, C, H, W), weight (O, C, rows, columns), bias (O,) -> (B, O, h, w), as F.conv2d's with these strides.

    offset (B, 2 k, h, w): for each of k = rows * columns taps, row by row, how many cells further down and then how
    many further right it looks. mask (B, k, h, w). What lies outside of the map is zero. Offsets are to be float32, or
    float64 as x: bfloat16 would round places. Gradients go to all inputs but are not differentiable again.

    What the taps see is k times the map: it is not kept, but read again in the backward pass. Raises ValueError for
    other shapes.
    """
    (B, _, H, W), (_, _, rows, columns) = x.shape, weight.shape
    h, w = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((H, rows), (W, columns)))
    k = rows * columns
    if offset.shape != (B, 2 * k, h, w) or mask.shape != (B, k, h, w):
        wanted = f"({B}, {2 * k}, {h}, {w}) and ({B}, {k}, {h}, {w})"
        raise ValueError(f"offset and mask are {tuple(offset.shape)} and {tuple(mask.shape)}, expected {wanted}")
    uv = _places(offset, rows, columns, stride, padding).flatten(1, 3)  # (B, h w k, 2)
    weights = weight.permute(0, 2, 3, 1).flatten(1)  # (O, k C)
    mask = mask.permute(0, 2, 3, 1).flatten(1)[..., None]  # (B, h w k, 1)

    def convolve(x, uv, mask, weights):
        seen = ops.bilinear_sample(x, uv, impl)  # (B, h w k, C)
        seen = seen * mask.to(seen.dtype)
        return seen.view(B, h * w, -1) @ weights.t().to(seen.dtype)  # (B, h w, O)

    if torch.is_grad_enabled():
        out = checkpoint(convolve, x, uv, mask, weights, use_reentrant=False, preserve_rng_state=False)
    else:
        out = convolve(x, uv, mask, weights)
    if bias is not None:
        out = out + bias.to(out.dtype)
    return out.view(B, h, w, -1).permute(0, 3, 1, 2)  # channels last in memory


def _places(offset, rows, columns, stride, padding):
    """Where each tap looks, in cells: (B, h, w, k, 2), right and then down."""
    h, w = offset.shape[2:]
    count = lambda n: torch.arange(n, device=offset.device, dtype=offset.dtype)
    down = (stride * count(h) - padding)[:, None, None] + count(rows).repeat_interleave(columns)  # (h, 1, k)
    right = (stride * count(w) - padding)[:, None] + count(columns).repeat(rows)  # (w, k)
    further = offset.unflatten(1, (-1, 2)).permute(0, 3, 4, 1, 2)  # (B, h, w, k, 2), down and then right
    return torch.stack([right + further[..., 1], down + further[..., 0]], -1)


class DeformConv2d(nn.Conv2d):
    """A square convolution that makes offsets and masks of its input itself, by another convolution, `conv_offset`.

    That one starts at zero: offsets of 0, and masks of sigmoid(0) = .5, as in mmcv. So an untrained layer answers half
    of what the plain convolution would; the normalisation behind it takes that away.
    """

    def __init__(self, cin, cout, size, stride=1, padding=0, bias=True):
        super().__init__(cin, cout, size, stride, padding, bias=bias)
        self.conv_offset = nn.Conv2d(cin, 3 * size * size, size, stride, padding)
        self.start_plain()

    def start_plain(self):
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            made = self.conv_offset(x.to(self.conv_offset.weight.dtype))
        taps = made.shape[1] // 3
        offset, mask = made[:, : 2 * taps], made[:, 2 * taps :].sigmoid()
        return deform_conv2d(x, offset, mask, self.weight, self.bias, self.stride[0], self.padding[0])
