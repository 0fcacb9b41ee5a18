"""Writing a directory beside its final name and renaming it in one step."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sd35_trt.errors import UsageError

from .disk import existing_parent
from .working import working_directory

# renameat2(2): swap two paths in one step, so that what is being replaced is never absent.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_destination(out: Path, marker: str, kind: str, fix: str = "choose another --out") -> None:
    """Refuse a destination that cannot become such a directory, before any work is done.

    Args:
        marker: the file by which an older one, which may be replaced, is known.
        kind: what it is called, e.g. ``bundle``.
        fix: what the user can do about it.

    Raises:
        UsageError: names the fix.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is a file or a link", fix)
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise UsageError(f"{out} is not empty and holds no {kind}", fix)
    parent = existing_parent(out.absolute().parent)
    try:
        with tempfile.TemporaryFile(dir=parent):  # has no name, so that a kill leaves nothing
            pass
    except OSError as error:
        raise UsageError(f"cannot write in {parent}: {error.strerror}", fix) from error


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    status: int = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return status == 0


@contextlib.contextmanager
def replacement(out: Path, marker: str) -> Iterator[Path]:
    """A directory to write in; it becomes ``out`` when the block ends.

    Nothing stays when the block raises; what was at ``out`` before then stays as it was.

    Args:
        marker: as for :func:`check_destination`.
    """
    out = out.absolute()
    with working_directory(out.parent, f".{out.name}.building-") as work:
        yield work
        if not out.exists():
            work.rename(out)
        elif _exchange(work, out):
            # Now the older one: without its marker, nothing half-deleted looks whole.
            (work / marker).unlink(missing_ok=True)
        else:
            old = work.with_name(work.name + ".replaced")
            out.rename(old)
            try:
                work.rename(out)
            except OSError:
                old.rename(out)
                raise
            shutil.rmtree(old, ignore_errors=True)


def write_directory(out: Path, marker: str, files: Mapping[str, bytes]) -> None:
    """Write a directory in one step; an older one there is replaced.

    Args:
        marker: as for :func:`check_destination`.
        files: contents by name.
    """
    with replacement(out, marker) as work:
        for name, content in files.items():
            (work / name).write_bytes(content)
