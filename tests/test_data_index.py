"""An index: arrays in one file, mapped; made anew where it is of other files or broken, and never taken for another."""

import os

import numpy as np
import pytest

import data_index

ARRAYS = {
    "names": np.array([b"a", b"bcd", b""], "S"),
    "matrices": np.arange(24.0).reshape(2, 3, 4),
    "none": np.zeros((0, 3), np.int32),
    "flags": np.array([True, False]),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "simipu"


def equal(found):
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def once():
    raise AssertionError("it is made again")


def test_arrays_are_kept(tmp_path, cache, capsys):
    path = tmp_path / "x.index"
    equal(data_index.kept(path, ["stamp", 1], lambda: ARRAYS))
    equal(data_index.kept(path, ["stamp", 1], once))
    assert capsys.readouterr().err == "" and not cache.exists()


def test_arrays_are_mapped_and_cannot_be_written_to(tmp_path):
    data_index.kept(tmp_path / "x.index", 0, lambda: ARRAYS)
    found = data_index.kept(tmp_path / "x.index", 0, once)
    with pytest.raises(ValueError, match="read-only"):
        found["matrices"][0] = 1
    with open("/proc/self/maps") as maps:
        assert str(tmp_path / "x.index") in maps.read()
    address = found["matrices"].__array_interface__["data"][0]
    assert address % data_index.ALIGN == 0


def test_another_stamp_is_a_line_and_made_anew(tmp_path, capsys):
    path = tmp_path / "x.index"
    data_index.kept(path, [1], lambda: {"old": np.zeros(2)})
    equal(data_index.kept(path, [2], lambda: ARRAYS))
    assert capsys.readouterr().err == f"note: {path}: made of other files than these; it is made anew\n"
    equal(data_index.kept(path, [2], once))


def test_any_byte_that_is_another_is_noticed(tmp_path, capsys):
    path = tmp_path / "x.index"
    data_index.kept(path, [1], lambda: ARRAYS)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        assert data_index.find(path, [1]) is None, i
    for size in (0, 5, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert data_index.find(path, [1]) is None, size
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(whole) + 6
    assert all(line.startswith(f"note: {path}: not a readable index (") for line in lines)
    equal(data_index.kept(path, [1], lambda: ARRAYS))
    assert path.read_bytes() == whole


def test_one_that_does_not_fit_is_none(tmp_path, capsys):
    path = tmp_path / "x.index"
    data_index.kept(path, [1], lambda: ARRAYS)
    assert data_index.find(path, [1], lambda found: found["flags"][0]) is not None
    assert data_index.find(path, [1], lambda found: found["flags"][1]) is None
    assert "made of other files than these" in capsys.readouterr().err


def test_where_the_folder_cannot_be_written_to_it_is_kept_elsewhere(tmp_path, cache, capsys):
    path = tmp_path / "x.index"
    (path / "taken").mkdir(parents=True)  # permissions would not stop a superuser
    equal(data_index.kept(path, [1], lambda: ARRAYS))
    equal(data_index.kept(path, [1], once))
    (kept,) = cache.iterdir()
    assert kept.name.endswith(".x.index") and data_index.elsewhere(tmp_path / "y" / "x.index") != kept


def test_where_it_can_be_kept_nowhere_that_is_said(tmp_path, cache, capsys):
    path = tmp_path / "x.index"
    (path / "taken").mkdir(parents=True)
    cache.parent.write_text("no folder")
    equal(data_index.kept(path, [1], lambda: ARRAYS))
    said = capsys.readouterr().err
    assert f"{path}: not written" in said and "every start will read all files again" in said


def test_a_folder_is_known_by_its_time_and_what_it_holds(tmp_path):
    first = data_index.of_folder(tmp_path)
    assert first[1] == 0 and data_index.of_folder(tmp_path / "none") == (0, 0)
    (tmp_path / "a").touch()
    os.utime(tmp_path, ns=(first[0], first[0]))  # as on disks whose times are coarse
    assert data_index.of_folder(tmp_path) == (first[0], 1)
