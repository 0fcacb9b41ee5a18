"""Kernels that an engine's library finished on the GPU at hand, kept for the next load."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
from pathlib import Path

from sd35_trt.formats.bundle import Component
from sd35_trt.store.cache import default_cache_dir

logger = logging.getLogger("sd35_trt")


def kernel_file(component: Component, gpu: str, version: str) -> Path:
    """Where the kernels of an engine are kept.

    Args:
        gpu: its name.
        version: of the library, and whatever else decides about kernels.
    """
    about = f"{component.files[0].sha256} {gpu} {version}"
    return (
        default_cache_dir() / "kernels" / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.bin"
    )


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


def read_kernels(path: Path) -> bytes:
    """What is kept; empty where there is nothing, or where it may be another's: it is code.

    The directory and the file are the user's own, are no links, and nobody else may write to them.
    """
    try:
        folder = _open_own_folder(path.parent)
    except FileNotFoundError:
        return b""
    except OSError as error:
        _warn(path.parent, error)
        return b""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(path.name, flags, dir_fd=folder), "rb") as stream:  # noqa: PTH123
            _check_own(os.fstat(stream.fileno()))
            return stream.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        _warn(path, error)
        return b""
    finally:
        os.close(folder)


def _warn(path: Path, error: OSError) -> None:
    logger.warning(
        "kernels in %s are not loaded (%s), and are compiled anew — make it yours alone: "
        "chown and chmod go-w",
        path, error.strerror or error,
    )  # fmt: skip


def write_kernels(path: Path, data: bytes) -> None:
    """Replace a file in one step; without it the next load is slower, no more."""
    part = f"{path.name}.{os.getpid()}"
    try:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        folder = _open_own_folder(path.parent)
    except OSError as error:
        logger.warning("kernels for this GPU cannot be kept in %s: %s", path.parent, error)
        return
    try:
        if data == read_kernels(path):
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(part, flags, 0o600, dir_fd=folder), "wb") as stream:  # noqa: PTH123
            stream.write(data)
        os.replace(part, path.name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        logger.warning("kernels for this GPU cannot be kept in %s: %s", path.parent, error)
        with contextlib.suppress(OSError):  # it may not have come to be
            os.unlink(part, dir_fd=folder)
    finally:
        os.close(folder)
