"""What is drawn of 3D detection: the curves of a run, and boxes on an image and from above."""

import textwrap

import numpy as np

import data
import ops_boxes
from files import read_log
from pictures import curve, draw_panels, from_above, limit_to_image, new_figure, save_figure

LABELLED, FOUND = "tab:green", "tab:red"
RING = [0, 1, 2, 3, 0, 4, 5, 6, 7, 4]  # a path along the edges of a box's bottom, one upright edge, and its top
UPRIGHT = [[1, 5], [2, 6], [3, 7]]  # the other upright edges
SHOWN = 0.3  # of detections, the score from which they are drawn
LINE = 140  # letters above a picture


def draw_curves(log_path, path, what, losses, title, headline, rate):
    """The losses, figures of unseen frames where they were asked for more than once, and the learning rate, to a PNG.

    what: key of judgements in the log; losses: names, of those that a run has; headline(judgement) -> {name: figure};
    title: what those are; rate: what the learning rate is of.
    """
    lines = read_log(log_path)
    log = [line for line in lines if "lr" in line]
    judged = [line for line in lines if what in line]
    drawn = [name for name in losses if log and name in log[0]]
    scores = []
    if len(judged) > 1:
        heads = [headline(line[what]) for line in judged]
        for name in heads[0]:
            scores.append(curve(judged, [head[name] for head in heads], marker="o", ms=3, label=name))
    panels = {
        "losses": [curve(log, [line[name] for line in log], label=name) for name in drawn],
        f"unseen frames: {title}": scores,
        "learning rate": [curve(log, [line["lr"][0] for line in log], label=rate)],
    }
    draw_panels(panels if log else {}, path)


def draw_boxes(scene, boxes, scores, classes, path, title, shown=SHOWN):
    """Are the boxes right? Labelled boxes green, found ones red and dashed, on the image and seen from above.

    scene: data_det3d.Scene; boxes (n, 7), scores (n,), classes (n,): of a detector. Those above a score of `shown` are
    drawn, with their scores. -> what was found, in words.
    """
    chosen = scores > shown
    boxes, scores, classes = boxes[chosen], scores[chosen], classes[chosen]
    known = scene.classes >= 0
    truth, truth_classes = scene.boxes[known], scene.classes[known]
    counts = []
    for k, name in enumerate(scene.names):
        labelled, found = (truth_classes == k).sum(), (classes == k).sum()
        if len(scene.names) <= 3 or labelled or found:
            counts.append(f"{name} {labelled} labelled, {found} found")
    said = "; ".join(counts) or "nothing labelled, nothing found"
    lines = textwrap.wrap(said, LINE)

    height, width = scene.image.shape[:2]
    tall = 14 * height / width + 0.25 * (len(lines) - 1)  # inches of the image and of further lines above it
    figure = new_figure(14, tall + 9.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[tall + 0.8, 8.6])
    on_image, above = top.subplots(), bottom.subplots()

    on_image.imshow(scene.image)
    above.scatter(-scene.points[:, 1], scene.points[:, 0], s=0.6, c="0.6", linewidths=0)
    for box in truth:
        _draw_box(on_image, above, scene.lidar2img, box, LABELLED, "-")
    room = Room(width / 14)
    for i in np.hypot(boxes[:, 0], boxes[:, 1]).argsort():  # the nearest first, whose words stay
        words, rise = f"{scene.names[classes[i]]} {scores[i]:.2f}", 1.3 * (classes[i] % 3 - 1)
        _draw_box(on_image, above, scene.lidar2img, boxes[i], FOUND, "--", words, rise, room)

    colours = f"labelled boxes green, found ones (score above {shown}) red and dashed"
    top.suptitle(f"{title}: {colours}\n" + "\n".join(lines), fontsize=12)
    limit_to_image(on_image, height, width)
    on_image.axis("off")
    from_above(above, "the same from above, with the sweep; a line inside a box points ahead")
    ahead, aside = ([float(box[axis]) for box in (*truth, *boxes)] for axis in (0, 1))
    wide = max([28.0, *(abs(y) + 8 for y in aside)])
    above.set_ylim(min([0.0, *(x - 8 for x in ahead if x < 0)]), max([30.0, *(x + 8 for x in ahead)]))
    above.set_xlim(-wide, wide)
    save_figure(figure, path)
    return said


class Room:
    """Room for words on an image. Those that would cover others are left out; seen from above all words stand."""

    def __init__(self, inch):
        self.wide, self.tall = 0.6 * inch, 0.15 * inch  # of a class and a score, in pixels, of which `inch` are an inch
        self.taken = []

    def take(self, left, top):
        """Whether there is room at this pixel, which is then taken."""
        if any(abs(left - x) < self.wide and abs(top - y) < self.tall for x, y in self.taken):
            return False
        self.taken.append((left, top))
        return True


def _draw_box(on_image, above, lidar2img, box, colour, dashes, said="", rise=0.0, room=None):
    """One box in both pictures, with words beside it: seen from above `rise` metres higher, on the image where there is
    room."""
    corners = ops_boxes.corners(box)  # (8, 3)
    uv, depth = data.project(corners, lidar2img)
    if depth.min() > 0.5:
        for path in (RING, *UPRIGHT):
            on_image.plot(*uv[path].T, dashes, c=colour, lw=1.4)
        left, top = uv.min(0)
        left = left if uv[:, 0].max() < 0 else max(left, 0)  # words of a box that begins outside stand at the border
        paper = {"fc": "white", "alpha": 0.7, "pad": 0.8, "lw": 0}
        if said and room.take(left, top):
            on_image.text(left, top - 3, said, color=colour, fontsize=8, va="bottom", bbox=paper, clip_on=True)
    ring = corners[RING[:5]]
    above.plot(-ring[:, 1], ring[:, 0], dashes, c=colour, lw=1.6)
    ahead = box[:2] + box[3] * 0.75 * np.array([np.cos(box[6]), np.sin(box[6])])
    above.plot([-box[1], -ahead[1]], [box[0], ahead[0]], dashes, c=colour, lw=1.2)
    above.text(-box[1] + 1.2, box[0] + rise, said, color=colour, fontsize=9, va="center", clip_on=True)
