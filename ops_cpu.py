"""The point operations of ops_triton.py on a CPU: numpy and scipy on the tensors' own memory, for whole trainings.

They give the same integers as the kernels, bit for bit: distances are float32 differences, squared and added in one
fixed order. Clouds are spread over torch.get_num_threads() threads where the work per call is long enough to share.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from scipy.spatial import cKDTree


def in_threads(function, *batches):
    """[function(a, b, ...) for each cloud of the batches]. The pool lives for one call only: forks lose its threads."""
    workers = min(torch.get_num_threads(), len(batches[0]))
    if workers <= 1:
        return [function(*items) for items in zip(*batches)]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(function, *batches))


def furthest_points(clouds, m):
    """Clouds (B, N, 3) float32 -> (B, m) int64, in place: about a fifth of the time of torch operations.

    A pick is seven numpy calls of a few microseconds. Clouds share them while the working set, 28 bytes a point, stays
    in the level 2 cache. Two Python threads that alternate in such short calls mostly wait for each other, unless each
    has several clouds.
    """

    def sample(clouds):
        planes = np.ascontiguousarray(clouds.transpose(2, 0, 1))  # (3, b, N)
        square = np.empty_like(planes)
        nearest = np.full(planes.shape[1:], np.inf, np.float32)
        each = np.arange(len(clouds))
        picks = np.zeros((m, len(clouds)), np.int64)
        for i in range(1, m):
            pick = clouds[each, picks[i - 1]].T[:, :, None]  # (3, b, 1)
            np.subtract(planes, pick, out=square)
            np.multiply(square, square, out=square)
            distance, y, z = square
            np.add(distance, y, out=distance)
            np.add(distance, z, out=distance)
            np.minimum(nearest, distance, out=nearest)
            picks[i] = nearest.argmax(1)
        return picks.T

    together = max(1, 32768 // clouds.shape[1])
    groups = [clouds[i : i + together] for i in range(0, len(clouds), together)]
    return np.concatenate(in_threads(sample, groups))


def furthest_rows(points, m):
    """Many channels, one cloud (N, D) float32 -> (m,) int64.

    Sums of squares only grow: a point whose partial sum already exceeds its distance to the chosen set cannot change.
    Channels are added in blocks, and once few points are left in the race, only those are finished. The rounding is the
    same. The work is a fraction where xyz dominates, and never much more than that of adding everything.
    """
    N, D = points.shape
    planes = np.ascontiguousarray(points.T)  # (D, N)
    nearest = np.full(N, np.inf, np.float32)
    distance = np.empty(N, np.float32)
    step = min(D, 32)  # channels at a time: 4096 points of them stay in the level 2 cache
    block = np.empty((step + 1, N), np.float32)
    picks = np.zeros(m, np.int64)

    def add_squares(total, values, pick, buffer, out):
        # Reducing the outer axis adds row after row, in order; row 0 carries the sum so far. (With one column numpy
        # would sum pairwise, but then that column is the pick itself, at distance 0.)
        buffer[0] = total
        squares = np.subtract(values, pick, out=buffer[1:])
        np.multiply(squares, squares, out=squares)
        return np.add.reduce(buffer, axis=0, out=out)

    for i in range(1, m):
        pick = points[picks[i - 1], :, None]  # (D, 1)
        distance.fill(0)
        for c in range(0, D, step):
            e = min(c + step, D)
            add_squares(distance, planes[c:e], pick[c:e], block[: e - c + 1], distance)
            racing = distance < nearest
            if e < D and 8 * np.count_nonzero(racing) < N:
                left = np.flatnonzero(racing)
                buffer = np.empty((D - e + 1, len(left)), np.float32)
                distance[left] = add_squares(distance[left], points[left, e:].T, pick[e:], buffer, None)
                break
        np.minimum(nearest, distance, out=nearest)
        picks[i] = nearest.argmax()
    return picks


def squared(*radii):
    """In float32, as the distances are."""
    return [float(np.float32(r) * np.float32(r)) for r in radii]


def balls(xyz, centers, radius, k, min_radius):
    """One cloud (N, 3) and centres (M, 3), float32 -> (M, k) int64. A k-d tree proposes and float32 distances decide,
    so that brute force agrees.
    """
    N, M = len(xyz), len(centers)
    near, far = np.float32(squared(min_radius, radius))
    out = np.zeros((M, k), np.int64)
    tree = cKDTree(xyz)
    chunk = max(1, 2**24 // N)  # bounds the list of pairs at 400 MB, should every point be in every ball
    for s in range(0, M, chunk):
        some = centers[s : s + chunk]
        # The tree works in float64; the margin is far above what float32 rounding can move a distance by.
        pairs = cKDTree(some).sparse_distance_matrix(tree, radius * (1 + 1e-5), output_type="ndarray")
        i, j = pairs["i"], pairs["j"]
        parts = np.take(some, i, axis=0) - np.take(xyz, j, axis=0)
        parts *= parts
        d2 = parts[:, 0] + parts[:, 1] + parts[:, 2]
        hit = np.flatnonzero((d2 == 0) | ((d2 >= near) & (d2 < far)))
        pair = np.sort(i[hit] * N + j[hit])  # by centre, then by point
        base = np.arange(len(some))[:, None] * N
        start, end = np.searchsorted(pair, (base, base + N))
        place = start + np.arange(k)  # (chunk, k), where in the sorted list
        place = np.where(place < end, place, start)
        out[s : s + chunk] = np.where(start < end, np.append(pair, 0)[place] - base, 0)
    return out


def gather_max(features, idx):
    """One cloud (N, C) and (M, k) -> values and their points, (M, C). ValueError for an index outside.

    Groups sorted by how many places they really use lose their padding, 46 to 79 % of all places on KITTI. Blocks of
    them stay in the cache: four calls per place do 32768 elements each in about 11 us (masked writes take 150).
    """
    (M, k), (N, C) = idx.shape, features.shape
    if M and not 0 <= idx.min() <= idx.max() < N:
        raise ValueError(f"idx reaches outside 0 .. {N - 1}")
    last_other = ((idx != idx[:, :1]) * np.arange(1, k + 1)).max(1)  # trailing repeats of the first change nothing
    used = last_other.clip(1)
    order = np.argsort(-used, kind="stable")
    places = np.ascontiguousarray(idx[order].T)  # (k, M)
    small = np.min_scalar_type(k)
    values = np.empty((M, C), features.dtype)
    source = np.empty((M, C), np.int32)
    chunk = max(1, 32768 // C)
    for s in range(0, M, chunk):
        group = order[s : s + chunk]
        best = features[places[0, s : s + chunk]]  # (chunk, C)
        row = np.empty_like(best)
        won = np.zeros(best.shape, small)
        for j in range(1, used[group[0]]):
            np.take(features, places[j, s : s + chunk], axis=0, out=row, mode="clip")  # mode "raise" would buffer
            better = np.greater(row, best).view(np.uint8)
            np.maximum(won, better * small.type(j), out=won)  # j only grows: the last winner is the largest
            np.maximum(best, row, out=best)
        values[group] = best
        source[group] = np.take_along_axis(idx[group], won.astype(np.int64), axis=1)
    return values, source
