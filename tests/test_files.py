"""Text and folders as people leave them: what can be understood is, the rest is one line that names file and line."""

import os
import subprocess

import pytest

import files
from files import BadInput, Folders, file_size, list_folder, read_lines, read_text

TEXTS = {  # a list of two ids, as editors and other systems write it
    "byte order mark": b"\xef\xbb\xbf000001\n000002\n",
    "CRLF": b"000001\r\n000002\r\n",
    "CR": b"000001\r000002",
    "blank lines": b"\n000001\n\n  000002  \n\n\n",
    "one line": b"000001 000002",
}


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_that_are_understood(tmp_path, kind):
    """R10."""
    path = tmp_path / "train.txt"
    path.write_bytes(TEXTS[kind])
    assert " ".join(read_lines(path)).split() == ["000001", "000002"]


NO_TEXTS = {
    "UTF-16": ("000001\n".encode("utf-16"), "line 1 is not text in UTF-8, byte 0xff; is it UTF-16?"),
    "UTF-16 without a mark": ("000001\n".encode("utf-16-le"), "line 1 holds NUL bytes"),
    "Latin-1": (b"000001\n\n\xe9t\xe9\n", "line 3 is not text in UTF-8, byte 0xe9"),
    "NUL bytes": (b"000001\n\0\0\0\0\n", "line 2 holds NUL bytes"),
    "a long word": (b"000001\n" + b"7" * 5000, "line 2, '77777777777777777777...', holds a word of 5000 characters"),
}


@pytest.mark.parametrize("kind", NO_TEXTS)
def test_texts_that_are_none(tmp_path, kind):
    """R10: one line, which names file and line."""
    content, says = NO_TEXTS[kind]
    path = tmp_path / "train.txt"
    path.write_bytes(content)
    with pytest.raises(BadInput) as error:
        read_lines(path)
    assert str(error.value).startswith(f"{path}: {says}") and "\n" not in str(error.value)


def test_many_words_on_a_line_are_no_long_word(tmp_path):
    path = tmp_path / "train.txt"
    path.write_text("000001 " * 3000)
    assert len(read_lines(path)) == 1


def things(folder):
    """Of each kind of thing at a path where a file is wanted: (path, words for it)."""
    (folder / "a_folder").mkdir()
    (folder / "a_link").symlink_to(folder / "nowhere")
    (folder / "a_file").write_bytes(b"")
    return {
        folder / "a_folder": "a folder, where a file is wanted",
        folder / "a_link": f"a link to {folder / 'nowhere'}, which is not there",
        folder / "nothing": "missing",
        folder / "a_file" / "below": "missing",
        folder / ("x" * 300): "not readable (File name too long)",
    }


def test_what_is_not_a_file_is_told_apart(tmp_path):
    for path, words in things(tmp_path).items():
        assert file_size(path) == (0, words)
        with pytest.raises(BadInput) as error:
            read_text(path)
        assert str(error.value) == f"{path}: {words}".replace(": missing", ": no such file")
    assert file_size(tmp_path / "a_file") == (0, "empty")
    (tmp_path / "a_file").write_bytes(b"four")
    assert file_size(tmp_path / "a_file") == (4, None)


def test_folders_hold_no_dot_files_and_any_suffix(tmp_path, monkeypatch):
    """R14: macOS leaves a ._ file beside every file. R13: cameras write .JPG."""
    for name in (
        "000000.JPG",
        "000001.png",
        "000001.jpg",
        "000002.jpeg",
        "1.5.PNG",
        "._000000.JPG",
        ".DS_Store",
        "a.txt",
    ):
        (tmp_path / name).touch()
    assert list_folder(tmp_path) == sorted(name for name in os.listdir(tmp_path) if name[0] != ".")
    folders = Folders()
    assert folders.stems(tmp_path, files.IMAGES) == {"000000", "000001", "000002", "1.5"}
    found = {stem: folders.find(tmp_path, stem, files.IMAGES) for stem in ("000000", "000001", "000002", "1.5", "7")}
    names = {"000000": "000000.JPG", "000001": "000001.jpg", "000002": "000002.jpeg", "1.5": "1.5.PNG"}
    assert found == {stem: tmp_path / name for stem, name in names.items()} | {"7": None}
    monkeypatch.setattr(os, "listdir", None)  # a folder is listed once
    assert folders.find(str(tmp_path), "a", (".txt",)) == tmp_path / "a.txt"


def test_a_folder_that_is_not_there_is_empty(tmp_path):
    (tmp_path / "file").touch()
    assert list_folder(tmp_path / "nowhere") == list_folder(tmp_path / "file") == []
    assert Folders().stems(tmp_path / "nowhere", (".bin",)) == set()


def test_what_the_dead_left_is_removed(tmp_path):
    """Also what a process left whose parent never asked how it ended; what lives keeps its files."""
    dead, living = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "60"])
    os.waitid(os.P_PID, dead.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    names = [f"a.{dead.pid}.tmp.jpg", f"last.{2**22 + 1}.tmp.pt", f"b.{living.pid}.tmp", "c.jpg", "d.tmp.txt"]
    for name in names:
        (tmp_path / name).touch()
    try:
        files.remove_stale(tmp_path, age=60)  # another machine may be writing them
        assert len(list(tmp_path.iterdir())) == len(names)
        files.remove_stale(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[2:])
    finally:
        living.kill()
        living.wait()
        dead.wait()
