"""eval_waymo.py: files of boxes, and Waymo's detection metric, beside the figures of its own tool and plain loops."""

import itertools
import os
import struct
from pathlib import Path

import numpy as np
import pytest

import data
import eval_waymo
import ops_boxes
from eval_waymo import make_objects
from files import BadInput

WAYMO = os.environ.get("SIMIPU_WAYMO")
needs_waymo = pytest.mark.skipif(not WAYMO, reason="SIMIPU_WAYMO names no folder")

# what compute_detection_metrics_main says at its top about its own fixture: mAP and mAPH of LEVEL_1, then of LEVEL_2
OFFICIAL = {
    "VEHICLE": (0.208277, 0.162823, 0.20542, 0.160523),
    "PEDESTRIAN": (0.129258, 0.0984962, 0.125136, 0.0953438),
    "SIGN": (0.0926278, 0.0635938, 0.067927, 0.0466355),
    "CYCLIST": (0, 0, 0, 0),
    "VEHICLE [0, 30)": (0.154727, 0.129927, 0.154727, 0.129927),
    "VEHICLE [30, 50)": (0.27302, 0.230956, 0.270492, 0.228818),
    "VEHICLE [50, +inf)": (0.218596, 0.155501, 0.212188, 0.150963),
    "PEDESTRIAN [0, 30)": (0.19352, 0.155428, 0.19352, 0.155428),
    "PEDESTRIAN [30, 50)": (0.144201, 0.103131, 0.134931, 0.0966024),
    "PEDESTRIAN [50, +inf)": (0.0985548, 0.0779858, 0.0960544, 0.075891),
    "SIGN [0, 30)": (0.106175, 0.0716929, 0.0651952, 0.0439717),
    "SIGN [30, 50)": (0.15528, 0.117763, 0.13587, 0.103042),
    "SIGN [50, +inf)": (0.075276, 0.0507518, 0.0596342, 0.040206),
    "CYCLIST [0, 30)": (0, 0, 0, 0),
    "CYCLIST [30, 50)": (0, 0, 0, 0),
    "CYCLIST [50, +inf)": (0, 0, 0, 0),
}
FRAME = ("segment", 1000)
LOST = [8, 59, 166, 267, 410, 557, 647, 702, 720, 769, 780, 825, 970]


def boxes(*x, length=4.0, yaw=0.0):
    """Vehicles in a row, at these x."""
    return np.array([[at, 0, 1, length, 2, 1.5, yaw] for at in x]).reshape(-1, 7)


def vehicles(box, **columns):
    """Of one frame; of labels with 100 points each."""
    return make_objects([FRAME], np.zeros(len(box)), 1, box, **({"points": 100} | columns))


def flat(figures):
    """(mAP, mAPH of LEVEL_1, then of LEVEL_2)."""
    return tuple(figures[level][key] for level in eval_waymo.LEVELS for key in ("mAP", "mAPH"))


def vehicle_figures(predictions, truths):
    return eval_waymo.evaluate(predictions, truths)["VEHICLE"]


# -----------------------------------------------------------------------------
# figures


@needs_waymo
def test_figures_are_those_of_waymos_tool():
    predictions, truths = (
        eval_waymo.read_objects(Path(WAYMO) / f"fake_{name}.bin") for name in ("predictions", "ground_truths")
    )
    assert (len(predictions), len(truths)) == (2263, 1010)
    assert eval_waymo.check_frames(predictions, truths, "x") is None
    found = eval_waymo.evaluate(predictions, truths)
    for name, figures in OFFICIAL.items():
        kind, _, distance = name.partition(" ")
        ours = found[kind][distance] if distance else found[kind]
        assert flat(ours) == pytest.approx(figures, abs=1e-6), name
    mean = np.mean([OFFICIAL[name] for name in eval_waymo.MEAN], 0)
    assert flat(found["ALL_NS"]) == pytest.approx(tuple(mean), abs=1e-6)
    lines = eval_waymo.table(found)
    assert "301    20.54    16.05" in lines[3] and lines[3].split()[0] == "VEHICLE"


def plain_counts(predictions, truths, cutoff, level):
    """TP, FP, FN and the sum of heading accuracies of vehicles at one cutoff: every way to match, tried one by one."""
    right = wrong = missed = turned = 0
    for frame in range(len(truths.frames)):
        p = predictions[(predictions.frame == frame) & (predictions.score >= np.float32(cutoff))]
        t = truths[truths.frame == frame]
        overlap = ops_boxes.pairwise(ops_boxes.iou_3d, p.box, t.box)
        overlap[overlap < 0.7] = 0
        small, large = sorted(overlap.shape)
        table = overlap if overlap.shape[0] <= overlap.shape[1] else overlap.T
        ways = itertools.permutations(range(large), small)
        best = max(ways, key=lambda way: table[np.arange(small), way].sum()) if small else ()
        pairs = [(i, j) for i, j in enumerate(best) if table[i, j] > 0]
        pairs = pairs if table is overlap else [(i, j) for j, i in pairs]
        right += len(pairs)
        wrong += sum(not p.no_label[i] for i in set(range(len(p))) - {i for i, _ in pairs})
        missed += sum(t.level[j] <= level for j in set(range(len(t))) - {j for _, j in pairs})
        for i, j in pairs:
            off = abs(p.box[i, 6] - t.box[j, 6]) % (2 * np.pi)
            turned += 1 - min(off, 2 * np.pi - off) / np.pi
    return right, wrong, missed, turned


def plain_area(precision, recall):
    """The integral of the best precision at this recall or higher, cut into steps as Waymo's tool does."""
    points = sorted({*recall, 0.0})
    best = lambda r: max(p for p, q in zip([1.0, *precision], [0.0, *recall]) if q >= r)
    area = 0.0
    for low, high in itertools.pairwise(points):
        steps = int(np.floor((high - low) / 0.05 - 2e-5))
        flat_part = 0.05 * steps  # precision stays that of the higher recall
        end = best(high) if low == 0 else best(low)
        area += flat_part * best(high) + (high - low - flat_part) * (best(high) + end) / 2
    return area


@pytest.mark.parametrize("seed", range(4))
def test_matching_is_the_best_of_all_ways(seed):
    """Crowded small frames, where a prediction overlaps several labels and a label several predictions."""
    rng = np.random.default_rng(seed)
    frames = [("segment", i) for i in range(6)]
    t_frame = rng.integers(0, 6, 18)
    t_box = boxes(*rng.uniform(0, 2.0, 18))
    t_box[:, 6] = rng.normal(0, 0.03, 18)
    truths = make_objects(frames, t_frame, 1, t_box, points=rng.integers(1, 12, 18))
    truths.level = rng.integers(1, 3, 18)
    which = rng.integers(0, 18, 24)
    p_box = t_box[which] + rng.normal(0, 0.25, (24, 7)) * [1, 0.2, 0.2, 0.3, 0.1, 0.1, 0.1]
    p_box[:, 6] += np.pi * rng.integers(0, 2, 24)
    p_frame = np.where(rng.random(24) < 0.7, t_frame[which], rng.integers(0, 6, 24))
    scores = rng.integers(0, 8, 24) / 8 + 0.003
    predictions = make_objects(frames, p_frame, 1, p_box, scores, no_label=rng.random(24) < 0.3)
    assert max(np.bincount(p_frame)) <= 8
    found = vehicle_figures(predictions, truths)
    for level, name in enumerate(eval_waymo.LEVELS, 1):
        steps = np.unique(predictions.score)  # nothing changes between two scores
        counts = np.array([plain_counts(predictions, truths, s, level) for s in [*steps, 2]])
        right, wrong, missed, turned = counts[np.searchsorted(steps, eval_waymo.CUTOFFS)].T
        assert right.max() > 9 and wrong.max() > 2 and missed.max() > 3
        recall = right / np.maximum(right + missed, 1)
        for key, hits in (("mAP", right), ("mAPH", turned)):
            precision = np.where(recall == 0, 1, hits / np.maximum(right + wrong, 1))
            assert found[name][key] == pytest.approx(plain_area(precision, recall), abs=1e-9), (name, key)


def test_the_sum_of_overlaps_counts_and_not_the_best_pair():
    """The middle box fits the first label best, but both labels are found only if it leaves that to its neighbour."""
    truths = vehicles(boxes(0, 0.5))
    predictions = vehicles(boxes(0.1, -0.5), score=[0.9, 0.9])
    overlap = ops_boxes.pairwise(ops_boxes.iou_3d, predictions.box, truths.box)
    assert overlap[0, 0] > overlap[0, 1] > 0.7 and overlap[1, 0] > 0.7 > overlap[1, 1]
    assert flat(vehicle_figures(predictions, truths)) == (1, 1, 1, 1)


def test_a_label_is_found_by_the_best_of_those_that_take_part():
    """Of four predictions for it, the best has it up to its score, the second best from there on to its own."""
    truths = vehicles(boxes(0))
    predictions = vehicles(boxes(0.05, 0.1, 0.2, 0.3), score=[0.305, 0.205, 0.605, 0.405])
    pairs = eval_waymo.overlapping_pairs(predictions, truths, predictions.frame, truths.frame)
    assert len(pairs[0]) == 4
    found = eval_waymo.match(*pairs, eval_waymo.count_cutoffs(predictions.score)[pairs[0]])
    assert sorted(zip(*(column.tolist() for column in found))) == [(0, 0, 0, 31), (2, 0, 31, 61)]


def test_heading_counts_in_maph_alone():
    for turn in (0, 0.5, np.pi / 2, np.pi, -3, 2 * np.pi + 0.5):
        square = np.array([[10, 5, 1, 2, 2, 2, 1.0]])
        turned = square + [0, 0, 0, 0, 0, 0, turn]
        accuracy = eval_waymo.heading_accuracy(turned[:, 6], square[:, 6])[0]
        wrapped = abs((turn + np.pi) % (2 * np.pi) - np.pi)
        assert accuracy == pytest.approx(1 - wrapped / np.pi)
    truths, predictions = vehicles(boxes(0, 20, 40)), vehicles(boxes(0, 20, 40, yaw=0.1), score=0.5)
    figures = vehicle_figures(predictions, truths)
    assert figures["LEVEL_1"]["mAP"] == 1 and figures["LEVEL_1"]["mAPH"] == pytest.approx(1 - 0.1 / np.pi)


def test_levels():
    """By annotation, else by points; no points, no label; a hit on a label of LEVEL_2 is a hit in LEVEL_1."""
    counted = lambda points, level: [
        vehicle_figures(vehicles(boxes()), vehicles(boxes(0), points=points, level=level))[name]["n"]
        for name in eval_waymo.LEVELS
    ]
    assert counted(6, 0) == [1, 1] and counted(5, 0) == [0, 1] and counted(0, 0) == [0, 0]
    assert counted(100, 2) == [0, 1] and counted(1, 1) == [1, 1] and counted(0, 1) == [0, 0]
    truths = vehicles(boxes(0, 20), points=[100, 3])
    figures = vehicle_figures(vehicles(boxes(20), score=0.5), truths)
    assert flat(figures)[::2] == (0.5, 0.5)  # one right, one missed at both levels
    assert flat(vehicle_figures(vehicles(boxes(0), score=0.5), truths))[::2] == (1, 0.5)


def test_no_label_zones_excuse_what_is_wrong():
    truths = vehicles(boxes(0, 20))
    aps = []
    for excused in ([False, False], [False, True], [True, False]):
        predictions = vehicles(boxes(0, 60), score=[0.5, 0.9], no_label=excused)
        aps.append(vehicle_figures(predictions, truths)["LEVEL_1"]["mAP"])
    assert aps == pytest.approx([0.25, 0.5, 0.25])  # a zone takes nothing from what is right


def test_scores_count_at_every_hundredth():
    truths = vehicles(boxes(0, 20))
    apart = vehicles(boxes(0, 60, 20), score=[0.915, 0.912, 0.5])
    beside = vehicles(boxes(0, 60, 20), score=[0.915, 0.905, 0.5])
    first, second = (vehicle_figures(p, truths)["LEVEL_1"]["mAP"] for p in (apart, beside))
    assert first < second  # .912 takes part wherever .915 does
    on_it = vehicles(boxes(0, 60), score=[0.5, 0.495])
    assert vehicle_figures(on_it, truths)["LEVEL_1"]["mAP"] == 0.5  # a score of .5 takes part at .5, alone
    assert vehicle_figures(vehicles(boxes(0, 20), score=1.0), truths)["LEVEL_1"]["mAP"] == 1


def test_types_and_ranges_are_apart():
    """A pedestrian's label is nothing to a vehicle; a box at 30.1 m is nothing to a label at 29.9 m in the ranges."""
    truths = vehicles(boxes(29.9))
    predictions = vehicles(boxes(30.1), score=0.5)
    figures = vehicle_figures(predictions, truths)
    assert figures["LEVEL_1"] == {"mAP": 1, "mAPH": 1, "n": 1}
    near, far = figures["[0, 30)"]["LEVEL_1"], figures["[30, 50)"]["LEVEL_1"]
    assert near == {"mAP": 0, "mAPH": 0, "n": 1} and far == {"mAP": 0, "mAPH": 0, "n": 0}
    predictions.type[:] = 2
    found = eval_waymo.evaluate(predictions, truths)
    assert found["VEHICLE"]["LEVEL_1"]["mAP"] == 0 == found["PEDESTRIAN"]["LEVEL_1"]["mAP"]
    assert found["ALL_NS"]["LEVEL_1"]["n"] == 1
    lower = boxes(29.9) + [0, 0, 0.5, 0, 0, 0, 0]  # half a metre of 1.5: a pedestrian's half is not a vehicle's .7
    for kind, ap in ((1, 0), (2, 1), (3, 1), (4, 1)):
        truths.type[:] = kind
        found = eval_waymo.evaluate(make_objects([FRAME], [0], kind, lower), truths)
        assert found[eval_waymo.TYPES[kind]]["LEVEL_2"]["mAP"] == ap


def test_frames_that_one_side_lacks_count():
    truths = make_objects([("a", 1), ("a", 2)], [0, 1], 1, boxes(0, 0), points=9)
    predictions = make_objects([("a", 1), ("a", 3)], [0, 1], 1, boxes(0, 0), score=0.5)
    found = vehicle_figures(predictions, truths)
    assert found["LEVEL_1"]["mAP"] == pytest.approx(0.25)
    note = eval_waymo.check_frames(predictions, truths, "p.bin")
    assert note.startswith("note: p.bin: 1 frames have predictions and no label") and "1 frames have labels" in note
    nothing = predictions[np.zeros(2, bool)]
    assert vehicle_figures(nothing, truths)["LEVEL_1"] == {"mAP": 0, "mAPH": 0, "n": 2}
    assert vehicle_figures(predictions, truths[np.zeros(2, bool)])["LEVEL_1"]["mAP"] == 0
    assert eval_waymo.evaluate(nothing, nothing)["ALL_NS"]["LEVEL_1"] == {"mAP": 0, "mAPH": 0, "n": 0}


def test_a_half_turn_is_lost_where_waymos_tool_loses_it():
    """What its math/polygon2d.cc, compiled by g++ -O2 for x86-64, said of these thousand pairs: of LOST, that they do
    not meet, and of the others, that they are the same."""
    rng = np.random.default_rng(5)
    places = rng.uniform(-70, 70, (1000, 2))
    length, width, yaw = (rng.uniform(low, high, 1000) for low, high in ((0.3, 10), (0.3, 3), (-3, 0)))
    ones = np.ones(1000)
    found = np.column_stack([places, ones, length, width, ones, yaw])
    turned = found + [0, 0, 0, 0, 0, 0, np.pi]
    assert [i for i in range(1000) if eval_waymo.is_lost(found[i], turned[i])] == LOST
    some = np.array([*LOST, 0, 1])
    frames = [("segment", i) for i in some]
    columns = np.arange(len(some)), np.ones(len(some))
    truths = make_objects(frames, *columns, turned[some], points=9)
    figures = vehicle_figures(make_objects(frames, *columns, found[some]), truths)
    assert figures["LEVEL_1"]["mAP"] == pytest.approx((2 / len(some)) ** 2)
    assert vehicle_figures(truths, truths)["LEVEL_1"]["mAP"] == 1


def test_published_figures_stand_beside_all_of_validation_alone(monkeypatch):
    monkeypatch.setattr(eval_waymo, "VAL_SEGMENTS", data.fingerprint(["a", "b"]))
    monkeypatch.setattr(eval_waymo, "VAL_FRAMES", 3)
    frames = [("b", 1), ("a", 1), ("a", 2), ("a", 3)]
    assert eval_waymo.is_standard(frames)
    assert not eval_waymo.is_standard(frames[:3] + frames[:1]) and not eval_waymo.is_standard([*frames, ("c", 1)])
    assert not eval_waymo.is_standard([("a", i) for i in range(9)])
    found = eval_waymo.evaluate(vehicles(boxes(0), score=0.5), vehicles(boxes(0)))
    lines = eval_waymo.table(found, published=True)
    assert lines[-4].split() == "SECOND, no image: VEHICLE - 67.10 66.60 - 58.70 58.20".split()
    assert len({len(line) for line in lines[3:]}) == 1 and len(lines) == len(eval_waymo.table(found)) + 4


def test_a_box_that_two_cameras_see_is_taken_once():
    """The better one; at the same moment, of the same type, above the overlap alone."""
    moment, later = [FRAME], [("segment", 2000)]
    left = make_objects(moment, [0, 0], [1, 2], boxes(0, 20), score=[0.6, 0.5])
    right = make_objects(moment, [0, 0, 0], [1, 1, 1], boxes(0.5, 3.5, 20), score=[0.7, 0.4, 0.3])
    then = make_objects(later, [0, 0], 1, boxes(0, 0.5), score=0.2)
    found = eval_waymo.join_detections([left, right, then], 0.25)
    assert (
        found.score.tolist() == np.float32([0.5, 0.7, 0.4, 0.3, 0.2, 0.2]).tolist() and found.frames == moment + later
    )


# -----------------------------------------------------------------------------
# files


def some_objects():
    rng = np.random.default_rng(0)
    frames = [("a_segment", 1558017621622379), ("another", 2)]
    box = rng.normal(0, 30, (5, 7))
    box[:, 3:6] = abs(box[:, 3:6])
    columns = {"score": rng.random(5), "points": [0, 1, 300, 70000, 5], "level": [0, 1, 2, 0, 0]}
    columns |= {"no_label": [0, 1, 0, 0, 1], "id": ["", "x", "long name of an object", "ü", ""]}
    return make_objects(frames, [0, 0, 1, 0, 1], [0, 1, 2, 3, 4], box, **columns)


def same(a, b):
    return a.frames == b.frames and all((getattr(a, n) == getattr(b, n)).all() for n in eval_waymo.COLUMNS)


def test_a_file_is_read_as_it_was_written(tmp_path):
    objects, path = some_objects(), tmp_path / "objects.bin"
    eval_waymo.write_objects(path, objects)
    assert same(eval_waymo.read_objects(path), objects)
    assert [p.name for p in tmp_path.iterdir()] == ["objects.bin"]
    path.write_bytes(path.read_bytes() * 2)  # end to end they are one file
    assert len(eval_waymo.read_objects(path)) == 10


def test_bytes_are_those_of_the_schema():
    """Field numbers of label.proto and metrics.proto, written out."""
    objects = make_objects([("ab", 300)], [0], 2, [[1, 2, 3, 4, 5, 6, 0.5]], 0.25, 7, 1, True, "i")
    numbers = {1: 1, 2: 2, 3: 3, 4: 5, 5: 4, 6: 6, 7: 0.5}  # width before length
    box = b"".join(bytes([n << 3 | 1]) + struct.pack("<d", x) for n, x in numbers.items())
    label = b"\x0a\x3f" + box + b"\x18\x02" + b"\x22\x01i" + b"\x28\x01" + b"\x38\x07"
    outer = bytes([10, len(label)]) + label + b"\x15" + struct.pack("<f", 0.25) + b"\x18\x01\x22\x02ab\x28\xac\x02"
    assert eval_waymo.pack_objects(objects) == bytes([10, len(outer)]) + outer


@needs_waymo
def test_waymos_own_files_survive_being_written(tmp_path):
    objects = eval_waymo.read_objects(Path(WAYMO) / "fake_predictions.bin")
    eval_waymo.write_objects(tmp_path / "x.bin", objects)
    assert same(eval_waymo.read_objects(tmp_path / "x.bin"), objects)


def test_unknown_fields_are_passed_over(tmp_path):
    """A speed (a message), a tracking level, and the no-label zones of the whole file."""
    objects, path = some_objects()[[1]], tmp_path / "x.bin"
    path.write_bytes(b"\x12\x02\x12\x00" + eval_waymo.pack_objects(objects))
    assert len(eval_waymo.read_objects(path)) == 1


def test_labels_of_neighbouring_cameras_are_taken_once():
    a, b = some_objects(), some_objects()
    b.frames = [("a_segment", 1558017621622379), ("third", 3)]
    joined = eval_waymo.join_objects([a, b])
    assert joined.frames == [*a.frames, ("third", 3)] and len(joined) == 5 + 3  # those without an id stay twice
    assert joined.frame.tolist() == [0, 0, 1, 0, 1, 0, 2, 2]


def spoiled(column, row, value):
    objects = some_objects()
    getattr(objects, column)[row] = value
    return objects


@pytest.mark.parametrize(
    "objects, says",
    [
        (spoiled("box", (2, 0), np.nan), "object 2 (frame another 2): its box is NaN"),
        (spoiled("box", (1, 6), np.inf), "object 1 (frame a_segment 1558017621622379): its box is NaN or infinite"),
        (spoiled("box", (3, 4), -0.1), "its length, width or height is negative"),
        (spoiled("score", 0, np.nan), "its score is not within [0, 1]"),
        (spoiled("score", 4, 1.5), "its score is not within [0, 1] (1 such)"),
        (spoiled("type", 4, 5), "its type is not one of UNKNOWN, VEHICLE"),
        (spoiled("type", 4, -1), "its type is not one of UNKNOWN, VEHICLE"),
        (spoiled("level", 1, 3), "its difficulty"),
    ],
)
def test_wrong_numbers_are_one_line(objects, says, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(eval_waymo.pack_objects(objects))
    with pytest.raises(BadInput) as e:
        eval_waymo.read_objects(path)
    assert str(e.value).startswith(f"{path}: object ") and says in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(BadInput):
        eval_waymo.write_objects(tmp_path / "y.bin", objects)
    assert not (tmp_path / "y.bin").exists()


@pytest.mark.parametrize("cut", [1, 5, 40, 100])
def test_a_cut_file_is_one_line(cut, tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(eval_waymo.pack_objects(some_objects())[:-cut])
    with pytest.raises(BadInput, match="not a file of waymo.open_dataset.Objects"):
        eval_waymo.read_objects(path)


def test_no_file_of_objects_is_one_line(tmp_path):
    for i, content in enumerate(
        (b"Car 0.00 0 1.85 387.63", b"\x89PNG\r\n\x1a\n", b"\x0a\x00", b"\x0a\x02\x0a\x00", b"\xff" * 40)
    ):
        path = tmp_path / f"{i}.bin"
        path.write_bytes(content)
        with pytest.raises(BadInput, match=f"{i}.bin: not a file of waymo.open_dataset.Objects"):
            eval_waymo.read_objects(path)
    with pytest.raises(BadInput, match="missing.bin: not readable"):
        eval_waymo.read_objects(tmp_path / "missing.bin")


def test_predictions_of_unknown_segments_are_one_line():
    truths, predictions = some_objects(), some_objects()
    predictions.frames = [("a_segment", 7), ("elsewhere", 9)]
    with pytest.raises(BadInput) as e:
        eval_waymo.check_frames(predictions, truths, "p.bin")
    assert str(e.value) == "p.bin: 2 of its 2 frames are of segments without labels; a_segment 7 is the first"
