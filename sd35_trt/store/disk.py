"""What is said where a file cannot be read or written."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from sd35_trt.errors import Sd35Error

# There is no more room, or no more of it is allowed.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def file_errors(out: Path, advice: str) -> Iterator[None]:
    """Explain a file that cannot be read or written inside.

    Args:
        out: what is being made; it stands for a file that the error does not name.
        advice: what to do where there is no room, or no access.

    Raises:
        Sd35Error: names the file and what is the matter with it.
    """
    try:
        yield
    except OSError as error:
        path, reason = error.filename or out, error.strerror or error
        if error.errno in _FULL:
            free = shutil.disk_usage(existing_parent(out)).free
            message = f"cannot write {path}: {reason} ({free / 1e9:.1f} GB free there)"
        else:
            message = f"cannot use {path}: {reason}"
        raise Sd35Error(message, advice) from error


def existing_parent(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
