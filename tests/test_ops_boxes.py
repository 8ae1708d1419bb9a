"""ops_boxes.py against known areas, plain loops and KITTI's own labels."""

import numpy as np
import pytest
import torch

import ops_boxes

EXACT = np.array([[0.0, -1, 0, 0.3], [0, 0, -1, -0.2], [1, 0, 0, 0.1]])  # a camera that does not lean


def random_boxes(rng, n, spread=4.0):
    x, y, z = rng.uniform(-spread, spread, (3, n))
    length, width, height = rng.uniform(0.4, 5, (3, n))
    return np.stack([x, y, z, length, width, height, rng.uniform(-4, 4, n)], -1)


def flat(*rows):
    """Boxes of height 2 at z = 0 from rows of x, y, length, width, yaw."""
    return np.array([[x, y, 0, length, width, 2, yaw] for x, y, length, width, yaw in rows], np.float64)


def leaning_camera(rng):
    """velo2cam (4, 4) of a camera that leans by a degree or two in every direction."""
    turn = np.linalg.qr(np.eye(3) + 0.03 * rng.normal(size=(3, 3)))[0]
    turn = turn * np.sign(np.diag(turn))
    velo2cam = np.eye(4)
    velo2cam[:3] = turn @ EXACT
    return velo2cam


def clipped_area(a, b):
    """The classical way, vectorised: corners of one inside the other, crossings of edges, sorted by angle about their
    mean. Right but for coincident edges. a, b (n, 7) -> (n,)."""
    p, q = (ops_boxes.corners(x)[:, :4, :2] for x in (a, b))

    def inside(points, box):
        local = points - box[:, None, :2]
        c, s = np.cos(box[:, 6, None]), np.sin(box[:, 6, None])
        ahead, left = c * local[..., 0] + s * local[..., 1], c * local[..., 1] - s * local[..., 0]
        return (abs(ahead) <= box[:, 3, None] / 2) & (abs(left) <= box[:, 4, None] / 2)

    def cross(u, v):
        return u[..., 0] * v[..., 1] - u[..., 1] * v[..., 0]

    edge_p, edge_q = np.roll(p, -1, 1) - p, np.roll(q, -1, 1) - q
    start = q[:, None] - p[:, :, None]  # (n, 4, 4, 2)
    divisor = cross(edge_p[:, :, None], edge_q[:, None])
    divisor = np.where(divisor == 0, 1e-300, divisor)
    t, u = cross(start, edge_q[:, None]) / divisor, cross(start, edge_p[:, :, None]) / divisor
    crossings = p[:, :, None] + t[..., None] * edge_p[:, :, None]
    crossing = (t >= 0) & (t <= 1) & (u >= 0) & (u <= 1)
    points = np.concatenate([p, q, crossings.reshape(-1, 16, 2)], 1)
    counts = np.concatenate([inside(p, b), inside(q, a), crossing.reshape(-1, 16)], 1)
    n = counts.sum(1)
    points = np.where(counts[..., None], points, 0)
    points = points - np.where(counts[..., None], points.sum(1, keepdims=True) / np.maximum(n, 1)[:, None, None], 0)
    angle = np.where(counts, np.arctan2(points[..., 1], points[..., 0]), 9)
    points = np.take_along_axis(
        points, angle.argsort(1)[..., None], 1
    )  # what does not count is last, at 0: it adds nothing
    area = cross(points[:, :-1], points[:, 1:]).sum(1)
    last = np.take_along_axis(points, np.maximum(n - 1, 0)[:, None, None], 1)[:, 0]
    return (area + cross(last, points[:, 0])) / 2


# -----------------------------------------------------------------------------
# overlaps


SQUARE = (0, 0, 3, 3, 0)
TURNED = [1e-12, 1e-9, 1e-7, 1e-5, 1e-3, 0.1, np.pi / 4]
CASES = {
    "identical": ((0, 0, 4, 2, 0.3), (0, 0, 4, 2, 0.3), 8),
    "turned by pi": ((0, 0, 4, 2, 0.3), (0, 0, 4, 2, 0.3 + np.pi), 8),
    "turned by pi / 2, sides swapped": ((0, 0, 4, 2, 0.3), (0, 0, 2, 4, 0.3 - np.pi / 2), 8),
    "touching along an edge": ((0, 0, 4, 2, 0), (4, 0, 4, 2, 0), 0),
    "touching along an edge, turned": ((0, 0, 4, 2, 0.7), (4 * np.cos(0.7), 4 * np.sin(0.7), 4, 2, 0.7), 0),
    "touching at a corner": ((0, 0, 4, 2, 0), (4, 2, 4, 2, 0), 0),
    "half shifted": ((0, 0, 4, 2, 0), (2, 0, 4, 2, 0), 4),
    "half shifted, turned": ((0, 0, 4, 2, 0.7), (2 * np.cos(0.7), 2 * np.sin(0.7), 4, 2, 0.7), 4),
    "three edges shared": ((0, 0, 4, 2, 0), (1, 0, 2, 2, 0), 4),
    "contained": ((0, 0, 4, 3, 0), (0.5, -0.25, 1, 0.5, 0.9), 0.5),
    "containing": ((0.5, -0.25, 1, 0.5, 0.9), (0, 0, 4, 3, 0), 0.5),
    "a cross": ((0, 0, 6, 1, 0.2), (0, 0, 6, 1, 0.2 + np.pi / 2), 1),
    "far apart": ((0, 0, 4, 2, 0.3), (40, 3, 4, 2, 1.3), 0),
    "in line, apart": ((0, 0, 4, 2, 0.3), (8 * np.cos(0.3), 8 * np.sin(0.3), 4, 2, 0.3), 0),
    "no width": ((0, 0, 4, 2, 0.3), (0, 0, 4, 0, 1.3), 0),
    "no width, on the edge": ((0, 0, 4, 2, 0), (0, 1, 4, 0, 0), 0),
    "a point": ((0, 0, 4, 2, 0.3), (0.1, 0.1, 0, 0, 0), 0),
    "a point and itself": ((1, 1, 0, 0, 0.4), (1, 1, 0, 0, 0.4), 0),
    "a needle": ((0, 0, 4, 2, 0), (0, 0, 100, 0.01, 0), 0.04),
    **{f"squares turned by {t:g}": (SQUARE, (0, 0, 3, 3, t), 18 / (1 + np.cos(t) + np.sin(t))) for t in TURNED},
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype, near, far", [("float64", 1e-14, 1e-13), ("float32", 2e-6, 1e-5)])
def test_bev_iou_of_known_areas(library, dtype, near, far):
    first, second = flat(*(a for a, b, area in CASES.values())), flat(*(b for a, b, area in CASES.values()))
    area = np.array([area for a, b, area in CASES.values()])
    size = first[:, 3] * first[:, 4] + second[:, 3] * second[:, 4]
    expected = area / np.where(size > area, size - area, 1)
    for place, tolerance in (((0.0, 0.0), near), ((64.0, -32.0), far)):
        shift = np.array([*place, 0, 0, 0, 0, 0])
        a, b = ((x + shift).astype(dtype) for x in (first, second))
        if library == "torch":
            a, b = torch.from_numpy(a), torch.from_numpy(b)
        for found in (ops_boxes.bev_iou(a, b), ops_boxes.bev_iou(b, a)):
            assert str(found.dtype).endswith(dtype) and found.min() >= 0 and found.max() <= 1
            off = abs(np.asarray(found) - expected)
            wrong = {name: o for name, o in zip(CASES, off) if o > tolerance}
            assert not wrong


@pytest.mark.parametrize("dtype, tolerance", [(np.float64, 1e-12), (np.float32, 1e-5)])
def test_bev_intersection_against_clipping(dtype, tolerance):
    rng = np.random.default_rng(0)
    a, b = random_boxes(rng, 20000), random_boxes(rng, 20000)
    expected = clipped_area(a, b)
    assert (expected > 0).mean() > 0.2 and (expected == 0).mean() > 0.2
    a, b = a.astype(dtype), b.astype(dtype)
    found = ops_boxes.bev_intersection(a, b)
    assert found.dtype == dtype and found.min() == 0
    twins = np.concatenate([a[:, :6], a[:, 6:] + dtype(np.pi)], 1)
    assert ops_boxes.bev_iou(a, twins).max() <= 1
    np.testing.assert_allclose(found, expected, atol=tolerance)
    same = ops_boxes.bev_intersection(torch.from_numpy(a), torch.from_numpy(b))
    np.testing.assert_allclose(same, found, atol=tolerance)


def test_iou_3d():
    a = np.array([0.0, 0, 1, 4, 2, 2, 0.4])
    raised = a + [0, 0, 1, 0, 0, 0, 0]
    above = a + [0, 0, 2, 0, 0, 0, 0]
    inner = a * [1, 1, 1, 0.5, 0.5, 0.5, 1]
    aside = a + [-2 * np.sin(0.4), 2 * np.cos(0.4), 0, 0, 0, 0, 0]
    flat_one = a * [1, 1, 1, 1, 1, 0, 1]
    found = ops_boxes.iou_3d(a, np.stack([a, raised, above, inner, aside, flat_one]))
    np.testing.assert_allclose(found, [1, 1 / 3, 0, 1 / 8, 0, 0], atol=1e-14)
    assert ops_boxes.iou_3d(flat_one, flat_one) == 0


def test_nearest_bev_iou_is_bev_iou_at_quarter_turns():
    rng = np.random.default_rng(1)
    a, b = random_boxes(rng, 300), random_boxes(rng, 200)
    found = ops_boxes.pairwise(ops_boxes.nearest_bev_iou, a, b)
    for boxes in (a, b):
        boxes[:, 6] = np.round(boxes[:, 6] / (np.pi / 2)) * np.pi / 2
    np.testing.assert_allclose(found, ops_boxes.bev_iou(a[:, None], b), atol=1e-12)
    assert ops_boxes.nearest_bev_iou(flat((0, 0, 0, 0, 0)), flat((0, 0, 0, 0, 0))) == 0


@pytest.mark.parametrize("n, m", [(7, 5), (1, 40), (0, 3), (3, 0)])
def test_pairwise_in_pieces(monkeypatch, n, m):
    rng = np.random.default_rng(2)
    a, b = (np.stack([random_boxes(rng, k) for _ in range(2)]) for k in (n, m))
    whole = ops_boxes.pairwise(ops_boxes.iou_3d, a, b)
    assert whole.shape == (2, n, m)
    monkeypatch.setattr(ops_boxes, "PIECE", 20)
    calls = []

    def counted(x, y):
        calls.append(x.shape[-3])
        return ops_boxes.iou_3d(x, y)

    pieces = ops_boxes.pairwise(counted, a, b)
    assert len(calls) > 1 or n < 2 or m == 0
    np.testing.assert_array_equal(pieces, whole)
    expected = [[[ops_boxes.iou_3d(x, y) for y in ys] for x in xs] for xs, ys in zip(a, b)]
    np.testing.assert_allclose(whole, np.reshape(expected, whole.shape), atol=1e-13)
    np.testing.assert_allclose(
        ops_boxes.pairwise(ops_boxes.iou_3d, torch.from_numpy(a), torch.from_numpy(b)), whole, atol=1e-13
    )


# -----------------------------------------------------------------------------
# non-maximum suppression


def greedy(iou, scores, threshold, groups):
    """One box after the other, best first; of equals the first."""
    keep = np.zeros(len(scores), bool)
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)):
        if scores[i] > -np.inf:
            keep[i] = not any(keep[j] and groups[i] == groups[j] and iou[j, i] > threshold for j in range(len(scores)))
    return keep


@pytest.mark.parametrize("threshold", [0.01, 0.3, 0.7])
def test_nms_is_greedy(threshold):
    rng = np.random.default_rng(3)
    removed = 0
    for k in (0, 1, 2, 17, 60):
        for _ in range(6):
            boxes = random_boxes(rng, k)
            boxes[k // 2 :] = boxes[: k - k // 2] + 0.1 * rng.normal(size=(k - k // 2, 7))
            scores = rng.integers(0, 8, k) / 8.0  # many are equal
            scores[rng.random(k) < 0.1] = -np.inf
            groups = rng.integers(0, 2, k)
            iou = ops_boxes.pairwise(ops_boxes.bev_iou, boxes, boxes)
            for g in (groups, 0 * groups):
                expected = greedy(iou, scores, threshold, g)
                removed += (~expected).sum()
                np.testing.assert_array_equal(ops_boxes.nms(boxes, scores, threshold, g), expected)
                tensors = [torch.from_numpy(x) for x in (boxes, scores, g)]
                np.testing.assert_array_equal(ops_boxes.nms(*tensors[:2], threshold, tensors[2]), expected)
            np.testing.assert_array_equal(ops_boxes.nms(boxes, scores, threshold), expected)
    assert removed > 100


def test_nms_of_classes_and_frames_at_once():
    rng = np.random.default_rng(4)
    boxes = np.stack([random_boxes(rng, 30) for _ in range(2)])
    scores = rng.normal(size=(2, 3, 30))
    scores[scores < -1] = -np.inf
    found = ops_boxes.nms(boxes[:, None], scores, 0.1)
    assert found.shape == (2, 3, 30)
    for b in range(2):
        iou = ops_boxes.pairwise(ops_boxes.bev_iou, boxes[b], boxes[b])
        for c in range(3):
            np.testing.assert_array_equal(found[b, c], greedy(iou, scores[b, c], 0.1, np.zeros(30)))
    assert (found[:, 0] != found[:, 1]).any()


def test_nms_of_a_chain_needs_a_round_for_every_box():
    """Each box overlaps the next alone: every other one stays, which the last one learns in the last round."""
    k = 100
    boxes = flat(*((3.0 * i, 0, 4, 2, 0) for i in range(k)))
    keep = ops_boxes.nms(torch.from_numpy(boxes), torch.arange(k, 0.0, -1), 0.1)
    assert keep.tolist() == [i % 2 == 0 for i in range(k)]


def test_nothing_waits_for_a_gpu():
    """Tensors without values, on which every question about a value is an error. All K rounds are done."""
    boxes, scores = torch.empty(2, 1, 9, 7, device="meta"), torch.empty(2, 3, 9, device="meta")
    assert ops_boxes.nms(boxes, scores, 0.1).shape == (2, 3, 9)
    assert ops_boxes.pairwise(ops_boxes.iou_3d, boxes, boxes).shape == (2, 1, 9, 9)
    assert ops_boxes.pairwise(ops_boxes.nearest_bev_iou, boxes, boxes).shape == (2, 1, 9, 9)
    assert ops_boxes.points_in_boxes(torch.empty(2, 1, 50, 4, device="meta"), boxes).shape == (2, 1, 50, 9)
    assert ops_boxes.transform_boxes(boxes, torch.empty(2, 1, 1, 4, 4, device="meta")).shape == boxes.shape
    assert ops_boxes.corners(boxes).shape == (2, 1, 9, 8, 3)
    assert ops_boxes.box_to_label(boxes, torch.empty(4, 4, device="meta")).shape == boxes.shape


# -----------------------------------------------------------------------------
# conversions


def test_labels_of_a_camera_that_does_not_lean():
    """A car 20 m ahead and 1 m to the right, its bottom 1.6 m below the camera: driving away, to the right, towards it,
    to the left."""
    labels = np.array([[1.5, 1.6, 4, 1, 1.6, 20, ry] for ry in (-np.pi / 2, 0, np.pi / 2, 3)])
    boxes = ops_boxes.label_to_box(labels, EXACT)
    np.testing.assert_allclose(boxes[:, :6], [[19.9, -0.7, -1.05, 4, 1.6, 1.5]] * 4)
    np.testing.assert_allclose(boxes[:, 6], [0, -np.pi / 2, -np.pi, -np.pi / 2 - 3 + 2 * np.pi], atol=1e-12)


@pytest.mark.parametrize("rows", [3, 4])
def test_labels_there_and_back(rows):
    rng = np.random.default_rng(5)
    for _ in range(20):
        velo2cam = leaning_camera(rng)[:rows]
        labels = np.concatenate(
            [rng.uniform(0.3, 5, (50, 3)), rng.uniform(-40, 60, (50, 3)), rng.uniform(-np.pi, np.pi, (50, 1))], 1
        )
        boxes = ops_boxes.label_to_box(labels, velo2cam)
        np.testing.assert_allclose(ops_boxes.box_to_label(boxes, velo2cam), labels, atol=1e-10)
        np.testing.assert_allclose(boxes[0], ops_boxes.label_to_box(labels[0], velo2cam))
        tensor = ops_boxes.label_to_box(torch.from_numpy(labels), torch.from_numpy(velo2cam))
        np.testing.assert_allclose(tensor, boxes, atol=1e-10)
        np.testing.assert_allclose(ops_boxes.box_to_label(tensor, torch.from_numpy(velo2cam)), labels, atol=1e-10)
    assert ops_boxes.label_to_box(labels[:0], velo2cam).shape == (0, 7)


def test_corners():
    found = ops_boxes.corners(np.array([[1.0, 2, 3, 4, 2, 1, 0], [1, 2, 3, 4, 2, 1, np.pi / 2]]))
    bottom, turned = [[3, 3], [-1, 3], [-1, 1], [3, 1]], [[0, 4], [0, 0], [2, 0], [2, 4]]
    expected = [[[*xy, z] for z in (2.5, 3.5) for xy in ring] for ring in (bottom, turned)]
    np.testing.assert_allclose(found, expected, atol=1e-15)
    boxes = torch.from_numpy(random_boxes(np.random.default_rng(6), 5))
    np.testing.assert_allclose(ops_boxes.corners(boxes), ops_boxes.corners(boxes.numpy()), atol=1e-14)


def test_points_in_boxes():
    rng = np.random.default_rng(7)
    points, boxes = rng.uniform(-5, 5, (2, 400, 4)), np.stack([random_boxes(rng, 6) for _ in range(2)])
    expected = np.zeros((2, 400, 6), bool)
    for f in range(2):
        for m, (x, y, z, length, width, height, yaw) in enumerate(boxes[f]):
            for n, p in enumerate(points[f]):
                ahead = (p[0] - x) * np.cos(yaw) + (p[1] - y) * np.sin(yaw)
                left = (p[1] - y) * np.cos(yaw) - (p[0] - x) * np.sin(yaw)
                expected[f, n, m] = abs(ahead) <= length / 2 and abs(left) <= width / 2 and abs(p[2] - z) <= height / 2
    assert 0.01 < expected.mean() < 0.9
    np.testing.assert_array_equal(ops_boxes.points_in_boxes(points, boxes), expected)
    np.testing.assert_array_equal(
        ops_boxes.points_in_boxes(torch.from_numpy(points), torch.from_numpy(boxes)), expected
    )
    on_a_face = np.array([[2.0, 1, 0.5], [2.0, 1, 0.51]])
    assert ops_boxes.points_in_boxes(on_a_face, np.array([[0.0, 0, 0, 4, 2, 1, 0]]))[:, 0].tolist() == [True, False]


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_move_with_their_points(flip):
    rng = np.random.default_rng(8)
    for _ in range(10):
        angle, scale = rng.uniform(-2, 2), rng.uniform(0.75, 1.25)
        T = np.eye(4)
        T[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        T[:3, :3] *= scale
        T[:3, 3] = rng.normal(size=3)
        if flip:
            T[1] *= -1
        boxes, points = random_boxes(rng, 20), rng.uniform(-5, 5, (3000, 3))
        moved, there = ops_boxes.transform_boxes(boxes, T), points @ T[:3, :3].T + T[:3, 3]
        before = ops_boxes.points_in_boxes(points, boxes)
        assert before.any(0).mean() > 0.5
        np.testing.assert_array_equal(ops_boxes.points_in_boxes(there, moved), before)
        front = boxes[:, :3] + np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6]), 0 * boxes[:, 6]], -1)
        front = front @ T[:3, :3].T + T[:3, 3] - moved[:, :3]  # it still looks the way it did, not backwards
        np.testing.assert_allclose(np.arctan2(front[:, 1], front[:, 0]), moved[:, 6], atol=1e-10)
        batch = ops_boxes.transform_boxes(
            torch.from_numpy(boxes).reshape(2, 10, 7), torch.from_numpy(T).expand(2, 1, 4, 4)
        )
        np.testing.assert_allclose(batch.reshape(20, 7), moved, atol=1e-12)


# -----------------------------------------------------------------------------
# KITTI's labels


def read_calib(path):
    """velo2cam, P2, both (4, 4)."""
    lines = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    matrices = {}
    for key, columns in (("R0_rect", 3), ("Tr_velo_to_cam", 4), ("P2", 4)):
        matrices[key] = np.eye(4)
        matrices[key][:3, :columns] = np.array(lines[key].split(), float).reshape(3, columns)
    return matrices["R0_rect"] @ matrices["Tr_velo_to_cam"], matrices["P2"]


def read_objects(path):
    """All but DontCare: numbers (n, 14) in the file's order."""
    rows = [line.split()[1:] for line in path.read_text().splitlines() if not line.startswith("DontCare")]
    return np.array(rows, float).reshape(-1, 14)


def test_real_labels_there_and_back_and_their_points(kitti):
    """Every label survives, every box that nothing hides holds points, and what it projects to is its 2D box."""
    fits, folder = [], kitti / "training"
    for path in sorted((folder / "label_2").glob("*.txt")):
        numbers, (velo2cam, P2) = read_objects(path), read_calib(folder / "calib" / path.name)
        boxes = ops_boxes.label_to_box(numbers[:, 7:], velo2cam)
        np.testing.assert_allclose(ops_boxes.box_to_label(boxes, velo2cam), numbers[:, 7:], atol=1e-4)
        near = (numbers[:, 1] == 0) & (numbers[:, 12] < 40)
        points = np.fromfile(folder / "velodyne" / f"{path.stem}.bin", np.float32).reshape(-1, 4)
        assert (ops_boxes.points_in_boxes(points, boxes).sum(0)[near] >= 5).all(), path.name
        whole = near & (numbers[:, 0] == 0)
        camera = P2 @ velo2cam
        pixels = ops_boxes.corners(boxes[whole]) @ camera[:3, :3].T + camera[:3, 3]
        pixels = pixels[..., :2] / pixels[..., 2:]
        low, high, given = pixels.min(1), pixels.max(1), numbers[whole, 3:7]
        shared = (np.minimum(high, given[:, 2:]) - np.maximum(low, given[:, :2])).clip(0).prod(1)
        sizes = (high - low).prod(1) + (given[:, 2:] - given[:, :2]).prod(1)
        fits.extend(shared / (sizes - shared))
    # some people's boxes are wider than they
    assert len(fits) >= 20 and np.quantile(fits, 0.1) > 0.7 and np.median(fits) > 0.9
