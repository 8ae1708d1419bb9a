"""An index: what reading a whole data set would tell, in arrays, kept in one file beside it.

    eight digits of a checksum of all that follows, and a newline
    a line of JSON: {"stamp": what it was made of, "arrays": {name: [dtype, shape, first byte]}}
    the arrays

The file is mapped into memory. So processes share it, and what nobody looks at is not read.

A stamp holds whatever must be as it was: sizes and times of tables, times and numbers of entries of folders. An index
with another stamp is made anew, and so is one that cannot be read; a line on stderr says which. Where the folder cannot
be written to, the index is kept in ~/.cache/simipu/ ($XDG_CACHE_HOME), and if that cannot be either, in memory.
Several processes should not make one at once, though it would come out whole: let one ask first
(runtime.main_first).
"""

import hashlib
import json
import math
import mmap
import os
import sys
import zlib
from pathlib import Path

import numpy as np

from files import BadInput, writing

LAYOUT = 2  # of the files: those of another number are made anew
ALIGN = 64  # bytes
LONGEST = 2**20  # bytes of the first two lines
DIGITS = 9  # of the checksum, and its newline


class Stale(Exception):
    """An index of other files than these."""


def kept(path, stamp, make):
    """make() -> {name: array}, or what an earlier call has kept of it in the file `path`. -> {name: array}, not to be
    written to. stamp: plain values; the file is used if it has the same.
    """
    found = find(path, stamp)
    return keep(path, stamp, make()) if found is None else found


def find(path, stamp, fits=None):
    """The arrays that are kept in the file `path`, or elsewhere for it; None if there are none, or not of this stamp.

    fits(arrays): a last question, whether they are still of the same files.
    """
    said = []
    for place in (Path(path), elsewhere(path)):
        try:
            arrays = read(place, stamp)
            if fits is None or fits(arrays):
                return arrays
            said.append(f"{place}: made of other files than these; it is made anew")
        except FileNotFoundError:
            continue
        except Stale:
            said.append(f"{place}: made of other files than these; it is made anew")
        except Exception as e:  # a broken file is answered with half a dozen types
            said.append(f"{place}: not a readable index ({type(e).__name__}: {e}); it is made anew")
    for line in said:
        note(line)
    return None


def keep(path, stamp, arrays):
    """Write {name: array} to the file `path`, or elsewhere. -> the same, mapped; where that cannot be, as they are."""
    places, refused = (Path(path), elsewhere(path)), []
    for place in places:
        try:
            if place != places[0]:
                place.parent.mkdir(parents=True, exist_ok=True)
            write(place, stamp, arrays)
            return read(place, stamp)
        except (BadInput, OSError) as e:
            refused.append(str(e))
    note(f"{refused[0]}, nor into {places[1].parent}; every start will read all files again")
    return arrays


def elsewhere(path):
    """Where the index is kept if its own folder cannot be written to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    where = hashlib.sha256(os.fsencode(Path(path).absolute())).hexdigest()[:16]
    return cache / "simipu" / f"{where}.{Path(path).name}"


def read(path, stamp):
    """-> {name: array}, mapped. Raises Stale for another stamp, and anything for a broken file."""
    with open(path, "rb") as file:
        checksum, header = file.readline(LONGEST), file.readline(LONGEST)
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if len(checksum) != DIGITS or zlib.crc32(memoryview(content)[DIGITS:]) != int(checksum, 16):
        raise ValueError("its checksum is another")
    about = json.loads(header)
    if about["stamp"] != json.loads(json.dumps([LAYOUT, stamp])):
        raise Stale
    arrays = {}
    for name, (dtype, shape, first) in about["arrays"].items():
        flat = np.frombuffer(content, dtype, math.prod(shape), first)
        arrays[name] = flat.reshape(shape)
    return arrays


def write(path, stamp, arrays):
    """Raises BadInput where the disk does not let it."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    head = _header(stamp, arrays, 0)
    start = DIGITS + len(head) + 32 * len(arrays)  # room for the places, which the header names itself
    start += -start % ALIGN
    head = _header(stamp, arrays, start)
    parts = [head[:-1].ljust(start - DIGITS - 1) + b"\n"]
    for array in arrays.values():
        parts += [array.tobytes(), bytes(-array.nbytes % ALIGN)]
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    with writing(path) as temporary, open(temporary, "wb") as file:
        file.write(f"{checksum:08x}\n".encode())
        file.writelines(parts)


def _header(stamp, arrays, start):
    places = {}
    for name, array in arrays.items():
        places[name] = [array.dtype.str, array.shape, start]
        start += array.nbytes + -array.nbytes % ALIGN
    return json.dumps({"stamp": [LAYOUT, stamp], "arrays": places}).encode() + b"\n"


def of_folder(folder):
    """A folder as stamps have it: its time, and how many entries it has; 0 where there is none."""
    try:
        return os.stat(folder).st_mtime_ns, len(os.listdir(folder))
    except OSError:
        return 0, 0


def note(message):
    print(f"note: {message}", file=sys.stderr, flush=True)
