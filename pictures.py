"""Every picture that the programs draw. A stranger should read each without being told more: titles that say what to
look for, axes in metres or pixels, seen from above with forward up and left on the left.

Curves and pairs end a training run; `python eval.py show` draws projection, pairs, features and similarity of one
frame; draw_depth draws a depth map beside its ground truth. The functions take a model of simipu.py, batches of
data.augment, of which they draw the first frame, and the PNG to write; what they measure on the way comes back as a
line of text.
"""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree

import data
import data_det3d
import encoders
import ops_boxes
import ops_triton as ops
from files import BadInput, read_log, writing

STEP = 8  # pixels between image features in a picture; between them colours are interpolated
FAR = 50.0  # metres; depth colours end here
DPI = 100


def _figure(width, height):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt, plt.figure(figsize=(width, height), layout="constrained")


def _save(plt, figure, path, dpi=DPI):
    with writing(path) as temporary:
        figure.savefig(temporary, dpi=dpi)
    plt.close(figure)


def _pixels(view):
    """The first image of a batch, (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return (view["image"][0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def _mirrored(view):
    """Whether the image of the first frame is flipped: view beta then is too, and T turns left into right."""
    return bool(torch.linalg.det(view["T"][0, :3, :3].double()) < 0)


def _dot(count, area=42):
    """Size of a marker, in square points, so that so many places do not hide what lies beneath."""
    return float(np.clip(area * 170 / count, area / 4, area))


def _from_above(axis, title, left=True):
    axis.set_title(title, fontsize=10)
    axis.set_aspect("equal")
    axis.set_xlabel("right, m")
    if left:
        axis.set_ylabel("forward, m")


# -----------------------------------------------------------------------------
# a run's own pictures


def draw_curves(log_path, path):
    """Losses with their chance levels, top-1, mean cosines and, if the run was judged more than once, matching on
    unseen frames, from log.jsonl to a PNG.
    """
    lines = read_log(log_path)
    log = [line for line in lines if "lr" in line]
    judged = [line for line in lines if "gap" in line.get("match", ())]
    losses, top1, cosines, ranks = panels = [], [], [], []
    steps = [line["step"] for line in log]
    for loss, colour in (("intra", "tab:blue"), ("inter", "tab:orange")):
        if log and loss in log[0]:
            drawn = {"": losses, "_chance": losses, "_top1": top1, "_positive": cosines, "_negative": cosines}
            values = {key: [line[loss + key] * (100 if key == "_top1" else 1) for line in log] for key in drawn}
            labels = {"": "", "_chance": ", chance", "_top1": "", "_positive": ", matched", "_negative": ", unmatched"}
            for key, panel in drawn.items():
                panel.append(
                    (
                        steps,
                        values[key],
                        {
                            "color": colour,
                            "ls": ":" if key in ("_chance", "_negative") else "-",
                            "label": loss + labels[key],
                        },
                    )
                )
    for which, colour, label in (("right", "tab:green", "the right image"), ("wrong", "tab:red", "another frame's")):
        if len(judged) > 1:
            ranks.append(
                (
                    [line["step"] for line in judged],
                    [line["match"][which + "_rank"] for line in judged],
                    {"color": colour, "marker": "o", "ms": 3, "label": label},
                )
            )
    _draw_panels(dict(zip(("InfoNCE loss", "top-1, %", "mean cosine", "unseen frames: median rank, %"), panels)), path)


def draw_depth_curves(log_path, path):
    """Loss, relative error on training crops and, at the steps it was judged, on whole unseen images, and the learning
    rate, from log.jsonl to a PNG.
    """
    lines = read_log(log_path)
    log, judged = ([line for line in lines if key in line] for key in ("lr", "depth"))
    steps = [line["step"] for line in log]
    errors = [(steps, [line["abs_rel"] for line in log], {"color": "tab:blue", "label": "training crops"})]
    if judged:
        unseen = [line["depth"]["eigen"]["abs_rel"] for line in judged]
        errors.append(
            (
                [line["step"] for line in judged],
                unseen,
                {"color": "tab:green", "marker": "o", "ms": 3, "label": "unseen images"},
            )
        )
    loss, rate = (
        (steps, values, {"label": label})
        for values, label in (([line["loss"] for line in log], "SigLoss"), ([line["lr"][0] for line in log], "AdamW"))
    )
    _draw_panels({"loss": [loss], "relative error (abs_rel)": errors, "learning rate": [rate]} if log else {}, path)


def _draw_panels(panels, path):
    """{title: [(x, y, style)]}, side by side; nothing at all if there is nothing to draw (a finished run whose log was
    deleted).
    """
    panels = {title: curves for title, curves in panels.items() if curves}
    if not panels:
        return
    plt, figure = _figure(1 + 4 * len(panels), 3.6)
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for x, y, style in curves:
            axis.plot(x, y, **style)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    _save(plt, figure, path, dpi=110)


@torch.no_grad()
def draw_pairs(model, view, path, match_places):
    """Are projection and matching right? match_places(alpha, beta) is the matching to show, on float64 places (P, 3) in
    one frame.

    Above, the augmented image with the sweep on it, coloured by depth, and the encoder's places ringed: edges of things
    and jumps of colour must agree. Below, view alpha from above; view beta, each place in the colour of its match in
    alpha; and both in alpha's frame, beta brought back by T^-1, with a line for every match: the lines must be short.
    -> what was measured.
    """
    model = copy.deepcopy(model).eval()
    clouds = [view[k][:1] for k in ("alpha", "beta")]
    a, b = (model.pts_backbone(cloud)[0][0].double().cpu().numpy() for cloud in clouds)
    alpha, beta = (cloud[0].double().cpu().numpy() for cloud in clouds)
    T, lidar2img = (view[k][0].double().cpu().numpy() for k in ("T", "lidar2img"))
    partner = match_places(a @ T[:3, :3].T + T[:3, 3], b)
    back = ((b - T[:3, 3]) @ np.linalg.inv(T[:3, :3]).T)[partner]  # view beta in the frame of view alpha
    distance = np.linalg.norm(a - back, axis=1)
    image = _pixels(view)

    plt, figure = _figure(14, 10)
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.42, 0.58])
    axis = top.subplots()
    axis.imshow(image)
    for points, style in ((alpha, {"s": 1.2}), (a, {"s": _dot(len(a), 26), "edgecolors": "black", "linewidths": 0.8})):
        uv, depth = data.project(points, lidar2img)
        seen = data.inside_image(uv, depth, image.shape[1], image.shape[0])
        dots = axis.scatter(*uv[seen].T, c=depth[seen], cmap="turbo", vmin=0, vmax=FAR, **style)
    top.colorbar(dots, ax=axis, label="depth, m", shrink=0.7, pad=0.01, extend="max")
    mirrored = ", mirrored as view beta is" if _mirrored(view) else ""
    axis.set_title(f"view alpha on the augmented image{mirrored}; its {len(a)} places ringed")
    axis.axis("off")

    bearing = np.arctan2(a[:, 1], a[:, 0] - 25)  # around the middle of the scene, so that neighbours have like colours
    colours = plt.get_cmap("hsv")(bearing / (2 * np.pi) % 1)
    left, middle, right = bottom.subplots(1, 3)
    for axis, cloud, places, title in (
        (left, alpha, a, "view alpha from above"),
        (middle, beta, b[partner], "view beta, in the colours of its matches"),
    ):
        axis.scatter(-cloud[::4, 1], cloud[::4, 0], s=0.3, c="0.7")
        axis.scatter(-places[:, 1], places[:, 0], c=colours, s=10)
        axis.set_title(title)
    for p, q, colour in zip(a, back, colours):
        right.plot([-p[1], -q[1]], [p[0], q[0]], c=colour, lw=1)
    right.scatter(-a[:, 1], a[:, 0], c=colours, s=10)
    right.scatter(-back[:, 1], back[:, 0], facecolors="none", edgecolors="black", s=18, linewidths=0.5)
    right.set_title(
        f"both in alpha's frame: {distance.mean():.2f} m apart, {100 * (distance < 0.01).mean():.0f} % coincide"
    )
    for axis in (left, middle, right):
        axis.set_aspect("equal")
        axis.set_xlabel("right, m")
    left.set_ylabel("forward, m")
    _save(plt, figure, path)
    return f"{len(a)} places, matches {distance.mean():.2f} m apart on average, {distance.max():.2f} m at most, {100 * (distance < 0.01).mean():.0f} % coincide"


# -----------------------------------------------------------------------------
# what the features of one frame say


@torch.no_grad()
def dense_embedding(model, image, step=STEP):
    """Eq. 7's image features, l2-normalised, on a grid of pixels: image (1, 3, H, W) -> (h, w, D), where cell (i, j) is
    what a place at pixel u = step j, v = step i would be compared with.
    """
    feature_map = model.img_backbone(image)[-1]
    v, u = torch.meshgrid(
        *(torch.arange(0, edge, step, device=image.device) for edge in image.shape[2:]), indexing="ij"
    )  # (h, w)
    uv = torch.stack([u, v], -1).view(1, -1, 2).float()
    rows = [
        F.normalize(model.mlp_cross_img(ops.bilinear_sample(feature_map, part)[0]), dim=1)
        for part in encoders.cells(model.img_backbone, uv).split(8192, dim=1)
    ]
    return torch.cat(rows).view(*u.shape, -1)


def on_image(grid, step, height, width):
    """A grid (h, w, C) whose cell (i, j) is centred on pixel u = step j, v = step i, at every pixel: (height, width,
    C), bilinear, and constant beyond the outermost cells.
    """
    h, w, C = grid.shape
    v, u = torch.meshgrid(torch.arange(height) / step, torch.arange(width) / step, indexing="ij")
    uv = torch.stack([u.clamp(max=w - 1), v.clamp(max=h - 1)], -1).view(1, -1, 2)
    return ops.bilinear_sample(grid.cpu().float().permute(2, 0, 1)[None].contiguous(), uv).view(height, width, C)


def shared_colours(fit, *sets):
    """Features (..., D) as colours (..., 3) in [0, 1]: the three directions in which `fit` (n, D) varies most are red,
    green and blue, each from the 2nd to the 98th percentile of `fit`. Equal features have equal colours whichever set
    they are in.
    """
    fit = fit.double().cpu()
    mean = fit.mean(0)
    directions = torch.linalg.svd(fit - mean, full_matrices=False).Vh[:3]  # (3, D)
    directions = (
        directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    )  # SVD leaves the sign open
    low, high = torch.quantile((fit - mean) @ directions.T, torch.tensor([0.02, 0.98], dtype=torch.float64), dim=0)
    return [
        (((x.double().cpu() - mean) @ directions.T - low) / (high - low).clamp(min=1e-9)).clamp(0, 1).float()
        for x in sets
    ]


@torch.no_grad()
def embed(model, view):
    """All features of the first frame of a batch, on the CPU, l2-normalised (D = embed_dim). What the model has no
    branch for is left out.

    -> dict: places, places_beta (P, 3) float32 metres; uv (P, 2), depth (P,), visible (P,): view alpha's places in the
    image; of Eq. 7 point (P, D), pixel (P, D) under the places, grid (h, w, D) of dense_embedding; of Eq. 4 alpha, beta
    (P, D).
    """
    height, width = view["image"].shape[2:]
    places, features = model.pts_backbone(torch.cat([view["alpha"][:1], view["beta"][:1]]))
    uv, depth = data.project(places[:1], view["lidar2img"][:1])
    out = {
        "places": places[0],
        "places_beta": places[1],
        "uv": uv[0],
        "depth": depth[0],
        "visible": data.inside_image(uv, depth, width, height)[0],
    }
    if hasattr(model, "mlp_cross_img"):
        feature_map = model.img_backbone(view["image"][:1])[-1]
        sampled = ops.bilinear_sample(feature_map, encoders.cells(model.img_backbone, uv))[0]
        out |= {
            "point": F.normalize(model.mlp_cross_points(features[0]), dim=1),
            "pixel": F.normalize(model.mlp_cross_img(sampled), dim=1),
        }
        out["grid"] = dense_embedding(model, view["image"][:1])
    if hasattr(model, "mlp_intro_points"):
        out["alpha"], out["beta"] = F.normalize(model.mlp_intro_points(features.flatten(0, 1)), dim=1).view(
            2, len(places[0]), -1
        )
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
    return (cosine > cosine.diagonal()[:, None])[:, found["visible"]].sum(1)


# -----------------------------------------------------------------------------
# pictures of one frame


def edges_in_depth(uv, depth, things, width, count=3):
    """The (u, v) of up to `count` spots where near things hide far ones, an eighth of the width apart: where
    misalignment would show.
    """
    near, neighbour = cKDTree(uv).query(uv, min(12, len(uv)))
    du, dv = np.abs(uv[neighbour] - uv[:, None]).transpose(2, 0, 1)
    beside = (near < width / 60) & (
        dv < du
    )  # the ground's depth jumps from one scan line to the next, but not along it
    jump = np.where(beside, depth[neighbour] / depth[:, None], 1).max(1)
    edge = (jump > 1.3) & (depth < 40) & things
    size = width / 8
    spots = uv[edge]
    crowd = np.array([len(x) for x in cKDTree(spots).query_ball_point(spots, size / 4)]) if len(spots) else np.zeros(0)
    chosen = []
    for i in np.argsort(-crowd, kind="stable"):
        if len(chosen) < count and all(abs(spots[i] - c).max() > size for c in chosen):
            chosen.append(spots[i])
    return chosen


def draw_projection(view, path, title, things):
    """Does the sweep lie on the image? Every point on the augmented image, coloured by depth, and below it close-ups of
    where near things hide far ones. -> what was measured.
    """
    image = _pixels(view)
    height, width = image.shape[:2]
    points = view["alpha"][0].double().cpu().numpy()
    uv, depth = data.project(points, view["lidar2img"][0].double().cpu().numpy())
    seen = data.inside_image(uv, depth, width, height)
    order = np.flatnonzero(seen)[np.argsort(-depth[seen], kind="stable")]  # near over far
    points, uv, depth = points[order], uv[order], depth[order]
    plt, figure = _figure(15, 1.6 + 14 * height / width + 4.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[0.7 + 14 * height / width, 4.6])
    axis = top.subplots()
    spots = edges_in_depth(uv, depth, points[:, 2] > things, width)
    axis.imshow(image)
    dots = axis.scatter(
        *uv.T, c=depth, cmap="turbo", vmin=0, vmax=FAR, s=np.clip(20000 / len(points), 2.5, 6), linewidths=0
    )
    top.colorbar(dots, ax=axis, label="depth of the LiDAR point, m", shrink=0.8, pad=0.01, extend="max")
    axis.set_title(f"{title}\nevery LiDAR point in the colour of its depth", fontsize=11)
    axis.set_xlabel("u, pixels")
    axis.set_ylabel("v, pixels")
    parallax = "(beside an edge the LiDAR, which stands elsewhere than the camera, sees a little past it)"
    bottom.suptitle(
        f"close-ups of the boxes: colours should change where the image shows the edge of a thing {parallax}",
        fontsize=11,
    )
    w, h = width / 8, width / 8 * 0.8
    for i, (spot, close) in enumerate(zip(spots, np.atleast_1d(bottom.subplots(1, max(len(spots), 1)))), start=1):
        u = np.clip(spot[0] - w / 2, -0.5, width - 0.5 - w)
        v = np.clip(spot[1] - h / 2, -0.5, max(height - 0.5 - h, -0.5))
        axis.add_patch(plt.Rectangle((u, v), w, h, fill=False, ec="white", lw=1.5))
        axis.text(
            u + w / 60,
            v + h / 40,
            str(i),
            color="white",
            va="top",
            fontsize=11,
            weight="bold",
            bbox={"fc": "black", "pad": 1, "lw": 0},
        )
        close.imshow(image, interpolation="bicubic")
        close.scatter(*uv.T, c=depth, cmap="turbo", vmin=0, vmax=FAR, s=16, edgecolors="black", linewidths=0.3)
        close.set_xlim(u, u + w)
        close.set_ylim(v + h, v)
        close.set_title(str(i), fontsize=10)
        close.tick_params(labelsize=7)
    _save(plt, figure, path)
    return f"{len(seen)} points, {100 * seen.mean():.1f} % in the image, {depth.min():.1f} to {depth.max():.1f} m deep"


def _coloured_cloud(axis, cloud, places, colours, title, left=True):
    """A cloud (N, 3+) from above, each point in the colour (P, 3) of its nearest place (P, 3), which is ringed."""
    nearest = cKDTree(places).query(cloud[:, :3])[1]
    axis.scatter(-cloud[:, 1], cloud[:, 0], s=np.clip(14000 / len(cloud), 1.0, 4), c=colours[nearest], linewidths=0)
    axis.scatter(-places[:, 1], places[:, 0], s=_dot(len(places), 20), c=colours, edgecolors="black", linewidths=0.5)
    _from_above(axis, title, left)


def draw_features(view, found, path, title, match_places):
    """Do features mean the same everywhere? `found` is embed(model, view), match_places as for draw_pairs. Features as
    colours, by three principal components. Above, Eq. 7: places in the colours of their point features, on the image
    and from above, and the image in those of its own. Below, Eq. 4: both views from above. -> what was measured.
    """
    image, seen = _pixels(view), found["visible"].numpy()
    height, width = image.shape[:2]
    alpha, beta = (view[k][0].cpu().numpy() for k in ("alpha", "beta"))
    places, places_beta, uv = (found[k].numpy() for k in ("places", "places_beta", "uv"))
    said = []
    inter, intra = "point" in found, "alpha" in found
    tall = 9.8 * height / width  # inches of an image
    heights = [2 * tall + 1.8] * inter + [6.0] * intra
    plt, figure = _figure(15, sum(heights))
    parts = figure.subfigures(inter + intra, 1, height_ratios=heights, squeeze=False)[:, 0]

    if inter:
        # each set around its own mean: a softmax over pixels does not see what all pixels share, so Eq. 7 leaves that
        # free
        pixel_mean, point_mean = found["pixel"][seen].mean(0), found["point"][seen].mean(0)
        point, pixel, grid = found["point"] - point_mean, found["pixel"] - pixel_mean, found["grid"] - pixel_mean
        point_rgb, grid_rgb = shared_colours(torch.cat([point[seen], pixel[seen]]), point, grid)
        tint = on_image(grid_rgb, STEP, height, width).numpy()
        grey = image.mean(2, keepdims=True)
        rank = 100 * np.median(ranks(found)[seen]) / max(seen.sum() - 1, 1)
        images, above = parts[0].subfigures(1, 2, width_ratios=[0.68, 0.32])
        parts[0].suptitle(
            f"{title}: inter-modal features (Eq. 7) as colours\na dot should have the colour of the image beneath it"
            f" (median rank of a place's own pixel among all: {rank:.0f} %, 0 best, chance 50 %)", fontsize=11,
        )  # fmt: skip
        upper, lower = images.subplots(2, 1)
        upper.imshow(np.repeat(0.25 + 0.75 * grey, 3, 2))
        upper.scatter(*uv[seen].T, c=point_rgb[seen].numpy(), s=_dot(len(places)), edgecolors="black", linewidths=0.6)
        upper.set_title("places in the colours of their point features", fontsize=10)
        lower.imshow(tint * (0.5 + 0.5 * grey))
        lower.scatter(*uv[seen].T, c=point_rgb[seen].numpy(), s=_dot(len(places)), edgecolors="black", linewidths=0.6)
        lower.set_title("the image in the colours of its own features, the same places on it", fontsize=10)
        for axis in (upper, lower):
            axis.set_xticks([])
            axis.set_yticks([])
        _coloured_cloud(
            above.subplots(),
            alpha,
            places,
            point_rgb.numpy(),
            "the same places from above (ringed),\nthe sweep in the colour of the nearest place",
        )
        said.append(
            f"inter: median rank of a place's own pixel among the frame's places {rank:.1f} %, 0 best, chance 50 %"
        )
    if intra:
        T = view["T"][0].double().cpu().numpy()
        partner = match_places(places @ T[:3, :3].T + T[:3, 3], places_beta.astype(np.float64))
        alpha_rgb, beta_rgb = shared_colours(torch.cat([found["alpha"], found["beta"]]), found["alpha"], found["beta"])
        cosine = found["alpha"] @ found["beta"][partner].T
        top1 = (cosine >= cosine.diagonal()[:, None]).sum(1) == 1
        off = (cosine.sum() - cosine.diagonal().sum()) / max(cosine.numel() - len(cosine), 1)
        parts[-1].suptitle(
            f"{title}: intra-modal features (Eq. 4) as colours\na thing should have the same colour in both views"
            f" (matched places: mean cosine {cosine.diagonal().mean():.2f}, all others {off:.2f})", fontsize=11,
        )  # fmt: skip
        left, right = parts[-1].subplots(1, 2)
        _coloured_cloud(left, alpha, places, alpha_rgb.numpy(), "view alpha from above")
        _coloured_cloud(
            right,
            beta,
            places_beta,
            beta_rgb.numpy(),
            "view beta from above: turned, scaled" + (" and mirrored" if _mirrored(view) else ""),
            False,
        )
        said.append(
            f"intra: matched places have cosine {cosine.diagonal().mean():.2f}, others {off:.2f}; {100 * top1.float().mean():.0f} % have it as the best of all"
        )
    said += [
        f"no {name} branch in this checkpoint, no picture of it"
        for name, has in (("inter-modal", inter), ("intra-modal", intra))
        if not has
    ]
    _save(plt, figure, path)
    return "; ".join(said)


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
            raise BadInput(
                f"--pixel {pixel[0]:g} {pixel[1]:g}: outside the image, which is {width} x {height} as the network sees it"
            )
        distance = np.linalg.norm(uv - np.array(pixel), axis=1)
        i = int(np.where(seen, distance, np.inf).argmin())
        return i, f"place nearest to --pixel, {distance[i]:.0f} pixels from it"
    stands = seen & (places[:, 2] > things) & (found["depth"].numpy() < 20)
    distance = np.linalg.norm(uv - np.array([width / 2, height / 2]), axis=1)
    return int(
        np.where(stands if stands.any() else seen, distance, np.inf).argmin()
    ), "place off the ground nearest the middle of the image"


def draw_similarity(view, found, path, place, title):
    """What in the image is like this place? `found` is embed(model, view), `place` an index into its places. Above,
    cosine of its point feature with the image's feature at every pixel; below, the other way round: of the image
    feature at its pixel with the point feature of every place, on the image and from above. Without an inter-modal
    branch, its Eq. 4 feature against those of the other places. -> what was measured.
    """
    image, seen = _pixels(view), found["visible"].numpy()
    height, width = image.shape[:2]
    alpha, places, uv = view["alpha"][0].cpu().numpy(), found["places"].numpy(), found["uv"].numpy()
    inter = "point" in found
    plt, figure = _figure(15, max(0.7 + (1 + inter) * (9.2 * height / width + 0.65), 6))
    figure.suptitle(title, fontsize=12)
    star = {"marker": "*", "s": 330, "c": "white", "edgecolors": "black", "linewidths": 1.3, "zorder": 5}
    grey = np.repeat(0.2 + 0.8 * image.mean(2, keepdims=True), 3, 2)
    left, right = figure.subfigures(1, 2, width_ratios=[0.7, 0.3])
    axes = left.subplots(1 + inter, 1, squeeze=False)[:, 0]

    if inter:
        heat = similarity_map(found["grid"], found["point"][place], height, width).numpy()
        low, high = np.percentile(heat, [2, 99.8])
        axes[0].imshow(grey)
        shown = axes[0].imshow(heat, cmap="turbo", vmin=low, vmax=high, alpha=0.6)
        axes[0].scatter(*uv[seen].T, s=_dot(len(places), 9), facecolors="none", edgecolors="black", linewidths=0.6)
        left.colorbar(
            shown, cax=axes[0].inset_axes([1.01, 0, 0.015, 1]), label="cosine", extend="both"
        ).solids.set_alpha(1)
        rank, candidates = int(ranks(found)[place]), int(seen.sum())
        own = (found["point"][place] @ found["pixel"][place]).item()
        what = f"its own pixel has cosine {own:.2f} and ranks {rank + 1} of {candidates}, 1 is best, among the pixels of all places (circles)"
        axes[0].set_title(f"cosine of its point feature with the image feature at every pixel;\n{what}", fontsize=10)
        values = (found["point"] @ found["pixel"][place]).numpy()
        reverse, said = (
            "the other way round: cosine of the image feature at the star with the point feature of every place",
            f"inter: {what}",
        )
    else:
        values = (found["alpha"] @ found["alpha"][place]).numpy()
        reverse, said = (
            "cosine of its point feature (Eq. 4) with those of all places",
            "no inter-modal branch in this checkpoint: points against points",
        )
    limits = {"cmap": "turbo", "vmin": np.percentile(values[seen], 2), "vmax": np.sort(values[seen])[-2:].min()}
    axes[-1].imshow(grey)
    axes[-1].scatter(*uv[seen].T, c=values[seen], s=_dot(len(places)), edgecolors="black", linewidths=0.6, **limits)
    axes[-1].set_title(reverse, fontsize=10)
    for axis in axes:
        axis.scatter(*uv[place], **star)
        axis.set_ylabel("v, pixels")
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
    axes[-1].set_xlabel("u, pixels")
    above = right.subplots()
    nearest = cKDTree(places).query(alpha[:, :3])[1]
    above.scatter(
        -alpha[:, 1], alpha[:, 0], s=np.clip(14000 / len(alpha), 1.0, 4), c=values[nearest], linewidths=0, **limits
    )
    dots = above.scatter(
        -places[:, 1], places[:, 0], c=values, s=_dot(len(places), 20), edgecolors="black", linewidths=0.5, **limits
    )
    above.scatter(-places[place, 1], places[place, 0], **star)
    right.colorbar(dots, ax=above, label="cosine", pad=0.01, extend="both", location="bottom", shrink=0.8)
    _from_above(above, "the lower picture from above" if inter else "the same from above")
    _save(plt, figure, path)
    return said


# -----------------------------------------------------------------------------
# is a data set sound?


def draw_overlay(frames, path):
    """Sweeps on their images, coloured by depth, and the 3D boxes of labels: one picture for all frames.

    It is right when the colour jumps at the outlines of things, and boxes hug theirs. frames: [(title, image (H, W, 3)
    uint8, points (N, 3+) in range, lidar2img (3, 4), boxes: arrays (12, 2, 2) of the pixels of their edges)].
    """
    ratios = [image.shape[0] / image.shape[1] for _, image, *_ in frames]
    plt, figure = _figure(13, 11.8 * sum(ratios) + 0.25 * len(frames) + 0.4)
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LogNorm

    axes = figure.subplots(len(frames), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for axis, (title, image, points, lidar2img, boxes) in zip(axes, frames):
        height, width = image.shape[:2]
        uv, depth = data.project(points.astype(np.float64), lidar2img)
        seen = data.inside_image(uv, depth, width, height)
        nearest_last = np.flatnonzero(seen)[depth[seen].argsort()[::-1]]
        axis.imshow(40 + 0.8 * image.mean(2), cmap="gray", vmin=0, vmax=255)  # grey, so that all colour is depth
        dots = axis.scatter(
            *uv[nearest_last].T, c=depth[nearest_last], cmap="turbo_r", norm=LogNorm(4, 64), s=4, linewidths=0
        )
        for lines in boxes:
            axis.add_collection(LineCollection(lines, colors="black", linewidths=2.6))
            axis.add_collection(LineCollection(lines, colors="white", linewidths=1.2))
        labelled = f", {len(boxes)} labelled boxes" if boxes else ""
        axis.set_title(title + labelled, fontsize=11)
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
        axis.axis("off")
    bar = figure.colorbar(
        dots, ax=list(axes), label="depth of LiDAR points, m", shrink=0.6, pad=0.01, extend="both",
        ticks=[4, 8, 16, 32, 64], format="%d",
    )  # fmt: skip
    bar.minorticks_off()
    white = "; white: 3D boxes of the labels" if any(boxes for *_, boxes in frames) else ""
    what = "Sweeps on their images: where the colour jumps, the image must have an outline"
    figure.suptitle(what + white, fontsize=12)
    _save(plt, figure, path)


# -----------------------------------------------------------------------------
# depth maps

WORST = 0.3  # relative error at which the colours of draw_depth end
TICKS = (0.2, 0.5, 1, 2, 3, 5, 7, 10, 20, 30, 50, 80, 150)  # metres, on its scale


def draw_depth(image, prediction, truth, path, title, high=None):
    """Is the depth right, and where not? Image, error, prediction and ground truth, the last two on one scale,
    logarithmic as errors are relative: a metre matters near the camera. -> what was measured, over all ground truth: no
    crop, no range, nothing clipped.

    image: (H, W, 3), uint8 or in [0, 1]; prediction, truth: metres (H, W), truth 0 where there is none. high: metres at
    which the scale ends, so that pictures can be compared; by default where these two maps do. Sparse truth is drawn as
    dots large enough to meet. Raises BadInput for maps of other sizes.
    """
    height, width = truth.shape
    if not np.shape(prediction) == np.shape(image)[:2] == (height, width):
        sizes = " x ".join(map(str, np.shape(prediction))), " x ".join(map(str, np.shape(image)[:2]))
        raise BadInput(
            f"{title}: prediction is {sizes[0]} (height x width), image {sizes[1]}, ground truth {height} x {width}; must be of one size"
        )
    prediction, truth = np.asarray(prediction, np.float64), np.asarray(truth, np.float64)
    known, drawn = truth > 0, np.isfinite(prediction)
    both = known & drawn
    error = np.abs(prediction[both] - truth[both]) / truth[both]
    if both.any():
        off = np.median(prediction[both] / truth[both])
        measured = f"{100 * error.mean():.1f} % off on average, {100 * np.median(error):.1f} % at the median; predictions are {off:.2f} times ground truth at the median"
    else:
        measured = "no ground truth to compare with"

    plt, figure = _figure(16, 14.9 * height / width + 1.2)
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import FixedLocator, NullLocator

    values = np.concatenate([truth[known], prediction[drawn & (prediction > 0)]])
    low, far = (
        np.quantile(values, [0.002, 0.998]) if len(values) else (1, 10)
    )  # a few stray pixels do not stretch the scale
    far = high or far
    metres = {"norm": LogNorm(min(low, far / 2), far), "cmap": "turbo"}
    relative = {"vmin": 0, "vmax": WORST, "cmap": "viridis"}
    figure.suptitle(f"{title}: {measured}", fontsize=12)
    axes = figure.subplots(2, 2)
    (upper_left, upper_right), (lower_left, lower_right) = axes

    share = float(known.mean())
    rows, columns = np.nonzero(both)
    order = np.argsort(-truth[both], kind="stable")  # near over far
    side = float(np.clip(1.2 * share**-0.5, 1, 8)) if share else 1.0  # pixels a dot must be wide to meet its neighbours

    def known_only(axis, values, style):
        """Values (n,) at the pixels with ground truth; where less than half have it, as enlarged dots."""
        axis.set_facecolor("0.85")
        if share > 0.5:
            dense = np.full((height, width), np.nan)
            dense[rows, columns] = values
            return axis.imshow(dense, interpolation="nearest", **style)
        axis.set_aspect("equal")
        return axis.scatter(
            columns[order],
            rows[order],
            c=values[order],
            s=(side * 7.4 * 72 / width) ** 2,
            marker="s",
            linewidths=0,
            **style,
        )

    upper_left.imshow(image)
    upper_left.set_title("image", fontsize=10)
    wrong = known_only(upper_right, error, relative)
    upper_right.set_title(
        "error: |prediction - ground truth| / ground truth, grey where no ground truth is", fontsize=10
    )
    shown = lower_left.imshow(np.where(drawn, prediction, np.nan).clip(1e-3), interpolation="nearest", **metres)
    lower_left.set_facecolor("0.85")
    lower_left.set_title("prediction, m", fontsize=10)
    known_only(lower_right, truth[both], metres)
    what = f"{100 * share:.0f} % of pixels have it" + f", drawn {side:.1f} pixels wide" * (0 < share <= 0.5)
    lower_right.set_title(f"ground truth, m, on the same scale ({what})", fontsize=10)
    for axis in axes.flat:
        axis.set_xlim(-0.5, width - 0.5)
        axis.set_ylim(height - 0.5, -0.5)
        axis.set_xticks([])
        axis.set_yticks([])
    figure.colorbar(
        wrong,
        ax=[upper_left, upper_right],
        label="relative error",
        extend="max",
        pad=0.01,
        format=lambda x, _: f"{100 * x:.0f} %",
    )
    bar = figure.colorbar(shown, ax=[lower_left, lower_right], label="depth, m", extend="both", pad=0.01, format="%g")
    bar.ax.yaxis.set_major_locator(FixedLocator([t for t in TICKS if metres["norm"].vmin <= t <= far]))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    _save(plt, figure, path)
    missing = int((known & ~drawn).sum())
    return (
        f"{int(both.sum())} pixels with ground truth, {100 * share:.1f} % of all: {measured}"
        + f"; prediction NaN or infinite at {missing}" * bool(missing)
    )


# -----------------------------------------------------------------------------
# boxes

LABELLED, FOUND = "tab:green", "tab:red"
RING = [0, 1, 2, 3, 0, 4, 5, 6, 7, 4]  # a path along the edges of a box's bottom, one upright edge, and its top
UPRIGHT = [(1, 5), (2, 6), (3, 7)]  # the other upright edges
SHOWN = 0.3  # of detections, the score from which they are drawn


def draw_det3d_curves(log_path, path):
    """The three losses, AP of held-out frames where it was asked more than once, and the learning rate."""
    lines = read_log(log_path)
    log, judged = ([line for line in lines if key in line] for key in ("lr", "det3d"))
    steps = [line["step"] for line in log]
    losses = []
    for loss, colour in (("classes", "tab:blue"), ("boxes", "tab:orange"), ("direction", "tab:green")):
        losses.append((steps, [line[loss] for line in log], {"color": colour, "label": loss}))
    scores = []
    if len(judged) > 1:
        at = [line["step"] for line in judged]
        for name, colour in (("Car", "tab:blue"), ("Pedestrian", "tab:orange"), ("Cyclist", "tab:green")):
            ap = [line["det3d"][name]["3d loose"]["AP40"][1] for line in judged]
            scores.append((at, ap, {"color": colour, "marker": "o", "ms": 3, "label": name}))
    rate = [(steps, [line["lr"][0] for line in log], {"label": "AdamW"})]
    panels = {"losses": losses, "unseen frames: 3D AP40, loose, moderate, %": scores, "learning rate": rate}
    _draw_panels(panels if log else {}, path)


def draw_det3d(scene, boxes, scores, classes, path, title):
    """Are the boxes right? Labelled boxes green, found ones red with their scores: on the image, and seen from above.

    scene: data_det3d.Scene; boxes (n, 7), scores (n,), classes (n,): of a detector. Those above a score of SHOWN are
    drawn. -> what was found, in words.
    """
    shown = scores > SHOWN
    boxes, scores, classes = boxes[shown], scores[shown], classes[shown]
    known = scene.classes >= 0
    truth, truth_classes = scene.boxes[known], scene.classes[known]
    height, width = scene.image.shape[:2]
    plt, figure = _figure(14, 14 * height / width + 9.4)
    top, bottom = figure.subfigures(2, 1, height_ratios=[14 * height / width + 0.8, 8.6])
    on_image, above = top.subplots(), bottom.subplots()
    on_image.imshow(scene.image)
    far = max([30.0, *(float(b[0]) + 8 for b in (*truth, *boxes))])
    cloud = scene.points[scene.points[:, 0] < far]
    above.scatter(-cloud[:, 1], cloud[:, 0], s=0.6, c="0.6", linewidths=0)
    for kind, colour, style in ((truth, LABELLED, "-"), (boxes, FOUND, "--")):
        corners = ops_boxes.corners(kind)  # (n, 8, 3)
        for box, points in zip(kind, corners):
            uv, depth = data.project(points, scene.lidar2img)
            if depth.min() > 0.5:
                on_image.plot(*uv[RING].T, style, c=colour, lw=1.4)
                for pair in UPRIGHT:
                    on_image.plot(*uv[list(pair)].T, style, c=colour, lw=1.4)
            ring = points[[0, 1, 2, 3, 0]]
            above.plot(-ring[:, 1], ring[:, 0], style, c=colour, lw=1.6)
            ahead = box[:2] + (points[0, :2] + points[3, :2] - 2 * box[:2]) * 0.75
            above.plot([-box[1], -ahead[1]], [box[0], ahead[0]], style, c=colour, lw=1.2)
    for box, points, score, k in zip(boxes, ops_boxes.corners(boxes), scores, classes):
        said = f"{data_det3d.CLASSES[k]} {score:.2f}"
        above.text(-box[1] + 1.2, box[0], said, color=FOUND, fontsize=9, va="center", clip_on=True)
        uv, depth = data.project(points, scene.lidar2img)
        if depth.min() > 0.5:
            at = uv.min(0)
            patch = {"fc": "white", "alpha": 0.7, "pad": 0.8, "lw": 0}
            on_image.text(at[0], at[1] - 3, said, color=FOUND, fontsize=8, va="bottom", bbox=patch, clip_on=True)
    counts = [f"{name} {(truth_classes == k).sum()} labelled, {(classes == k).sum()} found"
              for k, name in enumerate(data_det3d.CLASSES)]  # fmt: skip
    said = "; ".join(counts)
    top.suptitle(f"{title}: labelled boxes green, found ones (score above {SHOWN}) red and dashed\n{said}", fontsize=12)
    on_image.set_xlim(-0.5, width - 0.5)
    on_image.set_ylim(height - 0.5, -0.5)
    on_image.axis("off")
    _from_above(above, "the same from above, with the sweep; a line inside a box points ahead")
    above.set_ylim(0, far)
    above.set_xlim(-28, 28)
    _save(plt, figure, path)
    return said
