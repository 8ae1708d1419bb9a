"""nuScenes' detection metric: the devkit's own figures, a plain loop of its rules, cases made by hand, bad input."""

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation
from test_data_nuscenes import made_up, real, write_root  # noqa: F401 (fixtures)

import data_nuscenes
import eval_nuscenes
from data_nuscenes import ATTRIBUTES, CLASSES
from eval_nuscenes import RANGES, evaluate
from files import BadInput

ERRORS = list(eval_nuscenes.ERRORS)
BIKES = ("bicycle", "motorcycle")


def figures_of(tree, path=""):
    """{path: number} of nested dicts, less the time that it took."""
    if not isinstance(tree, dict):
        return {path: tree}
    found = {}
    for key, value in tree.items():
        if key not in ("eval_time", "cfg"):
            found |= figures_of(value, f"{path}/{key}")
    return found


def assert_same(found, expected, tolerance):
    found, expected = figures_of(found), figures_of(expected)
    assert list(found) == list(expected)
    np.testing.assert_allclose([*found.values()], [*expected.values()], rtol=0, atol=tolerance)


# -----------------------------------------------------------------------------
# the devkit's figures


def test_figures_are_the_devkits(real, tmp_path):  # noqa: F811
    """Real detections of real frames, and what the devkit prints for them."""
    truth = eval_nuscenes.read_truth(real, ["mini_val"])
    found = eval_nuscenes.read_results(real / "detections_mini_val.json", truth)
    figures = evaluate(found, truth)
    expected = json.loads((real / "devkit_metrics_for_detections_mini_val.json").read_text())
    assert len(figures_of(expected)) == 40 + 10 + 1 + 50 + 5 + 5 + 1
    assert_same(figures, expected, 1e-6)
    assert figures["mean_ap"] == pytest.approx(0.218308, abs=1e-6)
    assert figures["nd_score"] == pytest.approx(0.268795, abs=1e-6)
    eval_nuscenes.write_figures(tmp_path / "figures.json", figures)
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written.keys() == expected.keys() and written["cfg"] == expected["cfg"]
    assert_same(written, expected, 1e-6)
    eval_nuscenes.write_results(tmp_path / "again.json", found, truth)
    again = eval_nuscenes.read_results(tmp_path / "again.json", truth)
    assert_same(evaluate(again, truth), expected, 1e-6)
    lines = eval_nuscenes.table(figures, truth, published=True)
    assert "on 81 samples, mini_val of v1.0-mini: mAP 21.83, NDS 26.88" in lines[0]
    car = next(line for line in lines if line.split()[:1] == ["car"])
    assert car.split() == "car 1913 12.89 30.66 53.79 69.45 41.70 0.560 0.161 0.142 0.605 0.172".split()
    cone = next(line for line in lines if line.split()[:1] == ["traffic_cone"])
    assert cone.split()[-3:] == ["-", "-", "-"] and lines[-1].split()[-2:] == ["28.36", "35.36"]


# -----------------------------------------------------------------------------
# a plain loop of the rules


def plain(found, truth):
    """The rules as the devkit's documents and code have them, box by box."""
    kept = [], []
    for boxes, out in ((found, kept[0]), (truth, kept[1])):
        for i in range(len(boxes.kind)):
            if plain_counts(boxes, i, truth):
                out.append(i)
    aps, errors = {}, {}
    for name in RANGES:
        own = [[i for i in some if CLASSES[boxes.kind[i]] == name] for some, boxes in zip(kept, (found, truth))]
        aps[name] = {}
        for distance in (0.5, 1.0, 2.0, 4.0):
            aps[name][str(distance)], at = plain_class(found, truth, *own, name, distance)
            if distance == 2.0:
                errors[name] = at
        if name in ("traffic_cone", "barrier"):
            errors[name] |= {"vel_err": math.nan, "attr_err": math.nan}
        if name == "traffic_cone":
            errors[name]["orient_err"] = math.nan
    means = {name: sum(values.values()) / 4 for name, values in aps.items()}
    mean = sum(means.values()) / 10
    totals = {}
    for key in ERRORS:
        known = [values[key] for values in errors.values() if not math.isnan(values[key])]
        totals[key] = sum(known) / len(known)
    scores = {key: max(0.0, 1 - value) for key, value in totals.items()}
    return {
        "label_aps": aps,
        "mean_dist_aps": means,
        "mean_ap": mean,
        "label_tp_errors": errors,
        "tp_errors": totals,
        "tp_scores": scores,
        "nd_score": (5 * mean + sum(scores.values())) / 10,
    }


def plain_counts(boxes, i, truth):
    name, s = CLASSES[boxes.kind[i]], boxes.sample[i]
    x, y = boxes.translation[i][:2] - truth.ego[s][:2]
    if not math.sqrt(x * x + y * y) < RANGES[name]:
        return False
    if boxes is truth and truth.points[i] == 0:
        return False
    racks = truth.racks
    for r in range(len(racks.sample)):
        if racks.sample[r] == s and name in BIKES:
            turn = Rotation.from_quat(np.roll(racks.rotation[r], -1)).as_matrix()
            along, across, up = (boxes.translation[i] - racks.translation[r]) @ turn
            width, length, height = racks.size[r]
            if abs(along) <= length / 2 and abs(across) <= width / 2 and abs(up) <= height / 2:
                return False
    return True


def plain_class(found, truth, found_rows, truth_rows, name, distance):
    nothing = 0.0, dict.fromkeys(ERRORS, 1.0)
    ordered = [i for _, i in sorted((found.score[i], i) for i in found_rows)][::-1]
    taken, hits, pairs = set(), [], []
    for i in ordered:
        best, nearest = None, math.inf
        for j in truth_rows:
            if truth.sample[j] == found.sample[i] and j not in taken:
                x, y = found.translation[i][:2] - truth.translation[j][:2]
                away = math.sqrt(x * x + y * y)
                if away < nearest:
                    best, nearest = j, away
        hit = nearest < distance
        hits.append(hit)
        if hit:
            taken.add(best)
            pairs.append((i, best))
    if not pairs:
        return nothing
    at = np.linspace(0, 1, 101)
    total = np.cumsum(hits)
    recall, score = total / len(truth_rows), [found.score[i] for i in ordered]
    precision = np.interp(at, recall, total / np.arange(1, len(hits) + 1), right=0)
    confidence = np.interp(at, recall, score, right=0)
    ap = sum(max(p - 0.1, 0) for p in precision[11:]) / 90 / 0.9
    last = max(np.flatnonzero(confidence), default=0)
    errors = {}
    for key in ERRORS:
        values = [plain_error(key, found, i, truth, j, name) for i, j in pairs]
        if last < 11 or all(map(math.isnan, values)):
            errors[key] = 1.0
            continue
        means = []
        for n in range(1, len(values) + 1):
            known = [v for v in values[:n] if not math.isnan(v)]
            means.append(sum(known) / len(known) if known else 0.0)
        scores = [found.score[i] for i, _ in pairs]
        means = np.interp(confidence[::-1], scores[::-1], means[::-1])[::-1]
        errors[key] = means[11 : last + 1].mean()
    return ap, errors


def plain_error(key, found, i, truth, j, name):
    if key == "trans_err":
        return math.dist(found.translation[i][:2], truth.translation[j][:2])
    if key == "vel_err":
        return math.dist(found.velocity[i], truth.velocity[j])
    if key == "scale_err":
        shared = math.prod(min(a, b) for a, b in zip(found.size[i], truth.size[j]))
        return 1 - shared / (math.prod(found.size[i]) + math.prod(truth.size[j]) - shared)
    if key == "attr_err":
        return math.nan if truth.attribute[j] < 0 else float(found.attribute[i] != truth.attribute[j])
    yaws = [Rotation.from_quat(np.roll(b.rotation[k], -1)).as_matrix()[:2, 0] for b, k in ((found, i), (truth, j))]
    turn = math.degrees(math.atan2(yaws[0][1], yaws[0][0]) - math.atan2(yaws[1][1], yaws[1][0])) % 360
    turn = min(turn, 360 - turn)
    return math.radians(min(turn, 180 - turn) if name == "barrier" else turn)


def random_boxes(rng, n, samples, kinds):
    """On a grid of quarter metres, with scores of one digit: of each there are many that are equal."""
    half, zero = rng.uniform(-np.pi, np.pi, n) / 2, np.zeros(n)
    return SimpleNamespace(
        sample=rng.integers(0, samples, n),
        kind=rng.choice(kinds, n),
        translation=rng.integers(-240, 240, (n, 3)) * [0.25, 0.03125, 0] + [100, 50, 1],
        size=rng.uniform(0.5, 4, (n, 3)),
        rotation=np.stack([np.cos(half), zero, zero, np.sin(half)], 1),
        velocity=rng.normal(0, 1, (n, 2)),
        attribute=rng.integers(-1, 3, n),
        score=rng.integers(1, 10, n) / 10,
    )


def random_case(seed):
    rng = np.random.default_rng(seed)
    kinds = rng.choice(10, 6, replace=False)  # four classes have no label
    truth = random_boxes(rng, 300, 4, kinds)
    truth.velocity[rng.random(300) < 0.3] = np.nan
    truth.points = rng.integers(0, 4, 300)
    truth.tokens, truth.ego, truth.where = list("abcd"), np.tile([100.0, 50.0, 0.0], (4, 1)), "four"
    truth.racks = random_boxes(rng, 6, 4, [0])
    truth.racks.size = rng.uniform(5, 30, (6, 3))
    found = random_boxes(rng, 500, 4, [*kinds, rng.integers(0, 10)])
    near = rng.integers(0, 300, 400)  # most are near a label
    for key in ("sample", "kind", "translation"):
        getattr(found, key)[:400] = getattr(truth, key)[near]
    found.translation[:400, :2] += rng.integers(-8, 9, (400, 2)) / 8
    return found, truth


@pytest.mark.parametrize("seed", range(6))
def test_figures_equal_a_plain_loop(seed):
    """Ties of scores and of distances, classes without labels, racks, ranges, labels without points."""
    found, truth = random_case(seed)
    figures = evaluate(found, truth)
    assert 0 < figures["mean_ap"] < 1
    assert_same(figures, plain(found, truth), 1e-12)


# -----------------------------------------------------------------------------
# by hand


def of_one_class(name, places, **changes):
    """Boxes in one sample, at places (n, 2), all alike."""
    n = len(places)
    boxes = SimpleNamespace(
        sample=np.zeros(n, np.int64),
        kind=np.full(n, CLASSES.index(name)),
        translation=np.column_stack([places, np.ones(n)]),
        size=np.tile([2.0, 4.0, 1.5], (n, 1)),
        rotation=np.tile([1.0, 0, 0, 0], (n, 1)),
        velocity=np.zeros((n, 2)),
        attribute=np.full(n, -1),
        score=np.linspace(0.9, 0.1, n),
        points=np.ones(n, np.int64),
    )
    vars(boxes).update(changes)
    return boxes


def as_truth(boxes, racks=()):
    racks = np.array(racks, np.float64).reshape(-1, 6)
    turn = np.tile([1.0, 0, 0, 0], (len(racks), 1))
    sample = np.zeros(len(racks), np.int64)
    boxes.racks = SimpleNamespace(sample=sample, translation=racks[:, :3], size=racks[:, 3:], rotation=turn)
    boxes.tokens, boxes.ego, boxes.where = ["a"], np.zeros((1, 3)), "one"
    return boxes


GRID = np.stack(np.meshgrid(range(-20, 21, 5), range(-20, 21, 5)), -1).reshape(-1, 2).astype(float)


def test_labels_as_detections():
    truth = as_truth(of_one_class("car", GRID, attribute=np.arange(81) % 3 + 5))
    figures = evaluate(truth, truth)
    assert figures["label_aps"]["car"] == pytest.approx(dict.fromkeys(["0.5", "1.0", "2.0", "4.0"], 1.0))
    assert figures["label_tp_errors"]["car"] == dict.fromkeys(ERRORS, 0)
    assert figures["mean_ap"] == pytest.approx(0.1)
    assert figures["label_tp_errors"]["truck"] == dict.fromkeys(ERRORS, 1)
    errors = figures["label_tp_errors"]["barrier"]
    assert np.isnan([errors["vel_err"], errors["attr_err"]]).all() and errors["orient_err"] == 1


@pytest.mark.parametrize(("name", "expected"), [("barrier", 0), ("car", np.pi), ("traffic_cone", np.nan)])
def test_a_barrier_has_no_front(name, expected):
    truth, back = as_truth(of_one_class(name, GRID)), np.tile([0.0, 0, 0, 1], (81, 1))
    error = evaluate(of_one_class(name, GRID, rotation=back), truth)["label_tp_errors"][name]["orient_err"]
    assert error == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_a_distance_that_is_the_limit_is_too_far():
    truth = as_truth(of_one_class("car", GRID))
    aps = evaluate(of_one_class("car", GRID + [0.5, 0]), truth)["label_aps"]["car"]
    assert aps["0.5"] == 0 and aps["1.0"] == pytest.approx(1)


@pytest.mark.parametrize(("name", "metres"), RANGES.items())
def test_each_class_has_its_range(name, metres):
    truth = as_truth(of_one_class(name, np.array([[metres - 0.01, 0], [metres, 0], [0, metres + 0.01]])))
    assert eval_nuscenes._counts(truth, truth, truth.points).tolist() == [True, False, False]


def test_bikes_in_racks_are_not_counted():
    places = np.array([[10.0, 0.9], [10.0, 1.1], [13.9, 0.0]])
    for name, expected in (("bicycle", [False, True, True]), ("motorcycle", [False, True, True]), ("car", [True] * 3)):
        truth = as_truth(of_one_class(name, places), racks=[[10, 0, 1, 2, 4, 3], [40, 0, 1, 2, 4, 3]])
        assert eval_nuscenes._counts(truth, truth, truth.points).tolist() == expected


def test_no_velocity_or_attribute_is_not_judged():
    """A label that lacks it does not count; if all lack it, the error is 1."""
    velocity = np.full((81, 2), np.nan)
    truth = as_truth(of_one_class("car", GRID, velocity=velocity))
    found = of_one_class("car", GRID, velocity=np.full((81, 2), 3.0), attribute=np.full(81, 5))
    errors = evaluate(found, truth)["label_tp_errors"]["car"]
    assert errors["vel_err"] == 1 and errors["attr_err"] == 1
    truth.velocity[40:], truth.attribute[40:] = 0, 5
    errors = evaluate(found, truth)["label_tp_errors"]["car"]
    assert errors["attr_err"] == 0
    assert 0 < errors["vel_err"] < np.hypot(3, 3)  # before the first that is known the mean is 0, as the devkit's


def test_of_equal_scores_the_last_comes_first():
    """Two detections of one object: the second is right, and with it the attribute."""
    truth = as_truth(of_one_class("car", np.array([[10.0, 0]]), attribute=np.array([5])))
    found = of_one_class("car", np.array([[10.0, 0], [10.0, 0.25]]), attribute=np.array([5, 6]), score=np.ones(2))
    assert evaluate(found, truth)["label_tp_errors"]["car"]["trans_err"] == pytest.approx(0.25)


def test_few_found_is_no_error_to_speak_of():
    """Below a recall of a tenth, errors are 1 and AP is 0."""
    truth = as_truth(of_one_class("car", GRID))
    figures = evaluate(of_one_class("car", GRID[:8]), truth)
    assert figures["label_tp_errors"]["car"] == dict.fromkeys(ERRORS, 1) and figures["mean_ap"] == 0
    assert evaluate(of_one_class("car", GRID[:0]), truth)["nd_score"] == 0
    assert evaluate(of_one_class("car", GRID[:12]), truth)["label_tp_errors"]["car"] == dict.fromkeys(ERRORS[:4], 0) | {
        "attr_err": 1
    }


# -----------------------------------------------------------------------------
# tables and files


@pytest.fixture
def truth(made_up):  # noqa: F811
    return eval_nuscenes.read_truth(made_up, ["mini_train"])


def test_truth_is_read_from_the_tables(truth):
    assert truth.tokens == [f"sample scene-0061 {i}" for i in range(5)] and truth.where == "mini_train of v1.0-mini"
    assert [CLASSES[k] for k in truth.kind[:3]] == ["car", "pedestrian", "bicycle"] and len(truth.kind) == 15
    assert truth.sample.tolist() == np.repeat(range(5), 3).tolist() and truth.points[-1] == 7 + 4 + 1
    assert len(truth.racks.sample) == 5
    counts = eval_nuscenes._counts(truth, truth, truth.points)
    assert counts.tolist() == [True, True, False] * 5  # the bicycle stands in the rack
    figures = evaluate(*[SimpleNamespace(**vars(truth), score=np.ones(15)), truth])
    assert figures["mean_ap"] == pytest.approx(0.2)
    assert figures["label_tp_errors"]["car"] == dict.fromkeys(ERRORS, 0)


def test_a_network_s_boxes_come_back_as_they_were(made_up, truth, tmp_path):  # noqa: F811
    """Labels of frames, through to_global, collect, the file and back, are right by all figures."""
    parts, seen = [], set()
    for frame in data_nuscenes.find_frames([made_up], ["mini_train"]):
        if frame.token not in seen:
            seen.add(frame.token)
            labels = frame.labels()
            boxes = data_nuscenes.to_global(labels.boxes, np.nan_to_num(labels.velocity), frame.lidar2global())
            boxes.kind, boxes.attribute, boxes.score = labels.kind, labels.attribute, np.linspace(0.9, 0.5, 3)
            parts.append((frame.token, boxes))
    eval_nuscenes.write_results(tmp_path / "results.json", eval_nuscenes.collect(parts, truth), truth)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["meta"] == dict.fromkeys(eval_nuscenes.META, False) | {"use_camera": True}
    figures = evaluate(eval_nuscenes.read_results(tmp_path / "results.json", truth), truth)
    for name in ("car", "pedestrian"):
        assert figures["mean_dist_aps"][name] == pytest.approx(1)
        assert max(figures["label_tp_errors"][name].values()) < 1e-6


def test_nothing_found(truth, tmp_path):
    """Empty lists are results: AP 0, errors 1. And figures of what labels know alone have no NDS."""
    nothing = {"meta": {"use_camera": True}, "results": {token: [] for token in truth.tokens}}
    (tmp_path / "a.json").write_text(json.dumps(nothing))
    found = eval_nuscenes.read_results(tmp_path / "a.json", truth)
    eval_nuscenes.write_results(tmp_path / "b.json", found, truth)
    assert json.loads((tmp_path / "b.json").read_text())["results"] == nothing["results"]
    figures = evaluate(found, truth)
    assert figures["mean_ap"] == 0 and figures["nd_score"] == 0
    few = evaluate(found, truth, ("car", "bicycle"), ("trans_err",))
    assert few["tp_errors"] == {"trans_err": 1} and list(few["label_aps"]) == ["car", "bicycle"]
    assert "nd_score" not in few and "NDS" not in eval_nuscenes.table(few, truth)[0]


@pytest.fixture
def good(truth):
    """A results file's contents, one box a sample."""
    box = {"translation": [600.0, 1600.0, 1.0], "size": [2.0, 4.0, 1.5], "rotation": [1.0, 0, 0, 0]}
    box |= {"velocity": [0.0, 0], "detection_name": "car", "detection_score": 0.5, "attribute_name": "vehicle.parked"}
    results = {token: [{"sample_token": token, **box}] for token in truth.tokens}
    return {"meta": {"use_camera": True}, "results": results}


THIRD = "sample scene-0061 3"
BAD_BOXES = [  # key, value, what is said of it
    ("translation", [1.0, 2.0], "translation must be 3 numbers"),
    ("translation", [1.0, 2.0, None], "translation must be 3 numbers"),
    ("translation", "here", "translation must be 3 numbers"),
    ("translation", [1.0, math.nan, 2.0], "translation is NaN or infinite"),
    ("size", [1.0, math.inf, 2.0], "size is NaN or infinite"),
    ("size", [1.0, 0.0, 2.0], "size must be above 0"),
    ("rotation", [0, 0, 0, 0], "rotation is 0, 0, 0, 0"),
    ("velocity", [math.nan, 0.0], "velocity is NaN or infinite"),
    ("velocity", None, "velocity must be 2 numbers"),
    ("detection_score", "high", "detection_score must be a number"),
    ("detection_score", math.nan, "score is NaN or infinite"),
    ("detection_name", "animal", "detection_name 'animal': must be of car, truck"),
    ("detection_name", ["car"], "detection_name ['car']: must be of car, truck"),
    ("attribute_name", "cycle", "attribute_name 'cycle': must be of cycle.with_rider, "),
    ("sample_token", "sample scene-0061 1", "its sample_token is another, 'sample scene-0061 1'"),
]


def complaint(path, truth):
    with pytest.raises(BadInput) as caught:
        eval_nuscenes.read_results(path, truth)
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"{path}: ")
    return said.removeprefix(f"{path}: ")


@pytest.mark.parametrize(("key", "value", "said"), BAD_BOXES)
def test_a_box_that_cannot_be_scored(truth, good, tmp_path, key, value, said):
    good["results"][THIRD].append({**good["results"][THIRD][0], key: value})
    path = tmp_path / "results.json"
    path.write_text(json.dumps(good))
    assert complaint(path, truth).startswith(f"sample {THIRD}, box 1: {said}")
    del good["results"][THIRD][1][key]
    path.write_text(json.dumps(good))
    assert complaint(path, truth) == f"sample {THIRD}, box 1: no {key}"


def test_a_file_that_is_no_results_file(truth, good, tmp_path):
    path = tmp_path / "results.json"
    assert complaint(path, truth) == "no such file"
    for text, said in (("{", "not JSON"), ("[]", "no 'meta'"), ('{"meta": {}}', "no 'results'")):
        path.write_text(text)
        assert complaint(path, truth).startswith(said)
    path.write_bytes(b"\xff\xff")
    assert complaint(path, truth).startswith("not JSON")
    path.write_text(json.dumps({"meta": {}, "results": {THIRD: 3}}))
    assert complaint(path, truth) == f"sample {THIRD}: must be a list of boxes"
    path.write_text(json.dumps(good))
    assert len(eval_nuscenes.read_results(path, truth).kind) == 5


def test_samples_are_those_of_the_split(truth, good, made_up, tmp_path):  # noqa: F811
    path = tmp_path / "results.json"
    path.write_text(json.dumps(good))
    other = eval_nuscenes.read_truth(made_up, ["mini_val"])
    assert complaint(path, other).startswith(
        "5 samples are not of mini_val of v1.0-mini, sample scene-0061 0 among them"
    )
    del good["results"][THIRD]
    path.write_text(json.dumps(good))
    assert complaint(path, truth).startswith(
        f"1 of 5 samples of mini_train of v1.0-mini are not in it, {THIRD} among them"
    )


def test_five_hundred_boxes_and_not_one_more(truth, good, tmp_path):
    path = tmp_path / "results.json"
    good["results"][THIRD] *= 500
    path.write_text(json.dumps(good))
    found = eval_nuscenes.read_results(path, truth)
    assert len(found.kind) == 504
    good["results"][THIRD] += good["results"][THIRD][:1]
    path.write_text(json.dumps(good))
    assert complaint(path, truth) == f"sample {THIRD}, box 500: a sample has at most 500 boxes"
    many = SimpleNamespace(**{k: np.repeat(v, 2, 0) for k, v in vars(found).items()})
    with pytest.raises(BadInput, match=f"not written: sample {THIRD}: a sample has at most 500 boxes"):
        eval_nuscenes.write_results(tmp_path / "other.json", many, truth)
    assert not (tmp_path / "other.json").exists()


def test_splits_that_cannot_be_judged(made_up, tmp_path):  # noqa: F811
    with pytest.raises(BadInput, match="--splits mini_val val: must be splits of one version|no folder v1.0-trainval"):
        eval_nuscenes.read_truth(made_up, ["mini_val", "val"])
    root = write_root(tmp_path / "test", {"scene-0077": 1}, "v1.0-test")
    path = root / "v1.0-test" / "sample_annotation.json"
    path.write_text("[]")
    with pytest.raises(BadInput, match=rf"{path}: no labels of --splits test"):
        eval_nuscenes.read_truth(root, ["test"])


def test_real_results_of_another_split(real):  # noqa: F811
    path = Path(os.environ["SIMIPU_NUSCENES"]) / "detections_mini_val.json"
    assert "81 samples are not of mini_train of v1.0-mini" in complaint(
        path, eval_nuscenes.read_truth(real, ["mini_train"])
    )
    assert ATTRIBUTES[5] == "vehicle.moving"
