"""Kernels that an engine's library finished on the GPU at hand, kept for the next load."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
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


def read_kernels(path: Path) -> bytes:
    """What is kept; empty where there is nothing."""
    try:
        return path.read_bytes()
    except OSError:  # none yet, or not ours to read: kernels are compiled again
        return b""


def write_kernels(path: Path, data: bytes) -> None:
    """Replace a file in one step; without it the next load is slower, no more."""
    if data == read_kernels(path):
        return
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        part.replace(path)
    except OSError as error:
        logger.warning("kernels for this GPU cannot be kept in %s: %s", path.parent, error)
        with contextlib.suppress(OSError):  # it may not have come to be
            part.unlink()
