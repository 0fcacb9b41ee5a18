"""What is said where a file cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.errors import Sd35Error

# There is no more room, or no more of it is allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# A disk on which more bytes are free is not full.
_ROOM = 1 << 20

#: It may not be written.
CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Place:
    """A folder that files are written in.

    Attributes:
        title: what it is to users, with its article.
        way: how to do without it: "choose another --out".
        room: how to make room in it.
    """

    title: str
    way: str
    room: str = "free space"


#: Of what this machine keeps for the time of a command.
TEMPORARY = Place("the folder for temporary files", "point TMPDIR to another disk")

#: The stage cache.
CACHE = Place("the cache", "choose another --cache-dir", "free space with sd35-trt cache prune")


@contextlib.contextmanager
def written_in(folder: Path) -> Iterator[None]:
    """Give errors of a full disk the folder that was written in, where they name no file.

    That is the folder for temporary files where its disk is the one that is full. Libraries that
    write have exceptions of their own; the system's words are in them.

    Raises:
        OSError: no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            raise _no_room(error.errno, folder) from error
        raise
    except Exception as error:
        for number in _FULL:
            if os.strerror(number) in str(error):
                raise _no_room(number, folder) from error
        raise


def _no_room(number: int, folder: Path) -> OSError:
    """An error that names the folder, or that for temporary files where that one is full."""
    temporary, free = Path(tempfile.gettempdir()), _free_bytes(folder)
    # A temporary file may be gone by now; what was written in the folder is there still.
    if number == errno.ENOSPC and free > _ROOM and _free_bytes(temporary) < free:
        folder = temporary
    return OSError(number, os.strerror(number), str(folder))


@contextlib.contextmanager
def file_errors(out: Path, way: str, others: Mapping[Path, Place] | None = None) -> Iterator[None]:
    """Explain a file that cannot be read or written inside.

    Args:
        out: what is being made; it stands for a file that the error does not name.
        way: what to do where there is no room for it, or no access to it, besides making some.
        others: folders that are written in besides.

    Raises:
        Sd35Error: names the file, what is the matter with it, and which of the folders it is in.
    """
    try:
        yield
    except OSError as error:
        places = {
            Path(tempfile.gettempdir()): TEMPORARY,
            **(others or {}),
            out.absolute().parent: Place("", way),
        }
        raise _explain(error, out, places) from error


def _explain(error: OSError, out: Path, places: Mapping[Path, Place]) -> Sd35Error:
    full, closed = error.errno in _FULL, error.errno in CLOSED
    named = error.filename
    if full and error.filename2 is not None:  # what was copied or linked has room
        named = error.filename2
    shown = os.fsdecode(named) if isinstance(named, (str, bytes, os.PathLike)) else str(out)
    path = Path(shown).absolute()
    around = [folder for folder in places if path.is_relative_to(folder.absolute())]
    deepest = max(around, key=lambda folder: len(folder.absolute().parts), default=None)
    place = None if deepest is None else places[deepest]
    if place is not None and place.title:
        shown += f", in {place.title}"
    reason, ways = error.strerror or error, [] if place is None else [place.way]
    if full:
        message = f"cannot write {shown}: {reason} ({_free_bytes(path) / 1e9:.1f} GB free there)"
        ways.insert(0, "free space" if place is None else place.room)
    else:
        message = f"cannot use {shown}: {reason}"
        if error.errno == errno.EROFS:
            ways.insert(0, "make it writable")
        elif closed:
            ways.insert(0, "change its permissions")
        elif place is None:
            ways.insert(0, "see that it can be read, and try again")
    return Sd35Error(message, ", or ".join(ways))


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    path = path.absolute()
    while not os.access(path, os.F_OK) and path != path.parent:
        path = path.parent
    return path


def _free_bytes(path: Path) -> int:
    """Of the disk that a path is on, or will be."""
    return shutil.disk_usage(existing_parent(path)).free
