"""Depth maps beside ground truth, scored as papers on KITTI and NYU Depth do, and as KITTI's depth benchmark does.

    python eval.py depth out/depth_kitti/last.pt --save predictions                     # a network's
    python eval.py depth predictions --preset kitti --data-root data/kitti_raw          # anybody's, from 16-bit PNGs

Maps are float metres (H, W), in files 16-bit PNGs of metres x 256 (KITTI) or x 1000 (NYU). Ground truth is 0 where
there is none. A figure is one image's first, then the mean over images. Two protocols, which are not to be mixed:

    Eigen style   `eigen_metrics`: ground truth within a range of depths and a crop, predictions clipped to that range;
                  KITTI's maps are cut by `data_depth.without_border` before. This is what papers print, and
                  `PUBLISHED` has.
    benchmark     `benchmark_metrics`: all ground truth, as it is, by the leaderboard's names and units.

The first agrees, on real maps and to 2e-7, with Monocular-Depth-Estimation-Toolbox, which SimIPU's depth results were
made with. Wrong input raises `BadInput`, one line.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

import data
import data_depth
import pictures
import runtime
from data_depth import KB, kb_window
from files import BadInput, writing

# where ground truth counts, by data set
CROPS = {"kitti": "garg", "lidar": "garg", "nyu": "eigen", "scenes": "none"}
# Garg's crop: rows from, to, columns from, to, as shares of the edges
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)

# what papers report: data.fingerprint of the sorted names of Eigen's 652 images with ground truth, and of NYU's 654;
# range of depth
STANDARD = {"kitti": ("b2603830d8f27010", 1e-3, 80), "nyu": ("b69a1438e6b67601", 1e-3, 10)}

# of 1: a1 to a3, abs_rel; metres: sq_rel, rmse; silog x 100
EIGEN = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10")
# the leaderboard's names: x 100, %, % (over squared ground truth), 1/km
BENCHMARK = ("SILog", "absErrorRel", "sqErrorRel", "iRMSE")

# Last lines of the official logs (configs/simipu/resources/logs), in the order of EIGEN: one run each, ResNet-50, 24
# epochs, flip test-time augmentation
LOGS = {
    "kitti": {
        "published, scratch": (0.90924, 0.98157, 0.99579, 0.08693, 0.38533, 3.2793, 0.13353, 12.3282, 0.03825),
        "published, SimIPU on KITTI": (0.93100, 0.98772, 0.99699, 0.07546, 0.31195, 2.9595, 0.11704, 10.7722, 0.03324),
        "published, SimIPU on Waymo": (0.94520, 0.99177, 0.99805, 0.06656, 0.25009, 2.6697, 0.10372, 9.4962, 0.02943),
        "published, ImageNet labels": (0.95797, 0.99418, 0.99891, 0.05987, 0.20547, 2.4544, 0.09314, 8.5474, 0.02652),
    },
    "nyu": {
        "published, scratch": (0.67276, 0.90709, 0.97416, 0.20469, 0.18202, 0.6619, 0.24816, 20.7970, 0.08529),
        "published, SimIPU on KITTI": (0.72909, 0.93235, 0.98318, 0.17751, 0.14427, 0.5862, 0.21862, 18.0709, 0.07476),
        "published, SimIPU on Waymo": (0.76302, 0.94303, 0.98518, 0.16581, 0.13051, 0.5462, 0.20414, 16.9259, 0.06923),
        "published, ImageNet labels": (0.81541, 0.96189, 0.99150, 0.14292, 0.09731, 0.4810, 0.17829, 14.7621, 0.06038),
    },
}  # fmt: skip
PUBLISHED = {dataset: {name: dict(zip(EIGEN, row)) for name, row in rows.items()} for dataset, rows in LOGS.items()}


# -----------------------------------------------------------------------------
# metrics


def crop_mask(height, width, crop):
    """Where ground truth counts, bool (height, width). crop: "garg" (KITTI, inside the KITTI crop), "eigen" (NYU: of
    480 x 640 alone) or "none". Raises BadInput for another size or another name.
    """
    if crop == "garg":
        top, bottom, left, right = (int(share * edge) for share, edge in zip(GARG, (height, height, width, width)))
    elif crop == "eigen":
        if (height, width) != (480, 640):
            raise BadInput(f"a map of {height} x {width} (height x width): the Eigen crop is one of NYU's 480 x 640")
        top, bottom, left, right = 45, 471, 41, 601
    elif crop == "none":
        top, bottom, left, right = 0, height, 0, width
    else:
        raise BadInput(f"crop '{crop}': must be garg, eigen or none")
    mask = np.zeros((height, width), bool)
    mask[top:bottom, left:right] = True
    return mask


def scored_pixels(prediction, truth, counts, name):
    """Both maps at the pixels that count, (n,) float64 each. Raises BadInput where either is NaN or infinite, which
    would spread.
    """
    p, gt = prediction[counts].astype(np.float64), truth[counts].astype(np.float64)
    for what, values in (("prediction", p), ("ground truth", gt)):
        bad = (~np.isfinite(values)).sum()
        if bad:
            raise BadInput(f"{name}: {what} NaN or infinite at {bad} of the {len(p)} pixels that count")
    return p, gt


def size_of(depth):
    """A map's size in words."""
    return " x ".join(map(str, depth.shape))


def check_sizes(prediction, truth, name):
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        sizes = f"prediction is {size_of(prediction)} (height x width), ground truth {size_of(truth)}"
        raise BadInput(f"{name}: {sizes}; must be two maps of one size")


def scale_invariant(d):
    """100 x standard deviation of d (n,), differences of log-depth. Rounding leaves the variance of equal ones a little
    below 0.
    """
    return 100 * np.sqrt(max(np.mean(d**2) - np.mean(d) ** 2, 0.0))


def eigen_metrics(prediction, truth, low, high, crop="none", name="prediction"):
    """Eigen et al.'s metrics of one image. -> {one of EIGEN: float}, or None where no ground truth counts: such images
    have no say.

    prediction, truth: float metres (H, W). Ground truth counts strictly between low and high, metres, inside the crop
    (crop_mask). Predictions are clipped to [low, high] before, so what is 0 or negative counts as low, and is no error.
    name: of the image, for messages. Raises BadInput for different sizes, and for a prediction that is NaN or infinite
    where ground truth counts.
    """
    check_sizes(prediction, truth, name)
    # compared as it was read: in float32, where NYU's 1 mm, as its PNGs have it, equals low and does not count
    counts = (truth > float(low)) & (truth < float(high)) & crop_mask(*truth.shape, crop)
    if not counts.any():
        return None
    p, gt = scored_pixels(prediction, truth, counts, name)
    p = p.clip(low, high)
    ratio, d = np.maximum(gt / p, p / gt), np.log(p) - np.log(gt)
    found = {
        "a1": np.mean(ratio < 1.25),
        "a2": np.mean(ratio < 1.25**2),
        "a3": np.mean(ratio < 1.25**3),
        "abs_rel": np.mean(np.abs(gt - p) / gt),
        "sq_rel": np.mean((gt - p) ** 2 / gt),
        "rmse": np.sqrt(np.mean((gt - p) ** 2)),
        "rmse_log": np.sqrt(np.mean(d**2)),
        "silog": scale_invariant(d),
        "log10": np.mean(np.abs(d)) / np.log(10),
    }
    return {k: float(v) for k, v in found.items()}


def benchmark_metrics(prediction, truth, name="prediction"):
    """KITTI's depth benchmark of one image. -> {one of BENCHMARK: float}, or None without ground truth.

    prediction, truth: float metres (H, W). All ground truth above 0 counts: no range, no crop, and nothing is clipped.
    Raises BadInput for different sizes, and for a prediction that is NaN, infinite, 0 or negative where there is ground
    truth.
    """
    check_sizes(prediction, truth, name)
    counts = truth > 0
    if not counts.any():
        return None
    p, gt = scored_pixels(prediction, truth, counts, name)
    low = (p <= 0).sum()
    if low:
        where = f"prediction 0 or negative at {low} of the {len(p)} pixels with ground truth"
        raise BadInput(f"{name}: {where}; the benchmark takes logarithms of it")
    found = {
        "SILog": scale_invariant(np.log(p) - np.log(gt)),
        "absErrorRel": 100 * np.mean(np.abs(gt - p) / gt),
        "sqErrorRel": 100 * np.mean(((gt - p) / gt) ** 2),  # over gt^2, where Eigen's sq_rel is over gt
        "iRMSE": 1000 * np.sqrt(np.mean((1 / gt - 1 / p) ** 2)),
    }
    return {k: float(v) for k, v in found.items()}


def mean_over_images(rows):
    """The figures of a set of images: of each image's, a dict, or None where it had no ground truth. -> {name: mean},
    images counted, images left out. Raises BadInput where none is left.
    """
    scored = [row for row in rows if row is not None]
    if not scored:
        raise BadInput(f"no ground truth that counts in any of the {len(rows)} images")
    means = {k: float(np.mean([row[k] for row in scored])) for k in scored[0]}
    return means, len(scored), len(rows) - len(scored)


# -----------------------------------------------------------------------------
# files


def read_depth(path, scale):
    """data_depth.read_depth in metres, float32."""
    return data_depth.read_depth(path).astype(np.float32) / np.float32(scale)


def write_depth(depth, path, scale):
    """Metres (H, W) -> a 16-bit PNG of metres x scale, rounded; what is too deep for 16 bits (256 m at KITTI's 256, 65
    m at NYU's 1000) becomes 65535. Less than half a step becomes 0. Raises BadInput for NaN, infinite or negative
    depth, and a path that fails.
    """
    depth = np.asarray(depth, np.float64)
    if depth.ndim != 2:
        raise BadInput(f"{path}: depth of shape {depth.shape} cannot be written; must be (height, width)")
    bad = (~np.isfinite(depth) | (depth < 0)).sum()
    if bad:
        raise BadInput(f"{path}: not written, {bad} of {depth.size} depths are NaN, infinite or negative")
    steps = np.minimum(np.round(depth * scale), 65535).astype(np.uint16)
    with writing(path) as temporary:
        Image.fromarray(steps).save(temporary, format="PNG")


def match_prediction(prediction, truth_shape, path):
    """A prediction (H, W) at the size of its ground truth. Many are of KITTI's crop alone: those are put back where it
    lies, their edges continued into the margins, which no Eigen-style figure looks at. Raises BadInput, which names
    path, for any other size.
    """
    height, width = truth_shape
    if prediction.shape == (height, width):
        return prediction
    if prediction.shape != KB or height < KB[0] or width < KB[1]:
        sizes = f"{size_of(prediction)} (height x width), ground truth is {height} x {width}"
        raise BadInput(f"{path}: {sizes}; must be that, or KITTI's crop of it, {KB[0]} x {KB[1]}")
    return fill_border(prediction, kb_window(height, width), truth_shape)


def fill_border(prediction, part, shape):
    """A prediction of `part` (slices of rows and columns) of an image of `shape`, its edges continued over the rest."""
    around = [(s.start, edge - s.stop) for s, edge in zip(part, shape)]
    return np.pad(prediction, around, mode="edge")


def find_prediction(folder, name, also=()):
    """The file of a prediction, whoever named it: in `folder`, NAME.png or the same with _ for /, then so for the
    further stems in `also`. Raises BadInput if none is there.
    """
    stems = (name, *also)
    for stem in stems:
        for path in (Path(folder) / f"{stem}.png", Path(folder) / f"{stem.replace('/', '_')}.png"):
            if path.is_file():
                return path
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder, to find {name}.png in")
    others = sorted({f"{stem.replace('/', '_')}.png" for stem in stems} - {f"{name}.png"})
    nor = f", nor {', '.join(others)}" if others else ""
    raise BadInput(f"{folder}: no {name}.png in it{nor}")


def bts_names(name):
    """What others call the prediction for an image of KITTI: DRIVE_FRAME (BTS), DRIVE_image_FRAME_CAMERA (KITTI's
    benchmark).
    """
    parts = name.split("/")
    if len(parts) < 4:
        return []
    drive, camera, frame = parts[-4], parts[-3], parts[-1]
    return [f"{drive}_{frame}", f"{drive}_image_{frame}_{camera}"]


# -----------------------------------------------------------------------------
# table

DIGITS = {"a1": 3, "a2": 3, "a3": 3, "abs_rel": 4, "sq_rel": 4, "rmse": 3, "rmse_log": 4, "silog": 2, "log10": 4}


def depth_table(rows, images):
    """Lines of text for {name: {one of EIGEN: figure}}, scored on so many images. A figure that a row lacks is a
    dash.
    """
    width = max(map(len, rows))
    on = "1 image" if images == 1 else f"{images} images"
    lines = [
        f"depth on {on}: a1 to a3 are better higher, all others lower; sq_rel and rmse in metres",
        " ".join([f"{'':>{width}}", *(f"{k:>8}" for k in EIGEN)]),
    ]
    for name, figures in rows.items():
        cells = [f"{figures[k]:.{DIGITS[k]}f}" if k in figures else "-" for k in EIGEN]
        lines.append(" ".join([f"{name:>{width}}", *(f"{cell:>8}" for cell in cells)]))
    return lines


def report(c, rows):
    """Lines of text for {name: result of `summary`}; the published rows too, where the test split is the one they are
    of. c: finetune_depth.Config.
    """
    first = next(iter(rows.values()))
    table = {name: found["eigen"] for name, found in rows.items()}
    if STANDARD.get(c.dataset) == (first["names"], c.min_depth, c.max_depth):
        table |= PUBLISHED[c.dataset]
    title, *lines = depth_table(table, first["images"])
    title += f"; {c.min_depth:g} to {c.max_depth:g} m, crop {CROPS[c.dataset]}"
    if first["left_out"]:
        title += f"; {first['left_out']} left out, without ground truth"
    lines = [title, *lines]
    for name, found in rows.items():
        figures = ", ".join(f"{k} {v:.2f}" for k, v in found["benchmark"].items()) or "not to be had"
        line = f"{name}, as KITTI's benchmark (no range, no crop): {figures}"
        if found["zeros"]:
            line += f"; without {found['zeros']} images where a prediction is 0"
        lines.append(line)
    return lines


# -----------------------------------------------------------------------------
# a network's predictions, and their figures


@torch.no_grad()
def predict(model, image, c, device):
    """Depth of a whole image, averaged with that of its mirror image. model: finetune_depth.DepthNet in eval mode;
    image (H, W, 3) uint8; c: finetune_depth.Config. -> float32 metres (H, W). What lies outside KITTI's crop, which the
    network never sees, continues the edges.
    """
    part = data_depth.without_border(c.dataset, *image.shape[:2], training=False)
    seen = image[part].copy()  # torch wants it writable
    height, width = seen.shape[:2]
    size = data_depth.resized((width, height), c.image_scale)
    A = torch.from_numpy(data_depth.resizing((width, height), size))[None]
    pixels = torch.from_numpy(seen).to(device).permute(2, 0, 1)[None]
    own_colours = torch.eye(3, 4)[None]
    x = data.warp_images(pixels, torch.tensor([[width, height]]), A, own_colours, size)
    with runtime.mixed_precision(c.amp, device):
        depth = model.depth(torch.cat([x, x.flip(3)])).clamp(c.min_depth, c.max_depth)
    depth = F.interpolate(depth, (height, width), mode="bilinear", align_corners=True)[:, 0]
    mean = (depth[0] + depth[1].flip(1)) / 2
    return fill_border(mean.cpu().numpy(), part, image.shape[:2])


def score(prediction, truth, c, name):
    """Both protocols' figures of one image. prediction, truth: metres (H, W), whole images.

    -> eigen_metrics, benchmark_metrics, each None without ground truth; and whether a prediction for ground truth is 0,
    as in maps that are padded with it: then the benchmark's are None, too.
    """
    part = data_depth.without_border(c.dataset, *truth.shape, training=False)
    eigen = eigen_metrics(prediction[part], truth[part], c.min_depth, c.max_depth, CROPS[c.dataset], name)
    zero = bool((prediction[truth > 0] == 0).any())
    benchmark = None if zero else benchmark_metrics(prediction, truth, name)
    return eigen, benchmark, zero


def summary(scored, names):
    """Of the results of `score` for the images `names`: {"eigen", "benchmark": means over images; "images", "left_out",
    "zeros": how many; "names": which images they are of}.
    """
    eigens, benchmarks, zeros = zip(*scored)
    eigen, images, left_out = mean_over_images(eigens)
    return {
        "eigen": eigen,
        "benchmark": mean_over_images(benchmarks)[0] if any(benchmarks) else {},
        "images": images,
        "left_out": left_out,
        "zeros": sum(zeros),
        "names": data.fingerprint(sorted(name for name, counted in zip(names, eigens) if counted)),
    }


def load(pair, c):
    """-> image (H, W, 3) uint8, ground truth (H, W) float32 metres. Raises BadInput, naming the file, for what cannot
    be read or cropped.
    """
    image, depth = data_depth.load_pair(pair)
    try:
        part = data_depth.without_border(c.dataset, *depth.shape, training=False)
        crop_mask(*depth[part].shape, CROPS[c.dataset])
    except BadInput as e:
        raise BadInput(f"{pair.image}: {e}") from None
    return image, depth.astype(np.float32) / np.float32(data_depth.SCALE[c.dataset])


def load_all(pairs, c, title=None, **bar):
    """`load` of each pair, in order, read a few ahead, beside a bar of progress (**bar: tqdm's options)."""
    loaded = runtime.ahead(lambda pair: load(pair, c), pairs)
    return tqdm(loaded, title, len(pairs), dynamic_ncols=True, mininterval=1, **bar)


def judge(model, pairs, c, run):
    """A network's figures on pairs, on every rank; each takes its share. -> result of `summary`. The model is left in
    eval mode, and with rank 0's batch statistics, which are those that a checkpoint holds.
    """
    runtime.follow_main(model, run)
    model.eval()
    mine = range(run.rank, len(pairs), run.world)
    loaded = load_all([pairs[i] for i in mine], c, "judging", disable=not run.main, leave=False)
    scored = []
    for (image, truth), i in zip(loaded, mine):
        prediction = predict(model, image, c, run.device)
        scored.append((i, score(prediction, truth, c, pairs[i].name)))
    in_order = sorted(run.gather(scored), key=lambda row: row[0])
    return summary([figures for _, figures in in_order], [pair.name for pair in pairs])


def draw(model, pair, c, device, path):
    """Picture of a pair; -> what was measured, in words."""
    image, truth = load(pair, c)
    prediction = predict(model.eval(), image, c, device)
    return pictures.draw_depth(image, prediction, truth, path, pair.name, c.max_depth)
