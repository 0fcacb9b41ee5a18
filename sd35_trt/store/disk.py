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

# It may not be written.
_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Place:
    """A folder that files are written in.

    Attributes:
        title: what it is to users, with its article.
        way: how to do without it: "choose another --out".
    """

    title: str
    way: str


#: Of what this machine keeps for the time of a command.
TEMPORARY = Place("the folder for temporary files", "point TMPDIR to another disk")

#: The stage cache.
CACHE = Place("the cache", "choose another --cache-dir")


#: The same of commands without that option.
CACHE_BY_VARIABLE = Place("the cache", "set SD35_TRT_CACHE to another folder")


@contextlib.contextmanager
def written_in(folder: Path) -> Iterator[None]:
    """Give errors of a full disk the folder that was written in, where they name no file.

    Libraries that write have exceptions of their own; the system's words are in them.

    Raises:
        OSError: no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL and error.filename is None:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise
    except Exception as error:
        for number in _FULL:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise


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
        path = Path(os.fsdecode(error.filename or out)).absolute()
        around = [folder for folder in places if path.is_relative_to(folder.absolute())]
        deepest = max(around, key=lambda folder: len(folder.absolute().parts), default=None)
        place = places[deepest] if deepest is not None else Place("", way)
        shown = f"{error.filename or out}" + (f", in {place.title}" if place.title else "")
        reason = error.strerror or error
        if error.errno in _FULL:
            free = shutil.disk_usage(existing_parent(path)).free
            message = f"cannot write {shown}: {reason} ({free / 1e9:.1f} GB free there)"
            raise Sd35Error(message, f"free space, or {place.way}") from error
        closed = error.errno in _CLOSED
        advice = f"make it writable, or {place.way}" if closed else place.way
        raise Sd35Error(f"cannot use {shown}: {reason}", advice) from error


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
