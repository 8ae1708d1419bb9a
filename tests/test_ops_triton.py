"""Every operation of ops_triton.py: kernel == torch == ten lines of numpy, index for index, awkward clouds included.

Without a GPU the kernels run in Triton's interpreter, hence the small odd shapes. With one they are compiled and run
there. The expected values marked "mmdetection3d" are those of its own op tests (v0.17.0,
tests/test_models/test_common_modules/test_pointnet_ops.py).
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import GPU, needs_gpu, needs_triton

import ops_triton as ops

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if GPU else "cpu"
tl, pick = ops.tl, ops._pick  # kernels of the tests see names of this file
PATHS = ["torch", "dense", pytest.param("triton", marks=needs_triton)]


# ---------------------------------------------------------------------------------------------------------------------
# Furthest point sampling


def furthest_oracle(points, m):
    """One cloud (N, D) -> (m,): float32, coordinate after coordinate."""
    nearest, picks = np.full(len(points), np.inf, np.float32), [0]
    while len(picks) < m:
        total = np.zeros(len(points), np.float32)
        for channel in points.T:
            difference = channel - channel[picks[-1]]
            total = total + difference * difference
        nearest = np.minimum(nearest, total)
        picks.append(int(np.flatnonzero(nearest == nearest.max())[0]))
    return picks


def furthest(path, points, m):
    """points (B, N, D) through one of the paths, D = 3 and D > 3 alike."""
    if path == "dense":
        return ops._furthest_dense(points, m)
    points = points.to(DEVICE if path == "triton" else "cpu")
    if points.shape[2] == 3:
        return ops.furthest_point_sample(points, m, impl=path).cpu()
    return ops.furthest_point_sample_features(points[..., :3], points[..., 3:], m, impl=path).cpu()


def rearranged(values, n):
    """(1, n + 1, D): the origin, then n points with the same coordinates, each in another order.

    All distances to the origin are equal but for how their sums round. One addition out of order, or one fused
    multiply-add, and another point is picked.
    """
    rng = np.random.default_rng(0)
    return np.stack([np.zeros_like(values)] + [rng.permutation(values) for _ in range(n)]).astype(np.float32)[None]


def awkward_clouds():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(3, 70, 3)).astype(np.float32)
    grid = np.stack(np.meshgrid(*[np.arange(4.0)] * 3), -1).reshape(1, -1, 3).astype(np.float32)
    return {
        "three clouds, N no power of two": (normal[:, :37] * [[[30, 20, 1]]], 20),
        "N = m": (normal[:1, :33], 33),
        "a full block": (normal[:1, :64], 64),
        "one point": (normal[:2, :1], 1),
        "two points": (normal[:2, :2], 2),
        "duplicates, more picks than places": (normal[:2, rng.integers(0, 5, 40)], 9),
        "all points equal": (np.broadcast_to(normal[:1, :1], (1, 19, 3)), 7),
        "a grid, ties everywhere": (grid[:, rng.permutation(64)], 40),
        "ties up to rounding": (rearranged(rng.normal(size=3), 50), 12),
    }


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", awkward_clouds())
def test_furthest_point_sample(name, path):
    cloud, m = awkward_clouds()[name]
    cloud = cloud.astype(np.float32)
    got = furthest(path, torch.from_numpy(cloud), m)
    assert got.dtype == torch.int64 and got.is_contiguous()
    assert got.tolist() == [furthest_oracle(c, m) for c in cloud]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "channels, n, m, scale", [(1, 37, 20, 1), (40, 45, 30, 0.02), (40, 45, 30, 1), (128, 21, 21, 5), (17, 2, 2, 1)]
)
def test_furthest_point_sample_features(channels, n, m, scale, path):
    """A small scale lets the torch path drop points on xyz alone, a large one makes it add every channel."""
    points = torch.randn(2, n, 3 + channels, generator=torch.Generator().manual_seed(channels))
    points[..., 3:] *= scale
    points[1, n // 2 :] = points[1, : n - n // 2].clone()  # the second cloud holds each point twice
    assert furthest(path, points, m).tolist() == [furthest_oracle(c, m) for c in points.numpy()]


@pytest.mark.parametrize("path", PATHS)
def test_features_are_added_in_channel_order(path):
    points = torch.from_numpy(rearranged(np.random.default_rng(1).normal(size=3 + 97), 60))
    assert furthest(path, points, 15).tolist() == [furthest_oracle(points[0].numpy(), 15)]


@pytest.mark.parametrize("path", PATHS)
def test_furthest_sampling_of_furthest_sampling_is_a_prefix(path):
    cloud = torch.rand(2, 50, 3, generator=torch.Generator().manual_seed(0))
    first = furthest(path, cloud, 30)
    again = furthest(path, cloud.gather(1, first[..., None].expand(-1, -1, 3)), 12)
    assert again.tolist() == [list(range(12))] * 2


# fmt: off
MMDET_CLOUDS = torch.tensor([
    [[-0.2748, 1.0020, -1.1674], [0.1015, 1.3952, -1.2681], [-0.8070, 2.4137, -0.5845],
     [-1.0001, 2.1982, -0.5859], [0.3841, 1.8983, -0.7431]],
    [[-1.0696, 3.0758, -0.1899], [-0.2559, 3.5521, -0.1402], [0.8164, 4.0081, -0.1839],
     [-1.1000, 3.0213, -0.8205], [-0.0518, 3.7251, -0.3950]],
])
# fmt: on


@pytest.mark.parametrize("path", PATHS)
def test_furthest_point_sample_as_in_mmdetection3d(path):
    expected = [[0, 2, 4], [0, 2, 1]]  # mmdetection3d's, from coordinates and from a matrix of distances
    assert furthest(path, MMDET_CLOUDS, 3).tolist() == expected
    assert furthest(path, F.pad(MMDET_CLOUDS, (0, 2)), 3).tolist() == expected  # two channels that are always 0


@pytest.mark.parametrize("path", PATHS)
def test_a_cloud_that_the_board_has_no_numbers_for(path):
    """More points than LAST_INDEX: one program has them all, and its picks may be any of them."""
    cloud = torch.zeros(1, ops.LAST_INDEX + 300, 3)
    cloud[0, -7, 0], cloud[0, 5, 1] = 2.0, 1.0
    for points in (cloud, F.pad(cloud, (0, 1))):
        assert furthest(path, points, 3).tolist() == [[0, cloud.shape[1] - 7, 5]]


def test_how_many_programs_share_a_cloud(monkeypatch):
    """All of them run at the same time, with enough points each and numbers that fit into the board's words."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(ops, "_multiprocessors", lambda device: 132)
    shared = lambda B, N, m, share: ops._parts(torch.empty(B, N, 3, device="meta"), m, share)
    assert [shared(B, 16384, 4096, 2048) for B in (1, 16, 17, 33, 66, 67, 500)] == [8, 8, 4, 4, 2, 1, 1]
    assert [shared(4, N, 9, 512) for N in (100, 1023, 1024, 4095, 4096)] == [1, 1, 2, 4, 8]
    assert [shared(1, 2**17 - 1, m, 2048) for m in (2**15 - 1, 2**15)] == [8, 1]
    assert shared(1, 2**17, 9, 2048) == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # one program after another: they would wait for ever
    assert shared(1, 16384, 4096, 2048) == 1


if ops.triton:

    @ops.jit
    def pick_of_two(distance, start, board, out):
        """What the first of two programs picks in round out[0], when the other's word is on the board."""
        n = tl.arange(0, 4)
        picked = pick(tl.load(distance + n), start + n, board, 0, tl.load(out), 2)
        tl.store(out, picked.to(tl.int64))


@needs_triton
@pytest.mark.parametrize(
    "start, mine, theirs, picked",
    [
        (0, [1.0, 3.0, 3.0, 2.0], (2.5, 6), 1),  # the first of equals
        (0, [1.0, 3.0, 3.0, 2.0], (3.0, 6), 1),  # a tie: the lower index
        (8, [1.0, 3.0, 3.0, 2.0], (3.0, 6), 6),
        (0, [1.0, 3.0, 3.0, 2.0], (float("inf"), 131070), 131070),
        (8, [-1.0] * 4, (0.0, 6), 6),  # padding alone
        (0, [0.0, 0.0, -1.0, -1.0], (0.0, 131071), 0),  # the other has padding alone
    ],
)
def test_two_programs_pick_one_point(start, mine, theirs, picked):
    distance, index = theirs
    bits = int(np.float32(distance).view(np.int32))
    board = torch.zeros(2, 2, dtype=torch.int64, device=DEVICE)
    board[1, 1] = (3 << 48) | (bits << 17) | (ops.LAST_INDEX - index)
    out = torch.tensor([3], device=DEVICE)
    pick_of_two[(1,)](torch.tensor(mine, device=DEVICE), start, board, out)
    assert out.tolist() == [picked]
    assert int(board[1, 0]) >> 48 == 3 and board[0].tolist() == [0, 0]


SHARED = [(1, 16385, 700), (16, 5000, 300), (40, 6000, 60), (3, 40000, 100), (1, 131071, 40), (1, 32768, 32767)]


@needs_gpu[1]
@pytest.mark.parametrize("B, N, m", SHARED)
def test_programs_that_share_a_cloud_agree(B, N, m):
    """Ties across programs, padding that fills the last of them, more picks than places."""
    cloud = torch.randn(B, N, 3, generator=torch.Generator().manual_seed(N))
    cloud[:, N // 2 :] = cloud[:, : N - N // 2].clone()
    cloud[-1] = cloud[-1, torch.arange(N) % 50]
    assert ops._parts(cloud.to(DEVICE), m, 2048) > 1
    for points in (cloud, torch.cat([cloud, 0.1 * cloud.repeat(1, 1, 5)], 2))[: 1 if m > 9999 else 2]:
        assert furthest("triton", points, m).equal(furthest("torch", points, m))


def test_features_of_any_float_type_and_layout():
    xyz, features = torch.randn(2, 30, 3), torch.randn(2, 8, 30).to(torch.bfloat16)
    want = ops.furthest_point_sample_features(xyz, features.transpose(1, 2).float().contiguous(), 9)
    strided = xyz.transpose(1, 2).contiguous().transpose(1, 2)
    got = ops.furthest_point_sample_features(strided, features.transpose(1, 2), 9)
    assert got.equal(want)


# ---------------------------------------------------------------------------------------------------------------------
# Ball query


def ball_oracle(points, centers, radius, k, min_radius):
    """One cloud, (N, 3) and (M, 3) -> M lists of k."""
    near, far = np.float32(min_radius) ** 2, np.float32(radius) ** 2
    balls = []
    for center in centers:
        x, y, z = ((center - points) ** 2).T
        d2 = (x + y) + z
        hits = np.flatnonzero((d2 == 0) | ((d2 >= near) & (d2 < far))).tolist()[:k]
        balls.append(hits + (hits[:1] or [0]) * (k - len(hits)))
    return balls


def ball(path, points, centers, radius, k, min_radius=0.0):
    if path == "dense":
        return ops._ball_dense(points, centers, radius, k, min_radius)
    device = DEVICE if path == "triton" else "cpu"
    return ops.ball_query(points.to(device), centers.to(device), radius, k, min_radius, impl=path).cpu()


SHELLS = [(0.8, 8, 0.0), (1.6, 8, 0.8), (0.05, 4, 0.0), (0.3, 3, 0.25)]
SHELLS += [(100.0, 5, 0.0), (100.0, 200, 0.0), (0.7, 1, 0.0), (1.0, 33, 0.1)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("radius, k, min_radius", SHELLS)
def test_ball_query(radius, k, min_radius, path):
    """Balls partly full, full, over-full, empty; k no power of two and above N; centres in the cloud and elsewhere."""
    cloud = torch.randn(3, 150, 3, generator=torch.Generator().manual_seed(0))
    cloud[1, 75:] = cloud[1, :75]  # the second cloud holds each point twice
    elsewhere = torch.randn(3, 9, 3, generator=torch.Generator().manual_seed(1))
    centers = torch.cat([cloud[:, :10], elsewhere, torch.full((3, 2, 3), 50.0)], 1)
    got = ball(path, cloud, centers, radius, k, min_radius)
    assert got.dtype == torch.int64 and got.is_contiguous()
    assert got.tolist() == [ball_oracle(p, c, radius, k, min_radius) for p, c in zip(cloud.numpy(), centers.numpy())]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("radius", [0.5, 0.2, 0.8, 3.3])
def test_ball_query_on_the_radius_itself(radius, path):
    """The inner radius belongs to the shell, the outer does not; both as float32 squares, beside their neighbours."""
    r = np.float32(radius)
    ladder = [np.float32(0), np.nextafter(r, np.float32(0)), r, np.nextafter(r, np.float32(9))]
    points = np.array([[[0, 0, d] for d in ladder] + [[d, 0, 0] for d in ladder]], np.float32)
    center = torch.zeros(1, 1, 3)
    assert ball(path, torch.from_numpy(points), center, radius, 5).tolist() == [[[0, 1, 4, 5, 0]]]
    assert ball(path, torch.from_numpy(points), center, 2 * radius, 8, radius).tolist() == [[[0, 2, 3, 4, 6, 7, 0, 0]]]


@pytest.mark.parametrize("path", PATHS)
def test_a_point_at_distance_0_counts_whatever_the_radius(path):
    cloud = torch.arange(8.0).repeat(3, 1).T[None].contiguous()
    cloud[0, 7] = cloud[0, 3]
    assert ball(path, cloud, cloud[:, 3:4], 1e-30, 3).tolist() == [[[3, 7, 3]]]  # the radius' square is 0


@pytest.mark.parametrize("path", PATHS)
def test_ball_query_adds_in_order(path):
    """Points on the very sphere are in or out by how their distance rounds: (x + y) + z, no fused multiply-adds."""
    points = np.random.default_rng(0).normal(size=(1, 300, 3))
    points = (0.8 * points / np.linalg.norm(points, axis=2, keepdims=True)).astype(np.float32)
    got = ball(path, torch.from_numpy(points), torch.zeros(1, 1, 3), 0.8, 300)
    assert got.tolist() == [ball_oracle(points[0], np.zeros((1, 3), np.float32), 0.8, 300, 0.0)]


@pytest.mark.parametrize("path", PATHS)
def test_ball_query_on_awkward_clouds(path):
    for cloud, _ in awkward_clouds().values():
        cloud = cloud.astype(np.float32)
        centers = cloud[:, ::3]
        got = ball(path, torch.from_numpy(cloud), torch.from_numpy(centers.copy()), 1.0, 6, 0.5)
        assert got.tolist() == [ball_oracle(p, c, 1.0, 6, 0.5) for p, c in zip(cloud, centers)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shells", [1, 2, 3])
def test_ball_shells_are_ball_queries(shells, path):
    """Around each other, and each with room of its own: balls empty, partly full and over-full, points held twice."""
    cloud = 0.5 * torch.randn(2, 300, 3, generator=torch.Generator().manual_seed(0))
    cloud[1, 150:] = cloud[1, :150]
    centers = torch.cat([cloud[:, :20], torch.full((2, 1, 3), 50.0)], 1)
    radii, ks = (0.2, 0.5, 2.0)[:shells], (4, 7, 33)[:shells]
    device = DEVICE if path == "triton" else "cpu"
    found = ops.ball_shells(cloud.to(device), centers.to(device), radii, ks, impl="torch" if path == "dense" else path)
    for idx, near, radius, k in zip(found, (0.0, *radii), radii, ks, strict=False):
        assert idx.is_contiguous()
        assert idx.equal(ball(path, cloud, centers, radius, k, near).to(device))
    assert len(found) == shells


@needs_triton
def test_counters_of_shells_do_not_run_into_each_other():
    """A point at distance 0 is in every shell: tiles that are all hits, in all three, and more than balls hold."""
    cloud, ks = torch.zeros(1, 700, 3, device=DEVICE), (5, 300, 700)
    for idx, k in zip(ops.ball_shells(cloud, cloud[:, :2], (1.0, 2.0, 3.0), ks, impl="triton"), ks):
        assert idx.tolist() == [[list(range(k))] * 2]


# fmt: off
MMDET_POINTS = torch.tensor([
    [[-0.0740, 1.3147, -1.3625], [0.5555, 1.0399, -1.3634], [-0.4003, 2.4666, -0.5116], [-0.5251, 2.4379, -0.8466],
     [-0.9691, 1.1418, -1.3733], [-0.2232, 0.9561, -1.3626], [-2.2769, 2.7817, -0.2334], [-0.2822, 1.3192, -1.3645],
     [0.1533, 1.5024, -1.0432], [0.4917, 1.1529, -1.3496]],
    [[-2.0289, 2.4952, -0.1708], [-0.7188, 0.9956, -0.5096], [-2.0668, 6.0278, -0.4875], [-1.9304, 3.3092, 0.6610],
     [0.0949, 1.4332, 0.3140], [-1.2879, 2.0008, -0.7791], [-0.7252, 0.9611, -0.6371], [0.4066, 1.4211, -0.2947],
     [0.3220, 1.4447, 0.3548], [-0.9744, 2.3856, -1.2000]],
])
# fmt: on


@pytest.mark.parametrize("path", PATHS)
def test_ball_query_as_in_mmdetection3d(path):
    points = MMDET_POINTS
    centers = torch.stack([points[0, [0, 6, 2, 0, 0]], points[1, [0, 2, 7, 0, 0]]])
    alone = [[[i] * 5 for i in (0, 6, 2, 0, 0)], [[i] * 5 for i in (0, 2, 7, 0, 0)]]
    assert ball(path, points, centers, 0.2, 5).tolist() == alone
    dilated = [[[0, 5, 7, 0, 0], [6] * 5, [2, 3, 2, 2, 2], [0, 5, 7, 0, 0], [0, 5, 7, 0, 0]], alone[1]]
    assert ball(path, points, centers, 0.4, 5, 0.2).tolist() == dilated


# ---------------------------------------------------------------------------------------------------------------------
# Bilinear sampling


def bilinear_oracle(feature_map, uv):
    """Written out, in the precision of its inputs, and differentiable; uv must be finite."""
    (B, _, H, W), out = feature_map.shape, 0
    padded = F.pad(feature_map, (3, 3, 3, 3))
    left, top = uv.detach().floor().unbind(2)
    for right in (0, 1):
        for below in (0, 1):
            weight_u = uv[..., 0] - left if right else left + 1 - uv[..., 0]
            weight_v = uv[..., 1] - top if below else top + 1 - uv[..., 1]
            column, row = (left + right).clamp(-3, W + 2).long() + 3, (top + below).clamp(-3, H + 2).long() + 3
            out = out + (weight_u * weight_v)[..., None] * padded[torch.arange(B)[:, None], :, row, column]
    return out


def awkward_places(H, W):
    """(39, 2): inside, outside, on cells, on and around every border."""
    inside = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([W + 3.0, H + 3.0]) - 2
    borders = [(0, 0), (W - 1, H - 1), (1, 2), (2, 1.5), (1.5, 0), (-0.5, 1), (W - 0.5, 1), (1, -0.25), (2, H - 0.75)]
    borders += [(-0.5, -0.5), (W - 0.5, H - 0.5), (-1, 1), (W, 1), (1, -1), (1, H)]
    beyond = [(-2, -2), (W + 1, H + 1), (1e9, 1), (-3e38, -1e20)]
    return torch.cat([inside, torch.tensor(borders + beyond)])


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a window of a larger map": lambda x: F.pad(x, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


def bilinear(path, feature_map, uv, grad):
    """(output, gradient of the map, gradient of uv), as float64 on the CPU."""
    device = DEVICE if path == "triton" else "cpu"
    feature_map, uv = feature_map.detach().to(device).requires_grad_(), uv.detach().to(device).requires_grad_()
    if path == "oracle":
        out = bilinear_oracle(feature_map, uv)
    else:
        out = ops.bilinear_sample(feature_map, uv, impl=path)
        assert out.dtype == feature_map.dtype and out.is_contiguous()
    grads = torch.autograd.grad(out, (feature_map, uv), grad.to(out))
    return [x.detach().double().cpu() for x in (out, *grads)]


@needs_triton
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 5, 4, 6), (1, 131, 3, 2), (3, 1, 1, 1)])
def test_bilinear_sample(shape, dtype, layout):
    """Both paths against float64, outputs and both gradients: the kernel's error is at most twice that of torch."""
    torch.manual_seed(0)
    B, C, H, W = shape
    feature_map = LAYOUTS[layout](torch.randn(shape).to(dtype))
    uv = awkward_places(H, W).expand(B, -1, -1)
    grad = torch.randn(B, uv.shape[1], C).to(dtype)
    exact = bilinear("oracle", feature_map.double(), uv.double(), grad)
    by_torch = bilinear("torch", feature_map, uv, grad)
    by_triton = bilinear("triton", feature_map, uv, grad)
    for name, want, plain, kernel in zip(("out", "map", "uv"), exact, by_torch, by_triton):
        rounding = (1e-6 if name == "uv" else torch.finfo(dtype).eps) * want.abs().max()
        assert (plain - want).abs().max() <= 2 * rounding, name
        assert (kernel - want).abs().max() <= 2 * (plain - want).abs().max() + rounding / 4, name


def test_bilinear_sample_agrees_with_grid_sample():
    torch.manual_seed(0)
    feature_map, uv = torch.randn(2, 7, 5, 8, dtype=torch.double), torch.rand(2, 50, 2, dtype=torch.double) * 11 - 2
    grid = uv / torch.tensor([7.0, 4.0], dtype=torch.double) * 2 - 1
    want = F.grid_sample(feature_map, grid[:, None], align_corners=True)[:, :, 0].transpose(1, 2)
    assert torch.allclose(ops.bilinear_sample(feature_map, uv), want, atol=1e-12)


def test_bilinear_sample_of_more_cells_than_float32_counts():
    feature_map = torch.arange(4099 * 4099).remainder(251).view(1, 1, 4099, 4099).to(torch.uint8).float()
    x = torch.tensor([0, 1, 4097, 4098])
    got = ops.bilinear_sample_torch(feature_map, torch.stack([x, torch.full_like(x, 4098)], 1)[None].float())
    assert torch.equal(got[0, :, 0], feature_map[0, 0, 4098, x])


def test_bilinear_sample_gradcheck():
    torch.manual_seed(0)
    feature_map = torch.randn(2, 3, 4, 5, dtype=torch.double, requires_grad=True)
    fraction = torch.rand(2, 9, 2, dtype=torch.double) * 0.8 + 0.1  # away from whole uv, where the slope jumps
    uv = (fraction + torch.randint(-2, 5, (2, 9, 2))).requires_grad_()
    assert torch.autograd.gradcheck(ops.bilinear_sample, (feature_map, uv))


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
def test_bilinear_sample_of_what_is_not_finite_is_zero(path):
    nan, inf = float("nan"), float("inf")
    uv = torch.tensor([[[nan, 1.0], [1.0, nan], [inf, 1.0], [1.0, -inf], [1.0, 1.0]]])
    out, to_map, to_uv = bilinear(path, torch.ones(1, 2, 3, 3), uv, torch.ones(1, 5, 2))
    assert out.tolist() == [[[0, 0]] * 4 + [[1, 1]]]
    assert to_map.sum() == 2 and not to_uv.any()


@needs_triton
@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_bilinear_sample_gradient_of_one_input(wanted):
    torch.manual_seed(0)
    values, places = torch.randn(1, 3, 4, 4), torch.rand(1, 6, 2) * 3
    both = bilinear("torch", values, places, torch.ones(1, 6, 3))[1:]
    inputs = [x.to(DEVICE).requires_grad_(w) for x, w in zip((values, places), wanted)]
    ops.bilinear_sample(*inputs, impl="triton").sum().backward()
    for x, w, want in zip(inputs, wanted, both):
        assert torch.allclose(x.grad.double().cpu(), want, atol=1e-5) if w else x.grad is None


# ---------------------------------------------------------------------------------------------------------------------
# Gather and max


def gather_max_oracle(features, idx, grad):
    """float64 numpy: group, take the first maximum, send each gradient where its value came from."""
    features, idx, grad = (x.detach().cpu().numpy() for x in (features.double(), idx, grad.double()))
    out, back = np.empty(grad.shape), np.zeros(features.shape)
    for b, m, c in np.ndindex(*grad.shape):
        group = features[b, idx[b, m], c]
        out[b, m, c] = group[group.argmax()]
        back[b, idx[b, m, group.argmax()], c] += grad[b, m, c]
    return torch.from_numpy(out), torch.from_numpy(back)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "N, C, M, k, ties",
    [(37, 70, 21, 6, False), (37, 5, 21, 9, True), (4, 3, 3, 300, True), (1, 1, 1, 1, False), (9, 2, 5, 1, False)],
)
def test_gather_max(N, C, M, k, ties, dtype, path):
    torch.manual_seed(0)
    features = (torch.randint(0, 3, (2, N, C)) if ties else torch.randn(2, N, C)).to(dtype)
    idx = torch.randint(0, N, (2, M, k))
    used = torch.randint(1, k + 1, (2, M, 1))
    idx = torch.where(torch.arange(k) < used, idx, idx[:, :, :1])  # padded as ball_query pads
    grad = torch.randn(2, M, C).to(dtype)
    want, want_grad = gather_max_oracle(features, idx, grad)
    if path == "dense":
        out, source = ops._gather_max_dense(features, idx)
        assert features.gather(1, source.long()).equal(out)
        assert source.equal(ops.gather_max_torch(features, idx)[1])
    else:
        device = DEVICE if path == "triton" else "cpu"
        leaf = features.to(device).requires_grad_()
        out = ops.gather_max(leaf, idx.to(device), impl=path)
        out.backward(grad.to(device))
        eps = torch.finfo(dtype).eps
        atol = 4 * eps if dtype == torch.float64 else 4 * max(eps, 1e-7)
        assert torch.allclose(leaf.grad.double().cpu(), want_grad, rtol=eps, atol=atol)
    assert out.dtype == dtype and out.is_contiguous()
    assert out.double().cpu().equal(want)  # a maximum does not round


def test_gather_max_is_grouped_max_pooling():
    torch.manual_seed(0)
    features = torch.randn(2, 40, 6, dtype=torch.double, requires_grad=True)
    idx = ops.ball_query(features[..., :3].float(), features[:, ::4, :3].float(), 1.0, 8)
    grouped = features[torch.arange(2)[:, None, None], idx]  # (2, 10, 8, 6)
    want, got = grouped.amax(2), ops.gather_max(features, idx)
    assert got.equal(want)
    weights = torch.randn_like(want)
    pooled = F.max_pool2d(grouped.permute(0, 3, 1, 2), (1, 8))[..., 0].transpose(1, 2)
    for a, b in zip(torch.autograd.grad(got, features, weights), torch.autograd.grad(pooled, features, weights)):
        assert torch.allclose(a, b, atol=1e-14)
    assert torch.autograd.gradcheck(lambda x: ops.gather_max(x, idx), features)


@pytest.mark.parametrize("path", PATHS)
def test_gather_max_lets_nan_through(path):
    features = torch.tensor([[[1.0], [float("nan")], [3.0]]])
    idx = torch.tensor([[[0, 1, 2], [2, 0, 0], [1, 2, 0]]])
    if path == "dense":
        out = ops._gather_max_dense(features, idx)[0]
    else:
        device = DEVICE if path == "triton" else "cpu"
        out = ops.gather_max(features.to(device), idx.to(device), impl=path).cpu()
    assert out[0, :, 0].isnan().tolist() == [True, False, True] and out[0, 1, 0] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Errors, and life without Triton


@pytest.mark.parametrize("path", ["torch", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("operation", ["bilinear_sample", "gather_max"])
def test_a_second_derivative_is_an_error(operation, path):
    """Silently, it would leave out that the first gradient depends on the inputs (a gradient penalty, 67 % off)."""
    device = DEVICE if path == "triton" else "cpu"
    if operation == "bilinear_sample":
        leaf = torch.rand(1, 3, 4, 5, device=device, requires_grad=True)
        out = ops.bilinear_sample(leaf, torch.rand(1, 6, 2, device=device), impl=path)
    else:
        leaf = torch.rand(1, 9, 3, device=device, requires_grad=True)
        out = ops.gather_max(leaf, torch.randint(0, 9, (1, 6, 4), device=device), impl=path)
    (grad,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|not implemented"):
        grad.square().sum().backward()


xyz, uv, image = torch.zeros(2, 9, 3), torch.zeros(2, 4, 2), torch.zeros(2, 5, 6, 7)
idx = torch.zeros(2, 4, 3, dtype=torch.int64)
ERRORS = {
    "m > N": (lambda: ops.furthest_point_sample(xyz, 10), "m = 10 of 9 points"),
    "m < 1": (lambda: ops.furthest_point_sample(xyz, 0), "m = 0"),
    "one cloud without a batch": (lambda: ops.furthest_point_sample(xyz[0], 2), r"expected \(B, N, 3\)"),
    "four columns": (lambda: ops.furthest_point_sample(torch.zeros(2, 9, 4), 2), r"xyz is \(2, 9, 4\)"),
    "no points": (lambda: ops.furthest_point_sample(xyz[:, :0], 1), "not empty"),
    "double clouds": (lambda: ops.furthest_point_sample(xyz.double(), 2), "expected torch.float32"),
    "no such impl": (lambda: ops.furthest_point_sample(xyz, 2, impl="cuda"), "impl is 'cuda'"),
    "features: m > N": (lambda: ops.furthest_point_sample_features(xyz, xyz, 10), "m = 10 of 9 points"),
    "features of another N": (
        lambda: ops.furthest_point_sample_features(xyz, xyz[:, 1:], 2),
        r"features are \(2, 8, 3\), expected \(B, N\) as in xyz \(2, 9, 3\)",
    ),
    "integer features": (lambda: ops.furthest_point_sample_features(xyz, xyz.long(), 2), "expected a float type"),
    "k < 1": (lambda: ops.ball_query(xyz, xyz, 1.0, 0), "k is 0"),
    "radii the wrong way round": (lambda: ops.ball_query(xyz, xyz, 1.0, 2, 1.5), "radii are 1.5 and 1.0"),
    "radius 0": (lambda: ops.ball_query(xyz, xyz, 0.0, 2), "radii"),
    "centres of another batch": (lambda: ops.ball_query(xyz, xyz[:1], 1.0, 2), r"centers are \(1, 9, 3\)"),
    "shells without k": (lambda: ops.ball_shells(xyz, xyz, (1.0, 2.0), (3,)), "expected as many of both"),
    "four shells": (lambda: ops.ball_shells(xyz, xyz, (1.0, 2.0, 3.0, 4.0), (1, 1, 1, 1)), "1 to 3"),
    "shells out of order": (lambda: ops.ball_shells(xyz, xyz, (2.0, 1.0), (3, 3)), "radii are 2.0 and 1.0"),
    "half centres": (lambda: ops.ball_query(xyz, xyz.half(), 1.0, 2), "centers are torch.float16"),
    "several devices": (lambda: ops.ball_query(xyz, xyz.to("meta"), 1.0, 2), "several devices"),
    "map without a batch": (lambda: ops.bilinear_sample(image[0], uv), "expected 4 dimensions"),
    "integer map": (lambda: ops.bilinear_sample(image.long(), uv), "expected a float type"),
    "uvw": (lambda: ops.bilinear_sample(image, xyz), r"uv is \(2, 9, 3\)"),
    "half uv": (lambda: ops.bilinear_sample(image.half(), uv.half()), "uv is torch.float16"),
    "double uv": (lambda: ops.bilinear_sample(image, uv.double()), "uv is torch.float64"),
    "int32 idx": (lambda: ops.gather_max(xyz, idx.int()), "expected torch.int64"),
    "flat idx": (lambda: ops.gather_max(xyz, idx[0]), r"idx is \(4, 3\)"),
    "idx of no places": (lambda: ops.gather_max(xyz, idx[:, :, :0]), "k > 0"),
    "idx of another batch": (lambda: ops.gather_max(xyz, idx[:1]), r"idx is \(1, 4, 3\)"),
    "idx too large": (lambda: ops.gather_max(xyz, idx + 9), "outside 0 .. 8"),
    "negative idx": (lambda: ops.gather_max(xyz, idx - 1), "outside 0 .. 8"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_input_is_one_line(case):
    call, message = ERRORS[case]
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def python(code):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "always", "-c", code]
    return subprocess.run(command, cwd=Path(ops.__file__).parent, env=env, capture_output=True, text=True)


def test_everything_but_the_kernels_works_without_triton():
    done = python("""
import sys; sys.modules["triton"] = None
import torch, types, ops_triton as ops
xyz = torch.rand(1, 20, 3)
centers = xyz[:, ops.furthest_point_sample(xyz, 4)[0]]
ops.furthest_point_sample_features(xyz, xyz, 4), ops.bilinear_sample(torch.rand(1, 2, 3, 3), xyz[..., :2])
ops.gather_max(xyz.requires_grad_(), ops.ball_query(xyz, centers, .5, 3)).sum().backward()
try: ops.furthest_point_sample(xyz, 4, impl="triton")
except ValueError as error: print(error)
on_gpu = types.SimpleNamespace(device=torch.device("cuda"))  # all that the choice of a path looks at
print([ops._use_triton("auto", on_gpu) for _ in range(3)])""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["impl='triton', but Triton is not installed", "[False, False, False]"]
    assert done.stderr.count("UserWarning: Triton is not installed") == 1


@needs_triton
def test_kernels_on_a_cpu_need_the_interpreter():
    done = python("import torch, ops_triton as ops; ops.furthest_point_sample(torch.rand(1, 20, 3), 4, impl='triton')")
    assert done.stderr.endswith("ValueError: impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got cpu\n")


# ---------------------------------------------------------------------------------------------------------------------
# A real cloud


@pytest.fixture(scope="module")
def street(kitti):
    """(1, 8192, 3), a KITTI sweep: many ground points, many near-equal distances."""
    first = min(kitti.glob("training/velodyne/*.bin"))
    sweep = np.fromfile(first, np.float32).reshape(-1, 4)[:, :3]
    sweep = sweep[((sweep > [0, -40, -3]) & (sweep < [70.4, 40, 1])).all(1)]
    return torch.from_numpy(np.random.default_rng(0).permutation(sweep)[:8192])[None]


def test_a_real_cloud_on_the_torch_path(street):
    picks = ops.furthest_point_sample(street, 512)
    assert picks.equal(ops._furthest_dense(street, 512)) and picks.tolist() == [furthest_oracle(street[0].numpy(), 512)]
    centers = street[:, picks[0]]
    assert ops.furthest_point_sample(centers, 512).tolist() == [list(range(512))]
    for near, far, k in ((0, 0.2, 32), (0.2, 0.4, 32), (0.4, 0.8, 64), (0.8, 1.6, 8)):
        got = ops.ball_query(street, centers, far, k, near)
        assert got.equal(ops._ball_dense(street, centers, far, k, near))
        assert got[:, :64].tolist() == [ball_oracle(street[0].numpy(), centers[0, :64].numpy(), far, k, near)]


@needs_triton
def test_a_real_cloud_through_the_kernels(street):
    n, m = (8192, 2048) if GPU else (1500, 100)
    cloud = street[:, :n]
    picks = furthest("triton", cloud, m)
    assert picks.equal(ops.furthest_point_sample(cloud, m))
    features = torch.randn(1, n, 8, generator=torch.Generator().manual_seed(0))
    by_kernel = furthest("triton", torch.cat([cloud, features], 2), 40)
    assert by_kernel.equal(ops.furthest_point_sample_features(cloud, features, 40))
    centers = cloud[:, picks[0]]
    assert ball("triton", cloud, centers, 0.8, 16, 0.4).equal(ops.ball_query(cloud, centers, 0.8, 16, 0.4))
