"""Engines for ONNX Runtime: the exported component itself, which it compiles when loading."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from sd35_trt.bundle import Ranges

from .builder import MODEL_FILE, WEIGHTS_FILE, BuiltEngine, ExportedComponent

ENGINE = "onnxruntime"


def link_or_copy(source: Path, target: Path) -> None:
    """Share the file's bytes where the file system allows it, copy them where it does not."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def build_engine(
    component: ExportedComponent,
    out: Path,
    ranges: Ranges,
) -> BuiltEngine:
    """Put the component's ONNX file and its weights into ``out``."""
    files = (MODEL_FILE, WEIGHTS_FILE)
    for name in files:
        link_or_copy(component.folder / name, out / name)
    return BuiltEngine(files)
