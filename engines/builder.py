"""What a builder is: it turns one exported ONNX component into engine files in the bundle."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sd35_trt.bundle import Port, Ranges

#: What the exporter calls its files.
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "weights.data"
DESCRIPTION_FILE = "component.json"


@dataclass(frozen=True)
class ExportedComponent:
    """A directory that :mod:`sd35_trt.export` wrote, and what it says of itself."""

    folder: Path
    name: str
    weight_bytes: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precisions: dict[str, int]
    fp32_places: dict[str, float]

    @classmethod
    def read(cls, folder: Path) -> ExportedComponent:
        """Read ``component.json``."""
        data = json.loads((folder / DESCRIPTION_FILE).read_text("utf-8"))

        def ports(key: str) -> tuple[Port, ...]:
            return tuple(Port(p["name"], p["dtype"], tuple(p["shape"])) for p in data[key])

        return cls(
            folder,
            data["name"],
            data["weight_bytes"],
            ports("inputs"),
            ports("outputs"),
            data["precisions"],
            data["fp32_places"],
        )


@dataclass(frozen=True)
class BuiltEngine:
    """Files of an engine relative to its folder, the one to open first."""

    files: tuple[str, ...]
    activation_bytes: int | None = None


class Builder(Protocol):
    """A module of this package with these two members."""

    #: Session kind that runs the engines.
    ENGINE: str

    def build_engine(
        self,
        component: ExportedComponent,
        out: Path,
        ranges: Ranges,
    ) -> BuiltEngine:
        """Write the engine's files into ``out``, an existing directory."""


_MODULES = {"onnxruntime": "sd35_trt.engines.onnxruntime_builder"}


def load_builder(name: str) -> Builder:
    """The builder module by its name in the target table."""
    module: Any = importlib.import_module(_MODULES[name])
    builder: Builder = module
    return builder
