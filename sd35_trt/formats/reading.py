"""Reading files of ours that may be anybody's: bounded, typed, refused in one line.

JSON by msgspec: unknown fields are tolerated; NaN, infinities, other types and values out of bounds
are not.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from sd35_trt.errors import Sd35Error

T = TypeVar("T")

#: Whole numbers of bytes, pixels, steps, elements.
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]

#: Whole numbers from 1.
Positive = Annotated[int, Meta(ge=1, le=2**63 - 1)]

#: Names of components, ports, dimensions, layers, files of a checkpoint.
Name = Annotated[str, Meta(min_length=1, max_length=1024)]

#: What people wrote or read: commands, reasons, versions.
Text = Annotated[str, Meta(max_length=1 << 16)]

#: SHA-256 in hex.
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]

#: A path below the file's own folder, with ``/``.
RelativePath = Annotated[str, Meta(min_length=1, max_length=1024, pattern=r"\A[^\x00]+\Z")]

#: What builders say of themselves.
Option = str | int | float | bool | None | list[str]


def read_file(path: Path, limit: int) -> bytes:
    """A regular file's content.

    Args:
        limit: bytes; larger files are refused before they are read.

    Raises:
        FileNotFoundError, NotADirectoryError: nothing there.
        OSError: not readable, no regular file, or too large.
    """
    # A pipe would make the open wait for its other end.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:  # noqa: PTH123
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError("it is no regular file")
        if status.st_size > limit:
            raise OSError(f"it has {status.st_size:,} bytes, at most {limit:,} are read")
        return stream.read(limit)


def reason_of(error: Exception) -> str:
    """What went wrong: the system's words alone, where they are the system's."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def decode(data: bytes, kind: type[T], path: Path, error: type[Sd35Error], fix: str) -> T:
    """A value of a type from JSON.

    Args:
        path: of the file, for the message.
        error: what to raise.
        fix: what the user can do about it.

    Raises:
        Sd35Error: as ``error``; names the file, and the field as ``$.components[0].name``.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as reason:
        raise error(f"{path} lacks or misstates a field: {reason}", fix) from reason
    except (msgspec.DecodeError, ValueError, RecursionError) as reason:
        raise error(f"{path} cannot be read: {reason}", fix) from reason


def read_document(path: Path, kind: type[T], limit: int, error: type[Sd35Error], fix: str) -> T:
    """A value of a type from a JSON file; for the arguments, see :func:`read_file`, :func:`decode`.

    Raises:
        Sd35Error: as ``error``; the file is missing, not readable, or not as it was written.
    """
    try:
        data = read_file(path, limit)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason_of(reason)}", fix) from reason
    return decode(data, kind, path, error, fix)


def encode(value: object) -> bytes:
    """JSON for people too: indented, mappings in the order of their keys, UTF-8, a newline."""
    return msgspec.json.format(msgspec.json.encode(value, order="deterministic"), indent=1) + b"\n"


def check_format(
    version: int, readable: tuple[int, ...], path: Path, error: type[Sd35Error], fix: str
) -> None:
    """Refuse another version of a format.

    Raises:
        Sd35Error: as ``error``; names what to do about a newer one, and ``fix`` for an older one.
    """
    if version not in readable:
        versions = " and ".join(map(str, readable))
        raise error(
            f"{path} has format {version}, this version reads {versions}",
            "upgrade sd35-trt" if version > max(readable) else fix,
        )
