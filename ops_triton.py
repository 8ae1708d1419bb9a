"""The point and pixel operations of SimIPU, each as a Triton kernel beside a plain torch reference.

    furthest_point_sample(xyz, m)                      (B, N, 3)            -> (B, m) int64
    furthest_point_sample_features(xyz, features, m)   (B, N, 3), (B, N, C) -> (B, m) int64
    ball_query(xyz, centers, radius, k, min_radius)    (B, N, 3), (B, M, 3) -> (B, M, k) int64
    ball_shells(xyz, centers, radii, ks)               the same of shells around each other: a list
    bilinear_sample(feature_map, uv)                   (B, C, H, W), (B, N, 2) -> (B, N, C)   differentiable
    gather_max(features, idx)                          (B, N, C), (B, M, k) -> (B, M, C)      differentiable

Every function takes impl="auto" | "triton" | "torch". "auto" is Triton for CUDA tensors and torch for all others. Where
Triton is not installed it is torch everywhere, with one warning. Triton needs no compiler of yours: kernels are built
on first use (a second or so each) and cached. `TRITON_INTERPRET=1` runs the same kernels, slowly, on the CPU; the tests
do this. Only that several programs share a cloud takes a GPU.

What can be relied on:
- The three sampling operations return the same integers on every path, bit for bit. Distances are float32 differences,
  squared and added in one fixed order (x, y, z, then channel 0, 1, ...). They are never |a|^2 + |b|^2 - 2ab, and no
  multiply-adds are fused.
- No operation waits for the device, so all of them can run on a side stream ahead of the step.
- Inputs may be strided in any way. Coordinates must be finite. Outputs are contiguous.
- Wrong input raises a ValueError of one line. Gradients are not differentiable: to try is a RuntimeError.
- On a CPU the torch path is meant for training, not only for tests: ops_cpu.py.
"""

import os
import warnings
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

import ops_cpu

try:
    import triton
    import triton.language as tl
except ImportError:  # the kernels below stay plain, uncalled functions
    triton, tl = None, SimpleNamespace(constexpr=None)

# ---------------------------------------------------------------------------------------------------------------------
# What the operations share


def jit(kernel):
    return triton.jit(kernel) if triton else kernel


def _launch(kernel, grid, *args, **meta):
    # A fused multiply-add rounds once where torch rounds twice. One tie decided otherwise changes all picks after it.
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, enable_fp_fusion=False, **meta)


@cache
def _warn_without_triton():
    slow = "which launches several kernels per sampled point: a training step takes seconds instead of milliseconds"
    warnings.warn(f"Triton is not installed: point operations on this GPU fall back to torch, {slow}", stacklevel=4)


def _use_triton(impl, *tensors):
    """Which path to take, after the checks that all operations have in common."""
    device = tensors[0].device
    on_gpu = device.type == "cuda"
    _check(impl in ("auto", "triton", "torch"), f"impl is {impl!r}, expected 'auto', 'triton' or 'torch'")
    _check(all(t.device == device for t in tensors), f"tensors on several devices: {[str(t.device) for t in tensors]}")
    if impl == "triton":
        runs = on_gpu or os.environ.get("TRITON_INTERPRET") == "1"
        _check(triton is not None, "impl='triton', but Triton is not installed")
        _check(runs, f"impl='triton' needs CUDA tensors (or TRITON_INTERPRET=1), got {device}")
        return True
    if impl == "torch" or not on_gpu:
        return False
    if triton is None:
        _warn_without_triton()
    return triton is not None


def _check(condition, message):
    if not condition:
        raise ValueError(message)


def _check_shape(subject, tensor, right, expected):
    """subject: the tensor's name and verb, as in "xyz is"."""
    _check(right, f"{subject} {tuple(tensor.shape)}, expected {expected}")


def _check_cloud(xyz):
    _check_shape("xyz is", xyz, xyz.ndim == 3 and xyz.shape[2] == 3 and xyz.numel() > 0, "(B, N, 3), not empty")
    _check(xyz.dtype == torch.float32, f"xyz is {xyz.dtype}, expected torch.float32")


def _check_features(subject, features, ndim):
    right_type = features.dtype.is_floating_point and features.dtype.itemsize >= 2
    _check_shape(subject, features, features.ndim == ndim and features.numel() > 0, f"{ndim} dimensions, not empty")
    _check(right_type, f"{subject} {features.dtype}, expected a float type")


# ---------------------------------------------------------------------------------------------------------------------
# Furthest point sampling


def furthest_point_sample(xyz, m, impl="auto"):
    """Pick m points that cover each cloud: the next point is always the one furthest from those already chosen.

    xyz (B, N, 3) float32, metres; returns (B, m) int64. The first is index 0 (shuffle the cloud for a random start);
    equal distances go to the lowest index. The m' < m prefix of a result is the result for m'. ValueError if m > N.
    """
    _check_cloud(xyz)
    _check(1 <= m <= xyz.shape[1], f"cannot pick m = {m} of {xyz.shape[1]} points")
    if not _use_triton(impl, xyz):
        return furthest_point_sample_torch(xyz, m)
    B, N, _ = xyz.shape
    out = torch.zeros(B, m, dtype=torch.int64, device=xyz.device)
    BLOCK = triton.next_power_of_2(N)
    planes = xyz.detach().transpose(1, 2)
    planes = F.pad(planes, (0, BLOCK - N)).contiguous()  # (B, 3, BLOCK): neighbouring lanes read neighbouring words
    parts = _parts(xyz, m, 2048)
    board = torch.zeros(B, 2, parts, dtype=torch.int64, device=xyz.device)
    sizes = {"BLOCK": BLOCK // parts, "PARTS": parts, "num_warps": 4 if BLOCK // parts <= 4096 and parts > 1 else 8}
    _launch(_furthest_kernel, (B, parts), planes, board, out, N, m, **sizes, launch_cooperative_grid=parts > 1)
    return out


LAST_INDEX, LAST_ROUND = 2**17 - 1, 2**15 - 1  # what a word of the board has room for: see _pick


def _parts(xyz, m, share):
    """How many programs share a cloud: at most 8, each with at least `share` points, and no more than run at the same
    time, since each waits for the others at every pick. 1 where the board's words are too small.
    """
    (B, N, _), interpreted = xyz.shape, os.environ.get("TRITON_INTERPRET") == "1"
    if interpreted or N > LAST_INDEX or m > LAST_ROUND:
        return 1
    parts = min(8, N // share, _multiprocessors(xyz.device) // B)
    return 1 << max(0, parts.bit_length() - 1)  # a power of two


@cache
def _multiprocessors(device):  # 1: other devices than GPUs are met in tests alone
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def furthest_point_sample_torch(xyz, m):
    if xyz.device.type == "cpu":
        return torch.from_numpy(ops_cpu.furthest_points(xyz.detach().numpy(), m)).contiguous()
    return _furthest_dense(xyz, m)


def furthest_point_sample_features(xyz, features, m, impl="auto"):
    """Furthest point sampling on [xyz, features] (3DSSD's F-FPS). Squares of metres and of feature units simply add up.

    xyz (B, N, 3) float32, features (B, N, C) of any float type (read as float32); returns (B, m) int64, rules as above.
    """
    _check_cloud(xyz)
    _check_features("features are", features, 3)
    _check_shape("features are", features, features.shape[:2] == xyz.shape[:2], f"(B, N) as in xyz {tuple(xyz.shape)}")
    _check(1 <= m <= xyz.shape[1], f"cannot pick m = {m} of {xyz.shape[1]} points")
    if not _use_triton(impl, xyz, features):
        return furthest_point_sample_features_torch(xyz, features, m)
    parts = _parts(xyz, m, 512)
    BLOCK = triton.next_power_of_2(triton.cdiv(xyz.shape[1], parts))
    STEP = max(1, min(8, 32768 // BLOCK))  # channels in flight: as many as registers hold
    rows = torch.cat([xyz.detach(), features.detach().float()], 2)
    rows = F.pad(rows, (0, -rows.shape[2] % STEP))  # (B, N, D), D = 3 + C and some zeros, which add nothing
    planes = rows.transpose(1, 2).contiguous()  # (B, D, N)
    B, N, D = rows.shape
    out = torch.zeros(B, m, dtype=torch.int64, device=xyz.device)
    board = torch.zeros(B, 2, parts, dtype=torch.int64, device=xyz.device)
    sizes = {"BLOCK": BLOCK, "STEP": STEP, "PARTS": parts, "num_warps": 4 if BLOCK <= 1024 and parts > 1 else 16}
    arguments = rows, planes, board, out, N, D, m
    _launch(_furthest_features_kernel, (B, parts), *arguments, **sizes, launch_cooperative_grid=parts > 1)
    return out


def furthest_point_sample_features_torch(xyz, features, m):
    rows = torch.cat([xyz.detach(), features.detach().float()], 2)  # (B, N, 3 + C)
    if xyz.device.type == "cpu":
        return torch.from_numpy(np.stack([ops_cpu.furthest_rows(cloud, m) for cloud in rows.numpy()]))
    return _furthest_dense(rows, m)


def _furthest_dense(points, m):
    """(B, N, D) -> (B, m), in torch operations only: D + 4 launches per pick."""
    points = points.detach()
    out = torch.zeros(len(points), m, dtype=torch.int64, device=points.device)
    nearest = torch.full_like(points[:, :, 0], torch.inf)  # (B, N), squared distance to the chosen set
    for i in range(1, m):
        pick = points.gather(1, out[:, i - 1, None, None].expand(-1, 1, points.shape[2]))  # (B, 1, D)
        first, *rest = ((points - pick) ** 2).unbind(2)  # .sum(2) would add in an order of its own
        nearest = torch.minimum(nearest, sum(rest, first))
        out[:, i] = nearest.argmax(1)  # the first of equals, as torch documents
    return out


# PARTS programs share a cloud. x and the running distance of each point stay in registers; each pick reads y and z
# again.
#
#   nearest[:] = inf; last = 0
#   for i in 1 .. m-1:
#       nearest = min(nearest, |p - p[last]|^2)       "update"
#       last = first index of max(nearest)            "pick"
#       out[i] = last
#
# Per pick: 10 N operations, 8 N bytes from the level 1 cache, two block-wide reductions. The picks are a serial chain:
# what counts is how long one takes. With 16384 points a program alone needs 1.8 us on an H100; eight that share them,
# 1.2, most of which is agreeing on the pick. Alone, two words a point are half of a multiprocessor's registers and all
# that 8 warps hold without spilling. Give it the clouds of both views in one call: on 132 multiprocessors up to 16
# clouds have eight programs each, up to 33 four, up to 66 two, and all run side by side.
@jit
def _furthest_kernel(xyz, board, out, N, m, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    cloud, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    xyz += cloud * 3 * BLOCK * PARTS
    board += cloud * 2 * PARTS
    out += cloud * m
    n = part * BLOCK + tl.arange(0, BLOCK)
    y, z = xyz + BLOCK * PARTS, xyz + 2 * BLOCK * PARTS
    x = tl.load(xyz + n)
    nearest = tl.where(n < N, float("inf"), -1.0)  # padding stays below every distance, 0 included
    last = 0
    for i in range(1, m):
        dx = x - tl.load(xyz + last)
        dy = tl.load(y + n) - tl.load(y + last)
        dz = tl.load(z + n) - tl.load(z + last)
        nearest = tl.minimum(nearest, dx * dx + dy * dy + dz * dz)
        last = _pick(nearest, n, board, part, i, PARTS)
        tl.store(out + i, last.to(tl.int64), mask=part == 0)


# The first index of the largest distance, among all parts of the cloud. Each part writes its candidate on the board, a
# word of 64 bits,
#
#   15 bits: round | 31 bits: distance | 17 bits: LAST_INDEX (131071) - index     the largest: of equals the first
#
# and waits until all words are of its round; a cooperative launch sees to it that all parts run at the same time. A
# word carries all there is to know, so no other memory needs an order. Rounds take turns between two rows of words: a
# part writes round i + 1 when all its warps have read round i, for the reductions above are barriers, and round i + 2
# when it has seen everybody's i + 1. All lanes of a warp look at the same words, so that they leave the loop together.
# The bits of floats >= 0 order like integers, and -1.0 is negative as bits, too. A warp reduces integers in one
# instruction; tl.argmax on floats is dearer.
@jit
def _pick(distance, n, board, part, i, PARTS: tl.constexpr):
    bits = distance.to(tl.int32, bitcast=True)
    top = tl.max(bits, axis=0)
    first = tl.min(tl.where(bits == top, n, 2147483647), axis=0)
    if PARTS > 1:
        row = board + (i % 2) * PARTS
        word = (tl.maximum(top, 0).to(tl.int64) << 17) | (131071 - first).to(tl.int64)
        tl.atomic_xchg(row + part, (i.to(tl.int64) << 48) | word, sem="relaxed")
        each = row + tl.arange(0, 32) % PARTS
        words = tl.load(each, volatile=True)
        while tl.min(words >> 48, axis=0) < i:
            words = tl.load(each, volatile=True)
        first = (131071 - (tl.max(words, axis=0) & 131071)).to(tl.int32)
    return first


# As above, but D = 3 + C channels do not fit registers: each pick streams the planes (D, N) from the level 2 cache,
# 4 D N bytes at most. Partial sums only grow, so between blocks of STEP channels the lanes that can no longer change
# are masked: a dead lane reads nothing, and once eight neighbours are dead their 32-byte sector is not fetched (masking
# per channel would make each load wait for the previous one). 4096 x 131, 1024 picks: 2.2 GB per cloud at most.
#
#   for i in 1 .. m-1:
#       d = 0; for c in 0 .. D-1: d += (planes[c] - rows[last, c])^2
#       nearest = min(nearest, d); last = first index of max(nearest); out[i] = last
@jit
def _furthest_features_kernel(
    rows, planes, board, out, N, D, m, BLOCK: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr
):
    cloud, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    rows += cloud * N * D
    planes += cloud * N * D
    board += cloud * 2 * PARTS
    out += cloud * m
    n = part * BLOCK + tl.arange(0, BLOCK)
    nearest = tl.where(n < N, float("inf"), -1.0)
    last = 0
    for i in range(1, m):
        distance = tl.zeros([BLOCK], tl.float32)
        for start in range(0, D, STEP):
            alive = distance < nearest  # never true for padding
            for step in tl.static_range(STEP):
                c = start + step
                difference = tl.load(planes + c * N + n, mask=alive, other=0.0) - tl.load(rows + last * D + c)
                distance += difference * difference  # of a dead lane, any number will do
        nearest = tl.minimum(nearest, distance)
        last = _pick(nearest, n, board, part, i, PARTS)
        tl.store(out + i, last.to(tl.int64), mask=part == 0)


# ---------------------------------------------------------------------------------------------------------------------
# Ball query


def ball_query(xyz, centers, radius, k, min_radius=0.0, impl="auto"):
    """The first k points, in index order, of the shell min_radius <= distance < radius around each centre.

    xyz (B, N, 3), centers (B, M, 3) float32, radii in metres; returns (B, M, k) int64. A point at distance exactly 0
    always counts. Missing places repeat the first hit; a ball with no hit is all 0.
    """
    _check_ball(xyz, centers, radius, k, min_radius)
    if not _use_triton(impl, xyz, centers):
        return ball_query_torch(xyz, centers, radius, k, min_radius)
    return _balls(xyz, centers, [(min_radius, radius, k)])[0]


def ball_shells(xyz, centers, radii, ks, impl="auto"):
    """Ball queries of one to three shells, each from the radius before it to its own, ks[i] points of each: a list of
    (B, M, ks[i]) int64. On a GPU each point is compared with each centre once for all of them.
    """
    inner = (0.0, *radii)
    _check(1 <= len(radii) == len(ks) <= 3, f"radii {radii} and ks {ks}: expected as many of both, 1 to 3")
    shells = list(zip(inner, radii, ks))
    if not _use_triton(impl, xyz, centers):
        return [ball_query(xyz, centers, radius, k, near, impl) for near, radius, k in shells]
    for near, radius, k in shells:
        _check_ball(xyz, centers, radius, k, near)
    return _balls(xyz, centers, shells)


def _check_ball(xyz, centers, radius, k, min_radius):
    _check_cloud(xyz)
    right = centers.ndim == 3 and centers.shape[::2] == (len(xyz), 3)
    _check_shape("centers are", centers, right, f"({len(xyz)}, M, 3)")
    _check(centers.dtype == torch.float32, f"centers are {centers.dtype}, expected torch.float32")
    _check(k >= 1, f"k is {k}, expected at least 1")
    _check(0 <= min_radius < radius, f"radii are {min_radius} and {radius}, expected 0 <= min_radius < radius")


def _balls(xyz, centers, shells):
    """The kernel, for shells [(inner radius, radius, k)]."""
    BLOCK = 256  # below 1024: a tile's hits are counted in ten bits
    centers = centers.detach().contiguous()
    (B, N, _), M = xyz.shape, centers.shape[1]
    W = triton.cdiv(N, BLOCK) * BLOCK
    planes = F.pad(xyz.detach().transpose(1, 2), (0, W - N), value=torch.inf).contiguous()  # (B, 3, W), in no ball
    ks = [k for _, _, k in shells]
    out = torch.empty(B * M * sum(ks), dtype=torch.int64, device=xyz.device)
    bounds = [(*ops_cpu.squared(near, far), k) for near, far, k in shells] + [(0.0, 0.0, 0)] * (3 - len(shells))
    sizes = {"SHELLS": len(ks), "SLOTS": triton.next_power_of_2(max(ks)), "BLOCK": BLOCK, "num_warps": 1}
    _launch(_ball_kernel, (M, B), planes, centers, out, M, W, *sum(bounds, ()), **sizes)
    return [part.view(B, M, k) for part, k in zip(out.split([B * M * k for k in ks]), ks)]


def ball_query_torch(xyz, centers, radius, k, min_radius=0.0):
    xyz, centers = xyz.detach(), centers.detach()
    if xyz.device.type == "cpu":
        find = partial(ops_cpu.balls, radius=radius, k=k, min_radius=min_radius)
        balls = ops_cpu.in_threads(find, xyz.numpy(), centers.numpy())
        return torch.from_numpy(np.stack(balls))
    return _ball_dense(xyz, centers, radius, k, min_radius)


def _ball_dense(xyz, centers, radius, k, min_radius):
    """Every point against every centre, in torch operations only."""
    (B, N, _), M = xyz.shape, centers.shape[1]
    near, far = ops_cpu.squared(min_radius, radius)
    out = torch.zeros(B, M, k + 1, dtype=torch.int64, device=xyz.device)  # place k takes what nobody wants
    index = torch.arange(N, device=xyz.device)
    chunk = max(1, 2**24 // (B * N))  # bounds the (B, chunk, N) counts below at 128 MiB
    for s in range(0, M, chunk):
        x, y, z = ((centers[:, s : s + chunk, None] - xyz[:, None]) ** 2).unbind(3)  # (B, chunk, N)
        d2 = x + y + z
        hit = (d2 == 0) | ((d2 >= near) & (d2 < far))
        count = hit.cumsum(2)
        place = torch.where(hit & (count <= k), count - 1, k)
        balls = out[:, s : s + chunk].scatter_(2, place, index.expand_as(place))
        empty = torch.arange(k + 1, device=xyz.device) >= count[:, :, -1:]
        out[:, s : s + chunk] = torch.where(empty, balls[:, :, :1] * (count[:, :, -1:] > 0), balls)
    return out[:, :, :k].contiguous()


# One program, a warp, per centre. The points of its cloud pass by in tiles. Those with a hit are looked at closely: in
# the first set abstraction about half of them, in the last all.
#
#   for each shell, count = 0
#       for p in 0 .. N-1: if inside(p) and count < k: out[count++] = p
#       fill out[count:] with out[0], or 0
#
# The rank of a hit is a prefix sum along the tile, so hits land in index order without sorting. One sum serves three
# shells: their counters are ten bits each of one word. Per centre 8 N operations, 12 N bytes from the level 1 cache,
# and the sums of some tiles. No early exit: a ball is rarely full before the cloud ends.
@jit
def _ball_kernel(
    planes, centers, out, M, W, near0, far0, k0, near1, far1, k1, near2, far2, k2,
    SHELLS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    cloud = tl.program_id(1).to(tl.int64)
    row, rows = cloud * M + tl.program_id(0), tl.num_programs(1).to(tl.int64) * M
    planes += cloud * 3 * W
    out0 = out + row * k0
    out1 = out + rows * k0 + row * k1
    out2 = out + rows * (k0 + k1) + row * k2
    x, y, z = tl.load(centers + row * 3), tl.load(centers + row * 3 + 1), tl.load(centers + row * 3 + 2)
    far = tl.maximum(far0, tl.maximum(far1, far2))
    count0, count1, count2 = 0, 0, 0
    first0, first1, first2 = 2147483647, 2147483647, 2147483647
    for start in range(0, W, BLOCK):
        p = start + tl.arange(0, BLOCK)
        dx = x - tl.load(planes + p)
        dy = y - tl.load(planes + W + p)
        dz = z - tl.load(planes + 2 * W + p)
        d2 = dx * dx + dy * dy + dz * dz
        if tl.min(d2, axis=0) <= far:  # equal: a radius so small that its square is 0
            hit0 = (d2 == 0) | ((d2 >= near0) & (d2 < far0))
            counters = hit0.to(tl.int32)
            if SHELLS > 1:
                hit1 = (d2 == 0) | ((d2 >= near1) & (d2 < far1))
                counters += hit1.to(tl.int32) << 10
            if SHELLS > 2:
                hit2 = (d2 == 0) | ((d2 >= near2) & (d2 < far2))
                counters += hit2.to(tl.int32) << 20
            rank = tl.cumsum(counters, axis=0)
            total = tl.max(rank, axis=0)
            first0 = _put_down(out0 + count0, k0 - count0, hit0, rank & 1023, p, first0)
            count0 += total & 1023
            if SHELLS > 1:
                first1 = _put_down(out1 + count1, k1 - count1, hit1, (rank >> 10) & 1023, p, first1)
                count1 += (total >> 10) & 1023
            if SHELLS > 2:
                first2 = _put_down(out2 + count2, k2 - count2, hit2, rank >> 20, p, first2)
                count2 += total >> 20
    _fill(out0, k0, count0, first0, SLOTS)
    if SHELLS > 1:
        _fill(out1, k1, count1, first1, SLOTS)
    if SHELLS > 2:
        _fill(out2, k2, count2, first2, SLOTS)


@jit
def _put_down(out, room, hit, rank, p, first):
    """A tile's hits into a ball that has room for so many. -> the ball's first hit."""
    tl.store(out + rank - 1, p.to(tl.int64), mask=hit & (rank <= room))
    return tl.minimum(first, tl.min(tl.where(hit, p, 2147483647), axis=0))


@jit
def _fill(out, k, count, first, SLOTS: tl.constexpr):
    place = tl.arange(0, SLOTS)
    filler = tl.zeros([SLOTS], tl.int64) + tl.where(count > 0, first, 0)
    tl.store(out + place, filler, mask=(place >= count) & (place < k))


# ---------------------------------------------------------------------------------------------------------------------
# Bilinear sampling


def bilinear_sample(feature_map, uv, impl="auto"):
    """Read a feature map at N places per image, between cells.

    feature_map (B, C, H, W) of any float type, uv (B, N, 2) float32: (u, v) in cells, (0, 0) the centre of the first.
    Returns (B, N, C) in the type of the map. Corners outside count as zero, and so does a uv that is not finite, so
    points behind the camera need no mask. Sums are float32 even for half-precision maps. Gradients go to both inputs;
    at a whole uv, where the slope jumps, uv gets the slope to the right. channels_last maps are read as they are, and
    fastest. float64 (for gradcheck) always takes the torch path.
    """
    _check_features("feature_map is", feature_map, 4)
    right = uv.ndim == 3 and uv.shape[::2] == (len(feature_map), 2)
    right_type = uv.dtype == torch.float32 or uv.dtype == feature_map.dtype == torch.float64
    _check_shape("uv is", uv, right, f"({len(feature_map)}, N, 2)")
    _check(right_type, f"uv is {uv.dtype}, expected torch.float32")
    if _use_triton(impl, feature_map, uv) and feature_map.dtype != torch.float64:
        return _BilinearSample.apply(feature_map, uv)
    return bilinear_sample_torch(feature_map, uv)


def bilinear_sample_torch(feature_map, uv):
    """A sample is a bag of four rows with weights: embedding_bag, whose C++ loops run along C, forward and backward.

    On a CPU twice as fast as grid_sample at 2048 channels, with a backward six times as fast.
    """
    B, C, H, W = feature_map.shape
    u, v = uv.nan_to_num(-2.0).unbind(2)
    u, v = u.clamp(-2, W + 1), v.clamp(-2, H + 1)  # beyond is all zero anyway
    left, top = u.detach().floor().long(), v.detach().floor().long()
    x = torch.stack([left, left + 1, left, left + 1], 2)  # (B, N, 4)
    y = torch.stack([top, top, top + 1, top + 1], 2)
    du, dv = u - left, v - top
    weight = torch.stack([1 - du, du, 1 - du, du], 2) * torch.stack([1 - dv, 1 - dv, dv, dv], 2)
    inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
    image = torch.arange(B, device=uv.device)[:, None, None]
    row = torch.where(inside, (image * H + y) * W + x, 0)
    wide = torch.promote_types(feature_map.dtype, torch.float32)
    table = feature_map.permute(0, 2, 3, 1).reshape(B * H * W, C).to(wide)
    weight = torch.where(inside, weight, 0).to(wide)
    out = F.embedding_bag(row.flatten(0, 1), table, mode="sum", per_sample_weights=weight.flatten(0, 1))
    return out.view(B, -1, C).to(feature_map.dtype)


class _BilinearSample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feature_map, uv):
        (B, C, H, W), N = feature_map.shape, uv.shape[1]
        uv = uv.contiguous()
        ctx.save_for_backward(feature_map, uv)
        out = torch.empty(B, N, C, dtype=feature_map.dtype, device=uv.device)
        grid = (triton.cdiv(N, 16), triton.cdiv(C, 128), B)
        sizes = (N, C, H, W, *feature_map.stride())
        _launch(_bilinear_kernel, grid, feature_map, uv, out, *sizes, BLOCK_N=16, BLOCK_C=128)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        feature_map, uv = ctx.saved_tensors
        (B, C, H, W), N = feature_map.shape, uv.shape[1]
        to_map, to_uv = ctx.needs_input_grad
        grad_map, map_strides = uv, (0, 0, 0, 0)  # an unused pointer must still be one
        if to_map:
            grad_map = torch.zeros_like(feature_map, dtype=torch.float32)
            map_strides = grad_map.stride()
        grad_uv = torch.empty_like(uv)
        grid = (triton.cdiv(N, 16), B)
        tensors = (feature_map, uv, grad.contiguous(), grad_map, grad_uv)
        sizes = (N, C, H, W, *feature_map.stride(), *map_strides)
        meta = {"TO_MAP": to_map, "TO_UV": to_uv, "BLOCK_N": 16, "BLOCK_C": 64}
        _launch(_bilinear_backward_kernel, grid, *tensors, *sizes, **meta)
        return grad_map.to(feature_map.dtype) if to_map else None, grad_uv if to_uv else None


# Forward: one program per 16 samples and 128 channels.
#
#   for each sample, for each of 4 corners: out[:] += weight(corner) * map[corner, :]
#
# 8 B N C operations; 4 B N C words read and one written. In channels-last a corner is one contiguous read; in NCHW
# every word costs a 32-byte sector, which the corner beside it mostly shares.
@jit
def _bilinear_kernel(
    feature_map, uv, out,
    N, C, H, W, stride_b, stride_c, stride_h, stride_w,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (n < N)[:, None] & (c < C)[None, :]
    left, top, du, dv = _cell(uv + (b * N + n) * 2, n < N, H, W)
    at = feature_map + b * stride_b + c.to(tl.int64)[None, :] * stride_c
    total = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for corner in tl.static_range(4):
        x, y = left + corner % 2, top + corner // 2
        weight = (du if corner % 2 else 1 - du) * (dv if corner // 2 else 1 - dv)
        inside = (x >= 0) & (x < W) & (y >= 0) & (y < H)
        value = tl.load(at + (y * stride_h + x * stride_w)[:, None], mask=mask & inside[:, None], other=0.0)
        total += weight[:, None] * value.to(tl.float32)
    tl.store(out + ((b * N + n) * C)[:, None] + c[None, :], total.to(out.dtype.element_ty), mask=mask)


@jit
def _cell(uv, mask, H, W):
    # What lies a cell or more outside reads only zeros, wherever it is; NaN belongs there too.
    u = tl.load(uv, mask=mask, other=-2.0)
    v = tl.load(uv + 1, mask=mask, other=-2.0)
    u = tl.minimum(tl.maximum(tl.where(u == u, u, -2.0), -2.0), W + 1.0)
    v = tl.minimum(tl.maximum(tl.where(v == v, v, -2.0), -2.0), H + 1.0)
    left, top = tl.floor(u), tl.floor(v)
    return left.to(tl.int32), top.to(tl.int32), u - left, v - top


# Backward: one program per 16 samples walks over all channels. So the gradient of uv is a sum inside the program, and
# only that of the map, where samples share cells, needs atomics (float32, whatever the map is). Their order is not
# fixed, and so neither is the last bit.
#
#   for each sample, for each of 4 corners:
#       grad_map[corner, :] += weight(corner) * grad[:]
#       grad_uv += d weight(corner) / d uv * dot(map[corner, :], grad[:])
@jit
def _bilinear_backward_kernel(
    feature_map, uv, grad, grad_map, grad_uv,
    N, C, H, W, stride_b, stride_c, stride_h, stride_w, out_b, out_c, out_h, out_w,
    TO_MAP: tl.constexpr, TO_UV: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    left, top, du, dv = _cell(uv + (b * N + n) * 2, n < N, H, W)
    grad_u, grad_v = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mask = (n < N)[:, None] & (c < C)[None, :]
        g = tl.load(grad + ((b * N + n) * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        for corner in tl.static_range(4):
            x, y = left + corner % 2, top + corner // 2
            weight_u = du if corner % 2 else 1 - du
            weight_v = dv if corner // 2 else 1 - dv
            valid = mask & ((x >= 0) & (x < W) & (y >= 0) & (y < H))[:, None]
            if TO_MAP:
                at = b * out_b + c.to(tl.int64)[None, :] * out_c + (y * out_h + x * out_w)[:, None]
                tl.atomic_add(grad_map + at, (weight_u * weight_v)[:, None] * g, mask=valid, sem="relaxed")
            if TO_UV:
                at = b * stride_b + c.to(tl.int64)[None, :] * stride_c + (y * stride_h + x * stride_w)[:, None]
                dot = tl.sum(g * tl.load(feature_map + at, mask=valid, other=0.0).to(tl.float32), axis=1)
                grad_u += dot * weight_v * (corner % 2 * 2 - 1)
                grad_v += dot * weight_u * (corner // 2 * 2 - 1)
    if TO_UV:
        tl.store(grad_uv + (b * N + n) * 2, grad_u, mask=n < N)
        tl.store(grad_uv + (b * N + n) * 2 + 1, grad_v, mask=n < N)


# ---------------------------------------------------------------------------------------------------------------------
# Gather and max


def gather_max(features, idx, impl="auto"):
    """Max-pool groups of points without ever forming the groups: out[b, m] = max over j of features[b, idx[b, m, j]].

    features (B, N, C) of any float type, idx (B, M, k) int64 in 0 .. N-1 (checked on a CPU only: on a GPU it would cost
    a wait); returns (B, M, C) in the type of the features. The gradient goes to the element that won, the first in idx
    order among equals, and adds up in float32. Saves 4 bytes per output, against k times the features' bytes for the
    grouped form.
    """
    _check_features("features are", features, 3)
    right = idx.ndim == 3 and len(idx) == len(features) and idx.shape[2] > 0
    _check_shape("idx is", idx, right, f"({len(features)}, M, k) with k > 0")
    _check(idx.dtype == torch.int64, f"idx is {idx.dtype}, expected torch.int64")
    use_triton = _use_triton(impl, features, idx) and features.dtype != torch.float64
    return _GatherMax.apply(features, idx, use_triton)


class _GatherMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, idx, use_triton):
        ctx.use_triton, ctx.shape = use_triton, features.shape
        if use_triton:
            features, idx = features.contiguous(), idx.contiguous()
            (B, N, C), (_, M, k) = features.shape, idx.shape
            out = torch.empty(B, M, C, dtype=features.dtype, device=features.device)
            source = torch.empty(B, M, C, dtype=torch.int32, device=features.device)
            grid = (triton.cdiv(M, 16), triton.cdiv(C, 64), B)
            _launch(_gather_max_kernel, grid, features, idx, out, source, N, C, M, k, BLOCK_M=16, BLOCK_C=64)
        else:
            out, source = gather_max_torch(features, idx)
        ctx.save_for_backward(source)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (source,) = ctx.saved_tensors  # (B, M, C)
        (B, N, C), M = ctx.shape, source.shape[1]
        total = torch.zeros(B, N, C, dtype=torch.promote_types(grad.dtype, torch.float32), device=grad.device)
        if ctx.use_triton:
            grid = (triton.cdiv(M * C, 1024), B)
            _launch(_gather_max_backward_kernel, grid, grad.contiguous(), source, total, N, C, M * C, BLOCK=1024)
        else:
            gather_max_backward_torch(grad, source, total)
        return total.to(grad.dtype), None, None


def gather_max_torch(features, idx):
    """(B, N, C), (B, M, k) -> values (B, M, C), and the points they came from, (B, M, C) int32. Without autograd."""
    features = features.detach()
    if features.device.type == "cpu":
        wide = torch.promote_types(features.dtype, torch.float32)  # exact, and numpy has no bfloat16
        clouds = features.to(wide).contiguous().numpy()
        values, source = zip(*map(ops_cpu.gather_max, clouds, idx.numpy()))  # calls too short for threads to gain
        return torch.from_numpy(np.stack(values)).to(features.dtype), torch.from_numpy(np.stack(source))
    return _gather_max_dense(features, idx)


def gather_max_backward_torch(grad, source, total):
    """total[b, source[b, m, c], c] += grad[b, m, c], in place."""
    if total.device.type != "cpu":
        total.scatter_add_(1, source.long(), grad.to(total.dtype))
        return
    C = total.shape[2]
    for add, point, out in zip(grad.to(total.dtype).numpy(), source.numpy(), total.numpy()):
        place = point.astype(np.int64) * C + np.arange(C)
        np.add.at(out.ravel(), place.ravel(), add.ravel())  # flat: the one quick form of it


def _gather_max_dense(features, idx):
    source = idx[:, :, :1].expand(-1, -1, features.shape[2])  # (B, M, C)
    best = features.gather(1, source)
    for j in range(1, idx.shape[2]):
        point = idx[:, :, j : j + 1].expand_as(source)
        row = features.gather(1, point)
        better = (row > best) | (row != row)  # a NaN must come through, not vanish
        best, source = torch.where(better, row, best), torch.where(better, point, source)
    return best, source.int()


# Forward: one program per 16 groups and 64 channels.
#
#   best = features[idx[0]]; for j in 1 .. k-1: if features[idx[j]] > best: best = ..., source = idx[j]
#
# 2 B M k C operations; B M k C words read (from the level 2 cache: each point is in several groups); B M C values and
# as many int32 written.
@jit
def _gather_max_kernel(features, idx, out, source, N, C, M, k, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (i < M)[:, None] & (c < C)[None, :]
    idx += (b * M + i) * k
    features += b * N * C
    best = tl.full([BLOCK_M, BLOCK_C], float("-inf"), tl.float32)
    won = tl.zeros([BLOCK_M, BLOCK_C], tl.int32)
    for j in range(0, k):
        point = tl.load(idx + j, mask=i < M, other=0)
        row = tl.load(features + (point * C)[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
        better = (row > best) | (row != row) | (j == 0)
        best = tl.where(better, row, best)
        won = tl.where(better, point.to(tl.int32)[:, None], won)
    at = ((b * M + i) * C)[:, None] + c[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=mask)
    tl.store(source + at, won, mask=mask)


# Backward: total[source[m, c], c] += grad[m, c]. B M C atomic additions; neither their order nor the last bit is fixed.
@jit
def _gather_max_backward_kernel(grad, source, total, N, C, size, BLOCK: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    point = tl.load(source + b * size + e, mask=e < size, other=0).to(tl.int64)
    g = tl.load(grad + b * size + e, mask=e < size, other=0.0).to(tl.float32)
    tl.atomic_add(total + (b * N + point) * C + e % C, g, mask=e < size, sem="relaxed")
