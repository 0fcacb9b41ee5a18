"""Kernels that an engine's library finished on the GPU at hand, kept for the next load."""

from __future__ import annotations

from pathlib import Path

from sd35_trt.formats.bundle import Component

from .kept_files import KeptFiles

#: One file is of a component, a GPU and a library version. They are code.
KERNELS = KeptFiles("kernels", ".bin", "kernels for this GPU", 64, 4 << 30)


def kernel_file(component: Component, gpu: str, version: str) -> Path | None:
    """Where the kernels of an engine are kept; None, with a warning, where there is no folder.

    Args:
        gpu: its name.
        version: of the library, and whatever else decides about kernels.
    """
    return KERNELS.file(component.files[0].sha256, gpu, version)
