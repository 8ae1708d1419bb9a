"""Which data set lies in a folder, and its frames for everything that takes frames."""

import numpy as np
import pytest
from test_data_kitti import write_sequence
from test_data_nuscenes import write_root

import data_check
import data_depth
import data_kitti
import data_sets
import finetune_det3d
import finetune_mono3d
from files import BadInput


@pytest.fixture(scope="module")
def roots(scenes, raw_drive, tmp_path_factory):
    """A folder of each data set."""
    folder = tmp_path_factory.mktemp("roots")
    write_sequence(folder / "odometry", "08", data_kitti.find_frames(raw_drive))
    write_root(folder / "nuscenes", {"scene-0061": 2, "scene-0103": 1})
    (folder / "waymo").mkdir()
    for part in ("training", "ImageSets"):
        (folder / "waymo" / part).symlink_to(scenes / part)
    (folder / "waymo" / "conversion.json").write_text("{}")
    found = {"nuScenes": folder / "nuscenes", "KITTI odometry": folder / "odometry"}
    return found | {"Waymo, converted": folder / "waymo", "KITTI object": scenes, "KITTI raw": raw_drive}


SPLITS = {"nuScenes": ("mini_val",), "KITTI raw": ()}  # of the others "val"
COUNTS = {"nuScenes": 6, "KITTI odometry": 4, "Waymo, converted": 2, "KITTI object": 2, "KITTI raw": 4}


def test_folders_say_what_lies_in_them(roots):
    assert {name: data_sets.name_of(root) for name, root in roots.items()} == {name: name for name in roots}
    for name, root in roots.items():
        frames, notes = data_sets.pool_frames([root], SPLITS.get(name, ("val",)))
        assert len(frames) == COUNTS[name] and notes == []


def test_nuscenes_is_not_pooled_with_others(roots):
    with pytest.raises(BadInput, match="nuscenes and .*: nuScenes is not pooled with other data sets"):
        data_sets.pool_frames([roots["KITTI object"], roots["nuScenes"]], ["val"])


def test_waymo_is_not_taken_for_kitti(roots, run_here, tmp_path):
    """Both are in one layout, and label other classes."""
    root = roots["Waymo, converted"]
    for script in (finetune_det3d, finetune_mono3d):
        status, _, err = run_here(script, "kitti", "--data-root", root, "--splits", "train")
        assert status == 1 and err == f"error: {root}: Waymo, converted; its labels are not of KITTI's classes\n"
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COUNTS)
def test_any_sweep_is_a_depth_map(roots, name):
    """What lidar of finetune_depth.py learns from: metres ahead of the frame's own camera."""
    pairs, _ = data_depth.find_pairs("lidar", [roots[name]], splits=SPLITS.get(name, ("val",)))
    assert len(pairs) == COUNTS[name]
    image, depth = data_depth.load_pair(pairs[-1])
    assert depth.shape == image.shape[:2]
    frame = pairs[-1].frame
    uvw = np.c_[frame.read_points()[:, :3].astype(float), np.ones(len(frame.read_points()))] @ frame.lidar2img().T
    u, v = np.rint(uvw[:, :2] / uvw[:, 2:]).astype(int).T
    inside = (uvw[:, 2] > 0.5) & (u >= 0) & (v >= 0) & (u < image.shape[1]) & (v < image.shape[0])
    assert inside.sum() > 50
    metres = depth[v[inside], u[inside]] / 256
    assert (metres <= uvw[inside, 2] + 1 / 256).all()  # the nearest point of a pixel
    assert np.isclose(metres, uvw[inside, 2], atol=1 / 256).mean() > 0.8


@pytest.mark.parametrize("name", COUNTS)
def test_data_check_reads_it(roots, name, tmp_path, capsys):
    data_check.check((roots[name],), workers=1, max_frames=7, out=tmp_path / "picture.png")
    said = " ".join(capsys.readouterr().out.split())
    assert f"{roots[name]}: {name} " in said and "OK: " in said
    assert (tmp_path / "picture.png").stat().st_size > 20_000
    if name == "nuScenes":
        assert "splits mini_train 12, mini_val 6" in said and "frames 18, only 7" in said
    if name == "KITTI odometry":
        assert "splits val 4" in said


def test_data_check_names_what_is_broken(tmp_path, capsys):
    """Of nuScenes, in other processes, which get no tables with a frame."""
    root = write_root(tmp_path / "nuscenes", {"scene-0103": 1})
    (image,) = (root / "samples" / "CAM_BACK").iterdir()
    image.unlink()
    with pytest.raises(SystemExit):
        data_check.check((root,), workers=2, out=tmp_path / "picture.png")
    said = capsys.readouterr().out
    assert f"{image}: missing (of frame" in said and "BROKEN: 1 findings" in said
    assert "are looked for" not in said  # its tables name the one file


def test_data_check_says_which_sequences_are_not_there(roots, raw_drive, tmp_path, capsys):
    write_sequence(tmp_path / "odometry", "04", data_kitti.find_frames(raw_drive))
    data_check.check((tmp_path / "odometry",), workers=1, max_frames=1, out=tmp_path / "picture.png")
    said = capsys.readouterr().out
    assert "train: sequences 00, 01, 02, 03, 05, 06, 07, 09, 10 are not there" in said and "val:" not in said
