"""Traced graphs, kept in the stage cache: models that differ in their weights alone share them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from sd35_trt.compat.torch import unset_fake_temporarily
from sd35_trt.dialects import Dialect
from sd35_trt.formats.program import PROGRAM_FILE, Program, read_program
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage

from .ports import ComponentModule

_MODEL = "graph.onnx"

# What decides about a graph.
_CODE = ("sd35_trt.export.component", "sd35_trt.export.weightless")

# Of a configuration, who saved it, and how: of no effect on what is built from it.
_ABOUT_THE_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version")


@dataclass(frozen=True)
class GraphCache:
    """Traces what is not in the cache yet. Use it inside ``FakeTensorMode``.

    Attributes:
        cache: where the graphs are.
        config: of the part.
        inputs: what else a graph depends on besides code and the modules' own structure:
            versions, policy, options and scales, as in the component's stage.
    """

    cache: StageCache
    config: Mapping[str, Any]
    inputs: Mapping[str, Any]

    def model(self, name: str, module: ComponentModule, dialect: Dialect) -> ir.Model:
        """The graph of :meth:`ComponentModule.trace`."""

        def run(out: Path) -> None:
            model = module.trace(dialect)
            with unset_fake_temporarily():
                ir.save(model, out / _MODEL)

        return ir.load(self._folder(name, module, run) / _MODEL)

    def program(self, name: str, module: ComponentModule) -> Program:
        """What :meth:`ComponentModule.program` gives."""

        def run(out: Path) -> None:
            (out / PROGRAM_FILE).write_text(module.program().to_json(), "utf-8")

        return read_program(self._folder(name, module, run) / PROGRAM_FILE)

    def _folder(self, name: str, module: ComponentModule, run: Callable[[Path], None]) -> Path:
        config = {
            key: value
            for key, value in self.config.items()
            if not key.startswith("_") and key not in _ABOUT_THE_FILE
        }
        own = {"component": name, "config": config, "structure": _structure(module)}
        inputs = {**self.inputs, **own}
        stage = Stage(f"{name}-graph", inputs, _CODE, lambda out, progress: run(out))
        return run_stage(self.cache, stage, lambda *_: None)


def _structure(module: ComponentModule) -> str:
    """Digest of a module's layers and parameters: some depend on a checkpoint's weights."""
    parameters = [
        f"{name} {tuple(parameter.shape)} {parameter.dtype}"
        for name, parameter in module.named_parameters()
    ]
    return hashlib.sha256("\n".join([repr(module), *parameters]).encode()).hexdigest()
