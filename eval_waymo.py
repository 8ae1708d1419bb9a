"""Detected boxes beside labelled ones, scored as Waymo's 3D detection benchmark does; and the files such boxes are in.

    predictions = read_objects("predictions.bin")      what is handed in to Waymo: waymo.open_dataset.Objects
    truths = read_objects("ground_truths.bin")
    note = check_frames(predictions, truths, "predictions.bin")
    lines = table(evaluate(predictions, truths))

A box is right when its overlap in 3D with a labelled one of its type is .7 or more (vehicles) or .5 (the others). Boxes
are matched so that the sum of overlaps is the highest (the Hungarian method; scores play no part), again at each of 101
scores below which boxes are left out. mAP is the area under precision over recall; in mAPH a right box counts 1 -
|error of its heading| / pi. LEVEL_1 asks for labels with more than five LiDAR points, LEVEL_2 for all with any. One
range of distance looks at the labels and at the boxes within it alone.

The rules are those of Waymo's tool (metrics/tools/compute_detection_metrics_main.cc), and the figures are those that it
prints. Wrong input raises `BadInput`, one line.
"""

import dataclasses
import math
import re
import struct
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

import data
import ops_boxes
from files import BadInput, read_text, writing

TYPES = ("UNKNOWN", "VEHICLE", "PEDESTRIAN", "SIGN", "CYCLIST")  # by Waymo's numbers; what is unknown is not judged
THRESHOLDS = np.array([0, 0.7, 0.5, 0.5, 0.5], np.float32)  # of overlap, by type
CUTOFFS = np.append(np.arange(100) * 0.01, 1).astype(np.float32)  # of scores
LEVELS = ("LEVEL_1", "LEVEL_2")
RANGES = ("[0, 30)", "[30, 50)", "[50, +inf)")  # metres from the vehicle's origin to a box's centre
FAR = (30, 50)
FEW = 5  # points in a label of LEVEL_2 at most, where nobody has annotated its level
MEAN = ("VEHICLE", "PEDESTRIAN", "CYCLIST")  # ALL_NS: all but signs
SIDES = 0.01, 1e6  # metres; a box with a side not between them overlaps nothing
PARALLEL, EXACT = 1e-9, 2.0**-50  # sides are parallel; a cross product is told from 0 (the tool's)
DELTA = 0.05  # of recall, at most, between points of the curve
PIECE = 2**19  # pairs of boxes that are compared at once
VAL_SEGMENTS = "64b27f3e2bd68f55"  # data.fingerprint of the sorted names of validation's 202 segments
VAL_FRAMES = 7000  # fewer are not even every fifth of the 190 or more frames of each

# mAP, mAPH of LEVEL_1, then of LEVEL_2, in percent, on validation. mmdetection3d 0.13, configs/second/README.md: the
# network that `finetune_det3d.py waymo` adds images to, trained on every fifth frame, 2x
PUBLISHED = {
    "SECOND, no image": {
        "VEHICLE": (67.1, 66.6, 58.7, 58.2),
        "PEDESTRIAN": (68.1, 59.1, 59.5, 51.5),
        "CYCLIST": (60.7, 59.5, 58.4, 57.3),
        "ALL_NS": (65.3, 61.7, 58.9, 55.7),
    },
}


# -----------------------------------------------------------------------------
# boxes of many frames


@dataclass
class Objects:
    """Boxes of many frames, one row each, in the vehicle's frame (x ahead, y left, z up). See `make_objects`."""

    frames: list  # of (segment, timestamp in microseconds)
    frame: np.ndarray  # (n,) int64, index into frames
    type: np.ndarray  # (n,) int64, index into TYPES
    box: np.ndarray  # (n, 7) float64, as in ops_boxes
    score: np.ndarray  # (n,) float32 in [0, 1]; 1 for labels
    points: np.ndarray  # (n,) int64, LiDAR points in a labelled box
    level: np.ndarray  # (n,) int64, annotated difficulty 1 or 2; 0 where there is none
    no_label: np.ndarray  # (n,) bool, does it overlap a no-label zone
    id: np.ndarray  # (n,) text

    def __len__(self):
        return len(self.frame)

    def __getitem__(self, rows):
        """Some of the rows, by a mask or by indices."""
        return Objects(self.frames, **{name: getattr(self, name)[rows] for name in COLUMNS})


COLUMNS = {
    "frame": np.int64,
    "type": np.int64,
    "box": np.float64,
    "score": np.float32,
    "points": np.int64,
    "level": np.int64,
    "no_label": bool,
    "id": object,
}


def make_objects(frames, frame, type, box, score=1.0, points=0, level=0, no_label=False, id=""):
    """Objects of anything that makes arrays. One value for all rows will do behind the box."""
    columns = dict(zip(COLUMNS, (frame, type, box, score, points, level, no_label, id)))
    shape = {name: (len(frame), 7) if name == "box" else (len(frame),) for name in COLUMNS}
    for name, dtype in COLUMNS.items():
        column = np.asarray(columns[name], dtype)
        columns[name] = column.reshape(shape[name]) if column.ndim else np.full(shape[name], column)
    return Objects(list(frames), **columns)


def join_objects(parts):
    """Objects of several files as one; an object with an id that stands in two of them, of neighbouring cameras, is
    taken once."""
    numbers, seen = {}, set()
    columns = {name: [] for name in COLUMNS}
    for part in parts:
        number = np.array([numbers.setdefault(key, len(numbers)) for key in part.frames], np.int64)
        frame = number[part.frame]
        names = list(zip(frame.tolist(), part.id))
        fresh = np.array([not name or (f, name) not in seen for f, name in names], bool)
        seen.update(names)
        columns["frame"].append(frame[fresh])
        for name in [name for name in COLUMNS if name != "frame"]:
            columns[name].append(getattr(part, name)[fresh])
    return make_objects(numbers, **{name: np.concatenate(column) for name, column in columns.items()})


# -----------------------------------------------------------------------------
# their files: waymo.open_dataset.Objects (metrics.proto, label.proto), the wire format of protobuf by hand


def message_fields(message, at, end):
    """The fields of a protobuf message, message[at:end]: yields (number, value). A value is an int, a float, or where
    the field is bytes, text or another message: (start, end). Raises IndexError, struct.error, ValueError."""
    while at < end:
        tag, at = read_varint(message, at)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, at = read_varint(message, at)
            value -= (value >> 63) << 64  # a negative number has all 64 bits
        elif kind == 1:
            (value,), at = struct.unpack_from("<d", message, at), at + 8
        elif kind == 5:
            (value,), at = struct.unpack_from("<f", message, at), at + 4
        elif kind == 2:
            length, start = read_varint(message, at)
            at = start + length
            value = start, at
        else:
            raise ValueError(f"field of kind {kind}")
        if at > end:
            raise ValueError("a field is longer than its message")
        yield number, value


def read_varint(message, at):
    """-> an unsigned integer, seven bits a byte, the lowest first; where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value & (2**64 - 1), at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")


def read_objects(path):
    """A file of a serialised waymo.open_dataset.Objects (metrics.proto): a submission's predictions, or labels.

    -> Objects. Raises BadInput for a file of anything else, and for an object without frame or box, of no known type,
    with numbers that are NaN or infinite, with a negative size, or with a score outside [0, 1].
    """
    try:
        message = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: not readable ({e.strerror})") from None
    frames, rows = {}, []
    try:
        for number, span in message_fields(message, 0, len(message)):
            if number == 1:
                rows.append(read_object(message, span, frames))
            elif number != 2:  # that one holds no-label zones, which Waymo's tool does not read either
                raise ValueError(f"field {number}")
    except (IndexError, TypeError, ValueError, struct.error) as e:
        raise BadInput(f"{path}: not a file of waymo.open_dataset.Objects (object {len(rows)}: {e})") from None
    columns = dict(zip(COLUMNS, zip(*rows))) if rows else {name: [] for name in COLUMNS}
    objects = make_objects(frames, **columns)
    check_objects(objects, path)
    return objects


def read_object(message, span, frames):
    """One Object of metrics.proto as a row of COLUMNS. `frames` learns its frame. Raises as `message_fields` does."""
    outer = dict(message_fields(message, *span))
    label = dict(message_fields(message, *outer[1])) if 1 in outer else {}
    if 4 not in outer or 5 not in outer or 1 not in label:
        raise ValueError("it lacks context_name, frame_timestamp_micros or a box")
    box = dict(message_fields(message, *label[1]))
    box = [float(box.get(field, 0)) for field in (1, 2, 3, 5, 4, 6, 7)]  # width is field 4, length field 5
    text = lambda place: message[slice(*place)].decode()
    frame = frames.setdefault((text(outer[4]), int(outer[5])), len(frames))
    name = text(label[4]) if 4 in label else ""
    kind, points, level = (int(label.get(field, 0)) for field in (3, 7, 5))
    return frame, kind, box, float(outer.get(2, 1)), points, level, bool(outer.get(3, 0)), name


def check_objects(objects, path):
    """Raises BadInput, naming the first object that is wrong; path: the file they are from, or are to be in."""
    wrong = {
        "its box is NaN or infinite": ~np.isfinite(objects.box).all(1),
        "its length, width or height is negative": (objects.box[:, 3:6] < 0).any(1),
        "its score is not within [0, 1]": ~((objects.score >= 0) & (objects.score <= 1)),
        f"its type is not one of {', '.join(TYPES)}": (objects.type < 0) | (objects.type >= len(TYPES)),
        "its difficulty is not 0, 1 or 2": (objects.level < 0) | (objects.level > 2),
    }
    for what, rows in wrong.items():
        if rows.any():
            first = int(rows.argmax())
            segment, timestamp = objects.frames[objects.frame[first]]
            raise BadInput(f"{path}: object {first} (frame {segment} {timestamp}): {what} ({rows.sum()} such)")


def pack_objects(objects):
    """The bytes that `read_objects` reads. Those of two files, end to end, are a file with the objects of both."""
    written = []
    for i in range(len(objects)):
        segment, timestamp = objects.frames[objects.frame[i]]
        x, y, z, length, width, height, heading = objects.box[i]
        box = struct.pack("<" + "Bd" * 7, 9, x, 17, y, 25, z, 33, width, 41, length, 49, height, 57, heading)
        label = packed(1, box) + packed(3, objects.type[i])
        label += packed(4, objects.id[i].encode()) if objects.id[i] else b""
        label += packed(5, objects.level[i]) if objects.level[i] else b""
        label += packed(7, objects.points[i])
        outer = packed(1, label) + struct.pack("<Bf", 21, objects.score[i]) + packed(3, objects.no_label[i])
        outer += packed(4, segment.encode()) + packed(5, timestamp)
        written.append(packed(1, outer))
    return b"".join(written)


def packed(number, value):
    """A field of a message: bytes, or an integer."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


def varint(number):
    """The bytes of an integer; a negative one has all 64 bits."""
    number = int(number) & (2**64 - 1)
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


def write_objects(path, objects):
    """A file for Waymo's tools (`create_submission`, `compute_detection_metrics_main`). Raises BadInput as
    `read_objects` does, and for a path that cannot be written."""
    check_objects(objects, path)
    with writing(path) as temporary:
        temporary.write_bytes(pack_objects(objects))


# -----------------------------------------------------------------------------
# frames that data_waymo.py wrote


def parse_id(name):
    """The id of a frame, or its name, -> segment, timestamp in microseconds, camera. Raises BadInput."""
    found = re.fullmatch(r"(?:.*/)?(.+)_(\d+)_([A-Z_]+)", name)
    if not found:
        raise BadInput(f"{name}: no frame of data_waymo.py (SEGMENT_TIMESTAMP_CAMERA)")
    return found[1], int(found[2]), found[3]


def vehicle_from_cloud(frame):
    """(4, 4): a frame's cloud to the vehicle's frame, in which Waymo's boxes are. Raises BadInput."""
    path = frame.calib[0]
    found = re.search(r"^Tr_imu_to_velo:(.*)$", read_text(path), re.MULTILINE)
    numbers = np.fromstring(found[1], sep=" ") if found else np.zeros(0)
    if len(numbers) != 12:
        raise BadInput(f"{path}: no Tr_imu_to_velo of 12 numbers; was it written by data_waymo.py?")
    return np.linalg.inv(np.vstack([numbers.reshape(3, 4), [0, 0, 0, 1]]))


def truth_of(frame):
    """The file of a frame's labels."""
    return frame.cloud.parents[1] / "truth" / f"{frame.cloud.stem}.bin"


def read_truth(frames):
    """The labels of frames (data_kitti.ObjectFrame) as Objects, for eval_waymo.evaluate. Raises BadInput."""
    parts = []
    for frame in frames:
        segment, timestamp, _ = parse_id(frame.name)
        part = read_objects(truth_of(frame))
        part.frames = [(segment, timestamp)]  # which a file without objects does not tell
        parts.append(part)
    return join_objects(parts)


def read_no_label(frame):
    """The points of a frame's cloud in no-label zones: float32 (n, 3)."""
    path = frame.cloud.parents[1] / "no_label" / frame.cloud.name
    return np.fromfile(path, np.float32).reshape(-1, 3) if path.is_file() else np.zeros((0, 3), np.float32)


def as_objects(frame, boxes, scores, types):
    """A detector's boxes (n, 7) in a frame's cloud as Objects. types (n,): names, such as Vehicle, in any case.

    One that holds a point of a no-label zone is said to overlap it. Waymo's tool asks whoever writes predictions.
    """
    segment, timestamp, _ = parse_id(frame.name)
    zone = read_no_label(frame).astype(np.float64)
    no_label = ops_boxes.points_in_boxes(zone, boxes).any(0)
    boxes = ops_boxes.transform_boxes(boxes, vehicle_from_cloud(frame))
    numbers = [TYPES.index(name.upper()) for name in types]
    return make_objects([(segment, timestamp)], np.zeros(len(boxes)), numbers, boxes, scores, no_label=no_label)


def join_detections(parts, overlap):
    """Objects of `as_objects`, one a frame of a camera, as one. Where several cameras see one moment, a box that
    overlaps a better one of its type, seen from above, by more than `overlap` is left out.
    """
    found = join_objects(parts)
    cameras = Counter(part.frames[0] for part in parts)
    kept = np.ones(len(found), bool)
    for number, key in enumerate(found.frames):
        if cameras[key] > 1:
            rows = np.flatnonzero(found.frame == number)
            kept[rows] = ops_boxes.nms(found.box[rows], found.score[rows], overlap, found.type[rows])
    return found[kept]


# -----------------------------------------------------------------------------
# matching


def count_cutoffs(scores):
    """How many of CUTOFFS each score reaches: a box takes part at that many, from the first."""
    return np.searchsorted(CUTOFFS, scores, side="right")


def overlapping_pairs(predictions, truths, frame, truth_frame):
    """Pairs of boxes of a frame and a type that overlap enough: prediction, truth, and their overlap as an integer, in
    millionths. frame, truth_frame: numbers that both sides share."""
    group, truth_group = (f * len(TYPES) + o.type for f, o in ((frame, predictions), (truth_frame, truths)))
    order = np.argsort(truth_group, kind="stable")
    start, end = (np.searchsorted(truth_group[order], group, side) for side in ("left", "right"))
    last = np.cumsum(end - start)  # of each prediction's pairs
    piece = (last - 1) // PIECE
    found = []
    for rows in np.split(np.arange(len(group)), np.flatnonzero(np.diff(piece)) + 1):
        count = (end - start)[rows]
        p = np.repeat(rows, count)
        place = np.arange(len(p)) - np.repeat(np.cumsum(count) - count, count)
        t = order[start[p] + place]
        a, b = predictions.box[p], truths.box[t]
        reach = (np.hypot(a[:, 3], a[:, 4]) + np.hypot(b[:, 3], b[:, 4])) / 2
        sides = np.hstack([a[:, 3:6], b[:, 3:6]])
        near = np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]) < reach
        near &= ((sides > SIDES[0]) & (sides < SIDES[1])).all(1)
        p, t, a, b = p[near], t[near], a[near], b[near]
        overlap = ops_boxes.iou_3d(a, b).astype(np.float32)
        turned = a[:, 6] - b[:, 6]
        for i in np.flatnonzero((overlap > 0) & (turned != 0) & (abs(np.sin(2 * turned)) < PARALLEL)):
            overlap[i] *= not is_lost(a[i], b[i])
        enough = overlap >= THRESHOLDS[truths.type[t]]
        found.append((p[enough], t[enough], np.rint(overlap[enough] * np.float32(1e6)).astype(np.int64)))
    return tuple(np.concatenate(column) for column in zip(*found))


def is_lost(a, b):
    """Whether Waymo's tool finds no overlap of two boxes (7,) that do overlap.

    It walks along both outlines from crossing to crossing until it is back at the first (O'Rourke et al., "A new linear
    algorithm for intersecting convex polygons", 1982). Where sides lie on each other but for a float's rounding, it may
    not meet that again, and answers 0: so for one in a hundred boxes that are a label turned by half a circle. Its
    figures are matched, and with them this: floats are rounded here in its order.
    """
    p, q, i, j = outline(a), outline(b), 0, 0
    crossings, inner, left = [], None, 16  # steps
    while left:
        left -= 1
        p0, p1, q0, q1 = p[i], p[(i + 1) % 4], q[j], q[(j + 1) % 4]
        turn, side = cross(p0, p1, q1, q0), cross(q1, q0, p1, q0)
        point = crossing(p0, p1, q0, q1, turn)
        if point:
            if len(crossings) > 2 and point == crossings[0]:
                return False
            left = left if crossings else 8
            inner = "p" if side >= 0 else "q"
            add_new(crossings, point)
        if side < 0 if turn >= 0 else cross(p1, p0, q1, p0) >= 0:
            i, ended, name = (i + 1) % 4, p1, "p"
        else:
            j, ended, name = (j + 1) % 4, q1, "q"
        if inner == name:
            add_new(crossings, ended)
    return bool(crossings)


def outline(box):
    """The corners of a box (7,) from above as the tool rounds them, counter-clockwise: [(x, y)]."""
    x, y, _, length, width, _, yaw = box.tolist()
    dx, dy = math.cos(yaw) * (length / 2), math.sin(yaw) * (length / 2)
    (x0, y0), (x1, y1) = (x - dx, y - dy), (x + dx, y + dy)
    u, v = -(y1 - y0) * (1 / length) * (width / 2), (x1 - x0) * (1 / length) * (width / 2)
    return [(x0 + u, y0 + v), (x0 - u, y0 - v), (x1 - u, y1 - v), (x1 + u, y1 + v)]


def add_new(points, point):
    """Append a point that is neither the first nor the last of them."""
    if not points or point not in (points[0], points[-1]):
        points.append(point)


def cross(a, b, c, d):
    """(b - a) x (d - c) of points (x, y), exact where it is next to 0."""
    value = (b[0] - a[0]) * (d[1] - c[1]) - (b[1] - a[1]) * (d[0] - c[0])
    if abs(value) > EXACT:
        return value
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = (map(Fraction, point) for point in (a, b, c, d))
    return float((bx - ax) * (dy - cy) - (by - ay) * (dx - cx))


def crossing(p0, p1, q0, q1, turn):
    """Where two sides meet, or None. turn: `cross` of p0, p1, q1, q0."""
    if turn == 0:
        if cross(p0, p1, p0, q0) != 0:
            return None
        for a, b, point in ((q0, q1, p0), (q0, q1, p1), (p0, p1, q0), (p0, p1, q1)):
            if all(min(a[k], b[k]) <= point[k] <= max(a[k], b[k]) for k in (0, 1)):
                return point
        return None
    sign, slack = math.copysign(1, turn), max(abs(turn), 1) * EXACT
    along_p, along_q = cross(p0, q0, q1, q0), cross(p0, p1, p0, q0)
    from_ends = cross(p1, q1, q0, q1), cross(p1, p0, p1, q1)
    for along, from_end in zip((along_p, along_q), from_ends):
        if along * sign < 0 or along * sign > abs(turn) + slack:
            return None
        if along * sign > abs(turn) - slack and from_end * sign < 0:
            return None
    share = min(1.0, max(0.0, along_p / turn))
    return p0[0] + (p1[0] - p0[0]) * share, p0[1] + (p1[1] - p0[1]) * share


def match(p, t, overlap, reached):
    """The matching with the highest sum of overlaps at every cutoff. p, t, overlap: pairs of `overlapping_pairs`;
    reached: `count_cutoffs` of each pair's prediction.

    -> p, t, first, last: this pair is matched at the cutoffs from `first` up to, not including, `last`.

    Pairs that share no box, directly or by others, do not touch each other. Where all of such a part want one truth,
    nearly everywhere, the best of the predictions that take part has it.
    """
    if not len(p):
        return p, t, p, p
    _, a = np.unique(p, return_inverse=True)
    _, b = np.unique(t, return_inverse=True)
    size = a.max() + 1 + b.max() + 1
    links = coo_matrix((np.ones(len(a)), (a, a.max() + 1 + b)), (size, size))
    part = connected_components(links, directed=False)[1][a]
    truths_of = np.bincount(np.unique(np.stack([part, b]), axis=1)[0], minlength=part.max() + 1)
    simple = truths_of[part] == 1

    # best first; what the ones before reach is theirs
    rows = np.flatnonzero(simple)
    rows = rows[np.lexsort([-overlap[rows], part[rows]])]
    base = part[rows] * (len(CUTOFFS) + 1)  # keeps the running maxima of parts apart
    best = np.maximum.accumulate(base + reached[rows])
    first = np.maximum(np.append(0, best[:-1]) - base, 0)
    kept = reached[rows] > first
    found = [(p[rows], t[rows], first, reached[rows])]
    found = [tuple(column[kept] for column in found[0])]

    order = np.flatnonzero(~simple)
    order = order[np.argsort(part[order], kind="stable")]
    for rows in np.split(order, np.flatnonzero(np.diff(part[order])) + 1):
        if len(rows):
            found += assign(p[rows], t[rows], overlap[rows], reached[rows])
    return tuple(np.concatenate(column) for column in zip(*found))


def assign(p, t, overlap, reached):
    """`match` for pairs of one part, by the Hungarian method, again for every set of predictions that take part."""
    p_names, a = np.unique(p, return_inverse=True)
    t_names, b = np.unique(t, return_inverse=True)
    weights = np.zeros((len(p_names), len(t_names)), np.int64)
    weights[a, b] = overlap
    limit = np.zeros(len(p_names), np.int64)
    limit[a] = reached
    found, first = [], 0
    for last in np.unique(reached[reached > 0]):
        active = np.flatnonzero(limit >= last)
        i, j = linear_sum_assignment(weights[active], maximize=True)
        i = active[i]
        right = weights[i, j] > 0
        i, j = i[right], j[right]
        found.append((p_names[i], t_names[j], np.full(len(i), first), np.full(len(i), last)))
        first = last
    return found


# -----------------------------------------------------------------------------
# figures


def sum_at_cutoffs(shard, first, last, value, shards):
    """(shards, cutoffs): the sum of the values that count from cutoff `first` up to, not including, `last`."""
    change, value = np.zeros((shards, len(CUTOFFS) + 1)), np.asarray(value, float)
    np.add.at(change, (shard, first), value)
    np.add.at(change, (shard, last), -value)
    return change.cumsum(1)[:, :-1]


def heading_accuracy(heading, truth):
    """1 where headings are the same, 0 where they are opposite."""
    off = np.abs(np.remainder(heading - truth + np.pi, 2 * np.pi) - np.pi)
    return 1 - off / np.pi


def average_precision(precision, recall):
    """The area under precision over recall, both (cutoffs,). Between two recalls the precision is the best of those
    above; where more than DELTA lies between them, points in between keep that of the higher one."""
    best = {0.0: 1.0}
    for p, r in zip(precision.tolist(), recall.tolist()):
        best[r] = max(best.get(r, 0.0), p)
    curve, highest, last = [], 0.0, 0.0
    for r in sorted(best, reverse=True):
        while last - r > DELTA + 1e-6:
            last -= DELTA
            curve.append((highest, last))
        highest = max(highest, best[r])
        curve.append((highest, r))
        last = r
    if len(curve) > 1:
        curve[-1] = curve[-2][0], 0.0  # the precision of 1 at recall 0 is made up
    p, r = np.array(curve).T
    return float(((r[:-1] - r[1:]) * (p[:-1] + p[1:])).sum() / 2)


def judge_shards(predictions, truths, pairs, shard, truth_shard, shards):
    """mAP, mAPH and the number of labels of each shard and level: -> [[{"mAP", "mAPH", "n"} of each level]]. Pairs are
    of boxes in one shard."""
    p, t, first, last = match(*pairs, count_cutoffs(predictions.score)[pairs[0]])
    at_cutoffs = lambda value: sum_at_cutoffs(truth_shard[t], first, last, value, shards)
    right = at_cutoffs(np.ones(len(p)))
    turned = at_cutoffs(heading_accuracy(predictions.box[p, 6], truths.box[t, 6]))
    counts = ~predictions.no_label
    reached = count_cutoffs(predictions.score)
    wrong = sum_at_cutoffs(shard, np.zeros_like(shard), reached, counts, shards) - at_cutoffs(counts[p])
    results = []
    for level in (1, 2):
        asked = truths.level <= level
        n = np.bincount(truth_shard[asked], minlength=shards)
        missed = n[:, None] - at_cutoffs(asked[t])
        recall = right / np.maximum(right + missed, 1)
        figures = []
        for hits in (right, turned):
            precision = hits / np.maximum(right + wrong, 1)
            precision[recall == 0] = 1
            figures.append([average_precision(*row) for row in zip(precision, recall)])
        results.append([{"mAP": ap, "mAPH": aph, "n": int(k)} for ap, aph, k in zip(*figures, n)])
    return [dict(zip(LEVELS, shard)) for shard in zip(*results)]


def evaluate(predictions, truths):
    """Waymo's figures, as shares. predictions, truths: Objects.

    -> {"VEHICLE": {"LEVEL_1": {"mAP": .., "mAPH": .., "n": labels}, "LEVEL_2": the same, "[0, 30)": {"LEVEL_1": ..,
    "LEVEL_2": ..}, other RANGES}, other types, "ALL_NS": {"LEVEL_1": means over MEAN, sums of n, ..}}.

    Labels without a point are not asked for; where their level is not annotated, it follows from the number of points.
    A prediction in a no-label zone may be right, and is not wrong otherwise. Frames that only one of the two has count:
    all that is there is missed, or is wrong.
    """
    truths = truths[(truths.points > 0) & (truths.type > 0)]
    truths = dataclasses.replace(truths, level=difficulty(truths))
    predictions = predictions[predictions.type > 0]
    numbers = {}
    frame, truth_frame = (
        np.array([numbers.setdefault(key, len(numbers)) for key in o.frames], np.int64)[o.frame]
        for o in (predictions, truths)
    )
    far, truth_far = (np.digitize(np.linalg.norm(o.box[:, :3], axis=1), FAR) for o in (predictions, truths))
    p, t, overlap = overlapping_pairs(predictions, truths, frame, truth_frame)
    by_type = judge_shards(predictions, truths, (p, t, overlap), predictions.type, truths.type, len(TYPES))
    shard, truth_shard = (o.type * len(RANGES) + f for o, f in ((predictions, far), (truths, truth_far)))
    same = shard[p] == truth_shard[t]
    pairs = p[same], t[same], overlap[same]
    by_range = judge_shards(predictions, truths, pairs, shard, truth_shard, len(TYPES) * len(RANGES))
    found = {}
    for k, name in list(enumerate(TYPES))[1:]:
        found[name] = by_type[k] | dict(zip(RANGES, by_range[k * len(RANGES) :]))
    found["ALL_NS"] = {}
    for level in LEVELS:
        rows = [found[name][level] for name in MEAN]
        mean = {key: float(np.mean([row[key] for row in rows])) for key in ("mAP", "mAPH")}
        found["ALL_NS"][level] = mean | {"n": sum(row["n"] for row in rows)}
    return found


def difficulty(labels):
    """1 or 2 of each label: as annotated, or 2 where at most FEW points are in it."""
    return np.where(labels.level > 0, labels.level, np.where(labels.points <= FEW, 2, 1))


def check_frames(predictions, truths, path):
    """Do predictions, of the file `path`, and labels belong together? -> a note to print, or None. Raises BadInput for
    predictions in a segment of which no frame is labelled.

    Single frames of known segments may have no label: nothing was there. Waymo's files do not tell them from unknown
    ones, and its tool takes what is predicted there for wrong.
    """
    known = set(truths.frames)
    segments = {segment for segment, _ in set(predictions.frames) & known}
    strange = sorted(set(predictions.frames) - known)
    unknown = [key for key in strange if key[0] not in segments]
    if unknown:
        segment, timestamp = unknown[0]
        raise BadInput(
            f"{path}: {len(unknown)} of its {len(predictions.frames)} frames are of segments without labels; "
            f"{segment} {timestamp} is the first"
        )
    missing = len(known - set(predictions.frames))
    notes = []
    if strange:
        notes.append(f"{len(strange)} frames have predictions and no label: all in them is wrong")
    if missing:
        notes.append(f"{missing} frames have labels and no prediction: all in them is missed")
    return f"note: {path}: {'; '.join(notes)}" if notes else None


def is_standard(frames):
    """Whether frames, (segment, timestamp) each, are of all of validation, which published figures are of: every one,
    or every fifth."""
    segments = sorted({segment for segment, _ in frames})
    return len(set(frames)) > VAL_FRAMES and data.fingerprint(segments) == VAL_SEGMENTS


def table(found, published=False):
    """Lines of text for a result of `evaluate`. published: with PUBLISHED, which is of all of validation."""
    rows = []
    for name, figures in found.items():
        rows.append((name, figures))
        rows += [(f"{name} {r} m", figures[r]) for r in RANGES if r in figures]
    others = [(f"{who}: {name}", ap) for who, figures in PUBLISHED.items() for name, ap in figures.items()]
    others = others if published else []
    width = max(len(name) for name, _ in rows + others)
    lines = [
        "Waymo 3D detection: labels that count; mAP and mAPH in percent",
        f"{'':{width}}" + "".join(f"{level:^28}" for level in LEVELS),
        f"{'':{width}}" + "".join(f"{'labels':>10}{'mAP':>9}{'mAPH':>9}" for _ in LEVELS),
    ]
    for name, figures in rows:
        line = f"{name:>{width}}"
        for level in LEVELS:
            n = figures[level]["n"]
            shown = [f"{100 * figures[level][key]:.2f}" if n else "-" for key in ("mAP", "mAPH")]
            line += f"{n:>10}{shown[0]:>9}{shown[1]:>9}"
        lines.append(line)
    for name, ap in others:
        pairs = [f"{'-':>10}{ap[i]:>9.2f}{ap[i + 1]:>9.2f}" for i in (0, 2)]
        lines.append(f"{name:>{width}}" + "".join(pairs))
    return lines
