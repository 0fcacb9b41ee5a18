"""Kernels that an engine's library finished on the GPU at hand, kept for the next load."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Component
from sd35_trt.store.cache import default_cache_dir
from sd35_trt.store.own_files import keep_latest, read_own, write_own

logger = logging.getLogger("sd35_trt")

_WHAT = "kernels for this GPU"

# Of the files together: one is of a component, a GPU and a library version.
_MOST_FILES = 64
_MOST_BYTES = 4 << 30


def kernel_file(component: Component, gpu: str, version: str) -> Path | None:
    """Where the kernels of an engine are kept; None, with a warning, where there is no folder.

    Args:
        gpu: its name.
        version: of the library, and whatever else decides about kernels.
    """
    about = f"{component.files[0].sha256} {gpu} {version}"
    try:
        folder = default_cache_dir() / "kernels"
    except UsageError as error:
        logger.warning("%s are not kept, and made again at every load: %s", _WHAT, error)
        return None
    return folder / f"{hashlib.sha256(about.encode()).hexdigest()[:32]}.bin"


def read_kernels(path: Path | None) -> bytes:
    """What is kept; empty where there is nothing, or where it may be another's: it is code."""
    return b"" if path is None else read_own(path, _WHAT)


def write_kernels(path: Path | None, data: bytes) -> None:
    """Replace a file in one step; without it the next load is slower, no more."""
    if path is None:
        return
    write_own(path, data, _WHAT)
    keep_latest(path.parent, _MOST_FILES, _MOST_BYTES)
