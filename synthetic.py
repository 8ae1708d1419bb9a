"""Procedural driving scenes in KITTI's own file formats: the demo's data, the tests' data, nothing to download.

    python synthetic.py                                                         # data/synthetic, 64 frames
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

How: a scene is a list of convex primitives (synthetic_street.py makes it). `cast` finds the nearest one along each ray
of a sensor; a camera, a LiDAR and the sun are each just a grid of rays. All see one geometry, and rays follow the
calibration *as written*, so that picture, cloud, depth and boxes agree to rounding before the LiDAR's noise.

Other than in KITTI, the sweep covers the front 96 degrees only; a view's pitch comes half from the pose and half from
the principal point, so that boxes which turn about one axis (as KITTI's do) stay tight; roads are straight and flat.
"""

import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds, ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image
from tqdm import tqdm

import runtime
from files import BadInput, disk_errors
from synthetic_street import (
    BALL,
    CORNERS,
    EDGES,
    HULL,
    MATERIAL_ID,
    MATERIALS,
    ROD,
    dot,
    extent,
    noise,
    rotation,
    street,
    surface,
)

ROOT = "data/synthetic"  # where presets ask for scenes, and the only folder that a training script may write them to
MAX_RANGE = 80.0  # metres: LiDAR and depth end here, as in KITTI


# ---- ray casting -----------------------------------------------------------------------------------------------------
def intersect(scene, i, origin, direction):
    """t (n,) at which rays enter primitive i, inf where they miss it. origin, direction: (3, n), or (3, 1) for all."""
    kind, half = scene.kind[i], scene.half[i][:, None]
    o = scene.M[i] @ (origin - scene.centre[i][:, None])
    d = scene.M[i] @ direction
    near, far = -np.inf, np.inf  # the interval of t inside what has been looked at so far
    with np.errstate(all="ignore"):
        if kind != HULL:
            k = 3 if kind == BALL else 2
            a, b, c = (d[:k] ** 2).sum(0), (o[:k] * d[:k]).sum(0), (o[:k] ** 2).sum(0) - 1
            root = np.sqrt(b * b - a * c)  # nan where it misses, and nan < nan is false
            near, far = (-b - root) / a, (-b + root) / a
        if kind != BALL:
            planes = scene.planes[i]
            if kind == ROD:
                planes = planes[4:]  # the two ends
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
                if kind == ROD:
                    s[hit] = np.hypot(q[0], q[1]) > 0.86
                else:
                    s[hit] = noise(*(half * q * 11 + i)) < 0.2
            near, hit = np.where(solid[0], near, far), solid.any(0)
        return np.where(hit, near, np.inf)


def cast(rays, scene, members=None):
    """Nearest hits: t (H, W), inf where there is none, and the primitives' indices (H, W), -1 where there is none.

    Each primitive is tried only in the window of rays that its bounding box covers, in blocks of some 8000 rays: these
    stay in the cache, and below the size at which BLAS starts threads.
    """
    t = np.full(rays.shape, np.inf)
    index = np.full(rays.shape, -1, np.int32)
    members = np.arange(len(scene.edges)) if members is None else members
    for i, (top, bottom, left, right) in zip(members, rays.windows(scene.edges[members])):
        if left >= right:
            continue
        step = max(1, 8000 // (right - left))
        for row in range(top, bottom, step):
            window = np.s_[..., row : min(row + step, bottom), left:right]
            direction = rays.direction[window] if rays.direction.shape[1] > 1 else rays.direction
            origin = rays.origin[window] if rays.origin.shape[1] > 1 else rays.origin
            new = intersect(scene, i, origin.reshape(3, -1), direction.reshape(3, -1)).reshape(t[window].shape)
            nearer = new < t[window]
            np.copyto(t[window], new, where=nearer)
            index[window][nearer] = i
    return t, index


def bounds(row, column, shape):
    """[top, bottom, left, right] of the rays that projected box edges (P, 12, 2) cover, of each; nan is skipped."""
    ends = []
    for x, size in zip((row, column), shape):
        low, high = np.fmin.reduce(x, (1, 2), initial=size), np.fmax.reduce(x, (1, 2), initial=-1)
        ends += [np.clip(np.floor(low), 0, size), np.clip(np.ceil(high) + 1, 0, size)]
    return np.stack(ends, 1).astype(int).tolist()


def in_front(edges, R, origin, forward, near=0.1):
    """Edges (P, 3, E, 2) in the frame R x + origin, cut `near` metres ahead along axis `forward`; nan if all behind."""
    edges = np.einsum("ij,pjkl->pikl", R, edges) + origin[:, None, None]
    a, b = edges[..., 0], edges[..., 1]
    za, zb = a[:, [forward]], b[:, [forward]]  # (P, 1, E)
    with np.errstate(all="ignore"):
        cut = a + (near - za) / (zb - za) * (b - a)
    a, b = np.where(za < near, cut, a), np.where(zb < near, cut, b)
    behind = (za < near) & (zb < near)
    return np.where(behind[..., None], np.nan, np.stack([a, b], -1))


def camera_rays(K, R, origin, width, height):
    """One ray per pixel centre; t is the depth along the optical axis. World to camera is R x + origin."""
    v, u = np.mgrid[:height, :width].astype(float)
    A = (np.linalg.inv(R) @ np.linalg.inv(K))[:, :, None, None]
    direction = A[:, 0] * u + A[:, 1] * v + A[:, 2]  # (3, H, W)
    place = np.linalg.solve(R, -origin)[:, None, None]

    def windows(edges):
        x, y, z = in_front(edges, R, origin, forward=2).swapaxes(0, 1)
        return bounds(K[1, 1] * y / z + K[1, 2], K[0, 0] * x / z + K[0, 2], v.shape)

    return SimpleNamespace(origin=place, direction=direction, shape=v.shape, windows=windows)


def lidar_rays(elevation, azimuth, R, origin):
    """One ray per beam (down) and azimuth (leftwards, within +-80 degrees); t is the range.

    World to sensor is R x + origin.
    """
    e, a = np.meshgrid(elevation, azimuth, indexing="ij")
    local = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
    direction = np.einsum("ji,jkl->ikl", R, local)
    place = (-R.T @ origin)[:, None, None]

    def windows(edges):
        x, y, _ = in_front(edges, R, origin, forward=0).swapaxes(0, 1)
        column = (np.arctan2(y, x) - azimuth[0]) / (azimuth[1] - azimuth[0])
        return bounds(column * 0 + [0, len(elevation)], column, e.shape)  # all beams: edges are bent in elevation

    return SimpleNamespace(origin=place, direction=direction, shape=e.shape, windows=windows)


def sun_rays(sun, x, y):
    """A shadow map: one ray per node of a grid on the ground, from far above along -sun.

    x: any rising sequence, so that near nodes may stand closer; y: an even one. `node(p)` is where the ray through p
    stands on the grid, and p's t on it.
    """
    shape, top = (len(x), len(y)), 200.0
    ground = np.stack([*np.meshgrid(x, y, indexing="ij"), np.zeros(shape)])
    up = sun[:, None, None]

    def node(p):
        row = np.interp(p[0] - sun[0] / sun[2] * p[2], x, np.arange(len(x)), left=-1, right=len(x))
        column = (p[1] - sun[1] / sun[2] * p[2] - y[0]) / (y[1] - y[0])
        return row, column, top - p[2] / sun[2]

    def windows(edges):
        row, column, _ = node(edges.swapaxes(0, 1))
        return bounds(row, column, shape)

    return SimpleNamespace(origin=ground + top * up, direction=-up, shape=shape, windows=windows, node=node)


# ---- what the sensors make of it -------------------------------------------------------------------------------------
def hits(rays, scene, t, index):
    """What the N rays that hit anything have hit: world points, unit coordinates q, faces, normals, incidence."""
    h = SimpleNamespace(found=np.flatnonzero(index >= 0))
    h.prim = index.ravel()[h.found]
    h.direction = rays.direction.reshape(3, -1)[:, h.found]
    h.p = rays.origin.reshape(3, -1) + t.ravel()[h.found] * h.direction  # (3, N)
    M = scene.M.transpose(1, 2, 0)[:, :, h.prim]  # (3, 3, N)
    away = h.p - scene.centre.T[:, h.prim]
    h.q = dot(M.swapaxes(0, 1), away[:, None]).astype("f4")
    h.half = scene.half.astype("f4").T[:, h.prim]
    planes = scene.planes.astype("f4").transpose(1, 2, 0)[:, :, h.prim]  # (6, 4, N)
    # the face is the plane that the point lies on; on balls and rods, the side of the box around them that is nearest
    h.face = (dot(planes.swapaxes(0, 1), h.q[:, None]) - planes[:, 3]).argmax(0)  # +x -x +y -y +z -z
    kind = scene.kind[h.prim]
    side = (kind == ROD) & (np.hypot(h.q[0], h.q[1]) >= np.abs(h.q[2]))
    gradient = planes[h.face, :3, np.arange(len(h.face))].T
    gradient = np.where(side, [h.q[0], h.q[1], 0 * h.q[0]], gradient)
    gradient = np.where(kind == BALL, h.q, gradient)
    normal = dot(M.astype("f4"), gradient[:, None])
    h.normal = normal / np.sqrt(dot(normal, normal))
    length = np.sqrt(dot(h.direction, h.direction))
    h.range = (t.ravel()[h.found] * length).astype("f4")
    h.facing = np.abs(dot(h.normal, h.direction) / length).astype("f4")  # cosine of incidence
    return h


def draw_weather(rng):
    """Sun, sky and haze, and what the camera makes of them: exposure, grain."""
    high, turn = np.deg2rad(rng.uniform(22, 62)), rng.uniform(0, 2 * np.pi)
    grey = rng.random() < 0.25
    w = SimpleNamespace(sun=np.array([np.cos(high) * np.cos(turn), np.cos(high) * np.sin(turn), np.sin(high)]))
    w.sunshine = 0.2 if grey else rng.uniform(1.5, 2.2)
    w.sky_light = rng.uniform(0.7, 0.9) if grey else rng.uniform(0.3, 0.5)
    w.horizon = rng.uniform(0.85, 1.05) * np.array((0.75, 0.77, 0.8) if grey else (0.72, 0.82, 0.95))
    w.zenith = rng.uniform(0.85, 1.1) * np.array((0.6, 0.63, 0.67) if grey else (0.16, 0.34, 0.72))
    w.white = 0.75 if grey else 1.0
    w.cloudy = rng.uniform(-1.2, 0.5) + grey
    w.offset = rng.uniform(0, 500)  # into the noise
    w.haze = rng.uniform(250, 900)  # metres
    w.exposure = rng.uniform(0.8, 1.1) * (1.2 if grey else 0.95)
    w.grain = rng.uniform(1, 2.5)  # grey levels
    return w


def sky(weather, d):
    """Radiance (3, N) from the directions d (3, N): a gradient, clouds, a glow about the sun, far hills."""
    d = d / np.sqrt(dot(d, d))
    up = np.clip(d[2], 0, 1)
    light = weather.horizon[:, None] + (weather.zenith - weather.horizon)[:, None] * (1 - (1 - up) ** 4)
    x, y = d[:2] / (up + 0.12) * 40
    clouds = np.clip((noise(x + weather.offset, y) + weather.cloudy) * 0.8, 0, 1) * np.clip(up * 8, 0, 1)
    light += clouds * (weather.white - light)
    light += 0.5 * weather.sunshine * np.clip(dot(weather.sun, d), 0, 1) ** 64
    hills = 0.035 + 0.02 * noise(np.arctan2(d[1], d[0]) * 60 + weather.offset, 0 * up)
    return np.where(d[2] < hills, (weather.horizon * (0.33, 0.37, 0.37))[:, None], light)


def sunlit(scene, h, sun):
    """Share of the sun (N,) float32 that shadows leave of what has been hit."""
    shadows = sun_rays(sun, np.geomspace(6, 86, 900) - 6, np.linspace(-32, 32, 580))
    first, _ = cast(shadows, scene)
    first = np.pad(first, 1, constant_values=np.inf)  # beyond the map it is sunny
    row, column, own = shadows.node(h.p + 0.07 * h.normal)  # off the surface, or it shades itself
    row, column = (np.clip(x + 1, 0, n + 0.99) for x, n in zip((row, column), shadows.shape))
    i, j = row.astype(np.int32), column.astype(np.int32)
    lit = np.zeros(len(own), np.float32)
    for di, dj in np.ndindex(2, 2):
        weight = np.abs((1 - di - row + i) * (1 - dj - column + j))
        lit += weight * (own < first[i + di, j + dj] + 0.08)
    return lit


def photograph(rays, scene, t, index, weather, rng, pixel):
    """(H, W, 3) uint8: sun and its shadows, sky light, reflections, haze, lens, sensor. pixel: its width in radians."""
    h = hits(rays, scene, t, index)
    albedo, _, gloss = surface(scene, h, pixel)
    lit = sunlit(scene, h, weather.sun)
    through = 0.35 * (scene.material[h.prim] == MATERIAL_ID["leaves"])
    slant = dot(weather.sun, h.normal)
    direct = weather.sunshine * lit * (through + (1 - through) * slant).clip(0, 1).astype(np.float32)
    ambient = weather.sky_light * (0.62 + 0.38 * h.normal[2])
    light = np.array([[1], [0.95], [0.86]], "f4") * direct + np.array([[0.9], [0.98], [1.1]], "f4") * ambient
    colour = albedo * light

    i = np.flatnonzero(gloss)
    d, n = h.direction[:, i], h.normal[:, i]
    d = d - 2 * dot(d, n) * n
    glint = 10 * weather.sunshine * lit[i] * np.clip(dot(weather.sun, d) / np.sqrt(dot(d, d)), 0, 1) ** 200
    fresnel = gloss[i] + (1 - gloss[i]) * (1 - h.facing[i]) ** 5 * 0.6
    colour[:, i] += fresnel * (np.where(d[2] > 0, sky(weather, d), 0.12) + glint)
    colour += (1 - np.exp(-h.range / weather.haze)) * (weather.horizon[:, None] - colour)

    picture = np.empty((3, t.size), np.float32)
    empty = np.flatnonzero(index < 0)
    picture[:, h.found] = colour
    picture[:, empty] = sky(weather, rays.direction.reshape(3, -1)[:, empty])
    p = np.pad(picture.reshape(3, *t.shape), [(0, 0), (1, 1), (1, 1)], mode="edge")
    p = 0.7 * p[:, 1:-1] + 0.15 * (p[:, 2:] + p[:, :-2])  # the lens: softens the stairs that one ray per pixel leaves
    p = 0.7 * p[:, :, 1:-1] + 0.15 * (p[:, :, 2:] + p[:, :, :-2])
    p = 255 * np.clip(p * weather.exposure, 0, 1) ** (1 / 2.2)
    p = p + weather.grain * rng.standard_normal(p.shape, np.float32)
    return np.round(p).clip(0, 255).astype(np.uint8).transpose(1, 2, 0)


def sweep(rays, scene, R, rng):
    """(N, 4) float32 x, y, z, reflectance in the sensor's frame (R: sensor to world): ranges with noise, some lost."""
    h = hits(rays, scene, *cast(rays, scene))
    _, squarely, _ = surface(scene, h, 1e-3)
    speckle = 1 + 0.1 * rng.standard_normal(len(h.prim))
    reflectance = (squarely * (0.5 + 0.5 * h.facing) * speckle).clip(0, 0.99)
    lost = np.array([m[1] for m in MATERIALS.values()])[scene.material[h.prim]]
    lost = lost + 0.3 * (squarely < 0.12)  # glass, black
    lost += np.exp(-reflectance * (300 / h.range) ** 2)  # too little light comes back
    kept = (rng.random(len(lost)) > lost) & (h.range > 2) & (h.range < MAX_RANGE)
    ranges = np.sqrt(((h.p - rays.origin[:, 0]) ** 2).sum(0)) + 0.02 * rng.standard_normal(len(lost))
    xyz = (np.einsum("ji,jn->in", R, h.direction) * ranges).round(3)  # KITTI has millimetres, and hundredths
    return np.vstack([xyz, reflectance.round(2)])[:, kept].T.astype(np.float32)


# ---- one frame -------------------------------------------------------------------------------------------------------
def mount(rng, ego, width, height):
    """(text of the calibration file, {name: matrix, as that text has it}, velodyne-to-world rotation, its place)."""
    scale = width / 1242
    small = np.deg2rad(rng.uniform(-1, 1, 12))
    focal = rng.uniform(700, 750) * scale
    cx = (width - 1) / 2 + rng.uniform(-12, 12) * scale
    cy = 0.47 * height + rng.uniform(-18, 18) * scale
    K = np.array([[focal, 0, cx], [0, focal, cy], [0, 0, 1]])
    axes = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # velodyne (ahead, left, up) to camera (right, down, ahead)
    shift = rng.uniform(-0.03, 0.03), -rng.uniform(0.04, 0.2), -rng.uniform(0.25, 0.4)
    baselines = (0, 0, 0), (-0.537, 0, 0), (0.06, 3e-4, rng.uniform(2e-3, 5e-3)), (-0.473, 3e-3, 3e-3)
    rows = {f"P{i}": np.c_[K, K @ b] for i, b in enumerate(baselines)}
    rows["R0_rect"] = rotation(*0.4 * small[:3])
    rows["Tr_velo_to_cam"] = np.c_[axes @ rotation(*(0.6, 0.5, 0.4) * small[3:6]), shift]
    rows["Tr_imu_to_velo"] = np.c_[rotation(*0.1 * small[6:9]), (-0.81, 0.32, -0.8)]
    digits = {name: " ".join(f"{x:.12e}" for x in matrix.ravel()) for name, matrix in rows.items()}
    text = "".join(f"{name}: {numbers}\n" for name, numbers in digits.items()) + "\n"
    written = {name: np.array(numbers.split(), float).reshape(3, -1) for name, numbers in digits.items()}
    return text, written, rotation(*(4, 0.6, 0.5) * small[9:]), np.array([0, ego, rng.uniform(1.68, 1.9)])


def box_3d(scene, members, yaw, R, origin):
    """KITTI's (h, w, l, x, y, z, ry) in rectified camera 0, on the two decimals that the file keeps.

    It is the tightest box around all parts that turns about the camera's y axis only. R, origin: world to that camera.
    """
    ahead = R @ (np.cos(yaw), np.sin(yaw), 0)
    ry = round(np.arctan2(-ahead[2], ahead[0]), 2)
    axes = np.array([[np.cos(ry), 0, -np.sin(ry)], [0, 1, 0], [np.sin(ry), 0, np.cos(ry)]])  # length, height, width
    span = np.array([extent(scene, members, axis @ R) for axis in axes]) + (axes @ origin)[:, None]
    l, h, w = np.ceil((span[:, 1] - span[:, 0]) * 100 + 1) / 100  # up, and 1 cm of room for the rounded place
    x, y, z = axes.T @ (span[0].mean(), span[1, 1], span[2].mean())  # y points down: the centre of the lower face
    return h, w, l, x.round(2), y.round(2), z.round(2), ry


def annotate(scene, objects, camera, t, R, origin, P2):
    """The lines of the label file. R, origin: world to rectified camera 0.

    The 2D box bounds the projected 3D box; truncation is the share of it outside the picture; occlusion goes by the
    share of the object's own pixels that something else hides: 10, 50, 90 %.
    """
    height, width = t.shape
    lines, ignored = [], []
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
        alone, _ = cast(camera, scene, members)
        own = np.isfinite(alone)
        hidden = (t[own] < alone[own] - 1e-6).mean() if own.any() else 1.0
        if hidden >= 0.98:
            continue
        rectangle = f"{left:.2f} {top:.2f} {right:.2f} {bottom:.2f}"
        if (bottom - top) * 1242 / width < 12 or z > 75 or truncated > 0.97:  # too little to be told
            ignored.append(f"DontCare -1 -1 -10 {rectangle} -1 -1 -1 -1000 -1000 -1000 -10")
            continue
        alpha = (ry - np.arctan2(x, z) + np.pi) % (2 * np.pi) - np.pi
        level = np.searchsorted([0.1, 0.5, 0.9], hidden)
        box = f"{h:.2f} {w:.2f} {l:.2f} {x:.2f} {y:.2f} {z:.2f} {ry:.2f}"
        lines.append(f"{name} {truncated:.2f} {level} {alpha:.2f} {rectangle} {box}")
    return lines + ignored  # KITTI lists these last, too


def frame(seed, number, width=1242, height=375):
    """What both sensors make of a street.

    picture (H, W, 3) uint8, depth (H, W) in metres, 0 where there is none, points (N, 4) float32, calib (text), labels
    (lines); and the truth behind it, for tests.
    """
    rng = np.random.default_rng([seed, number])
    scene, objects = street(rng)
    calib, matrices, R_velo, place = mount(rng, scene.plan.ego, width, height)
    # world to rectified camera 0, x_rect = R x + origin, from the digits that the file holds; then on to camera 2
    R0, Tr, P2 = matrices["R0_rect"], matrices["Tr_velo_to_cam"], matrices["P2"]
    R = R0 @ Tr[:, :3] @ R_velo.T
    origin = R0 @ (Tr[:, 3] - Tr[:, :3] @ R_velo.T @ place)
    camera = camera_rays(P2[:, :3], R, origin + np.linalg.solve(P2[:, :3], P2[:, 3]), width, height)
    t, index = cast(camera, scene)
    picture = photograph(camera, scene, t, index, draw_weather(rng), rng, 1 / P2[0, 0])
    # HDL-64E: 32 beams every third of a degree and 32 below every half, 0.16 degrees from one firing to the next
    elevation = np.deg2rad(np.r_[np.linspace(2, -8.33, 32), np.linspace(-8.83, -24.8, 32)])
    azimuth = np.deg2rad(np.arange(-48, 48, 0.16) + rng.uniform(0, 0.16))
    points = sweep(lidar_rays(elevation, azimuth, R_velo.T, -R_velo.T @ place), scene, R_velo, rng)
    f = SimpleNamespace(picture=picture, depth=np.where(t < MAX_RANGE, t, 0), points=points, calib=calib)
    f.labels = annotate(scene, objects, camera, t, R, origin, P2)
    f.scene, f.objects, f.camera, f.R_velo, f.place_velo = scene, objects, camera, R_velo, place
    return f


# ---- files -----------------------------------------------------------------------------------------------------------
def write_frame(number, folder, seed, width, height):
    f, name = frame(seed, number, width, height), f"{number:06d}"
    depth = np.round(f.depth * 256).astype(np.uint16)
    # level 1 takes a quarter of Pillow's default time, and grain does not compress anyway
    Image.fromarray(f.picture).save(folder / "image_2" / f"{name}.png", compress_level=1)
    Image.fromarray(depth).save(folder / "depth_2" / f"{name}.png", compress_level=1)
    (folder / "velodyne" / f"{name}.bin").write_bytes(f.points.tobytes())  # tofile does not say why it fails
    (folder / "calib" / f"{name}.txt").write_text(f.calib)
    (folder / "label_2" / f"{name}.txt").write_text("".join(line + "\n" for line in f.labels))


def write_splits(folder, frames, val):
    """ImageSets/{train,val,trainval}.txt: a share `val` of the frames, evenly spread, is held out."""
    held_out = [i for i in range(frames) if int((i + 1) * val) > int(i * val)]
    splits = {"train": sorted(set(range(frames)) - set(held_out)), "val": held_out, "trainval": range(frames)}
    for name, numbers in splits.items():
        (folder / f"{name}.txt").write_text("".join(f"{i:06d}\n" for i in numbers))


def write_dataset(
    root: str = ROOT,
    frames: int = 64,  # as the demos want it
    seed: int = 0,
    width: int = 1242,
    height: int = 375,
    val: float = 0.25,
    workers: int | None = None,
    progress: bool = True,
) -> None:
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
    root = Path(root)
    if root.exists():
        raise BadInput(f"{root} exists already: remove it, or give another root")
    workers = os.cpu_count() if workers is None else workers
    limits = {
        "frames": (frames, 1, 10**6),  # names have six digits
        "seed": (seed, 0, 10**9),
        "width": (width, 32, 10**4),
        "height": (height, 32, 10**4),
        "val": (val, 0, 0.99),
        "workers": (workers, 1, 1000),
    }
    for flag, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise BadInput(f"--{flag} {value}: must be from {low} to {high}")

    with disk_errors(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        with disk_errors(root), terminated_by_exit():
            for folder in ("image_2", "depth_2", "velodyne", "calib", "label_2", "../ImageSets"):
                (unfinished / "training" / folder).mkdir(parents=True)
            write_splits(unfinished / "ImageSets", frames, val)
            job = partial(write_frame, folder=unfinished / "training", seed=seed, width=width, height=height)
            bar = tqdm(total=frames, desc=f"writing {root}", unit="frame", disable=not progress)
            with bar, processes(min(workers, frames)) as pool:
                with runtime.blocked(signal.SIGINT):
                    written = pool.map(job, range(frames))
                for _ in written:
                    bar.update()
            unfinished.chmod(0o755)  # a temporary folder is its owner's only
            unfinished.rename(root)
    except BrokenProcessPool:
        raise BadInput(f"{root}: a process that wrote frames was killed (memory? try --workers 1)") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def terminated_by_exit():
    """SIGTERM raises SystemExit: else the processes below would wait on for work, and half a folder would stay."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def processes(number):
    """A pool that leaves what has not begun where an error ends it. Ctrl-C is for its parent to answer."""
    # fork, where there is such a thing: it starts at once, and does not import the caller's script again
    context = get_context("fork" if hasattr(os, "fork") else None)
    pool = ProcessPoolExecutor(number, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def write_scenes(c, run):
    """The built-in scenes, where a training script's preset asks for them and they are not there yet. c: its Config.

    Only ROOT, the presets' own folder, is written. Another one that is missing was perhaps mistyped: it is left to who
    reads it next to say so.
    """
    asked_for = c.synthetic_frames and Path(ROOT) in map(Path, c.data_root)
    if asked_for and run.main and not Path(ROOT).exists():
        write_dataset(frames=c.synthetic_frames)
    run.any(False)  # a barrier: the other ranks wait for the scenes


if __name__ == "__main__":
    runtime.command_line(lambda: runtime.tyro.cli(runtime.later(write_dataset)))
