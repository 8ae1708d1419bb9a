"""Wrong input is one line on stderr that names the culprit, exit status 1, and nothing written."""

import shutil

import numpy as np
import pytest
from test_loop import MINI, SMALL

import data
import data_kitti
import simipu
from files import BadInput


@pytest.fixture
def copy(scenes, tmp_path):
    """A dataset of one's own to break."""
    root = tmp_path / "broken"
    shutil.copytree(scenes, root)
    return root


def files(root, split="train"):
    """Paths of the split's first frame."""
    i = (root / "ImageSets" / f"{split}.txt").read_text().split()[0]
    t = root / "training"
    return t / "image_2" / f"{i}.png", t / "velodyne" / f"{i}.bin", t / "calib" / f"{i}.txt"


def remove_root(root):
    shutil.rmtree(root)
    return "no such folder"


def empty_split(root):
    (root / "ImageSets" / "train.txt").write_text("")
    return "split 'train' is empty"


def no_split(root):
    (root / "ImageSets" / "train.txt").unlink()
    return "train.txt: missing"


def truncate_cloud(root):
    cloud = files(root)[1]
    cloud.write_bytes(cloud.read_bytes()[:-5])
    return f"{cloud.name}: truncated"


def nan_points(root):
    cloud = files(root)[1]
    points = np.fromfile(cloud, np.float32)
    points[[4, 9]] = np.nan, np.inf
    points.tofile(cloud)
    return f"{cloud.name}: 2 of"


def broken_png(root):
    image = files(root)[0]
    image.write_bytes(image.read_bytes()[:2000])
    return f"{image.name}: not a readable image"


def text_png(root):
    image = files(root)[0]
    image.write_text("I am no image")
    return f"{image.name}: not a readable image"


def missing_image(root):
    image = files(root)[0]
    image.unlink()
    return f"{image.name}: missing"


def no_p2(root):
    calib = files(root)[2]
    calib.write_text("".join(line for line in calib.read_text().splitlines(True) if not line.startswith("P2")))
    return f"{calib.name}: no P2"


def short_p2(root):
    calib = files(root)[2]
    calib.write_text(calib.read_text().replace("P2: ", "P2: x "))
    return f"{calib.name}: P2 is not 3x4 numbers"


def few_points(root):
    cloud = files(root)[1]
    np.float32([[20, 0, 0, 0.5]] * 9).tofile(cloud)
    return f"{cloud.name}: 9 points in the camera's view, fewer than 16"


BREAKERS = [remove_root, empty_split, no_split, truncate_cloud, nan_points, broken_png, text_png, missing_image, no_p2, short_p2, few_points]


@pytest.mark.parametrize("breaker", BREAKERS)
def test_broken_data_is_one_line(copy, breaker):
    expected = breaker(copy)
    with pytest.raises(BadInput) as error:
        c = simipu.Config(num_points=256)
        sample = data.collate([data.PretrainFrames(data_kitti.find_frames(copy), c)[(0, 0)]])
        if isinstance(sample, BadInput):
            raise sample
    assert expected in str(error.value) and "\n" not in str(error.value) and str(copy) in str(error.value)


def fails(done, *words):
    """One line, exit 1, nothing written."""
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.mark.parametrize("breaker, workers", [(remove_root, 0), (broken_png, 0), (no_p2, 1)])
def test_script_reports_broken_data(run_script, copy, tmp_path, breaker, workers):
    expected = breaker(copy)
    done = run_script("simipu.py", "demo", "--data-root", copy, "--synthetic-frames", 0, *MINI, "--batch-size", 6, "--group", 2, "--workers", workers, "--max-steps", 2)
    fails(done, expected, copy)
    assert not (tmp_path / "out").exists()


def test_frames_that_changed_are_another_run(run_here, copy, tmp_path):
    """The fingerprint holds sizes: a cloud that was replaced since is named as different data."""
    start = ["demo", "--data-root", copy, *MINI, "--max-steps", 1]
    assert run_here(simipu, *start)[0] == 0
    cloud = files(copy)[1]
    cloud.write_bytes(cloud.read_bytes()[:-16])
    status, _, err = run_here(simipu, *start)
    assert status == 1 and "frames=" in err


def test_drives_in_training_and_evaluation_are_named(run_here, copy):
    """KITTI's devkit tells which drive a frame is from; frames of one drive in both are said aloud."""
    (copy / "mapping").mkdir()
    (copy / "mapping" / "train_mapping.txt").write_text("".join(f"2011_09_26 2011_09_26_drive_{i // 4:04d}_sync {i:010d}\n" for i in range(8)))
    (copy / "mapping" / "train_rand.txt").write_text(",".join(str(i) for i in (8, 1, 2, 3, 4, 5, 6, 7)))
    frames = data_kitti.find_frames(copy, ["trainval"])
    assert [f.drive[-9:-5] for f in frames] == ["0001", "0000", "0000", "0000", "0000", "0001", "0001", "0001"]
    status, out, _ = run_here(simipu, "demo", "--data-root", copy, *SMALL, "--workers", 0, "--max-steps", 1)
    assert status == 0 and "note: --eval-splits val shares 2 drives with training, 2011_09_26_drive_0000_sync among them" in out


def test_raw_drives(raw_drive, scenes, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(raw_drive, root)
    frames = data_kitti.find_frames(root)
    assert [f.name for f in frames] == [f"2011_09_26_drive_0001_sync/{i:010d}" for i in range(4)]
    assert [f.name[-1] for f in data_kitti.find_frames(root, frame_stride=3)] == ["0", "3"]
    drive = frames[0].image.parents[2]
    assert data_kitti.find_frames(drive) == frames  # one drive's folder will do
    np.testing.assert_allclose(frames[0].lidar2img(), data_kitti.find_frames(scenes)[0].lidar2img())
    assert data.load_frame(frames[0], 500, np.random.default_rng(0))["points"].shape == (500, 4)
    frames[2].cloud.unlink()
    with pytest.raises(BadInput, match="4 images but 3 clouds; --skip-missing"):
        data_kitti.find_frames(root)
    assert [f.name[-1] for f in data_kitti.find_frames(root, skip_missing=True)] == ["0", "1", "3"]
    frames[1].image.unlink()
    with pytest.raises(BadInput, match=f"{frames[1].image.name}: missing"):
        data_kitti.find_frames(root)
    frames[0].calib[1].unlink()
    with pytest.raises(BadInput, match="calib_velo_to_cam.txt: missing"):
        data_kitti.find_frames(root, skip_missing=True)


def test_unknown_layout(tmp_path):
    with pytest.raises(BadInput, match="neither KITTI object"):
        data_kitti.find_frames(tmp_path)
