"""Errors that a user can mend, files that are whole or absent, and the ways to find and to read them.

This module imports none of the others.
"""

import codecs
import contextlib
import json
import os
import stat
from pathlib import Path

import torch

IMAGES = (".jpg", ".jpeg", ".png")  # in any case; where a picture is there twice, the first of these is taken
LONGEST_WORD = 1000  # characters in a list, a calibration or a label: what is longer is none of them


class BadInput(ValueError):
    """Something a user gave cannot be used. The message is one line that names the file or the flag."""


@contextlib.contextmanager
def disk_errors(path):
    """Raises BadInput, naming the file, for what the disk answers to a write."""
    try:
        yield
    except OSError as e:
        raise BadInput(f"{path}: not written ({e.strerror or e})") from None


@contextlib.contextmanager
def writing(path):
    """A file that appears whole or not at all. -> the path to write to instead, which takes its place at the end.

    Raises BadInput as `disk_errors` does.
    """
    path = Path(path)
    temporary = path.with_suffix(f".tmp{path.suffix}")
    try:
        with disk_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save_atomically(obj, path):
    """torch.save. A reader, or a run killed at any moment or on a full disk, sees the old file or the new one."""
    with writing(path) as temporary, temporary.open("wb") as f:
        try:
            torch.save(obj, f)
        except RuntimeError as e:  # says nothing of a full disk itself
            raise e.__context__ if isinstance(e.__context__, OSError) else e


def read_checkpoint(path):
    """What torch.save wrote, on the CPU. Raises BadInput for a file that is missing or cannot be read safely."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # torch.load answers a broken file with half a dozen types
        raise BadInput(f"{path}: not a readable checkpoint ({type(e).__name__})") from None


# -----------------------------------------------------------------------------
# finding files


def why_unread(path, error, absent="no such file"):
    """In words, why the disk did not let `path` be read. error: the OSError that it answered with."""
    if isinstance(error, IsADirectoryError):
        return "a folder, where a file is wanted"
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"not readable ({error.strerror})"
    return f"a link to {os.readlink(path)}, which is not there" if os.path.islink(path) else absent


def file_size(path):
    """-> bytes of a file; what is wrong with it, in words, or None. It is one question to the disk."""
    try:
        found = os.stat(path)
    except OSError as e:
        return 0, why_unread(path, e, "missing")
    if stat.S_ISDIR(found.st_mode):
        return 0, "a folder, where a file is wanted"
    return found.st_size, None if found.st_size else "empty"


def list_folder(folder):
    """Names in a folder, sorted; [] where there is no such folder. Raises BadInput for one that may not be read.

    Those with a dot in front are left out: macOS leaves a ._000000.bin beside 000000.bin on other systems' disks.
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as e:
        raise BadInput(f"{folder}: not readable ({e.strerror})") from None
    return sorted(name for name in names if not name.startswith("."))


class Folders:
    """Files by folder, name and suffix, whose case does not matter. Each folder is listed once, so that not every
    frame costs a question to the disk.
    """

    def __init__(self):
        self.listed = {}

    def names(self, folder):
        """{(stem, suffix in lower case): name} of all that lies in a folder."""
        folder = str(folder)
        if folder not in self.listed:
            self.listed[folder] = names = {}
            for name in list_folder(folder):
                stem, suffix = os.path.splitext(name)
                names[stem, suffix.lower()] = name
        return self.listed[folder]

    def stems(self, folder, suffixes):
        """All stems with one of the suffixes: a set."""
        return {stem for stem, suffix in self.names(folder) if suffix in suffixes}

    def find(self, folder, stem, suffixes):
        """The path of a stem with the first of the suffixes that is there, or None."""
        names = self.names(folder)
        for suffix in suffixes:
            if (stem, suffix) in names:
                return Path(folder, names[stem, suffix])
        return None


# -----------------------------------------------------------------------------
# reading text


def read_text(path):
    """A text file in UTF-8, without its byte order mark. Raises BadInput for one that is missing or no text."""
    try:
        raw = Path(path).read_bytes()
    except OSError as e:
        raise BadInput(f"{path}: {why_unread(path, e)}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = raw[: e.start].count(b"\n") + 1
        hint = "; is it UTF-16?" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise BadInput(f"{path}: line {line} is not text in UTF-8, byte {raw[e.start]:#04x}{hint}") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise BadInput(f"{path}: line {line} holds NUL bytes, so this is no text")
    return text


def read_lines(path):
    """Lines of a list, a calibration or labels. Raises BadInput as read_text does, and for a word of absurd length."""
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        longest = max(map(len, line.split()), default=0) if len(line) > LONGEST_WORD else 0
        if longest > LONGEST_WORD:
            raise BadInput(f"{path}: line {number}, '{line.strip()[:20]}...', holds a word of {longest} characters")
    return lines


def read_log(path):
    """The lines of a log.jsonl, [] without one. A killed run may have left the last one torn."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
