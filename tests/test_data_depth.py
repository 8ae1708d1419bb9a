"""Depth maps stay on their images through every augmentation, are read as written, and are found in all layouts."""

import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import data
import data_depth
from data_depth import SCALE, DepthFrames, Pair, find_pairs
from files import BadInput
from finetune_depth import Config

STILL = dict(rotation_p=0.0, flip=0.0, crop=(0, 0), image_scale=1.0, colour_p=0.0)  # nothing is changed
RAMP, FIRST = 2.4, 40000  # of `ramps`: grey levels a pixel; the depth of pixel (0, 0), which as int16 were negative


def save(path, pixels):
    """uint8 (H, W, 3) or uint16 (H, W) as a file; -> its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def write_pair(folder, image, depth, name="a"):
    return Pair(name, save(folder / f"{name}.png", image), save(folder / f"{name}_depth.png", depth))


def write_blank(folder, width, height, depth=2560, name="a"):
    return write_pair(folder, np.zeros((height, width, 3), np.uint8), np.full((height, width), depth, np.uint16), name)


def ramps(width, height):
    """An image that tells the column by its red and the row by its green, and a depth map that tells both."""
    v, u = np.mgrid[:height, :width]
    image = np.rint(np.stack([5 + RAMP * u, 5 + RAMP * v, 0 * u], -1))
    return image.astype(np.uint8), (FIRST + v * width + u).astype(np.uint16)


def as_grey(image):
    """Normalised (B, 3, H, W) back to values of 0..255."""
    mean, std = (np.array(t)[:, None, None] for t in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    return (image.double().numpy() * std + mean) * 255


def load(dataset, keys, scale=1):
    """-> the batch as loaded, the batch as the model gets it. Depth in the file's units."""
    batch = data.collate([dataset[key] for key in keys])
    if isinstance(batch, BadInput):
        raise batch
    return batch, data_depth.augment(batch, scale, torch.device("cpu"))


# -----------------------------------------------------------------------------
# image and depth move together


@pytest.mark.parametrize("flip", [0.0, 1.0])
@pytest.mark.parametrize("crop, image_scale", [((70, 60), 0.5), ((0, 60), 1.0), ((80, 0), 0.7), ((0, 0), 1.0)])
def test_depth_stays_on_its_image(tmp_path, flip, crop, image_scale):
    sizes = [(100, 81), (91, 70), (100, 81)]  # one canvas for two sizes
    pairs = [write_pair(tmp_path, *ramps(*size), f"{i}") for i, size in enumerate(sizes)]
    change = dict(rotation=20.0, rotation_p=1.0, flip=flip, crop=crop, image_scale=image_scale)
    c = Config(**STILL | change, dataset="scenes", seed=5)
    batch, out = load(DepthFrames(pairs, c), [(epoch, i) for epoch in range(2) for i in range(3)])
    assert out["depth"].shape[1:] == out["image"].shape[2:] and out["index"].tolist() == [0, 1, 2, 0, 1, 2]
    within = 0.5 + 0.5 / RAMP + 0.01
    moved = zip(batch["A"].numpy(), batch["size"].tolist(), out["image"], out["depth"].numpy())
    for (A, (width, height), image, depth), grey in zip(moved, as_grey(out["image"])):
        v, u = np.nonzero(depth)
        assert len(v) > 0.7 * depth.size * (70 / 81 if crop[1] == 0 else 1) * (0.91 if crop[0] == 0 else 1)
        code = depth[v, u].astype(int) - FIRST
        from_u, from_v = code % width, code // width  # where the depth says that it comes from
        by_image = (grey[:2, v, u] - 5) / RAMP  # where the image says so
        assert abs(by_image[0] - from_u).max() < within and abs(by_image[1] - from_v).max() < within
        assert abs(np.mean(by_image - [from_u, from_v])) < 0.1  # and by no shift
        inverse = np.linalg.inv(A)
        x, y, _ = inverse @ [u, v, np.ones(len(u))]
        assert abs(x - from_u).max() < 0.501 and abs(y - from_v).max() < 0.501
        # every other pixel lies outside the image, and looks like it
        v, u = np.nonzero(depth == 0)
        x, y, _ = inverse @ [u, v, np.ones(len(u))]
        assert (np.maximum(abs(x - (width - 1) / 2) - width / 2, abs(y - (height - 1) / 2) - height / 2) > -1e-3).all()
        assert (image[:, v, u] == 0).all()


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_a_marked_pixel_appears_where_the_affine_says(tmp_path, flip):
    """In the image, and in the depth map; the centre of the image is the centre of the rotation."""
    width, height = 101, 81
    centre, mark = np.array([50, 40]), np.array([71, 33])
    image, depth = np.zeros((height, width, 3), np.uint8), np.ones((height, width), np.uint16)
    image[mark[1] - 1 : mark[1] + 2, mark[0] - 1 : mark[0] + 2] = 255
    depth[mark[1] - 1 : mark[1] + 2, mark[0] - 1 : mark[0] + 2] = 500
    depth[centre[1], centre[0]] = 9
    pair = write_pair(tmp_path, image, depth)
    c = Config(dataset="scenes", rotation=20.0, rotation_p=1.0, flip=flip, crop=(0, 0), colour_p=0.0)
    batch, out = load(DepthFrames([pair], c), [(epoch, 0) for epoch in range(12)])
    turned = []
    for A, grey, depth in zip(batch["A"].numpy(), as_grey(out["image"]), out["depth"].numpy()):
        np.testing.assert_allclose(A @ [*centre, 1], [*centre, 1], atol=1e-9)
        assert depth[centre[1], centre[0]] == 9
        expected = (A @ [*mark, 1])[:2]
        weights = grey[0].clip(0) * (grey[0] > 1) * (depth > 0)
        v, u = np.mgrid[:height, :width]
        in_image = np.array([(u * weights).sum(), (v * weights).sum()]) / weights.sum()
        in_depth = np.argwhere(depth == 500)[:, ::-1].mean(0)
        assert abs(in_image - expected).max() < 0.25 and abs(in_depth - expected).max() < 0.5
        arm = (expected - centre) * [-1 if flip else 1, 1]  # a rotation keeps its length
        assert abs(np.hypot(*arm) - np.hypot(*(mark - centre))) < 1e-9
        turned.append(np.degrees(np.arctan2(arm[1], arm[0]) - np.arctan2(*(mark - centre)[::-1])))
    assert -20 <= min(turned) < -8 and 8 < max(turned) <= 20


def test_smaller_images_keep_their_place(tmp_path):
    """A window times 0.5: pixel (u, v) of the result is the middle of four."""
    c = Config(**STILL | dict(dataset="scenes", crop=(40, 30), image_scale=0.5))
    batch, out = load(DepthFrames([write_pair(tmp_path, *ramps(100, 80))], c), [(epoch, 0) for epoch in range(5)])
    assert out["depth"].shape == (5, 15, 20)
    for grey, depth in zip(as_grey(out["image"]), out["depth"].numpy()):
        u = (grey[0] - 5) / RAMP
        left = u[0, 0] - 0.5  # the window's corner
        assert abs(left - round(left)) < 0.25 and 0 <= round(left) <= 60
        assert abs(u - (round(left) + 0.5 + 2 * np.arange(20))).max() < 0.25
        assert abs((depth - FIRST) % 100 - u).max() < 0.75


def test_no_augmentation_changes_nothing(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (37, 53, 3)).astype(np.uint8)
    depth = rng.integers(0, 2**16, (37, 53)).astype(np.uint16)
    _, out = load(DepthFrames([write_pair(tmp_path, image, depth)], Config(**STILL, dataset="scenes")), [(0, 0)])
    assert (out["depth"][0].numpy() == depth).all()
    assert abs(as_grey(out["image"])[0] - image.transpose(2, 0, 1)).max() < 1e-2


def test_no_depth_is_invented(tmp_path):
    """Never a mean of two; all 16 bits come through."""
    values = np.array([0, 1, 255, 32767, 32768, 65535], np.uint16)
    depth = np.random.default_rng(0).choice(values, (60, 80))
    c = Config(dataset="scenes", rotation=20.0, rotation_p=1.0, crop=(70, 50), image_scale=0.9)
    pair = write_pair(tmp_path, np.zeros((60, 80, 3), np.uint8), depth)
    _, out = load(DepthFrames([pair], c), [(epoch, 0) for epoch in range(4)])
    assert set(out["depth"].unique().tolist()) == set(values.tolist())


# -----------------------------------------------------------------------------
# metres


@pytest.mark.parametrize(
    "dataset, width, height, stored, metres",
    [("kitti", 1216, 352, 51200, 200), ("scenes", 40, 33, 2560, 10), ("nyu", 640, 480, 2500, 2.5)],
)
def test_units(tmp_path, dataset, width, height, stored, metres):
    c = Config(**STILL | dict(dataset=dataset, crop=(32, 32)))
    _, out = load(DepthFrames([write_blank(tmp_path, width, height, stored)], c), [(0, 0)], SCALE[dataset])
    assert (out["depth"] == metres).all() and out["depth"].dtype == torch.float32 and out["depth"].shape == (1, 32, 32)


def kitti_frame(root, points, width=1216, height=352):
    """A KITTI object root with one frame; x is ahead of the LiDAR, y left, z up; f is 100 px about (600, 150)."""
    save(root / "training" / "image_2" / "000000.png", np.zeros((height, width, 3), np.uint8))
    for folder in ("velodyne", "calib"):
        (root / "training" / folder).mkdir(parents=True, exist_ok=True)
    np.array([[*p, 0.5] for p in points], np.float32).tofile(root / "training" / "velodyne" / "000000.bin")
    calib = "P2: 100 0 600 0 0 100 150 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
    calib += "Tr_velo_to_cam: 0 -1 0 0 0 0 -1 0 1 0 0 0\n"
    (root / "training" / "calib" / "000000.txt").write_text(calib)
    (root / "ImageSets").mkdir(exist_ok=True)
    (root / "ImageSets" / "train.txt").write_text("000000\n")
    return root


def test_sweeps_are_ground_truth_in_metres(tmp_path):
    """One pixel a point, up to 255 m; what 16 bits cannot hold is unknown, not wrong."""
    points = [(10, 1, 0), (10, -1, 0), (200, 20, -10), (255.9, 100, 0), (300, -300, 0), (-10, 0, 0)]
    root = kitti_frame(tmp_path, points)
    pairs, _ = find_pairs("lidar", [root], splits=("train",))
    _, out = load(DepthFrames(pairs, Config(**STILL, dataset="lidar")), [(0, 0)], SCALE["lidar"])
    depth = out["depth"][0].numpy()
    v, u = np.nonzero(depth)
    assert list(zip(u.tolist(), v.tolist())) == [(561, 150), (590, 150), (610, 150), (590, 155)]
    np.testing.assert_allclose(depth[v, u], [255.9, 10, 10, 200], atol=0.5 / 256 + 1e-4)


# -----------------------------------------------------------------------------
# sweeps

PINHOLE = np.array([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])  # (u z, v z, z) falls on (u, v)


def spots(depth):
    """{(u, v): metres} of what is known."""
    return {(int(u), int(v)): float(depth[v, u]) for v, u in np.argwhere(depth)}


def test_points_land_on_their_pixels():
    rng = np.random.default_rng(0)
    lidar2img = np.array([[5.0, -40, 1, 2], [6, 2, -40, 1], [1, 0.02, -0.01, 0.3]])
    points = np.column_stack([rng.uniform(-20, 60, 4000), rng.normal(0, 12, (4000, 2)), rng.random(4000)])
    points = points.astype(np.float32)
    uv, metres = data.project(points.astype(np.float64), lidar2img)
    expected = {}
    for (u, v), z in zip(uv, metres):
        pixel = int(np.floor(u + 0.5)), int(np.floor(v + 0.5))
        if z > 0 and 0 <= pixel[0] < 30 and 0 <= pixel[1] < 20:
            expected[pixel] = min(expected.get(pixel, 1e9), z)
    found = data_depth.sweep_depth(points, lidar2img, 30, 20)
    assert found.shape == (20, 30) and found.dtype == np.float32
    assert 300 < len(expected) < ((uv > 0).all(1) & (metres > 0)).sum()
    assert spots(found) == {pixel: float(np.float32(z)) for pixel, z in expected.items()}


@pytest.mark.parametrize("order", [1, -1])
def test_the_nearest_point_wins(order):
    points = np.array([[3.2 * z, 4.3 * z, z] for z in (7.0, 5.0, 9.0)])[::order]
    assert spots(data_depth.sweep_depth(points, PINHOLE, 10, 8)) == {(3, 4): 5.0}


def test_what_the_camera_does_not_see_vanishes():
    # behind it, in it, right, left, below, above
    points = np.array([[-3.0, -4, -1], [0, 0, 0], [10, 4, 1], [-1, 4, 1], [3, 8, 1], [3, -1, 1]])
    assert spots(data_depth.sweep_depth(points, PINHOLE, 10, 8)) == {}
    assert spots(data_depth.sweep_depth(points[:0], PINHOLE, 10, 8)) == {}


def test_sweep_at_the_border():
    """A pixel is the square about its centre: half a pixel beyond the outermost ones the image ends."""
    for edge, inside, at in ((-0.5, 0.0, 0), (9.5, 0.0, 9)):
        within = np.nextafter(edge, inside)
        for u, expected in ((edge, {}), (within, {(at, 3): 1.0})):
            assert spots(data_depth.sweep_depth(np.array([[u, 3.0, 1.0]]), PINHOLE, 10, 10)) == expected
            turned = {(v, u): z for (u, v), z in expected.items()}
            assert spots(data_depth.sweep_depth(np.array([[3.0, u, 1.0]]), PINHOLE, 10, 10)) == turned
    halves = np.array([[u, v, 1.0] for u in np.arange(-1, 11, 0.5) for v in np.arange(-1, 11, 0.5)])
    assert set(spots(data_depth.sweep_depth(halves, PINHOLE, 10, 10))) == {(u, v) for u in range(10) for v in range(10)}


def test_sweeps_agree_with_the_scenes_depth(scenes):
    """Two sensors' views of one geometry, by two roads through the calibration."""
    sparse, _ = find_pairs("lidar", [scenes], splits=("trainval",))
    dense, _ = find_pairs("scenes", [scenes], splits=("trainval",))
    assert [p.image for p in sparse] == [p.image for p in dense] and len(dense) == 8
    for a, b in zip(sparse[:4], dense[:4]):
        image, swept = data_depth.load_pair(a)
        truth = data_depth.load_pair(b)[1].astype(float)
        both = (swept > 0) & (truth > 0)
        assert image.shape == (*swept.shape, 3) and both.sum() > 2000
        off = abs(swept[both] / truth[both] - 1)
        assert np.median(off) < 0.006 and (off < 0.05).mean() > 0.9, (np.median(off), (off < 0.05).mean())


def test_real_sweeps(kitti):
    """Thousands of pixels of KITTI's crop, at distances of a street, further up the further away."""
    pairs, _ = find_pairs("lidar", [kitti], splits=("val",))
    dataset = DepthFrames(pairs, Config(dataset="lidar"))
    for i in range(len(pairs)):
        depth = dataset.decoded(i)["depth"].view(np.uint16) / 256
        known = depth > 0
        assert depth.shape == (352, 1216) and known.sum() > 5000
        assert 4 < np.median(depth[known]) < 40 and depth.max() < 130
        rows = [np.median(depth[v : v + 40][known[v : v + 40]]) for v in (200, 310)]
        assert rows[0] > 1.3 * rows[1]


# -----------------------------------------------------------------------------
# crops


@pytest.mark.parametrize(
    "width, height, left, top",
    [(1242, 375, 13, 23), (1241, 376, 12, 24), (1224, 370, 4, 18), (1238, 374, 11, 22), (1216, 352, 0, 0)],
)
def test_kitti_crop(width, height, left, top):
    for training in (True, False):
        for dataset in ("kitti", "lidar"):
            rows, columns = data_depth.without_border(dataset, height, width, training)
            assert np.arange(height)[rows].tolist() == list(range(top, height)) and len(range(top, height)) == 352
            assert np.arange(width)[columns].tolist() == list(range(left, left + 1216))


def test_nyu_crop():
    rows, columns = data_depth.without_border("nyu", 480, 640, training=True)
    assert np.arange(480)[rows].tolist() == list(range(45, 472))
    assert np.arange(640)[columns].tolist() == list(range(43, 608))
    uncut = ("nyu", 480, 640, False), ("nyu", 300, 200, False), ("scenes", 30, 20, True)
    for dataset, height, width, training in uncut:
        whole = np.ones((height, width))
        assert whole[data_depth.without_border(dataset, height, width, training)].shape == (height, width)


def coordinates(width, height):
    """Image and depth whose values name the pixel: red and green count to 256, blue what is beyond; depth has the row
    in its upper half.
    """
    v, u = np.mgrid[:height, :width]
    image = np.stack([u % 256, v % 256, u // 256 * 16 + v // 256], -1)
    return image.astype(np.uint8), (v % 256 * 256 + u % 256).astype(np.uint16)


@pytest.mark.parametrize(
    "dataset, width, height, left, top, right, bottom",
    [("kitti", 1242, 375, 13, 23, 1229, 375), ("nyu", 640, 480, 43, 45, 608, 472)],
)
def test_image_and_depth_lose_the_same_border(tmp_path, dataset, width, height, left, top, right, bottom):
    sample = DepthFrames([write_pair(tmp_path, *coordinates(width, height))], Config(dataset=dataset)).decoded(0)
    image, depth = coordinates(right, bottom)
    assert (sample["image"] == image[top:, left:]).all()
    assert (sample["depth"].view(np.uint16) == depth[top:, left:]).all()


# -----------------------------------------------------------------------------
# random numbers


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


def test_a_sample_is_a_function_of_seed_epoch_and_index(tmp_path):
    pairs = [write_pair(tmp_path, *ramps(60, 50), f"{i}") for i in range(2)]
    first, again = (DepthFrames(pairs, Config(dataset="scenes", crop=(30, 20), colour_p=1.0)) for _ in range(2))
    other_seed = DepthFrames(pairs, Config(dataset="scenes", crop=(30, 20), colour_p=1.0, seed=1))
    keys = [(epoch, i) for epoch in range(3) for i in range(2)]
    samples = {key: first[key] for key in keys}
    for key in reversed(keys):  # in another order
        assert same(samples[key], again[key])
    drawn = [sample["gamma"] for sample in samples.values()] + [other_seed[key]["gamma"] for key in keys]
    assert len(set(drawn)) == len(drawn)
    assert not np.array_equal(samples[0, 0]["A"], samples[1, 0]["A"])


def test_windows_reach_every_corner():
    c = Config(**STILL | dict(dataset="scenes", crop=(17, 9), rotation=0.0))
    dataset = DepthFrames([], c)
    affines = [dataset.drawn(epoch, 0, 20, 11)["A"] for epoch in range(300)]
    corners = [tuple((np.linalg.inv(A) @ [0, 0, 1])[:2].round(6)) for A in affines]
    assert set(corners) == {(u, v) for u in range(4) for v in range(3)}
    assert max(corners.count(corner) for corner in set(corners)) < 60  # of 25
    assert {tuple(dataset.drawn(epoch, 0, 20, 11)["out_size"]) for epoch in range(5)} == {(17, 9)}
    assert tuple(dataset.drawn(0, 0, 12, 8)["out_size"]) == (12, 8)  # never larger than the image


def test_shares_of_flips_turns_and_colours():
    c = Config(dataset="scenes", crop=(0, 0), rotation=2.5, rotation_p=0.25, flip=0.75, colour_p=0.5)
    dataset = DepthFrames([], c)
    draws = [dataset.drawn(0, i, 50, 40) for i in range(400)]
    turned = np.mean([abs(d["A"][1, 0]) > 0 for d in draws])
    mirrored = np.mean([d["A"][0, 0] < 0 for d in draws])
    coloured = np.array([d["gamma"] != 1 for d in draws])
    assert abs(turned - 0.25) < 0.08 and abs(mirrored - 0.75) < 0.08 and abs(coloured.mean() - 0.5) < 0.09
    assert max(abs(np.degrees(np.arcsin(d["A"][1, 0]))) for d in draws) <= 2.5
    assert all((d["colour"] == np.eye(3, 4)).all() != many for d, many in zip(draws, coloured))


def test_colours_by_hand(tmp_path):
    """On values of 0..255: to the power of gamma, times brightness, times the channel's gain, cut at 255."""
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)
    pair = write_pair(tmp_path, image, np.ones((16, 32), np.uint16))
    for gamma, brightness, gain in ((0.93, 1.1, 0.95), (1.06, 0.9, 1.08)):
        # intervals of no width leave one number to draw
        colours = dict(colour_p=1.0, gamma=(gamma,) * 2, brightness=(brightness,) * 2, channel_gain=(gain,) * 2)
        c = Config(**STILL | colours, dataset="scenes")
        _, out = load(DepthFrames([pair], c), [(0, 0)])
        expected = np.minimum(image.astype(float) ** gamma * brightness * gain, 255).transpose(2, 0, 1)
        assert 0.01 < (expected == 255).mean() < 0.4 or gamma < 1
        assert abs(as_grey(out["image"])[0] - expected).max() < 1e-3


def test_every_channel_has_its_own_gain(tmp_path):
    pair = write_pair(tmp_path, np.full((4, 4, 3), 100, np.uint8), np.ones((4, 4), np.uint16))
    c = Config(**STILL | dict(dataset="scenes", colour_p=1.0, gamma=(1, 1), brightness=(1, 1), channel_gain=(0.9, 1.1)))
    _, out = load(DepthFrames([pair], c), [(epoch, 0) for epoch in range(60)])
    gains = as_grey(out["image"])[:, :, 0, 0] / 100
    assert 0.9 - 1e-6 <= gains.min() < 0.91 and 1.09 < gains.max() <= 1.1 + 1e-6
    assert abs(np.corrcoef(gains.T)[np.triu_indices(3, 1)]).max() < 0.5


def test_no_colours_leave_the_image_untouched(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (16, 32, 3)).astype(np.uint8)
    pair = write_pair(tmp_path, image, np.ones((16, 32), np.uint16))
    batch, out = load(DepthFrames([pair], Config(**STILL, dataset="scenes")), [(0, 0)])
    no_change, no_colour = torch.eye(3).double()[None], torch.eye(3, 4)[None]
    plain = data.warp_images(batch["image"], batch["size"], no_change, no_colour, (32, 16))
    assert torch.equal(out["image"], plain)
    assert abs(as_grey(plain)[0] - image.transpose(2, 0, 1)).max() < 1e-2


# -----------------------------------------------------------------------------
# kept on the device


def test_resident_batches_are_the_loaded_ones(tmp_path):
    image, depth = coordinates(640, 480)
    pairs = [write_pair(tmp_path, image + np.uint8(40 * i), depth + np.uint16(20000 * i), f"{i}") for i in range(3)]
    c = Config(dataset="nyu", crop=(96, 64), rotation_p=1.0, image_scale=0.75)  # NYU's border is cut off
    dataset = DepthFrames(pairs, c)
    keys = [[(0, 2), (0, 0)], [(1, 1), (1, 2)]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of arrays that cannot be written
        batches = list(data_depth.resident(dataset, keys, torch.device("cpu")))
    assert len(batches) == 2
    for some, resident in zip(keys, batches):
        loaded, expected = load(dataset, some, 1000)
        assert set(resident) == set(loaded)
        for key, value in loaded.items():
            assert torch.equal(resident[key], value) and resident[key].dtype == value.dtype, key
        got = data_depth.augment(resident, 1000, torch.device("cpu"))
        assert all(torch.equal(got[key], expected[key]) for key in ("image", "depth", "index"))


def test_resident_wants_one_size(tmp_path):
    sizes = {"a": (30, 20), "b": (30, 20), "c": (20, 30)}
    pairs = [write_blank(tmp_path, *size, name=name) for name, size in sizes.items()]
    with pytest.raises(BadInput, match=r"c\.png: .*20 x 30 .*a\.png 30 x 20"):
        next(data_depth.resident(DepthFrames(pairs, Config(dataset="scenes")), [[(0, 0)]], torch.device("cpu")))
    pairs[1].depth.unlink()
    with pytest.raises(BadInput, match="b_depth.png: no such file"):
        next(data_depth.resident(DepthFrames(pairs[:2], Config(dataset="scenes")), [[(0, 0)]], torch.device("cpu")))


# -----------------------------------------------------------------------------
# some of the pairs


def test_evenly_spread():
    items = list(range(100))
    assert data.evenly_spread(items, 100) == data.evenly_spread(items, 500) == items
    assert data.evenly_spread([], 5) == data.evenly_spread(items, 0) == []
    assert data.evenly_spread(items, 25) == list(range(0, 100, 4))
    assert data.evenly_spread(items, 1) == [0] and data.evenly_spread([7], 1) == [7]
    for limit in range(1, 101):
        some = data.evenly_spread(items, limit)
        gaps = np.diff([*some, 100])
        assert len(some) == limit and some[0] == 0 and gaps.min() >= 1 and gaps.max() - gaps.min() <= 1


# -----------------------------------------------------------------------------
# layouts: files need not be pictures to be found

DATE, DRIVE, TRUTH = "2011_09_26", "2011_09_26_drive_0001_sync", "proj_depth/groundtruth/image_02"
KITTI_LINE = f"{DATE}/{DRIVE}/image_02/data/0000000005.png {DRIVE}/{TRUTH}/0000000005.png 721.5377\n"
NYU_LINE = "/cafe_0001a_out/rgb_00000.jpg /cafe_0001a_out/sync_depth_00000.png 518.8579\n"


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"0")
    return root


def image_and_truth(drive=DRIVE, camera="image_02", number="0000000005", image="png"):
    return f"{DATE}/{drive}/{camera}/data/{number}.{image}", f"{drive}/proj_depth/groundtruth/{camera}/{number}.png"


IMAGE, DEPTH = image_and_truth()
JPG = image_and_truth(image="jpg")[0]
RIGHT_JPG, RIGHT = image_and_truth(camera="image_03", image="jpg")
NYU_TEST = "official_splits/test"
LAYOUTS = {  # dataset, folder of depths if another, line, image, depth
    "bts": ("kitti", "", KITTI_LINE, IMAGE, DEPTH),
    "bts apart": ("kitti", "truth", KITTI_LINE, IMAGE, f"truth/{DEPTH}"),
    "jpg": ("kitti", "", KITTI_LINE, JPG, DEPTH),
    "toolbox": ("kitti", "", KITTI_LINE, f"input/{IMAGE}", f"gt_depth/{DEPTH}"),
    "raw": ("kitti", "", KITTI_LINE, f"raw/{IMAGE}", f"data_depth_annotated/train/{DEPTH}"),
    "kitti's archive": ("kitti", "archive", KITTI_LINE, IMAGE, f"archive/data_depth_annotated/val/{DEPTH}"),
    "kitti's archive, its own folder": ("kitti", "archive", KITTI_LINE, IMAGE, f"archive/train/{DEPTH}"),
    "monodepth2": ("kitti", "", f"{DATE}/{DRIVE} 5 l\n", JPG, f"{DATE}/{DEPTH}"),
    "monodepth2, right": ("kitti", "", f"{DATE}/{DRIVE} 0000000005 r\n", RIGHT_JPG, f"{DATE}/{RIGHT}"),
    "monodepth2, apart": ("kitti", "truth", f"{DATE}/{DRIVE} 5 l\n", f"kitti_raw/{IMAGE}", f"truth/{DATE}/{DEPTH}"),
    "nyu train": ("nyu", "", NYU_LINE, "sync/cafe_0001a_out/rgb_00000.jpg", "sync/cafe_0001a_out/sync_depth_00000.png"),
    "nyu test": ("nyu", "", "bath/45.jpg bath/45.png 518.8579\n", f"{NYU_TEST}/bath/45.jpg", f"{NYU_TEST}/bath/45.png"),
    "two words": ("nyu", "", "rgb.jpg depth.png", "rgb.jpg", "depth.png"),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    dataset, depth_root, line, image, depth = LAYOUTS[layout]
    touch(tmp_path, image, depth)
    (tmp_path / "split.txt").write_text("\n" + line + "\n")
    pairs, notes = find_pairs(dataset, [str(tmp_path)], str(tmp_path / depth_root) if depth_root else "", ["split.txt"])
    assert [(p.image, p.depth, p.frame) for p in pairs] == [(tmp_path / image, tmp_path / depth, None)] and notes == []
    assert image.removesuffix(Path(image).suffix).endswith(pairs[0].name) and "." not in pairs[0].name


def test_splits_are_found_in_the_root_or_by_their_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = (touch(tmp_path / name, IMAGE, DEPTH) for name in "ab")
    (b / "in_root.txt").write_text(KITTI_LINE)
    Path("here.txt").write_text(KITTI_LINE * 2)
    Path("both.txt").write_text(KITTI_LINE * 3)
    (b / "both.txt").write_text(KITTI_LINE * 4)
    counts = {"in_root.txt": 1, "here.txt": 2, str(tmp_path / "here.txt"): 2, "both.txt": 3, "b/both.txt": 4}
    for split, count in counts.items():
        pairs, _ = find_pairs("kitti", ["b"], splits=[split])
        assert len(pairs) == count and pairs[0].image == Path("b", IMAGE)
    assert len(find_pairs("kitti", ["nowhere", "b"], splits=["in_root.txt", "here.txt"])[0]) == 3


def test_several_roots_are_pooled(tmp_path):
    other, other_depth = image_and_truth(number="0000000006")
    touch(tmp_path / "a", IMAGE), touch(tmp_path / "b", other, DEPTH), touch(tmp_path / "a", other_depth)
    (tmp_path / "s.txt").write_text(KITTI_LINE + f"{other} {other_depth} 1\n")
    pairs, _ = find_pairs("kitti", [tmp_path / "a", tmp_path / "b"], splits=[tmp_path / "s.txt"])
    assert [p.image for p in pairs] == [tmp_path / "a" / IMAGE, tmp_path / "b" / other]
    assert [p.depth for p in pairs] == [tmp_path / "b" / DEPTH, tmp_path / "a" / other_depth]


def test_inventory(tmp_path):
    touch(tmp_path, IMAGE, DEPTH)
    (tmp_path / DEPTH).write_bytes(b"four")
    (tmp_path / "s.txt").write_text(KITTI_LINE)
    assert data.inventory(find_pairs("kitti", [tmp_path], splits=["s.txt"])[0]) == [f"{IMAGE.removesuffix('.png')} 1 4"]


def test_pairs_without_ground_truth_or_files(tmp_path):
    """`None` is no error; a missing file is, unless such pairs are to be left out, and then they are counted."""
    touch(tmp_path, IMAGE, DEPTH)
    none = f"{DATE}/{DRIVE}/image_02/data/0000000009.png None 721.5377\n"
    (tmp_path / "s.txt").write_text(KITTI_LINE + none + none)
    pairs, notes = find_pairs("kitti", [tmp_path], splits=["s.txt"])
    assert len(pairs) == 1 and notes == [f"{tmp_path}/s.txt: 1 pairs, 2 without ground truth left out"]
    lost_image = image_and_truth(number="0000000006")
    lost_depth = image_and_truth(number="0000000007")
    touch(tmp_path, lost_image[1], lost_depth[0])
    for (image, depth), lost in ((lost_image, lost_image[0]), (lost_depth, lost_depth[1])):
        (tmp_path / "s.txt").write_text(KITTI_LINE + "\n" + none + f"{image} {depth} 721.5\n")
        with pytest.raises(BadInput) as error:
            find_pairs("kitti", [tmp_path], splits=["s.txt"])
        said = str(error.value)
        assert said.startswith(f"{tmp_path / lost}: missing") and "\n" not in said
        assert all(words in said for words in ("line 4 ", f"{tmp_path}/s.txt", "--skip-missing"))
        pairs, notes = find_pairs("kitti", [tmp_path], splits=["s.txt"], skip_missing=True)
        assert [p.depth for p in pairs] == [tmp_path / DEPTH]
        assert notes == [f"{tmp_path}/s.txt: 1 pairs, 1 without ground truth left out, 1 with a missing file left out"]


MALFORMED = {"0000000005.png": "kitti", "alone.jpg": "nyu", "/ /depth.png 1": "kitti", "a.jpg /": "nyu"}
MALFORMED |= {f"{DATE}/{DRIVE}": "kitti"}


@pytest.mark.parametrize("line", MALFORMED)
def test_malformed_lines(tmp_path, line):
    touch(tmp_path, IMAGE, DEPTH)
    (tmp_path / "s.txt").write_text("\n" + line + "\n")
    says = r"s\.txt: line 2, '.*', is neither `image depth focal` nor `folder index l\|r`"
    with pytest.raises(BadInput, match=says) as error:
        find_pairs(MALFORMED[line], [tmp_path], splits=["s.txt"], skip_missing=True)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_digits_that_are_none(tmp_path):
    (tmp_path / "s.txt").write_text("folder ² l\n")
    with pytest.raises(BadInput, match="folder: missing"):
        find_pairs("kitti", [tmp_path], splits=["s.txt"])


def test_no_pairs_at_all(tmp_path):
    missing, none = (
        (KITTI_LINE, "1 with a missing file left out"),
        ("a.png None 1\n", "1 without ground truth left out"),
    )
    for text, why in (("", ""), ("\n \n", ""), missing, none):
        (tmp_path / "s.txt").write_text(text)
        with pytest.raises(BadInput) as error:
            find_pairs("kitti", [tmp_path], splits=["s.txt"], skip_missing=True)
        said = str(error.value)
        assert "no pairs of image and depth in --splits s.txt" in said and "\n" not in said
        assert str(tmp_path) in said and why in said
    with pytest.raises(BadInput, match="none given"):
        find_pairs("kitti", [tmp_path])


def test_unreadable_split_files(tmp_path):
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x81" * 9)
    says = {
        "nowhere.txt": r"--eval-splits nowhere.txt: not a readable split file",
        "binary.txt": "binary.txt: line 1 is",
    }
    for split, words in says.items():
        with pytest.raises(BadInput, match=words):
            find_pairs("kitti", [tmp_path], splits=[split], flag="--eval-splits")


def test_absolute_paths_are_taken_as_they_are(tmp_path, monkeypatch):
    """R17: for images and depths, of any root; NYU's lists begin with a slash and still mean the root."""
    touch(tmp_path / "elsewhere", "a.png", "b.png")
    touch(tmp_path / "root", "cafe/1.jpg", "cafe/1.png")
    here = tmp_path / "elsewhere"
    (tmp_path / "s.txt").write_text(f"{here}/a.png {here}/b.png 721.5\n/cafe/1.jpg /cafe/1.png 518.9\n")
    for dataset in ("kitti", "nyu"):
        pairs, notes = find_pairs(dataset, [tmp_path / "root"], splits=[tmp_path / "s.txt"])
        assert [(p.image, p.depth) for p in pairs] == [
            (here / "a.png", here / "b.png"),
            (tmp_path / "root" / "cafe" / "1.jpg", tmp_path / "root" / "cafe" / "1.png"),
        ]
        assert notes == [] and not pairs[0].name.startswith("/")
    (here / "a.png").unlink()
    with pytest.raises(BadInput, match=f"^{here}/a.png: missing, as .jpg, .jpeg, .png, there and"):
        find_pairs("kitti", [tmp_path / "root"], splits=[tmp_path / "s.txt"])


def test_names_in_lists_may_have_another_suffix_on_disk(tmp_path):
    """R13: in any case, too; the name in the list comes first."""
    touch(tmp_path, "a.JPG", "a_depth.PNG", "b.jpg", "b.png", "b_depth.png", "._a.png", "._b.png")
    (tmp_path / "s.txt").write_bytes(b"\xef\xbb\xbfa.png a_depth.png 1\r\nb.png b_depth.png 1\r\n\r\n")  # R10
    pairs, _ = find_pairs("nyu", [tmp_path], splits=["s.txt"])
    assert [p.image.name for p in pairs] == ["a.JPG", "b.png"] and pairs[0].depth.name == "a_depth.PNG"


def test_pairs_that_are_listed_twice_count_twice_and_are_noted(tmp_path):
    """R8: there are no negatives here, so that a list may mean it. Frames of sweeps are taken once, as elsewhere."""
    touch(tmp_path, IMAGE, DEPTH)
    (tmp_path / "s.txt").write_text(KITTI_LINE * 3)
    pairs, (note,) = find_pairs("kitti", [tmp_path], splits=["s.txt"])
    assert len(pairs) == 3 and note.startswith("note: --splits s.txt: 2 of 3 pairs are listed before")


def test_sweeps_are_taken_once(scenes):
    pairs, (note,) = find_pairs("lidar", [scenes, scenes], splits=("val",))
    assert len(pairs) == 2 and "2 frames that are listed twice" in note


def test_files_that_are_there_but_are_none(tmp_path):
    """A folder, a link to nowhere, an empty file: each is named; --skip-missing leaves them out."""
    touch(tmp_path, DEPTH)
    (tmp_path / IMAGE).parent.mkdir(parents=True)
    (tmp_path / "s.txt").write_text(KITTI_LINE)
    makers = {"a folder": Path.mkdir, "a link to gone.png": lambda p: p.symlink_to("gone.png"), "empty": Path.touch}
    for words, make in makers.items():
        make(tmp_path / IMAGE)
        with pytest.raises(BadInput, match=f"^{tmp_path / IMAGE}: {words}"):
            find_pairs("kitti", [tmp_path], splits=["s.txt"])
        with pytest.raises(BadInput, match="1 with a missing file left out"):
            find_pairs("kitti", [tmp_path], splits=["s.txt"], skip_missing=True)
        remove = Path.rmdir if words == "a folder" else Path.unlink
        remove(tmp_path / IMAGE)


def test_sweeps_of_every_layout(scenes, raw_drive):
    for root, splits, count in ((scenes, ("val",), 2), (raw_drive, (), 4)):
        pairs, notes = find_pairs("lidar", [root], splits=splits)
        assert len(pairs) == count and notes == [] and all(p.depth.suffix == ".bin" and p.frame for p in pairs)
    assert len(find_pairs("lidar", [raw_drive], frame_stride=2)[0]) == 2
    assert len(find_pairs("lidar", [scenes, raw_drive], splits=("val",))[0]) == 6


def test_scenes_need_their_depth(scenes, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(scenes, root)
    lost = find_pairs("scenes", [root], splits=("val",))[0][1].depth
    lost.unlink()
    with pytest.raises(BadInput, match=f"{lost}: missing; .*lidar"):
        find_pairs("scenes", [root], splits=("val",))


# -----------------------------------------------------------------------------
# broken files: one line that names them


def one_line(dataset, pair):
    """What loading says of a broken pair."""
    error = DepthFrames([pair], SimpleNamespace(dataset=dataset, seed=0))[(0, 0)]
    assert isinstance(error, BadInput) and isinstance(data.collate([error]), BadInput) and "\n" not in str(error)
    return str(error)


def test_broken_depth_files(tmp_path):
    pair = write_blank(tmp_path, 30, 20)
    whole = pair.depth.read_bytes()
    for keep in [*range(0, len(whole) - 24, 3)]:  # up to the end of the pixels
        pair.depth.write_bytes(whole[:keep])
        assert one_line("scenes", pair).startswith(f"{pair.depth}: not a readable PNG")
    pair.depth.write_text("I am no image")
    assert one_line("scenes", pair).startswith(f"{pair.depth}: not a readable PNG")
    pair.depth.unlink()
    assert one_line("scenes", pair) == f"{pair.depth}: no such file"


@pytest.mark.parametrize("suffix, mode", [("PNG", "L"), ("PNG", "RGB"), ("PNG", "P"), ("TIFF", "I;16"), ("JPEG", "L")])
def test_only_16_bit_pngs_are_depth(tmp_path, suffix, mode):
    pair = write_blank(tmp_path, 30, 20)
    Image.new(mode, (30, 20)).save(pair.depth, format=suffix)
    says = f"{pair.depth}: a {suffix} of mode {mode}; depth must be a PNG of one 16-bit channel"
    assert one_line("scenes", pair) == says


def test_all_16_bits_are_read(tmp_path):
    depth = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    read = data_depth.read_depth(save(tmp_path / "d.png", depth))
    assert read.dtype == np.uint16 and (read == depth).all()


def test_sizes_that_do_not_fit(tmp_path):
    pair = write_pair(tmp_path, np.zeros((20, 30, 3), np.uint8), np.zeros((20, 29), np.uint16))
    assert one_line("scenes", pair) == f"{pair.depth}: 29 x 20 pixels, but {pair.image} has 30 x 20"
    small = write_blank(tmp_path, 1216, 351, name="small")
    assert str(small.image) in one_line("kitti", small) and "352 x 1216" in one_line("kitti", small)
    small = write_blank(tmp_path, 640, 479, name="small")
    assert str(small.image) in one_line("nyu", small) and "480 x 640" in one_line("nyu", small)


def test_broken_sweeps(tmp_path):
    root = kitti_frame(tmp_path, [(10, 0, 0)])
    (pair,), _ = find_pairs("lidar", [root], splits=("train",))
    small = kitti_frame(tmp_path / "small", [(10, 0, 0)], width=416, height=128)
    other = find_pairs("lidar", [small], splits=("train",))[0][0]
    assert f"{small}/training/image_2/000000.png: a map of 128 x 416" in one_line("kitti", other)
    whole = DepthFrames([other], Config(dataset="lidar")).decoded(0)["image"]  # of other people's sensors
    assert whole.shape == (128, 416, 3)
    pair.depth.write_bytes(b"12345")
    assert one_line("lidar", pair).startswith(f"{pair.depth}: truncated")
    pair.image.write_text("I am no image")
    assert one_line("lidar", pair).startswith(f"{pair.image}: not a readable image")
