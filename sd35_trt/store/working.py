"""Directories that processes write in before they give them their final name.

Beside each lies its lock's file, ``NAME.lock``. It is there and locked before the directory is, and
goes after it, so that a directory whose lock is free is that of a process that died, in whatever
container, on whatever host.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from .disk import written_in
from .lock import exclusive, unheld

# The name of a directory: the prefix, this, and anything.
_WORK = "work-"
_LOCK = ".lock"

# What stands behind the prefix: earlier versions put the process's id there.
_NAME = re.compile(r"(?:\d+|work)-\w+")

# What has no lock's file is of an earlier version, or somebody deleted the file. It counts as left
# behind where nothing changed in it for so long.
_IDLE_SECONDS = 24 * 3600


@contextlib.contextmanager
def working_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory to write in, deleted at the end unless it was renamed away.

    What processes that died left behind in ``parent`` is deleted first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, prefix)
    path = _new(parent, prefix)
    with exclusive(_lock_of(path)):
        path.mkdir()
        try:
            with written_in(path):
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


def remove_directory(path: Path, prefix: str) -> None:
    """Delete a directory, in one step for those who look for it.

    It takes no room on a full disk.

    Args:
        prefix: of the name that it has while it is deleted, as of :func:`working_directory`.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be deleted.
    """
    gone = _new(path.parent, prefix)
    with exclusive(_lock_of(gone)):
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Delete the working directories whose locks are free."""
    for path in working_directories(parent, prefix):
        with unheld(_lock_of(path)) as dead:
            if dead:
                _remove(path)


def remove_work(path: Path, dry: bool = False) -> bool:
    """Delete a working directory if it was left behind.

    Args:
        path: one of :func:`working_directories`.
        dry: only say whether it would be.

    Returns:
        Whether it was left behind; one without a lock's file is where it did not change for a day.
    """
    lock = _lock_of(path)
    with unheld(lock) as dead:
        abandoned = dead or (not os.path.lexists(lock) and _is_idle(path))
        if abandoned and not dry:
            _remove(path)
        return abandoned


def working_directories(parent: Path, prefix: str) -> list[Path]:
    """The working directories in a folder, those of earlier versions too; no links."""
    found = set()
    try:
        with os.scandir(parent) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_LOCK)
                own = name.removeprefix(prefix)
                if own == name or not _NAME.fullmatch(own):
                    continue
                is_lock = name != entry.name and entry.is_file(follow_symlinks=False)
                if is_lock or entry.is_dir(follow_symlinks=False):
                    found.add(parent / name)
    except OSError:  # it may be written to, not read: whoever may read it clears it
        return []
    return sorted(found)


def _new(parent: Path, prefix: str) -> Path:
    return parent / f"{prefix}{_WORK}{secrets.token_hex(6)}"


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + _LOCK)


def _remove(path: Path) -> None:
    """Delete a directory, and its lock's file last."""
    shutil.rmtree(path, ignore_errors=True)
    with contextlib.suppress(OSError):  # another's, in a folder where each deletes his own
        _lock_of(path).unlink()


def _is_idle(path: Path) -> bool:
    """Whether nothing in a directory changed for a day."""
    latest = 0.0
    try:
        latest = path.lstat().st_mtime
        for folder, _, names in os.walk(path):
            paths = (Path(folder), *(Path(folder, name) for name in names))
            latest = max(latest, *(file.lstat().st_mtime for file in paths))
    except OSError:  # it goes just now
        return False
    return time.time() - latest > _IDLE_SECONDS
