"""Detected boxes beside labelled ones, scored as nuScenes' detection task does (detection_cvpr_2019): mAP, five errors
of what is found, and their sum, NDS.

    truth = read_truth("data/nuscenes", ["val"])
    found = read_results("results.json", truth)
    figures = evaluate(found, truth)
    lines = table(figures, truth)

Boxes of all samples stand in flat arrays, of which `sample` (n,) says where in `tokens` (S,) each one's sample is. They
are in the global frame: translation (n, 3) of the centre; size (n, 3), width, length, height; metres; rotation (n, 4),
w, x, y, z; velocity (n, 2), metres a second; kind (n,) of data_nuscenes.CLASSES; attribute (n,) of its ATTRIBUTES, -1
for none. Detections have a score (n,), labels have points (n,), of LiDAR and radar together.

A detection is right if its centre, seen from above, is near that of an object of its class which no better one has
taken: within half a metre, one, two, and four, and AP is the mean of the four. The errors are of what is right at two
metres. The rules are those of the devkit, and the figures are those that it prints.
"""

import json
import time
from types import SimpleNamespace

import numpy as np

import data_nuscenes
from data_nuscenes import ATTRIBUTES, CLASSES
from files import BadInput, why_unread, writing

RANGES = {  # metres from the car, seen from above, in the order in which the devkit lists its classes
    "car": 50,
    "truck": 50,
    "bus": 50,
    "trailer": 50,
    "construction_vehicle": 50,
    "pedestrian": 40,
    "motorcycle": 40,
    "bicycle": 40,
    "traffic_cone": 30,
    "barrier": 30,
}
RANGE_OF = np.array([RANGES[name] for name in CLASSES], np.float64)
BIKES = [CLASSES.index(name) for name in ("bicycle", "motorcycle")]  # in a rack they are not counted
DISTANCES = (0.5, 1.0, 2.0, 4.0)
ERRORS_AT = 2.0
MIN_RECALL, MIN_PRECISION = 0.1, 0.1
MOST = 500  # boxes of a sample
MAP_WEIGHT = 5
RECALLS = np.linspace(0, 1, 101)
FIRST = round(100 * MIN_RECALL) + 1  # of RECALLS, that counts
ERRORS = {"trans_err": "ATE", "scale_err": "ASE", "orient_err": "AOE", "vel_err": "AVE", "attr_err": "AAE"}
NOT_ASKED = {"traffic_cone": ("orient_err", "vel_err", "attr_err"), "barrier": ("vel_err", "attr_err")}
META = ("use_camera", "use_lidar", "use_radar", "use_map", "use_external")

# of the val split: mAP, NDS in percent. FCOS3D with ResNet-50 after different pre-training, the paper's Table 4
PUBLISHED = {
    "scratch": (17.90, 26.27),
    "SimIPU, Waymo": (26.18, 33.50),
    "supervised, ImageNet": (27.71, 35.23),
    "SimIPU, ImageNet then Waymo": (28.36, 35.36),
}

FIELDS = {"translation": (3,), "size": (3,), "rotation": (4,), "velocity": (2,), "detection_score": ()}
NAMES = {"detection_name": CLASSES, "attribute_name": ("", *ATTRIBUTES)}


# -----------------------------------------------------------------------------
# labels


def read_truth(root, splits, version="auto", flag="--splits"):
    """All labelled boxes of the splits, which must be of one version, for `evaluate`: as above, and `where`, a name for
    messages and tables; ego (S, 3), the car's place; racks of bicycles.

    Raises BadInput as data_nuscenes.find_frames does, and for splits without labels.
    """
    versions = {data_nuscenes.version_of(root, split, version, flag) for split in splits}
    if len(versions) != 1:
        raise BadInput(f"{flag} {' '.join(splits)}: must be splits of one version")
    tables = data_nuscenes.open_tables(root, versions.pop())
    rows = np.concatenate([tables.rows(split) for split in dict.fromkeys(splits)])
    labels = tables.labels
    first, behind = labels.start[rows], labels.start[rows + 1]
    chosen = np.concatenate([np.arange(a, b) for a, b in zip(first, behind)] or [np.zeros(0, int)])
    if not len(chosen):
        raise BadInput(f"{tables.folder / 'sample_annotation.json'}: no labels of {flag} {' '.join(splits)}")
    every = {name: getattr(labels, name)[chosen] for name in data_nuscenes.LABELS}
    every["sample"] = np.repeat(np.arange(len(rows)), behind - first)
    every["points"] = every["lidar_points"] + every["radar_points"]
    rack, asked = labels.rack[chosen], every["kind"] >= 0
    truth = SimpleNamespace(**{name: values[asked] for name, values in every.items()})
    truth.racks = SimpleNamespace(**{k: every[k][rack] for k in ("sample", "translation", "size", "rotation")})
    truth.tokens = [token.decode() for token in tables.frames.sample[rows].tolist()]
    truth.ego = tables.frames.ego[rows]
    truth.where = f"{' '.join(splits)} of {tables.version}"
    return truth


# -----------------------------------------------------------------------------
# results: {"meta": {...}, "results": {sample token: [box, ...]}}


def read_results(path, truth):
    """A results file in the devkit's format, boxes in its order.

    Raises BadInput, naming file, sample and box, for what is not in that format; for samples that are not the truth's;
    for more than 500 boxes of a sample; for numbers that are NaN or infinite, sizes that are not positive; for classes
    and attributes that nuScenes does not have.
    """
    results = _read_json(path)
    _check_samples(path, results, truth)
    place = {token: i for i, token in enumerate(truth.tokens)}
    boxes = [box for own in results.values() for box in own]
    sample = [place[token] for token, own in results.items() for _ in own]
    where = lambda i: f"{path}: sample {truth.tokens[sample[i]]}, box {i - sample.index(sample[i])}"
    for key in ("sample_token", *FIELDS, *NAMES):
        for i, box in enumerate(boxes):
            if not isinstance(box, dict) or key not in box:
                raise BadInput(f"{where(i)}: no {key}")
    numbers = {key: _numbers([box[key] for box in boxes], shape, key, where) for key, shape in FIELDS.items()}
    names = {key: _names([box[key] for box in boxes], known, key, where) for key, known in NAMES.items()}
    for i, box in enumerate(boxes):
        if box["sample_token"] != truth.tokens[sample[i]]:
            raise BadInput(f"{where(i)}: its sample_token is another, {box['sample_token']!r}")
    found = SimpleNamespace(sample=np.array(sample, np.int64), **numbers)
    found.score = found.detection_score
    found.kind, found.attribute = names["detection_name"], names["attribute_name"] - 1
    _check(found, where)
    return found


def _read_json(path):
    """{sample token: [box, ...]} of a results file."""
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
    except OSError as e:
        raise BadInput(f"{path}: {why_unread(path, e)}") from None
    except (ValueError, RecursionError) as e:
        raise BadInput(f"{path}: not JSON ({str(e).splitlines()[0]})") from None
    for key in ("meta", "results"):
        if not isinstance(content, dict) or not isinstance(content.get(key), dict):
            raise BadInput(f"{path}: no '{key}'; a results file of nuScenes has 'meta' and 'results', both {{...}}")
    for token, own in content["results"].items():
        if not isinstance(own, list):
            raise BadInput(f"{path}: sample {token}: must be a list of boxes")
    return content["results"]


def _check_samples(path, results, truth):
    """Raises BadInput where the samples with results are not exactly those that are judged."""
    lacking, strange = set(truth.tokens) - results.keys(), results.keys() - set(truth.tokens)
    if strange:
        raise BadInput(f"{path}: {len(strange)} samples are not of {truth.where}, {min(strange)} among them")
    if lacking:
        some = f"{len(lacking)} of {len(truth.tokens)} samples of {truth.where} are not in it"
        raise BadInput(f"{path}: {some}, {min(lacking)} among them; one where nothing is found is an empty list")


def _numbers(values, shape, key, where):
    """(n, *shape) float64. Raises BadInput for a value of another shape."""
    many = f"{shape[0]} numbers" if shape else "a number"
    for i, value in enumerate(values):
        parts = value if isinstance(value, list) else [value]
        right = isinstance(value, list) == bool(shape) and len(parts) == (shape or (1,))[0]
        if not right or not all(isinstance(part, int | float) for part in parts):
            raise BadInput(f"{where(i)}: {key} must be {many}")
    return np.array(values, np.float64).reshape(-1, *shape)


def _names(values, known, key, where):
    """Which of the known names each value is, (n,). Raises BadInput for another."""
    number = {name: i for i, name in enumerate(known)}
    for i, value in enumerate(values):
        if not isinstance(value, str) or value not in number:
            raise BadInput(f"{where(i)}: {key} {value!r}: must be of {', '.join(filter(None, known))}")
    return np.array([number[value] for value in values], np.int64)


def _check(found, where):
    """Raises BadInput, one line that begins with where(number of the box), for boxes that cannot be scored."""

    def refuse(bad, why):
        if bad.any():
            raise BadInput(f"{where(int(bad.argmax()))}: {why}")

    for key in ("translation", "size", "rotation", "velocity", "score"):
        values = getattr(found, key)
        finite = np.isfinite(values).all(tuple(range(1, values.ndim)))
        refuse(~finite, f"{key} is NaN or infinite")
    refuse((found.size <= 0).any(1), "size must be above 0")
    refuse((found.rotation == 0).all(1), "rotation is 0, 0, 0, 0")
    refuse(_rank(found.sample) >= MOST, f"a sample has at most {MOST} boxes")


def collect(parts, truth):
    """Detections as `read_results` gives them, from [(token, its boxes: SimpleNamespace of translation, size, rotation,
    velocity, kind, attribute, score)], one for each of the truth's samples."""
    place = {token: i for i, token in enumerate(truth.tokens)}
    numbers = [np.full(len(boxes.score), place[token]) for token, boxes in parts]
    fields = ("translation", "size", "rotation", "velocity", "kind", "attribute", "score")
    joined = {name: np.concatenate([getattr(boxes, name) for _, boxes in parts]) for name in fields}
    return SimpleNamespace(sample=np.concatenate(numbers), **joined)


def write_results(path, found, truth, meta=("use_camera",)):
    """The file that `read_results` reads. meta: what of META the detector has used. Raises BadInput for boxes that
    cannot be scored, and for a path that cannot be written."""
    _check(found, lambda i: f"{path}: not written: sample {truth.tokens[found.sample[i]]}")
    results = {token: [] for token in truth.tokens}
    columns = zip(
        *(getattr(found, name).tolist() for name in ("sample", "translation", "size", "rotation", "velocity")),
        *(getattr(found, name).tolist() for name in ("kind", "score", "attribute")),
    )
    for sample, translation, size, rotation, velocity, kind, score, attribute in columns:
        token = truth.tokens[sample]
        box = {"sample_token": token, "translation": translation, "size": size, "rotation": rotation}
        box |= {"velocity": velocity, "detection_name": CLASSES[kind], "detection_score": score}
        box |= {"attribute_name": ATTRIBUTES[attribute] if attribute >= 0 else ""}
        results[token].append(box)
    content = {"meta": {name: name in meta for name in META}, "results": results}
    with writing(path) as temporary:
        temporary.write_text(json.dumps(content))


# -----------------------------------------------------------------------------
# which boxes count


def _counts(boxes, truth, points=None):
    """Which boxes are near enough, hold a point (labels), and are no bikes in racks: (n,) bool."""
    away = boxes.translation[:, :2] - truth.ego[boxes.sample, :2]
    counts = np.sqrt((away**2).sum(1)) < RANGE_OF[boxes.kind]
    if points is not None:
        counts &= points != 0
    bikes = np.flatnonzero(counts & np.isin(boxes.kind, BIKES))
    counts[bikes[_in_racks(boxes.translation[bikes], boxes.sample[bikes], truth.racks)]] = False
    return counts


def _in_racks(places, sample, racks):
    """Which of the places (n, 3) lie in a rack of their sample: (n,) bool."""
    order = np.argsort(racks.sample, kind="stable")
    first, behind = (np.searchsorted(racks.sample[order], sample, side) for side in ("left", "right"))
    many = behind - first
    place = np.repeat(np.arange(len(places)), many)  # of each pair of a place and a rack
    rack = order[np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many) + np.repeat(first, many)]
    axes = data_nuscenes.rotations(racks.rotation[rack])
    offset = places[place] - racks.translation[rack]
    local = abs((axes * offset[:, :, None]).sum(1))  # along length, width, height
    inside = (local <= racks.size[rack][:, [1, 0, 2]] / 2).all(1)
    return np.bincount(place[inside], minlength=len(places)) > 0


# -----------------------------------------------------------------------------
# matching: the best detection first, each takes the nearest object that is left


def _match(found, truth, found_rows, truth_rows):
    """The object of each detection, at each of DISTANCES: (4, n) of truth_rows, -1 for none.

    found_rows (n,), best first, and truth_rows (m,) are rows of one class. Samples have nothing to do with one another,
    so the first of each are matched at once, then the second of each.
    """
    match = np.full((len(DISTANCES), len(found_rows)), -1)
    sample = truth.sample[truth_rows]
    slot = _rank(sample)
    shape = (len(truth.tokens), slot.max(initial=-1) + 1)
    centre = np.full((*shape, 2), np.inf)
    centre[sample, slot] = truth.translation[truth_rows, :2]
    number = np.full(shape, -1)
    number[sample, slot] = np.arange(len(truth_rows))
    taken = np.zeros((len(DISTANCES), *shape), bool)
    sample, round_of = found.sample[found_rows], _rank(found.sample[found_rows])
    order = np.argsort(round_of, kind="stable")
    for now in np.split(order, np.cumsum(np.bincount(round_of))[:-1]):
        s = sample[now]
        offset = centre[s] - found.translation[found_rows[now], None, :2]
        distance = np.sqrt((offset**2).sum(-1))  # (k, slots)
        distance = np.where(taken[:, s], np.inf, distance)  # (4, k, slots)
        nearest = distance.argmin(-1)  # the first of equals
        near = np.take_along_axis(distance, nearest[..., None], -1)[..., 0] < np.array(DISTANCES)[:, None]
        at, k = np.nonzero(near)
        taken[at, s[k], nearest[at, k]] = True
        match[at, now[k]] = number[s[k], nearest[at, k]]
    return match


def _rank(groups):
    """How many of the same group stand before each: groups (n,) -> (n,)."""
    order = np.argsort(groups, kind="stable")
    ordered = groups[order]
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.searchsorted(ordered, ordered)
    return rank


# -----------------------------------------------------------------------------
# figures


def evaluate(found, truth, classes=tuple(RANGES), asked=tuple(ERRORS)):
    """nuScenes' figures, under the devkit's own keys: label_aps, mean_dist_aps, mean_ap, label_tp_errors, tp_errors,
    tp_scores, nd_score, eval_time, cfg.

    found: of `read_results` or `collect`, truth: of `read_truth`. A class that is not there has AP 0, and errors 1; the
    errors that a class is not asked for are NaN. classes, asked: of RANGES and of ERRORS; where labels know less than
    nuScenes', there are figures of these alone, and no nd_score.
    """
    start = time.perf_counter()
    found_counts, truth_counts = _counts(found, truth), _counts(truth, truth, truth.points)
    label_aps, label_errors = {}, {}
    for name in classes:
        kind = CLASSES.index(name)
        truth_rows = np.flatnonzero(truth_counts & (truth.kind == kind))
        found_rows = np.flatnonzero(found_counts & (found.kind == kind))
        # of equal scores the last comes first: ties are broken as the devkit breaks them
        found_rows = found_rows[np.argsort(found.score[found_rows], kind="stable")[::-1]]
        aps, errors = {}, dict.fromkeys(ERRORS, 1.0)
        match = _match(found, truth, found_rows, truth_rows) if len(truth_rows) and len(found_rows) else ()
        for distance, own in zip(DISTANCES, match):
            precision, confidence = _curve(own >= 0, found.score[found_rows], len(truth_rows))
            aps[str(distance)] = float(np.maximum(precision[FIRST:] - MIN_PRECISION, 0).mean() / (1 - MIN_PRECISION))
            if distance == ERRORS_AT and (own >= 0).any():
                pairs = found_rows[own >= 0], truth_rows[own[own >= 0]]
                errors = _errors(found, truth, *pairs, name == "barrier")
                scores = found.score[pairs[0]]
                errors = {key: _error(values, scores, confidence) for key, values in errors.items()}
        label_aps[name] = aps or dict.fromkeys(map(str, DISTANCES), 0.0)
        errors |= dict.fromkeys(NOT_ASKED.get(name, ()), np.nan)
        label_errors[name] = {key: errors[key] for key in asked}
    mean_aps = {name: float(np.mean(list(aps.values()))) for name, aps in label_aps.items()}
    mean_ap = float(np.mean(list(mean_aps.values())))
    errors = {key: float(np.nanmean([own[key] for own in label_errors.values()])) for key in asked}
    scores = {key: max(0.0, 1.0 - error) for key, error in errors.items()}
    score = float((MAP_WEIGHT * mean_ap + sum(scores.values())) / (MAP_WEIGHT + len(scores)))
    whole = set(classes) == RANGES.keys() and set(asked) == ERRORS.keys()
    return {
        "label_aps": label_aps,
        "mean_dist_aps": mean_aps,
        "mean_ap": mean_ap,
        "label_tp_errors": label_errors,
        "tp_errors": errors,
        "tp_scores": scores,
        **({"nd_score": score} if whole else {}),
        "eval_time": time.perf_counter() - start,
        "cfg": {
            "class_range": {name: RANGES[name] for name in classes},
            "dist_fcn": "center_distance",
            "dist_ths": list(DISTANCES),
            "dist_th_tp": ERRORS_AT,
            "min_recall": MIN_RECALL,
            "min_precision": MIN_PRECISION,
            "max_boxes_per_sample": MOST,
            "mean_ap_weight": MAP_WEIGHT,
        },
    }


def _curve(hit, score, positives):
    """Precision and confidence at RECALLS, 0 beyond the highest recall. hit (n,) bool, score (n,), best first."""
    if not hit.any():
        return np.zeros_like(RECALLS), np.zeros_like(RECALLS)
    hits = np.cumsum(hit)
    precision, recall = hits / np.arange(1, len(hit) + 1), hits / positives
    return (np.interp(RECALLS, recall, values, right=0) for values in (precision, score))


def _errors(found, truth, i, j, half_turns):
    """The five errors of detections i (n,) of objects j (n,), NaN where the object's value is not known."""
    away = found.translation[i, :2] - truth.translation[j, :2]
    speed = found.velocity[i] - truth.velocity[j]
    volume = np.minimum(found.size[i], truth.size[j]).prod(1)
    union = found.size[i].prod(1) + truth.size[j].prod(1) - volume
    period = np.pi if half_turns else 2 * np.pi  # a barrier has no front
    turn = data_nuscenes.headings(truth.rotation[j]) - data_nuscenes.headings(found.rotation[i])
    wrong = (found.attribute[i] != truth.attribute[j]).astype(np.float64)
    return {
        "trans_err": np.sqrt((away**2).sum(1)),
        "scale_err": 1 - volume / union,
        "orient_err": abs((turn + period / 2) % period - period / 2),
        "vel_err": np.sqrt((speed**2).sum(1)),
        "attr_err": np.where(truth.attribute[j] < 0, np.nan, wrong),
    }


def _error(values, score, confidence):
    """The mean over the recalls that count, up to the highest, of the mean error of all that are as sure: values (n,),
    score (n,), best first; confidence at RECALLS. 1 where that recall is too low, or no value is known."""
    reached = np.flatnonzero(confidence)
    last = reached[-1] if len(reached) else 0
    known = ~np.isnan(values)
    if last < FIRST or not known.any():
        return 1.0
    mean = np.cumsum(np.where(known, values, 0)) / np.maximum(np.cumsum(known), 1)  # 0 before the first that is known
    mean = np.interp(confidence[::-1], score[::-1], mean[::-1])[::-1]
    return float(mean[FIRST : last + 1].mean())


# -----------------------------------------------------------------------------
# tables


def table(figures, truth, published=False):
    """Lines of text for a result of `evaluate`. published: with PUBLISHED, which is of the whole val split."""
    counted = np.bincount(truth.kind[_counts(truth, truth, truth.points)], minlength=len(CLASSES))
    score = f", NDS {100 * figures['nd_score']:.2f}" if "nd_score" in figures else ""
    mean_ap = f"mAP {100 * figures['mean_ap']:.2f}"
    rows = [
        f"nuScenes detection on {len(truth.tokens)} samples, {truth.where}: {mean_ap}{score}",
        "AP in percent, within .5 to 4 m between centres, and their mean; n objects that count; errors at 2 m in m,",
        "1 - IoU, radians, m/s, 1 - accuracy, lower is better",
        "",
    ]
    heads = ["n", *(f"{d:g} m" for d in DISTANCES), "AP", *(ERRORS[key] for key in figures["tp_errors"])]
    rows.append("".join([" " * 20, *(f"{head:>8}" for head in heads)]))
    every = 0
    for name, aps in figures["label_aps"].items():
        own = [*aps.values(), figures["mean_dist_aps"][name]]
        n = counted[CLASSES.index(name)]
        every += n
        rows.append(_row(name, n, own, figures["label_tp_errors"][name].values()))
    means = np.mean([list(own.values()) for own in figures["label_aps"].values()], 0)
    rows.append(_row("mean", every, [*means, figures["mean_ap"]], figures["tp_errors"].values()))
    if published:
        rows += ["", "FCOS3D, ResNet-50, val split, after pre-training (paper, Table 4)       mAP     NDS"]
        rows += [f"{who:>68}{mean_ap:8.2f}{nds:8.2f}" for who, (mean_ap, nds) in PUBLISHED.items()]
    return rows


def _row(name, n, aps, errors):
    cells = [f"{100 * ap:8.2f}" for ap in aps]
    cells += [f"{'-':>8}" if np.isnan(error) else f"{error:8.3f}" for error in errors]
    return "".join([f"{name:>20}{n:8}", *cells])


def write_figures(path, figures):
    """Figures as JSON, NaN written as the devkit writes it. Raises BadInput for a path that cannot be written."""
    with writing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n")
