"""Kernels that an engine's library finished on the GPU at hand, kept for the next load."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sd35_trt.formats.bundle import Component
from sd35_trt.store.cache import default_cache_dir
from sd35_trt.store.own_files import keep_latest, read_own, write_own

_WHAT = "kernels for this GPU"

# Of the files together: one is of a component, a GPU and a library version.
_MOST_FILES = 64
_MOST_BYTES = 4 << 30


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
    """What is kept; empty where there is nothing, or where it may be another's: it is code."""
    return read_own(path, _WHAT)


def write_kernels(path: Path, data: bytes) -> None:
    """Replace a file in one step; without it the next load is slower, no more."""
    write_own(path, data, _WHAT)
    keep_latest(path.parent, _MOST_FILES, _MOST_BYTES)
