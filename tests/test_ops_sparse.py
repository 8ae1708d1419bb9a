"""ops_sparse.py against conv3d on the dense grid, in float64: active cells, outputs, gradients; corners, two frames."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU

import ops_sparse as sparse
from ops_sparse import Grid, Window

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"
IMPLS = ["pairs", "gemm"]

HALF = Window((3, 3, 3), (2, 2, 2), (1, 1, 1))
HALF_FLAT = Window((3, 3, 3), (2, 2, 2), (0, 1, 1))
TALL = Window((3, 1, 1), (2, 1, 1), (0, 0, 0))
WINDOWS = {
    "submanifold": None,
    "half": HALF,
    "half, padding (0, 1, 1)": HALF_FLAT,
    "tall": TALL,
    "stride 1": Window((3, 3, 3), (1, 1, 1), (1, 1, 1)),
    "stride 1, no padding": Window((3, 3, 3), (1, 1, 1), (0, 0, 0)),
    "even kernel": Window((2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "gaps between windows": Window((1, 2, 1), (2, 3, 2), (0, 0, 0)),
    "uneven": Window((3, 2, 5), (1, 3, 2), (1, 0, 2)),
}
SIZES = [(5, 7, 6), (4, 5, 9), (3, 3, 5)]
DENSITIES = [0.05, 0.5, 1.0]  # at 1.0 whatever leaks into the next row, plane or frame meets a voxel there


def active_cells(shape, frames=2, density=0.2, seed=0):
    """(frames, D, H, W) bool: at random, and in every corner of every frame."""
    active = torch.rand(frames, *shape, generator=torch.Generator().manual_seed(seed)) < density
    for z in (0, -1):
        for y in (0, -1):
            active[:, z, y, 0] = active[:, z, y, -1] = True
    return active.to(DEVICE)


def keys_of(active):
    """Active cells, in the order of their keys."""
    return Grid(tuple(active.shape[1:])).encode(*active.nonzero().unbind(1))


def table_of(active, window):
    """-> the layer's table, and its window's counterpart in conv3d."""
    keys, grid = keys_of(active), Grid(tuple(active.shape[1:]))
    if window is None:
        return sparse.submanifold_table(keys, grid), active, Window((3, 3, 3), (1, 1, 1), (1, 1, 1))
    out_keys = sparse.pyramid_keys(keys, grid, [window])[1]
    ones = torch.ones(1, 1, *window.kernel, device=DEVICE)
    reached = F.conv3d(active[:, None].float(), ones, stride=window.stride, padding=window.padding)[:, 0] > 0.5
    return sparse.strided_table(keys, grid, out_keys, window), reached, window


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).to(DEVICE)


def dense_conv(x, weight, active, reached, window):
    """The same layer by conv3d: rows x of the active cells -> rows of the cells reached."""
    dense = x.new_zeros(*active.shape, x.shape[1])
    dense[active] = x
    out = F.conv3d(
        dense.permute(0, 4, 1, 2, 3), weight.permute(4, 3, 0, 1, 2), stride=window.stride, padding=window.padding
    )
    return out.permute(0, 2, 3, 4, 1)[reached]


# ---------------------------------------------------------------------------------------------------------------------
# Against the dense grid


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("density", DENSITIES)
def test_active_cells_are_those_whose_window_holds_one(shape, window, density):
    active = active_cells(shape, density=density)
    _, reached, _ = table_of(active, window)
    grid = Grid(shape)
    if window is not None:
        out_keys = sparse.pyramid_keys(keys_of(active), grid, [window])[1]
        assert grid.after(window).shape == reached.shape[1:]
        assert torch.equal(out_keys, keys_of(reached))


def with_gradients(layer, x, weight, g, *rest):
    """-> output, gradient of x, gradient of weight."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    out = layer(*leaves, *rest)
    return out, *torch.autograd.grad(out, leaves, g.to(out.dtype))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels", [(2, 5), (5, 2)])  # gather first, product first
@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_equals_conv3d(window, channels, impl):
    for shape, density in itertools.product(SIZES, DENSITIES):
        active = active_cells(shape, density=density)
        table, reached, dense_window = table_of(active, window)
        x, weight = random(int(active.sum()), channels[0]), random(*dense_window.kernel, *channels, seed=1)
        g = random(int(reached.sum()), channels[1], seed=2)
        expected = with_gradients(dense_conv, x, weight, g, active, reached, dense_window)
        for dense, ours in zip(expected, with_gradients(sparse.sparse_conv, x, weight, g, table, impl)):
            assert dense.shape == ours.shape
            assert (dense - ours).abs().max() < 1e-12


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels", [(1, 2), (2, 1)])
@pytest.mark.parametrize("window", [None, HALF_FLAT])
def test_gradcheck(window, channels, impl):
    table, _, dense_window = table_of(active_cells((3, 3, 4), density=0.2), window)
    x = random(table.outputs.shape[1], channels[0])
    weight = random(*dense_window.kernel, *channels, seed=1)
    for wanted in ((True, True), (True, False), (False, True)):
        inputs = [t.clone().requires_grad_(w) for t, w in zip((x, weight), wanted)]
        assert torch.autograd.gradcheck(lambda x, w: sparse.sparse_conv(x, w, table, impl), inputs)


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_a_table_and_its_transpose_hold_the_same_pairs(window):
    table, _, _ = table_of(active_cells((5, 7, 6), density=0.3), window)
    (K, M), N = table.inputs.shape, table.outputs.shape[1]
    forward = {(k, int(i), o) for k in range(K) for o, i in enumerate(table.inputs[k]) if i < N}
    backward = {(k, i, int(o)) for k in range(K) for i, o in enumerate(table.outputs[k]) if o < M}
    listed = {(k, int(i), int(o)) for k, inputs, outputs in table.pairs for i, o in zip(inputs, outputs)}
    if table.centre is not None:
        listed |= {(table.centre, i, i) for i in range(M)}
    assert forward == backward == listed


def test_far_away_is_as_near_by():
    """The far corner of Waymo's grid, frame 30 of a batch: keys beyond 32 bits."""
    near, far = Grid((5, 6, 7)), Grid((61, 1280, 1920))
    corner = torch.tensor([30, 56, 1274, 1913], device=DEVICE)
    cells = active_cells(near.shape, frames=1, density=0.4).nonzero()
    near_keys, far_keys = near.encode(*cells.unbind(1)), far.encode(*(cells + corner).unbind(1))
    assert far_keys.min() > 2**32
    assert torch.equal(torch.stack(far.decode(far_keys), 1), cells + corner)
    assert torch.equal(sparse.submanifold_table(near_keys, near).inputs, sparse.submanifold_table(far_keys, far).inputs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("channels", [(40, 48), (48, 40)])
def test_bfloat16_is_as_exact_as_conv3d(channels, impl):
    """Under autocast, against float64: at most twice the error of torch's own; weights get float32 gradients."""
    active = active_cells((5, 7, 6), density=0.8)
    table, _, window = table_of(active, None)
    x, weight = random(table.outputs.shape[1], channels[0]), random(3, 3, 3, *channels, seed=1)
    g = random(len(x), channels[1], seed=2)
    exact = with_gradients(dense_conv, x, weight, g, active, active, window)
    with torch.autocast(DEVICE, torch.bfloat16):
        dense = with_gradients(dense_conv, x.float(), weight.float(), g, active, active, window)
        ours = with_gradients(sparse.sparse_conv, x.float(), weight.float(), g, table, impl)
    assert [t.dtype for t in ours] == [torch.bfloat16, torch.float32, torch.float32]
    for a, b, c in zip(exact, dense, ours):
        assert (c.double() - a).norm() <= 2 * (b.double() - a).norm()


def test_sizes_that_disagree_are_one_line():
    table, _, _ = table_of(active_cells((3, 3, 3)), None)
    x, weight = random(table.outputs.shape[1], 4), random(3, 3, 3, 4, 2)
    for args in (
        (x[1:], weight, table),
        (x[:, 1:], weight, table),
        (x, weight[1:], table),
        (x, weight, table, "dense"),
    ):
        with pytest.raises(ValueError, match="fit a table|impl is"):
            sparse.sparse_conv(*args)
    with pytest.raises(ValueError, match="no cells"):
        Grid((2, 9, 9)).after(TALL)


# ---------------------------------------------------------------------------------------------------------------------
# Points, frames, stages

START, SIZE, GRID = (0, -4, -3), (0.5, 0.25, 0.25), Grid((17, 32, 16))
STAGES = [HALF, HALF_FLAT, TALL]


def cloud(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).uniform((0, -4, -3), (8, 4, 1), (n, 3)).astype(np.float32)).to(
        DEVICE
    )


def voxels(*clouds):
    """-> keys, rows, the frame of each point."""
    frame = torch.repeat_interleave(torch.arange(len(clouds)), torch.tensor([len(points) for points in clouds])).to(
        DEVICE
    )
    return *sparse.voxelize(torch.cat(clouds), frame, START, SIZE, GRID), frame


def test_voxels_hold_their_points_in_any_order():
    clouds = [cloud(100), cloud(150, seed=1)]
    keys, rows, frame = voxels(*clouds)
    xyz = torch.cat(clouds)
    cells = np.floor((xyz.cpu().numpy() - START) / SIZE).astype(int)
    expected = np.c_[frame.cpu().numpy(), cells[:, ::-1]]
    found = torch.stack(GRID.decode(keys), 1)
    assert np.array_equal(found[rows].cpu().numpy(), expected)
    assert np.array_equal(found.cpu().numpy(), np.unique(expected, axis=0))

    order = torch.randperm(250, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    keys_again, rows_again = sparse.voxelize(xyz[order], frame[order], START, SIZE, GRID)
    assert torch.equal(keys, keys_again) and torch.equal(rows[order], rows_again)


def test_a_point_on_the_edge_of_the_range_stays_in_the_grid():
    xyz = torch.tensor([[70.39999, 39.999999, 0.9999999], [0, -40, -3]], device=DEVICE)
    grid = Grid((40, 1600, 1408))
    keys, rows = sparse.voxelize(xyz, torch.tensor([0, 0], device=DEVICE), (0, -40, -3), (0.05, 0.05, 0.1), grid)
    assert torch.stack(grid.decode(keys), 1)[rows].tolist() == [[0, 39, 1599, 1407], [0, 0, 0, 0]]


def test_frames_done_one_by_one_are_the_batch():
    clouds = [cloud(40, seed=1), cloud(0), cloud(60, seed=2), cloud(1, seed=3)]
    keys, rows, _ = voxels(*clouds)
    stages = sparse.pyramid_keys(keys, GRID, STAGES)
    levels = sparse.pyramid(stages, GRID, STAGES)
    assert [level.grid.shape for level in levels] == [(17, 32, 16), (9, 16, 8), (4, 8, 4), (1, 8, 4)]
    alone = [voxels(points) for points in clouds]
    before = np.cumsum([0] + [len(own) for own, _, _ in alone])
    assert torch.equal(rows, torch.cat([own_rows + int(n) for (_, own_rows, _), n in zip(alone, before)]))
    by_frame = [sparse.pyramid_keys(own, GRID, STAGES) for own, _, _ in alone]
    for level, frames in zip(levels, zip(*by_frame)):
        assert torch.equal(level.keys, sparse.batch_keys(frames, level.grid))


class Encoder(torch.nn.Module):
    """One submanifold and one strided layer a stage, to a dense map: (B, C, D, H, W)."""

    def __init__(self, impl="auto"):
        super().__init__()
        widths = [(4, 8), (8, 12), (12, 8)]
        self.around = torch.nn.ModuleList([sparse.SparseBlock(a, a, impl=impl) for a, _ in widths])
        self.down = torch.nn.ModuleList(
            [sparse.SparseBlock(a, b, w.kernel, impl=impl) for (a, b), w in zip(widths, STAGES)]
        )

    def forward(self, points, rows, stages, frames):
        levels = sparse.pyramid(stages, GRID, STAGES)
        x = points.new_zeros(len(stages[0]), 4).index_add(0, rows, points)
        for around, down, level in zip(self.around, self.down, levels):
            x = down(around(x, level.around), level.down)
        return sparse.to_dense(x, levels[-1].keys, levels[-1].grid, frames)


def encode(encoder, *clouds):
    keys, rows, _ = voxels(*clouds)
    points = torch.cat([torch.cat([xyz, xyz[:, :1] * 0 + 1], 1) for xyz in clouds])
    return encoder(points, rows, sparse.pyramid_keys(keys, GRID, STAGES), len(clouds))


def new_encoder(impl="auto"):
    torch.manual_seed(0)
    return Encoder(impl).to(DEVICE)


def test_a_frame_is_the_same_in_any_company():
    """Alone, beside others, beside an empty frame; through either formulation."""
    a, b, nothing = cloud(80, seed=1), cloud(50, seed=2), cloud(0)
    pairs, gemm = new_encoder("pairs").eval(), new_encoder("gemm").eval()
    together = encode(pairs, a, nothing, b)
    assert together.shape == (3, 8, 1, 8, 4) and together[1].eq(0).all() and together[0].ne(0).any()
    for frame, points in ((0, a), (2, b)):
        for encoder in (pairs, gemm):
            assert torch.allclose(encode(encoder, points)[0], together[frame], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("points", [0, 1])
def test_one_voxel_and_none_at_all(points, training, impl):
    """All parameters get a gradient (torchrun would wait for those without for ever), and no figure is spoilt."""
    encoder = new_encoder(impl).train(training)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    out = encode(encoder, cloud(0), cloud(points))
    out.sum().backward()
    assert out.shape == (2, 8, 1, 8, 4) and out[0].eq(0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in encoder.parameters())
    if points == 0:
        assert all(p.grad.eq(0).all() for p in encoder.parameters())
        assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_block_is_convolution_norm_relu():
    """Names and shapes of mmdetection3d's checkpoints; batch norm over the active voxels."""
    table, _, _ = table_of(active_cells((5, 7, 6)), HALF)
    block = sparse.SparseBlock(3, 4).double().to(DEVICE)
    shapes = {name: tuple(value.shape) for name, value in block.state_dict().items()}
    assert shapes.pop("0.weight") == (3, 3, 3, 3, 4) and shapes.pop("1.num_batches_tracked") == ()
    assert shapes == {f"1.{name}": (4,) for name in ("weight", "bias", "running_mean", "running_var")}
    x = random(table.outputs.shape[1], 3)
    rows = sparse.sparse_conv(x, block[0].weight, table)
    expected = (rows - rows.mean(0)) / (rows.var(0, unbiased=False) + 1e-3).sqrt()
    assert torch.allclose(block(x, table), expected.clamp(min=0))
    assert torch.allclose(block[1].running_mean, 0.01 * rows.mean(0))


def test_to_dense():
    active = active_cells((3, 4, 5), frames=3, density=0.4)
    active[1] = False
    x = random(int(active.sum()), 2).requires_grad_()
    dense = sparse.to_dense(x, keys_of(active), Grid((3, 4, 5)), 3)
    assert torch.equal(dense.permute(0, 2, 3, 4, 1)[active], x)
    assert dense.permute(0, 2, 3, 4, 1)[~active].eq(0).all() and dense.shape == (3, 2, 3, 4, 5)
    g = random(*dense.shape, seed=1)
    assert torch.equal(torch.autograd.grad(dense, x, g)[0], g.permute(0, 2, 3, 4, 1)[active])


def test_nothing_waits_once_keys_are_known(monkeypatch):
    """Tensors without memory have no values to wait for: a whole step runs on them, but counting cells cannot."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which the meta device does not know
    keys, rows, _ = voxels(cloud(80), cloud(50, seed=1))
    stages = [keys.to("meta") for keys in sparse.pyramid_keys(keys, GRID, STAGES)]
    out = Encoder().to("meta")(torch.empty(130, 4, device="meta"), rows.to("meta"), stages, frames=2)
    out.sum().backward()
    assert out.shape == (2, 8, 1, 8, 4)
    with pytest.raises((NotImplementedError, RuntimeError)):
        sparse.pyramid_keys(stages[0], GRID, STAGES)
