"""Deleting from a cache what is not used any more, beside builds that run."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from .cache import HASHES, STAGE_FILE, StageCache
from .contents import Contents, Entry, lock_files, measure, survey, unfinished_files
from .hashes import HashNotes
from .lock import unheld
from .working import remove_work


class _Busy(Exception):
    """Another process makes the stage, or deletes it."""


@dataclass
class Pruned:
    """What was deleted, or would be.

    Attributes:
        entries: stages, and files of other kinds, the longest unused first.
        work: directories that processes left behind when they died.
        work_bytes: of these.
        notes: how many notes of hashes, of files that are gone or have changed.
        note_bytes: of these.
        in_use: what is kept because a process uses it.
        failures: why something could not be deleted.
        left: bytes that are in the cache afterwards.
    """

    entries: list[Entry] = field(default_factory=list)
    work: list[Path] = field(default_factory=list)
    work_bytes: int = 0
    notes: int = 0
    note_bytes: int = 0
    in_use: list[Entry] = field(default_factory=list)
    failures: list[OSError] = field(default_factory=list)
    left: int = 0

    @property
    def bytes(self) -> int:
        """Of the entries."""
        return sum(entry.bytes for entry in self.entries)

    @property
    def freed(self) -> int:
        """Bytes of the entries that no bundle has a link to."""
        return sum(entry.freed for entry in self.entries)


def prune(
    root: Path, older: int | None = None, max_bytes: int | None = None, dry: bool = False
) -> Pruned:
    """Delete what was left behind, and what was not used for long.

    Args:
        older: seconds; what was not used for longer is deleted. None deletes nothing for its age.
        max_bytes: what was unused for longest is deleted until the cache has no more than these.
        dry: delete nothing, only say what would be.

    Raises:
        OSError: the cache cannot be read.
    """
    result, cache = Pruned(), StageCache(root)
    # First: on a full disk, the rest may take the room that it frees.
    _prune_work(survey(root), dry, result)
    _prune_notes(root, dry, result)
    contents = survey(root)
    result.left = contents.bytes - (result.work_bytes + result.note_bytes if dry else 0)
    for entry in sorted(contents.entries, key=lambda entry: entry.used):
        is_old = older is not None and time.time() - entry.used > older
        if is_old or (max_bytes is not None and result.left > max_bytes):
            _prune_entry(cache, entry, dry, result)
    return result


def _prune_work(contents: Contents, dry: bool, result: Pruned) -> None:
    for path in contents.work:
        size, _ = measure(path)
        if remove_work(path, dry):
            result.work.append(path)
            result.work_bytes += size


def _prune_notes(root: Path, dry: bool, result: Pruned) -> None:
    for path in HashNotes(root / HASHES).outdated():
        size = path.lstat().st_size
        if dry or _unlink(path, result):
            result.notes += 1
            result.note_bytes += size
    for path in lock_files(root):
        with unheld(path) as dead:
            if dead and not dry:
                _unlink(path, result)
    if not dry:
        for path in unfinished_files(root):
            _unlink(path, result)


def _prune_entry(cache: StageCache, entry: Entry, dry: bool, result: Pruned) -> None:
    if not entry.is_stage:
        deleted = dry or _unlink(entry.path, result)
    elif error := _refusal(entry):
        result.failures.append(error)
        return
    else:
        deleted = _remove_stage(cache, entry, dry, result)
    if deleted:
        result.entries.append(entry)
        result.left -= entry.bytes


def _refusal(entry: Entry) -> OSError | None:
    """Why a stage may not be deleted by this user; None where it may."""
    for path in (entry.path.parent, entry.path, entry.path / STAGE_FILE):
        if not os.access(path, os.W_OK):
            return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    return None


def _remove_stage(cache: StageCache, entry: Entry, dry: bool, result: Pruned) -> bool:
    """Delete a stage that no process makes or uses."""

    def busy() -> None:
        raise _Busy

    key = entry.path.name
    try:
        with cache.lock(entry.kind, key, busy), unheld(entry.path / STAGE_FILE) as unused:
            if not unused:
                result.in_use.append(entry)
            elif not dry:
                cache.discard(entry.kind, key)
            return unused
    except _Busy:
        result.in_use.append(entry)
    except OSError as error:
        result.failures.append(error)
    return False


def _unlink(path: Path, result: Pruned) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        result.failures.append(error)
        return False
    return True
