"""Files that may hold code, in a folder that nobody but the user can have written to."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
from pathlib import Path

logger = logging.getLogger("sd35_trt")


def read_own(path: Path, what: str) -> bytes:
    """A file's bytes; empty where there is none, or where it may be another's.

    The folder and the file are the user's own, are no links, and nobody else may write to them.

    Args:
        what: is in it, in the plural, for the warning.
    """
    try:
        folder = _open_own_folder(path.parent)
    except FileNotFoundError:
        return b""
    except OSError as error:
        _warn(path.parent, error, what)
        return b""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path.name, flags, dir_fd=folder), "rb") as stream:  # noqa: PTH123
            _check_own(os.fstat(stream.fileno()))
            with contextlib.suppress(OSError):  # of a file system that is read-only
                os.utime(stream.fileno())  # the latest stay longest
            return stream.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        _warn(path, error, what)
        return b""
    finally:
        os.close(folder)


def write_own(path: Path, data: bytes, what: str) -> None:
    """Replace a file in one step; where that fails, a warning says so.

    Args:
        what: is in it, in the plural, for the warning.
    """
    # By no process id: another container's process has the same one.
    part = f"{path.name}.{secrets.token_hex(6)}"
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        folder = _open_own_folder(path.parent)
    except OSError as error:
        logger.warning("%s cannot be kept in %s: %s", what, path.parent, error)
        return
    try:
        if data == read_own(path, what):
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(part, flags, 0o600, dir_fd=folder), "wb") as stream:  # noqa: PTH123
            stream.write(data)
        os.replace(part, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        logger.warning("%s cannot be kept in %s: %s", what, path.parent, error)
        with contextlib.suppress(OSError):  # it may not have come to be
            os.unlink(part, dir_fd=folder)
    finally:
        os.close(folder)


def keep_latest(folder: Path, count: int, nbytes: int) -> None:
    """Delete what was not used for longest of the user's own files in a folder, until there are at
    most so many, of together so many bytes.

    What cannot be deleted stays: the folder may be another's, as :func:`write_own` says.
    """
    with contextlib.ExitStack() as opened, contextlib.suppress(OSError):
        descriptor = _open_own_folder(folder)
        opened.callback(os.close, descriptor)
        files = {}
        for name in os.listdir(descriptor):  # noqa: PTH208
            with contextlib.suppress(FileNotFoundError):  # another process has replaced it
                status = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode):
                    files[name] = status
        total = 0
        newest = sorted(files, key=lambda name: files[name].st_mtime_ns, reverse=True)
        for place, name in enumerate(newest, 1):
            total += files[name].st_size
            if place > count or total > nbytes:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=descriptor)


def _open_own_folder(folder: Path) -> int:
    """A descriptor of a directory that nobody but the user can have written to.

    Raises:
        OSError: there is none.
        PermissionError: it is another's, or others may write to it.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check_own(os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check_own(status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError("others may have written to it")


def _warn(path: Path, error: OSError, what: str) -> None:
    logger.warning(
        "%s in %s are not loaded (%s), and are made anew — make it yours alone: "
        "chown and chmod go-w",
        what, path, error.strerror or error,
    )  # fmt: skip
