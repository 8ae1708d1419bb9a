"""Errors that a user can mend, files that are whole or absent, the ways to find and read them, anybody's checkpoints.

This module imports none of the others.
"""

import argparse
import codecs
import collections
import contextlib
import json
import os
import pickle
import re
import stat
import textwrap
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import safetensors
import torch

IMAGES = (".jpg", ".jpeg", ".png")  # in any case; where a picture is there twice, the first of these is taken
LONGEST_WORD = 1000  # characters in a list, a calibration or a label: what is longer is none of them
TEMPORARY = re.compile(r".+\.(\d{1,9})\.tmp(\.\w+)?")  # the name that `writing` gives to a file before it is whole


class BadInput(ValueError):
    """Something a user gave cannot be used. The message is one line that names the file or the flag."""


def unless_bad(batch):
    """The batch itself. Raises the BadInput that it may be, for loading hands those over like batches."""
    if isinstance(batch, BadInput):
        raise batch
    return batch


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

    That path holds the number of the process, so that two processes of a machine which write the same file cannot mix
    what they write. Raises BadInput as `disk_errors` does.
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


def remove_stale(folder, age=0):
    """Remove what `writing` has left half-done in a folder, `age` seconds ago or more, of processes that do not live on
    this machine. Where other machines write, too, age tells what they have left from what they are writing.
    """
    for path in folder.iterdir():
        match = TEMPORARY.fullmatch(path.name)
        if match and not lives(int(match[1])):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime >= age:
                    path.unlink()


def lives(pid):
    """Is there such a process on this machine? One that is dead, and whose parent does not care, does not live."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's, or a system without /proc
        return True
    return state != "Z"


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


# -----------------------------------------------------------------------------
# checkpoints


class StandIn:
    """In the place of a class or function that only its own program knows: nothing of it is run.

    An object of the class becomes the items that it has as a dict; most have none.
    """

    def __new__(cls, *args, **kwargs):
        return collections.OrderedDict()


def _harmless():
    """What a pickle may name and get, by the names that numpy 1 and numpy 2 wrote: numbers, arrays and arguments."""
    types = {type(np.dtype(code)) for code in np.typecodes["All"]}
    allowed = {f"numpy.dtypes.{t.__name__}": t for t in types}
    allowed |= {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype, "argparse.Namespace": argparse.Namespace}
    for core in ("numpy.core", "numpy._core"):
        allowed[f"{core}.multiarray.scalar"] = np.float64().__reduce__()[0]
        allowed[f"{core}.multiarray._reconstruct"] = np.empty(0).__reduce__()[0]
        allowed[f"{core}.numeric._frombuffer"] = np.empty(1).__reduce_ex__(5)[0]
    return allowed


HARMLESS = _harmless()
# torch allows these itself
PLAIN = {"_codecs.encode": codecs.encode, "collections.OrderedDict": collections.OrderedDict}
TORCH_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # at the start of what torch.save wrote before 1.6
NOT_ALLOWED = re.compile(r"GLOBAL (\S+) was not an allowed global")  # torch names what it would not load
BLOCKED = re.compile(r"unsupported GLOBAL (\S+) whose module")  # what no one may allow: os, sys
SIGNATURES = {
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it first",
    b"\x89HDF": "HDF5, as Keras writes it, not torch.save's",
    b"\x93NUMPY": "one array of numpy.save, without names",
}


def read_checkpoint(path):
    """What is in a checkpoint, on the CPU; no code in it is run.

    Read are torch.save's files (zip, and the form before torch 1.6) by torch.load(weights_only=True); safetensors, a
    dict of tensors with the file's "__metadata__", a dict of strings; and plain pickles of dicts of numpy arrays
    (detectron2). Raises BadInput, one line with the reason, for all else.
    """
    return read_any(path)[0]


def read_any(path):
    """As `read_checkpoint` -> contents, names of the classes whose objects were not restored (see StandIn)."""
    path, foreign = Path(path), []
    start = _first_bytes(path)
    try:
        if start[5:9] == b"\0\0\0{":  # the length of a JSON header, then the header
            return _read_safetensors(path), foreign
        if start[:1] == b"\x80" and TORCH_MAGIC not in start[:32]:
            return _read_pickle(path, foreign), foreign
        return _read_torch(path, foreign), foreign
    except Exception as e:  # a broken file is answered with half a dozen types
        raise BadInput(f"{path}: not a readable checkpoint: {_reason(path, start, e, foreign)}") from None


def _first_bytes(path):
    """The first 512 bytes. Raises BadInput where there is no file to read."""
    try:
        with path.open("rb") as f:
            return f.read(512)
    except FileNotFoundError:
        if not path.is_symlink():
            raise BadInput(f"{path}: no such file") from None
        target = os.readlink(path)
        hint = "; `git annex get` fetches it" if "annex/objects/" in target else ""
        raise BadInput(f"{path}: a link to {target}, which is not there{hint}") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: a folder; name a file in it") from None
    except OSError as e:
        raise BadInput(f"{path}: not readable ({e.strerror})") from None


def _read_safetensors(path):
    with safetensors.safe_open(path, framework="pt") as f:
        metadata = f.metadata() or {}
        return {"__metadata__": metadata} | {name: f.get_tensor(name) for name in f.keys()}


def _read_torch(path, foreign):
    """torch.load(weights_only=True). Classes that it names and refuses are added to `foreign`, and stand-ins loaded."""
    while True:
        allowed = HARMLESS | {name: StandIn for name in foreign}
        try:
            with torch.serialization.safe_globals([(v, k) for k, v in allowed.items()]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols; what fails has its own line
                return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as e:
            refused = NOT_ALLOWED.search(str(e))
            if not refused:
                raise
            name = refused[1] if "." in refused[1] else f"builtins.{refused[1]}"
            if name in foreign:
                raise
            foreign.append(name)


def _read_pickle(path, foreign):
    """A pickle that torch.save did not write, such as detectron2's: dicts, lists, numbers, text and numpy arrays."""
    with path.open("rb") as f:
        return Restricted(f, foreign).load()


class Restricted(pickle.Unpickler):
    """Python's own, that looks nothing up but HARMLESS and PLAIN."""

    def __init__(self, file, foreign):
        super().__init__(file, encoding="latin1")  # so are the arrays of Python 2
        self.foreign = foreign

    def find_class(self, module, name):
        name = f"{module}.{name}"
        found = (HARMLESS | PLAIN).get(name, StandIn)
        if found is StandIn and name not in self.foreign:
            self.foreign.append(name)
        return found


def _reason(path, start, error, foreign):
    """Why a file could not be read, in some words. start: its first bytes. foreign: names that it got stand-ins for."""
    instead = _instead(start)
    if not instead and start.startswith(b"PK") and zipfile.is_zipfile(path):
        instead = _zip_instead(zipfile.ZipFile(path).namelist())
        if not instead and "Unsupported operand" in str(error):
            instead = "saved with a pickle_protocol that cannot be read safely; save it again without"
    if instead:
        return instead
    blocked = BLOCKED.search(str(error))
    if blocked:
        return f"it names {blocked[1]}, which is a program and no weights"
    what = "broken or truncated"
    if foreign:
        what += f", or objects of {', '.join(foreign[:3])} stand in the way"
    said = str(error).split("WeightsUnpickler error:")[-1]
    said = textwrap.shorten(f"{type(error).__name__}: {said}", 120, placeholder=" ...")
    return f"{what} ({path.stat().st_size:,} bytes; {said})"


def _instead(start):
    """What a file is instead of a checkpoint, by its first bytes; None where they do not show it."""
    if not start:
        return "it is empty"
    text = start.decode("utf-8", "ignore").lstrip("\ufeff \t\r\n")
    first_line = repr(text.split("\n")[0][:40])
    if text.startswith("version https://git-lfs"):
        return "a pointer of Git LFS; `git lfs pull` fetches the file itself"
    if "annex/objects/" in text and "\n" not in text.strip():
        return "a pointer of git-annex; `git annex get` fetches the file itself"
    if text.startswith("<"):
        return f"a web page, {first_line}; was the download refused?"
    readable = sum(byte in b"\t\r\n" or 32 <= byte < 127 for byte in start)
    if b"\0" not in start and readable > 0.9 * len(start):
        return f"text, {first_line}"
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it first (if a torch before 0.2 saved it: save it again)"
    for signature, words in SIGNATURES.items():
        if start.startswith(signature):
            return words
    return None


def _zip_instead(names):
    """What a zip archive is instead of torch.save's, by the names in it; None if it is torch.save's."""
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript archive, which is a program; save the state_dict() of torch.jit.load(...)"
    if not any(name.endswith("/data.pkl") for name in names):
        held = textwrap.shorten(", ".join(names), 80, placeholder=" ...")
        return f"a zip archive of other files, {held}; unpack it first"
    return None


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
