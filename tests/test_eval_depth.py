"""Depth figures, by formulas written out pixel by pixel, at borders of crops and ranges, on real maps; wrong files."""

import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_depth
import eval_depth as depth
from files import BadInput

# What the toolbox's own functions say of perturbed(truth, i) on the i-th file of SIMIPU_DEPTH_SAMPLES: mean over the
# images, in the order of EIGEN
TOOLBOX = {
    "kitti": (0.83855662, 0.99171392, 0.99624261, 0.14585473, 1.27158022, 4.44027955, 0.44916768, 44.7760946,
              0.06382753),
    "nyu": (0.83858366, 0.99156335, 0.99620188, 0.13983432, 0.13987808, 0.69037406, 0.39434022, 39.2674904,
            0.06252794),
}  # fmt: skip


def kb_crop(depth):
    """KITTI's maps as they are scored: (..., H, W) -> (..., 352, 1216)."""
    rows, columns = data_depth.kb_window(*depth.shape[-2:])
    return depth[..., rows, columns]


def perturbed(truth, seed):
    """A prediction (H, W) float64 at every pixel: ground truth, a ramp where there is none, with noise, and at 2 in
    1000 pixels each 200 m and 0, outside the range that is scored.
    """
    rng = np.random.default_rng(seed)
    ramp = np.linspace(2 * truth.max(), 0.5, truth.shape[0])[:, None]
    p = np.where(truth > 0, truth.astype(np.float64), ramp) * np.exp(0.15 * rng.standard_normal(truth.shape) + 0.05)
    p[rng.random(truth.shape) < 0.002] = 200.0
    p[rng.random(truth.shape) < 0.002] = 0.0
    return p


def made_up(height, width, high, seed=0):
    """Ground truth (H, W) float32 from 0.1 m to 1.4 times high, at 3 % of the pixels."""
    rng = np.random.default_rng(seed)
    truth = (0.1 + 1.3 * high * rng.random((height, width)) ** 2).astype(np.float32)
    truth[rng.random((height, width)) > 0.03] = 0
    return truth


def by_hand(prediction, truth, low, high, box):
    """Both protocols in plain sums over pixels; box: rows from, to, columns from, to. -> Eigen's, the benchmark's"""
    eigen, bench = [], []
    for v, u in zip(*np.nonzero(truth)):
        gt, p = float(truth[v, u]), float(prediction[v, u])
        d = math.log(p / gt) if p > 0 else None
        bench.append((d, abs(p / gt - 1), (p / gt - 1) ** 2, (1 / p - 1 / gt) ** 2) if p > 0 else None)
        if box[0] <= v < box[1] and box[2] <= u < box[3] and low < gt < high:
            p = min(max(p, low), high)
            d, off = math.log(p / gt), abs(p - gt)
            within = [abs(d) < k * math.log(1.25) for k in (1, 2, 3)]
            eigen.append((*within, off / gt, off * off / gt, off * off, d * d, d, abs(math.log10(p / gt))))
    n = len(eigen)
    means = [math.fsum(column) / n for column in zip(*eigen)]
    # a standard deviation, by its own definition
    silog = 100 * math.sqrt(math.fsum((row[7] - means[7]) ** 2 for row in eigen) / n)
    first = dict(zip(depth.EIGEN, [*means[:5], math.sqrt(means[5]), math.sqrt(means[6]), silog, means[8]]))
    if None in bench:
        return first, None
    n = len(bench)
    means = [math.fsum(column) / n for column in zip(*bench)]
    silog = 100 * math.sqrt(math.fsum((row[0] - means[0]) ** 2 for row in bench) / n)
    return first, dict(zip(depth.BENCHMARK, (silog, 100 * means[1], 100 * means[2], 1000 * math.sqrt(means[3]))))


BOXES = {  # as the papers' sentences have them, for 352 x 1216 and 480 x 640
    ("garg", 352, 1216): (143, 349, 43, 1172),
    ("eigen", 480, 640): (45, 471, 41, 601),
    ("none", 90, 200): (0, 90, 0, 200),
}


# -----------------------------------------------------------------------------
# figures


@pytest.mark.parametrize("crop, height, width", BOXES)
@pytest.mark.parametrize("low, high", [(1e-3, 80), (2.0, 10)])
def test_figures_by_hand(crop, height, width, low, high):
    truth = made_up(height, width, high)
    prediction = perturbed(truth, 1)
    ours = depth.eigen_metrics(prediction, truth, low, high, crop)
    assert tuple(ours) == depth.EIGEN and all(type(x) is float for x in ours.values())
    assert ours == pytest.approx(by_hand(prediction, truth, low, high, BOXES[crop, height, width])[0], rel=1e-6)
    above = prediction.clip(0.01)
    ours = depth.benchmark_metrics(above, truth)
    assert tuple(ours) == depth.BENCHMARK and all(type(x) is float for x in ours.values())
    assert ours == pytest.approx(by_hand(above, truth, low, high, BOXES[crop, height, width])[1], rel=1e-6)


def test_figures_of_two_pixels():
    """Ground truth 2 and 4 m, predicted 1 and 5 m."""
    # what is not scored may be anything
    truth, prediction = np.array([[2.0, 4.0, 0.0]]), np.array([[1.0, 5.0, np.nan]])
    a, b = math.log(1 / 2), math.log(5 / 4)
    eigen = {"a1": 0, "a2": 0.5, "a3": 0.5}  # 5 / 4 is not below 1.25
    eigen |= {"abs_rel": 3 / 8, "sq_rel": 3 / 8, "rmse": 1, "rmse_log": math.hypot(a, b) / math.sqrt(2)}
    eigen |= {"silog": 50 * (b - a), "log10": (math.log10(2) + math.log10(1.25)) / 2}
    assert depth.eigen_metrics(prediction, truth, 1e-3, 80) == pytest.approx(eigen)
    bench = {"SILog": 50 * (b - a), "absErrorRel": 37.5, "sqErrorRel": 100 * 5 / 32}
    bench["iRMSE"] = 1000 * math.sqrt((0.25 + 0.0025) / 2)
    assert depth.benchmark_metrics(prediction, truth) == pytest.approx(bench)


def test_a_perfect_prediction():
    """And one wrong by a factor alone, whose silog is nothing but rounding: 0, not NaN."""
    truth = made_up(60, 70, 80)
    found = depth.eigen_metrics(truth, truth, 1e-3, 80)
    assert found == {k: 1.0 if k in ("a1", "a2", "a3") else 0.0 for k in depth.EIGEN}
    assert set(depth.benchmark_metrics(truth, truth).values()) == {0.0}
    for factor in (1.1, 3.0, 0.7, 0.01):
        flat = np.full((60, 70), 10.0)
        assert depth.eigen_metrics(factor * flat, flat, 1e-3, 80)["silog"] == pytest.approx(0, abs=1e-4)
        assert depth.benchmark_metrics(factor * truth, truth)["SILog"] == pytest.approx(0, abs=1e-4)
    assert depth.scale_invariant(np.array([-1.0000001] * 3)) >= 0 and depth.scale_invariant(np.full(7, 0.1)) < 1e-5


@pytest.mark.parametrize("crop, height, width", BOXES)
def test_pixels_at_the_edge_of_a_crop(crop, height, width):
    """One pixel with ground truth decides: scored in the box's corners, not beside them."""
    top, bottom, left, right = BOXES[crop, height, width]
    corners = [(top, left), (bottom - 1, right - 1)]
    beside = [(top - 1, left), (top, left - 1), (bottom, right - 1), (bottom - 1, right)]
    for v, u in corners + beside:
        if 0 <= v < height and 0 <= u < width:
            truth = np.zeros((height, width), np.float32)
            truth[v, u] = 5.0
            found = depth.eigen_metrics(truth + 1, truth, 1e-3, 10, crop)
            if (v, u) in corners:
                assert found["abs_rel"] == pytest.approx(0.2)
            else:
                assert found is None
    mask = depth.crop_mask(height, width, crop)
    assert mask.dtype == bool and mask.shape == (height, width)
    assert mask.sum() == (bottom - top) * (right - left)


def test_bounds_of_the_range():
    """Ground truth at a bound does not count, whatever float32 makes of it. A prediction beyond one is drawn to it."""

    def scored(truth, low, high, prediction=5.0):
        return depth.eigen_metrics(np.full((1, 1), prediction), np.array([[truth]]), low, high)

    for kind in (np.float32, np.float64):
        for truth, low, high in ((0.001, 1e-3, 10), (80, 1e-3, 80), (10, 1e-3, 10)):  # at a bound
            assert scored(kind(truth), low, high) is None
        for truth, low, high in ((0, 0, 80), (90, 1e-3, 80), (np.nan, 1e-3, 80)):  # outside, or no depth at all
            assert scored(kind(truth), low, high) is None
        assert scored(kind(0.0011), 1e-3, 10) and scored(np.nextafter(kind(80), kind(0)), 1e-3, 80)
    assert scored(np.float32(40), 1e-3, 80, 500.0)["rmse"] == 40  # 80 counted for 500
    for below in (0.0, -3.0):
        assert scored(np.float32(40), 1e-3, 80, below)["rmse"] == 40 - 1e-3
    at = lambda metres: np.full((1, 1), metres)
    assert depth.benchmark_metrics(at(500.0), at(100.0))["absErrorRel"] == 400  # no cap
    assert depth.benchmark_metrics(at(2e-4), at(1e-4))["absErrorRel"] == pytest.approx(100)


@pytest.mark.parametrize(
    "height, width, top, left", [(375, 1242, 23, 13), (370, 1241, 18, 12), (352, 1216, 0, 0), (376, 1217, 24, 0)]
)
def test_kitti_crop(height, width, top, left):
    """Flush with the bottom, odd margins rounded down; any leading axes, numpy or torch."""
    map = np.arange(height * width).reshape(height, width)
    cut = kb_crop(map)
    assert np.array_equal(cut, map[top : top + 352, left : left + 1216]) and cut[-1, 0] == map[-1, left]
    many = torch.from_numpy(map).expand(2, 3, -1, -1)
    assert torch.equal(kb_crop(many)[1, 2], torch.from_numpy(cut))


@pytest.mark.parametrize("height, width", [(351, 1242), (375, 1215)])
def test_kitti_crop_of_less_than_it(height, width):
    with pytest.raises(BadInput, match=rf"^a map of {height} x {width} .*352 x 1216$"):
        kb_crop(np.zeros((height, width)))


def test_wrong_crops():
    with pytest.raises(BadInput, match="^a map of 375 x 1242 .* NYU's 480 x 640$"):
        depth.eigen_metrics(np.ones((375, 1242)), np.ones((375, 1242)), 1e-3, 80, "eigen")
    with pytest.raises(BadInput, match="'centre': must be garg, eigen or none$"):
        depth.crop_mask(480, 640, "centre")


def test_images_without_ground_truth():
    """They have no figures, and no say in the mean."""
    empty, some = np.zeros((4, 5)), np.full((4, 5), 2.0)
    assert depth.eigen_metrics(some, empty, 1e-3, 80) is None and depth.benchmark_metrics(some, empty) is None
    assert depth.eigen_metrics(some, 50 * some, 1e-3, 80) is None
    assert depth.benchmark_metrics(some, 50 * some) is not None
    rows = [{"a": 1.0, "b": 4.0}, None, {"a": 2.0, "b": 8.0}]
    assert depth.mean_over_images(rows) == ({"a": 1.5, "b": 6.0}, 2, 1)
    for rows in ([None, None], []):
        with pytest.raises(BadInput, match=f"any of the {len(rows)} images$"):
            depth.mean_over_images(rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_predictions_that_are_not_numbers(value):
    """Never a figure that is NaN, nor one that an infinite depth was clipped for."""
    truth, prediction = np.array([[3.0, 4.0, 0.0]]), np.array([[3.0, value, 1.0]])
    eigen = lambda p: depth.eigen_metrics(p, truth, 1e-3, 80, name="a/7.png")
    benchmark = lambda p: depth.benchmark_metrics(p, truth, name="a/7.png")
    for figures in (eigen, benchmark):
        with pytest.raises(BadInput, match="^a/7.png: prediction NaN or infinite at 1 of the 2") as e:
            figures(prediction)
        assert "\n" not in str(e.value)
        assert figures(np.array([[3.0, 4.0, value]]))  # where nothing is known, nothing is asked
    with pytest.raises(BadInput, match="ground truth NaN or infinite at 1 of the 2"):
        depth.benchmark_metrics(np.ones((1, 2)), np.array([[1.0, np.inf]]))


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_zeros_in_a_prediction(value):
    """Eigen's protocol clips them; the benchmark has no answer."""
    truth, prediction = np.array([[3.0, 4.0, 0.0]]), np.array([[3.0, value, value]])
    assert depth.eigen_metrics(prediction, truth, 1e-3, 80)["rmse"] == pytest.approx((4 - 1e-3) / math.sqrt(2))
    with pytest.raises(BadInput, match="^b.png: prediction 0 or negative at 1 of the 2 pixels"):
        depth.benchmark_metrics(prediction, truth, name="b.png")


@pytest.mark.parametrize("shape", [(4, 6), (5, 4), (20,), (1, 4, 5)])
def test_wrong_sizes(shape):
    size = " x ".join(map(str, shape))
    for figures in (depth.benchmark_metrics, lambda p, t, name: depth.eigen_metrics(p, t, 1e-3, 80, name=name)):
        with pytest.raises(BadInput, match=f"^c.png: prediction is {size} .* ground truth 4 x 5;"):
            figures(np.ones(shape), np.ones((4, 5)), name="c.png")
    with pytest.raises(BadInput, match="must be two maps"):
        depth.benchmark_metrics(np.ones((1, 4, 5)), np.ones((1, 4, 5)))


# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize("scale", [256, 1000])
def test_files_there_and_back(tmp_path, scale):
    depths = np.array([[0, 1, 2.5, 79.9], [65535 / scale, 65536 / scale, 1e6, 0.49 / scale]])
    depth.write_depth(depths, tmp_path / "d.png", scale)
    with Image.open(tmp_path / "d.png") as image:
        assert image.format == "PNG" and image.size == (4, 2)
        stored = np.asarray(image).astype(int)
    assert stored[0].tolist() == [0, scale, round(2.5 * scale), min(round(79.9 * scale), 65535)]
    assert stored[1].tolist() == [65535, 65535, 65535, 0]
    back = depth.read_depth(tmp_path / "d.png", scale)
    assert back.dtype == np.float32 and back.shape == (2, 4) and back[0, 0] == 0
    np.testing.assert_array_equal(back, (stored / scale).astype(np.float32))
    rng = np.random.default_rng(0)
    many = 60 * rng.random((50, 40))
    depth.write_depth(many, str(tmp_path / "m.png"), scale)
    off = np.abs(depth.read_depth(str(tmp_path / "m.png"), scale) - many)
    assert off.max() <= 0.5 / scale + 1e-5  # rounded, not cut


def test_one_millimetre_of_nyu_does_not_count(tmp_path):
    """Read from a file it is float32, of which 1e-3 is a little above float64's."""
    depth.write_depth(np.array([[0.001, 9.999, 10.0]]), tmp_path / "t.png", 1000)
    truth = depth.read_depth(tmp_path / "t.png", 1000)
    assert depth.eigen_metrics(np.full((1, 3), 5.0), truth, 1e-3, 10)["rmse"] == pytest.approx(4.999, rel=1e-6)


@pytest.mark.parametrize("depths", [[[np.nan, 1]], [[np.inf, 1]], [[-0.1, 1]]])
def test_depth_that_cannot_be_written(tmp_path, depths):
    with pytest.raises(BadInput, match=r"d\.png: not written, 1 of 2 depths are NaN, infinite or negative$"):
        depth.write_depth(depths, tmp_path / "d.png", 256)
    assert not list(tmp_path.iterdir())


def test_paths_and_shapes_that_cannot_be_written(tmp_path):
    with pytest.raises(BadInput, match=r"none/d\.png: not written \(No such file"):
        depth.write_depth([[1.0]], tmp_path / "none" / "d.png", 256)
    with pytest.raises(BadInput, match=r"d\.png: depth of shape \(1, 1, 2\)"):
        depth.write_depth([[[1.0, 2.0]]], tmp_path / "d.png", 256)


def grey16(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 60000, (200, 300)).astype(np.uint16)).save(path)
    return path.read_bytes()


def a_cut_png(path, share):
    path.write_bytes(grey16(path)[: int(share * len(grey16(path)))])


def a_png_without_its_last_chunk(path):
    path.write_bytes(b"\0\0\0\0".join(grey16(path).rsplit(b"IDAT", 1)))


def a_png_with_a_hole(path):
    path.write_bytes(grey16(path)[:5000] + b"\0" * 900 + grey16(path)[5900:])


ONE_CHANNEL = "a PNG of mode L; depth must be a PNG of one 16-bit channel$"
WRONG_FILES = {
    "missing": (lambda path: None, "no such file$"),
    "folder": (lambda path: path.mkdir(), "not a readable PNG"),
    "8-bit": (lambda path: Image.new("L", (30, 20), 7).save(path), ONE_CHANNEL),
    "RGB": (lambda path: Image.new("RGB", (30, 20)).save(path), "a PNG of mode RGB;"),
    "RGBA": (lambda path: Image.new("RGBA", (30, 20)).save(path), "a PNG of mode RGBA;"),
    "palette": (lambda path: Image.new("P", (30, 20)).save(path), "a PNG of mode P;"),
    "jpeg": (lambda path: Image.new("L", (30, 20)).save(path, "JPEG"), "a JPEG of mode L;"),
    "tiff": (lambda path: Image.fromarray(np.ones((4, 4), np.uint16)).save(path, "TIFF"), "a TIFF of mode I;16;"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable PNG"),
    "text": (lambda path: path.write_text("depth\n" * 50), "not a readable PNG"),
    "cut": (lambda path: a_cut_png(path, 0.5), "not a readable PNG"),
    "cut header": (lambda path: path.write_bytes(grey16(path)[:20]), "not a readable PNG"),
    "damaged chunk": (lambda path: a_png_without_its_last_chunk(path), "not a readable PNG"),
    "damaged": (lambda path: a_png_with_a_hole(path), "not a readable PNG"),
}


@pytest.mark.parametrize("kind", WRONG_FILES)
def test_wrong_files(tmp_path, kind):
    make, says = WRONG_FILES[kind]
    path = tmp_path / "0000000005.png"
    make(path)
    with pytest.raises(BadInput, match=says) as e:
        depth.read_depth(path, 256)
    assert str(e.value).startswith(f"{path}: ") and "\n" not in str(e.value)


def test_a_png_cut_anywhere(tmp_path):
    """BadInput, or the whole map where only the end mark is lost; nothing else."""
    whole = grey16(tmp_path / "d.png")
    truth = depth.read_depth(tmp_path / "d.png", 256)
    lost = 0
    for keep in [*range(0, 70), *range(70, len(whole) - 40, 9973), *range(len(whole) - 40, len(whole))]:
        (tmp_path / "d.png").write_bytes(whole[:keep])
        try:
            assert np.array_equal(depth.read_depth(tmp_path / "d.png", 256), truth)
        except BadInput:
            lost += 1
    assert lost > 80


def test_predictions_of_the_crop_alone():
    """Placed back, they have the figures of the whole map; beyond it their edges go on."""
    truth = made_up(375, 1242, 80)
    whole = perturbed(truth, 3)
    placed = depth.match_prediction(kb_crop(whole), truth.shape, "p.png")
    assert placed.shape == truth.shape and np.array_equal(kb_crop(placed), kb_crop(whole))
    a, b = (depth.eigen_metrics(kb_crop(p), kb_crop(truth), 1e-3, 80, "garg") for p in (placed, whole))
    assert a == b and a["abs_rel"] > 0.01
    assert (placed[:23, 13:1229] == placed[23, 13:1229]).all()
    assert (placed[:, :13] == placed[:, 13:14]).all() and (placed[:, 1229:] == placed[:, 1228:1229]).all()
    assert depth.match_prediction(whole, truth.shape, "p.png") is whole
    small = kb_crop(whole)
    assert depth.match_prediction(small, (352, 1216), "p.png") is small


KITTI_SIZE, NYU_SIZE = (375, 1242), (480, 640)


@pytest.mark.parametrize(
    "shape, truth",
    [
        ((374, 1242), KITTI_SIZE),
        ((352, 1216), NYU_SIZE),
        ((352, 1216), (351, 1242)),
        ((1216, 352), (1242, 375)),
        (NYU_SIZE, KITTI_SIZE),
    ],
)
def test_predictions_of_other_sizes(shape, truth):
    sizes = rf"{shape[0]} x {shape[1]} \(height x width\), ground truth is {truth[0]} x {truth[1]};"
    with pytest.raises(BadInput, match=rf"^out/p\.png: {sizes}"):
        depth.match_prediction(np.ones(shape), truth, "out/p.png")


def test_predictions_of_all_namings(tmp_path):
    name, bts = "2011_09_26_drive_0002_sync/0000000069", "2011_09_26_drive_0002_sync_0000000069_bts"
    flat = name.replace("/", "_")
    with pytest.raises(BadInput) as e:
        depth.find_prediction(tmp_path, name, (bts,))
    assert str(e.value) == f"{tmp_path}: no {name}.png in it, nor {flat}.png, {bts}.png"
    with pytest.raises(BadInput) as e:
        depth.find_prediction(tmp_path, "7")
    assert str(e.value) == f"{tmp_path}: no 7.png in it"
    (tmp_path / "7.png").mkdir()
    with pytest.raises(BadInput, match="no 7.png in it"):  # a folder is no prediction
        depth.find_prediction(tmp_path, "7")
    (tmp_path / name).parent.mkdir()
    for path in (f"{bts}.png", f"{flat}.png", f"{name}.png"):  # each goes before those already there
        (tmp_path / path).write_bytes(b"")
        assert depth.find_prediction(str(tmp_path), name, (bts,)) == tmp_path / path
    assert depth.find_prediction(tmp_path, "x", ("y", flat)) == tmp_path / f"{flat}.png"
    (tmp_path / "rgb_1.5.png").write_bytes(b"")
    assert depth.find_prediction(tmp_path, "rgb/1.5") == tmp_path / "rgb_1.5.png"  # .5 is no suffix
    with pytest.raises(BadInput, match=r"nowhere: no such folder, to find 7\.png in$"):
        depth.find_prediction(tmp_path / "nowhere", "7")


# -----------------------------------------------------------------------------
# tables


def test_published_rows():
    """The numbers as published, to three digits (Waymo on KITTI: .066, cut off from the log's .0666)."""
    rounded = {"kitti": (0.087, 0.075, 0.066, 0.060), "nyu": (0.205, 0.178, 0.166, 0.143)}
    for dataset, values in rounded.items():
        rows = depth.PUBLISHED[dataset]
        assert len(rows) == 4 and all(tuple(r) == depth.EIGEN for r in rows.values())
        np.testing.assert_allclose([r["abs_rel"] for r in rows.values()], values, atol=6e-4)
        for key in depth.EIGEN:  # pre-trainings rank alike in every figure; a slip of columns would break that
            column = [r[key] for r in rows.values()]
            assert column == sorted(column, reverse=key not in ("a1", "a2", "a3"))
        for r in rows.values():
            assert r["a1"] < r["a2"] < r["a3"] < 1 and r["log10"] < r["rmse_log"] < r["rmse"]
            assert 0.01 * r["silog"] < r["rmse_log"]
    one = depth.PUBLISHED["kitti"]["published, scratch"]
    assert (one["a1"], one["rmse"], one["sq_rel"]) == (0.90924, 3.2793, 0.38533)
    assert [round(r["rmse"], 2) for r in depth.PUBLISHED["nyu"].values()] == [0.66, 0.59, 0.55, 0.48]


def test_table():
    ours = dict.fromkeys(depth.EIGEN, 0.5) | {"a1": 0.0}
    del ours["log10"]
    lines = depth.depth_table({"ours": ours} | depth.PUBLISHED["kitti"], 652)
    assert len(lines) == 7 and "652 images" in lines[0] and lines[1].split() == list(depth.EIGEN)
    assert lines[2].split() == ["ours", *"0.000 0.500 0.500 0.5000 0.5000 0.500 0.5000 0.50 -".split()]
    assert lines[3].split()[-9:] == "0.909 0.982 0.996 0.0869 0.3853 3.279 0.1335 12.33 0.0382".split()
    assert len({len(line) for line in lines[1:]}) == 1  # columns line up
    assert lines[6].startswith("published, ImageNet labels")
    title, _, dashes = depth.depth_table({"ours": {}}, 1)
    assert "on 1 image:" in title and dashes.split() == ["ours", *"---------"]


# -----------------------------------------------------------------------------
# real maps


@pytest.mark.parametrize(
    "dataset, folder, scale, high, crop",
    [("kitti", "kitti/groundtruth", 256, 80, "garg"), ("nyu", "nyu/sync_depth", 1000, 10, "eigen")],
)
def test_real_maps(dataset, folder, scale, high, crop):
    """SIMIPU_DEPTH_SAMPLES: four maps of KITTI, three of NYU. The figures are the formulas', and those of the official
    toolbox.
    """
    if "SIMIPU_DEPTH_SAMPLES" not in os.environ:
        pytest.skip("SIMIPU_DEPTH_SAMPLES is not set")
    rows = []
    files = sorted((Path(os.environ["SIMIPU_DEPTH_SAMPLES"]) / folder).glob("*.png"))
    for i, path in enumerate(files):
        truth = depth.read_depth(path, scale)
        prediction = perturbed(truth, i)
        if dataset == "kitti":
            truth, prediction = kb_crop(truth), kb_crop(prediction)
        rows.append(depth.eigen_metrics(prediction, truth, 1e-3, high, crop))
        if i == 0:  # the formulas at a tenth of the pixels, for they are slow
            truth = truth * (np.random.default_rng(i).random(truth.shape) < 0.1)
            above = prediction.clip(0.01)
            kind = (crop, *truth.shape)
            eigen, bench = by_hand(above, truth, 0.01, high, BOXES[kind])
            assert depth.eigen_metrics(above, truth, 0.01, high, crop) == pytest.approx(eigen, rel=1e-6)
            assert depth.benchmark_metrics(above, truth) == pytest.approx(bench, rel=1e-6)
    mean, scored, left_out = depth.mean_over_images(rows)
    assert (scored, left_out) == (len(files), 0)
    assert mean == pytest.approx(dict(zip(depth.EIGEN, TOOLBOX[dataset])), rel=1e-6)
