"""eval_boxes.py against the devkit's figures and against its rules as a plain loop."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data_kitti
import eval_boxes
from eval_boxes import BadInput

# -----------------------------------------------------------------------------
# the rules, as slow as they come: one label, one detection, one threshold after the other


def overlap_2d(a, b, of_a=False):
    width, height = min(a[5], b[5]) - max(a[3], b[3]), min(a[6], b[6]) - max(a[4], b[4])
    if width <= 0 or height <= 0:
        return 0.0
    area_a, area_b = (a[5] - a[3]) * (a[6] - a[4]), (b[5] - b[3]) * (b[6] - b[4])
    return width * height / (area_a if of_a else area_a + area_b - width * height)


def ground(box):
    """Corners in x, z: the length lies along x at ry = 0 and turns from there to -z."""
    _, w, length, x, _, z, ry = box[7:14]
    c, s = math.cos(ry), math.sin(ry)
    signs = ((1, 1), (-1, 1), (-1, -1), (1, -1))
    return [(x + c * i * length / 2 + s * j * w / 2, z - s * i * length / 2 + c * j * w / 2) for i, j in signs]


def shared_ground(a, b):
    """One polygon cut by the other's four sides."""
    polygon, sides = ground(a), ground(b)
    for (x0, z0), (x1, z1) in zip(sides, sides[1:] + sides[:1]):
        distance = [(x1 - x0) * (z - z0) - (z1 - z0) * (x - x0) for x, z in polygon]
        kept = []
        for i, p in enumerate(polygon):
            q, here, there = polygon[i - 1], distance[i], distance[i - 1]
            if (here >= 0) != (there >= 0):
                t = there / (there - here)
                kept.append((q[0] + t * (p[0] - q[0]), q[1] + t * (p[1] - q[1])))
            if here >= 0:
                kept.append(p)
        polygon = kept
    return abs(sum(p[0] * q[1] - p[1] * q[0] for p, q in zip(polygon, polygon[1:] + polygon[:1]))) / 2


def overlap_bev(a, b):
    shared = shared_ground(a, b)
    return shared / (a[8] * a[9] + b[8] * b[9] - shared)


def overlap_3d(a, b):
    tall = min(a[11], b[11]) - max(a[11] - a[7], b[11] - b[7])  # y points down, and is the bottom's
    shared = shared_ground(a, b) * max(tall, 0)
    return shared / (a[7] * a[8] * a[9] + b[7] * b[8] * b[9] - shared)


OVERLAPS = {"2d": overlap_2d, "bev": overlap_bev, "3d": overlap_3d}


def match(labels, detections, overlap, minimum, threshold):
    """One frame. labels, detections: (state, row), states "counts", "ignored", "other". threshold None: the pass that
    collects scores. -> pairs of indices that are right, the detections taken."""
    right, taken = [], set()
    for i, (asked, _) in enumerate(labels):
        if asked == "other":
            continue
        best = None
        for j, (state, row) in enumerate(detections):
            if state == "other" or j in taken or (threshold is not None and row[14] < threshold):
                continue
            if not overlap[i][j] > minimum:
                continue
            if threshold is None:
                better = best is None or row[14] > detections[best][1][14]
            elif state == "ignored":
                better = best is None
            else:
                better = best is None or detections[best][0] == "ignored" or overlap[i][j] > overlap[i][best]
            if better:
                best = j
        if best is not None:
            taken.add(best)
            if asked == "counts" and detections[best][0] == "counts":
                right.append((i, best))
    return right, taken


def literal(truths, results, name, level, kind, minimum):
    """-> n, 41 precisions, 41 orientation similarities."""
    frames, n = [], 0
    neighbour = {"Car": "Van", "Pedestrian": "Person_sitting"}.get(name)
    for (types, truth), (found_types, found) in zip(truths, results):
        labels, detections, stuff = [], [], []
        for what, row in zip(types, truth.tolist()):
            truncated, occluded, height = row[0], row[1], row[6] - row[4]
            state = "other"
            if what == neighbour:
                state = "ignored"
            if what == name:
                easy = (
                    occluded <= (0, 1, 2)[level]
                    and truncated <= (0.15, 0.3, 0.5)[level]
                    and height > (40, 25, 25)[level]
                )
                state = "counts" if easy else "ignored"
            if what == "DontCare":
                stuff.append(row)
            labels.append((state, row))
            n += state == "counts"
        for what, row in zip(found_types, found.tolist()):
            state = "counts" if what == name else "other"
            if row[6] - row[4] < (40, 25, 25)[level]:
                state = "ignored"
            detections.append((state, row))
        overlap = np.zeros((len(labels), len(detections)))
        for i, (asked, a) in enumerate(labels):
            for j, (there, b) in enumerate(detections):
                if "other" not in (asked, there):
                    overlap[i, j] = OVERLAPS[kind](a, b)
        overlap = overlap.tolist()
        frames.append((labels, detections, stuff, overlap))

    scores = []
    for labels, detections, _, overlap in frames:
        right, _ = match(labels, detections, overlap, minimum, None)
        scores += [detections[j][1][14] for _, j in right]
    scores.sort(reverse=True)
    thresholds, recall = [], 0.0
    for i, score in enumerate(scores):
        last = i == len(scores) - 1
        if not last and (i + 2) / n - recall < recall - (i + 1) / n:
            continue
        thresholds.append(score)
        recall += 1 / 40

    precision, alike = [0.0] * 41, [0.0] * 41
    for k, threshold in enumerate(thresholds):
        true = false = 0
        for labels, detections, stuff, overlap in frames:
            right, taken = match(labels, detections, overlap, minimum, threshold)
            true += len(right)
            alike[k] += sum((1 + math.cos(labels[i][1][2] - detections[j][1][2])) / 2 for i, j in right)
            for j, (state, row) in enumerate(detections):
                if state == "counts" and j not in taken and row[14] >= threshold:
                    forgiven = kind == "2d" and any(overlap_2d(row, s, of_a=True) > minimum for s in stuff)
                    false += not forgiven
        precision[k] = true / (true + false) if true else 0.0
        alike[k] /= max(true + false, 1)
    for values in (precision, alike):
        for k in range(39, -1, -1):
            values[k] = max(values[k], values[k + 1])
    return n, precision, alike


def crowd(rng, name, many):
    """A few frames in which everything that the rules speak of happens: labels and detections in each other's way,
    equal scores, heights and overlaps exactly at their limits, neighbours, DontCare, small detections of other
    classes."""
    others = [t for t in eval_boxes.JUDGED if t != name]
    neighbour = eval_boxes.NEIGHBOURS.get(name, others[0])
    truths, results = [], []
    for _ in range(24 if many else rng.integers(1, 5)):
        g, d = (8, 10) if many else (rng.integers(1, 9), rng.integers(0, 13))
        types = rng.choice([name, neighbour, "DontCare", *others], g, p=[0.6, 0.13, 0.15, 0.06, 0.06])
        truth = np.zeros((g, 14))
        truth[:, 0] = rng.choice([0, 0.15, 0.2, 0.3, 0.5, 0.6], g, p=[0.7, 0.1, 0.05, 0.05, 0.05, 0.05])
        truth[:, 1] = rng.choice(4, g, p=[0.7, 0.1, 0.1, 0.1])
        truth[:, 2] = rng.uniform(-3, 3, g)
        truth[:, 3:5] = rng.integers(0, 30, (g, 2))
        truth[:, 5:7] = truth[:, 3:5] + np.stack([rng.integers(20, 40, g), rng.choice([24, 25, 26, 40, 41, 50], g)], -1)
        truth[:, 7:10] = [1.5, 1.6, 3.9] + 0.2 * rng.normal(size=(g, 3))
        truth[:, 10:13] = rng.uniform(0, 1, (g, 3)) * [5, 0.5, 5]
        truth[:, 13] = rng.uniform(-3, 3, g)
        found = np.zeros((d, 15))
        source = np.append(rng.permutation(g), rng.integers(0, g, 13))[:d]
        found[:, :14] = truth[source]
        found[:, 2] += rng.normal(size=d)
        found[:, 3:7] += rng.integers(-3, 4, (d, 4)) * (rng.random((d, 1)) < 0.6)
        found[:, 7:14] += 0.06 * rng.normal(size=(d, 7))
        half = rng.random(d) < 0.1
        found[half, 6] = found[half, 4] + (truth[source, 6] - truth[source, 4])[half] / 2
        edge = rng.random(d) < 0.2
        found[edge, 6] = found[edge, 4] + rng.choice([24.5, 25, 39.5, 40], edge.sum())
        twin = rng.random(d) < 0.1
        found[twin] = found[rng.integers(0, d, twin.sum())] if d else found[twin]
        found[:, 14] = rng.integers(0, 10, d) / 8 if rng.random() < 0.5 else rng.random(d)
        found_types = np.where(rng.random(d) < 0.8, name, rng.choice(others, d))
        truths.append((types, truth))
        results.append((found_types, found))
    return truths, results


@pytest.mark.parametrize("name", eval_boxes.JUDGED)
def test_every_precision_is_that_of_the_plain_loop(name):
    rng = np.random.default_rng(eval_boxes.JUDGED.index(name))
    many, reached = 0, []
    for i in range(70):
        truths, results = crowd(rng, name, many=i < 5)
        found = eval_boxes.curves(truths, results, (name,))[name]
        level = (1, 2, 0)[i % 3]
        for metric, (kind, minimum) in eval_boxes.METRICS.items():
            n, precision, alike = literal(truths, results, name, level, kind, minimum[name])
            assert found["n"][level] == n
            assert found[metric][level].tolist() == precision, (i, metric)
            if metric == "2d":
                np.testing.assert_allclose(found["aos"][level], alike, rtol=0, atol=1e-12)
            reached.append(np.count_nonzero(precision))
        many += n > 41 and max(reached[-5:]) > 15
    assert many >= 3 and np.mean(reached) > 2


# -----------------------------------------------------------------------------
# the devkit's figures


def read_truth(path):
    rows = [line.split() for line in path.read_text().splitlines()]
    return [row[0] for row in rows], np.array([row[1:] for row in rows], float).reshape(-1, 14)


def as_results(truth, rng):
    """Labels as detections, with scores that differ; without DontCare, which nobody detects."""
    types, numbers = truth
    keep = np.array([t != "DontCare" for t in types], bool)
    return np.array(types)[keep], np.hstack([numbers, rng.random((len(types), 1))])[keep]


@pytest.fixture(scope="module")
def kitti_truths(kitti):
    return [read_truth(path) for path in sorted((kitti / "training" / "label_2").glob("*.txt"))]


def test_ap40_is_the_devkits(golden, kitti_truths):
    """Made-up detections of SIMIPU_KITTI's 30 frames, and what the devkit's C++ says of them."""
    folder = golden / "kitti_seed1"
    results = [eval_boxes.read_results(path) for path in sorted((folder / "results").glob("*.txt"))]
    found, seen = eval_boxes.evaluate(kitti_truths, results), 0
    for line in (folder / "ap40.txt").read_text().splitlines():
        what, figures = line.split(" : ")
        name, *_, metric, _ = what.split("_")
        metric = {"detection": "2d"}.get(metric, metric.lower())
        ap = found[name.capitalize()][metric]["AP40"]
        np.testing.assert_allclose(ap, [float(f) for f in figures.split()], rtol=0, atol=1e-5)
        seen += 1
    assert seen == 9


def test_labels_as_detections_of_real_frames(kitti_truths):
    """The ceiling where fewer than 41 objects count, and 100 where there are more."""
    rng = np.random.default_rng(0)
    found = eval_boxes.evaluate(kitti_truths, [as_results(t, rng) for t in kitti_truths])
    assert found["Car"]["n"] == [18, 36, 41] and found["Pedestrian"]["n"] == [7, 10, 12]
    for figure in eval_boxes.TITLES:
        np.testing.assert_allclose(found["Car"][figure]["AP40"], [42.5, 87.5, 100], rtol=1e-12)
        np.testing.assert_allclose(found["Car"][figure]["AP11"], [500 / 11, 900 / 11, 100], rtol=1e-12)
        np.testing.assert_allclose(found["Pedestrian"][figure]["AP40"], [15, 22.5, 27.5], rtol=1e-12)


# -----------------------------------------------------------------------------
# made-up frames


def street(rng, frames, cars=4):
    """Labels of cars side by side, none in another's way, and the same as detections."""
    truths = []
    for _ in range(frames):
        i = np.arange(cars)
        truth = np.zeros((cars, 14))
        truth[:, 2] = truth[:, 13] = rng.uniform(-3, 3, cars)
        truth[:, 3:7] = np.stack([100 * i, 0 * i, 100 * i + 80, 0 * i + 60], -1)
        truth[:, 7:14] = np.stack(
            [0 * i + 1.5, 0 * i + 1.6, 0 * i + 3.9, 8.0 * i, 0 * i + 1.6, 0 * i + 20, truth[:, 13]], -1
        )
        truths.append((["Car"] * cars, truth))
    return truths, [as_results(t, rng) for t in truths]


@pytest.mark.parametrize("frames", [1, 5, 10, 11, 30])
def test_the_best_that_few_objects_can_score(frames):
    truths, results = street(np.random.default_rng(1), frames)
    found = eval_boxes.evaluate(truths, results)
    n = 4 * frames
    best = 100 * (n - 1) / 40 if n < 41 else 100
    for figure in eval_boxes.TITLES:
        np.testing.assert_allclose(found["Car"][figure]["AP40"], best, rtol=1e-12)
        np.testing.assert_allclose(found["Car"][figure]["AP11"], 100 * math.ceil(min(n, 41) / 4) / 11, rtol=1e-12)
        np.testing.assert_allclose(found["overall"][figure]["AP40"], best / 3, rtol=1e-12)
    assert found["Car"]["n"] == found["overall"]["n"] == [n] * 3 and found["Cyclist"]["n"] == [0] * 3


def test_order_does_not_matter_where_nothing_is_equal():
    rng = np.random.default_rng(2)
    truths, results = street(rng, 20)
    for _, numbers in results:
        numbers[:, 3:7] += 6 * rng.normal(size=(len(numbers), 4))
        numbers[:, 10:14] += 0.1 * rng.normal(size=(len(numbers), 4))
    found = eval_boxes.evaluate(truths, results)
    assert 1 < found["Car"]["3d"]["AP40"][0] < 99 and 1 < found["Car"]["2d"]["AP40"][0] < 99
    moved = []
    for f in rng.permutation(20):
        types, truth = truths[f]
        found_types, numbers = results[f]
        rows, columns = rng.permutation(4), rng.permutation(4)
        moved.append(((types, truth[rows]), (found_types[columns], numbers[columns])))
    again = eval_boxes.evaluate(*zip(*moved))
    assert again["Car"]["n"] == found["Car"]["n"]
    for figure in eval_boxes.TITLES:
        np.testing.assert_allclose(again["Car"][figure]["AP40"], found["Car"][figure]["AP40"], rtol=1e-12)


def test_frames_without_a_file_are_left_out_and_empty_files_are_not():
    truths, results = street(np.random.default_rng(3), 30)
    nothing = (np.zeros(0, "U16"), np.zeros((0, 15)))
    left_out = eval_boxes.evaluate(truths, [None] * 15 + results[15:])
    assert left_out == eval_boxes.evaluate(truths[15:], results[15:])
    assert left_out["Car"]["n"] == [60] * 3 and left_out["Car"]["3d"]["AP40"] == [100] * 3
    half = eval_boxes.evaluate(truths, [nothing] * 15 + results[15:])
    assert half["Car"]["n"] == [120] * 3 and half["Car"]["3d"]["AP40"] == [50] * 3
    none = eval_boxes.evaluate(truths, [nothing] * 30)
    assert none["Car"]["n"] == [120] * 3 and none["Car"]["2d"]["AP40"] == [0] * 3
    empty = ([], np.zeros((0, 14)))
    assert eval_boxes.evaluate([empty], [nothing])["overall"]["n"] == [0] * 3
    assert eval_boxes.evaluate([empty], results[:1])["Car"]["3d"]["AP40"] == [0] * 3
    with pytest.raises(BadInput, match="no results for any of 30 frames"):
        eval_boxes.evaluate(truths, [None] * 30)


def test_results_without_boxes_in_space_or_without_orientation():
    truths, results = street(np.random.default_rng(4), 12)
    for _, numbers in results:
        numbers[:, 7:14] = [-1, -1, -1, -1000, -1000, -1000, -10]
    flat = eval_boxes.evaluate(truths, results)["Car"]
    assert flat["2d"]["AP40"] == [100] * 3 and flat["3d"]["AP40"] == flat["bev loose"]["AP40"] == [0] * 3
    results[3][1][0, 2] = -10
    found = eval_boxes.evaluate(truths, results)
    assert found["Car"]["aos"] is found["overall"]["aos"] is None and found["Car"]["2d"]["AP40"] == [100] * 3
    row = next(line for line in eval_boxes.table(found, 12) if "Car AOS" in line)
    assert row.split() == ["Car", "AOS", "48", "48", "48", *["-"] * 6]


def test_boxes_may_meet_in_space_alone():
    """Shifted by .55 of its length, a cyclist's overlap is .29, though the 2D boxes share nothing."""
    (_, truth), (_, numbers) = (x[0] for x in street(np.random.default_rng(8), 1, cars=1))
    truth[:, 13] = numbers[:, 13] = 0
    numbers[:, 10] += 0.55 * 3.9
    numbers[:, 3:7:2] += 200
    found = eval_boxes.evaluate([(["Cyclist"], truth)], [(["Cyclist"], numbers)])["Cyclist"]
    for figure, percent in (("2d", 0), ("bev", 0), ("bev loose", 100 / 11), ("3d loose", 100 / 11)):
        np.testing.assert_allclose(found[figure]["AP11"], percent, rtol=1e-12)


def test_orientation_half_wrong():
    truths, results = street(np.random.default_rng(5), 12)
    for _, numbers in results:
        numbers[:, 2] += np.pi / 2
    found = eval_boxes.evaluate(truths, results)["Car"]
    np.testing.assert_allclose(found["aos"]["AP40"], 50, rtol=1e-12)
    assert found["2d"]["AP40"] == [100] * 3


def test_table():
    truths, results = street(np.random.default_rng(6), 20)
    found = eval_boxes.evaluate(truths, results, ("Car", "Cyclist"))
    lines = eval_boxes.table(found, 20)
    assert "20 frames" in lines[0] and len(lines) == 2 + 3 * 6
    rows = {" ".join(line.split()[:-9]): line.split()[-9:] for line in lines[2:]}
    assert rows["Car BEV loose"] == ["80"] * 3 + ["100.00"] * 6
    assert rows["Cyclist 3D"] == ["0"] * 3 + ["-"] * 6
    assert rows["overall 3D"] == ["80"] * 3 + ["50.00"] * 6
    assert not any("68.58" in line for line in lines)
    published = eval_boxes.table(found, 20, published=True)
    assert any(line.split()[-9:] == ["-"] * 7 + ["68.58", "-"] for line in published)
    assert any(line.split()[-3:] == ["81.32", "70.89", "66.20"] for line in published) and "AP11" in published[-1]
    for classes in eval_boxes.PUBLISHED.values():
        if len(classes) == 4:
            *three, overall = classes.values()
            np.testing.assert_allclose(np.mean(three, 0), overall, atol=0.01)


# -----------------------------------------------------------------------------
# files

LINE = "Car -1 -1 0.5 10 20 30 60 1.5 1.6 3.9 1 2 20 0.4 0.9"


def test_results_there_and_back(tmp_path):
    path = tmp_path / "000000.txt"
    rng = np.random.default_rng(7)
    numbers = np.hstack([np.full((5, 2), -1), rng.normal(size=(5, 13)) * 100])
    types = ["Car", "Pedestrian", "Cyclist", "Van", "Misc"]
    eval_boxes.write_results(path, types, numbers)
    assert path.read_text().startswith("Car -1 -1 ")
    read_types, read = eval_boxes.read_results(path)
    assert read_types.tolist() == types
    np.testing.assert_allclose(read, numbers, rtol=1e-7, atol=5.1e-5)
    np.testing.assert_allclose(read[:, 14], numbers[:, 14], rtol=1e-7)
    eval_boxes.write_results(path, [], np.zeros((0, 15)))
    assert path.read_bytes() == b"" and eval_boxes.read_results(path)[1].shape == (0, 15)
    with pytest.raises(BadInput, match="000000.txt: not written, a number is NaN or infinite"):
        eval_boxes.write_results(path, ["Car"], np.full((1, 15), np.nan))
    with pytest.raises(BadInput, match="nowhere"):
        eval_boxes.write_results(tmp_path / "nowhere" / "000000.txt", types, numbers)


@pytest.mark.parametrize(
    "line, message",
    [
        (LINE.rsplit(" ", 1)[0], r"line 2 has 15 columns; must be 16, the score last \(a label has no score\)"),
        ("Car", "line 2 has 1 columns; must be 16, the score last$"),
        (LINE + " 1", "line 2 has 17 columns; must be 16, the score last$"),
        (LINE.replace("0.9", "nan"), "line 2: a number is NaN or infinite"),
        (LINE.replace("3.9", "inf"), "line 2: a number is NaN or infinite"),
        (LINE.replace("3.9", "3,9"), "line 2: not 15 numbers behind the type"),
        (LINE.replace("Car", "car"), "line 2: type 'car' must be one of Car, Van, "),
        (LINE.replace("Car", "DontCare"), "line 2: type 'DontCare' must be one of "),
        (b"\xff\xfe" + LINE.encode(), "line 2 is not text"),
    ],
)
def test_lines_that_cannot_be_read(tmp_path, line, message):
    path = tmp_path / "000007.txt"
    line = line if isinstance(line, bytes) else line.encode()
    path.write_bytes(LINE.encode() + b"\n" + line + b"\n")
    with pytest.raises(BadInput, match=f"000007.txt: {message}") as e:
        eval_boxes.read_results(path)
    assert "\n" not in str(e.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(BadInput, match="000001.txt: not readable"):
        eval_boxes.read_results(tmp_path / "000001.txt")
    (tmp_path / "000002.txt").write_text(f"\n{LINE}\r\n\n")
    types, numbers = eval_boxes.read_results(tmp_path / "000002.txt")
    assert types.tolist() == ["Car"] and numbers[0, -1] == 0.9


# -----------------------------------------------------------------------------
# a detector's figures


def test_the_size_that_images_are_judged_at():
    """The release judges at 1280 x 384, the geometric middle of the range that it trains in."""
    for sizes, wanted in (((640, 192, 2560, 768), (1280, 384)), ((320, 96), (320, 96))):
        assert eval_boxes.judging_box(SimpleNamespace(image_scale=sizes)) == wanted


def test_detections_as_result_files_have_them(tmp_path):
    """A camera that looks along x from half a metre behind the sensor, 100 pixels of focal length: a car ahead, one cut
    by the image's left border, one outside it, and two behind.
    """
    calib = tmp_path / "000000.txt"
    p2 = "100 0 50 0 0 100 20 0 0 0 1 0"
    r0, tr = "1 0 0 0 1 0 0 0 1", "0 -1 0 0 0 0 -1 0.1 1 0 0 0.5"
    calib.write_text(f"P2: {p2}\nR0_rect: {r0}\nTr_velo_to_cam: {tr}\n")
    frame = data_kitti.ObjectFrame("training/000000", Path("a.png"), Path("a.bin"), (calib,), data_kitti.RIG)
    ahead = [9.5, 0.0, -0.9, 4.0, 2.0, 1.5, 0.0]
    left = [9.5, 5.0, -0.9, 2.0, 2.0, 1.5, math.pi / 2]
    out = [9.5, 9.0, -0.9, 2.0, 2.0, 1.5, 0.0]
    behind = [-3.0, 0.0, -0.9, 4.0, 2.0, 1.5, 0.0]
    close = [-0.7, 0.0, -0.9, 4.0, 2.0, 1.5, 0.0]  # its front is before the camera
    boxes, scores = np.array([out, ahead, behind, left, close]), np.array([0.9, 0.8, 0.7, 0.6, 0.5])
    types, numbers = eval_boxes.as_results(frame, (101, 41), boxes, scores, np.array([2, 2, 2, 1, 2]))
    assert types.tolist() == ["Car", "Cyclist"]
    np.testing.assert_array_equal(numbers[:, :2], -1)
    np.testing.assert_array_equal(numbers[:, 14], [0.8, 0.6])
    # depth 8 to 12, 1 m to either side; 1.65 m below the LiDAR at the bottom, which is .1 m below the camera's
    rect = [50 - 100 / 8, 20 + 100 * 0.25 / 12, 50 + 100 / 8, 40]
    np.testing.assert_allclose(numbers[0, 3:7], rect, atol=1e-9)
    np.testing.assert_allclose(numbers[0, 7:14], [1.5, 2, 4, 0, 1.75, 10, -math.pi / 2], atol=1e-9)
    assert numbers[0, 2] == pytest.approx(-math.pi / 2)  # straight ahead: as it stands
    # 45 degrees' worth of pixels to the left: cut at the border
    np.testing.assert_allclose(numbers[1, [3, 5]], [0, 50 - 100 * 4 / 11], atol=1e-9)
    np.testing.assert_allclose(numbers[1, 10:14], [-5, 1.75, 10, -math.pi], atol=1e-9)
    assert numbers[1, 2] == pytest.approx(math.atan2(5, 10) - math.pi)

    empty = eval_boxes.as_results(frame, (101, 41), np.zeros((0, 7)), np.zeros(0), np.zeros(0, int))
    assert empty[0].shape == (0,) and empty[1].shape == (0, 15)
