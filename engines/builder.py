"""What a builder is: it turns one exported component into engine files in the bundle."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sd35_trt.backends import BACKENDS, Backend, resolve
from sd35_trt.dimensions import Bounds
from sd35_trt.formats.bundle import AdapterGroup, Port
from sd35_trt.formats.component import read_component
from sd35_trt.formats.reading import Option
from sd35_trt.store.stages import Stage


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
    largest_layer_bytes: int
    allocated_bytes: int
    adapters: tuple[AdapterGroup, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> ExportedComponent:
        """Read ``component.json``.

        Raises:
            BundleError: see :func:`sd35_trt.formats.component.read_component`.
        """
        facts = read_component(folder)
        return cls(
            folder,
            facts.name,
            facts.weight_bytes,
            facts.inputs,
            facts.outputs,
            facts.precisions,
            facts.fp32_places,
            facts.largest_layer_bytes,
            facts.allocated_bytes,
            facts.adapters,
        )


@dataclass(frozen=True)
class EngineOptions:
    """What a user may ask of a builder.

    Attributes:
        weight_streaming: the engine can keep part of its weights in the host's memory.
        refit: the weights of the engine can be exchanged without building it again.
        autotune: try more kernels for each product, which takes minutes.
        optimization_level: how much a library that times kernels tries, 0 to 5; None leaves it to
            the component, see :meth:`level`.
        timing: folder of what such a library measured; None keeps nothing.
    """

    weight_streaming: bool = False
    refit: bool = False
    autotune: bool = False
    optimization_level: int | None = None
    timing: Path | None = field(default=None, compare=False)

    def level(self, backend: Backend, component: str) -> int | None:
        """The optimization level of a component; None is the library's default."""
        asked = self.optimization_level
        return backend.levels.get(component) if asked is None else asked


@dataclass(frozen=True)
class CompiledComponent:
    """A compiled component.

    Attributes:
        folder: of the stage that compiled it; where there is none, the component's own.
        bounds: of the dynamic dimensions of its inputs.
        activation_bytes: working memory at the largest shapes, where its builder does not say.
    """

    component: ExportedComponent
    folder: Path
    bounds: Mapping[str, Bounds]
    activation_bytes: int | None = None


@dataclass(frozen=True)
class BuiltEngine:
    """An engine in the bundle.

    Attributes:
        files: relative to its folder, the one to open first.
        weight_bytes: bytes of its weights.
        activation_bytes: working memory at the largest shapes, where the builder reports it.
    """

    files: tuple[str, ...]
    weight_bytes: int
    activation_bytes: int | None = None


class Builder(Protocol):
    """One way to make engines, for one target."""

    #: The kind of its engines.
    backend: Backend

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that compile."""

    def describe(self) -> dict[str, Option]:
        """What the engines are built for, and options, for the manifest."""

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> Stage | None:
        """The stage that compiles a component, or None where the exported files are the engine.

        Args:
            component: a finished stage of the exporter.
            bounds: of its dynamic dimensions; see :mod:`sd35_trt.dimensions`.
        """

    def place(self, engine: CompiledComponent, out: Path) -> BuiltEngine:
        """Put an engine's files into ``out``, an existing directory."""


# Another file system, one without links, too many links, or somebody else's file.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


def link_or_copy(source: Path, target: Path) -> None:
    """Link a stage's file, or copy it where links do not reach."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        shutil.copyfile(source, target)


def load_builder(
    name: str, capabilities: tuple[str, ...] = (), options: EngineOptions | None = None
) -> Builder:
    """A builder of a kind of engine.

    Args:
        name: a key of :data:`sd35_trt.backends.BACKENDS`.
        capabilities: CUDA compute capabilities to compile for, ``"8.9"``; none for the CPU.

    Raises:
        UsageError: an option that it does not have.
        Sd35Error: its library is not installed, or cannot compile for these.
    """
    create = resolve(BACKENDS[name].builder)
    builder: Builder = create(name, capabilities, options or EngineOptions())
    return builder
