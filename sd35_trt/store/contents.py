"""What a cache holds: finished stages, files of other kinds, notes, and work.

Only what is known to be the cache's is looked at; links are not followed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .cache import HASHES, LOCK_PREFIX, STAGE_FILE, WORK_PREFIX
from .working import working_directories

_KEY = re.compile(r"[0-9a-f]{64}")

#: Folders of files that are kept besides stages, each with what a name of its files ends in. They
#: are made by :mod:`sd35_trt.runtime.kept_files` and :mod:`sd35_trt.engines.timing_cache`.
FILES = {"kernels": ".bin", "optimized": ".onnx", "timings": ".timings"}
_LOCK = ".lock"

# Writing one takes a moment; one that is not finished after so long never is.
_PART_SECONDS = 3600


@dataclass(frozen=True)
class Entry:
    """Something that can be deleted by itself: a finished stage, or a file of :data:`FILES`.

    Attributes:
        kind: of the stage, or the folder's name.
        bytes: of its files.
        freed: bytes that its end frees: those of files that no bundle has a link to.
        used: when it was last used, in seconds since 1970.
    """

    kind: str
    path: Path
    bytes: int
    freed: int
    used: float

    @property
    def is_stage(self) -> bool:
        """Whether it is a stage."""
        return self.kind not in FILES


@dataclass(frozen=True)
class Contents:
    """What a cache holds.

    Attributes:
        entries: finished stages and files of :data:`FILES`.
        notes: how many notes of hashes there are, and their bytes.
        work: directories that are being written in, or were left behind; see
            :mod:`sd35_trt.store.working`.
        work_bytes: of all of these.
    """

    entries: tuple[Entry, ...]
    notes: tuple[int, int]
    work: tuple[Path, ...]
    work_bytes: int

    @property
    def bytes(self) -> int:
        """Of all of it."""
        return sum(entry.bytes for entry in self.entries) + self.notes[1] + self.work_bytes


def survey(root: Path) -> Contents:
    """Look at a cache, which may be missing.

    Raises:
        OSError: it cannot be read.
    """
    entries: list[Entry] = []
    work: list[Path] = []
    for folder in folders(root):
        if folder.name in FILES:
            entries += _kept_files(folder)
        elif folder.name != HASHES:
            entries += _stages(folder)
            work += working_directories(folder, WORK_PREFIX)
    sizes = [path.lstat().st_size for path in _regular(root / HASHES)]
    work_bytes = sum(measure(path)[0] for path in work)
    return Contents(tuple(entries), (len(sizes), sum(sizes)), tuple(work), work_bytes)


def folders(root: Path) -> list[Path]:
    """Folders of a cache: one for each kind."""
    if not root.exists():
        return []
    with os.scandir(root) as found:
        return sorted(root / e.name for e in found if e.is_dir(follow_symlinks=False))


def lock_files(root: Path) -> Iterator[Path]:
    """Files whose locks are held while something is made, or were when a process died."""
    for folder in folders(root):
        for path in _regular(folder):
            if path.name.startswith(LOCK_PREFIX) or (folder.name in FILES and path.suffix == _LOCK):
                yield path


def unfinished_files(root: Path) -> Iterator[Path]:
    """Parts of files of :data:`FILES` whose writer is gone."""
    for name, ending in FILES.items():
        for path in _regular(root / name):
            is_part = path.with_suffix("").suffix == ending
            if is_part and time.time() - path.lstat().st_mtime > _PART_SECONDS:
                yield path


def measure(path: Path) -> tuple[int, int]:
    """Bytes of a directory's files, and those that its end would free."""
    total = freed = 0
    for parent, _, names in os.walk(path):
        for name in names:
            try:
                status = Path(parent, name).lstat()
            except FileNotFoundError:  # it is being written in
                continue
            total += status.st_size
            freed += status.st_size if status.st_nlink == 1 else 0
    return total, freed


def _stages(folder: Path) -> Iterator[Entry]:
    with os.scandir(folder) as found:
        names = [
            entry.name
            for entry in found
            if _KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
        ]
    for name in sorted(names):
        path = folder / name
        try:
            if not (path / STAGE_FILE).is_file():
                continue
            yield Entry(folder.name, path, *measure(path), path.lstat().st_mtime)
        except FileNotFoundError:  # deleted meanwhile
            continue


def _kept_files(folder: Path) -> Iterator[Entry]:
    for path in _regular(folder):
        if path.suffix == FILES[folder.name]:
            status = path.lstat()
            yield Entry(folder.name, path, status.st_size, status.st_size, status.st_mtime)


def _regular(folder: Path) -> Iterable[Path]:
    """Regular files of a folder that may be missing, or another user's; of no link."""
    if folder.is_symlink() or not folder.is_dir() or not os.access(folder, os.R_OK | os.X_OK):
        return []
    with os.scandir(folder) as found:
        return sorted(folder / e.name for e in found if e.is_file(follow_symlinks=False))
