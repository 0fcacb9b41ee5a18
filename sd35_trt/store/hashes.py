"""Hashes of files, noted for the next time: a checkpoint or a stage has gigabytes.

A note holds for a file's path, device, inode, size, and the times of its last change and of the
last change of its inode, which no program sets as it likes: a file that is replaced or written to
has another, even if its size and time are copied with it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from sd35_trt.formats.bundle import sha256_file

logger = logging.getLogger("sd35_trt")

# A note by device and inode; one that is being written; one of an earlier version.
_NOTE = re.compile(r"[0-9a-f]+-[0-9a-f]+")
_PART = re.compile(_NOTE.pattern + r"\.\w+|[0-9a-f]{64}\.\d+")
_EARLIER = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

# Changes that lie so many ns apart have different times: a kernel's clock ticks every 1 to 10 ms.
_TICK = 20_000_000

# Seconds after which a note that is being written is one that never will be.
_PART_SECONDS = 3600


@dataclass(frozen=True)
class _Identity:
    """What tells a file from any other, and from itself before a change; times in ns."""

    path: str
    device: int
    inode: int
    bytes: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path) -> _Identity:
        """That of the file at a path.

        Raises:
            OSError: there is none.
        """
        status = path.stat()
        return cls(
            os.path.realpath(path),
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


class HashNotes:
    """Hashes of files, noted in a folder, and for the time of this process.

    Where the folder cannot be written to, files are hashed again the next time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[_Identity, str] = {}
        self._warned = False

    def digest(self, path: Path) -> str:
        """SHA-256 of a file in hex.

        Raises:
            OSError: it cannot be read; names it.
        """
        identity = _Identity.of(path)
        digest = self._known.get(identity) or self._noted(identity)
        if digest is None:
            try:
                digest = sha256_file(path)
            except OSError as error:
                if error.filename is None:
                    raise OSError(error.errno, error.strerror, str(path)) from error
                raise
            _settle(identity.changed)
            # What was written to meanwhile is hashed again.
            if _Identity.of(path) == identity:
                self._note(identity, digest)
        return digest

    @contextlib.contextmanager
    def relinked(self, *folders: Path) -> Iterator[None]:
        """Links to files are made or removed inside, and the files stay as they are.

        The system counts that as a change of the inode: what was noted is noted anew.

        Args:
            folders: those in which the files, or links to them, are.
        """
        known = [
            found for folder in folders for path in _files(folder) if (found := self._at(path))
        ]
        yield
        if known:
            _settle(time.time_ns())
        for before, digest in known:
            with contextlib.suppress(OSError):  # deleted meanwhile
                now = _Identity.of(Path(before.path))
                if now != before and replace(now, changed=before.changed) == before:
                    self._note(now, digest)

    def renamed(self, old: Path, new: Path) -> None:
        """A folder, whose files this object has hashed, has another name now."""
        before, now = (Path(os.path.realpath(path)) for path in (old, new))
        for identity, digest in list(self._known.items()):
            path = Path(identity.path)
            if path.is_relative_to(before):
                moved = replace(identity, path=str(now / path.relative_to(before)))
                with contextlib.suppress(OSError):  # another's stands there
                    if _Identity.of(Path(moved.path)) == moved:
                        self._note(moved, digest)

    def outdated(self) -> Iterator[Path]:
        """The notes of files that are gone or have changed, and what is no note any more."""
        try:
            paths = [] if self.folder.is_symlink() else sorted(self.folder.iterdir())
        except OSError:
            return
        for path in paths:
            if _NOTE.fullmatch(path.name):
                outdated = not self._holds(path)
            else:
                unfinished = _PART.fullmatch(path.name) and _age(path) > _PART_SECONDS
                outdated = bool(unfinished or _EARLIER.fullmatch(path.name))
            if outdated:
                yield path

    def _holds(self, path: Path) -> bool:
        """Whether a note is of a file as it is now, or it cannot be told."""
        note = _read(path)
        if note is None:
            return False
        try:
            return _Identity.of(Path(note[0].path)) == note[0]
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def _at(self, path: Path) -> tuple[_Identity, str] | None:
        """The note of a file or of a link to it, if it holds."""
        try:
            status = path.lstat()
            note = _read(self.folder / _name(status.st_dev, status.st_ino))
            return note if note and _Identity.of(Path(note[0].path)) == note[0] else None
        except OSError:
            return None

    def _noted(self, identity: _Identity) -> str | None:
        note = _read(self.folder / _name(identity.device, identity.inode))
        return note[1] if note is not None and note[0] == identity else None

    def _note(self, identity: _Identity, digest: str) -> None:
        self._known[identity] = digest
        path = self.folder / _name(identity.device, identity.inode)
        part = path.with_name(f"{path.name}.{secrets.token_hex(6)}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                part.write_text(json.dumps({**asdict(identity), "sha256": digest}), "ascii")
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            if not self._warned:
                logger.warning("hashes cannot be noted in %s: %s", self.folder, error.strerror)
            self._warned = True


def _name(device: int, inode: int) -> str:
    return f"{device:x}-{inode:x}"


def _read(path: Path) -> tuple[_Identity, str] | None:
    """What a note says; None where there is none, or it is damaged."""
    try:
        fields = json.loads(path.read_text("ascii"))
        digest = fields.pop("sha256")
        return (_Identity(**fields), digest) if _DIGEST.fullmatch(digest) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _settle(changed: int) -> None:
    """Wait until a change that is still to come has another time than one that was just made."""
    pause = changed + _TICK - time.time_ns()
    if 0 < pause <= _TICK:
        time.sleep(pause / 1e9)


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def _age(path: Path) -> float:
    """Seconds since a file was written."""
    try:
        return time.time() - path.lstat().st_mtime
    except OSError:
        return 0.0
