"""Errors that a user can mend, and files that are whole or absent. This module imports none of the others."""

import contextlib
import json
import os
import re
from pathlib import Path

import torch

TEMPORARY = re.compile(r".+\.(\d{1,9})\.tmp(\.\w+)?")  # the name that `writing` gives to a file before it is whole


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

    That path holds the number of the process, so that two processes which write the same file cannot mix what they
    write. Raises BadInput as `disk_errors` does.
    """
    path = Path(path)
    temporary = path.with_suffix(f".{os.getpid()}.tmp{path.suffix}")
    try:
        with disk_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def remove_stale(folder):
    """Remove what `writing` has left half-done in a folder, of processes that no longer live on this machine."""
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and not lives(int(match[1])):
            path.unlink(missing_ok=True)


def lives(pid):
    """Is there such a process on this machine?"""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def save_atomically(obj, path):
    """torch.save. A reader, or a run killed at any moment or on a full disk, sees the old file or the new one."""
    with writing(path) as temporary, temporary.open("wb") as f:
        try:
            torch.save(obj, f)
        except RuntimeError as e:
            if isinstance(e.__context__, OSError):  # a full disk, of which torch itself says nothing
                raise e.__context__ from None
            raise
        f.flush()
        os.fsync(f.fileno())  # some disks say only now that they are full


def read_checkpoint(path):
    """What torch.save wrote, on the CPU. Raises BadInput for a file that is missing or cannot be read safely."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except Exception as e:  # torch.load answers a broken file with half a dozen types
        raise BadInput(f"{path}: not a readable checkpoint ({type(e).__name__})") from None


def read_text(path):
    """A text file. Raises BadInput for one that cannot be read or is no text."""
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise BadInput(f"{path}: not readable ({e})") from None


def read_log(path):
    """The lines of a log.jsonl, [] without one. A killed run may have left the last one torn."""
    lines = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines
