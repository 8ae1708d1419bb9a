"""Anchors: boxes of usual sizes on a grid seen from above, which answer for objects. Codes, targets, losses, answers.

    anchors = anchor_grid(layout)                                        of data_det3d.Layout, which knows its Protocol
    target = assign(anchors, boxes, classes, protocol)                   which anchor answers for which box
    losses = detection_losses(*answers, anchors, target, protocol)       of a network that answers for every anchor
    boxes, scores, classes = select(*answers, anchors, protocol)         what it has found

A `Protocol` is what a data set decides: its classes, their anchors, how many boxes there may be.
Constants are mmdetection3d 0.13's: the release's for KITTI, those of SECOND (hv_second_secfpn_waymo.py) for Waymo.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import ops_boxes

YAWS = (-math.pi / 2, -math.pi)  # of anchors; mmdetection3d's 0 and pi / 2, whose yaw is -pi / 2 - ours
GAMMA, ALPHA, BETA = 2.0, 0.25, 1 / 9  # of the focal loss, and of smooth L1
DIRECTION_WEIGHT = 0.2
MIN_SCORE = 0.1  # of a prediction


# -----------------------------------------------------------------------------
# what a data set decides


@dataclass(frozen=True)
class Anchor:
    """The usual box of a class, metres, and how much of it, seen from above (IoU), an object must have in common with
    it."""

    width: float
    length: float
    height: float
    bottom: float  # z of its lower face
    positive: float  # from here on an anchor is the object's
    negative: float  # below it is background
    least: float  # from here on at least an object's best anchor is taken


@dataclass(frozen=True)
class Protocol:
    """What is looked for in a data set, and how much of a network's answers is taken."""

    anchors: dict[str, Anchor]  # by class, in the order of the head's answers
    direction: float  # headings from here on for half a turn are bin 0
    box_weight: float  # of the boxes' loss
    before_nms: int  # anchors, the best of a frame
    nms_overlap: float  # seen from above
    after_nms: int  # boxes, the best of a frame
    in_view: bool  # points that the camera does not see are left out: nothing out there is labelled

    @property
    def classes(self):
        return tuple(self.anchors)


PROTOCOLS = {
    "kitti": Protocol(
        {
            "Pedestrian": Anchor(0.6, 0.8, 1.73, -0.6, 0.35, 0.2, 0.2),
            "Cyclist": Anchor(0.6, 1.76, 1.73, -0.6, 0.35, 0.2, 0.2),
            "Car": Anchor(1.6, 3.9, 1.56, -1.78, 0.6, 0.45, 0.45),
        },
        direction=math.pi / 2,  # no road runs across, where the bins meet
        box_weight=2.0,
        before_nms=100,
        nms_overlap=0.01,
        after_nms=50,
        in_view=True,
    ),
    "waymo": Protocol(
        {
            "Vehicle": Anchor(2.08, 4.73, 1.77, -0.0345, 0.55, 0.4, 0.4),
            "Pedestrian": Anchor(0.84, 0.91, 1.74, 0.0, 0.5, 0.3, 0.3),
            "Cyclist": Anchor(0.84, 1.81, 1.77, -0.1188, 0.5, 0.3, 0.3),
        },
        direction=math.pi / 4,
        box_weight=1.0,
        before_nms=4096,
        nms_overlap=0.25,
        after_nms=500,
        in_view=False,
    ),
}


# -----------------------------------------------------------------------------
# boxes as codes of anchors


def anchor_grid(layout):
    """(Y, X, classes, yaws, 7) boxes. Cell i of an unenlarged map is centred on voxel 8 i."""
    x, y = (
        (layout.stride * (torch.arange(layout.cells[axis]) + 0.5) - 3.5) * layout.voxel[axis] + layout.range[axis]
        for axis in (0, 1)
    )
    usual = layout.protocol.anchors.values()
    boxes = torch.zeros(len(y), len(x), len(usual), len(YAWS), 7)
    boxes[..., 0] = x[None, :, None, None]
    boxes[..., 1] = y[:, None, None, None]
    for k, anchor in enumerate(usual):
        middle = anchor.bottom + anchor.height / 2
        boxes[:, :, k, :, 2:6] = torch.tensor([middle, anchor.length, anchor.width, anchor.height])
    boxes[..., 6] = torch.tensor(YAWS)
    return boxes


def encode(boxes, anchors):
    """Boxes (..., 7) as codes relative to their anchors (..., 7): offsets over the anchor's diagonal and height, logs
    of ratios (width, length, height), and the difference of yaws, its sign mmdetection3d's (SECOND, section 3.3).
    """
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])
    x, y = ((boxes[..., i] - anchors[..., i]) / diagonal for i in (0, 1))
    z = (boxes[..., 2] - anchors[..., 2]) / anchors[..., 5]
    width, length, height = (torch.log(boxes[..., i] / anchors[..., i]) for i in (4, 3, 5))
    return torch.stack([x, y, z, width, length, height, anchors[..., 6] - boxes[..., 6]], -1)


def decode(codes, anchors):
    """The inverse of encode."""
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])
    x, y = (codes[..., i] * diagonal + anchors[..., i] for i in (0, 1))
    z = codes[..., 2] * anchors[..., 5] + anchors[..., 2]
    width, length, height = (torch.exp(codes[..., i]) * anchors[..., a] for i, a in ((3, 4), (4, 3), (5, 5)))
    return torch.stack([x, y, z, length, width, height, anchors[..., 6] - codes[..., 6]], -1)


def direction_bin(yaw, protocol):
    """0 for headings from protocol.direction on for half a turn, else 1."""
    return (torch.remainder(yaw - protocol.direction, 2 * math.pi) >= math.pi).long()


# -----------------------------------------------------------------------------
# which anchor answers for which box


def assign(anchors, boxes, classes, protocol):
    """Which anchor answers for which box. anchors (Y, X, K, R, 7), boxes (B, M, 7), classes (B, M), -1 for none.

    An anchor belongs to the box of its class with which it overlaps most, seen from above with yaws rounded to quarter
    turns, where that is enough; and a box's best anchors are its own from a lower threshold on, even if another box
    overlaps them more (mmdetection3d's MaxIoUAssigner; where it is the best of several, the last box has it there, and
    here the one that it overlaps most).
    -> dict(classes (B, A): index, -1 background, -2 neither; boxes (B, A, 7), of the positive ones).
    """
    labels, owners = [], []
    for k, anchor in enumerate(protocol.anchors.values()):
        overlap = torch.stack([grid_overlap(anchors[:, :, k, r], boxes) for r in range(len(YAWS))], 3)
        overlap = overlap.masked_fill((classes != k)[:, None, None, None], -1.0)  # (B, Y, X, R, M)
        best, owner = overlap.max(4)
        label = torch.where(best >= anchor.positive, k, torch.where(best < anchor.negative, -1, -2))
        highest = overlap.amax((1, 2, 3), keepdim=True)
        favourite = (overlap == highest) & (highest >= anchor.least)  # an anchor that the box overlaps as well as any
        claim, claimant = overlap.masked_fill(~favourite, -1.0).max(4)
        owners.append(torch.where(claim >= 0, claimant, owner))
        labels.append(torch.where(claim >= 0, k, label))
    label, owner = (torch.stack(parts, 3).flatten(1) for parts in (labels, owners))  # (B, A)
    return {"classes": label, "boxes": torch.take_along_dim(boxes, owner[..., None], 1)}


def grid_overlap(anchors, boxes):
    """ops_boxes.nearest_bev_iou of anchors (Y, X, 7), a grid of one box, with boxes (B, M, 7) -> (B, Y, X, M).

    Such overlaps are products of what columns and rows have in common: two operations a pair, not twenty.
    """
    half_x, half_y = ops_boxes.half_sides(anchors[0, 0])
    box_x, box_y = ops_boxes.half_sides(boxes)  # (B, M)
    columns, rows = anchors[0, :, 0, None], anchors[:, 0, 1, None]  # (X, 1), (Y, 1)

    def common(at, half, centre, box_half):
        high = torch.minimum(at + half, (centre + box_half)[:, None])
        low = torch.maximum(at - half, (centre - box_half)[:, None])
        return (high - low).clamp(min=0)  # (B, cells, M)

    x = common(columns, half_x, boxes[..., 0], box_x)
    y = common(rows, half_y, boxes[..., 1], box_y)
    shared = y[:, :, None] * x[:, None]  # (B, Y, X, M)
    areas = 4 * (half_x * half_y + box_x * box_y)
    return shared / (areas[:, None, None] - shared).clamp(min=1e-9)


# -----------------------------------------------------------------------------
# losses and answers


def detection_losses(scores, codes, directions, anchors, target, protocol):
    """Focal loss of all anchors but those that are neither; smooth L1 of codes, with the sine of the yaws' difference,
    and cross-entropy of directions, of positive ones. All over the number of positives, one at least for each frame.
    -> dict of scalars."""
    label = target["classes"]
    positive = label >= 0
    count = positive.sum(1).clamp(min=1).sum().float()
    wanted = F.one_hot(label.clamp(min=0), len(protocol.anchors)) * positive[..., None]
    probability = scores.sigmoid()
    wrong = torch.where(wanted > 0, 1 - probability, probability)
    balance = torch.where(wanted > 0, ALPHA, 1 - ALPHA)
    focal = balance * wrong.pow(GAMMA) * F.binary_cross_entropy_with_logits(scores, wanted.float(), reduction="none")
    focal = (focal * (label > -2)[..., None]).sum() / count

    # masks over all anchors, not indices: no GPU is waited for. Codes of anchors without a box are anything but NaN
    boxes = torch.where(positive[..., None], target["boxes"], anchors)
    difference = codes - encode(boxes, anchors)
    difference = torch.cat([difference[..., :6], difference[..., 6:].sin()], -1)
    distance = F.smooth_l1_loss(difference, torch.zeros_like(difference), beta=BETA, reduction="none")
    box = protocol.box_weight * (distance * positive[..., None]).sum() / count
    crossed = F.cross_entropy(directions.transpose(1, 2), direction_bin(boxes[..., 6], protocol), reduction="none")
    direction = DIRECTION_WEIGHT * (crossed * positive).sum() / count
    return {"classes": focal, "boxes": box, "direction": direction}


def select(scores, codes, directions, anchors, protocol):
    """The raw answers of all anchors -> boxes (B, K, 7), scores (B, K), classes (B, K), best first, at most
    protocol.after_nms.

    The best anchors, protocol.before_nms, by their best class; those above MIN_SCORE; suppression class by class. A
    score of 0 says that there is no box. Waits for the device, to compare no more boxes than there are.
    """
    scores = scores.sigmoid()
    above = (scores.amax(2) > MIN_SCORE).sum(1).max()
    top = scores.amax(2).topk(min(protocol.before_nms, max(1, int(above)))).indices  # (B, K)
    pick = lambda x: torch.take_along_dim(x, top[..., None], 1)
    scores, boxes = pick(scores), decode(pick(codes), anchors[top])
    half_turns = pick(directions).argmax(2)
    start = protocol.direction
    yaw = start + torch.remainder(boxes[..., 6] - start, math.pi) + math.pi * half_turns
    boxes = torch.cat([boxes[..., :6], torch.remainder(yaw + math.pi, 2 * math.pi)[..., None] - math.pi], -1)
    by_class = scores.transpose(1, 2)  # (B, 3, K)
    by_class = by_class.masked_fill(by_class <= MIN_SCORE, -torch.inf)
    kept = ops_boxes.nms(boxes[:, None], by_class, protocol.nms_overlap)
    final = (by_class.masked_fill(~kept, 0.0)).flatten(1)  # (B, 3 K)
    best, at = final.topk(min(protocol.after_nms, final.shape[1]))
    classes, rows = at // by_class.shape[2], at % by_class.shape[2]
    return torch.take_along_dim(boxes, rows[..., None], 1), best, classes
