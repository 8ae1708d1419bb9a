"""Depth maps beside ground truth, scored as papers on KITTI and NYU Depth do, and as KITTI's depth benchmark does.

Maps are float metres (H, W), in files 16-bit PNGs of metres x 256 (KITTI) or x 1000 (NYU). Ground truth is 0 where there is none.
A figure is one image's first, then the mean over images. Two protocols, which are not to be mixed:

    Eigen style   `eigen_metrics`: ground truth within a range of depths and a crop, predictions clipped to that range; KITTI's
                  maps are cut by `kb_crop` before. What papers print, and `PUBLISHED` has.
    benchmark     `benchmark_metrics`: all ground truth, as it is, by the leaderboard's names and units.

The first agrees, on real maps and to 2e-7, with Monocular-Depth-Estimation-Toolbox, which SimIPU's depth results were made with.
Wrong input raises `BadInput`, one line.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from data import BadInput

EIGEN = ("a1", "a2", "a3", "abs_rel", "sq_rel", "rmse", "rmse_log", "silog", "log10")  # of 1: a1 to a3, abs_rel; metres: sq_rel, rmse; silog x 100
BENCHMARK = ("SILog", "absErrorRel", "sqErrorRel", "iRMSE")  # the leaderboard's names: x 100, %, % (over squared ground truth), 1/km
KB = (352, 1216)  # height, width of the crop that KITTI's benchmark test images have, and all predictions are cut to
GARG = (0.40810811, 0.99189189, 0.03594771, 0.96405229)  # Garg's crop: rows from, to, columns from, to, as shares of the edges

# Last lines of the official logs (configs/simipu/resources/logs): one run each, ResNet-50, 24 epochs, flip test-time augmentation
PUBLISHED = {
    "kitti": {
        "published, scratch": dict(zip(EIGEN, (0.90924, 0.98157, 0.99579, 0.08693, 0.38533, 3.2793, 0.13353, 12.3282, 0.03825))),
        "published, SimIPU on KITTI": dict(zip(EIGEN, (0.93100, 0.98772, 0.99699, 0.07546, 0.31195, 2.9595, 0.11704, 10.7722, 0.03324))),
        "published, SimIPU on Waymo": dict(zip(EIGEN, (0.94520, 0.99177, 0.99805, 0.06656, 0.25009, 2.6697, 0.10372, 9.4962, 0.02943))),
        "published, ImageNet labels": dict(zip(EIGEN, (0.95797, 0.99418, 0.99891, 0.05987, 0.20547, 2.4544, 0.09314, 8.5474, 0.02652))),
    },
    "nyu": {
        "published, scratch": dict(zip(EIGEN, (0.67276, 0.90709, 0.97416, 0.20469, 0.18202, 0.6619, 0.24816, 20.7970, 0.08529))),
        "published, SimIPU on KITTI": dict(zip(EIGEN, (0.72909, 0.93235, 0.98318, 0.17751, 0.14427, 0.5862, 0.21862, 18.0709, 0.07476))),
        "published, SimIPU on Waymo": dict(zip(EIGEN, (0.76302, 0.94303, 0.98518, 0.16581, 0.13051, 0.5462, 0.20414, 16.9259, 0.06923))),
        "published, ImageNet labels": dict(zip(EIGEN, (0.81541, 0.96189, 0.99150, 0.14292, 0.09731, 0.4810, 0.17829, 14.7621, 0.06038))),
    },
}


# -----------------------------------------------------------------------------
# metrics


def kb_window(height, width):
    """(top, left) of the KITTI crop: flush with the bottom, and in the middle. Raises BadInput for a smaller map."""
    if height < KB[0] or width < KB[1]:
        raise BadInput(f"a map of {height} x {width} (height x width): too small for KITTI's crop of {KB[0]} x {KB[1]}")
    return height - KB[0], int((width - KB[1]) / 2)


def kb_crop(map):
    """KITTI's maps as they are scored: (..., H, W) -> (..., 352, 1216), numpy or torch. Raises BadInput for a smaller one."""
    top, left = kb_window(*map.shape[-2:])
    return map[..., top : top + KB[0], left : left + KB[1]]


def crop_mask(height, width, crop):
    """Where ground truth counts, bool (height, width). crop: "garg" (KITTI, inside the KITTI crop), "eigen" (NYU: of 480 x 640 alone)
    or "none". Raises BadInput for another size or another name."""
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
    """Both maps at the pixels that count, (n,) float64 each. Raises BadInput where either is NaN or infinite, which would spread."""
    p, gt = prediction[counts].astype(np.float64), truth[counts].astype(np.float64)
    for what, values in (("prediction", p), ("ground truth", gt)):
        bad = (~np.isfinite(values)).sum()
        if bad:
            raise BadInput(f"{name}: {what} NaN or infinite at {bad} of the {len(p)} pixels that count")
    return p, gt


def check_sizes(prediction, truth, name):
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        sizes = [" x ".join(map(str, m.shape)) for m in (prediction, truth)]
        raise BadInput(f"{name}: prediction is {sizes[0]} (height x width), ground truth {sizes[1]}; must be two maps of one size")


def scale_invariant(d):
    """100 x standard deviation of d (n,), differences of log-depth. Rounding leaves the variance of equal ones a little below 0."""
    return 100 * np.sqrt(max(np.mean(d**2) - np.mean(d) ** 2, 0.0))


def eigen_metrics(prediction, truth, low, high, crop="none", name="prediction"):
    """Eigen et al.'s metrics of one image. -> {one of EIGEN: float}, or None where no ground truth counts: such images have no say.

    prediction, truth: float metres (H, W). Ground truth counts strictly between low and high, metres, inside the crop (crop_mask).
    Predictions are clipped to [low, high] before, so what is 0 or negative counts as low, and is no error. name: of the
    image, for messages. Raises BadInput for different sizes, and for a prediction that is NaN or infinite where ground truth counts.
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

    prediction, truth: float metres (H, W). All ground truth above 0 counts: no range, no crop, and nothing is clipped. Raises
    BadInput for different sizes, and for a prediction that is NaN, infinite, 0 or negative where there is ground truth.
    """
    check_sizes(prediction, truth, name)
    counts = truth > 0
    if not counts.any():
        return None
    p, gt = scored_pixels(prediction, truth, counts, name)
    if (p <= 0).any():
        raise BadInput(f"{name}: prediction 0 or negative at {(p <= 0).sum()} of the {len(p)} pixels with ground truth; the benchmark takes logarithms of it")
    found = {
        "SILog": scale_invariant(np.log(p) - np.log(gt)),
        "absErrorRel": 100 * np.mean(np.abs(gt - p) / gt),
        "sqErrorRel": 100 * np.mean(((gt - p) / gt) ** 2),  # over gt^2, where Eigen's sq_rel is over gt
        "iRMSE": 1000 * np.sqrt(np.mean((1 / gt - 1 / p) ** 2)),
    }
    return {k: float(v) for k, v in found.items()}


def mean_over_images(rows):
    """The figures of a set of images: of each image's, a dict, or None where it had no ground truth. -> {name: mean}, images counted,
    images left out. Raises BadInput where none is left."""
    scored = [row for row in rows if row is not None]
    if not scored:
        raise BadInput(f"no ground truth that counts in any of the {len(rows)} images")
    return {k: float(np.mean([row[k] for row in scored])) for k in scored[0]}, len(scored), len(rows) - len(scored)


# -----------------------------------------------------------------------------
# files


def read_depth(path, scale):
    """A 16-bit PNG of metres x scale -> float32 metres (H, W); 0 stays 0. Raises BadInput for a file that is missing, broken, or any
    other picture: 8-bit ones are often drawings of depth."""
    try:
        with Image.open(path) as image:
            kind = image.format, image.mode
            if kind in (("PNG", "I;16"), ("PNG", "I")):  # Pillow's names for 16-bit grey, now and before version 11
                return np.asarray(image).astype(np.float32) / np.float32(scale)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:  # Pillow answers a broken png with any
        raise BadInput(f"{path}: not a readable PNG ({getattr(e, 'strerror', None) or str(e).splitlines()[0]})") from None
    raise BadInput(f"{path}: a {kind[0]} of mode {kind[1]}; depth must be a PNG of one 16-bit channel")


def write_depth(depth, path, scale):
    """Metres (H, W) -> a 16-bit PNG of metres x scale, rounded; what is too deep for 16 bits (256 m at KITTI's 256, 65 m at NYU's
    1000) becomes 65535. Less than half a step becomes 0. Raises BadInput for NaN, infinite or negative depth, and a path that fails."""
    depth = np.asarray(depth, np.float64)
    if depth.ndim != 2:
        raise BadInput(f"{path}: depth of shape {depth.shape} cannot be written; must be (height, width)")
    bad = (~np.isfinite(depth) | (depth < 0)).sum()
    if bad:
        raise BadInput(f"{path}: not written, {bad} of {depth.size} depths are NaN, infinite or negative")
    steps = np.minimum(np.round(depth * scale), 65535).astype(np.uint16)
    try:
        Image.fromarray(steps).save(path, format="PNG")
    except OSError as e:
        raise BadInput(f"{path}: not writable ({e.strerror})") from None


def match_prediction(prediction, truth_shape, path):
    """A prediction (H, W) at the size of its ground truth. Many are of KITTI's crop alone: those are put back where it lies, their edges
    continued into the margins, which no Eigen-style figure looks at. Raises BadInput, which names path, for any other size."""
    height, width = truth_shape
    if prediction.shape == (height, width):
        return prediction
    if prediction.shape != KB or height < KB[0] or width < KB[1]:
        size = " x ".join(map(str, prediction.shape))
        raise BadInput(f"{path}: {size} (height x width), ground truth is {height} x {width}; must be that, or KITTI's crop of it, {KB[0]} x {KB[1]}")
    top, left = kb_window(height, width)
    return np.pad(prediction, ((top, 0), (left, width - KB[1] - left)), mode="edge")


def find_prediction(folder, name, also=()):
    """The file of a prediction, whoever named it: in `folder`, NAME.png or the same with _ for /, then so for the further stems in
    `also`. Raises BadInput if none is there."""
    stems = (name, *also)
    for stem in stems:
        for path in (Path(folder) / f"{stem}.png", Path(folder) / f"{stem.replace('/', '_')}.png"):
            if path.is_file():
                return path
    if not Path(folder).is_dir():
        raise BadInput(f"{folder}: no such folder, to find {name}.png in")
    others = sorted({stem.replace("/", "_") for stem in stems} - {name})
    raise BadInput(f"{folder}: no {name}.png in it" + f", nor {'.png, '.join(others)}.png" * bool(others))


# -----------------------------------------------------------------------------
# table


def depth_table(rows, images):
    """Lines of text for {name: {one of EIGEN: figure}}, scored on so many images. A figure that a row lacks is a dash."""
    digits = {"a1": 3, "a2": 3, "a3": 3, "abs_rel": 4, "sq_rel": 4, "rmse": 3, "rmse_log": 4, "silog": 2, "log10": 4}
    width = max(map(len, rows))
    lines = [
        f"depth on {images} image{'s' * (images != 1)}: a1 to a3 are better higher, all others lower; sq_rel and rmse in metres",
        " ".join([" " * width, *(f"{k:>8}" for k in EIGEN)]),
    ]
    for name, r in rows.items():
        lines.append(" ".join([f"{name:>{width}}", *(f"{r[k]:8.{digits[k]}f}" if k in r else f"{'-':>8}" for k in EIGEN)]))
    return lines
