"""What a monocular detector (finetune_mono3d.FCOS3D) finds, in whole samples, and nuScenes' figures of it.

    truth = read_truth(c, frames)               c: finetune_mono3d.Config
    figures = judge(model, frames, truth, c, run)
    lines = report(c, figures, truth)

nuScenes' samples have six cameras, whose boxes meet in the global frame: an object that two of them see is found twice,
and suppression over all cameras leaves the surer one. A frame of KITTI's is a sample of its own, whose global frame is
its LiDAR's. KITTI's labels know neither velocities nor attributes, so mAP and three of the five errors are asked, of
three classes, with nuScenes' ranges; all labelled objects count, however hidden.
"""

from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

import data
import data_det3d
import data_mono3d
import data_nuscenes
import eval_nuscenes
import ops_boxes
import pictures_boxes
import runtime
from data_mono3d import CLASSES, NO_ATTRIBUTE
from files import unless_bad

MERGED_OVERLAP, MERGED_MOST = 0.05, 500  # of boxes of all cameras of a sample (release)
SHOWN = 0.2  # the score from which boxes are drawn
ASKED = {"nuscenes": tuple(eval_nuscenes.ERRORS), "kitti": ("trans_err", "scale_err", "orient_err")}
TITLES = {"nuscenes": "nuScenes' labels", "kitti": "KITTI's labels"}

# the attributes that a class may have, and what it has where a network says another (mmdetection3d)
VEHICLE = ("vehicle.moving", "vehicle.parked", "vehicle.stopped")
CYCLE = ("cycle.with_rider", "cycle.without_rider")
WALKER = ("pedestrian.moving", "pedestrian.standing", "pedestrian.sitting_lying_down")
MAY_HAVE = dict.fromkeys(("car", "truck", "trailer", "bus", "construction_vehicle"), VEHICLE)
MAY_HAVE |= {"bicycle": CYCLE, "motorcycle": CYCLE, "pedestrian": WALKER, "traffic_cone": (), "barrier": ()}
USUAL = dict.fromkeys(("car", "truck", "trailer", "construction_vehicle"), "vehicle.parked")
USUAL |= {"bus": "vehicle.moving", "bicycle": "cycle.without_rider", "motorcycle": "cycle.without_rider"}
USUAL |= {"pedestrian": "pedestrian.moving"}


# -----------------------------------------------------------------------------
# labels


def read_truth(c, frames):
    """The labelled boxes of the samples that `frames` are of, as eval_nuscenes.read_truth has them; `where` says what
    they are. c: finetune_mono3d.Config, whose eval_splits they are. Raises BadInput.
    """
    tokens = list(data_mono3d.samples_of(frames))
    if c.dataset == "nuscenes":
        root = (c.eval_root or c.data_root)[0]
        return of_samples(eval_nuscenes.read_truth(root, c.eval_splits, c.version, "--eval-splits"), tokens)
    parts = []
    for frame in frames:
        boxes, velocity, kinds, attributes = data_mono3d.labels_of(frame)
        own = data_nuscenes.to_global(boxes, velocity, np.eye(4))
        own.kind, own.attribute, own.score = known(c, kinds), attributes_of(attributes), np.ones(len(boxes))
        parts.append((frame.name, own))
    truth = eval_nuscenes.collect(parts, SimpleNamespace(tokens=tokens))
    none = np.zeros((0, 3))
    truth.racks = SimpleNamespace(sample=np.zeros(0, int), translation=none, size=none, rotation=np.zeros((0, 4)))
    truth.points, truth.tokens, truth.ego = np.ones(len(truth.kind)), tokens, np.zeros((len(tokens), 3))
    truth.where = f"{' '.join(c.eval_splits)}, {TITLES['kitti']}"
    return truth


def of_samples(truth, tokens):
    """What of eval_nuscenes.read_truth's is of these samples, in their order."""
    place = {token: i for i, token in enumerate(tokens)}
    number = np.array([place.get(token, -1) for token in truth.tokens])
    row = np.empty(len(tokens), int)
    row[number[number >= 0]] = np.flatnonzero(number >= 0)

    def part(boxes, names):
        kept = number[boxes.sample] >= 0
        chosen = SimpleNamespace(**{name: getattr(boxes, name)[kept] for name in names})
        chosen.sample = number[chosen.sample]
        return chosen

    few = part(truth, ("sample", "points", *data_nuscenes.LABELS))
    few.racks = part(truth.racks, ("sample", "translation", "size", "rotation"))
    few.tokens, few.ego, few.where = tokens, truth.ego[row], truth.where
    return few


def known(c, kinds):
    """Channels of c's data set (n,) as numbers of data_nuscenes.CLASSES."""
    return np.array([data_nuscenes.CLASSES.index(name) for name in CLASSES[c.dataset]])[kinds]


def attributes_of(channels):
    """Channels (n,) as eval_nuscenes has attributes: -1 for none."""
    return np.where(channels == NO_ATTRIBUTE, -1, channels)


# -----------------------------------------------------------------------------
# detections


@torch.no_grad()
def detections(model, frames, indices, c, device):
    """What a detector, in eval mode, finds in frames[i] of `indices`, one after another, best first.

    -> SimpleNamespace: boxes (n, 7) of ops_boxes, float64, in the frame's LiDAR axes; velocity (n, 2) there, 0 where
    the network says none; scores (n,); classes (n,) of CLASSES; attributes (n,), channels.
    """
    dataset = data_mono3d.MonoFrames(frames, c, training=False)
    for sample in runtime.ahead(lambda i: dataset[(0, i)], indices):
        batch = unless_bad(data_mono3d.collate([sample]))
        batch = data_mono3d.augment(batch, c.image_scale, device)
        with runtime.mixed_precision(c.amp, device):
            found = model.detect(batch)
        yield in_lidar_axes({name: x[0].cpu().numpy() for name, x in found.items()}, sample["lidar2cam"])


def in_lidar_axes(found, lidar2cam):
    """An image's part of finetune_mono3d.select, arrays in a camera's axes -> as `detections`."""
    there = found["scores"] > 0
    found = {name: x[there] for name, x in found.items()}
    boxes = data_mono3d.from_camera(found["boxes"].astype(np.float64), lidar2cam)
    velocity = found.get("velocity", np.zeros((len(boxes), 2))).astype(np.float64)
    velocity = data_mono3d.velocity_from_camera(velocity, lidar2cam)
    attributes = found.get("attributes", np.full(len(boxes), NO_ATTRIBUTE))
    shared = {"scores": found["scores"].astype(np.float64), "classes": found["classes"], "attributes": attributes}
    return SimpleNamespace(boxes=boxes, velocity=velocity, **shared)


def in_global_frame(found, frame, c):
    """Detections in a frame as results have them: translation, size, rotation, velocity, kind, attribute, score."""
    lidar2global = frame.lidar2global() if c.dataset == "nuscenes" else np.eye(4)
    boxes = data_nuscenes.to_global(found.boxes, found.velocity, lidar2global)
    boxes.kind, boxes.score = known(c, found.classes), found.scores
    boxes.attribute = attributes_of(found.attributes)
    if c.dataset == "nuscenes":
        boxes.attribute = allowed(boxes.kind, boxes.attribute)
    return boxes


def allowed(kinds, attributes):
    """Attributes (n,) that their classes may have: another becomes the class's usual one."""
    names = [*data_nuscenes.ATTRIBUTES, ""]
    checked = []
    for kind, attribute in zip(kinds, attributes):
        name = data_nuscenes.CLASSES[kind]
        own = names[attribute] if names[attribute] in MAY_HAVE[name] else USUAL.get(name, "")
        checked.append(names.index(own) if own else -1)
    return np.array(checked, np.int64)


def merge(parts):
    """Boxes of all cameras of a sample, in the global frame -> the sample's: suppression seen from above, class by
    class, and the best MERGED_MOST.
    """
    names = ("translation", "size", "rotation", "velocity", "kind", "attribute", "score")
    every = SimpleNamespace(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})
    kept = np.ones(len(every.score), bool)
    if len(parts) > 1:
        yaw = data_nuscenes.headings(every.rotation)
        middle = every.translation.mean(0) if len(kept) else 0  # else metres from a map's corner would round areas
        boxes = np.column_stack([every.translation - middle, every.size[:, [1, 0, 2]], yaw])
        for kind in np.unique(every.kind):
            own = np.flatnonzero(every.kind == kind)
            kept[own] = ops_boxes.nms(boxes[own], every.score[own], MERGED_OVERLAP)
    order = np.argsort(-every.score, kind="stable")
    order = order[kept[order]][:MERGED_MOST]
    return SimpleNamespace(**{name: getattr(every, name)[order] for name in names})


def detect(model, frames, samples, c, device, seen=lambda i, found: None):
    """-> [(token, boxes in the global frame)] of samples [(token, indices of its frames)], one after another.

    seen(i, what `detections` found in frames[i]) is called for every frame.
    """
    found = detections(model, frames, [i for _, own in samples for i in own], c, device)
    for token, own in samples:
        parts = []
        for i in own:
            here = next(found)
            seen(i, here)
            parts.append(in_global_frame(here, frames[i], c))
        yield token, merge(parts)


# -----------------------------------------------------------------------------
# figures


def evaluate(c, found, truth):
    """eval_nuscenes.evaluate with what c's labels know."""
    classes = [name for name in eval_nuscenes.RANGES if name in CLASSES[c.dataset]]
    return eval_nuscenes.evaluate(found, truth, classes, ASKED[c.dataset])


def judge(model, frames, truth, c, run):
    """A detector's figures on labelled frames, on every rank; each takes its share of the samples. -> result of
    `evaluate` without its time and rules, None for NaN.

    The model is left in eval mode, and with rank 0's batch statistics, which are those that a checkpoint holds.
    """
    runtime.follow_main(model, run)
    model.eval()
    samples = list(data_mono3d.samples_of(frames).items())[run.rank :: run.world]
    found = detect(model, frames, samples, c, run.device)
    bar = tqdm(found, "judging", len(samples), disable=not run.main, leave=False, dynamic_ncols=True, mininterval=1)
    figures = evaluate(c, eval_nuscenes.collect(run.gather(list(bar)), truth), truth)
    return {name: _each(figures[name], _without_nan) for name in figures if name not in ("eval_time", "cfg")}


def _each(value, change):
    """A figure, or all of those in dicts, changed."""
    if isinstance(value, dict):
        return {name: _each(own, change) for name, own in value.items()}
    return change(value)


def _without_nan(figure):
    return None if np.isnan(figure) else figure


def report(c, found, truth):
    """Lines of text for a result of `evaluate` or `judge`, with the published rows beside nuScenes' figures."""
    figures = _each({k: v for k, v in found.items() if k != "cfg"}, lambda x: np.nan if x is None else x)
    return eval_nuscenes.table(figures, truth, published=c.dataset == "nuscenes")


# -----------------------------------------------------------------------------
# picture


def draw(model, frames, c, device, path):
    """Picture of the frame with the most objects in sight, of 60 evenly spread ones; -> what was found, in words."""
    few = data.evenly_spread(range(len(frames)), 60)
    most = max(few, key=lambda i: len(data_mono3d.read_view(frames[i]).kinds))
    (found,) = detections(model.eval(), frames, [most], c, device)
    return draw_frame(frames[most], found, c, path)


def draw_frame(frame, found, c, path):
    """Labelled and found boxes on an image and seen from above, with the sweep where there is one."""
    view = data_mono3d.read_view(frame)
    boxes = data_mono3d.from_camera(view.boxes, view.lidar2cam)
    points = frame.read_points() if frame.cloud.is_file() else np.zeros((0, 4), np.float32)
    lidar2img = view.intrinsic @ view.lidar2cam
    uv, depth = data.project(points.astype(np.float64), lidar2img)
    points = points[data.inside_image(uv, depth, view.image.shape[1], view.image.shape[0])]
    scene = data_det3d.Scene(view.image, points, lidar2img, boxes, view.kinds, view.rects, CLASSES[c.dataset])
    return pictures_boxes.draw_boxes(scene, found.boxes, found.scores, found.classes, path, frame.name, SHOWN)
