"""Sparse 3D convolution in plain torch, exact: submanifold and strided, on the voxels that hold something.

    Grid((D, H, W))                                cells; a cell of a batch is one int64 key
    voxelize(xyz, frame, start, size, grid)        (N, 3), (N,) -> keys (M,) and the row of each point (N,)
    pyramid_keys(keys, grid, windows)              -> the keys of all stages, [(M0,), (M1,), ...]
    batch_keys(keys of each frame, grid)           -> the keys of a batch, of frames that loading workers did singly
    pyramid(keys of all stages, grid, windows)     -> [Level]: who is whose neighbour, for every layer
    sparse_conv(x, weight, table)                  (N, C_in), (kd, kh, kw, C_in, C_out) -> (M, C_out)   differentiable
    SparseConv3d, SparseBlock                      the layer; the layer, batch norm, ReLU
    to_dense(x, keys, grid, frames)                (M, C) -> (frames, C, D, H, W)                       differentiable

A stage of an encoder, and the layer that leads to the next:

    grid, half = Grid((41, 1600, 1408)), Window((3, 3, 3), (2, 2, 2), (1, 1, 1))
    keys, rows = voxelize(xyz, frame, (0, -40, -3), (0.05, 0.05, 0.1), grid)
    first, second = pyramid(pyramid_keys(keys, grid, [half]), grid, [half])
    x = block2(block1(x, first.around), first.down)    # SparseBlock(16, 16), SparseBlock(16, 32)

What can be relied on:
- The result is that of `conv3d` on the dense grid, read at the active cells. A submanifold layer (`around`) keeps the
  active cells; a strided layer (`down`) makes every cell active whose window holds an active one, as spconv's do.
- Rows are in the order of their keys (frame, z, y, x), whatever the order of the points.
- Tables depend on coordinates alone. Only `voxelize` and `pyramid_keys` wait for the device, because they count; in
  loading workers they run on the CPU. All else knows its sizes beforehand, and waits only where impl="pairs" does.
- A frame without voxels, one voxel, no voxel at all: everything works on (0, C) too, and gradients are zeros, not None.
- In half precision and under autocast, sums are accumulated in float32.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# Cells and their keys


class Window(NamedTuple):
    """Of a strided layer, in cells (z, y, x)."""

    kernel: tuple
    stride: tuple
    padding: tuple


@dataclass(frozen=True)
class Grid:
    """Cells (D, H, W). Keys count a border of one cell on every side, too: so a neighbour's key is key + constant, and
    no neighbour is mistaken for a cell of the next row, plane or frame."""

    shape: tuple

    @property
    def strides(self):
        """Of the keys, for (frame, z, y, x)."""
        D, H, W = self.shape
        return (D + 2) * (H + 2) * (W + 2), (H + 2) * (W + 2), W + 2, 1

    def encode(self, frame, z, y, x):
        volume, plane, row, _ = self.strides
        return frame * volume + (z + 1) * plane + (y + 1) * row + (x + 1)

    def decode(self, keys):
        """(M,) -> frame, z, y, x, each (M,) int64."""
        volume, plane, row, _ = self.strides
        return keys // volume, keys % volume // plane - 1, keys % plane // row - 1, keys % row - 1

    def after(self, window):
        """The grid of a strided layer's output. ValueError where the window does not fit into this one."""
        shape = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(self.shape, *window))
        if min(shape) < 1:
            raise ValueError(f"{window} leaves no cells of a grid of {self.shape}")
        return Grid(shape)


def voxelize(xyz, frame, start, size, grid):
    """Dynamic voxelisation: every voxel that holds a point, every point of it; nothing is dropped or capped.

    xyz (N, 3) float32, metres; frame (N,) int64, which frame of the batch a point is in; start (x, y, z), the lower
    corner of the range, and size (x, y, z) of a voxel, metres. Returns keys (M,) int64, sorted, and the row of each
    point (N,) int64: `index_add` takes points to voxels, `x[rows]` takes them back. Cut points to the range before: one
    outside counts to the nearest voxel of the border.
    """
    cells = []
    for axis, cells_along in enumerate(grid.shape[::-1]):
        # Times 1 / size: a CPU and a GPU round a division differently. The clamp: in float32 39.999999 + 40 is 80.
        position = (xyz[:, axis] - start[axis]) * (1 / size[axis])
        cells.append(position.floor().long().clamp(0, cells_along - 1))
    x, y, z = cells
    return torch.unique(grid.encode(frame, z, y, x), return_inverse=True)


def pyramid_keys(keys, grid, windows):
    """keys (M0,) of the first stage's active cells, in `grid`; the windows of the strided layers between stages -> the
    keys of every stage, [(M0,), (M1,), ...] int64, sorted."""
    stages = [keys]
    for window in windows:
        outputs, _, inside = _windows_over(stages[-1], grid, window)
        stages.append(torch.unique(outputs[inside]))
        grid = grid.after(window)
    return stages


def batch_keys(frames, grid):
    """One stage's keys of several frames, each made with frame = 0 -> those of the batch (M,). A row of frame b becomes
    its own row plus the number of keys of the frames before it."""
    return torch.cat([keys + b * grid.strides[0] for b, keys in enumerate(frames)])


def to_dense(x, keys, grid, frames):
    """x (M, C) at keys (M,) -> (frames, C, D, H, W), zero elsewhere; channels lie innermost in memory."""
    D, H, W = grid.shape
    frame, z, y, x_cell = grid.decode(keys)
    cell = ((frame * D + z) * H + y) * W + x_cell
    dense = x.new_zeros(frames * D * H * W, x.shape[1]).index_copy(0, cell, x)
    return dense.view(frames, D, H, W, -1).permute(0, 4, 1, 2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Who is whose neighbour


@dataclass(eq=False)
class Table:
    """The neighbours that one layer needs, or several: submanifold layers of a stage share theirs.

    kernel (kd, kh, kw); K = kd * kh * kw cells, x fastest.
    inputs (K, M) int32: for each kernel cell and output row the input row, N where there is none.
    outputs (K, N) int32, the transpose: for each kernel cell and input row the output row that takes it, or M.
    centre: the kernel cell at which each output row takes the input row of the same number, or None.
    """

    kernel: tuple
    inputs: torch.Tensor
    outputs: torch.Tensor
    centre: int | None

    @cached_property
    def pairs(self):
        """[(kernel cell, input rows, output rows)] of all kernel cells but the centre. Waits for the device."""
        hit = self.inputs < self.outputs.shape[1]
        if self.centre is not None:
            hit[self.centre] = False
        flat = hit.flatten().nonzero().squeeze(1)
        counts = hit.sum(1).tolist()
        inputs = self.inputs.flatten().index_select(0, flat).long()  # index_add_ is twice as slow with int32
        by_cell = enumerate(zip(inputs.split(counts), flat.split(counts)))
        return [(k, i, o - k * hit.shape[1]) for k, (i, o) in by_cell if len(o)]

    @cached_property
    def input_rows(self):
        """(M * K,): the inputs of the first output row, of the second, ..."""
        return self.inputs.t().flatten()

    @cached_property
    def output_rows(self):
        """(N * K,): the outputs of the first input row, of the second, ..."""
        return self.outputs.t().flatten()


class Level(NamedTuple):
    """A stage: its active cells, the table of its submanifold layers, that of the strided layer to the next stage. The
    last stage has neither."""

    keys: torch.Tensor
    grid: Grid
    around: Table | None
    down: Table | None


def pyramid(stages, grid, windows):
    """All tables of an encoder: the keys of pyramid_keys, on any device -> [Level], one for each. Never waits."""
    levels = []
    for keys, next_keys, window in zip(stages, stages[1:], windows):
        levels.append(Level(keys, grid, submanifold_table(keys, grid), strided_table(keys, grid, next_keys, window)))
        grid = grid.after(window)
    return levels + [Level(stages[-1], grid, None, None)]


def submanifold_table(keys, grid):
    """The 3 x 3 x 3 neighbours of keys (M,) among themselves."""
    M, (_, plane, row, _) = len(keys), grid.strides
    # One column more, for what belongs nowhere.
    inputs = torch.full((27, M + 1), M, dtype=torch.int32, device=keys.device)
    me = torch.arange(M, dtype=torch.int32, device=keys.device)
    inputs[13, :M] = me
    # Half of the kernel, a row of three cells at a time. The other half is the same pairs, seen from the other side.
    for first, step, run in ((0, -plane - row, 3), (3, -plane, 3), (6, -plane + row, 3), (9, -row, 3), (12, 0, 1)):
        for cell, found in enumerate(_find(keys, keys + (step - 1), run), start=first):
            inputs[cell, :M] = found
            inputs[26 - cell, found] = me
    inputs = inputs[:, :M].contiguous()
    return Table((3, 3, 3), inputs, inputs.flip(0), centre=13)


def strided_table(keys, grid, out_keys, window):
    """The neighbours of a strided layer from keys (N,) in `grid` to out_keys (M,), those of pyramid_keys."""
    N, M, K = len(keys), len(out_keys), math.prod(window.kernel)
    outputs, cell, inside = _windows_over(keys, grid, window)  # (z, y, x, N) each
    found = torch.stack(_find(out_keys, outputs[:, :, 0].contiguous(), outputs.shape[2]), 2)
    nowhere = ~inside | (found == M)
    me = torch.arange(N, device=keys.device).expand_as(found)
    # One element more, for what belongs nowhere. torch.where would copy its number to the device, and wait.
    to_out = torch.full((K * N + 1,), M, dtype=torch.int32, device=keys.device)
    to_out[(cell * N + me).masked_fill(nowhere, K * N)] = found.int()
    to_in = torch.full((K * M + 1,), N, dtype=torch.int32, device=keys.device)
    to_in[(cell * M + found).masked_fill(nowhere, K * M)] = me.int()
    return Table(window.kernel, to_in[:-1].view(K, M), to_out[:-1].view(K, N), centre=None)


def _windows_over(keys, grid, window):
    """The few windows that hold each cell: at stride 2 and kernel 3, at most two along each axis. Returns, (z, y, x, N)
    each: the window's key in the next grid, along x one more each time; the kernel cell that lies on ours; whether
    there is such a window at all."""
    frame, *cells = grid.decode(keys)
    outer = grid.after(window)
    positions, kernel_cells, inside = [], [], []
    for axis, (cell, size, kernel, stride, padding) in enumerate(zip(cells, outer.shape, *window)):
        shape = [1, 1, 1, -1]
        shape[axis] = -(-kernel // stride)
        back = torch.arange(shape[axis] - 1, -1, -1, device=keys.device)[:, None]
        position = (cell + padding) // stride - back
        kernel_cell = (cell + padding) - stride * position
        positions.append(position.view(shape))
        kernel_cells.append(kernel_cell.view(shape))
        inside.append(((kernel_cell < kernel) & (position >= 0) & (position < size)).view(shape))
    z, y, x = kernel_cells
    cell = (z * window.kernel[1] + y) * window.kernel[2] + x
    return outer.encode(frame, *positions), cell, inside[0] & inside[1] & inside[2]


def _find(keys, first, run):
    """The rows of first, first + 1, ..., first + run - 1 among keys (M,), M for those that are not there. One search
    serves them all: the keys are sorted, so what follows a key by one can only be in the next row."""
    row = torch.searchsorted(keys, first)
    guarded = torch.cat([keys, keys.new_full((1,), torch.iinfo(torch.int64).min)])
    rows = []
    for step in range(run):
        hit = guarded[row] == first + step
        rows.append(row.masked_fill(~hit, len(keys)))
        row = row + hit
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# The convolution


def sparse_conv(x, weight, table, impl="auto"):
    """x (N, C_in) of any float type, weight (kd, kh, kw, C_in, C_out) -> (M, C_out) of the type of x, or of autocast.

    impl "pairs": for each kernel cell, only the pairs there are; 2 to 12 times less arithmetic; waits for the device
    once per table. impl "gemm": one gather and one matrix product for all kernel cells; never waits, gives the same
    bits each time (no atomics), takes memory for K C numbers per row. "auto" is pairs on a CPU, gemm elsewhere.
    ValueError where sizes disagree.
    """
    if impl not in ("auto", "pairs", "gemm"):
        raise ValueError(f"impl is {impl!r}, expected 'auto', 'pairs' or 'gemm'")
    rows = table.outputs.shape[1]
    if x.shape != (rows, weight.shape[3]) or weight.shape[:3] != table.kernel:
        shapes = f"x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes} do not fit a table of {rows} rows and kernel {table.kernel}")
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    pairs = impl == "pairs" or (impl == "auto" and x.device.type == "cpu")
    return (_Pairs if pairs else _Gemm).apply(x, weight.flatten(0, 2), table)


class _Pairs(torch.autograd.Function):
    """For each kernel cell k and its pairs (i, o): out[o] += x[i] @ W[k]. No row is twice in an i, nor in an o."""

    @staticmethod
    def forward(ctx, x, weight, table):
        ctx.save_for_backward(x, weight)
        ctx.table = table
        out = _sums(x, weight, table.centre, table.inputs.shape[1])
        for k, i, o in table.pairs:
            out.index_add_(0, o, (x.index_select(0, i) @ weight[k]).to(out.dtype))
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, weight), table = ctx.saved_tensors, ctx.table
        gx = _sums(g, weight.transpose(1, 2), table.centre, len(x))
        gw = torch.zeros_like(weight)
        if table.centre is not None:
            gw[table.centre] = x.t() @ g
        for k, i, o in table.pairs:
            rows = g.index_select(0, o)
            gw[k] = x.index_select(0, i).t() @ rows
            gx.index_add_(0, i, (rows @ weight[k].t()).to(gx.dtype))
        return gx.to(x.dtype), gw, None


def _sums(x, weight, centre, rows):
    """What the pairs' products are added to, in float32 at least: the centre's products, or zeros."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if centre is None:
        return x.new_zeros(rows, weight.shape[2], dtype=dtype)
    return (x @ weight[centre]).to(dtype)


class _Gemm(torch.autograd.Function):
    """All kernel cells in one matrix product: after the gather, or before it where that gathers less."""

    @staticmethod
    def forward(ctx, x, weight, table):
        ctx.save_for_backward(x, weight)
        ctx.table = table
        K, C_in, C_out = weight.shape
        if C_out >= C_in:
            return _gather(x, table.input_rows, K) @ weight.flatten(0, 1)
        # (N + 1, K * C_out): each row's K products, then added up, in float32, where they are wanted
        products = _padded(x) @ weight.transpose(0, 1).flatten(1)
        rows = table.input_rows.view(-1, K) * K + torch.arange(K, dtype=torch.int32, device=x.device)
        return F.embedding_bag(rows, products.view(-1, C_out), mode="sum")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, weight), table = ctx.saved_tensors, ctx.table
        K, C_in, C_out = weight.shape
        columns = _gather(g, table.output_rows, K)  # (N, K * C_out): for both gradients
        gx = columns @ weight.transpose(1, 2).flatten(0, 1) if ctx.needs_input_grad[0] else None
        gw = (x.t() @ columns).view(C_in, K, C_out).transpose(0, 1)
        return gx, gw, None


def _padded(x):
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


def _gather(x, rows, K):
    """(N, C), (M * K,) -> (M, K * C); zeros where there is no neighbour."""
    return _padded(x).index_select(0, rows).view(len(rows) // K, K * x.shape[1])


# ---------------------------------------------------------------------------------------------------------------------
# Layers


class SparseConv3d(nn.Module):
    """A sparse convolution without bias; the table given to it decides whether it is submanifold or strided.

    weight (kd, kh, kw, C_in, C_out), as spconv 1.x stores it, so that mmdetection3d's checkpoints load. It is drawn as
    nn.Conv3d's is.
    """

    def __init__(self, in_channels, out_channels, kernel=(3, 3, 3), impl="auto"):
        super().__init__()
        self.impl = impl
        self.weight = nn.Parameter(torch.empty(*kernel, in_channels, out_channels))
        bound = (in_channels * math.prod(kernel)) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, x, table):
        return sparse_conv(x, self.weight, table, self.impl)


class SparseBlock(nn.Sequential):
    """Convolution, batch norm, ReLU: x (N, C_in) -> (M, C_out). Parameters are 0.weight, 1.weight, ... as mmdetection3d
    calls them.

    One voxel has no variance: with fewer than two rows, training uses the running figures and leaves them as they are.
    Each rank decides this alone, so the norm must not be turned into a SyncBatchNorm.
    """

    def __init__(self, in_channels, out_channels, kernel=(3, 3, 3), eps=1e-3, momentum=0.01, impl="auto"):
        conv = SparseConv3d(in_channels, out_channels, kernel, impl)
        super().__init__(conv, nn.BatchNorm1d(out_channels, eps, momentum))

    def forward(self, x, table):
        conv, norm = self
        x = conv(x, table)
        if norm.training and len(x) < 2:
            x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
        else:
            x = norm(x)
        return F.relu(x)
