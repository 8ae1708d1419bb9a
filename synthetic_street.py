"""What stands in a street of synthetic.py, and how it looks.

    street(rng)                  a scene of convex primitives, and the objects in it that get a label
    surface(scene, h, pixel)     colour, reflectance to a LiDAR and gloss of what rays have hit

A scene is a list of primitives (tapered boxes, ellipsoids, cylinders): `part` makes one, `freeze` makes arrays of all.
Streets are drawn from a random generator, call by call: another order of the calls is another street.
"""

from functools import lru_cache, partial
from types import SimpleNamespace

import numpy as np

KERB = 0.12  # metres, height of the pavement
HULL, BALL, ROD = range(3)  # unit shapes within [-1, 1]^3: a tapered cube, a sphere, a cylinder along z
CORNERS = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1], indexing="ij")).reshape(3, 8)  # of a box, and its 12 edges:
EDGES = np.array([(a, b) for a in range(8) for b in range(a) if (CORNERS[:, a] != CORNERS[:, b]).sum() == 1])

# fmt: off
MATERIALS = {  # reflectance to the LiDAR when hit squarely, share of returns lost at any range
    "road": (0.36, 0.01), "block": (0.42, 0.01), "facade": (0.45, 0.01), "roof": (0.4, 0.02), "wall": (0.42, 0.01),
    "paint": (0.35, 0.04), "bonnet": (0.35, 0.04), "cabin": (0.35, 0.04), "tyre": (0.06, 0.1), "spokes": (0.3, 0.1),
    "bark": (0.25, 0.01), "leaves": (0.4, 0.03), "metal": (0.45, 0.03), "sign": (0.95, 0.0), "skin": (0.4, 0.01),
    "cloth": (0.35, 0.01),
}
# fmt: on
MATERIAL_ID = {name: i for i, name in enumerate(MATERIALS)}


# ---- small mathematics -----------------------------------------------------------------------------------------------
def rotation(yaw=0.0, pitch=0.0, roll=0.0):
    """(3, 3), Rz(yaw) Ry(pitch) Rx(roll), radians."""
    (cy, sy), (cp, sp), (cr, sr) = ((np.cos(a), np.sin(a)) for a in (yaw, pitch, roll))
    x = np.array([[1, 0, 0], [0, cr, -sr], [0, sr, cr]])
    y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    z = np.array([[cy, -sy, 0], [sy, cy, 0], [0, 0, 1]])
    return z @ y @ x


def dot(a, b):
    """Along the first axis, of length 3. Not BLAS: the last bit of what its threads add depends on their number."""
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
    cells = [np.floor(c).astype(np.int32) for c in x]
    fractions = [(c - i).astype(np.float32) for c, i in zip(x, cells)]
    total = 0
    for corner in np.ndindex(*[2] * len(x)):
        index, weight = 0, 1
        for cell, fraction, up, size in zip(cells, fractions, corner, tile.shape):
            index = index * size + (cell + up & size - 1)
            weight = weight * (fraction if up else 1 - fraction)
        total = total + tile.ravel()[index] * weight
    return total


def dice(*x):
    """Numbers in [0, 1) that look random but follow from the coordinates x."""
    mixed = sum(c * k for c, k in zip(x, (12.9898, 78.233, 37.719)))
    return np.modf(np.abs(np.sin(mixed) * 43758.5453))[0]


def covered(x, low, high, blur):
    """Share of [x - blur / 2, x + blur / 2] inside [low, high]: an edge drawn with anti-aliasing."""
    inside = np.minimum(x + blur / 2, high) - np.maximum(x - blur / 2, low)
    return np.clip(inside, 0, blur) / blur


def stripes(x, period, width, blur):
    """`covered` for [0, width] repeated every `period`; what is finer than the blur fades into its mean."""
    start = period / 4  # away from the seam of the modulo
    drawn = covered((x + start) % period, start, start + width, blur)
    return np.where(blur > period / 2, width / period, drawn)


# ---- primitives: unit shapes under affine maps, so that a ray keeps its parameter t when it is mapped back -----------
def part(kind, centre, half, material, colour, taper=(0, 0, 0), R=None):
    """One primitive. half: half-extents along its own axes, the columns of R.

    taper: the share of the half-length by which the faces +x, -x and both of +-y lean inwards at the top (a windscreen,
    a rear window, a gable roof).
    """
    R = np.eye(3) if R is None else R
    centre, half = np.array(centre, float), np.array(half, float)
    return SimpleNamespace(kind=kind, centre=centre, half=half, material=material, colour=colour, R=R, taper=taper)


box, ball = partial(part, HULL), partial(part, BALL)


def rod(a, b, radius, material, colour):
    """A cylinder from a to b."""
    length = np.linalg.norm(np.subtract(b, a))
    z = np.subtract(b, a) / length
    x = np.cross([0, 1, 0] if abs(z[1]) < 0.9 else [1, 0, 0], z)
    R = np.stack([x, np.cross(z, x), z], 1)
    R = R / np.linalg.norm(R, axis=0)
    return part(ROD, np.add(a, b) / 2, (radius, radius, length / 2), material, colour, R=R)


def freeze(parts, plan, rng):
    """A scene: arrays over P primitives, and the plan of its road.

    A world point p is q = M (p - centre) in unit coordinates, and inside a hull where planes[:, :3] @ q <= planes[:, 3]
    (faces +x, -x, +y, -y, +z, -z).
    """
    s = SimpleNamespace(plan=plan)
    s.kind, s.centre, s.half, s.R = (np.array([getattr(p, k) for p in parts]) for k in ("kind", "centre", "half", "R"))
    s.material = np.array([MATERIAL_ID[p.material] for p in parts])
    s.porous = np.isin(s.material, [MATERIAL_ID["leaves"], MATERIAL_ID["spokes"]])
    s.colour = np.array([p.colour for p in parts], np.float32)  # (P, 3) albedo
    s.style = rng.random((len(parts), 4)).astype(np.float32)  # which windows, which hair
    s.M = s.R.transpose(0, 2, 1) / s.half[:, :, None]  # (P, 3, 3)
    front, rear, side = np.array([p.taper for p in parts], float).T / 2
    o, i = np.zeros(len(parts)), np.ones(len(parts))
    ends = [(i, o, front, i - front), (-i, o, rear, i - rear)]
    sides = [(o, i, side, i - side), (o, -i, side, i - side)]
    levels = [(o, o, i, i), (o, o, -i, i)]
    s.planes = np.array(ends + sides + levels).transpose(2, 0, 1)  # (P, 6, 4)
    corners = s.centre[:, :, None] + (s.R * s.half[:, None, :]) @ CORNERS  # (P, 3, 8)
    s.edges = corners[:, :, EDGES]  # (P, 3, 12, 2) of the boxes around the primitives
    return s


def extent(scene, members, direction):
    """(lowest, highest) coordinate of some primitives along a unit vector, exactly: their support functions."""
    reach = np.abs(direction @ scene.R[members] * scene.half[members]).T  # (3, n)
    hull = reach.sum(0)
    ball = np.sqrt(dot(reach, reach))
    tube = np.hypot(reach[0], reach[1]) + reach[2]
    reach = np.choose(scene.kind[members], [hull, ball, tube])
    middle = scene.centre[members] @ direction
    return (middle - reach).min(), (middle + reach).max()


# ---- things: lists of parts in a frame of their own, x forward, z up, standing on z = 0 ------------------------------
# fmt: off
DARK = (0.03, 0.03, 0.03)
SKINS = [(0.45, 0.3, 0.22), (0.3, 0.18, 0.11), (0.15, 0.08, 0.05)]
PAINTS = [(0.7, 0.7, 0.68), (0.42, 0.43, 0.45), (0.2, 0.21, 0.23), (0.03, 0.03, 0.035), (0.06, 0.06, 0.07),
          (0.5, 0.03, 0.03), (0.04, 0.09, 0.35), (0.05, 0.2, 0.12), (0.3, 0.26, 0.18), (0.6, 0.4, 0.05)]
CLOTHES = [(0.6, 0.6, 0.58), (0.05, 0.05, 0.06), (0.08, 0.1, 0.25), (0.4, 0.06, 0.05), (0.1, 0.25, 0.12),
           (0.45, 0.35, 0.1), (0.2, 0.2, 0.22), (0.25, 0.4, 0.55)]
FACADES = [(0.62, 0.58, 0.5), (0.6, 0.5, 0.32), (0.55, 0.38, 0.3), (0.32, 0.14, 0.1), (0.5, 0.52, 0.54),
           (0.68, 0.66, 0.62), (0.42, 0.45, 0.38), (0.3, 0.3, 0.32), (0.58, 0.42, 0.22)]
TILES = [(0.25, 0.09, 0.05), (0.16, 0.08, 0.06), (0.1, 0.1, 0.11)]
GREENS = [(0.10, 0.17, 0.04), (0.07, 0.13, 0.04), (0.14, 0.19, 0.05), (0.2, 0.15, 0.04)]
BICYCLE = [((-0.52, 0, 0.34), (-0.18, 0, 0.62)), ((-0.18, 0, 0.36), (-0.24, 0, 0.88)),  # the ends of its tubes
           ((-0.2, 0, 0.62), (0.4, 0, 0.86)), ((-0.16, 0, 0.34), (0.38, 0, 0.76)),
           ((0.52, 0, 0.34), (0.36, 0, 1.02)), ((0.38, -0.26, 1.03), (0.38, 0.26, 1.03))]
# fmt: on


def car(rng):
    """(type, parts). Length, width and height hold every part, mirrors and wheels included."""
    models = [  # ..., the cabin's two ends at the belt line, in lengths off the middle, and its taper
        ("Car", rng.uniform(4.3, 4.8), 1.78, rng.uniform(1.40, 1.48), (-0.34, 0.24), (0.55, 0.45, 0.16)),  # a sedan
        ("Car", rng.uniform(3.5, 4.1), 1.66, rng.uniform(1.42, 1.56), (-0.49, 0.26), (0.50, 0.22, 0.15)),  # a hatchback
        ("Car", rng.uniform(4.4, 4.8), 1.76, rng.uniform(1.42, 1.52), (-0.49, 0.23), (0.42, 0.20, 0.15)),  # an estate
        ("Car", rng.uniform(4.3, 4.7), 1.86, rng.uniform(1.62, 1.80), (-0.49, 0.24), (0.38, 0.12, 0.13)),  # an SUV
        ("Van", rng.uniform(4.7, 5.6), 1.95, rng.uniform(1.95, 2.45), (-0.495, 0.34), (0.30, 0.02, 0.06)),
    ]
    name, length, width, height, cabin, taper = models[rng.integers(5)]
    l, w = length / 2, (width + rng.uniform(-0.06, 0.06)) / 2
    paint = rng.choice(PAINTS)
    sill = 0.20
    belt = height * (0.5 if name == "Van" else 0.6)
    waist = sill + 0.66 * (belt - sill)
    rear, front = np.multiply(cabin, length)
    high = (height - belt) / 2
    wheel = 0.31 + 0.02 * (height > 1.55)
    parts = [
        box((0, 0, (sill + waist) / 2), (l, w - 0.015, (waist - sill) / 2), "paint", paint, (0.01, 0.01, 0)),
        box((0, 0, (waist + belt) / 2), (l * 0.995, w - 0.02, (belt - waist) / 2), "bonnet", paint, (0.16, 0.03, 0.05)),
        box(((rear + front) / 2, 0, belt + high), ((front - rear) / 2, w * 0.94, high), "cabin", paint, taper),
        box((0, 0, 0.24), (l * 0.9, w - 0.2, 0.1), "tyre", DARK),  # what one sees below
    ]
    for side in (-1, 1):
        parts.append(box((front - 0.42, side * (w - 0.07), belt + 0.06), (0.06, 0.07, 0.06), "metal", paint))
        for x in (-0.61 * l, 0.61 * l):
            parts.append(rod((x, side * (w - 0.2), wheel), (x, side * w, wheel), wheel, "tyre", DARK))
    return name, parts


def person(rng):
    tall = rng.uniform(1.55, 1.9)
    stride = rng.uniform(0.0, 0.28)
    top = rng.choice(CLOTHES)
    trousers = rng.choice(CLOTHES)
    parts = [
        ball((0, 0, 0.70 * tall), (0.13, 0.20, 0.165 * tall), "cloth", top),
        ball((0, 0, 0.54 * tall), (0.13, 0.17, 0.09 * tall), "cloth", trousers),
        ball((0.02, 0, 0.925 * tall), (0.10, 0.085, 0.075 * tall), "skin", rng.choice(SKINS)),
    ]
    for side in (-1, 1):
        foot, hand = side * stride, -0.9 * side * stride
        parts += [
            rod((0, side * 0.09, 0.54 * tall), (foot, side * 0.10, 0.09), 0.075, "cloth", trousers),
            box((foot + 0.05, side * 0.10, 0.045), (0.13, 0.05, 0.045), "tyre", DARK),
            rod((0, side * 0.20, 0.82 * tall), (hand, side * 0.25, 0.50 * tall), 0.05, "cloth", top),
        ]
    return "Pedestrian", parts


def cyclist(rng):
    lean = rng.uniform(0.0, 0.12)
    top, trousers, frame = (rng.choice(CLOTHES) for _ in range(3))
    chest, height = 0.12 + lean, 1.42 - lean / 2
    parts = [rod(a, b, 0.022, "metal", frame) for a, b in BICYCLE]
    parts += [rod((x, -0.025, 0.34), (x, 0.025, 0.34), 0.34, "spokes", DARK) for x in (-0.52, 0.52)]
    parts += [
        box((-0.26, 0, 0.91), (0.13, 0.07, 0.03), "tyre", DARK),
        rod((-0.22, 0, 0.98), (chest, 0, height), 0.17, "cloth", top),
        ball((chest + 0.08, 0, height + 0.2), (0.11, 0.09, 0.13), "skin", rng.choice(SKINS)),
    ]
    for side in (-1, 1):
        knee = (0.14 + 0.06 * side, side * 0.11, 0.74 + 0.12 * side)
        foot = (-0.12 + 0.04 * side, side * 0.12, 0.36 + 0.12 * side)
        parts += [
            rod((-0.2, side * 0.1, 0.96), knee, 0.085, "cloth", trousers),
            rod(knee, foot, 0.065, "cloth", trousers),
            box((foot[0] + 0.06, foot[1], foot[2] - 0.06), (0.13, 0.045, 0.05), "tyre", DARK),
            rod((chest, side * 0.18, height - 0.04), (0.38, side * 0.22, 1.06), 0.05, "cloth", top),
        ]
    return "Cyclist", parts


def tree(rng):
    tall = rng.uniform(4.5, 9.5)
    spread = rng.uniform(1.3, 2.5)
    fork = rng.uniform(2.7, 3.3)  # above the tallest van
    green = rng.choice(GREENS)
    parts = [rod((0, 0, 0), (*rng.normal(0, 0.1, 2), fork + 1), rng.uniform(0.1, 0.22), "bark", (0.12, 0.09, 0.07))]
    for _ in range(11):
        r = spread * rng.uniform(0.35, 0.65)
        angle = rng.uniform(0, 2 * np.pi)
        up = rng.random()
        out = spread * np.sqrt(rng.uniform(0.05, 0.8)) * np.sin(np.pi * (0.2 + 0.7 * up))
        place = out * np.cos(angle), out * np.sin(angle), fork + 0.9 * r + up * (tall - fork - 1.8 * r)
        parts.append(ball(place, (r, r, 0.85 * r), "leaves", green * rng.uniform(0.7, 1.2)))
    return None, parts


def shrub(rng, hedge):
    """A bush, or 4 to 7 metres of hedge or wall."""
    low = rng.uniform(0.35, 0.9)
    green = np.array([0.08, 0.14, 0.035]) * rng.uniform(0.7, 1.4)
    if hedge:
        skin = ("leaves", green) if rng.random() < 0.7 else ("wall", (0.5, 0.47, 0.42))
        return None, [box((0, 0, low), (rng.uniform(2, 3.4), 0.25, low), *skin)]
    half = (1.3 * low, 1.3 * low, low)
    return None, [ball((*rng.normal(0, low / 2, 2), low), half, "leaves", green) for _ in range(3)]


def house(rng, x, y, floors, gable):
    """2x times 2y metres, the front towards -y."""
    colour = rng.uniform(0.85, 1.1) * rng.choice(FACADES)
    z = 1.5 * floors + 0.3
    parts = [box((0, 0, z), (x, y, z), "facade", colour)]
    if gable:
        tiles = rng.choice(TILES)
        high = rng.uniform(0.35, 0.5) * y
        parts.append(box((0, 0, 2 * z + high), (x + 0.02, y + 0.5, high), "roof", tiles, (0, 0, 1)))
        chimney = (0.5 * x, 0.3 * y, 2 * z + 1.3 * high)
        parts.append(box(chimney, (0.35, 0.35, high), "wall", (0.25, 0.1, 0.07)))
    if rng.random() < 0.35:  # balconies
        for along in np.arange(2 - x, x - 1.5, 4):
            for k in range(1, floors):
                parts.append(box((along, -y - 0.5, 3 * k + 0.7), (1.1, 0.5, 0.5), "wall", colour * 0.8))
    return None, parts


def lamp(rng):
    """Reaches out towards -y."""
    tall, grey = rng.uniform(5.5, 8), (0.3, 0.32, 0.32)
    post = rod((0, 0, 0), (0, 0, tall), 0.08, "metal", grey)
    arm = rod((0, 0, tall - 0.1), (0, -1.6, tall), 0.04, "metal", grey)
    return None, [post, arm, box((0, -1.6, tall), (0.15, 0.35, 0.07), "metal", (0.6, 0.6, 0.58))]


def sign(rng):
    """Looks towards -x."""
    tall = rng.uniform(2.2, 2.7)
    colour = rng.choice([(0.6, 0.03, 0.03), (0.03, 0.12, 0.5)])
    post = rod((0, 0, 0), (0, 0, tall + 0.35), 0.04, "metal", (0.3, 0.32, 0.32))
    return None, [post, rod((-0.04, 0, tall), (-0.06, 0, tall), 0.32, "sign", colour)]


# ---- a street: x along the road, y to the left, z up, asphalt at z = 0; the sensors at x = 0, driving on the right ---
def street(rng):
    """(scene, objects): frozen primitives with the road's `plan`, and [(type, indices of its primitives, yaw)]."""
    plan = plan_road(rng)
    ground, buildings = line_road(plan, rng)
    parts, objects = stand(ground, buildings + traffic(plan, rng), plan, rng)
    return freeze(parts, plan, rng), objects


def plan_road(rng):
    """Widths, crossings and markings. Of lists by side, -1 is the right and 1 the left; metres."""
    p = SimpleNamespace(kind=rng.choice(["city", "city", "suburb", "suburb", "avenue"]))
    p.lane = rng.uniform(2.9, 3.7)
    p.lanes = 2 if p.kind == "avenue" and rng.random() < 0.6 else 1  # each way
    p.bay = {side: 2.2 * (rng.random() < 0.65) for side in (-1, 1)}  # parking
    p.kerb = {side: p.lane * p.lanes + p.bay[side] for side in (-1, 1)}
    p.crossings = []  # (x, half width)
    if rng.random() < 0.65:
        p.crossings.append((rng.uniform(16, 50), rng.uniform(3.2, 5.0)))
    p.crossings.append((rng.uniform(80, 120), rng.uniform(3.2, 5.0)))
    p.walk = rng.uniform(1.8, 3.2)
    p.ego = -p.lane * (0.5 + rng.integers(p.lanes)) + rng.uniform(-0.3, 0.3)
    p.zebra = -99.0
    if rng.random() < 0.6:
        x, half = p.crossings[0]
        p.zebra = x - half - rng.uniform(4, 5)
    p.marked, p.dashed = rng.random() < 0.85, rng.random() < 0.7
    p.asphalt, p.paving = rng.uniform(0.10, 0.2), rng.uniform(0.22, 0.36)  # albedo
    p.offset = rng.uniform(0, 500, 2)  # into the noise
    p.end = 300.0
    return p


def clear(plan, x, space):
    """Is x on a block, and no crossing within `space`?"""
    return all(abs(x - c) > half + space for c, half in plan.crossings)


def line_road(plan, rng):
    """What lines the road: (ground, spots). Blocks lie between the crossings, with houses, hedges, trees, poles.

    A spot is (what, x, y, z, yaw, room around it); the first come first. Sets plan.end where the road ends early.
    """
    ground = [box((0, 0, -5), (900, 900, 5), "road", (0, 0, 0))]
    spots = []
    ends = [-40.0, *(e for c, half in plan.crossings for e in (c - half, c + half)), 300.0]
    blocks = list(zip(ends[::2], ends[1::2]))
    if rng.random() < 0.5:  # the road ends at the last crossing
        plan.end, _ = blocks.pop()
        ground.append(box((plan.end + 100, 0, 0), (100, 200, KERB), "block", (0, 0, 0)))
        for y in np.arange(-38, 41, 16.0):
            thing = partial(house, x=7.9, y=6, floors=rng.integers(2, 5), gable=rng.random() < 0.6)
            spots.append((thing, plan.end + 9.2, y, KERB, -np.pi / 2, 0))

    styles = {  # shares of lots built on; setback; floors, from and below; shares of gables, trees and hedges
        "city": (0.93, rng.uniform(1.4, 2.7), (3, 6), 0.4, 0.3, 0),
        "suburb": (0.8, rng.uniform(4, 8), (1, 4), 0.85, 0.5, 0.55),
        "avenue": (0.4, rng.uniform(7, 15), (1, 5), 0.5, 0.9, 0.55),
    }
    built, setback, floors, gables, green, hedged = styles[plan.kind]
    for side in (-1, 1):
        kerb = plan.kerb[side]
        front = kerb + plan.walk
        inwards = np.pi * (side < 0)  # turns -y to the road
        for a, b in blocks:
            ground.append(box(((a + b) / 2, side * (kerb + 100), 0), ((b - a) / 2, 100, KERB), "block", (0, 0, 0)))
            x, b = a + plan.walk + rng.uniform(0.5, 3), min(b, 130)
            while x < b - plan.walk - 18:
                long, deep = rng.uniform(4, 9), rng.uniform(4, 6)
                thing = partial(house, x=long, y=deep, floors=rng.integers(*floors), gable=rng.random() < gables)
                if rng.random() < built:
                    y = side * (front + setback + deep + rng.uniform(0, 0.5))
                    spots.append((thing, x + long, y, KERB, inwards, 0))
                touching = plan.kind == "city" and rng.random() < 0.7
                x += 2 * long + (0.05 if touching else rng.uniform(2, 6))
            for x in np.arange(a + 8, min(b, 90) - 4, 7):
                if rng.random() < hedged:
                    spots.append((partial(shrub, hedge=True), x, side * (front + 0.5), KERB, 0, 0.1))
        for x in np.arange(rng.uniform(-12, 0), 110, rng.uniform(7, 13)):
            if clear(plan, x, 3) and rng.random() < green:
                spots.append((tree, x, side * (kerb + 0.7), KERB, 0, 0.3))
        for x in rng.uniform(0, 90, rng.integers(4, 16)):
            if clear(plan, x, 3):
                thing = rng.choice([tree, partial(shrub, hedge=False)])
                spots.append((thing, x, side * (front + rng.uniform(1.5, 12)), KERB, 0, 0.1))
        post = side * (kerb + 0.42)
        for x in np.arange(rng.uniform(5, 20), 120, 26):
            if clear(plan, x, 1):
                spots.append((lamp, x, post, KERB, inwards, 0.1))
        for x in rng.uniform(4, 60, rng.integers(1, 5)):
            if clear(plan, x, 1):
                spots.append((sign, x, post, KERB, inwards + np.pi, 0.1))
    return ground, spots


def traffic(plan, rng):
    """Who is on the road and beside it: spots as in line_road."""
    kerb, lane, zebra = plan.kerb, plan.lane, plan.zebra
    spots = [(car, x, plan.ego, 0, 0, 0.5) for x in rng.uniform(8, 60, 3)]
    for x in rng.uniform(6, 75, 4):  # oncoming
        spots.append((car, x, lane * (0.5 + rng.integers(plan.lanes)), 0, np.pi, 0.5))
    for side in (-1, 1):
        full = rng.uniform(0.3, 0.9)
        for x in np.arange(rng.uniform(-9, -4), 85, rng.uniform(5.6, 6.6)):
            may_park = plan.bay[side] and clear(plan, x, 5.5) and abs(x - zebra - 1.5) > 5
            if may_park and rng.random() < full:
                backwards = (side > 0) ^ (rng.random() < 0.12)
                spots.append((car, x, side * (kerb[side] - 1.16), 0, np.pi * backwards, 0.1))
            elif plan.kind != "city" and clear(plan, x, 4) and rng.random() < 0.25:  # in a driveway
                turn = np.pi / 2 * rng.choice([-1, 1])
                spots.append((car, x, side * (kerb[side] + plan.walk + 3), KERB, turn, 0.2))
    for c, half in plan.crossings:
        for way in rng.choice([-1, 1], rng.integers(0, 4)):
            random = rng.uniform(-1, 1, 2)
            turning = rng.random() < 0.3
            y, turn = random * ((2, 0.7) if turning else (22, 0.02))  # else in the side street
            spots.append((car, c + way * half * 0.5, y, 0, way * np.pi / 2 + turn, 0.3))
    for side in rng.choice([-1, 1], rng.integers(3, 11)):
        x = 4 + 50 * rng.random() ** 1.3
        y = side * (kerb[side] + rng.uniform(0.5, plan.walk))
        heading = rng.normal(0, 0.4)
        if zebra > 0 and rng.random() < 0.3:
            spots.append((person, zebra + rng.uniform(0.5, 2.5), y * 0.4, 0, side * np.pi / 2 + heading, 0.1))
        elif clear(plan, x, 1):
            spots.append((person, x, y, KERB, np.pi * rng.integers(2) + heading, 0.1))
    for side in rng.choice([-1, 1], rng.integers(0, 5)):
        x, on_road = rng.uniform(5, 45), rng.random() < 0.7
        y, z = (kerb[side] - plan.bay[side] - 0.6, 0.0) if on_road else (kerb[side] + 1.2, KERB)
        if on_road or clear(plan, x, 2):
            spots.append((cyclist, x, side * y, z, np.pi * (side > 0), 0.15))
    return spots


def stand(ground, spots, plan, rng):
    """Make what stands in the spots, where there is room. -> parts, objects as street returns them."""
    parts, objects = list(ground), []
    taken = [(-0.5, plan.ego, 4.0, 1.3, 0.0)]  # the ground that things stand on; first, the car with the sensors
    for what, x, y, z, yaw, room in spots:
        label, thing = what(rng)
        if label:
            x, y, yaw = np.array([x, y, yaw]) + rng.normal(0, (0.1, 0.04, 0.03))
        low = [p for p in thing if p.centre[2] - p.half.max() < 2.5]  # what hangs higher takes no ground
        reach = np.max([np.abs(p.centre[:2]) + np.abs(p.R[:2] * p.half).sum(1) for p in low], 0) + room
        spot = (x, y, *reach, yaw)
        beyond_the_end = label and x > plan.end - 3
        if beyond_the_end or not is_free(spot, taken):
            continue
        taken.append(spot)
        if label:
            objects.append((label, np.arange(len(parts), len(parts) + len(thing)), yaw))
        turn = rotation(yaw)
        for p in thing:
            p.centre, p.R = turn @ p.centre + [x, y, z], turn @ p.R
        parts += thing
    return parts, objects


def is_free(spot, taken):
    """Does a rectangle (x, y, half length, half width, yaw) share no ground with others (n, 5)? By separating axes."""
    x, y, long, wide, yaw = np.stack(np.broadcast_arrays(spot, taken)).transpose(2, 0, 1)  # (2, n) each
    c, s, apart = np.cos(yaw), np.sin(yaw), False
    for u, v in ((c, s), (-s, c)):
        reach = sum(long[k] * np.abs(u * c[k] + v * s[k]) + wide[k] * np.abs(v * c[k] - u * s[k]) for k in (0, 1))
        apart |= (np.abs(u * (x[0] - x[1]) + v * (y[0] - y[1])) > reach).any(0)
    return np.all(apart)


# ---- how it looks, to light and to the LiDAR -------------------------------------------------------------------------
def surface(scene, h, pixel):
    """Albedo (3, N), LiDAR reflectance (N,) in [0, 1], share of mirror reflection (N,).

    h: what N rays have hit, as synthetic.hits has it. pixel: a ray's width in radians. One texture for both senses: a
    marking is bright to either, a window dark to both.
    """
    s = bare(scene, h, pixel)
    for names, coat in COATS.items():
        ids = [MATERIAL_ID[name] for name in names.split()]
        i = np.flatnonzero(np.isin(s.material, ids))
        some = SimpleNamespace(**{k: np.take(values, i, -1) for k, values in vars(s).items()})
        coat(some, scene.plan)
        s.albedo[:, i], s.infrared[i], s.gloss[i] = some.albedo, some.infrared, some.gloss
    return s.albedo * s.tone, np.clip(s.infrared * (0.8 + 0.2 * s.tone), 0, 1), s.gloss


def bare(scene, h, pixel):
    """The hits before anything is painted on them: arrays whose last axis has N places."""
    s = SimpleNamespace(p=h.p, unit=h.q, half=h.half, face=h.face, prim=h.prim, facing=h.facing)
    s.q = h.q * h.half  # metres from the primitive's centre
    s.kind, s.style = scene.kind[h.prim], scene.style[h.prim].T
    s.material = scene.material[h.prim]
    s.albedo = scene.colour.T[:, h.prim].copy()
    s.infrared = np.array([m[0] for m in MATERIALS.values()], "f4")[s.material]
    s.gloss = np.zeros(len(h.prim), "f4")
    s.blur = np.maximum(h.range * pixel, 1e-3)  # metres
    s.end, s.level = h.face < 2, h.face >= 4  # faces +-x, faces +-z
    flat = s.level & np.isin(s.material, [MATERIAL_ID["road"], MATERIAL_ID["block"]])
    sideways = np.where(s.end, s.q[1], s.q[0])
    s.along = np.where(flat, h.p[0], sideways + h.prim * 3.7).astype("f4")  # metres along the surface
    s.up = np.where(flat, h.p[1], np.where(s.level, s.q[1], s.q[2])).astype("f4")  # and up it
    s.fade = 1 / (1 + (s.blur / 0.05) ** 2)  # what is finer than a pixel must go, or it flickers
    s.fine = noise(s.along * 37, s.up * 37) * s.fade
    coarse = noise(s.along * 2.3 + 11, s.up * 2.3 + scene.plan.offset[0])
    contrast = np.where(s.material == MATERIAL_ID["cloth"], 0.5, 1)
    s.tone = 1 + (0.12 * s.fine + 0.08 * coarse).clip(-0.6, 0.8) * contrast
    s.grass = np.array([[0.10], [0.15], [0.04]], "f4") * (1 + 0.25 * s.fine + 0.15 * coarse)
    return s


def lay(s, share, colour, reflectance=None, gloss=None):
    """Lay a colour over a share of each hit, and its reflectance and gloss where they differ from what is below."""
    share, colour = np.asarray(share, "f4"), np.asarray(colour, "f4")
    s.albedo += share * (colour.reshape(len(colour), -1) - s.albedo)
    if reflectance is not None:
        s.infrared += share * (reflectance - s.infrared)
    if gloss is not None:
        s.gloss += share * (gloss - s.gloss)


def coat_road(s, plan):
    x, y = s.p[:2]
    asphalt, white = markings(plan, x, y, s.blur / np.maximum(s.facing, 0.01), s.blur * 1.5)
    patches = noise(x * 0.7 + plan.offset[0], y * 1.1 + plan.offset[1])
    cracks = (np.abs(noise(x * 4 + plan.offset[1], y * 4 + 9)) < 0.05) * (patches > 0) * s.fade
    grey = plan.asphalt * (1 - 0.25 * (patches > 0.9) - 0.1 * (patches < -1.2)) * (1 - 0.5 * cracks)
    lay(s, 1, np.where(asphalt, grey, s.grass))
    lay(s, white * np.clip(0.95 + 0.15 * s.fine, 0, 1), (0.62, 0.62, 0.6), 0.75)


def markings(plan, x, y, along, aside):
    """(on asphalt or in the fields, share painted white). along, aside: metres that a pixel blurs over."""
    half_road = plan.lane * plan.lanes
    asphalt = (y < plan.kerb[1]) & (y > -plan.kerb[-1])
    dashes = stripes(x, 9.0, 3.0, along)
    thin = partial(covered, low=-1, high=0.07, blur=aside)
    lines = thin(np.abs(y)) * (dashes if plan.dashed else 1)
    lines = lines + (plan.lanes > 1) * thin(np.abs(np.abs(y) - plan.lane)) * dashes
    for side in (-1, 1):
        lines += thin(np.abs(side * y - half_road + 0.12)) * (stripes(x, 2.0, 1.0, along) if plan.bay[side] else 1)
    lines *= plan.marked
    for c, half in plan.crossings:
        lines = lines * (np.abs(x - c) > half)
        asphalt = asphalt | (np.abs(x - c) < half)
    bars = covered(x, plan.zebra, plan.zebra + 3, along) * stripes(y, 1.0, 0.5, aside) * (np.abs(y) < half_road)
    stop = covered(x, plan.zebra - 1.3, plan.zebra - 0.9, along) * (y < -0.1) * (y > -half_road)
    return asphalt, np.maximum(lines * ((x < plan.zebra - 1.3) | (x > plan.zebra + 3.3)), bars + stop)


def coat_block(s, plan):
    edge = np.min(s.half[:2] - np.abs(s.q[:2]), 0)  # metres from the kerb
    joints = np.max([stripes(x, 0.6, 0.03, s.blur * 2) for x in s.p[:2]], 0)
    lay(s, 1, plan.paving * np.array([[1.03], [1.0], [0.95]]) * (1 - 0.35 * joints * s.fade))
    lay(s, (edge > plan.walk) * (0.15 if plan.kind == "city" else 1), s.grass, 0.45)
    lay(s, (edge < 0.16) | ~s.level, (0.42, 0.42, 0.41), 0.4)


def coat_facade(s, plan):
    wide = np.where(s.end, s.half[1], s.half[0])  # half as wide
    across = np.where(s.end, s.q[1], s.q[0]) + wide  # metres from a corner
    z = s.q[2] + s.half[2]
    bricks = stripes(across + 0.12 * (z // 0.16 % 2), 0.25, 0.03, s.blur)
    bricks = np.maximum(stripes(z, 0.16, 0.03, s.blur), bricks)
    lay(s, 0.25 * (s.style[2] < 0.3) * bricks, (0.6, 0.57, 0.52))
    lay(s, 0.4 * covered(z, -1, 0.7, s.blur), (0.2, 0.19, 0.18))

    # windows, shops and doors stand in columns and storeys; u, v: metres from a column's middle, and up the storey
    pitch = 2 * wide / np.maximum(np.round(2 * wide / (2.2 + 1.4 * s.style[0])), 1)
    column, storey = np.floor(across / pitch), np.floor(z / 3)
    u, v = np.abs((across / pitch - column - 0.5) * pitch), z - storey * 3
    chance = dice(column, storey, s.prim)
    shop = (s.style[3] > 0.6) & (storey == 0)
    door = (s.style[3] < 0.6) & (storey == 0) & (chance > 0.8)
    here = ~s.level & (z < 2 * s.half[2] - 0.4) & (pitch > 1.5) & (~s.end | (chance < 0.5))
    half = np.where(door, 0.55, np.where(shop, pitch / 2 - 0.25, 0.5 + 0.45 * s.style[1]))
    sill = np.where(door, 0, np.where(shop, 0.5, 0.95))
    lintel = np.where(shop, 2.6, 2.35)
    frame = here * covered(u, -9, half + 0.1, s.blur) * covered(v, sill - 0.1, lintel + 0.1, s.blur)
    glass = here * covered(u, 0.04 * ~door, half, s.blur) * covered(v, sill, lintel, s.blur)
    shut = ((chance < 0.35) & (v > lintel - 4 * chance) & ~shop) | door
    lay(s, frame, np.where(s.style[1] < 0.7, 0.7, 0.15)[None], 0.5)
    pane = np.where(door, 0.1, np.where(shut, 0.45, 0.035 + 0.03 * chance))
    lay(s, glass, pane[None], np.where(shut, 0.3, 0.1), np.where(shut, 0.03, 0.25))


def coat_roof(s, plan):
    lay(s, 0.4 * stripes(s.q[2], 0.3, 0.08, s.blur) + 0.3 * stripes(s.along, 0.25, 0.05, s.blur), DARK)


def coat_body(s, plan):
    """A car's lower half: bumper, plates, wheel arches, seams; and above it lamps and grille."""
    x, y, z = s.unit
    y = np.abs(y)
    front, doors = s.face == 0, s.face // 2 == 1
    upper = s.material == MATERIAL_ID["bonnet"]
    lamp = s.end & upper & (np.abs(y - 0.77) < 0.17) & (np.abs(z) < 0.75)
    plate = s.end & ~upper & (y < 0.3)
    arch = np.hypot((np.abs(x) - 0.61) * s.half[0], z * s.half[2] + 0.1) < 0.37
    s.gloss[:] = 0.06
    lay(s, lamp & front, (0.8, 0.8, 0.78), 0.6, 0.25)
    lay(s, lamp & ~front, (0.5, 0.02, 0.02), 0.9, 0.1)
    lay(s, front & (y < 0.5) & np.where(upper, np.abs(z) < 0.6, np.abs(z + 0.55) < 0.2), DARK, 0.1)
    lay(s, plate & (np.abs(z - 0.15) < 0.3), (0.75, 0.75, 0.72), 0.99)
    lay(s, 0.9 * ~upper * ((doors & arch) | (z < -0.82)), DARK, 0.08, 0)
    lay(s, 0.6 * doors * (np.abs((x + 0.5) % 0.39) < 0.012) * s.fade, DARK)  # seams


def coat_cabin(s, plan):
    x, y, z = s.unit
    van = s.half[2] > 0.42  # has no windows behind
    pillar = (np.abs(np.abs(x + 0.1) - 0.22) < 0.03) | (np.abs(x + 0.02) > 0.68 - 0.14 * z) | (van & (x < 0.35))
    corner = (np.abs(y) > 0.9 - 0.1 * z) | (van & (x < 0) & (np.abs(y) < 0.06))
    frame = np.where(s.end, corner, pillar)
    s.gloss[:] = 0.06
    lay(s, ~s.level & (z > -0.9) & (z < 0.78) & ~frame, DARK, 0.06, 0.12)


def coat_tyre(s, plan):
    x, y, _ = s.unit
    spoke = 0.35 + 0.65 * (np.cos(5 * np.arctan2(y, x) + s.prim) > -0.3)
    rim = (s.kind == ROD) & s.level & (np.hypot(x, y) < 0.64)
    lay(s, rim * spoke, (0.4, 0.4, 0.42), 0.5, 0.05)


def coat_leaves(s, plan):
    s.albedo *= np.clip(0.8 + 0.5 * noise(*(s.q * 13 + s.prim)), 0.2, 2)


def coat_sign(s, plan):
    radius = np.hypot(s.unit[0], s.unit[1])
    lay(s, (radius < 0.7) & (radius > s.style[0] - 0.4), (0.75, 0.75, 0.75))
    lay(s, s.face != 4, (0.3, 0.3, 0.3), 0.3)  # the back


def coat_skin(s, plan):
    hair = (s.unit[2] > 0.35) | (s.unit[0] < -0.35)
    lay(s, hair, np.outer((0.05, 0.035, 0.02), 1 + 4 * s.style[0]))


COATS = {
    "road": coat_road,
    "block": coat_block,
    "facade": coat_facade,
    "roof": coat_roof,
    "paint bonnet": coat_body,
    "cabin": coat_cabin,
    "tyre": coat_tyre,
    "leaves": coat_leaves,
    "sign": coat_sign,
    "skin": coat_skin,
}
