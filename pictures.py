"""Every picture that the programs draw. A stranger should read each without being told more: titles say what to look
for, axes are in metres or pixels, and what is seen from above has forward up and left on the left.

Curves and pairs end a training run. `python eval.py show` draws projection, pairs, features and similarity of one
frame. `draw_depth` draws a depth map beside its ground truth, `draw_overlay` the frames of a data set. The functions
take the PNG to write, and a model of simipu.py with a batch of data.augment, of which they draw the first frame. What
they measure on the way comes back as a line of text.
"""

import copy
import os

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

import data
import ops_triton as ops
from files import BadInput, read_log, writing

STEP = 8  # pixels between image features in a picture; between them colours are interpolated
FAR = 50.0  # metres; depth colours end here
DPI = 100
DEPTH = {"cmap": "turbo", "vmin": 0, "vmax": FAR}  # how depth becomes a colour
TITLE, SMALL_TITLE = 11, 10  # points of type


def _matplotlib():
    """matplotlib, imported where something is drawn: it takes a second, and training draws only at its end.

    A notebook leaves its own backend in MPLBACKEND for all that it starts, and the import refuses one that is not
    installed. Figures are written to files without pyplot, so that a notebook's own plots stay as they were.
    """
    os.environ["MPLBACKEND"] = "agg"
    import matplotlib.collections
    import matplotlib.colors
    import matplotlib.figure
    import matplotlib.patches
    import matplotlib.ticker

    return matplotlib


def new_figure(width, height):
    """An empty figure of so many inches."""
    return _matplotlib().figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path, dpi=DPI):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def _pixels(view):
    """The first image of a batch, (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return (view["image"][0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _grey(image, darkest):
    """An image (H, W, 3) without its colours, and its blacks no darker than so, (H, W, 3)."""
    grey = darkest + (1 - darkest) * image.mean(2, keepdims=True)
    return np.repeat(grey, 3, 2)


def _numpy(view, *keys):
    """The first frame's tensors of a batch, float64 on the CPU."""
    return [view[key][0].double().cpu().numpy() for key in keys]


def _mirrored(view):
    """Whether the image of the first frame is flipped: view beta then is too, and T turns left into right."""
    return bool(torch.linalg.det(view["T"][0, :3, :3].double()) < 0)


def _dot(count, area=42):
    """Size of a marker, in square points, so that so many places do not hide what lies beneath."""
    return float(np.clip(area * 170 / count, area / 4, area))


def from_above(axis, title, left=True):
    axis.set_title(title, fontsize=SMALL_TITLE)
    axis.set(aspect="equal", xlabel="right, m", ylabel="forward, m" if left else "")


def limit_to_image(axis, height, width):
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


# -----------------------------------------------------------------------------
# a run's own pictures

LOSSES = (("intra", "tab:blue"), ("inter", "tab:orange"), ("moco", "tab:purple"))
CURVES = (  # title of the panel; key in the log, behind a loss; factor; line; label, behind the same
    ("InfoNCE loss", "", 1, "-", ""),
    ("InfoNCE loss", "_chance", 1, ":", ", chance"),
    ("top-1, %", "_top1", 100, "-", ""),
    ("mean cosine", "_positive", 1, "-", ", matched"),
    ("mean cosine", "_negative", 1, ":", ", unmatched"),
)


def curve(lines, values, **style):
    """Values at the steps of a log's lines, as `draw_panels` takes them."""
    return [line["step"] for line in lines], values, style


def draw_curves(log_path, path):
    """Losses with their chance levels, top-1, mean cosines and, if the run was judged more than once, matching on
    unseen frames (gain and ranks), from log.jsonl to a PNG.
    """
    lines = read_log(log_path)
    log = [line for line in lines if "lr" in line]
    judged = [line for line in lines if "gain" in line.get("match", ())]
    panels = {title: [] for title, *_ in CURVES}
    for loss, colour in LOSSES:
        if not log or loss not in log[0]:
            continue  # a branch that the run does not have
        for title, key, factor, dashes, label in CURVES:
            values = [factor * line[loss + key] for line in log]
            panels[title].append(curve(log, values, color=colour, ls=dashes, label=loss + label))
    if len(judged) > 1:
        gained = panels["unseen frames: gain, nats"] = []
        for values, dashes, label in (
            ([line["match"]["gain"] for line in judged], "-", "gain"),
            ([line["match"]["gain_interval"][0] for line in judged], ":", "95 % over frames"),
            ([line["match"]["gain_interval"][1] for line in judged], ":", None),
        ):
            gained.append(curve(judged, values, color="tab:green", ls=dashes, marker="o", ms=3, label=label))
        matched = panels["unseen frames: median rank, %"] = []
        for which, colour, label in (
            ("right", "tab:green", "the right image"),
            ("wrong", "tab:red", "another frame's"),
        ):
            values = [line["match"][f"{which}_rank"] for line in judged]
            matched.append(curve(judged, values, color=colour, marker="o", ms=3, label=label))
    draw_panels(panels, path)


def draw_depth_curves(log_path, path):
    """Loss, relative error on training crops and, at the steps it was judged, on whole unseen images, and the learning
    rate, from log.jsonl to a PNG.
    """
    lines = read_log(log_path)
    log = [line for line in lines if "lr" in line]
    judged = [line for line in lines if "depth" in line]
    if not log:
        return
    errors = [curve(log, [100 * line["abs_rel"] for line in log], color="tab:blue", label="training crops")]
    if judged:
        unseen = [100 * line["depth"]["eigen"]["abs_rel"] for line in judged]
        errors.append(curve(judged, unseen, color="tab:green", marker="o", ms=3, label="unseen images"))
    panels = {
        "loss": [curve(log, [line["loss"] for line in log], label="SigLoss")],
        "abs_rel, %": errors,
        "learning rate": [curve(log, [line["lr"][0] for line in log], label="AdamW")],
    }
    draw_panels(panels, path, logarithmic=["abs_rel, %"])


def draw_against_frames(lines, title, path):
    """{label: {number of frames: figures of all seeds}} -> a PNG: means, with bars from the least to the greatest."""
    figure = new_figure(6, 4)
    axis = figure.subplots()
    for label, line in lines.items():
        means, least, greatest = (np.array([of(v) for v in line.values()]) for of in (np.mean, np.min, np.max))
        axis.errorbar(list(line), means, (means - least, greatest - means), label=label, marker="o", capsize=3)
    axis.set(xscale="log", xlabel="frames pre-trained on", ylabel=title)
    counts = sorted(set().union(*lines.values()))
    axis.set_xticks(counts, list(map(str, counts)), minor=False)
    axis.minorticks_off()
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=110)


def draw_panels(panels, path, logarithmic=()):
    """{title: [(x, y, style)]}, side by side; those in `logarithmic` have a log scale. Nothing is drawn where there is
    nothing to draw, as for a finished run whose log was deleted.
    """
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return
    figure = new_figure(1 + 4 * len(panels), 3.6)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items()):
        for x, y, style in curves:
            axis.plot(x, y, **style)
        if title in logarithmic:
            plain = _matplotlib().ticker.LogFormatter()
            axis.set_yscale("log")
            axis.yaxis.set(major_formatter=plain, minor_formatter=plain)
        axis.set(title=title, xlabel="step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    save_figure(figure, path, dpi=110)


@torch.no_grad()
def draw_pairs(model, view, path, match_places):
    """Are projection and matching right? match_places(alpha, beta) is the matching to show, on float64 places (P, 3) in
    one frame.

    Above, the augmented image with the sweep on it, coloured by depth, and the encoder's places ringed: edges of things
    and jumps of colour must agree. Below, view alpha from above; view beta, each place in the colour of its match in
    alpha; and both in alpha's frame, beta brought back by T^-1, with a line for every match: the lines must be short.
    -> what was measured.
    """
    encoder = copy.deepcopy(model.pts_backbone).eval()
    places_alpha, places_beta = (encoder(view[key][:1])[0][0].double().cpu().numpy() for key in ("alpha", "beta"))
    T, lidar2img, alpha, beta = _numpy(view, "T", "lidar2img", "alpha", "beta")
    partner = match_places(places_alpha @ T[:3, :3].T + T[:3, 3], places_beta)
    places_beta = places_beta[partner]
    back = (places_beta - T[:3, 3]) @ np.linalg.inv(T[:3, :3]).T  # view beta in the frame of view alpha
    distance = np.linalg.norm(places_alpha - back, axis=1)
    share = f"{100 * (distance < 0.01).mean():.0f} % coincide"

    figure = new_figure(14, 10)
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.42, 0.58])
    _draw_places_on_image(top, view, alpha, places_alpha, lidar2img)
    left, middle, right = bottom.subplots(1, 3)
    # around the middle of the scene, so that neighbours have like colours
    bearing = np.arctan2(places_alpha[:, 1], places_alpha[:, 0] - 25)
    colours = _matplotlib().colormaps["hsv"](bearing / (2 * np.pi) % 1)
    for axis, cloud, places in ((left, alpha, places_alpha), (middle, beta, places_beta)):
        axis.scatter(-cloud[::4, 1], cloud[::4, 0], s=0.3, c="0.7")
        axis.scatter(-places[:, 1], places[:, 0], c=colours, s=10)
    left.set_title("view alpha from above")
    middle.set_title("view beta, in the colours of its matches")

    for p, q, colour in zip(places_alpha, back, colours):
        right.plot([-p[1], -q[1]], [p[0], q[0]], c=colour, lw=1)
    right.scatter(-places_alpha[:, 1], places_alpha[:, 0], c=colours, s=10)
    right.scatter(-back[:, 1], back[:, 0], facecolors="none", edgecolors="black", s=18, linewidths=0.5)
    right.set_title(f"both in alpha's frame: {distance.mean():.2f} m apart, {share}")
    for axis in (left, middle, right):
        axis.set_aspect("equal")
        axis.set_xlabel("right, m")
    left.set_ylabel("forward, m")
    save_figure(figure, path)
    apart = f"matches {distance.mean():.2f} m apart on average, {distance.max():.2f} m at most"
    return f"{len(places_alpha)} places, {apart}, {share}"


def _draw_places_on_image(part, view, cloud, places, lidar2img):
    """The image, the sweep on it in the colours of its depth, and places as larger, ringed dots."""
    image = _pixels(view)
    height, width = image.shape[:2]
    axis = part.subplots()
    axis.imshow(image)
    ringed = {"s": _dot(len(places), 26), "edgecolors": "black", "linewidths": 0.8}
    for points, style in ((cloud, {"s": 1.2}), (places, ringed)):
        uv, depth = data.project(points, lidar2img)
        seen = data.inside_image(uv, depth, width, height)
        dots = axis.scatter(*uv[seen].T, c=depth[seen], **DEPTH, **style)
    part.colorbar(dots, ax=axis, label="depth, m", shrink=0.7, pad=0.01, extend="max")
    mirrored = ", mirrored as view beta is" if _mirrored(view) else ""
    axis.set_title(f"view alpha on the augmented image{mirrored}; its {len(places)} places ringed")
    axis.axis("off")


# -----------------------------------------------------------------------------
# what the features of one frame say


@torch.no_grad()
def dense_embedding(model, image, step=STEP):
    """Eq. 7's image features, l2-normalised, on a grid of pixels: image (1, 3, H, W) -> (h, w, D), where cell (i, j) is
    what a place at pixel u = step j, v = step i would be compared with.
    """
    maps = model.img_backbone(image)
    rows, columns = (torch.arange(0, edge, step, device=image.device) for edge in image.shape[2:])
    v, u = torch.meshgrid(rows, columns, indexing="ij")  # (h, w)
    uv = torch.stack([u, v], -1).view(1, -1, 2).float()
    features = [_pixel_features(model, maps, part) for part in uv.split(8192, dim=1)]  # for the memory's sake
    return torch.cat(features).view(*u.shape, -1)


def _pixel_features(model, maps, uv):
    """Eq. 7's image features at pixels uv (1, n, 2), l2-normalised: (n, D)."""
    return F.normalize(model.mlp_cross_img(model.at_pixels(maps, uv)[0]), dim=1)


def on_image(grid, step, height, width):
    """A grid (h, w, C) whose cell (i, j) is centred on pixel u = step j, v = step i, at every pixel: (height, width,
    C), bilinear, and constant beyond the outermost cells.
    """
    h, w, C = grid.shape
    v, u = torch.meshgrid(torch.arange(height) / step, torch.arange(width) / step, indexing="ij")
    uv = torch.stack([u.clamp(max=w - 1), v.clamp(max=h - 1)], -1).view(1, -1, 2)
    feature_map = grid.cpu().float().permute(2, 0, 1)[None].contiguous()
    return ops.bilinear_sample(feature_map, uv).view(height, width, C)


def shared_colours(fit, *sets):
    """Features (..., D) as colours (..., 3) in [0, 1]: the three directions in which `fit` (n, D) varies most are red,
    green and blue, each from the 2nd to the 98th percentile of `fit`. Equal features have equal colours whichever set
    they are in.
    """
    fit = fit.double().cpu()
    mean = fit.mean(0)
    directions = torch.linalg.svd(fit - mean, full_matrices=False).Vh[:3]  # (3, D)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    directions = directions * largest.sign()  # SVD leaves the sign open
    ends = torch.tensor([0.02, 0.98], dtype=torch.float64)
    low, high = torch.quantile((fit - mean) @ directions.T, ends, dim=0)
    span = (high - low).clamp(min=1e-9)
    colours = []
    for x in sets:
        along = (x.double().cpu() - mean) @ directions.T
        colours.append(((along - low) / span).clamp(0, 1).float())
    return colours


@torch.no_grad()
def embed(model, view):
    """All features of the first frame of a batch, on the CPU, l2-normalised (D = embed_dim). What the model has no
    branch for is left out.

    -> dict: places, places_beta (P, 3) float32 metres; uv (P, 2), depth (P,), visible (P,): view alpha's places in the
    image; of Eq. 7 point (P, D), pixel (P, D) under the places, grid (h, w, D) of dense_embedding; of Eq. 4 alpha, beta
    (P, D).
    """
    image = view["image"][:1]
    height, width = image.shape[2:]
    places, features = model.pts_backbone(torch.cat([view["alpha"][:1], view["beta"][:1]]))
    uv, depth = data.project(places[:1], view["lidar2img"][:1])
    visible = data.inside_image(uv, depth, width, height)
    out = {"places": places[0], "places_beta": places[1], "uv": uv[0], "depth": depth[0], "visible": visible[0]}
    if hasattr(model, "mlp_cross_img"):
        out["point"] = F.normalize(model.mlp_cross_points(features[0]), dim=1)
        out["pixel"] = _pixel_features(model, model.img_backbone(image), uv)
        out["grid"] = dense_embedding(model, image)
    if hasattr(model, "mlp_intro_points"):
        both = F.normalize(model.mlp_intro_points(features.flatten(0, 1)), dim=1)
        out["alpha"], out["beta"] = both.view(2, len(places[0]), -1)
    return {k: v.cpu() for k, v in out.items()}


def similarity_map(grid, feature, height, width, step=STEP):
    """Cosine of one feature (D,) with the image features `grid` (h, w, D), both l2-normalised, at every pixel: (height,
    width).
    """
    return on_image((grid @ feature)[..., None], step, height, width)[..., 0]


def ranks(found):
    """For every place, how many visible places' pixels are more like its point feature than its own pixel is: (P,)
    int64, 0 is best.
    """
    cosine = found["point"] @ found["pixel"].T  # (P, P)
    better = cosine > cosine.diagonal()[:, None]
    return better[:, found["visible"]].sum(1)


def choose_place(found, height, width, things, point=None, pixel=None):
    """The place to ask about, an index, and how it was chosen, in words: nearest to `point` (x, y, z), LiDAR metres, or
    to `pixel` (u, v); else the one nearest the image's middle that stands off the ground within 20 m. Only places in
    the image count. Raises BadInput for numbers that are not finite, a pixel outside the image, or a frame without
    places in its image.
    """
    seen = found["visible"].numpy()
    places, uv = found["places"].numpy(), found["uv"].numpy()
    if not seen.any():
        raise BadInput("no place of this frame lies in its image; wrong calibration?")
    for flag, given in (("--point", point), ("--pixel", pixel)):
        if given is not None and not np.isfinite(given).all():
            raise BadInput(f"{flag} {' '.join(map(str, given))}: not finite")

    if point is not None:
        distance = np.linalg.norm(places - np.array(point), axis=1)
        i = int(np.where(seen, distance, np.inf).argmin())
        return i, f"place nearest to --point, {distance[i]:.1f} m from it"
    if pixel is not None:
        if not data.inside_image(np.array(pixel), np.ones(()), width, height):
            size = f"{width} x {height} as the network sees it"
            raise BadInput(f"--pixel {pixel[0]:g} {pixel[1]:g}: outside the image, which is {size}")
        distance = np.linalg.norm(uv - np.array(pixel), axis=1)
        i = int(np.where(seen, distance, np.inf).argmin())
        return i, f"place nearest to --pixel, {distance[i]:.0f} pixels from it"
    distance = np.linalg.norm(uv - np.array([width / 2, height / 2]), axis=1)
    stands = seen & (places[:, 2] > things) & (found["depth"].numpy() < 20)
    wanted = stands if stands.any() else seen
    i = int(np.where(wanted, distance, np.inf).argmin())
    return i, "place off the ground nearest the middle of the image"


def edges_in_depth(uv, depth, things, width, count=3):
    """The (u, v) of up to `count` spots where near things hide far ones, an eighth of the width apart: where
    misalignment would show. uv (n, 2), depth (n,); things (n,): which points are of things, not of the ground.
    """
    if len(uv) < 2:
        return []
    near, neighbour = cKDTree(uv).query(uv, min(12, len(uv)))
    du, dv = np.abs(uv[neighbour] - uv[:, None]).transpose(2, 0, 1)
    # beside, not above: the ground's depth jumps from one scan line to the next, but not along it
    beside = (near < width / 60) & (dv < du)
    jump = np.where(beside, depth[neighbour] / depth[:, None], 1).max(1)
    edge = (jump > 1.3) & (depth < 40) & things
    spots = uv[edge]
    if not len(spots):
        return []
    size = width / 8
    crowd = np.array([len(x) for x in cKDTree(spots).query_ball_point(spots, size / 4)])
    chosen = []
    for i in np.argsort(-crowd, kind="stable"):
        if len(chosen) < count and all(abs(spots[i] - c).max() > size for c in chosen):
            chosen.append(spots[i])
    return chosen


# -----------------------------------------------------------------------------
# pictures of one frame


def draw_projection(view, path, title, things):
    """Does the sweep lie on the image? Every point on the augmented image, coloured by depth, and below it close-ups of
    where near things hide far ones. things: z, metres, above which a point is not of the ground. -> what was measured.
    """
    image = _pixels(view)
    height, width = image.shape[:2]
    points, lidar2img = _numpy(view, "alpha", "lidar2img")
    uv, depth = data.project(points, lidar2img)
    seen = data.inside_image(uv, depth, width, height)
    order = np.flatnonzero(seen)[np.argsort(-depth[seen], kind="stable")]  # near over far
    points, uv, depth = points[order], uv[order], depth[order]

    tall = 14 * height / width  # inches of the image
    figure = new_figure(15, 1.6 + tall + 4.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.7 + tall, 4.6])
    axis = top.subplots()
    axis.imshow(image)
    size = np.clip(20000 / max(len(points), 1), 2.5, 6)
    dots = axis.scatter(*uv.T, c=depth, s=size, linewidths=0, **DEPTH)
    top.colorbar(dots, ax=axis, label="depth of the LiDAR point, m", shrink=0.8, pad=0.01, extend="max")
    axis.set_title(f"{title}\nevery LiDAR point in the colour of its depth", fontsize=TITLE)
    axis.set_xlabel("u, pixels")
    axis.set_ylabel("v, pixels")

    spots = edges_in_depth(uv, depth, points[:, 2] > things, width)
    what = "close-ups of the boxes: colours should change where the image shows the edge of a thing"
    parallax = "(beside an edge the LiDAR, which stands elsewhere than the camera, sees a little past it)"
    bottom.suptitle(f"{what} {parallax}", fontsize=TITLE)
    closes = bottom.subplots(1, max(len(spots), 1), squeeze=False)[0]
    for number, (spot, close) in enumerate(zip(spots, closes), start=1):
        box = _box_around(spot, height, width)
        _frame_close_up(axis, box, str(number))
        close.imshow(image, interpolation="bicubic")
        close.scatter(*uv.T, c=depth, s=16, edgecolors="black", linewidths=0.3, **DEPTH)
        _limit_to_box(close, box)
        close.set_title(str(number), fontsize=SMALL_TITLE)
    save_figure(figure, path)
    if not len(depth):
        return f"{len(seen)} points, none in the image"
    return f"{len(seen)} points, {100 * seen.mean():.1f} % in the image, {depth.min():.1f} to {depth.max():.1f} m deep"


def _box_around(spot, height, width):
    """left, top, width, height of a close-up's part of the image, in pixels."""
    w, h = width / 8, width / 8 * 0.8
    left = np.clip(spot[0] - w / 2, -0.5, width - 0.5 - w)
    top = np.clip(spot[1] - h / 2, -0.5, max(height - 0.5 - h, -0.5))
    return left, top, w, h


def _frame_close_up(axis, box, number):
    left, top, w, h = box
    axis.add_patch(_matplotlib().patches.Rectangle((left, top), w, h, fill=False, ec="white", lw=1.5))
    style = {"color": "white", "va": "top", "fontsize": 11, "weight": "bold"}
    axis.text(left + w / 60, top + h / 40, number, bbox={"fc": "black", "pad": 1, "lw": 0}, **style)


def _limit_to_box(axis, box):
    left, top, w, h = box
    axis.set_xlim(left, left + w)
    axis.set_ylim(top + h, top)
    axis.tick_params(labelsize=7)


def draw_features(view, found, path, title, match_places):
    """Do features mean the same everywhere? `found` is embed(model, view), match_places as for draw_pairs. Features as
    colours, by three principal components. Above, Eq. 7: places in the colours of their point features, on the image
    and from above, and the image in those of its own. Below, Eq. 4: both views from above. -> what was measured.
    """
    height, width = view["image"].shape[2:]
    branches = {"inter-modal": "point" in found, "intra-modal": "alpha" in found}
    heights = []  # inches
    if branches["inter-modal"]:
        heights.append(2 * 9.8 * height / width + 1.8)
    if branches["intra-modal"]:
        heights.append(6.0)
    figure = new_figure(15, sum(heights))
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]

    said = []
    if branches["inter-modal"]:
        said.append(_draw_inter_features(parts[0], view, found, title))
    if branches["intra-modal"]:
        said.append(_draw_intra_features(parts[-1], view, found, title, match_places))
    for branch, there in branches.items():
        if not there:
            said.append(f"no {branch} branch in this checkpoint, no picture of it")
    save_figure(figure, path)
    return "; ".join(said)


def _draw_inter_features(part, view, found, title):
    """Eq. 7: places on the image and from above, and the image, in the colours of their features. -> the rank, said."""
    image, seen = _pixels(view), found["visible"].numpy()
    height, width = image.shape[:2]
    places, uv = found["places"].numpy(), found["uv"].numpy()
    # each set around its own mean: a softmax over pixels does not see what all pixels share, so Eq. 7 leaves it free
    pixel_mean, point_mean = found["pixel"][seen].mean(0), found["point"][seen].mean(0)
    point, pixel, grid = found["point"] - point_mean, found["pixel"] - pixel_mean, found["grid"] - pixel_mean
    point_rgb, grid_rgb = shared_colours(torch.cat([point[seen], pixel[seen]]), point, grid)
    tint = on_image(grid_rgb, STEP, height, width).numpy()
    rank = 100 * np.median(ranks(found)[seen]) / max(seen.sum() - 1, 1)

    images, above = part.subfigures(1, 2, width_ratios=[0.68, 0.32])
    measured = f"(median rank of a place's own pixel among all: {rank:.0f} %, 0 best, chance 50 %)"
    part.suptitle(
        f"{title}: inter-modal features (Eq. 7) as colours\n"
        f"a dot should have the colour of the image beneath it {measured}",
        fontsize=TITLE,
    )
    upper, lower = images.subplots(2, 1)
    upper.imshow(_grey(image, 0.25))
    upper.set_title("places in the colours of their point features", fontsize=SMALL_TITLE)
    lower.imshow(tint * _grey(image, 0.5))
    lower.set_title("the image in the colours of its own features, the same places on it", fontsize=SMALL_TITLE)
    for axis in (upper, lower):
        colours = point_rgb[seen].numpy()
        axis.scatter(*uv[seen].T, c=colours, s=_dot(len(places)), edgecolors="black", linewidths=0.6)
        axis.set_xticks([])
        axis.set_yticks([])
    what = "the same places from above (ringed),\nthe sweep in the colour of the nearest place"
    _coloured_cloud(above.subplots(), view["alpha"][0].cpu().numpy(), places, point_rgb.numpy(), what)
    return f"inter: median rank of a place's own pixel among the frame's places {rank:.1f} %, 0 best, chance 50 %"


def _draw_intra_features(part, view, found, title, match_places):
    """Eq. 4: both views from above, in the colours of their features. -> cosines and top-1, said."""
    places, places_beta = found["places"].numpy(), found["places_beta"].numpy()
    [T] = _numpy(view, "T")
    partner = match_places(places @ T[:3, :3].T + T[:3, 3], places_beta.astype(np.float64))
    cosine = found["alpha"] @ found["beta"][partner].T  # (P, P)
    own = cosine.diagonal()
    top1 = (cosine >= own[:, None]).sum(1) == 1
    others = (cosine.sum() - own.sum()) / max(cosine.numel() - len(cosine), 1)

    part.suptitle(
        f"{title}: intra-modal features (Eq. 4) as colours\na thing should have the same colour in both views"
        f" (matched places: mean cosine {own.mean():.2f}, all others {others:.2f})",
        fontsize=TITLE,
    )
    both = torch.cat([found["alpha"], found["beta"]])
    alpha_rgb, beta_rgb = shared_colours(both, found["alpha"], found["beta"])
    left, right = part.subplots(1, 2)
    mirrored = " and mirrored" if _mirrored(view) else ""
    alpha, beta = (view[key][0].cpu().numpy() for key in ("alpha", "beta"))
    _coloured_cloud(left, alpha, places, alpha_rgb.numpy(), "view alpha from above")
    what = f"view beta from above: turned, scaled{mirrored}"
    _coloured_cloud(right, beta, places_beta, beta_rgb.numpy(), what, left=False)
    best = f"{100 * top1.float().mean():.0f} % have it as the best of all"
    return f"intra: matched places have cosine {own.mean():.2f}, others {others:.2f}; {best}"


def _coloured_cloud(axis, cloud, places, colours, title, left=True):
    """A cloud (N, 3+) from above, each point in the colour (P, 3) of its nearest place (P, 3), which is ringed."""
    nearest = cKDTree(places).query(cloud[:, :3])[1]
    axis.scatter(-cloud[:, 1], cloud[:, 0], s=np.clip(14000 / len(cloud), 1.0, 4), c=colours[nearest], linewidths=0)
    axis.scatter(-places[:, 1], places[:, 0], s=_dot(len(places), 20), c=colours, edgecolors="black", linewidths=0.5)
    from_above(axis, title, left)


STAR = {"marker": "*", "s": 330, "c": "white", "edgecolors": "black", "linewidths": 1.3, "zorder": 5}


def draw_similarity(view, found, path, place, title):
    """What in the image is like this place? `found` is embed(model, view), `place` an index into its places. Above,
    cosine of its point feature with the image's feature at every pixel; below, the other way round: of the image
    feature at its pixel with the point feature of every place, on the image and from above. Without an inter-modal
    branch, its Eq. 4 feature against those of the other places. -> what was measured.
    """
    image, seen = _pixels(view), found["visible"].numpy()
    height, width = image.shape[:2]
    uv, inter = found["uv"].numpy(), "point" in found
    rows = 2 if inter else 1
    figure = new_figure(15, max(0.7 + rows * (9.2 * height / width + 0.65), 6))
    figure.suptitle(title, fontsize=12)
    left, right = figure.subfigures(1, 2, width_ratios=[0.7, 0.3])
    axes = left.subplots(rows, 1, squeeze=False)[:, 0]

    if inter:
        what = _draw_similar_pixels(left, axes[0], image, found, place)
        said = f"inter: {what}"
        values = (found["point"] @ found["pixel"][place]).numpy()
        lower = "the other way round: cosine of the image feature at the star with the point feature of every place"
        above = "the lower picture from above"
    else:
        said = "no inter-modal branch in this checkpoint: points against points"
        values = (found["alpha"] @ found["alpha"][place]).numpy()
        lower = "cosine of its point feature (Eq. 4) with those of all places"
        above = "the same from above"
    # the place itself may be its own best, so the scale ends at the second
    limits = {"cmap": "turbo", "vmin": np.percentile(values[seen], 2), "vmax": np.sort(values[seen])[-2:].min()}
    ringed = {"edgecolors": "black", "linewidths": 0.6}
    axes[-1].imshow(_grey(image, 0.2))
    axes[-1].scatter(*uv[seen].T, c=values[seen], s=_dot(len(uv)), **ringed, **limits)
    axes[-1].set_title(lower, fontsize=SMALL_TITLE)
    for axis in axes:
        axis.scatter(*uv[place], **STAR)
        axis.set_ylabel("v, pixels")
        limit_to_image(axis, height, width)
    axes[-1].set_xlabel("u, pixels")
    _draw_similar_places(right, view, found, place, values, limits, above)
    save_figure(figure, path)
    return said


def _draw_similar_pixels(part, axis, image, found, place):
    """The cosine of a place's point feature with the image feature at every pixel. -> what its own pixel has, said."""
    height, width = image.shape[:2]
    seen, uv = found["visible"].numpy(), found["uv"].numpy()
    feature = found["point"][place]
    heat = similarity_map(found["grid"], feature, height, width).numpy()
    low, high = np.percentile(heat, [2, 99.8])
    axis.imshow(_grey(image, 0.2))
    shown = axis.imshow(heat, cmap="turbo", vmin=low, vmax=high, alpha=0.6)
    axis.scatter(*uv[seen].T, s=_dot(len(uv), 9), facecolors="none", edgecolors="black", linewidths=0.6)
    bar = part.colorbar(shown, cax=axis.inset_axes([1.01, 0, 0.015, 1]), label="cosine", extend="both")
    bar.solids.set_alpha(1)
    own = (feature @ found["pixel"][place]).item()
    rank = f"{int(ranks(found)[place]) + 1} of {int(seen.sum())}, 1 is best"
    what = f"its own pixel has cosine {own:.2f} and ranks {rank}, among the pixels of all places (circles)"
    title = f"cosine of its point feature with the image feature at every pixel;\n{what}"
    axis.set_title(title, fontsize=SMALL_TITLE)
    return what


def _draw_similar_places(part, view, found, place, values, limits, title):
    """Places from above in the colours of `values` (P,), the sweep in that of the nearest place, a star at `place`."""
    cloud, places = view["alpha"][0].cpu().numpy(), found["places"].numpy()
    axis = part.subplots()
    nearest = cKDTree(places).query(cloud[:, :3])[1]
    size = np.clip(14000 / len(cloud), 1.0, 4)
    axis.scatter(-cloud[:, 1], cloud[:, 0], s=size, c=values[nearest], linewidths=0, **limits)
    ringed = {"s": _dot(len(places), 20), "edgecolors": "black", "linewidths": 0.5}
    dots = axis.scatter(-places[:, 1], places[:, 0], c=values, **ringed, **limits)
    axis.scatter(-places[place, 1], places[place, 0], **STAR)
    part.colorbar(dots, ax=axis, label="cosine", pad=0.01, extend="both", location="bottom", shrink=0.8)
    from_above(axis, title)


# -----------------------------------------------------------------------------
# is a data set sound?


def draw_overlay(frames, path):
    """Sweeps on their images, coloured by depth, and the 3D boxes of labels: one picture for all frames.

    It is right when the colour jumps at the outlines of things, and boxes hug theirs. frames: [(title, image (H, W, 3)
    uint8, points (N, 3+) in range, lidar2img (3, 4), boxes: arrays (12, 2, 2) of the pixels of their edges)].
    """
    ratios = [image.shape[0] / image.shape[1] for _, image, *_ in frames]
    figure = new_figure(13, 11.8 * sum(ratios) + 0.25 * len(frames) + 0.4)
    axes = figure.subplots(len(frames), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, frame in zip(axes, frames):
        dots = _draw_sweep_and_boxes(axis, *frame)
    ticks = {"ticks": [4, 8, 16, 32, 64], "format": "%d"}
    bar = figure.colorbar(
        dots, ax=list(axes), label="depth of LiDAR points, m", shrink=0.6, pad=0.01, extend="both", **ticks
    )
    bar.minorticks_off()
    white = "; white: 3D boxes of the labels" if any(boxes for *_, boxes in frames) else ""
    what = "Sweeps on their images: where the colour jumps, the image must have an outline"
    figure.suptitle(what + white, fontsize=12)
    save_figure(figure, path)


def _draw_sweep_and_boxes(axis, title, image, points, lidar2img, boxes):
    mpl = _matplotlib()
    height, width = image.shape[:2]
    uv, depth = data.project(points.astype(np.float64), lidar2img)
    seen = data.inside_image(uv, depth, width, height)
    order = np.flatnonzero(seen)[depth[seen].argsort()[::-1]]  # near over far
    axis.imshow(40 + 0.8 * image.mean(2), cmap="gray", vmin=0, vmax=255)  # grey, so that all colour is depth
    style = {"cmap": "turbo_r", "norm": mpl.colors.LogNorm(4, 64), "s": 4, "linewidths": 0}
    dots = axis.scatter(*uv[order].T, c=depth[order], **style)
    for lines in boxes:
        axis.add_collection(mpl.collections.LineCollection(lines, colors="black", linewidths=2.6))
        axis.add_collection(mpl.collections.LineCollection(lines, colors="white", linewidths=1.2))
    labelled = f", {len(boxes)} labelled boxes" if boxes else ""
    axis.set_title(title + labelled, fontsize=TITLE)
    limit_to_image(axis, height, width)
    axis.axis("off")
    return dots


# -----------------------------------------------------------------------------
# depth maps

WORST = 0.3  # relative error at which the colours of draw_depth end
TICKS = (0.2, 0.5, 1, 2, 3, 5, 7, 10, 20, 30, 50, 80, 150)  # metres, on its scale


def draw_depth(image, prediction, truth, path, title, high=None):
    """Is the depth right, and where not? Image, error, prediction and ground truth, the last two on one scale, that of
    ground truth, logarithmic as errors are relative: a metre matters near the camera. -> what was measured, over all
    ground truth: no crop, no range, nothing clipped.

    image: (H, W, 3), uint8 or in [0, 1]; prediction, truth: metres (H, W), truth 0 where there is none. high: metres at
    which the scale ends, so that pictures can be compared; by default where ground truth does. Sparse truth is drawn as
    dots large enough to meet. Raises BadInput for maps of other sizes.
    """
    height, width = truth.shape
    if not np.shape(prediction) == np.shape(image)[:2] == (height, width):
        predicted, seen = (" x ".join(map(str, shape)) for shape in (np.shape(prediction), np.shape(image)[:2]))
        sizes = f"prediction is {predicted} (height x width), image {seen}, ground truth {height} x {width}"
        raise BadInput(f"{title}: {sizes}; must be of one size")
    prediction, truth = np.asarray(prediction, np.float64), np.asarray(truth, np.float64)
    known, drawn = truth > 0, np.isfinite(prediction)
    both = known & drawn
    error = np.abs(prediction[both] - truth[both]) / truth[both]
    measured = _measured(prediction[both], truth[both], error)
    share = float(known.mean())

    figure = new_figure(16, 14.9 * height / width + 1.2)
    figure.suptitle(f"{title}: {measured}", fontsize=12)
    axes = figure.subplots(2, 2)
    (upper_left, upper_right), (lower_left, lower_right) = axes
    low, far = _depth_scale(truth[known] if known.any() else prediction[drawn & (prediction > 0)], high)
    metres = {"norm": _matplotlib().colors.LogNorm(low, far), "cmap": "turbo"}
    relative = {"vmin": 0, "vmax": WORST, "cmap": "viridis"}

    upper_left.imshow(image)
    upper_left.set_title("image", fontsize=SMALL_TITLE)
    wrong = _draw_known(upper_right, both, error, truth, share, relative)
    what = "error: |prediction - ground truth| / ground truth, grey where no ground truth is"
    upper_right.set_title(what, fontsize=SMALL_TITLE)
    shown = lower_left.imshow(np.where(drawn, prediction, np.nan).clip(1e-3), interpolation="nearest", **metres)
    lower_left.set_facecolor("0.85")
    lower_left.set_title("prediction, m", fontsize=SMALL_TITLE)
    _draw_known(lower_right, both, truth[both], truth, share, metres)
    enlarged = f", drawn {_side(share):.1f} pixels wide" if 0 < share <= 0.5 else ""
    what = f"ground truth, m, on the same scale ({100 * share:.0f} % of pixels have it{enlarged})"
    lower_right.set_title(what, fontsize=SMALL_TITLE)
    for axis in axes.flat:
        limit_to_image(axis, height, width)
        axis.set(xticks=[], yticks=[])
    percent = lambda x, _: f"{100 * x:.0f} %"
    upper = [upper_left, upper_right]
    figure.colorbar(wrong, ax=upper, label="relative error", extend="max", pad=0.01, format=percent)
    bar = figure.colorbar(shown, ax=[lower_left, lower_right], label="depth, m", extend="both", pad=0.01, format="%g")
    ticker = _matplotlib().ticker
    bar.ax.yaxis.set_major_locator(ticker.FixedLocator([t for t in TICKS if low <= t <= far]))
    bar.ax.yaxis.set_minor_locator(ticker.NullLocator())
    save_figure(figure, path)

    said = f"{int(both.sum())} pixels with ground truth, {100 * share:.1f} % of all: {measured}"
    missing = int((known & ~drawn).sum())
    return f"{said}; prediction NaN or infinite at {missing}" if missing else said


def _measured(prediction, truth, error):
    """What depths (n,), beside ground truth (n,), are wrong by, in words. error: relative, (n,)."""
    if not len(error):
        return "no ground truth to compare with"
    mean, median = 100 * error.mean(), 100 * np.median(error)
    times = f"predictions are {np.median(prediction / truth):.2f} times ground truth at the median"
    return f"{mean:.1f} % off on average, {median:.1f} % at the median; {times}"


def _depth_scale(values, high):
    """Where the colours of depths (n,) begin and end, metres. A few stray pixels do not stretch the scale."""
    low, far = np.quantile(values, [0.002, 0.998]) if len(values) else (1, 10)
    far = high or far
    return min(low, far / 2), far


def _side(share):
    """How many pixels wide a dot must be to meet its neighbours, where this share of the pixels has one."""
    return float(np.clip(1.2 * share**-0.5, 1, 8)) if share else 1.0


def _draw_known(axis, where, values, truth, share, style):
    """values (n,) at the pixels `where` (H, W); as enlarged dots where less than half of the image has ground truth."""
    height, width = truth.shape
    axis.set_facecolor("0.85")
    if share > 0.5:
        dense = np.full((height, width), np.nan)
        dense[where] = values
        return axis.imshow(dense, interpolation="nearest", **style)
    axis.set_aspect("equal")
    order = np.argsort(-truth[where], kind="stable")  # near over far
    rows, columns = (x[order] for x in np.nonzero(where))
    area = (_side(share) * 7.4 * 72 / width) ** 2
    return axis.scatter(columns, rows, c=values[order], s=area, marker="s", linewidths=0, **style)
