"""The stage cache: finished stages kept by what went into them.

A stage is a directory named by the SHA-256 of its inputs (content hashes, options, versions). It is
written beside its final name and renamed in one step, so that a killed build leaves no half stage.
A finished one is used as it is where nothing can be written, from any container and host.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd35_trt.errors import Sd35Error, UsageError

from .disk import CACHE, CLOSED, existing_parent
from .hashes import HashNotes
from .lock import exclusive, share
from .working import remove_abandoned, remove_directory, working_directory

#: In a finished stage, the sizes and hashes of its files.
STAGE_FILE = "stage.json"

#: What names of working directories in the cache begin with.
WORK_PREFIX = ".tmp-"

#: What names of the files begin with whose lock is held while a stage is made or deleted.
LOCK_PREFIX = ".lock-"

#: Folders below the cache that hold no stages: notes of hashes, and the work of comparisons.
HASHES, REFERENCES = "hashes", "references"

_VARIABLE = "SD35_TRT_CACHE"


def default_cache_dir(fix: str = f"set {_VARIABLE} to a folder for it") -> Path:
    """``$SD35_TRT_CACHE``, else ``sd35-trt`` below ``$XDG_CACHE_HOME`` or ``~/.cache``.

    Args:
        fix: what to do where there is no home directory.

    Raises:
        UsageError: none of them is there.
    """
    if explicit := os.environ.get(_VARIABLE):
        return Path(explicit)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "sd35-trt"
    try:
        return Path.home() / ".cache" / "sd35-trt"
    except RuntimeError as error:  # as in a container with any user's id
        raise UsageError("there is no home directory to keep the cache in", fix) from error


def cache_dir(given: Path | None) -> Path:
    """What ``--cache-dir`` names, else the default.

    Raises:
        UsageError: there is no default here.
    """
    return given or default_cache_dir(f"set {_VARIABLE}, or name a folder with --cache-dir")


def open_cache(given: Path | None) -> StageCache:
    """The cache of a command that makes stages, cleared of what processes that died left there.

    Args:
        given: what ``--cache-dir`` names; None takes the default.

    Raises:
        UsageError: there is no folder for it, and none can be made.
    """
    root = cache_dir(given)
    fix = f"set {_VARIABLE} to another folder, or {CACHE.way}"
    try:
        # What is in it may be all that is asked for, and is used as it is.
        if not (root.is_dir() and any(root.iterdir())):
            with tempfile.TemporaryFile(dir=existing_parent(root)):  # has no name
                pass
    except OSError as error:
        raise UsageError(f"the cache {root} cannot be used: {error.strerror}", fix) from error
    for folder in root.glob("*/"):
        if not folder.is_symlink():
            remove_abandoned(folder, WORK_PREFIX)
    return StageCache(root)


class StageCache:
    """Finished stages below one directory, safe to share between processes, containers and hosts.

    What :meth:`find` gave stays in the cache as long as this object is there.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashes = HashNotes(root / HASHES)
        self._used: set[Path] = set()
        self._held = contextlib.ExitStack()
        weakref.finalize(self, self._held.close)

    def __reduce__(self) -> tuple[type[StageCache], tuple[Path]]:
        """Another process has descriptors of its own."""
        return StageCache, (self.root,)

    @staticmethod
    def key(inputs: Mapping[str, Any]) -> str:
        """SHA-256 over a JSON-serializable description of everything a stage depends on."""
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def find(self, kind: str, key: str) -> Path | None:
        """Directory of a finished stage, or None; the time of its last use is that of now."""
        path = self.root / kind / key
        held = None if path in self._used else share(path / STAGE_FILE)
        if held is not None:
            self._held.callback(os.close, held)
        # Only now: nobody deletes it any more.
        if not path.is_dir():
            self._used.discard(path)
            return None
        if held is not None:
            self._used.add(path)
        with contextlib.suppress(OSError):  # another's, or on a disk that is only read
            os.utime(path)
        return path

    @contextlib.contextmanager
    def lock(self, kind: str, key: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Hold the lock of a stage while it is made; see :func:`sd35_trt.store.lock.exclusive`.

        Raises:
            Sd35Error: nothing can be written to the cache.
        """
        folder = self.root / kind
        with contextlib.ExitStack() as stack:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(exclusive(folder / f"{LOCK_PREFIX}{key}", waiting))
            except OSError as error:
                if error.errno not in CLOSED:
                    raise
                message = f"nothing can be written to the cache {self.root}: {error.strerror}"
                raise Sd35Error(message, f"make it writable, or {CACHE.way}") from error
            yield

    @contextlib.contextmanager
    def create(self, kind: str, key: str) -> Iterator[Path]:
        """A directory to write a stage in; it becomes ``find(kind, key)`` when the block ends.

        Nothing is kept when the block raises. When another process finished the same stage first,
        its result stands.
        """
        final = self.root / kind / key
        with working_directory(self.root / kind, WORK_PREFIX) as work:
            yield work
            try:
                work.rename(final)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
            self._hashes.renamed(work, final)

    def discard(self, kind: str, key: str) -> None:
        """Forget a stage, e.g. because one of its files was damaged.

        Raises:
            OSError: it cannot be deleted.
        """
        path = self.root / kind / key
        self._used.discard(path)
        with contextlib.suppress(FileNotFoundError):
            remove_directory(path, WORK_PREFIX)

    def file_hash(self, path: Path) -> str:
        """SHA-256 of a file, remembered as long as the file stays as it is.

        Raises:
            OSError: it cannot be read; names it.
        """
        return self._hashes.digest(path)

    def relinked(self, *folders: Path) -> contextlib.AbstractContextManager[None]:
        """While links to stages' files are made or removed; see :class:`.hashes.HashNotes`.

        Args:
            folders: the stages', and those that have links to their files.
        """
        return self._hashes.relinked(*folders)
