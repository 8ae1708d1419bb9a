"""Boxes of objects: conversions, the points in them, overlaps, non-maximum suppression. numpy and torch alike, on any
device.

A box is 7 numbers, (..., 7):

    x, y, z                 its centre (not that of its bottom), metres, in the LiDAR frame: x ahead, y left, z up
    length, width, height   metres; the length lies along the heading
    yaw                     of the heading, radians, 0 along +x, counter-clockwise seen from above

Boxes stand upright. A KITTI label is 7 numbers too, in its file's order: h, w, l, x, y, z, ry. Its x, y, z are the
middle of the *bottom* in the rectified camera's frame (x right, y down, z ahead), and ry is 0 along +x and grows from
there to -z.

Every function returns what it was given: arrays for arrays, tensors on their device for tensors, in the precision that
numpy and torch promote to. Only `label_to_box` waits for a GPU. There are no matrix products, which a GPU may run in
TF32: three digits are not a place.
"""

import math

import numpy as np
import torch

PIECE = 2**15  # pairs that `pairwise` hands on at once: their intermediates fit a CPU's cache, which halves the time


def _library(x):
    return torch if torch.is_tensor(x) else np


def _apply(matrix, vectors):
    """matrix (..., r, c) times vectors (..., c) -> (..., r), both broadcast."""
    return (matrix * vectors[..., None, :]).sum(-1)


def _columns(boxes):
    return [boxes[..., i] for i in range(7)]


# -----------------------------------------------------------------------------
# conversions


def label_to_box(labels, velo2cam):
    """KITTI's labels as boxes. labels (..., 7), velo2cam (..., 3, 4) or (..., 4, 4), LiDAR to the rectified camera
    (R0_rect Tr_velo_to_cam) -> (..., 7).

    The camera leans a degree or so against the LiDAR, and both kinds of box stand upright in their own frame. So the
    centre moves as a point, and the heading becomes the level LiDAR direction that the camera, seen from above, sees at
    ry: `box_to_label` is the exact inverse. Meant for the host: the inverse of a matrix waits for a GPU.
    """
    xp = _library(labels)
    h, w, length, x, y, z, ry = _columns(labels)
    R, t = velo2cam[..., :3, :3], velo2cam[..., :3, 3]
    centre = _apply(xp.linalg.inv(R), xp.stack([x, y - h / 2, z], -1) - t)
    from_above = R[..., ::2, :2]  # level LiDAR directions to the camera's x and z
    ahead = _apply(xp.linalg.inv(from_above), xp.stack([xp.cos(ry), -xp.sin(ry)], -1))
    yaw = xp.arctan2(ahead[..., 1], ahead[..., 0])
    return xp.concatenate([centre, xp.stack([length, w, h, yaw], -1)], -1)


def box_to_label(boxes, velo2cam):
    """Boxes as KITTI's labels, the inverse of `label_to_box`. boxes (..., 7), velo2cam as there -> (..., 7): h, w, l,
    x, y, z, ry."""
    xp = _library(boxes)
    _, _, _, length, w, h, yaw = _columns(boxes)
    R, t = velo2cam[..., :3, :3], velo2cam[..., :3, 3]
    centre = _apply(R, boxes[..., :3]) + t
    x, y, z = centre[..., 0], centre[..., 1] + h / 2, centre[..., 2]
    ahead = _apply(R[..., ::2, :2], xp.stack([xp.cos(yaw), xp.sin(yaw)], -1))
    ry = xp.arctan2(-ahead[..., 1], ahead[..., 0])
    return xp.stack([h, w, length, x, y, z, ry], -1)


def corners(boxes):
    """The corners of boxes (..., 7) -> (..., 8, 3): the bottom's four, counter-clockwise from the front left one, then
    the top's."""
    xp = _library(boxes)
    _, _, _, length, width, height, yaw = _columns(boxes)
    c, s = xp.cos(yaw), xp.sin(yaw)
    ahead = xp.stack([length * c, length * s], -1) / 2
    left = xp.stack([-width * s, width * c], -1) / 2
    ring = xp.stack([ahead + left, left - ahead, -ahead - left, ahead - left], -2)  # (..., 4, 2)
    ring = ring + boxes[..., None, :2]
    z = boxes[..., 2, None, None]
    up = xp.broadcast_to(height[..., None, None] / 2, ring[..., :1].shape)
    return xp.concatenate([xp.concatenate([ring, z - up], -1), xp.concatenate([ring, z + up], -1)], -2)


def transform_boxes(boxes, T):
    """Boxes moved with their cloud. boxes (..., 7); T (4, 4), or (B, 1, 4, 4) for boxes (B, N, 7): a similarity that
    keeps upright what is upright (a turn about z, one scale, a flip of y, a shift) -> (..., 7)."""
    xp = _library(boxes)
    yaw = boxes[..., 6]
    centre = _apply(T[..., :3, :3], boxes[..., :3]) + T[..., :3, 3]
    scale = xp.hypot(T[..., 0, 0], T[..., 1, 0])
    # a flip needs nothing more: a box's left and right are alike
    ahead = _apply(T[..., :2, :2], xp.stack([xp.cos(yaw), xp.sin(yaw)], -1))
    yaw = xp.arctan2(ahead[..., 1], ahead[..., 0])
    return xp.concatenate([centre, boxes[..., 3:6] * scale[..., None], yaw[..., None]], -1)


def points_in_boxes(points, boxes):
    """Which points lie in which boxes, faces included. points (..., N, 3 + C), boxes (..., M, 7) -> bool (..., N,
    M)."""
    xp = _library(points)
    x, y, z, length, width, height, yaw = _columns(boxes[..., None, :, :])  # (..., 1, M)
    c, s = xp.cos(yaw), xp.sin(yaw)
    dx, dy, dz = points[..., 0, None] - x, points[..., 1, None] - y, points[..., 2, None] - z  # (..., N, M)
    ahead, left = abs(c * dx + s * dy), abs(c * dy - s * dx)
    return (ahead <= length / 2) & (left <= width / 2) & (abs(dz) <= height / 2)


# -----------------------------------------------------------------------------
# overlaps. a and b (..., 7) broadcast: rows of pairs give (pairs,); `pairwise` gives all with all


def _mean_clamped(start, end, limit):
    """The mean of y, clamped to +-limit, as y goes evenly from start to end. It is a weighted mean of the two ends,
    clamped: the start weighs as much as the mean of two shares of the way, up to -limit and up to limit."""
    xp = _library(start)
    step = end - start
    step = xp.where(step == 0, xp.ones_like(step), step)
    below, above = xp.clip((-limit - start) / step, 0, 1), xp.clip((limit - start) / step, 0, 1)
    start, end = xp.clip(start, -limit, limit), xp.clip(end, -limit, limit)
    return end + (start - end) * (below + above) / 2


def bev_intersection(a, b):
    """The area, square metres, that boxes a and b (..., 7) share seen from above -> (...).

    In the frame of a, whose sides are at x = +-half length and y = +-half width, it is a sum over the edges of b,
    counter-clockwise: each adds minus the integral of y, clamped to +-half width, over its part of the x inside a. No
    vertices, no sorting, no cases, so nothing goes wrong where edges coincide. Rounding is some 1e-7 of the area of a
    in float32, and may leave as much to boxes that do not meet.
    """
    xp = _library(a)
    half_length, half_width = a[..., 3] / 2, a[..., 4] / 2
    (ca, sa), (cb, sb) = ((xp.cos(yaw), xp.sin(yaw)) for yaw in (a[..., 6], b[..., 6]))
    c, s = ca * cb + sa * sb, ca * sb - sa * cb  # of the angle between them
    dx, dy = b[..., 0] - a[..., 0], b[..., 1] - a[..., 1]
    x, y = ca * dx + sa * dy, ca * dy - sa * dx
    ahead_x, ahead_y = b[..., 3] / 2 * c, b[..., 3] / 2 * s
    left_x, left_y = -b[..., 4] / 2 * s, b[..., 4] / 2 * c
    xs = [x + ahead_x + left_x, x - ahead_x + left_x, x - ahead_x - left_x, x + ahead_x - left_x]
    ys = [y + ahead_y + left_y, y - ahead_y + left_y, y - ahead_y - left_y, y + ahead_y - left_y]
    inside = [xp.clip(x, -half_length, half_length) for x in xs]
    area = 0
    for i in range(4):
        j = (i + 1) % 4
        run, rise = xs[j] - xs[i], ys[j] - ys[i]
        run = xp.where(run == 0, xp.ones_like(run), run)
        # a share of the edge, and not its slope, which has no bound
        start, end = (ys[i] + rise * xp.clip((at - xs[i]) / run, 0, 1) for at in (inside[i], inside[j]))
        area = area - (inside[j] - inside[i]) * _mean_clamped(start, end, half_width)
    smaller = xp.minimum(a[..., 3] * a[..., 4], b[..., 3] * b[..., 4])
    return xp.clip(area, xp.zeros_like(smaller), smaller)


def _over_union(shared, size_a, size_b):
    """shared / union, 0 where both are empty."""
    xp = _library(shared)
    union = size_a + size_b - shared
    return shared / xp.where(union > 0, union, xp.ones_like(union))


def bev_iou(a, b):
    """Intersection over union of boxes a and b (..., 7) seen from above -> (...), 0 to 1."""
    return _over_union(bev_intersection(a, b), a[..., 3] * a[..., 4], b[..., 3] * b[..., 4])


def iou_3d(a, b):
    """Intersection over union of the volumes of boxes a and b (..., 7) -> (...), 0 to 1."""
    xp = _library(a)
    top = xp.minimum(a[..., 2] + a[..., 5] / 2, b[..., 2] + b[..., 5] / 2)
    bottom = xp.maximum(a[..., 2] - a[..., 5] / 2, b[..., 2] - b[..., 5] / 2)
    shared = bev_intersection(a, b) * xp.clip(top - bottom, 0, None)
    return _over_union(shared, a[..., 3] * a[..., 4] * a[..., 5], b[..., 3] * b[..., 4] * b[..., 5])


def half_sides(boxes):
    """Half the sides along x and y of boxes (..., 7), their yaws rounded to quarter turns -> (...), (...)."""
    xp = _library(boxes)
    across = abs(xp.sin(boxes[..., 6])) > abs(xp.cos(boxes[..., 6]))
    length, width = boxes[..., 3] / 2, boxes[..., 4] / 2
    return xp.where(across, width, length), xp.where(across, length, width)


def nearest_bev_iou(a, b):
    """`bev_iou` with every yaw rounded to a quarter turn, a tenth of the price -> (...). anchors.py gives anchors to
    objects by it, in a form for grids."""
    xp = _library(a)
    (ax, ay), (bx, by) = half_sides(a), half_sides(b)
    x = xp.minimum(a[..., 0] + ax, b[..., 0] + bx) - xp.maximum(a[..., 0] - ax, b[..., 0] - bx)
    y = xp.minimum(a[..., 1] + ay, b[..., 1] + by) - xp.maximum(a[..., 1] - ay, b[..., 1] - by)
    return _over_union(xp.clip(x, 0, None) * xp.clip(y, 0, None), 4 * ax * ay, 4 * bx * by)


def pairwise(overlap, a, b):
    """One of the above for every pair: a (..., N, 7), b (..., M, 7) -> (..., N, M). On a CPU in pieces of some `PIECE`
    pairs."""
    rows = a.shape[-2]
    pairs_a_row = max(1, math.prod(b.shape[:-1]))
    on_gpu = torch.is_tensor(a) and a.device.type != "cpu"
    step = max(1, rows if on_gpu else PIECE // pairs_a_row)
    starts = range(0, max(1, rows), step)
    pieces = [overlap(a[..., i : i + step, None, :], b[..., None, :, :]) for i in starts]
    return _library(a).concatenate(pieces, -2)


# -----------------------------------------------------------------------------
# non-maximum suppression


def nms(boxes, scores, threshold, groups=None):
    """Greedy non-maximum suppression seen from above, of many sets at once: -> bool (..., K), which boxes stay.

    boxes (..., K, 7), scores (..., K); a score of -inf or NaN says that there is no box. The best box stays and removes
    those whose `bev_iou` with it is above `threshold`, then the best of the rest does, and so on; of equal scores the
    first comes first. Leading axes are separate sets, and broadcast: boxes (B, 1, K, 7) and scores (B, C, K) treat the
    C classes of B frames apart. groups (..., K), integers, keep apart what lies in one set.

    "A box stays when none that beats it stays" is repeated until it holds. That is greedy suppression: it has one
    solution, and after r rounds the best r boxes are right. A CPU stops when nothing changes; a GPU, where to ask is to
    wait, does all K rounds.
    """
    xp = _library(boxes)
    first, second = scores[..., :, None], scores[..., None, :]
    place = xp.arange(scores.shape[-1]) if xp is np else xp.arange(scores.shape[-1], device=scores.device)
    beats = (first > second) | ((first == second) & (place[:, None] < place))
    beats = beats & (pairwise(bev_iou, boxes, boxes) > threshold)  # (..., K, K)
    if groups is not None:
        beats = beats & (groups[..., :, None] == groups[..., None, :])
    there = xp.isfinite(scores)
    keep, asks = there, xp is np or scores.device.type == "cpu"
    for _ in range(scores.shape[-1]):
        before, keep = keep, there & ~(keep[..., :, None] & beats).any(-2)
        if asks and (keep == before).all():
            break
    return keep
