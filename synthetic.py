"""Procedural driving scenes in KITTI's own file formats: the demo's data, the tests' data, nothing to download.

    python synthetic.py                                                         # data/synthetic, 80 frames
    python synthetic.py --root data/tiny --frames 4 --seed 1 --width 320 --height 96 --val 0.5

writes KITTI's object layout, which every KITTI reader takes as it is:

    root/training/image_2/000000.png    RGB, 1242 x 375
                  velodyne/000000.bin   float32 x, y, z, reflectance: 64 beams, some 34 000 points, 16-20 000 in view
                  calib/000000.txt      P0..P3, R0_rect, Tr_velo_to_cam, Tr_imu_to_velo
                  label_2/000000.txt    Car, Van, Pedestrian, Cyclist, DontCare: 2D and 3D boxes, truncation, occlusion
                  depth_2/000000.png    16 bit: depth in camera 2, metres * 256; 0 where there is none within 80 m
    root/ImageSets/{train,val,trainval}.txt

A frame takes 0.8 s on one core and 1.5 MB of disk (320 x 96: 0.25 s, 0.6 MB). Each is a street of its own and a
function of (seed, frame number) alone: how many there are and how many workers make them changes no byte (another type
of CPU may round differently). The folder gets its name once all of it is written; one that exists already is an error.

How: a scene is a list of convex primitives (tapered boxes, ellipsoids, cylinders). `cast` finds the nearest one along
each ray of a sensor; a camera, a LiDAR and the sun are each just a grid of rays. All see one geometry, and rays follow
the calibration *as written*, so that picture, cloud, depth and boxes agree to rounding before the LiDAR's noise.

Other than in KITTI, the sweep covers the front 96 degrees only; a view's pitch comes half from the pose and half from
the principal point, so that boxes which turn about one axis (as KITTI's do) stay tight; roads are straight and flat.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

import runtime

MAX_RANGE = 80.0  # metres: LiDAR and depth end here, as in KITTI
KERB = 0.12  # metres, height of the pavement
HULL, BALL, ROD = range(3)  # unit shapes within [-1, 1]^3: a tapered cube, a sphere, a cylinder along z
CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij")).reshape(3, 8)  # of a box, and its 12 edges:
EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (CORNERS[:, a] != CORNERS[:, b]).sum() == 1])

MATERIALS = {  # reflectance to the LiDAR when hit squarely, share of returns lost at any range
    "road": (0.36, 0.01), "block": (0.42, 0.01), "facade": (0.45, 0.01), "roof": (0.4, 0.02), "wall": (0.42, 0.01),
    "paint": (0.35, 0.04), "bonnet": (0.35, 0.04), "cabin": (0.35, 0.04), "tyre": (0.06, 0.1), "spokes": (0.3, 0.1),
    "bark": (0.25, 0.01), "leaves": (0.4, 0.03), "metal": (0.45, 0.03), "sign": (0.95, 0.0), "skin": (0.4, 0.01),
    "cloth": (0.35, 0.01)}
MATERIAL_ID = {name: i for i, name in enumerate(MATERIALS)}


# ---- small mathematics -----------------------------------------------------------------------------------------------
def rotation(yaw=0.0, pitch=0.0, roll=0.0):
    """(3, 3), Rz(yaw) Ry(pitch) Rx(roll), radians."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    y, x = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]]), np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    return np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]]) @ y @ x


def dot(a, b):
    """Along the first axis, of length 3. Not BLAS: its threads would make the last bit depend on the machine's
    cores.
    """
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@lru_cache
def noise_tile(dimensions):
    """float32, periodic, 512 x 512 or 64 x 64 x 64 cells, contrast at every scale; mean 0, standard deviation 1."""
    shape = (512, 512) if dimensions == 2 else (64, 64, 64)
    white = np.fft.fftn(np.random.default_rng(0).standard_normal(shape))
    f = np.sqrt(sum(g**2 for g in np.meshgrid(*map(np.fft.fftfreq, shape))))
    f.flat[0] = np.inf
    pink = np.fft.ifftn(white / f).real
    return (pink / pink.std()).astype(np.float32)


def noise(*x):
    """The tile at two or three coordinates, in cells, linear in between."""
    tile = noise_tile(len(x))
    cell = [np.floor(c).astype(np.int32) for c in x]
    weights = [(1 - w, w) for w in ((c - i).astype(np.float32) for c, i in zip(x, cell))]
    total = 0
    for corner in np.ndindex(*[2] * len(x)):
        index, weight = 0, 1
        for i, w, up, n in zip(cell, weights, corner, tile.shape):
            index, weight = index * n + (i + up & n - 1), weight * w[up]
        total = total + tile.ravel()[index] * weight
    return total


def dice(*x):
    """Numbers in [0, 1) that look random but follow from the coordinates x."""
    return np.modf(np.abs(np.sin(sum(c * k for c, k in zip(x, (12.9898, 78.233, 37.719)))) * 43758.5453))[0]


def covered(x, low, high, blur):
    """Share of [x - blur / 2, x + blur / 2] inside [low, high]: an edge drawn with anti-aliasing."""
    return np.clip(np.minimum(x + blur / 2, high) - np.maximum(x - blur / 2, low), 0, blur) / blur


def stripes(x, period, width, blur):
    """`covered` for [0, width] repeated every `period`; what is finer than the blur fades into its mean."""
    start = period / 4  # away from the seam of the modulo
    return np.where(blur > period / 2, width / period, covered((x + start) % period, start, start + width, blur))


# ---- primitives: unit shapes under affine maps, so that a ray keeps its parameter t when it is mapped back -----------
def part(kind, centre, half, material, colour, taper=(0, 0, 0), R=None):
    """One primitive. half: half-extents along its own axes, the columns of R. taper: the share of the half-length by
    which the faces +x, -x and both of +-y lean inwards at the top (a windscreen, a rear window, a gable roof)."""
    return SimpleNamespace(kind=kind, centre=np.array(centre, float), half=np.array(half, float), material=material,
                           colour=colour, R=np.eye(3) if R is None else R, taper=taper)


box, ball = partial(part, HULL), partial(part, BALL)


def rod(a, b, radius, material, colour):
    """A cylinder from a to b."""
    length = np.linalg.norm(np.subtract(b, a))
    z = np.subtract(b, a) / length
    x = np.cross([0, 1, 0] if abs(z[1]) < 0.9 else [1, 0, 0], z)
    R = np.stack([x, np.cross(z, x), z], 1)
    return part(ROD, np.add(a, b) / 2, (radius, radius, length / 2), material, colour, R=R / np.linalg.norm(R, axis=0))


def freeze(parts, plan, rng):
    """A scene: arrays over P primitives. A world point p is q = M (p - centre) in unit coordinates, and inside a hull
    where planes[:, :3] @ q <= planes[:, 3] (faces +x, -x, +y, -y, +z, -z).
    """
    s = SimpleNamespace(plan=plan, **{k: np.array([getattr(p, k) for p in parts]) for k in ("kind", "centre", "half", "R")})
    s.material = np.array([MATERIAL_ID[p.material] for p in parts])
    s.porous = np.isin(s.material, [MATERIAL_ID["leaves"], MATERIAL_ID["spokes"]])
    s.colour = np.array([p.colour for p in parts], np.float32)  # (P, 3) albedo
    s.style = rng.random((len(parts), 4)).astype(np.float32)  # which windows, which hair
    s.M = s.R.transpose(0, 2, 1) / s.half[:, :, None]  # (P, 3, 3)
    front, rear, side = np.array([p.taper for p in parts], float).T / 2
    o, i = np.zeros(len(parts)), np.ones(len(parts))
    s.planes = np.array([(i, o, front, i - front), (-i, o, rear, i - rear), (o, i, side, i - side),
                         (o, -i, side, i - side), (o, o, i, i), (o, o, -i, i)]).transpose(2, 0, 1)  # (P, 6, 4)
    corners = s.centre[:, :, None] + (s.R * s.half[:, None, :]) @ CORNERS  # (P, 3, 8)
    s.edges = corners[:, :, EDGES]  # (P, 3, 12, 2) of the boxes around the primitives
    return s


def extent(scene, members, direction):
    """(lowest, highest) coordinate of some primitives along a unit vector, exactly: their support functions."""
    reach = np.abs(direction @ scene.R[members] * scene.half[members]).T  # (3, n)
    hull, ball, tube = reach.sum(0), np.sqrt(dot(reach, reach)), np.hypot(reach[0], reach[1]) + reach[2]
    middle, reach = scene.centre[members] @ direction, np.choose(scene.kind[members], [hull, ball, tube])
    return (middle - reach).min(), (middle + reach).max()


# ---- ray casting -----------------------------------------------------------------------------------------------------
def intersect(scene, i, origin, direction):
    """t (n,) at which rays enter primitive i, inf where they miss it. origin, direction: (3, n), or (3, 1) for all."""
    kind, half = scene.kind[i], scene.half[i][:, None]
    o, d = scene.M[i] @ (origin - scene.centre[i][:, None]), scene.M[i] @ direction
    near, far = -np.inf, np.inf  # the interval of t inside what has been looked at so far
    with np.errstate(all="ignore"):
        if kind != HULL:
            k = 3 if kind == BALL else 2
            a, b, c = (d[:k] ** 2).sum(0), (o[:k] * d[:k]).sum(0), (o[:k] ** 2).sum(0) - 1
            root = np.sqrt(b * b - a * c)  # nan where it misses, and nan < nan is false
            near, far = (-b - root) / a, (-b + root) / a
        if kind != BALL:
            planes = scene.planes[i][0 if kind == HULL else 4 :]  # of a cylinder, the two ends
            slope = planes[:, :3] @ d
            slope[slope == 0] = 1e-30
            t = (planes[:, 3:] - planes[:, :3] @ o) / slope
            near = np.maximum(near, np.where(slope < 0, t, -np.inf).max(0))
            far = np.minimum(far, np.where(slope > 0, t, np.inf).min(0))
        hit = (near < far) & (near > 0)
        if scene.porous[i] and hit.any():  # between leaves or spokes one sees the far side, or right through
            solid = np.zeros((2, *hit.shape), bool)
            for t, s in zip((near, far), solid):
                q = (o + t * d)[:, hit]
                s[hit] = np.hypot(q[0], q[1]) > 0.86 if kind == ROD else noise(*(half * q * 11 + i)) < 0.2
            near, hit = np.where(solid[0], near, far), solid.any(0)
        return np.where(hit, near, np.inf)


def cast(rays, scene, members=None):
    """Nearest hits: t (H, W), inf where there is none, and the primitives' indices (H, W).
    Each primitive is tried only in the window of rays that its bounding box covers, in blocks of some 8000 rays: these
    stay in the cache, and below the size at which BLAS starts threads."""
    t, index = np.full(rays.shape, np.inf), np.full(rays.shape, -1, np.int32)
    members = np.arange(len(scene.edges)) if members is None else members
    for i, (top, bottom, left, right) in zip(members, rays.windows(scene.edges[members])):
        step = max(1, 8000 // max(1, right - left))
        for row in range(top, bottom, step) if left < right else ():
            window = np.s_[..., row : min(row + step, bottom), left:right]
            o, d = (a[window].reshape(3, -1) if a.shape[1] > 1 else a[:, :, 0] for a in (rays.origin, rays.direction))
            new = intersect(scene, i, o, d).reshape(t[window].shape)
            nearer = new < t[window]
            np.copyto(t[window], new, where=nearer)
            index[window][nearer] = i
    return t, index


def bounds(row, column, shape):
    """[top, bottom, left, right] of the rays that projected box edges (P, 12, 2) cover, for each of P; nan is
    skipped.
    """
    ends = []
    for x, size in zip((row, column), shape):
        low, high = np.fmin.reduce(x, (1, 2), initial=size), np.fmax.reduce(x, (1, 2), initial=-1)
        ends += [np.clip(np.floor(low), 0, size), np.clip(np.ceil(high) + 1, 0, size)]
    return np.stack(ends, 1).astype(int).tolist()


def in_front(edges, R, origin, forward, near=0.1):
    """Edges (P, 3, E, 2) in the frame R x + origin, cut `near` metres ahead along axis `forward`; nan where wholly
    behind.
    """
    edges = np.einsum("ij,pjkl->pikl", R, edges) + origin[:, None, None]
    a, b = edges[..., 0], edges[..., 1]
    za, zb = a[:, [forward]], b[:, [forward]]  # (P, 1, E)
    with np.errstate(all="ignore"):
        cut = a + (near - za) / (zb - za) * (b - a)
    a, b = np.where(za < near, cut, a), np.where(zb < near, cut, b)
    return np.where(((za < near) & (zb < near))[..., None], np.nan, np.stack([a, b], -1))


def camera_rays(K, R, origin, width, height):
    """One ray per pixel centre; t is the depth along the optical axis. World to camera is R x + origin."""
    v, u = np.mgrid[:height, :width].astype(float)
    A = (np.linalg.inv(R) @ np.linalg.inv(K))[:, :, None, None]
    def windows(edges):
        x, y, z = in_front(edges, R, origin, forward=2).swapaxes(0, 1)
        return bounds(K[1, 1] * y / z + K[1, 2], K[0, 0] * x / z + K[0, 2], v.shape)
    return SimpleNamespace(origin=np.linalg.solve(R, -origin)[:, None, None], shape=v.shape, windows=windows,
                           direction=A[:, 0] * u + A[:, 1] * v + A[:, 2])  # (3, H, W)


def lidar_rays(elevation, azimuth, R, origin):
    """One ray per beam (down) and azimuth (leftwards, within +-80 degrees); t is the range. World to sensor: R x +
    origin.
    """
    e, a = np.meshgrid(elevation, azimuth, indexing="ij")
    local = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    def windows(edges):
        x, y, _ = in_front(edges, R, origin, forward=0).swapaxes(0, 1)
        column = (np.arctan2(y, x) - azimuth[0]) / (azimuth[1] - azimuth[0])
        return bounds(column * 0 + [0, len(elevation)], column, e.shape)  # all beams: edges are bent in elevation
    return SimpleNamespace(origin=(-R.T @ origin)[:, None, None], shape=e.shape, windows=windows,
                           direction=np.einsum("ji,jkl->ikl", R, local))


def sun_rays(sun, x, y):
    """A shadow map: one ray per node of a grid on the ground, from far above along -sun. Near nodes stand closer: `x`
    is any rising sequence, `y` an even one. `node(p)` is where the ray through p stands on the grid, and p's t on
    it.
    """
    ground, top = np.stack([*np.meshgrid(x, y, indexing="ij"), np.zeros((len(x), len(y)))]), 200.0
    def node(p):
        row = np.interp(p[0] - sun[0] / sun[2] * p[2], x, np.arange(len(x)), left=-1, right=len(x))
        return row, (p[1] - sun[1] / sun[2] * p[2] - y[0]) / (y[1] - y[0]), top - p[2] / sun[2]
    return SimpleNamespace(origin=ground + top * sun[:, None, None], direction=-sun[:, None, None], shape=ground.shape[1:],
                           node=node, windows=lambda edges: bounds(*node(edges.swapaxes(0, 1))[:2], ground.shape[1:]))


# ---- things: lists of parts in a frame of their own, x forward, z up, standing on z = 0 ------------------------------
DARK, SKINS = (0.03, 0.03, 0.03), [(0.45, 0.3, 0.22), (0.3, 0.18, 0.11), (0.15, 0.08, 0.05)]
PAINTS = [(0.7, 0.7, 0.68), (0.42, 0.43, 0.45), (0.2, 0.21, 0.23), (0.03, 0.03, 0.035), (0.06, 0.06, 0.07),
          (0.5, 0.03, 0.03), (0.04, 0.09, 0.35), (0.05, 0.2, 0.12), (0.3, 0.26, 0.18), (0.6, 0.4, 0.05)]
CLOTHES = [(0.6, 0.6, 0.58), (0.05, 0.05, 0.06), (0.08, 0.1, 0.25), (0.4, 0.06, 0.05), (0.1, 0.25, 0.12),
           (0.45, 0.35, 0.1), (0.2, 0.2, 0.22), (0.25, 0.4, 0.55)]
FACADES = [(0.62, 0.58, 0.5), (0.6, 0.5, 0.32), (0.55, 0.38, 0.3), (0.32, 0.14, 0.1), (0.5, 0.52, 0.54),
           (0.68, 0.66, 0.62), (0.42, 0.45, 0.38), (0.3, 0.3, 0.32), (0.58, 0.42, 0.22)]


def car(rng):
    """(type, parts). Length, width and height hold every part, mirrors and wheels included."""
    name, length, width, height, cabin, taper = [  # cabin: its two ends at the belt line, in lengths off the middle
        ("Car", rng.uniform(4.3, 4.8), 1.78, rng.uniform(1.40, 1.48), (-0.34, 0.24), (0.55, 0.45, 0.16)),  # a sedan
        ("Car", rng.uniform(3.5, 4.1), 1.66, rng.uniform(1.42, 1.56), (-0.49, 0.26), (0.50, 0.22, 0.15)),  # a hatchback
        ("Car", rng.uniform(4.4, 4.8), 1.76, rng.uniform(1.42, 1.52), (-0.49, 0.23), (0.42, 0.20, 0.15)),  # an estate
        ("Car", rng.uniform(4.3, 4.7), 1.86, rng.uniform(1.62, 1.80), (-0.49, 0.24), (0.38, 0.12, 0.13)),  # an SUV
        ("Van", rng.uniform(4.7, 5.6), 1.95, rng.uniform(1.95, 2.45), (-0.495, 0.34), (0.30, 0.02, 0.06))][rng.integers(5)]
    l, w, sill, paint = length / 2, (width + rng.uniform(-0.06, 0.06)) / 2, 0.20, rng.choice(PAINTS)
    belt, wheel = height * (0.5 if name == "Van" else 0.6), 0.31 + 0.02 * (height > 1.55)
    waist, (rear, front), high = sill + 0.66 * (belt - sill), np.multiply(cabin, length), (height - belt) / 2
    parts = [box((0, 0, (sill + waist) / 2), (l, w - 0.015, (waist - sill) / 2), "paint", paint, (0.01, 0.01, 0)),
             box((0, 0, (waist + belt) / 2), (l * 0.995, w - 0.02, (belt - waist) / 2), "bonnet", paint, (0.16, 0.03, 0.05)),
             box(((rear + front) / 2, 0, belt + high), ((front - rear) / 2, w * 0.94, high), "cabin", paint, taper),
             box((0, 0, 0.24), (l * 0.9, w - 0.2, 0.1), "tyre", DARK)]  # what one sees below
    for side in (-1, 1):
        parts.append(box((front - 0.42, side * (w - 0.07), belt + 0.06), (0.06, 0.07, 0.06), "metal", paint))
        parts += [rod((x, side * (w - 0.2), wheel), (x, side * w, wheel), wheel, "tyre", DARK) for x in (-0.61 * l, 0.61 * l)]
    return name, parts


def person(rng):
    tall, stride, top, trousers = rng.uniform(1.55, 1.9), rng.uniform(0.0, 0.28), rng.choice(CLOTHES), rng.choice(CLOTHES)
    parts = [ball((0, 0, 0.70 * tall), (0.13, 0.20, 0.165 * tall), "cloth", top),
             ball((0, 0, 0.54 * tall), (0.13, 0.17, 0.09 * tall), "cloth", trousers),
             ball((0.02, 0, 0.925 * tall), (0.10, 0.085, 0.075 * tall), "skin", rng.choice(SKINS))]
    for side in (-1, 1):
        foot, hand = side * stride, -0.9 * side * stride
        parts += [rod((0, side * 0.09, 0.54 * tall), (foot, side * 0.10, 0.09), 0.075, "cloth", trousers),
                  box((foot + 0.05, side * 0.10, 0.045), (0.13, 0.05, 0.045), "tyre", DARK),
                  rod((0, side * 0.20, 0.82 * tall), (hand, side * 0.25, 0.50 * tall), 0.05, "cloth", top)]
    return "Pedestrian", parts


def cyclist(rng):
    (top, trousers, frame), lean = (rng.choice(CLOTHES) for _ in range(3)), rng.uniform(0.0, 0.12)
    chest, height = 0.12 + lean, 1.42 - lean / 2
    tubes = [((-0.52, 0, 0.34), (-0.18, 0, 0.62)), ((-0.18, 0, 0.36), (-0.24, 0, 0.88)), ((-0.2, 0, 0.62), (0.4, 0, 0.86)),
             ((-0.16, 0, 0.34), (0.38, 0, 0.76)), ((0.52, 0, 0.34), (0.36, 0, 1.02)), ((0.38, -0.26, 1.03), (0.38, 0.26, 1.03))]
    parts = [rod(a, b, 0.022, "metal", frame) for a, b in tubes]
    parts += [rod((x, -0.025, 0.34), (x, 0.025, 0.34), 0.34, "spokes", DARK) for x in (-0.52, 0.52)]
    parts += [box((-0.26, 0, 0.91), (0.13, 0.07, 0.03), "tyre", DARK),
              rod((-0.22, 0, 0.98), (chest, 0, height), 0.17, "cloth", top),
              ball((chest + 0.08, 0, height + 0.2), (0.11, 0.09, 0.13), "skin", rng.choice(SKINS))]
    for side in (-1, 1):
        knee = (0.14 + 0.06 * side, side * 0.11, 0.74 + 0.12 * side)
        foot = (-0.12 + 0.04 * side, side * 0.12, 0.36 + 0.12 * side)
        parts += [rod((-0.2, side * 0.1, 0.96), knee, 0.085, "cloth", trousers), rod(knee, foot, 0.065, "cloth", trousers),
                  box((foot[0] + 0.06, foot[1], foot[2] - 0.06), (0.13, 0.045, 0.05), "tyre", DARK),
                  rod((chest, side * 0.18, height - 0.04), (0.38, side * 0.22, 1.06), 0.05, "cloth", top)]
    return "Cyclist", parts


def tree(rng):
    tall, spread, fork = rng.uniform(4.5, 9.5), rng.uniform(1.3, 2.5), rng.uniform(2.7, 3.3)  # above the tallest van
    green = rng.choice([(0.10, 0.17, 0.04), (0.07, 0.13, 0.04), (0.14, 0.19, 0.05), (0.2, 0.15, 0.04)])
    parts = [rod((0, 0, 0), (*rng.normal(0, 0.1, 2), fork + 1), rng.uniform(0.1, 0.22), "bark", (0.12, 0.09, 0.07))]
    for _ in range(11):
        r, a, up = spread * rng.uniform(0.35, 0.65), rng.uniform(0, 2 * np.pi), rng.random()
        out = spread * np.sqrt(rng.uniform(0.05, 0.8)) * np.sin(np.pi * (0.2 + 0.7 * up))
        place = out * np.cos(a), out * np.sin(a), fork + 0.9 * r + up * (tall - fork - 1.8 * r)
        parts.append(ball(place, (r, r, 0.85 * r), "leaves", green * rng.uniform(0.7, 1.2)))
    return None, parts


def shrub(rng, hedge):
    """A bush, or 4 to 7 metres of hedge or wall."""
    low, green = rng.uniform(0.35, 0.9), np.array([0.08, 0.14, 0.035]) * rng.uniform(0.7, 1.4)
    if hedge:
        skin = ("leaves", green) if rng.random() < 0.7 else ("wall", (0.5, 0.47, 0.42))
        return None, [box((0, 0, low), (rng.uniform(2, 3.4), 0.25, low), *skin)]
    return None, [ball((*rng.normal(0, low / 2, 2), low), (1.3 * low, 1.3 * low, low), "leaves", green) for _ in range(3)]


def house(rng, x, y, floors, gable):
    """2x times 2y metres, the front towards -y."""
    colour, z = rng.uniform(0.85, 1.1) * rng.choice(FACADES), 1.5 * floors + 0.3
    parts = [box((0, 0, z), (x, y, z), "facade", colour)]
    if gable:
        tiles, high = rng.choice([(0.25, 0.09, 0.05), (0.16, 0.08, 0.06), (0.1, 0.1, 0.11)]), rng.uniform(0.35, 0.5) * y
        parts += [box((0, 0, 2 * z + high), (x + 0.02, y + 0.5, high), "roof", tiles, (0, 0, 1)),
                  box((0.5 * x, 0.3 * y, 2 * z + 1.3 * high), (0.35, 0.35, high), "wall", (0.25, 0.1, 0.07))]  # chimney
    if rng.random() < 0.35:  # balconies
        parts += [box((s, -y - 0.5, 3 * k + 0.7), (1.1, 0.5, 0.5), "wall", colour * 0.8)
                  for s in np.arange(2 - x, x - 1.5, 4) for k in range(1, floors)]
    return None, parts


def lamp(rng):
    """Reaches out towards -y."""
    tall, grey = rng.uniform(5.5, 8), (0.3, 0.32, 0.32)
    return None, [rod((0, 0, 0), (0, 0, tall), 0.08, "metal", grey), rod((0, 0, tall - 0.1), (0, -1.6, tall), 0.04, "metal", grey),
                  box((0, -1.6, tall), (0.15, 0.35, 0.07), "metal", (0.6, 0.6, 0.58))]


def sign(rng):
    """Looks towards -x."""
    tall, colour = rng.uniform(2.2, 2.7), rng.choice([(0.6, 0.03, 0.03), (0.03, 0.12, 0.5)])
    return None, [rod((0, 0, 0), (0, 0, tall + 0.35), 0.04, "metal", (0.3, 0.32, 0.32)),
                  rod((-0.04, 0, tall), (-0.06, 0, tall), 0.32, "sign", colour)]


# ---- a street: x along the road, y to the left, z up, asphalt at z = 0; the sensors at x = 0, driving on the right ---
def is_free(spot, taken):
    """Does a rectangle (x, y, half length, half width, yaw) share no ground with others (n, 5)? By separating axes."""
    x, y, long, wide, yaw = np.stack(np.broadcast_arrays(spot, taken)).transpose(2, 0, 1)  # (2, n) each
    c, s, apart = np.cos(yaw), np.sin(yaw), False
    for u, v in ((c, s), (-s, c)):
        reach = sum(long[k] * np.abs(u * c[k] + v * s[k]) + wide[k] * np.abs(v * c[k] - u * s[k]) for k in (0, 1))
        apart |= (np.abs(u * (x[0] - x[1]) + v * (y[0] - y[1])) > reach).any(0)
    return np.all(apart)


def street(rng):
    """(scene, objects): frozen primitives with the road's `plan`, and [(type, indices of its primitives, yaw)]."""
    kind = rng.choice(["city", "city", "suburb", "suburb", "avenue"])
    lane, lanes = rng.uniform(2.9, 3.7), 2 if kind == "avenue" and rng.random() < 0.6 else 1  # width, number per way
    bay = {side: 2.2 * (rng.random() < 0.65) for side in (-1, 1)}  # parking, to the right (-1) and left
    kerb = {side: lane * lanes + bay[side] for side in (-1, 1)}
    crossings = [(rng.uniform(16, 50), rng.uniform(3.2, 5.0))] if rng.random() < 0.65 else []  # (x, half width)
    crossings.append((rng.uniform(80, 120), rng.uniform(3.2, 5.0)))
    walk, ego = rng.uniform(1.8, 3.2), -lane * (0.5 + rng.integers(lanes)) + rng.uniform(-0.3, 0.3)
    zebra = crossings[0][0] - crossings[0][1] - rng.uniform(4, 5) if rng.random() < 0.6 else -99.0
    plan = SimpleNamespace(
        kind=kind, lane=lane, lanes=lanes, bay=bay, kerb=kerb, walk=walk, crossings=crossings, zebra=zebra, ego=ego,
        marked=rng.random() < 0.85, dashed=rng.random() < 0.7, asphalt=rng.uniform(0.10, 0.2),
        paving=rng.uniform(0.22, 0.36), offset=rng.uniform(0, 500, 2))
    def clear(x, space):
        return all(abs(x - c) > half + space for c, half in crossings)
    # what lines the road: blocks between the crossings, with houses, hedges, trees, poles
    parts = [box((0, 0, -5), (900, 900, 5), "road", (0, 0, 0))]
    spots = []  # (what, x, y, z, yaw, room around it), the first come first
    ends = [-40.0, *(e for c, half in crossings for e in (c - half, c + half)), 300.0]
    blocks, last = list(zip(ends[::2], ends[1::2])), 300.0
    if rng.random() < 0.5:  # the road ends at the last crossing
        last = blocks.pop()[0]
        parts.append(box((last + 100, 0, 0), (100, 200, KERB), "block", (0, 0, 0)))
        spots += [(partial(house, x=7.9, y=6, floors=rng.integers(2, 5), gable=rng.random() < 0.6), last + 9.2, y, KERB,
                   -np.pi / 2, 0) for y in np.arange(-38, 41, 16.0)]
    built, setback, floors, gables, green, hedged = {
        "city": (0.93, rng.uniform(1.4, 2.7), (3, 6), 0.4, 0.3, 0), "suburb": (0.8, rng.uniform(4, 8), (1, 4), 0.85, 0.5, 0.55),
        "avenue": (0.4, rng.uniform(7, 15), (1, 5), 0.5, 0.9, 0.55)}[kind]
    for side in (-1, 1):
        front, post, inwards = kerb[side] + walk, side * (kerb[side] + 0.42), np.pi * (side < 0)  # turns -y to the road
        for a, b in blocks:
            parts.append(box(((a + b) / 2, side * (kerb[side] + 100), 0), ((b - a) / 2, 100, KERB), "block", (0, 0, 0)))
            x, b = a + walk + rng.uniform(0.5, 3), min(b, 130)
            while x < b - walk - 18:
                long, deep = rng.uniform(4, 9), rng.uniform(4, 6)
                thing = partial(house, x=long, y=deep, floors=rng.integers(*floors), gable=rng.random() < gables)
                if rng.random() < built:
                    spots.append((thing, x + long, side * (front + setback + deep + rng.uniform(0, 0.5)), KERB, inwards, 0))
                x += 2 * long + (0.05 if kind == "city" and rng.random() < 0.7 else rng.uniform(2, 6))
            spots += [(partial(shrub, hedge=True), x, side * (front + 0.5), KERB, 0, 0.1)
                      for x in np.arange(a + 8, min(b, 90) - 4, 7) if rng.random() < hedged]
        spots += [(tree, x, side * (kerb[side] + 0.7), KERB, 0, 0.3)
                  for x in np.arange(rng.uniform(-12, 0), 110, rng.uniform(7, 13)) if clear(x, 3) and rng.random() < green]
        spots += [(rng.choice([tree, partial(shrub, hedge=False)]), x, side * (front + rng.uniform(1.5, 12)), KERB, 0, 0.1)
                  for x in rng.uniform(0, 90, rng.integers(4, 16)) if clear(x, 3)]
        spots += [(lamp, x, post, KERB, inwards, 0.1) for x in np.arange(rng.uniform(5, 20), 120, 26) if clear(x, 1)]
        spots += [(sign, x, post, KERB, inwards + np.pi, 0.1) for x in rng.uniform(4, 60, rng.integers(1, 5)) if clear(x, 1)]

    # who is on it
    spots += [(car, x, ego, 0, 0, 0.5) for x in rng.uniform(8, 60, 3)]
    spots += [(car, x, lane * (0.5 + rng.integers(lanes)), 0, np.pi, 0.5) for x in rng.uniform(6, 75, 4)]
    for side in (-1, 1):
        full = rng.uniform(0.3, 0.9)
        for x in np.arange(rng.uniform(-9, -4), 85, rng.uniform(5.6, 6.6)):
            if bay[side] and clear(x, 5.5) and abs(x - zebra - 1.5) > 5 and rng.random() < full:  # parked
                spots.append((car, x, side * (kerb[side] - 1.16), 0, np.pi * ((side > 0) ^ (rng.random() < 0.12)), 0.1))
            elif kind != "city" and clear(x, 4) and rng.random() < 0.25:  # in a driveway
                spots.append((car, x, side * (kerb[side] + walk + 3), KERB, np.pi / 2 * rng.choice([-1, 1]), 0.2))
    for c, half in crossings:
        for way in rng.choice([-1, 1], rng.integers(0, 4)):  # in the side streets, or turning
            y, turn = rng.uniform(-1, 1, 2) * ((2, 0.7) if rng.random() < 0.3 else (22, 0.02))
            spots.append((car, c + way * half * 0.5, y, 0, way * np.pi / 2 + turn, 0.3))
    for side in rng.choice([-1, 1], rng.integers(3, 11)):
        x, y, heading = 4 + 50 * rng.random() ** 1.3, side * (kerb[side] + rng.uniform(0.5, walk)), rng.normal(0, 0.4)
        if zebra > 0 and rng.random() < 0.3:
            spots.append((person, zebra + rng.uniform(0.5, 2.5), y * 0.4, 0, side * np.pi / 2 + heading, 0.1))
        elif clear(x, 1):
            spots.append((person, x, y, KERB, np.pi * rng.integers(2) + heading, 0.1))
    for side in rng.choice([-1, 1], rng.integers(0, 5)):
        x, on_road = rng.uniform(5, 45), rng.random() < 0.7
        y, z = (kerb[side] - bay[side] - 0.6, 0.0) if on_road else (kerb[side] + 1.2, KERB)
        if on_road or clear(x, 2):
            spots.append((cyclist, x, side * y, z, np.pi * (side > 0), 0.15))
    objects, taken = [], [(-0.5, ego, 4.0, 1.3, 0.0)]  # the ground things stand on; first, the car with the sensors
    for what, x, y, z, yaw, room in spots:
        label, thing = what(rng)
        if label:
            x, y, yaw = np.array([x, y, yaw]) + rng.normal(0, (0.1, 0.04, 0.03))
        low = [p for p in thing if p.centre[2] - p.half.max() < 2.5]  # what hangs higher takes no ground
        reach = np.max([np.abs(p.centre[:2]) + np.abs(p.R[:2] * p.half).sum(1) for p in low], 0) + room
        spot, turn = (x, y, *reach, yaw), rotation(yaw)
        if not is_free(spot, taken) or (label and x > last - 3):
            continue
        taken.append(spot)
        if label:
            objects.append((label, np.arange(len(parts), len(parts) + len(thing)), yaw))
        for p in thing:
            p.centre, p.R = turn @ p.centre + [x, y, z], turn @ p.R
        parts += thing
    return freeze(parts, plan, rng), objects


# ---- how it looks, to light and to the LiDAR -------------------------------------------------------------------------
def hits(rays, scene, t, index):
    """What the N rays that hit anything have hit: world points, unit coordinates q, faces, normals, incidence."""
    h = SimpleNamespace(found=np.flatnonzero(index >= 0))
    h.prim, h.direction = index.ravel()[h.found], rays.direction.reshape(3, -1)[:, h.found]
    h.p = rays.origin.reshape(3, -1) + t.ravel()[h.found] * h.direction  # (3, N)
    M, away = scene.M.transpose(1, 2, 0)[:, :, h.prim], h.p - scene.centre.T[:, h.prim]  # (3, 3, N), (3, N)
    h.q, h.half = dot(M.swapaxes(0, 1), away[:, None]).astype("f4"), scene.half.astype("f4").T[:, h.prim]
    planes = scene.planes.astype("f4").transpose(1, 2, 0)[:, :, h.prim]  # (6, 4, N)
    # the face is the plane that the point lies on; on balls and rods, the side of the box around them that is nearest
    h.face = (dot(planes.swapaxes(0, 1), h.q[:, None]) - planes[:, 3]).argmax(0)  # +x -x +y -y +z -z
    gradient, kind = planes[h.face, :3, np.arange(len(h.face))].T, scene.kind[h.prim]
    side = (kind == ROD) & (np.hypot(h.q[0], h.q[1]) >= np.abs(h.q[2]))
    gradient = np.where(kind == BALL, h.q, np.where(side, [h.q[0], h.q[1], 0 * h.q[0]], gradient))
    normal, length = dot(M.astype("f4"), gradient[:, None]), np.sqrt(dot(h.direction, h.direction))
    h.normal = normal / np.sqrt(dot(normal, normal))
    h.range = (t.ravel()[h.found] * length).astype("f4")
    h.facing = np.abs(dot(h.normal, h.direction) / length).astype("f4")  # cosine of incidence
    return h


def road(plan, x, y, along, aside):
    """(on asphalt or in the fields, share painted white). along, aside: metres that a pixel blurs over."""
    half_road, asphalt = plan.lane * plan.lanes, (y < plan.kerb[1]) & (y > -plan.kerb[-1])
    dashes, thin = stripes(x, 9.0, 3.0, along), partial(covered, low=-1, high=0.07, blur=aside)
    lines = thin(np.abs(y)) * (dashes if plan.dashed else 1) + (plan.lanes > 1) * thin(np.abs(np.abs(y) - plan.lane)) * dashes
    for side in (-1, 1):
        lines += thin(np.abs(side * y - half_road + 0.12)) * (stripes(x, 2.0, 1.0, along) if plan.bay[side] else 1)
    lines *= plan.marked
    for c, half in plan.crossings:
        lines, asphalt = lines * (np.abs(x - c) > half), asphalt | (np.abs(x - c) < half)
    bars = covered(x, plan.zebra, plan.zebra + 3, along) * stripes(y, 1.0, 0.5, aside) * (np.abs(y) < half_road)
    stop = covered(x, plan.zebra - 1.3, plan.zebra - 0.9, along) * (y < -0.1) * (y > -half_road)
    return asphalt, np.maximum(lines * ((x < plan.zebra - 1.3) | (x > plan.zebra + 3.3)), bars + stop)


def surface(scene, h, pixel):
    """Albedo (3, N), LiDAR reflectance (N,) in [0, 1], share of mirror reflection (N,). pixel: a ray's width in
    radians. One texture for both senses: a marking is bright to either, a window dark to both.
    """
    plan, prim, q, faces = scene.plan, h.prim, h.q * h.half, h.face  # q in metres
    material, albedo, gloss = scene.material[prim], scene.colour.T[:, prim].copy(), np.zeros(len(prim), "f4")
    infrared = np.array([m[0] for m in MATERIALS.values()], "f4")[material]
    blur, ends, level = np.maximum(h.range * pixel, 1e-3), faces < 2, faces >= 4  # metres; faces +-x, faces +-z
    flat = level & np.isin(material, [MATERIAL_ID["road"], MATERIAL_ID["block"]])
    a = np.where(flat, h.p[0], np.where(ends, q[1], q[0]) + prim * 3.7).astype("f4")  # metres along the surface
    b = np.where(flat, h.p[1], np.where(level, q[1], q[2])).astype("f4")  # and up it
    fade = 1 / (1 + (blur / 0.05) ** 2)  # what is finer than a pixel must go, or it flickers
    fine, coarse = noise(a * 37, b * 37) * fade, noise(a * 2.3 + 11, b * 2.3 + plan.offset[0])
    tone = 1 + (0.12 * fine + 0.08 * coarse).clip(-0.6, 0.8) * np.where(material == MATERIAL_ID["cloth"], 0.5, 1)
    grass = np.array([[0.10], [0.15], [0.04]], "f4") * (1 + 0.25 * fine + 0.15 * coarse)
    def on(*names):
        return np.flatnonzero(np.isin(material, [MATERIAL_ID[name] for name in names]))
    def paint(i, share, colour, reflectance=None, shine=None):
        """Lay a colour over the hits i, and its reflectance and gloss where they differ from what is below."""
        share, colour = np.asarray(share, "f4"), np.asarray(colour, "f4")
        albedo[:, i] += share * (colour.reshape(len(colour), -1) - albedo[:, i])
        for layer, value in ((infrared, reflectance), (gloss, shine)):
            if value is not None:
                layer[i] += share * (value - layer[i])
    i = on("road")
    x, y = h.p[:2, i]
    asphalt, white = road(plan, x, y, blur[i] / np.maximum(h.facing[i], 0.01), blur[i] * 1.5)
    patches = noise(x * 0.7 + plan.offset[0], y * 1.1 + plan.offset[1])
    cracks = (np.abs(noise(x * 4 + plan.offset[1], y * 4 + 9)) < 0.05) * (patches > 0) * fade[i]
    grey = plan.asphalt * (1 - 0.25 * (patches > 0.9) - 0.1 * (patches < -1.2)) * (1 - 0.5 * cracks)
    paint(i, 1, np.where(asphalt, grey, grass[:, i]))
    paint(i, white * np.clip(0.95 + 0.15 * fine[i], 0, 1), (0.62, 0.62, 0.6), 0.75)
    i = on("block")
    edge = np.min(h.half[:2, i] - np.abs(q[:2, i]), 0)  # metres from the kerb
    joints = np.max([stripes(x, 0.6, 0.03, blur[i] * 2) for x in h.p[:2, i]], 0)
    paint(i, 1, plan.paving * np.array([[1.03], [1.0], [0.95]]) * (1 - 0.35 * joints * fade[i]))
    paint(i, (edge > plan.walk) * (0.15 if plan.kind == "city" else 1), grass[:, i], 0.45)
    paint(i, (edge < 0.16) | ~level[i], (0.42, 0.42, 0.41), 0.4)
    i = on("facade")
    style, wide = scene.style[prim[i]].T, np.where(ends[i], h.half[1, i], h.half[0, i])  # half as wide
    s, z = np.where(ends[i], q[1, i], q[0, i]) + wide, q[2, i] + h.half[2, i]  # metres from a corner
    pitch = 2 * wide / np.maximum(np.round(2 * wide / (2.2 + 1.4 * style[0])), 1)  # a column of windows
    column, storey = np.floor(s / pitch), np.floor(z / 3)
    u, v, chance = np.abs((s / pitch - column - 0.5) * pitch), z - storey * 3, dice(column, storey, prim[i])
    bricks = np.maximum(stripes(z, 0.16, 0.03, blur[i]), stripes(s + 0.12 * (z // 0.16 % 2), 0.25, 0.03, blur[i]))
    paint(i, 0.25 * (style[2] < 0.3) * bricks, (0.6, 0.57, 0.52))
    paint(i, 0.4 * covered(z, -1, 0.7, blur[i]), (0.2, 0.19, 0.18))
    shop, door = (style[3] > 0.6) & (storey == 0), (style[3] < 0.6) & (storey == 0) & (chance > 0.8)
    here = ~level[i] & (z < 2 * h.half[2, i] - 0.4) & (pitch > 1.5) & (~ends[i] | (chance < 0.5))
    half = np.where(door, 0.55, np.where(shop, pitch / 2 - 0.25, 0.5 + 0.45 * style[1]))
    sill, lintel = np.where(door, 0, np.where(shop, 0.5, 0.95)), np.where(shop, 2.6, 2.35)
    frame = here * covered(u, -9, half + 0.1, blur[i]) * covered(v, sill - 0.1, lintel + 0.1, blur[i])
    glass = here * covered(u, 0.04 * ~door, half, blur[i]) * covered(v, sill, lintel, blur[i])
    shut = ((chance < 0.35) & (v > lintel - 4 * chance) & ~shop) | door
    paint(i, frame, np.where(style[1] < 0.7, 0.7, 0.15)[None], 0.5)
    pane = np.where(door, 0.1, np.where(shut, 0.45, 0.035 + 0.03 * chance))
    paint(i, glass, pane[None], np.where(shut, 0.3, 0.1), np.where(shut, 0.03, 0.25))
    i = on("roof")
    paint(i, 0.4 * stripes(q[2, i], 0.3, 0.08, blur[i]) + 0.3 * stripes(a[i], 0.25, 0.05, blur[i]), DARK)
    i = on("paint", "bonnet")  # a car's lower half: bumper, plates, wheel arches, seams; and above it lamps and grille
    (x, y, z), front, upper, doors = h.q[:, i], faces[i] == 0, material[i] == MATERIAL_ID["bonnet"], faces[i] // 2 == 1
    gloss[i], y = 0.06, np.abs(y)
    lamp, plate = ends[i] & upper & (np.abs(y - 0.77) < 0.17) & (np.abs(z) < 0.75), ends[i] & ~upper & (y < 0.3)
    arch = np.hypot((np.abs(x) - 0.61) * h.half[0, i], z * h.half[2, i] + 0.1) < 0.37
    paint(i, lamp & front, (0.8, 0.8, 0.78), 0.6, 0.25)
    paint(i, lamp & ~front, (0.5, 0.02, 0.02), 0.9, 0.1)
    paint(i, front & (y < 0.5) & np.where(upper, np.abs(z) < 0.6, np.abs(z + 0.55) < 0.2), DARK, 0.1)
    paint(i, plate & (np.abs(z - 0.15) < 0.3), (0.75, 0.75, 0.72), 0.99)
    paint(i, 0.9 * ~upper * ((doors & arch) | (z < -0.82)), DARK, 0.08, 0)
    paint(i, 0.6 * doors * (np.abs((x + 0.5) % 0.39) < 0.012) * fade[i], DARK)  # seams
    i = on("cabin")
    (x, y, z), van, gloss[i] = h.q[:, i], h.half[2, i] > 0.42, 0.06  # a van has no windows behind
    pillar = (np.abs(np.abs(x + 0.1) - 0.22) < 0.03) | (np.abs(x + 0.02) > 0.68 - 0.14 * z) | (van & (x < 0.35))
    frame = np.where(ends[i], (np.abs(y) > 0.9 - 0.1 * z) | (van & (x < 0) & (np.abs(y) < 0.06)), pillar)
    paint(i, ~level[i] & (z > -0.9) & (z < 0.78) & ~frame, DARK, 0.06, 0.12)
    i = on("tyre")
    spoke = 0.35 + 0.65 * (np.cos(5 * np.arctan2(h.q[1, i], h.q[0, i]) + prim[i]) > -0.3)
    rim = (scene.kind[prim[i]] == ROD) & level[i] & (np.hypot(h.q[0, i], h.q[1, i]) < 0.64)
    paint(i, rim * spoke, (0.4, 0.4, 0.42), 0.5, 0.05)
    i = on("leaves")
    albedo[:, i] *= np.clip(0.8 + 0.5 * noise(*(q[:, i] * 13 + prim[i])), 0.2, 2)
    i = on("sign")
    radius = np.hypot(h.q[0, i], h.q[1, i])
    paint(i, (radius < 0.7) & (radius > scene.style[prim[i], 0] - 0.4), (0.75, 0.75, 0.75))
    paint(i, faces[i] != 4, (0.3, 0.3, 0.3), 0.3)  # the back
    i = on("skin")
    paint(i, (h.q[2, i] > 0.35) | (h.q[0, i] < -0.35), np.outer((0.05, 0.035, 0.02), 1 + 4 * scene.style[prim[i], 0]))  # hair
    return albedo * tone, np.clip(infrared * (0.8 + 0.2 * tone), 0, 1), gloss


def sky(weather, d):
    """Radiance (3, N) from the directions d (3, N): a gradient, clouds, a glow about the sun, far hills."""
    d = d / np.sqrt(dot(d, d))
    up = np.clip(d[2], 0, 1)
    light = weather.horizon[:, None] + (weather.zenith - weather.horizon)[:, None] * (1 - (1 - up) ** 4)
    x, y = d[:2] / (up + 0.12) * 40
    light += np.clip((noise(x + weather.offset, y) + weather.cloudy) * 0.8, 0, 1) * np.clip(up * 8, 0, 1) * (weather.white - light)
    light += 0.5 * weather.sunshine * np.clip(dot(weather.sun, d), 0, 1) ** 64
    hills = 0.035 + 0.02 * noise(np.arctan2(d[1], d[0]) * 60 + weather.offset, 0 * up)
    return np.where(d[2] < hills, (weather.horizon * (0.33, 0.37, 0.37))[:, None], light)


def photograph(rays, scene, t, index, weather, rng, pixel):
    """(H, W, 3) uint8: sun and its shadows, sky light, reflections, haze, lens, sensor. pixel: its width in radians."""
    h = hits(rays, scene, t, index)
    albedo, _, gloss = surface(scene, h, pixel)
    shadows = sun_rays(weather.sun, np.geomspace(6, 86, 900) - 6, np.linspace(-32, 32, 580))
    first = np.pad(cast(shadows, scene)[0], 1, constant_values=np.inf)  # beyond the map it is sunny
    row, column, own = shadows.node(h.p + 0.07 * h.normal)  # off the surface, or it shades itself
    row, column = (np.clip(x + 1, 0, n + 0.99) for x, n in zip((row, column), shadows.shape))
    i, j, lit = row.astype(np.int32), column.astype(np.int32), np.zeros(len(own), np.float32)
    for di, dj in np.ndindex(2, 2):
        lit += np.abs((1 - di - row + i) * (1 - dj - column + j)) * (own < first[i + di, j + dj] + 0.08)
    slant, through = dot(weather.sun, h.normal), 0.35 * (scene.material[h.prim] == MATERIAL_ID["leaves"])  # light in leaves
    direct = weather.sunshine * lit * (through + (1 - through) * slant).clip(0, 1).astype(np.float32)
    ambient = weather.sky_light * (0.62 + 0.38 * h.normal[2])
    colour = albedo * (np.array([[1], [0.95], [0.86]], "f4") * direct + np.array([[0.9], [0.98], [1.1]], "f4") * ambient)
    i = np.flatnonzero(gloss)
    d, n = h.direction[:, i], h.normal[:, i]
    d = d - 2 * dot(d, n) * n
    glint = 10 * weather.sunshine * lit[i] * np.clip(dot(weather.sun, d) / np.sqrt(dot(d, d)), 0, 1) ** 200
    fresnel = gloss[i] + (1 - gloss[i]) * (1 - h.facing[i]) ** 5 * 0.6
    colour[:, i] += fresnel * (np.where(d[2] > 0, sky(weather, d), 0.12) + glint)
    colour += (1 - np.exp(-h.range / weather.haze)) * (weather.horizon[:, None] - colour)
    picture, empty = np.empty((3, t.size), np.float32), np.flatnonzero(index < 0)
    picture[:, h.found], picture[:, empty] = colour, sky(weather, rays.direction.reshape(3, -1)[:, empty])
    p = np.pad(picture.reshape(3, *t.shape), [(0, 0), (1, 1), (1, 1)], mode="edge")
    p = 0.7 * p[:, 1:-1] + 0.15 * (p[:, 2:] + p[:, :-2])  # the lens: softens the stairs that one ray per pixel leaves
    p = 0.7 * p[:, :, 1:-1] + 0.15 * (p[:, :, 2:] + p[:, :, :-2])
    p = 255 * np.clip(p * weather.exposure, 0, 1) ** (1 / 2.2) + weather.grain * rng.standard_normal(p.shape, np.float32)
    return np.round(p).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def sweep(rays, scene, R, rng):
    """(N, 4) float32 x, y, z, reflectance in the sensor's frame (R: sensor to world): ranges with noise, some lost."""
    h = hits(rays, scene, *cast(rays, scene))
    _, squarely, _ = surface(scene, h, 1e-3)
    reflectance = (squarely * (0.5 + 0.5 * h.facing) * (1 + 0.1 * rng.standard_normal(len(h.prim)))).clip(0, 0.99)
    lost = np.array([m[1] for m in MATERIALS.values()])[scene.material[h.prim]] + 0.3 * (squarely < 0.12)  # glass, black
    lost += np.exp(-reflectance * (300 / h.range) ** 2)  # too little light comes back
    kept = (rng.random(len(lost)) > lost) & (h.range > 2) & (h.range < MAX_RANGE)
    ranges = np.sqrt(((h.p - rays.origin[:, 0]) ** 2).sum(0)) + 0.02 * rng.standard_normal(len(lost))
    xyz = (np.einsum("ji,jn->in", R, h.direction) * ranges).round(3)  # KITTI has millimetres, and hundredths
    return np.vstack([xyz, reflectance.round(2)])[:, kept].T.astype(np.float32)


# ---- one frame -------------------------------------------------------------------------------------------------------
def mount(rng, ego, width, height):
    """(text of the calibration file, {name: matrix, as that text has it}, velodyne-to-world rotation, its place)."""
    scale, small = width / 1242, np.deg2rad(rng.uniform(-1, 1, 12))
    focal, cx = rng.uniform(700, 750) * scale, (width - 1) / 2 + rng.uniform(-12, 12) * scale
    K = np.array([[focal, 0, cx], [0, focal, 0.47 * height + rng.uniform(-18, 18) * scale], [0, 0, 1]])
    axes = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # velodyne (ahead, left, up) to camera (right, down, ahead)
    shift = rng.uniform(-0.03, 0.03), -rng.uniform(0.04, 0.2), -rng.uniform(0.25, 0.4)
    baselines = (0, 0, 0), (-0.537, 0, 0), (0.06, 3e-4, rng.uniform(2e-3, 5e-3)), (-0.473, 3e-3, 3e-3)
    rows = {f"P{i}": np.c_[K, K @ b] for i, b in enumerate(baselines)}
    rows["R0_rect"] = rotation(*0.4 * small[:3])
    rows["Tr_velo_to_cam"] = np.c_[axes @ rotation(*(0.6, 0.5, 0.4) * small[3:6]), shift]
    rows["Tr_imu_to_velo"] = np.c_[rotation(*0.1 * small[6:9]), (-0.81, 0.32, -0.8)]
    text = "".join(f"{k}: {' '.join(f'{x:.12e}' for x in m.ravel())}\n" for k, m in rows.items()) + "\n"
    written = {k: np.array(v.split(), float).reshape(3, -1) for k, v in (s.split(":") for s in text.split("\n") if s)}
    return text, written, rotation(*(4, 0.6, 0.5) * small[9:]), np.array([0, ego, rng.uniform(1.68, 1.9)])


def box_3d(scene, members, yaw, R, origin):
    """KITTI's (h, w, l, x, y, z, ry) in rectified camera 0, on the two decimals that the file keeps: the tightest box
    around all parts that turns about the camera's y axis only. R, origin: world to that camera."""
    ahead = R @ (np.cos(yaw), np.sin(yaw), 0)
    ry = round(np.arctan2(-ahead[2], ahead[0]), 2)
    axes = np.array([[np.cos(ry), 0, -np.sin(ry)], [0, 1, 0], [np.sin(ry), 0, np.cos(ry)]])  # length, height, width
    span = np.array([extent(scene, members, axis @ R) for axis in axes]) + (axes @ origin)[:, None]
    l, h, w = np.ceil((span[:, 1] - span[:, 0]) * 100 + 1) / 100  # up, and 1 cm of room for the rounded place
    x, y, z = axes.T @ (span[0].mean(), span[1, 1], span[2].mean())  # y points down: the centre of the lower face
    return h, w, l, x.round(2), y.round(2), z.round(2), ry


def annotate(scene, objects, camera, t, R, origin, P2):
    """The lines of the label file. The 2D box bounds the projected 3D box; truncation is the share of it outside the
    picture; occlusion goes by the share of the object's own pixels that something else hides: 10, 50, 90 %."""
    (height, width), lines = t.shape, []
    for name, members, yaw in objects:
        h, w, l, x, y, z, ry = box_3d(scene, members, yaw, R, origin)
        corners = np.diag([l / 2, h / 2, w / 2]) @ CORNERS - [[0], [h / 2], [0]]
        edges = in_front(corners[None, :, EDGES], rotation(pitch=ry), np.array([x, y, z]), forward=2, near=1.0)[0]
        u, v, depth = P2[:, :3] @ edges.reshape(3, -1) + P2[:, 3:]
        low_u, low_v = np.fmin.reduce([u / depth, v / depth], 1)
        high_u, high_v = np.fmax.reduce([u / depth, v / depth], 1)
        left, right = np.clip([low_u, high_u], 0, width - 1)
        top, bottom = np.clip([low_v, high_v], 0, height - 1)
        truncated = 1 - (right - left) * (bottom - top) / ((high_u - low_u) * (high_v - low_v))
        if not truncated < 1:  # nan: wholly behind the camera
            continue
        alone = cast(camera, scene, members)[0]
        own = np.isfinite(alone)
        hidden = (t[own] < alone[own] - 1e-6).mean() if own.any() else 1.0
        rectangle = f"{left:.2f} {top:.2f} {right:.2f} {bottom:.2f}"
        if hidden < 0.98 and ((bottom - top) * 1242 / width < 12 or z > 75 or truncated > 0.97):  # too little to be told
            lines.append(f"DontCare -1 -1 -10 {rectangle} -1 -1 -1 -1000 -1000 -1000 -10")
        elif hidden < 0.98:
            alpha, level = (ry - np.arctan2(x, z) + np.pi) % (2 * np.pi) - np.pi, np.searchsorted([0.1, 0.5, 0.9], hidden)
            box = f"{h:.2f} {w:.2f} {l:.2f} {x:.2f} {y:.2f} {z:.2f} {ry:.2f}"
            lines.append(f"{name} {truncated:.2f} {level} {alpha:.2f} {rectangle} {box}")
    return sorted(lines, key=lambda line: line.startswith("DontCare"))  # KITTI lists these last


def frame(seed, number, width=1242, height=375):
    """What both sensors make of a street: picture (H, W, 3) uint8, depth (H, W) in metres, 0 where there is none,
    points (N, 4) float32, calib (text), labels (lines); and the truth behind it, for tests."""
    rng = np.random.default_rng([seed, number])
    scene, objects = street(rng)
    calib, matrices, R_velo, place = mount(rng, scene.plan.ego, width, height)
    # world to rectified camera 0, x_rect = R x + origin, from the digits that the file holds; then on to camera 2
    R0, Tr, P2 = matrices["R0_rect"], matrices["Tr_velo_to_cam"], matrices["P2"]
    R, origin = R0 @ Tr[:, :3] @ R_velo.T, R0 @ (Tr[:, 3] - Tr[:, :3] @ R_velo.T @ place)
    camera = camera_rays(P2[:, :3], R, origin + np.linalg.solve(P2[:, :3], P2[:, 3]), width, height)
    t, index = cast(camera, scene)
    high, turn, grey = np.deg2rad(rng.uniform(22, 62)), rng.uniform(0, 2 * np.pi), rng.random() < 0.25
    weather = SimpleNamespace(
        sun=np.array([np.cos(high) * np.cos(turn), np.cos(high) * np.sin(turn), np.sin(high)]),
        sunshine=0.2 if grey else rng.uniform(1.5, 2.2), sky_light=rng.uniform(0.7, 0.9) if grey else rng.uniform(0.3, 0.5),
        horizon=rng.uniform(0.85, 1.05) * np.array((0.75, 0.77, 0.8) if grey else (0.72, 0.82, 0.95)),
        zenith=rng.uniform(0.85, 1.1) * np.array((0.6, 0.63, 0.67) if grey else (0.16, 0.34, 0.72)),
        white=0.75 if grey else 1.0, cloudy=rng.uniform(-1.2, 0.5) + grey, offset=rng.uniform(0, 500),
        haze=rng.uniform(250, 900), exposure=rng.uniform(0.8, 1.1) * (1.2 if grey else 0.95), grain=rng.uniform(1, 2.5))
    picture = photograph(camera, scene, t, index, weather, rng, 1 / P2[0, 0])
    # HDL-64E: 32 beams every third of a degree and 32 below every half, 0.16 degrees from one firing to the next
    elevation = np.deg2rad(np.r_[np.linspace(2, -8.33, 32), np.linspace(-8.83, -24.8, 32)])
    azimuth = np.deg2rad(np.arange(-48, 48, 0.16) + rng.uniform(0, 0.16))
    points = sweep(lidar_rays(elevation, azimuth, R_velo.T, -R_velo.T @ place), scene, R_velo, rng)
    labels = annotate(scene, objects, camera, t, R, origin, P2)
    return SimpleNamespace(picture=picture, depth=np.where(t < MAX_RANGE, t, 0), points=points, calib=calib, labels=labels,
                           scene=scene, objects=objects, camera=camera, R_velo=R_velo, place_velo=place)


# ---- files -----------------------------------------------------------------------------------------------------------
def write_frame(number, folder, seed, width, height):
    f, name = frame(seed, number, width, height), f"{number:06d}"
    # level 1 takes a quarter of Pillow's default time, and grain does not compress anyway
    Image.fromarray(f.picture).save(folder / "image_2" / f"{name}.png", compress_level=1)
    Image.fromarray(np.round(f.depth * 256).astype(np.uint16)).save(folder / "depth_2" / f"{name}.png", compress_level=1)
    (folder / "velodyne" / f"{name}.bin").write_bytes(f.points.tobytes())  # tofile does not say why it fails
    (folder / "calib" / f"{name}.txt").write_text(f.calib)
    (folder / "label_2" / f"{name}.txt").write_text("".join(line + "\n" for line in f.labels))


def write_dataset(root: str = "data/synthetic", frames: int = 80, seed: int = 0, width: int = 1242, height: int = 375,
                  val: float = 0.25, workers: int | None = None, progress: bool = True) -> None:
    """Write driving scenes in the layout of KITTI's object benchmark.

    Args:
        root: the folder to make; it must not exist.
        frames: how many, each a street of its own.
        seed: same seed, same bytes.
        width: of the pictures, in pixels; the focal length follows it.
        height: of the pictures, in pixels; 0.3 of the width is KITTI's.
        val: share of the frames in ImageSets/val.txt, evenly spread.
        workers: processes; by default one per core.
        progress: show a bar.
    """
    if (root := Path(root)).exists():
        raise SystemExit(f"{root} exists already: remove it, or give another root")
    if frames < 1 or width < 32 or height < 32 or not 0 <= val < 1:
        raise SystemExit(f"cannot write {frames} frames of {width} x {height} pixels with val {val}")
    root.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        for folder in ("image_2", "depth_2", "velodyne", "calib", "label_2", "../ImageSets"):
            (unfinished / "training" / folder).mkdir(parents=True)
        is_val = [int((i + 1) * val) > int(i * val) for i in range(frames)]
        for name, keep in (("train", (False,)), ("val", (True,)), ("trainval", (False, True))):
            (unfinished / "ImageSets" / f"{name}.txt").write_text("".join(f"{i:06d}\n" for i in range(frames) if is_val[i] in keep))
        job = partial(write_frame, folder=unfinished / "training", seed=seed, width=width, height=height)
        bar = partial(tqdm, total=frames, desc=f"writing {root}", unit="frame", disable=not progress)
        # fork, where there is such a thing: it starts at once, and does not import the caller's script again
        context = get_context("fork" if hasattr(os, "fork") else None)
        pool = ProcessPoolExecutor(min(workers or os.cpu_count(), frames), context)
        try:
            with runtime.blocked(signal.SIGINT):
                written = pool.map(job, range(frames))
            list(bar(written))
        finally:
            pool.shutdown(cancel_futures=True)
        unfinished.chmod(0o755)  # a temporary folder is its owner's only
        unfinished.rename(root)
    except OSError as e:  # a worker's often names no file
        raise OSError(e.errno, e.strerror, str(root)) from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_scenes(c, run):
    """The built-in scenes, where a training script's preset asks for them and they are not there yet. c: its Config."""
    if c.synthetic_frames and c.data_root and not Path(c.data_root[0]).exists() and run.main:
        write_dataset(c.data_root[0], frames=c.synthetic_frames)
    run.any(False)  # a barrier: the other ranks wait for the scenes


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a kill cleans up as well
    runtime.command_line(lambda: runtime.tyro.cli(runtime.later(write_dataset)))
