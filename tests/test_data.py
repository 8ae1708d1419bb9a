"""Every augmentation is a matrix: pixels, points and boxes stay together through all of them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import data
import data_kitti
import encoders
import simipu
from files import BadInput
from simipu import Config

C = Config(num_points=4096, seed=3)


def read_labels(path):
    """Rows of a label_2 file that have a 3D box: name, truncation, 2D box, (h, w, l), bottom centre, yaw, camera's."""
    for line in path.read_text().splitlines():
        name, *v = line.split()
        v = np.array(v, float)
        if name != "DontCare":
            yield name, v[0], v[3:7], v[7:10], v[10:13], v[13]


def points_in_box(xyz, velo2rect, size, bottom, yaw, margin=0.1):
    """Mask of LiDAR points inside a label's 3D box, shrunk by `margin` metres: rims belong to what stands behind."""
    p = xyz @ velo2rect[:3, :3].T + velo2rect[:3, 3] - bottom
    along = p[:, 0] * np.cos(yaw) - p[:, 2] * np.sin(yaw)
    across = p[:, 0] * np.sin(yaw) + p[:, 2] * np.cos(yaw)
    h, w, l = size
    over_it = (abs(along) < l / 2 - margin) & (abs(across) < w / 2 - margin)
    return over_it & (p[:, 1] < -margin) & (p[:, 1] > -h + margin)


def velo_to_rect(calib):
    lines = data_kitti._read_calib(calib)
    r0 = data_kitti._entry(calib, lines, "R0_rect", (3, 3))
    tr = data_kitti._entry(calib, lines, "Tr_velo_to_cam", (3, 4))
    return data_kitti._to_4x4(r0) @ data_kitti._to_4x4(tr)


def labelled_points(root, frame):
    """(points (n, 3) inside a 3D label, their 2D box (n, 4)) of one frame, all its labels."""
    xyz = data.read_cloud(frame.cloud)[:, :3].astype(float)
    velo2rect = velo_to_rect(frame.calib[0])
    points, boxes = [np.zeros((0, 3))], [np.zeros((0, 4))]
    label = root / "training" / "label_2" / f"{frame.image.stem}.txt"
    for _, truncation, box, size, bottom, yaw in read_labels(label):
        if truncation < 0.1:
            inside = xyz[points_in_box(xyz, velo2rect, size, bottom, yaw)]
            points.append(inside)
            boxes.append(np.broadcast_to(box, (len(inside), 4)))
    return np.concatenate(points), np.concatenate(boxes)


def check_boxes(root, splits):
    frames = data_kitti.find_frames(root, splits)[:40]
    dataset = data.PretrainFrames(frames, C)
    before, after, flips = [], [], 0
    for i, frame in enumerate(frames):
        points, boxes = labelled_points(root, frame)
        uv, _ = data.project(points, frame.lidar2img())
        before.append(((uv >= boxes[:, :2]) & (uv <= boxes[:, 2:])).all(1))
        batch = data.collate([dataset[(0, i)]])
        box = data.random_image_scale(C.image_scale, 0, i)
        view = data.augment(batch, box, "cpu")
        # two roads to the same pixels: the 2D box is resized and flipped by hand, points go through the new lidar2img
        w, h = batch["size"][0].tolist()
        w2, h2 = (round(edge * min(box[0] / w, box[1] / h)) for edge in (w, h))
        corners = (boxes.reshape(-1, 2, 2) + 0.5) * [w2 / w, h2 / h] - 0.5
        if batch["flip"]:
            corners[..., 0] = w2 - 1 - corners[..., 0]
        low, high = corners.min(1), corners.max(1)
        uv, _ = data.project(points, view["lidar2img"][0].double().numpy())
        after.append(((uv >= low - 1e-3) & (uv <= high + 1e-3)).all(1))
        flips += bool(batch["flip"])
    before, after = np.concatenate(before), np.concatenate(after)
    assert 0 < flips < len(frames) and len(before) > 300
    assert before.mean() >= 0.98 and after.mean() >= 0.98, (before.mean(), after.mean())
    assert (before == after).mean() > 0.999


def test_labelled_points_project_into_their_boxes_synthetic(scenes):
    check_boxes(scenes, ("trainval",))


def test_labelled_points_project_into_their_boxes_kitti(kitti):
    check_boxes(kitti, ("trainval",))


@pytest.mark.parametrize("translation", [(0.0, 0.0, 0.0), (1.0, 2.0, 0.5)])
def test_T_maps_view_alpha_onto_view_beta(scenes, translation):
    c = Config(num_points=3000, translation=translation)
    frames = data.PretrainFrames(data_kitti.find_frames(scenes), c)
    batch = data.collate([frames[(epoch, i)] for epoch in range(2) for i in range(len(frames))])
    view = data.augment(batch, (640, 192), "cpu")
    mapped = view["alpha"][..., :3].double() @ view["T"][:, :3, :3].double().mT + view["T"][:, None, :3, 3].double()
    aligned = mapped.gather(1, batch["shuffle"][..., None].expand(-1, -1, 3))
    assert (aligned - view["beta"][..., :3]).norm(dim=-1).max() < 1e-4
    assert torch.equal(view["beta"][..., 3], view["alpha"][..., 3].gather(1, batch["shuffle"]))
    assert not torch.equal(view["alpha"][..., 3], view["beta"][..., 3])  # shuffled independently


def test_views_are_the_similarities_they_are_said_to_be():
    rng = np.random.default_rng(0)
    angles, scales = [], []
    for flip in (False, True) * 200:
        T = data.random_view(rng, data_kitti.RIG.center, 90.0, (0.75, 1.25), (0.0, 0.0, 0.0), flip)
        scale = np.cbrt(abs(np.linalg.det(T[:3, :3])))
        R = np.diag([1, -1 if flip else 1, 1]) @ T[:3, :3] / scale
        np.testing.assert_allclose(R @ R.T, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(R[2], [0, 0, 1], atol=1e-12)
        assert (np.linalg.det(T[:3, :3]) < 0) == flip
        center = np.append(data_kitti.RIG.center, 1)  # does not turn: only scaled, and mirrored
        np.testing.assert_allclose((T @ center)[:3], scale * center[:3] * [1, -1 if flip else 1, 1], atol=1e-9)
        angles.append(np.degrees(np.arctan2(R[1, 0], R[0, 0])))
        scales.append(scale)
    assert -90 <= min(angles) < -80 and 80 < max(angles) <= 90
    assert 0.75 <= min(scales) < 0.77 and 1.23 < max(scales) <= 1.25


def blob_image(width, height, u, v, sigma=6.0):
    x, y = np.arange(width), np.arange(height)[:, None]
    return np.exp(-((x - u) ** 2 + (y - v) ** 2) / (2 * sigma**2))


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "box, window",
    [
        ((320, 96), (0, 0, 1)),
        ((512, 160), (0, 0, 1)),
        ((900, 270), (0, 0, 1)),
        ((512, 160), (0.1, 0.2, 0.6)),
        ((512, 160), (-0.2, -0.1, 1.3)),
    ],
)
def test_pixels_follow_resize_window_flip_and_pad(flip, box, window):
    """A Gaussian blob is drawn at a known pixel; after the warp its centre of mass is where A says, to a thousandth of
    a pixel for matrices and a twentieth for resampling. Two image sizes share the canvas.
    """
    sizes, spots = [(500, 151), (421, 140)], [(203.3, 71.6), (150.0, 60.5)]
    images = [
        np.repeat((255 * blob_image(*size, *spot))[..., None], 3, 2).astype(np.uint8)
        for size, spot in zip(sizes, spots)
    ]
    lidar2img = np.array([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 0, 1.0]])  # a point (x, y, 0) is the pixel (x, y)
    drawn = {"flip": flip, "window": np.float64(window), "colour": np.eye(3, 4)}
    drawn |= {"T": np.eye(4), "shuffle": np.arange(1), "index": 0}
    samples = [
        {"image": image, "points": np.float32([[*spot, 0, 0]]), "lidar2img": lidar2img, **drawn}
        for image, spot in zip(images, spots)
    ]
    view = data.augment(data.collate(samples), box, "cpu")
    height, width = view["image"].shape[2:]
    assert height % 32 == width % 32 == 0
    uv, _ = data.project(view["alpha"], view["lidar2img"])
    for b, ((w, h), (u, v)) in enumerate(zip(sizes, spots)):
        s = min(box[0] / w, box[1] / h)
        w2, h2 = round(w * s), round(h * s)
        left, top, part = window
        expected = np.array([((u + 0.5) / w - left) * w2 / part - 0.5, ((v + 0.5) / h - top) * h2 / part - 0.5])
        if flip:
            expected[0] = w2 - 1 - expected[0]
        assert np.abs(uv[b, 0].numpy() - expected).max() < 1e-3
        light = view["image"][b, 0] * data.IMAGENET_STD[0] + data.IMAGENET_MEAN[0]
        if part >= 1:  # beside a smaller window lies more of the image
            assert (view["image"][b, :, h2:] == 0).all() and (view["image"][b, :, :, w2:] == 0).all()
        if part > 1:  # all around the image lies the mean colour: darkness for the centre of mass
            inside = view["image"][b, 0] != 0
            assert inside.sum() == pytest.approx(w2 * h2 / part**2, rel=0.02)
            light = light * inside
        light = light[:h2, :w2].double()
        x, y = (light.sum(0) * torch.arange(w2)).sum(), (light.sum(1) * torch.arange(h2)).sum()
        center = np.array([x, y]) / light.sum().item()
        assert np.abs(center - expected).max() < 0.05, (center, expected)


def test_warp_without_change_is_the_image_itself(scenes):
    image = torch.tensor(data.read_image(data_kitti.find_frames(scenes)[0].image)).permute(2, 0, 1)
    h, w = image.shape[1:]
    no_change, no_colour = torch.eye(3)[None], torch.eye(3, 4)[None]
    out = data.warp_images(image[None], torch.tensor([[w, h]]), no_change, no_colour, (w, h))
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    assert ((out[0] * std + mean) * 255 - image).abs().max() < 0.05


def test_windows_are_where_they_are_said_to_be():
    rng = np.random.default_rng(0)
    whole = np.array([data.random_window(rng, (1.0, 1.0), (0.0, 0.0)) for _ in range(5)])
    assert (whole == [0, 0, 1]).all()
    left, top, size = np.array([data.random_window(rng, (0.5, 1.0), (0.0, 0.0)) for _ in range(500)]).T
    assert 0.5 <= size.min() < 0.52 and 0.98 < size.max() <= 1
    assert min(left.min(), top.min()) >= 0 and max((left + size).max(), (top + size).max()) <= 1
    assert np.corrcoef(left, top)[0, 1] < 0.9 and (left > 0.2).any()
    left, top, size = np.array([data.random_window(rng, (1.0, 1.0), (0.0, 0.25)) for _ in range(500)]).T
    assert (left == 0).all() and (size == 1).all() and -0.25 <= top.min() < -0.2 and 0.2 < top.max() <= 0.25


def test_colour_jitter():
    """Without strength the identity, to the bit; each part does what it says; saturation and hue leave grey grey."""
    rng = np.random.default_rng(0)
    draw = lambda *jitter: np.array([data.random_colour(rng, jitter) for _ in range(200)])
    assert (draw(0, 0, 0, 0) == np.eye(3, 4)).all()
    grey, orange = np.array([0.4, 0.4, 0.4, 1]), np.array([0.8, 0.4, 0.2, 1])
    bright = draw(0.4, 0, 0, 0) @ grey
    assert np.allclose(bright, bright[:, :1]) and 0.24 <= bright.min() < 0.26 and 0.54 < bright.max() <= 0.56
    assert np.allclose(draw(0, 0.4, 0, 0) @ [0.5, 0.5, 0.5, 1], 0.5) and np.ptp(draw(0, 0.4, 0, 0) @ grey) > 0.05
    for jitter in ((0, 0, 0.4, 0), (0, 0, 0, 0.1)):
        assert np.allclose(draw(*jitter) @ grey, 0.4)
    spread = np.ptp(draw(0, 0, 0.4, 0) @ orange, axis=1) / 0.6
    assert 0.6 <= spread.min() < 0.65 and 1.35 < spread.max() <= 1.4
    turned = draw(0, 0, 0, 0.1)[:, :, :3]
    np.testing.assert_allclose(turned @ turned.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turned.shape), atol=1e-12)
    cosine = (np.trace(turned, axis1=1, axis2=2) - 1) / 2
    assert np.cos(0.2 * np.pi) <= cosine.min() < np.cos(0.19 * np.pi)


def test_colours_reach_the_image_and_stay_within_0_to_255(scenes):
    frames = data_kitti.find_frames(scenes)
    configs = [Config(num_points=256, jitter=jitter) for jitter in ((0.0,) * 4, (0.8, 0.8, 0.8, 0.2))]
    plain, jittered = (data.PretrainFrames(frames, c)[(0, 0)] for c in configs)
    a, b = (data.augment(data.collate([s]), (320, 96), "cpu")["image"][0] for s in (plain, jittered))
    mean, std = (torch.tensor(t).view(3, 1, 1) for t in (data.IMAGENET_MEAN, data.IMAGENET_STD))
    M = torch.tensor(jittered["colour"], dtype=torch.float32)
    expected = (torch.einsum("ij,jhw->ihw", M[:, :3], a * std + mean) + M[:, 3, None, None]).clamp(0, 1)
    seen = (a != 0).any(0)  # beyond the image lies the mean colour, jittered or not
    assert ((b * std + mean - expected).abs() * seen).max() < 1e-4 and (a - b).abs().max() > 0.1
    assert all(np.array_equal(plain[key], jittered[key]) for key in ("points", "T"))  # nothing else is drawn anew


def test_wrong_pairs_never_have_their_own_image(scenes):
    frames = data_kitti.find_frames(scenes, ["trainval"])
    images = [data.read_image(f.image) for f in frames]
    wrong = data.PretrainFrames(frames, Config(num_points=2048, pairs="wrong"))
    for i in range(len(frames)):
        taken = set()
        for epoch in range(12):
            sample = wrong[(epoch, i)]
            taken |= {j for j, image in enumerate(images) if np.array_equal(image, sample["image"])}
        assert i not in taken and len(taken) > 2  # another one every time
        own = data.read_cloud(frames[i].cloud)
        assert {p.tobytes() for p in sample["points"]} <= {p.tobytes() for p in own}


@pytest.mark.parametrize("depth", [18, 50])
def test_feature_cell_is_centred_on_its_pixel(depth):
    """Through real convolution stacks with positive weights, a cell's gradient lies symmetrically about pixel s * i."""
    torch.manual_seed(0)
    encoder = encoders.ResNet(depth).eval()
    for m in encoder.modules():
        if isinstance(m, torch.nn.Conv2d):
            torch.nn.init.constant_(m.weight, 1.0 / m.weight[0].numel())
    image = torch.ones(1, 3, 576, 576, requires_grad=True)  # no cell below sees its edges
    cells = {2: (144, 128), 4: (72, 64), 8: (36, 32), 16: (18, 16), 32: (9, 8)}
    # max pooling picks one of equal pixels, which would tilt the picture; the same window's average has the same centre
    pooled, simipu.F.max_pool2d = simipu.F.max_pool2d, lambda x, k, s, p: torch.nn.functional.avg_pool2d(x, k, s, p)
    try:
        maps = encoder(image)
    finally:
        simipu.F.max_pool2d = pooled
    for feature_map, (stride, (i, j)) in zip(maps, cells.items()):
        grad = torch.autograd.grad(feature_map[0, :, i, j].sum(), image, retain_graph=True)[0][0].sum(0).double()
        rows, cols = ((grad.sum(axis) * torch.arange(576)).sum() / grad.sum() for axis in (1, 0))
        assert abs(rows - stride * i) < 0.02 * stride and abs(cols - stride * j) < 0.02 * stride, (stride, rows, cols)


def test_groups_are_the_same_on_one_process_and_on_four():
    make = lambda rank, world: list(data.Batches(50, 16, 4, seed=1, rank=rank, world=world, steps=7))
    alone, ranks = make(0, 1), [make(r, 4) for r in range(4)]
    assert alone == [group for step in zip(*ranks) for group in step]
    first_epoch = [i for group in alone[:12] for _, i in group]
    assert len(set(first_epoch)) == 48 and [e for e, _ in alone[12]] == [1] * 4
    resumed = list(data.Batches(50, 16, 4, seed=1, start=5, steps=7))
    assert resumed == alone[20:] and len(data.Batches(50, 16, 4, seed=1, start=5, steps=7)) == 8


def test_samples_are_a_pure_function_of_seed_epoch_and_index(scenes):
    frames = data_kitti.find_frames(scenes)
    a, b = (data.PretrainFrames(frames, C)[(2, 1)] for _ in range(2))
    other = data.PretrainFrames(frames, C)[(3, 1)]
    assert all(np.array_equal(a[key], b[key]) for key in ("points", "T", "shuffle"))
    assert not np.array_equal(a["points"], other["points"]) and not np.array_equal(a["T"], other["T"])
    assert len({data.random_image_scale(C.image_scale, 0, step) for step in range(20)}) > 10
    assert data.random_image_scale((640, 192), 0, 5) == (640, 192)


def test_kitti_raw_reads_the_same_calibration_as_kitti_object(kitti):
    """The object benchmark's frames of 2011_09_26 and the raw recordings of that day share a camera."""
    if not (kitti / "raw").is_dir():
        pytest.skip("no raw drives beside it")
    raw = data_kitti.find_frames(kitti / "raw", frame_stride=10)
    sample = data.load_frame(raw[0], 2048, np.random.default_rng(0))
    assert sample["points"].shape == (2048, 4) and sample["image"].shape == (375, 1242, 3)
    labelled = data_kitti.find_frames(kitti, ("trainval",))[:40]
    same_camera = [f for f in labelled if data.read_image(f.image).shape == (375, 1242, 3)]
    errors = [np.abs(f.lidar2img() - raw[0].lidar2img()).max() for f in same_camera]
    assert min(errors) < 1e-3  # object calib is written with more digits than raw's


# -----------------------------------------------------------------------------
# local shape


def shape_of(xyz):
    return data.local_shape(np.float32(xyz), np.arange(len(xyz)))


def test_shapes_that_are_known():
    """A road, a wall, a pole, a bush, and 20 points on one spot; the three shares add up to 1."""
    rng = np.random.default_rng(0)
    x, y, z = rng.uniform(-1, 1, (3, 400))
    flat = np.zeros(400)
    road, wall, pole = (shape_of(np.stack(xyz, 1)) for xyz in ((x, y, flat), (flat, y, z), (flat, flat, z)))
    bush = shape_of(np.stack([x, y, z], 1))
    assert road[:, 1].mean() > 0.4 and road[:, 2].max() < 1e-6 and road[:, 3].min() > 0.999
    assert wall[:, 1].mean() > 0.4 and wall[:, 2].max() < 1e-6 and wall[:, 3].max() < 1e-3
    np.testing.assert_allclose(pole[:, :3], [[1, 0, 0]] * 400, atol=1e-6)
    assert 0.25 < bush[:, 2].mean() < 0.6 and 0.3 < bush[:, 3].mean() < 0.7
    for shape in (road, wall, pole, bush):
        np.testing.assert_allclose(shape[:, :3].sum(1), 1, atol=1e-5)
        assert shape.dtype == np.float32 and shape.min() >= 0 and shape.max() <= 1
    assert not shape_of(np.ones((20, 3))).any()


def test_views_do_not_change_shapes():
    rng = np.random.default_rng(1)
    xyz = rng.normal(size=(300, 3)) * [20, 20, 1]
    for flip in (False, True):
        T = data.random_view(rng, (35.2, 0, -1), 90, (0.75, 1.25), np.ones(3), flip)
        np.testing.assert_allclose(shape_of(xyz @ T[:3, :3].T + T[:3, 3]), shape_of(xyz), atol=1e-3)


def test_loaded_points_have_their_shape(scenes):
    """Among all points in view, not those that are drawn; both views of a point have the same. Points, draws and all
    else are those of a run without.
    """
    frames = data_kitti.find_frames(scenes)
    with_shape = Config(num_points=500, point_features=("reflectance", "shape"))
    plain, shaped = (data.PretrainFrames(frames, c) for c in (Config(num_points=500), with_shape))
    sample, bare = shaped[(0, 0)], plain[(0, 0)]
    assert sample["points"].shape == (500, 8) and np.array_equal(sample["points"][:, :4], bare["points"])
    every = data.load_frame(frames[0], 10**5, np.random.default_rng(0))["points"]  # drawn twice, all are in it
    cloud = np.unique(every, axis=0)[:, :3]
    for point in sample["points"][:5]:
        nearest = cloud[np.linalg.norm(cloud - point[:3], axis=1).argsort()[:16]]
        l3, l2, l1 = np.linalg.eigvalsh(np.cov(nearest.T.astype(float), bias=True))
        np.testing.assert_allclose(point[4:7], [(l1 - l2) / l1, (l2 - l3) / l1, l3 / l1], atol=1e-4)
    view = data.augment(data.collate([sample]), (160, 64), "cpu")
    shuffle = torch.from_numpy(sample["shuffle"])
    assert torch.equal(view["beta"][0, :, 4:], view["alpha"][0, shuffle, 4:])


# -----------------------------------------------------------------------------
# files of other kinds than KITTI's: read as what they are, or refused in one line that names them


def refusal(read, path):
    """What read(path) says of a file that it refuses."""
    with pytest.raises(BadInput) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{path}: ")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_grey_of_16_bits_is_scaled(tmp_path, suffix):
    """R2: Pillow would make it white."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    path = tmp_path / f"image{suffix}"
    Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    assert (data.read_image(path) == grey[..., None]).all() and data.read_image(path).shape == (16, 16, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "CMYK"])
def test_pictures_of_8_bits_are_converted(tmp_path, mode):
    path = tmp_path / "image.tif"
    Image.new("RGB", (30, 20), (255, 255, 255)).convert(mode).save(path)
    image = data.read_image(path)
    assert image.shape == (20, 30, 3) and image.dtype == np.uint8 and (image == 255).all()


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_pictures_of_32_bits_are_refused(tmp_path, kind):
    path = tmp_path / "image.tif"
    Image.fromarray(np.full((20, 30), 7, kind)).save(path)
    assert refusal(data.read_image, path) == "a TIFF of 32 bits a pixel; 8 or 16 bits are wanted"


def test_whatever_pillow_says_of_an_image_is_one_line(tmp_path, monkeypatch):
    """R12: a ValueError for a PNG with much text in it; and the types that nobody has met yet."""
    path = tmp_path / "image.png"
    much = PngInfo()
    much.add_text("comment", "x" * 5_000_000, zip=True)
    Image.new("RGB", (30, 20)).save(path, pnginfo=much)
    assert refusal(data.read_image, path).startswith("not a readable image (")
    for content in (b"", b"\x89PNG\r\n\x1a\n", b"<html>\n"):
        path.write_bytes(content)
        assert refusal(data.read_image, path).startswith("not a readable image (")
    assert refusal(data.read_image, tmp_path) == "not a readable image (Is a directory)"
    assert refusal(data.read_image, tmp_path / "nothing.png") == "no such file"
    (tmp_path / "link.png").symlink_to("nowhere.png")
    assert refusal(data.read_image, tmp_path / "link.png") == "a link to nowhere.png, which is not there"
    Image.new("RGB", (30, 20)).save(path)
    for strange in (KeyError("a\nb"), IndexError(), MemoryError()):
        monkeypatch.setattr(Image.Image, "convert", lambda *_, strange=strange: (_ for _ in ()).throw(strange))
        assert refusal(data.read_image, path).startswith("not a readable image (")


OTHER_CLOUDS = {  # what becomes of a cloud (n, 4) in the file, and what is said of it
    "5 columns": (lambda p: np.c_[p, np.arange(len(p)) % 64], np.float32, "it looks like 5 columns of float32"),
    "3 columns": (lambda p: p[:, :3], np.float32, "it looks like 3 columns of float32"),
    "float64": (lambda p: p, np.float64, "it looks like 4 columns of float64"),
    "float64, 3 columns": (lambda p: p[:, :3], np.float64, "it looks like 3 columns of float64"),
    "0..255": (lambda p: p * [1, 1, 1, 255], np.float32, "its columns look right, so divide reflectance"),
    "no cloud": (
        lambda p: p * [1, 1, 1, -9],
        np.float32,
        "is it float64, or of 3 or 5 columns?",
    ),
}


@pytest.mark.parametrize("kind", OTHER_CLOUDS)
@pytest.mark.parametrize("extra", [0, 1, 2, 3])
def test_clouds_of_other_columns_are_recognised(scenes, tmp_path, kind, extra):
    """R5: at the first frame that is read, whether or not the bytes come out even."""
    change, number, says = OTHER_CLOUDS[kind]
    points = data.read_cloud(data_kitti.find_frames(scenes)[0].cloud)
    points = points[: len(points) // 60 * 60 - extra].astype(np.float64)
    points[0, 3] = 1
    path = tmp_path / "cloud.bin"
    change(points).astype(number).tofile(path)
    said = refusal(data.read_cloud, path)
    assert says in said, said


def test_clouds_of_more_columns_are_read_where_the_rig_says_so(scenes, tmp_path):
    points = data.read_cloud(data_kitti.find_frames(scenes)[0].cloud)
    np.c_[points, np.arange(len(points), dtype=np.float32) % 64].tofile(tmp_path / "cloud.bin")
    assert np.array_equal(data.read_cloud(tmp_path / "cloud.bin", 5), points)
    points[: len(points) // 5 * 5].tofile(tmp_path / "cloud.bin")
    said = refusal(lambda path: data.read_cloud(path, 5), tmp_path / "cloud.bin")
    assert said.endswith("; it looks like 4 columns of float32, where 5 columns of float32 are wanted")


def test_clouds_that_are_no_files(tmp_path):
    (tmp_path / "empty.bin").touch()
    (tmp_path / "odd.bin").write_bytes(b"x" * 33)  # numpy would drop the last byte
    assert refusal(data.read_cloud, tmp_path / "empty.bin").startswith("truncated, 0 bytes")
    assert refusal(data.read_cloud, tmp_path / "odd.bin").startswith("truncated, 33 bytes")
    assert refusal(data.read_cloud, tmp_path / "nothing.bin") == "no such file"
    assert refusal(data.read_cloud, tmp_path) == "a folder, where a file is wanted"


def test_a_checkpoint_knows_its_frames_in_eight_bytes_each():
    """At the size of Waymo's front cameras; before, and in other checkpoints still, they were lines."""
    lines = [
        f"training/{i}_1024360143612057520_3580_000_3600_000_1553735853462203_FRONT 412345 {i}" for i in range(158_081)
    ]
    digests, file = data.digests(lines), io.BytesIO()
    torch.save({"inventory": digests}, file)
    assert len(file.getvalue()) < 2e6 and len(set(digests.tolist())) == len(lines)
    assert digests.tolist() == torch.cat([data.digests(lines[:9]), data.digests(lines[9:])]).tolist()
    assert len(data.digests([])) == 0


def test_frames_of_several_sources():
    """One after another, each source once; names, sizes and drives come in the frames' order."""

    class Source:
        def __init__(self, name):
            self.name = name

        def frame(self, row):
            path = Path(self.name, str(row))
            return data.Frame(f"{self.name}/{row}", path, path, (), data_kitti.RIG, self.name)

        def names(self, cells):
            return [f"{self.name}/{row}" for row in cells[:, 0]]

        def images(self, cells):
            return [f"/{self.name}/{row}" for row in cells[:, 0]]

        def sizes(self, cells):
            return np.stack([cells[:, 0], 10 * cells[:, 0]], 1)

        def drives(self, cells):
            return {self.name}

        def sweeps(self, cells):
            return cells[:, 0] // 2

    a, b = Source("a"), Source("b")
    first = data.Frames([a, b], np.array([[1, 3], [0, 2], [0, 3]]))
    frames = data.join([first, data.Frames([b], np.array([[0, 3], [0, 5]]))])
    names = ["b/3", "a/2", "a/3", "b/3", "b/5"]
    assert [f.name for f in frames] == data.names_of(frames) == list(data.Names(frames)) == names
    assert len(frames.sources) == 2 and frames[-1].name == "b/5" and data.drives_of(frames) == {"a", "b"}
    assert data.inventory(frames) == ["b/3 3 30", "a/2 2 20", "a/3 3 30", "b/3 3 30", "b/5 5 50"]
    sweeps = data.sweeps_of(frames)
    assert sweeps[1] == sweeps[2] and sweeps[0] == sweeps[3] and len(set(sweeps)) == 3
    kept, repeats = data.without_repeats(frames)
    assert [f.name for f in kept] == ["b/3", "a/2", "a/3", "b/5"] and [f.name for f in repeats] == ["b/3"]
    assert [f.name for f in data.evenly_spread(frames, 2)] == ["b/3", "a/3"] and frames[1:3] == frames[np.array([1, 2])]
    pairs = data.Frames(frames.sources, frames.cells, lambda frame: frame.name.upper())
    assert pairs[1] == "A/2" and list(pairs[3:]) == ["B/3", "B/5"]
    with pytest.raises(BadInput, match="--x: 2 of its frames are trained on, a/2 among them"):
        data.check_unseen(frames, data.Frames([a], np.array([[0, 1], [0, 2], [0, 3]])), "--x")
    with pytest.raises(IndexError):
        frames[5]


def test_repeated_frames_are_told_by_their_image(tmp_path):
    """R8: through links to files and folders, and by any spelling of the path. Another image of that name is none."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.png").touch()
    (tmp_path / "a" / "1.png").symlink_to(tmp_path / "b" / "0.png")
    (tmp_path / "c").symlink_to(tmp_path / "a")
    paths = [tmp_path / name for name in ("a/0.png", "b/0.png", "c/0.png", "b/../a/0.png", "a/1.png", "a/0.png")]
    frames = [data.Frame(str(i), path, path, (), data_kitti.RIG) for i, path in enumerate(paths)]
    kept, repeats = data.without_repeats(frames)
    assert [f.name for f in kept] == ["0", "1"] and [f.name for f in repeats] == ["2", "3", "4", "5"]
    assert data.note_repeats([], "--splits train") == []
    assert "4 frames that are listed twice, 2 among them" in data.note_repeats(repeats, "--splits train")[0]
