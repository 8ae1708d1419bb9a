"""Wrong input is one line on stderr that names the culprit, exit status 1, and nothing written."""

import dataclasses
import json
import os
import pickle
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from test_loop import MINI, SMALL

import data
import data_kitti
import simipu
from files import BadInput, file_size


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


def set_row(calib, key, numbers):
    """Give a calibration's row other numbers; -> the row as it was."""
    old = re.search(rf"^{key}: .*$", calib.read_text(), re.MULTILINE)[0]
    calib.write_text(calib.read_text().replace(old, f"{key}: {numbers}"))
    return old


def nan_in_p2(root):
    set_row(files(root)[2], "P2", "nan " * 12)
    return f"{files(root)[2].name}: P2 holds NaN or infinite numbers"


def two_p2(root):
    calib = files(root)[2]
    first = set_row(calib, "P2", "1 " * 12)
    calib.write_text(f"P2: {'1 ' * 12}\n{calib.read_text()}\n{first}\n")  # the same again would do no harm
    return f"line {len(calib.read_text().splitlines())} gives another P2 than a line before it"


def singular(root):
    set_row(files(root)[2], "Tr_velo_to_cam", "0 " * 12)
    return f"{files(root)[2].name}: its matrices do not make a projection"


def missing_calib(root):
    files(root)[2].unlink()
    return f"{files(root)[2].name}: missing (of frame training/000000; its calibration must lie there)"


def calib_of_utf16(root):
    files(root)[2].write_bytes(files(root)[2].read_text().encode("utf-16"))
    return f"{files(root)[2].name}: line 1 is not text in UTF-8"


def empty_image(root):
    files(root)[0].write_bytes(b"")
    return f"{files(root)[0].name}: empty"


def image_link(root):
    files(root)[0].unlink()
    files(root)[0].symlink_to("gone.png")
    return f"{files(root)[0].name}: a link to gone.png, which is not there"


def cloud_folder(root):
    files(root)[1].unlink()
    files(root)[1].mkdir()
    return f"{files(root)[1].name}: a folder, where a file is wanted"


def list_folder(root):
    (root / "ImageSets" / "train.txt").unlink()
    (root / "ImageSets" / "train.txt").mkdir()
    return "train.txt: a folder, where a file is wanted"


def list_of_utf16(root):
    (root / "ImageSets" / "train.txt").write_text("000000\n", encoding="utf-16")
    return "train.txt: line 1 is not text in UTF-8, byte 0xff; is it UTF-16?"


BREAKERS = [remove_root, empty_split, no_split, truncate_cloud, nan_points, broken_png, text_png, missing_image, no_p2]
BREAKERS += [short_p2, few_points, nan_in_p2, two_p2, singular, missing_calib, calib_of_utf16, empty_image, image_link]
BREAKERS += [cloud_folder, list_folder, list_of_utf16]


@pytest.mark.parametrize("breaker", BREAKERS)
def test_broken_data_is_one_line(copy, breaker):
    expected = breaker(copy)
    with pytest.raises(BadInput) as error:
        c = simipu.Config(num_points=256)
        sample = data.collate([data.PretrainFrames(data_kitti.find_frames(copy), c)[(0, 0)]])
        if isinstance(sample, BadInput):
            raise sample
    assert expected in str(error.value) and "\n" not in str(error.value) and str(copy) in str(error.value)


def fails(status, err, *words):
    """One line, exit 1, nothing written."""
    assert status == 1 and "Traceback" not in err, err
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for word in words:
        assert str(word) in lines[0], lines[0]


@pytest.mark.parametrize("breaker, workers", [(remove_root, 0), (broken_png, 0), (no_p2, 1)])
def test_script_reports_broken_data(run_here, copy, tmp_path, breaker, workers):
    expected = breaker(copy)
    flags = ["--synthetic-frames", 0, *MINI, "--batch-size", 6, "--group", 2, "--workers", workers, "--max-steps", 2]
    status, _, err = run_here(simipu, "demo", "--data-root", copy, *flags)
    fails(status, err, expected, copy)
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
    mapping = [f"2011_09_26 2011_09_26_drive_{i // 4:04d}_sync {i:010d}\n" for i in range(8)]
    (copy / "mapping" / "train_mapping.txt").write_text("".join(mapping))
    (copy / "mapping" / "train_rand.txt").write_text(",".join(str(i) for i in (8, 1, 2, 3, 4, 5, 6, 7)))
    frames = data_kitti.find_frames(copy, ["trainval"])
    assert [f.drive[-9:-5] for f in frames] == ["0001", "0000", "0000", "0000", "0000", "0001", "0001", "0001"]
    status, out, _ = run_here(simipu, "demo", "--data-root", copy, *SMALL, "--workers", 0, "--max-steps", 1)
    assert status == 0
    assert "note: --eval-splits val shares 2 drives with training, 2011_09_26_drive_0000_sync among them" in out


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


# -----------------------------------------------------------------------------
# lists and calibrations as people leave them


def names(frames):
    return [f.name.removeprefix("training/") for f in frames]


LISTS = {  # of the frames 000000 and 000001
    "byte order mark": "\ufeff000000\n000001\n",
    "CRLF and blank lines": "000000\r\n\r\n000001\r\n\r\n",
    "names of files": "000000.png\n000001.PNG\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_lists_that_are_understood(copy, kind):
    """R10, and ids with a suffix."""
    (copy / "ImageSets" / "train.txt").write_bytes(LISTS[kind].encode())
    assert names(data_kitti.find_frames(copy)) == ["000000", "000001"]
    assert names(data_kitti.find_frames(copy, skip_missing=True)) == ["000000", "000001"]


def test_calibrations_that_are_understood(copy):
    """R15: indented lines; a byte order mark, CRLF and blank lines likewise."""
    calib = files(copy)[2]
    expected = data_kitti.read_object_calib(calib)
    lines = calib.read_text().splitlines()
    for text in ("\ufeff" + "\r\n".join(lines), "\n\n".join(f" \t{line}  " for line in lines)):
        calib.write_bytes(text.encode())
        data_kitti.read_object_calib.cache_clear()
        assert np.array_equal(data_kitti.read_object_calib(calib), expected)


def test_a_calibration_without_p2_says_what_is_in_it(copy):
    no_p2(copy)
    with pytest.raises(BadInput, match=r"no P2 in it \(but P0, P1, P3, R0_rect, "):
        data_kitti.find_frames(copy)[0].lidar2img()


def test_images_of_any_suffix(copy):
    """R13: png, jpg or jpeg, in any case; a cloud's .BIN too."""
    for path in sorted((copy / "training" / "image_2").iterdir())[:3]:
        suffix = {"000000": ".JPG", "000001": ".jpeg", "000002": ".PNG"}[path.stem]
        path.rename(path.with_suffix(suffix))
    (copy / "training" / "velodyne" / "000003.bin").rename(copy / "training" / "velodyne" / "000003.BIN")
    frames = data_kitti.find_frames(copy, ["trainval"])
    assert [f.image.suffix for f in frames[:4]] == [".JPG", ".jpeg", ".PNG", ".png"] and len(frames) == 8
    assert frames[3].cloud.suffix == ".BIN"


def test_dot_files_are_no_frames(copy, raw_drive, tmp_path):
    """R14: what macOS leaves beside every file."""
    shutil.copytree(raw_drive, tmp_path / "raw")
    shutil.rmtree(copy / "ImageSets")
    hidden = tmp_path / "raw" / "2011_09_26" / ".trash"
    shutil.copytree(next((tmp_path / "raw").glob("*/*_sync")), hidden)
    for root in (copy, tmp_path / "raw"):
        for path in [p for p in root.rglob("*") if p.is_file()]:
            path.with_name(f"._{path.name}").write_bytes(b"\0" * 4096)
    assert names(data_kitti.find_frames(copy, ["trainval"])) == [f"{i:06d}" for i in range(8)]
    assert len(data_kitti.find_frames(tmp_path / "raw")) == 4


# -----------------------------------------------------------------------------
# frames that are there twice, or not at all


def test_frames_listed_twice_are_taken_once(copy, raw_drive, tmp_path):
    """R8: in a list, in two lists, under two roots, by whatever path; and it is said."""
    train = copy / "ImageSets" / "train.txt"
    once, notes = data_kitti.pool_frames([copy], ["train"])
    assert len(once) == 6 and notes == []
    (tmp_path / "link").symlink_to(copy)
    ways = {((copy,), ("train", "trainval")): 8, ((copy, tmp_path / "link"), ("train",)): 6}
    ways |= {((raw_drive, raw_drive / "2011_09_26"), ()): 4}
    for (roots, splits), count in ways.items():
        frames, (note,) = data_kitti.pool_frames(roots, splits)
        assert len(frames) == len(set(names(frames))) == count
        assert "frames that are listed twice" in note and note.startswith(f"note: {' '.join(['--splits', *splits])}: ")
    train.write_text(train.read_text() * 2)
    frames, (note,) = data_kitti.pool_frames([copy], ["train"])
    assert frames == once and f"6 frames that are listed twice, {once[0].name} among them" in note


def test_training_says_what_was_left_out(copy, tmp_path):
    """R18: --skip-missing counts; R8: so do frames that are listed twice."""
    (files(copy)[0]).unlink()
    files(copy, "val")[1].write_bytes(b"")
    c = simipu.Config(data_root=(str(copy), str(copy)), splits=("train",), eval_splits=("trainval",), skip_missing=True)
    with pytest.raises(BadInput, match="5 of its frames are trained on"):
        simipu.load_frames(c, SimpleNamespace(any=bool, main=True))
    c.eval_splits = ()
    frames, _, note = simipu.load_frames(c, SimpleNamespace(any=bool, main=True))
    assert len(frames) == 5 and note.splitlines() == [
        f"note: --splits train: 5 frames in {copy}, 1 without image or cloud left out",
        f"note: --splits train: 5 frames in {copy}, 1 without image or cloud left out",
        "note: --splits train: 5 frames that are listed twice, training/000001 among them, are taken once",
    ]


def refused(roots, splits, **more):
    """What is said of roots that no frames can be had of."""
    with pytest.raises(BadInput) as error:
        data_kitti.pool_frames(roots, splits, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_skipping_is_advised_where_it_helps(copy):
    """R13: for images and clouds; a calibration must be there. What was looked for is said."""
    missing_calib(copy)
    assert "--skip-missing" not in refused([copy], ["train"])
    missing_image(copy)
    assert ".jpg, .jpeg, .png are looked for; --skip-missing leaves out frames" in refused([copy], ["train"])
    shutil.rmtree(copy / "training" / "image_2")
    said = refused([copy], ["train"], skip_missing=True)
    assert "none of its 6 frames has both image (.jpg, .jpeg, .png) and cloud (.bin)" in said


@pytest.mark.parametrize("part, what", [("image_02", "no .jpg, .jpeg, .png"), ("velodyne_points", "no .bin")])
def test_drives_without_any_images_or_clouds(raw_drive, tmp_path, part, what):
    """R13: what was looked for, and no advice."""
    root = tmp_path / "raw"
    shutil.copytree(raw_drive, root)
    folder = next(root.glob(f"*/*/{part}/data"))
    for path in folder.iterdir():
        path.unlink()
    assert refused([root], ()).startswith(f"{folder}: {what} in it, but there are 4 ")


def test_splits_without_lists_name_the_folder_that_was_looked_into(copy):
    """R11."""
    shutil.rmtree(copy / "ImageSets")
    said = refused([copy], ["trainval", "test"])
    advice = "--splits trainval does without"
    assert said == f"{copy}/testing/velodyne: no *.bin in it, of which --splits test takes all ({advice})"
    shutil.rmtree(copy / "training" / "velodyne")
    said = refused([copy], ["trainval"])
    assert said == f"{copy}/training/velodyne: no *.bin in it, of which --splits trainval takes all"


def test_a_list_that_is_missing_names_the_flag(copy):
    """R18: of --eval-splits, whose default a preset gives."""
    said = refused([copy], ["nonsense"], flag="--eval-splits")
    assert "nonsense.txt: missing; it lists the frames of --eval-splits nonsense" in said
    assert "--eval-splits without a name judges on none" in said and "--splits trainval" not in said


# -----------------------------------------------------------------------------
# raw drives and their lists


@pytest.fixture
def two_drives(raw_drive, tmp_path):
    root = tmp_path / "raw"
    shutil.copytree(raw_drive, root)
    shutil.copytree(root / "2011_09_26" / DRIVES[0], root / "2011_09_26" / DRIVES[1])
    return root


DRIVES = "2011_09_26_drive_0001_sync", "2011_09_26_drive_0002_sync"


def test_lists_of_raw_drives(two_drives):
    """V6: with the date or without, with _sync or without; a list that is not there, or names no drive, is one line."""
    lists = two_drives / "ImageSets"
    assert {f.drive for f in data_kitti.find_frames(two_drives)} == set(DRIVES)
    with pytest.raises(
        BadInput, match=r"ImageSets/train.txt: missing; .* \(--splits without a name takes all drives\)"
    ):
        data_kitti.find_frames(two_drives, ["train"])
    lists.mkdir()
    for text in (DRIVES[1], f"2011_09_26/{DRIVES[1]}/\r\n", DRIVES[1].removesuffix("_sync")):
        (lists / "val.txt").write_text(f"\n{text}\n")
        assert [f.drive for f in data_kitti.find_frames(two_drives, ["val"])] == [DRIVES[1]] * 4
    (lists / "val.txt").write_text(f"{DRIVES[0]}\nnonsense\n")
    with pytest.raises(BadInput, match="val.txt: line 2, 'nonsense': no such drive in "):
        data_kitti.find_frames(two_drives, ["val"])
    (lists / "val.txt").write_text("")
    with pytest.raises(BadInput, match="split 'val' is empty"):
        data_kitti.find_frames(two_drives, ["val"])


def test_raw_drives_beside_an_object_root(two_drives, scenes):
    """Lists of frames are not lists of drives: without any, all of them are taken, and it is said."""
    frames, notes = data_kitti.pool_frames([scenes, two_drives], ["train", "val"])
    assert len(frames) == 8 + 8
    assert notes == [f"note: {two_drives}: all of its drives are taken, for it has no lists of them in ImageSets/"]
    assert len(data_kitti.pool_frames([two_drives], ["val"], named=False)[0]) == 8
    (two_drives / "ImageSets").mkdir()
    (two_drives / "ImageSets" / "train.txt").write_text(DRIVES[0])
    frames, notes = data_kitti.pool_frames([scenes, two_drives], ["train", "val"])
    assert len(frames) == 8 + 4 and notes == []
    with pytest.raises(BadInput, match="ImageSets: no list of drives in it is called val"):
        data_kitti.pool_frames([scenes, two_drives], ["val"])


def test_the_preset_of_raw_drives_takes_them_all(two_drives):
    c = simipu.PRESETS["kitti_raw"][1]
    assert len(data_kitti.find_frames(two_drives, c.splits, 1)) == 8


# -----------------------------------------------------------------------------
# many frames


@pytest.fixture
def many(copy, monkeypatch):
    """A root whose frames are many enough for an index, and a list of the files that are asked for their size."""
    asked = []
    monkeypatch.setattr(data_kitti, "INDEXED", 5)
    monkeypatch.setattr(data_kitti, "SAMPLED", 3)
    monkeypatch.setattr(data_kitti, "file_size", lambda path: (asked.append(path), file_size(path))[1])
    return copy, asked


def test_frames_are_the_same_with_an_index_and_without(copy, monkeypatch, request):
    splits = ["train", "val"]
    plain, lines = data_kitti.find_frames(copy, splits), data.inventory(data_kitti.find_frames(copy, splits))
    assert not (copy / "training.index").exists()
    root, asked = request.getfixturevalue("many")
    for times in (8 * 3, 3 * 3):  # all files; then a few, to see whether the index is still of them
        asked.clear()
        frames, notes = data_kitti.pool_frames([root], splits)
        assert frames == plain and notes == [] and len(asked) == times
        assert data.inventory(frames) == lines and data.sweeps_of(frames).tolist() == frames.cells[:, 1].tolist()
        assert len(asked) == times
    index = (copy / "training.index").read_bytes()
    assert data_kitti.find_frames(root, ["val"]) == plain[6:] and (copy / "training.index").read_bytes() == index


def later(folder):
    """As if something had been done to it a second later: some disks have no finer times."""
    time = folder.stat().st_mtime_ns + 10**9
    os.utime(folder, ns=(time, time))


def lose_cloud(root):
    files(root)[1].unlink()
    return f"{files(root)[1].name}: missing"


def lose_cloud_unnoticed_by_time(root):
    folder = files(root)[1].parent
    time = folder.stat().st_mtime_ns
    files(root)[1].unlink()
    os.utime(folder, ns=(time, time))
    return f"{files(root)[1].name}: missing"


def cut_cloud(root):
    """In its place: the folder's time stays. It is the first, one of those that are looked at."""
    files(root)[1].write_bytes(files(root)[1].read_bytes()[:-3])
    return f"{files(root)[1].name}: truncated"


def lose_calib(root):
    files(root)[2].unlink()
    later(files(root)[2].parent)
    return f"{files(root)[2].name}: missing"


@pytest.mark.parametrize("change", [lose_cloud, lose_cloud_unnoticed_by_time, cut_cloud, lose_calib])
def test_an_index_of_other_files_is_made_anew(many, capsys, change):
    root, _ = many
    data_kitti.find_frames(root)
    expected = change(root)
    with pytest.raises(BadInput, match=expected):
        data_kitti.find_frames(root)
    assert capsys.readouterr().err == f"note: {root}/training.index: made of other files than these; it is made anew\n"


def test_more_frames_make_another_index(many, capsys):
    root, _ = many
    assert len(data_kitti.find_frames(root, ["trainval"])) == 8
    for path in files(root):
        shutil.copy(path, path.with_stem("000999"))
    (root / "ImageSets" / "trainval.txt").unlink()
    frames = data_kitti.find_frames(root, ["trainval"])
    assert len(frames) == 9 and frames[-1].name == "training/000999"
    assert "made of other files" in capsys.readouterr().err


def test_a_broken_index_is_a_line_and_made_anew(many, capsys):
    root, _ = many
    frames = data_kitti.find_frames(root, ["trainval"])
    index = root / "training.index"
    raw = bytearray(index.read_bytes())
    raw[-70] ^= 1  # a size
    index.write_bytes(raw)
    assert data_kitti.find_frames(root, ["trainval"]) == frames
    said = capsys.readouterr().err
    assert said.startswith(f"note: {index}: not a readable index (") and said.count("\n") == 1
    assert index.read_bytes() != raw


def test_what_lists_name_and_no_folder_has_is_missing_with_an_index_too(many):
    root, _ = many
    for split in ("train", "val"):
        with open(root / "ImageSets" / f"{split}.txt", "a") as f:
            f.write("000777\n000778\n")
    for _ in range(2):
        frames, notes = data_kitti.pool_frames([root], ["train", "val"], skip_missing=True)
        assert len(frames) == 8 and "8 frames in " in notes[0] and "4 without image or cloud" in notes[0]
        with pytest.raises(BadInput, match="000777.png: missing"):
            data_kitti.find_frames(root, ["train", "val"])
    assert len(data_kitti.list_frames(root, ["trainval"])) == 8


def test_few_of_many_are_chosen_without_looking_through_them(many):
    """What an evaluation judges: the same as if all were looked through, and no file of another is asked for."""
    root, asked = many
    every = data_kitti.find_frames(root, ["trainval"])
    (root / "training.index").unlink()
    asked.clear()
    few, _ = data_kitti.pool_frames([root], ["trainval"], limit=3)
    assert few == data.evenly_spread(every, 3)
    assert sorted(map(str, asked)) == sorted(str(path) for f in few for path in (f.image, f.cloud, *f.calib))
    every[1].cloud.unlink()  # not one of them
    assert data_kitti.pool_frames([root], ["trainval"], limit=3)[0] == few


def test_repeats_among_many(many, tmp_path):
    root, _ = many
    once = data_kitti.find_frames(root)
    (tmp_path / "link").symlink_to(root)
    frames, (note,) = data_kitti.pool_frames([root, tmp_path / "link"])
    assert frames == once and "6 frames that are listed twice" in note
    other = once[1].image.with_stem("000900")
    other.symlink_to(once[0].image.name)
    for path in (once[0].cloud, once[0].calib[0]):
        shutil.copy(path, path.with_stem("000900"))
    (root / "ImageSets" / "train.txt").write_text("000900\n" + (root / "ImageSets" / "train.txt").read_text())
    frames, (note,) = data_kitti.pool_frames([root])
    assert len(frames) == 6 and frames[0].name == "training/000900" and f"{once[0].name} among them" in note


def test_frames_are_small(scenes):
    """What a loading process gets of a data set does not hold a Frame of each."""
    frames = data_kitti.find_frames(scenes, ["trainval"])
    grown = data.Frames(frames.sources, np.tile(frames.cells, (10_000, 1)))
    pickled = len(pickle.dumps(data.PretrainFrames(grown, simipu.Config())))
    assert len(grown) == 80_000 and pickled < 80_000 * 8 + 10_000


# -----------------------------------------------------------------------------
# odometry sequences

# Tr of sequence 03 as KITTI's odometry archive has it; the sequence is of a drive of 2011_09_26
TR_03 = """2.347736981471e-04 -9.999441545438e-01 -1.056347781105e-02 -2.796816941295e-03 1.044940741659e-02
    1.056535364138e-02 -9.998895741176e-01 -7.510879138296e-02 9.999453885620e-01 1.243653783865e-04 1.045130299567e-02
    -2.721327964059e-01"""


def write_sequence(root, number, frames):
    """A sequence of the images and clouds of raw frames. Its calibration says the same in odometry's words."""
    folder = root / "sequences" / number
    for part in ("image_2", "velodyne"):
        (folder / part).mkdir(parents=True)
    for i, frame in enumerate(frames):
        shutil.copy(frame.image, folder / "image_2" / f"{i:06d}{frame.image.suffix}")
        shutil.copy(frame.cloud, folder / "velodyne" / f"{i:06d}.bin")
    cameras, velodyne = (data_kitti._read_calib(path) for path in frames[0].calib)
    rotation, translation = (np.array(velodyne[k].split(), float).reshape(3, -1) for k in ("R", "T"))
    rectified = np.array(cameras["R_rect_00"].split(), float).reshape(3, 3)
    tr = rectified @ np.hstack([rotation, translation])
    (folder / "calib.txt").write_text(f"P2: {cameras['P_rect_02']}\nTr: {' '.join(map(str, tr.ravel().tolist()))}\n")
    return folder


@pytest.fixture
def odometry(raw_drive, tmp_path):
    """Sequences 04 and 08, of four frames each."""
    root = tmp_path / "odometry"
    for number in ("04", "08"):
        write_sequence(root, number, data_kitti.find_frames(raw_drive))
    return root


def test_sequences_are_projected_as_their_raw_drive(odometry, raw_drive):
    frames, raw = data_kitti.find_frames(odometry, ["04"]), data_kitti.find_frames(raw_drive)
    assert [f.name for f in frames] == [f"04/{i:06d}" for i in range(4)] and len(raw) == 4
    for frame, same in zip(frames, raw):
        np.testing.assert_allclose(frame.lidar2img(), same.lidar2img(), rtol=1e-12)
        assert np.array_equal(frame.read_image(), same.read_image())
        assert np.array_equal(frame.read_points(), same.read_points())


def test_published_calibrations_agree(kitti, tmp_path):
    """Of a real day: that of its raw drives, and that of the sequence which was cut from one of them."""
    raw = data_kitti.find_frames(kitti / "raw")[0]
    p2 = data_kitti._read_calib(raw.calib[0])["P_rect_02"]
    (tmp_path / "calib.txt").write_text(f"P2: {p2}\nTr: {' '.join(TR_03.split())}\n")
    expected = raw.lidar2img()
    np.testing.assert_allclose(data_kitti.read_odometry_calib(tmp_path / "calib.txt"), expected, atol=1e-8)


def test_splits_are_sequences(odometry, raw_drive, tmp_path):
    of = lambda splits, **more: sorted({f.name[:2] for f in data_kitti.find_frames(odometry, splits, **more)})
    assert of(["val"]) == ["08"] and of(["04", "08", "val"]) == of(()) == ["04", "08"]
    assert of(["train"], skip_missing=True) == ["04"]
    assert len(data_kitti.find_frames(odometry, ["08"], frame_stride=3)) == 2
    drives = {"2011_09_30_drive_0016_sync", "2011_09_30_drive_0028_sync"}  # by the names that raw drives have
    assert {f.drive for f in data_kitti.find_frames(odometry)} == drives
    every = [number for numbers in data_kitti.SEQUENCES.values() for number in numbers]
    assert sorted(every) == [f"{i:02d}" for i in range(22)]
    (tmp_path / "dataset").symlink_to(odometry)  # as KITTI's archives unpack
    assert len(data_kitti.find_frames(tmp_path, ["val"])) == 4
    frames, notes = data_kitti.pool_frames([odometry, raw_drive], ["val"])
    taken = f"note: {raw_drive}: all of its drives are taken, for it has no lists of them in ImageSets/"
    assert len(frames) == 8 and notes == [taken]


def without_tr(folder):
    lines = (folder / "calib.txt").read_text().splitlines()
    (folder / "calib.txt").write_text(lines[0])
    return f"{folder}/calib.txt: no Tr in it"


def without_calib(folder):
    (folder / "calib.txt").unlink()
    return f"{folder}/calib.txt: missing (of frame 04/000000"


def without_cloud(folder):
    (folder / "velodyne" / "000001.bin").unlink()
    return f"{folder}/velodyne/000001.bin: missing (of frame 04/000001; --skip-missing"


def without_clouds(folder):
    shutil.rmtree(folder / "velodyne")
    return f"{folder}/velodyne: no .bin in it, but there are 4 images"


def without_sequence(folder):
    shutil.rmtree(folder)
    return f"{folder}: missing (--splits 04 asks for it; --skip-missing"


def without_sequences(folder):
    shutil.rmtree(folder.parent)
    folder.parent.mkdir()
    return f"{folder.parent}: no sequence in it"


HARMS = [without_tr, without_calib, without_cloud, without_clouds, without_sequence, without_sequences]


@pytest.mark.parametrize("harm", HARMS)
def test_a_broken_sequence_is_one_line(odometry, harm):
    expected = harm(odometry / "sequences" / "04")
    data_kitti.read_odometry_calib.cache_clear()
    with pytest.raises(BadInput) as error:
        data_kitti.find_frames(odometry, ["04"])[0].lidar2img()
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


def test_a_split_that_no_sequence_is_of(odometry):
    with pytest.raises(BadInput, match="^--splits vall: of .* it must be train, val, test, or a sequence such as 04"):
        data_kitti.find_frames(odometry, ["vall"])


def test_drives_without_clouds_are_found_by_their_images(raw_drive, tmp_path):
    root = shutil.copytree(raw_drive, tmp_path / "raw")
    for clouds in list(root.rglob("velodyne_points")):
        shutil.rmtree(clouds)
    with pytest.raises(BadInput, match="nor raw"):
        data_kitti.find_frames(root)
    frames, _ = data_kitti.pool_frames([root], clouds=False)
    assert [f.name for f in frames] == [f.name for f in data_kitti.find_frames(raw_drive)]


# -----------------------------------------------------------------------------
# another car's sensors


def test_a_root_says_whose_sensors_its_frames_are_from(copy):
    path = copy / "rig.json"
    rig = data.Rig((0.0, -9.0, -2.0, 20.0, 9.0, 4.0), (10.0, 0.0, 1.0), ground=0.0, box=(960, 640), columns=5)
    path.write_text(json.dumps(dataclasses.asdict(rig)))
    assert data_kitti.list_frames(copy)[0].rig == rig
    path.unlink()
    assert data_kitti.list_frames(copy)[0].rig is data_kitti.RIG


def test_frames_of_waymo_say_their_segment(copy):
    name = "1024360143612057520_3580_000_3600_000_1553735853462203_FRONT_LEFT"
    (copy / "ImageSets" / "waymo.txt").write_text(f"{name}\n000001\n")
    drives = [frame.drive for frame in data_kitti.list_frames(copy, ["waymo"])]
    assert drives == ["1024360143612057520_3580_000_3600_000", None]


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"ground": 0}', '{"wheels": 4}'])
def test_a_rig_that_is_none(copy, text):
    (copy / "rig.json").write_text(text)
    with pytest.raises(BadInput, match="rig.json: not a rig"):
        data_kitti.list_frames(copy)
