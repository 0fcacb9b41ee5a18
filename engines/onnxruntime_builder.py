"""Engines for ONNX Runtime: the exported component itself, which it compiles when loading."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from sd35_trt.bundle import Ranges

from .builder import MODEL_FILE, WEIGHTS_FILE, BuiltEngine, ExportedComponent

ENGINE = "onnxruntime"


def _copy(source: Path, target: Path) -> None:
    """Copy in the kernel, sharing blocks where the file system can.

    No hard link, although that would be free: onnx refuses external data with more than one.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        left = os.fstat(reader.fileno()).st_size
        try:
            while left > 0 and (n := os.copy_file_range(reader.fileno(), writer.fileno(), left)):
                left -= n
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            shutil.copyfileobj(reader, writer)


def build_engine(
    component: ExportedComponent,
    out: Path,
    ranges: Ranges,
) -> BuiltEngine:
    """Put the component's ONNX file and its weights into ``out``."""
    files = (MODEL_FILE, WEIGHTS_FILE)
    for name in files:
        _copy(component.folder / name, out / name)
    return BuiltEngine(files)
