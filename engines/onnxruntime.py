"""Engines for ONNX Runtime: the exported component itself, which it compiles when loading."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from sd35_trt.backends import BACKENDS
from sd35_trt.dimensions import Bounds
from sd35_trt.errors import UsageError
from sd35_trt.formats.reading import Option

from .builder import BuiltEngine, CompiledComponent, EngineOptions, ExportedComponent


def _copy(source: Path, target: Path) -> None:
    """Copy in the kernel, sharing blocks where the file system can.

    No hard link, although that would be free: onnx refuses external data with more than one.
    """
    with source.open("rb") as reader, target.open("wb") as writer:
        rest = os.fstat(reader.fileno()).st_size
        try:
            while rest > 0 and (n := os.copy_file_range(reader.fileno(), writer.fileno(), rest)):
                rest -= n
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            shutil.copyfileobj(reader, writer)


class OnnxRuntimeBuilder:
    """See :class:`sd35_trt.engines.builder.Builder`."""

    backend = BACKENDS["onnxruntime"]

    def versions(self) -> dict[str, str]:
        return {}

    def describe(self) -> dict[str, Option]:
        return {}

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> None:
        return None

    def place(self, engine: CompiledComponent, out: Path) -> BuiltEngine:
        """Put the component's ONNX file and its weights into ``out``."""
        files = self.backend.files
        for name in files:
            _copy(engine.folder / name, out / name)
        return BuiltEngine(files, engine.component.weight_bytes)


def create(name: str, capabilities: tuple[str, ...], options: EngineOptions) -> OnnxRuntimeBuilder:
    """See :func:`sd35_trt.engines.builder.load_builder`."""
    if options != EngineOptions():
        raise UsageError(
            "ONNX Runtime neither streams nor exchanges weights, nor tries kernels",
            "leave out --weight-streaming, --refit, --autotune and --optimization-level",
        )
    return OnnxRuntimeBuilder()
