"""Locks between processes, of one host or of several: files that are locked by ``flock``.

The system frees a lock when its process dies, wherever that ran: a process id means nothing in
another container, or on another host.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# Seconds between two tries.
_PAUSE = 0.05

# File systems without such locks; there, two may do the same work, and one result is kept.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)

# A link in a lock's place is nobody's lock.
_FLAGS = os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


@contextlib.contextmanager
def exclusive(path: Path, waiting: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Hold a lock while the block runs; when its process dies, the lock is free.

    Args:
        path: of the lock's file, in an existing directory; it is there while the lock is held.
        waiting: called again and again while another holds it; what it raises ends the wait.

    Raises:
        OSError: the file cannot be made.
    """
    descriptor = _acquire(path, waiting)
    try:
        yield
    finally:
        # Before it is released, so that nobody holds a lock by a file that is gone from its path.
        path.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def unheld(path: Path) -> Iterator[bool]:
    """Whether nobody holds a lock of a file that is there; nobody gets one while the block runs.

    False where that cannot be shown: the file is gone, or another user's, or its file system has
    no locks.
    """
    descriptor = _take(path)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)


def share(path: Path) -> int | None:
    """Hold a lock of a file that others may hold as well, and that none holds alone meanwhile.

    Returns:
        A descriptor; closing it frees the lock. None where the file is gone or cannot be opened,
        or its file system has no locks.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | _FLAGS)
        except OSError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, path):
                return descriptor
        except OSError as error:
            os.close(descriptor)
            if error.errno in _UNSUPPORTED:
                return None
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _acquire(path: Path, waiting: Callable[[], None]) -> int:
    """Descriptor of the open file whose lock is held."""
    while True:
        # For writing, too: over NFS, only such a file can be locked for one alone.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
        try:
            while not _is_locked(descriptor):
                waiting()
                time.sleep(_PAUSE)
            # Whoever held it has removed the file.
            if _is_at(descriptor, path):
                return descriptor
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return descriptor
            os.close(descriptor)
            raise
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _take(path: Path) -> int | None:
    """As :func:`_acquire`, of a file that is there, at once or not at all."""
    try:
        descriptor = os.open(path, os.O_RDWR | _FLAGS)
    except OSError:
        return None
    taken = False
    with contextlib.suppress(OSError):
        taken = _is_locked(descriptor) and _is_at(descriptor, path)
    if taken:
        return descriptor
    os.close(descriptor)
    return None


def _is_locked(descriptor: int) -> bool:
    """Lock an open file, unless another holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that has this path now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
