"""The stage cache: finished stages kept by what went into them.

A stage is a directory named by the SHA-256 of its inputs (content hashes, options, versions). It is
written beside its final name and renamed in one step, so that a killed build leaves no half stage.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd35_trt.formats.bundle import sha256_file

from .disk import written_in
from .lock import exclusive


def default_cache_dir() -> Path:
    """``$SD35_TRT_CACHE``, else ``sd35-trt`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    if explicit := os.environ.get("SD35_TRT_CACHE"):
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sd35-trt"


def process_alive(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def remove_abandoned(parent: Path, prefix: str) -> None:
    """Delete the working directories that killed processes left behind.

    Their names are ``prefix + pid + "-" + anything``, as :func:`working_directory` makes them.
    """
    for path in parent.glob(f"{prefix}*"):
        pid = path.name[len(prefix) :].split("-")[0]
        if pid.isdigit() and not process_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def working_directory(parent: Path, prefix: str) -> Iterator[Path]:
    """A directory to write in, deleted at the end unless it was renamed away."""
    parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(parent, prefix)
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}{os.getpid()}-", dir=parent))
    path.chmod(0o755)
    try:
        with written_in(path):
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


class StageCache:
    """Finished stages below one directory, safe to share between processes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._hashes = root / "hashes"

    @staticmethod
    def key(inputs: Mapping[str, Any]) -> str:
        """SHA-256 over a JSON-serializable description of everything a stage depends on."""
        return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()

    def find(self, kind: str, key: str) -> Path | None:
        """Directory of a finished stage, or None."""
        path = self.root / kind / key
        return path if path.is_dir() else None

    def lock(
        self, kind: str, key: str, waiting: Callable[[], None]
    ) -> contextlib.AbstractContextManager[None]:
        """What to hold while a stage is made; see :func:`sd35_trt.store.lock.exclusive`."""
        folder = self.root / kind
        folder.mkdir(parents=True, exist_ok=True)
        return exclusive(folder / f".lock-{key}", waiting)

    @contextlib.contextmanager
    def create(self, kind: str, key: str) -> Iterator[Path]:
        """A directory to write a stage in; it becomes ``find(kind, key)`` when the block ends.

        Nothing is kept when the block raises. When another process finished the same stage first,
        its result stands.
        """
        final = self.root / kind / key
        with working_directory(self.root / kind, ".tmp-") as work:
            yield work
            try:
                work.rename(final)
            except OSError:
                if not final.is_dir():
                    raise

    def discard(self, kind: str, key: str) -> None:
        """Forget a stage, e.g. because one of its files was damaged."""
        shutil.rmtree(self.root / kind / key, ignore_errors=True)

    def file_hash(self, path: Path) -> str:
        """SHA-256 of a file, remembered as long as the file's inode, size and times stay."""
        stat = path.stat()
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)
        memo = self._hashes / hashlib.sha256(repr(identity).encode()).hexdigest()
        try:
            digest = memo.read_text("ascii")
            if len(digest) == 64:
                return digest
        except (OSError, ValueError):
            digest = ""  # not hashed before, or the note of it is damaged
        digest = sha256_file(path)
        partial = memo.with_suffix(f".{os.getpid()}")
        # A cache that cannot be written, or is full, still has finished stages.
        with contextlib.suppress(OSError):
            self._hashes.mkdir(parents=True, exist_ok=True)
            try:
                partial.write_text(digest, "ascii")
                partial.replace(memo)
            finally:
                partial.unlink(missing_ok=True)
        return digest
