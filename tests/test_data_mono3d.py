"""Cameras and boxes in their axes: there and back, KITTI's and nuScenes' labels, mirrored worlds, what is seen."""

import math

import numpy as np
import pytest
import torch
from test_data_nuscenes import made_up, real, with_files  # noqa: F401  fixtures

import data
import data_det3d
import data_kitti
import data_mono3d
import data_nuscenes
import finetune_mono3d
import ops_boxes
import runtime

CPU = torch.device("cpu")
C = finetune_mono3d.Config(dataset="kitti", image_scale=(208, 64), flip=0.5)


def frames_of(scenes, split="train"):
    return data_det3d.find_frames([scenes], [split])


def test_boxes_there_and_back():
    rng = np.random.default_rng(0)
    boxes = np.column_stack([rng.normal(0, 20, (50, 3)), rng.uniform(0.5, 5, (50, 3)), rng.uniform(-3.14, 3.14, 50)])
    lean = np.array([[0.01, -0.9998, 0.015], [0.02, 0.015, -0.9997], [0.9997, 0.01, 0.02]])
    lidar2cam = np.column_stack([np.linalg.qr(lean)[0] * np.sign(np.diag(np.linalg.qr(lean)[1])), [0.1, -0.2, 0.3]])
    there = data_mono3d.to_camera(boxes, lidar2cam)
    np.testing.assert_allclose(there[:, :3], boxes[:, :3] @ lidar2cam[:, :3].T + lidar2cam[:, 3])
    np.testing.assert_allclose(there[:, 3:6], boxes[:, [3, 5, 4]])  # length, height, width
    np.testing.assert_allclose(data_mono3d.from_camera(there, lidar2cam), boxes, atol=1e-9)
    speed = rng.normal(0, 5, (50, 2))
    back = data_mono3d.velocity_from_camera(data_mono3d.velocity_to_camera(speed, lidar2cam), lidar2cam)
    np.testing.assert_allclose(back, speed)
    # what moves along its heading moves along ry: cos to the right, -sin ahead
    speed = np.column_stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])])
    moved = data_mono3d.velocity_to_camera(speed, lidar2cam)
    ahead = np.column_stack([np.cos(there[:, 6]), -np.sin(there[:, 6])])
    np.testing.assert_allclose(moved / np.hypot(*moved.T)[:, None], ahead, atol=1e-9)


def corners(boxes):
    """Of boxes (n, 7) in a camera's axes: (n, 8, 3) there."""
    level = torch.tensor(data_mono3d.LEVEL, dtype=boxes.dtype)
    return ops_boxes.corners(data_mono3d.from_camera(boxes, level)) @ level[:, :3].T


def check_view(frame, view):
    """Boxes project to where lidar2img has them, up to the degree that the camera leans."""
    height, width = view.image.shape[:2]
    boxes, *_ = data_mono3d.labels_of(frame)
    own = data_mono3d.from_camera(view.boxes, view.lidar2cam)
    assert len(own) and all(abs(boxes - box).max(1).min() < 1e-9 for box in own)
    np.testing.assert_allclose(view.intrinsic @ view.lidar2cam, frame.lidar2img(), atol=1e-9 * width)
    uv = finetune_mono3d.project(torch.tensor(view.boxes[None, :, :3]), torch.tensor(view.intrinsic)[None])[0]
    expected, depth = data.project(own, frame.lidar2img())
    np.testing.assert_allclose(uv, expected, atol=1e-6)
    np.testing.assert_allclose(view.boxes[:, 2], depth, atol=1e-6)
    rects = view.rects
    assert (rects >= 0).all() and (rects[:, 2] <= width - 1).all() and (rects[:, 3] <= height - 1).all()
    assert (rects[:, 2:] - rects[:, :2] >= 1).all()


def test_views_of_kittis_labels(scenes):
    for frame in frames_of(scenes)[:3]:
        view = data_mono3d.read_view(frame)
        check_view(frame, view)
        types, numbers = data_kitti.read_labels(frame.label)
        ours = np.isin(types, list(data_mono3d.KITTI_CLASSES))
        names = [data_mono3d.CLASSES["kitti"][k] for k in view.kinds]
        assert names == [data_mono3d.KITTI_CLASSES[t] for t in types[ours]] and np.isnan(view.velocity).all()
        h, w, length, x, y, z, ry = numbers[ours][:, 7:14].T
        p2, _ = data_kitti.split_projection(frame)
        shift = np.linalg.solve(p2[:, :3], p2[:, 3])  # of camera 2 from camera 0
        expected = np.column_stack([np.column_stack([x, y - h / 2, z]) + shift, length, h, w, ry])
        np.testing.assert_allclose(view.boxes, expected, atol=1e-6)
        # the built-in scenes' rectangles are those of what can be seen: within that of the box
        slack = 3.0
        known = numbers[ours][:, 3:7]
        inside = (view.rects[:, :2] - slack <= known[:, :2]) & (view.rects[:, 2:] + slack >= known[:, 2:])
        assert inside.all()


def test_views_of_nuscenes(made_up):  # noqa: F811
    frames = data_nuscenes.find_frames([made_up], ["mini_train"])
    seen = 0
    for frame in frames[:6]:
        view, labels = data_mono3d.read_view(frame), frame.labels()
        seen += len(view.kinds)
        if len(view.kinds):
            check_view(frame, view)
        for kind, box, velocity, attribute in zip(view.kinds, view.boxes, view.velocity, view.attributes):
            own = labels.kind == kind
            speed = np.hypot(*labels.velocity[own][0])
            assert np.hypot(*velocity) == pytest.approx(speed, rel=1e-3)
            wanted = labels.attribute[own][0]
            assert attribute == (data_mono3d.NO_ATTRIBUTE if wanted < 0 else wanted)
            assert box[2] > 0
    assert seen >= 3


def test_boxes_behind_and_beside_are_not_seen():
    lidar2img = np.array([[100.0, 0, 50], [0, 100, 50], [0, 0, 1]]) @ data_mono3d.LEVEL
    size = [4.0, 2.0, 1.5, 0.3]
    boxes = np.array([[20.0, 0, 0, *size], [-20, 0, 0, *size], [20, 60, 0, *size], [1, 0, 0, *size]])
    rects = data_mono3d.rects_of(boxes, lidar2img, 100, 100)
    wide = (rects[:, 2:] - rects[:, :2] > 0).all(1)
    assert wide.tolist() == [True, False, False, True]  # the last reaches behind the camera
    assert rects[3].min() == 0


# -----------------------------------------------------------------------------
# mirrored


def batches_of(scenes, count=2, box=(208, 64)):
    """The same frames as they are and mirrored, augmented."""
    dataset = data_mono3d.MonoFrames(frames_of(scenes)[:count], C, training=False)
    found = []
    for flip in (False, True):
        samples = [dataset[(0, i)] | {"flip": flip} for i in range(count)]
        found.append(data_mono3d.augment(data_mono3d.collate(samples), box, CPU))
    return found


def test_a_mirrored_world_stays_on_its_pixels(scenes):
    """Corners, headings, velocities and rectangles land on the mirrored pixels of the resized image."""
    plain, mirrored = batches_of(scenes)
    assert torch.equal(plain["kinds"], mirrored["kinds"]) and (plain["kinds"] >= 0).sum() > 4
    height, width = plain["image"].shape[2:]
    assert (height, width) == (64, 224)
    last = 208 - 1
    torch.testing.assert_close(mirrored["image"][..., : last + 1], plain["image"][..., : last + 1].flip(3))
    for b in range(2):
        there = plain["kinds"][b] >= 0
        for side in (plain, mirrored):
            side["velocity"][b] = torch.tensor([2.0, 1.0]) * torch.tensor([1.0 if side is plain else -1.0, 1.0])
        pixels = []
        for side in (plain, mirrored):
            boxes, intrinsic = side["boxes"][b][there].double(), side["intrinsic"][b].double()
            assert intrinsic[0, 0] > 0
            ahead = torch.stack([boxes[:, 6].cos(), torch.zeros(len(boxes)), -boxes[:, 6].sin()], 1)
            drift = side["velocity"][b][there].double()
            drift = torch.stack([drift[:, 0], 0 * drift[:, 0], drift[:, 1]], 1)
            nose, later = boxes[:, :3] + ahead, boxes[:, :3] + drift
            places = torch.cat([corners(boxes), nose[:, None], later[:, None]], 1)
            uv = finetune_mono3d.project(places.flatten(0, 1)[None], intrinsic[None])[0]
            pixels.append(uv.view(len(boxes), 10, 2))
        pixels[1][..., 0] = last - pixels[1][..., 0]
        # left and right of a box change places
        order = [3, 2, 1, 0, 7, 6, 5, 4, 8, 9]
        before = corners(plain["boxes"][b][there].double())[..., 2].amin(1) > 0.5
        torch.testing.assert_close(pixels[1][before][:, order], pixels[0][before], atol=1e-3, rtol=1e-4)
        left, top, right, bottom = plain["rects"][b][there].T
        expected = torch.stack([last - right, top, last - left, bottom], 1)
        torch.testing.assert_close(mirrored["rects"][b][there], expected, atol=1e-3, rtol=1e-4)


def test_the_data_set_mirrors_velocities(made_up):  # noqa: F811
    """Of what a camera sees move to the right, mirrored it moves to the left, as fast; NaN stays."""
    boxes = torch.tensor([[[1.0, 2, 30, 4, 1.5, 2, 0.3], [0, 0, 9, 1, 1, 1, -3.1]]])
    speed = torch.tensor([[[3.0, -1.0], [math.nan, math.nan]]])
    there, velocity = data_mono3d.mirror(boxes, speed)
    assert there[0, 0].tolist() == pytest.approx([-1, 2, 30, 4, 1.5, 2, math.pi - 0.3])
    assert there[0, 1, 6] == pytest.approx(3.1 - math.pi, abs=1e-6)
    assert velocity[0, 0].tolist() == [-3, -1] and velocity[0, 1].isnan().all()
    again, speeds = data_mono3d.mirror(there, velocity)
    torch.testing.assert_close(again, boxes)
    assert torch.equal(speeds[0, 0], speed[0, 0])


def test_randomness_is_of_seed_epoch_and_frame(scenes):
    dataset = data_mono3d.MonoFrames(frames_of(scenes), C)
    coins = [[dataset[(epoch, i)]["flip"] for i in range(4)] for epoch in (0, 1, 0)]
    assert coins[0] == coins[2] != coins[1]
    assert not any(data_mono3d.MonoFrames(frames_of(scenes), C, training=False)[(0, i)]["flip"] for i in range(6))


# -----------------------------------------------------------------------------
# samples


def test_samples(made_up, scenes):  # noqa: F811
    frames = data_nuscenes.find_frames([made_up], ["mini_train"])
    samples = data_mono3d.samples_of(frames)
    assert list(samples) == [f"sample scene-0061 {i}" for i in range(5)]
    assert [len(own) for own in samples.values()] == [6] * 5 and samples["sample scene-0061 1"][0] == 6
    few = data_mono3d.few_samples(frames, 2)
    assert len(few) == 12 and len({f.token for f in few}) == 2
    assert data_mono3d.few_samples(frames, 0) is frames
    own = frames_of(scenes)
    assert [len(i) for i in data_mono3d.samples_of(own).values()] == [1] * 6
    assert len(data_mono3d.inventory(own)[0].split()) == 3 and len(data_mono3d.inventory(frames)[0].split()) == 2


def test_all_samples_are_judged_on_however_few_are_trained_on(made_up):  # noqa: F811
    root = (str(made_up),)
    c = finetune_mono3d.Config(data_root=root, splits=("mini_train",), eval_splits=("mini_val",), frame_stride=2)
    train, held_out, _ = finetune_mono3d.load_frames(c, runtime.Run(torch.device("cpu"), 0, 1))
    assert len(train) == 18 and len(data_nuscenes.find_frames([made_up], ["mini_train"])) == 30
    assert list(held_out) == list(data_nuscenes.find_frames([made_up], ["mini_val"])) and len(held_out) > 6


def test_images_without_sweeps(made_up, tmp_path):  # noqa: F811
    """Sweeps are not read, and need not be there; for pre-training they must."""
    root = tmp_path / "root"
    root.mkdir()
    (root / "v1.0-mini").symlink_to(made_up / "v1.0-mini")
    (root / "samples").mkdir()
    for camera in data_nuscenes.CAMERAS:
        (root / "samples" / camera).symlink_to(made_up / "samples" / camera)
    c = finetune_mono3d.Config(data_root=(str(root),))
    frames, notes = data_mono3d.pool_frames(c, c.data_root, ("mini_train",))
    assert len(frames) == 30 and not notes
    with pytest.raises(data_nuscenes.BadInput, match="LIDAR_TOP"):
        data_nuscenes.find_frames([root], ["mini_train"])


def test_real_images(real):  # noqa: F811
    """Every camera of the real samples: boxes in its axes are where lidar2img has them."""
    for frame in with_files(real)[:6]:
        view = data_mono3d.read_view(frame)
        if len(view.kinds):
            check_view(frame, view)
