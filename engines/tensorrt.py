"""Engines for NVIDIA GPUs: plans of TensorRT for RTX and of TensorRT, which have one API."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sd35_trt.backends import BACKENDS, Backend
from sd35_trt.compat.library import load_library
from sd35_trt.dimensions import Bounds
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.component import MODEL_FILE, WEIGHTS_FILE
from sd35_trt.formats.reading import Option
from sd35_trt.store.stages import Stage, stage_files

from .builder import (
    BuiltEngine,
    CompiledComponent,
    EngineOptions,
    ExportedComponent,
    link_or_copy,
)
from .child_process import run_in_child
from .tensorrt_compiler import PlanFacts, PlanJob, compile_plan, sm_name


def create(name: str, capabilities: tuple[str, ...], options: EngineOptions) -> TensorRTBuilder:
    """See :func:`sd35_trt.engines.builder.load_builder`."""
    backend = BACKENDS[name]
    if options.autotune:
        raise UsageError(
            f"{backend.title} tries kernels as it is",
            "use --optimization-level 5" if backend.times_kernels else "leave out --autotune",
        )
    if options.optimization_level is not None and not backend.times_kernels:
        raise UsageError(
            f"{backend.title} has no optimization levels", "leave out --optimization-level"
        )
    return TensorRTBuilder(backend, load_library(backend), capabilities, options)


class TensorRTBuilder:
    """See :class:`sd35_trt.engines.builder.Builder`.

    Args:
        backend: the row of the library.
        library: the imported package, whose names the TensorRT API documents.
        capabilities: compute capabilities to compile for.

    Raises:
        UsageError: the library cannot compile for them.
    """

    def __init__(
        self, backend: Backend, library: Any, capabilities: tuple[str, ...], options: EngineOptions
    ) -> None:
        self.backend = backend
        self._trt = library
        self._capabilities = capabilities
        self._options = options
        if self.backend.crosses:
            for capability in capabilities:
                if not hasattr(library.ComputeCapability, sm_name(capability)):
                    raise UsageError(
                        f"{self._title} does not compile for compute capability {capability}",
                        "see: sd35-trt gpus",
                    )

    @property
    def _title(self) -> str:
        return f"{self.backend.title} {self._trt.__version__}"

    def versions(self) -> dict[str, str]:
        return {self.backend.name: str(self._trt.__version__)}

    def describe(self) -> dict[str, Option]:
        described: dict[str, Option] = {
            "compute_capabilities": list(self._capabilities),
            "weight_streaming": self._options.weight_streaming,
            "refit": self._options.refit,
        }
        if self._options.optimization_level is not None:
            described["optimization_level"] = self._options.optimization_level
        return described

    def stage(self, component: ExportedComponent, bounds: Mapping[str, Bounds]) -> Stage:
        """See :class:`sd35_trt.engines.builder.Builder`."""
        files = stage_files(component.folder)
        inputs = {
            "builder": self.versions(),
            "files": {name: files[name].sha256 for name in (MODEL_FILE, WEIGHTS_FILE)},
            "bounds": bounds,
            **self.describe(),
        }
        level = self._options.level(self.backend, component.name)
        if level is not None:
            inputs["optimization_level"] = level

        def run(out: Path, progress: Callable[[float, str], None]) -> None:
            self._compile(component, bounds, out, progress)

        return Stage(f"{component.name}-plan", inputs, (__name__,), run)

    def _compile(
        self,
        component: ExportedComponent,
        bounds: Mapping[str, Bounds],
        out: Path,
        progress: Callable[[float, str], None],
    ) -> None:
        """See :func:`sd35_trt.engines.tensorrt_compiler.compile_plan`; in a child process."""
        name, capabilities = self.backend.name, self._capabilities
        job = PlanJob(name, capabilities, self._options, component, bounds, out)
        run_in_child(f"compiling {component.name}", compile_plan, job, progress)

    def place(self, engine: CompiledComponent, out: Path) -> BuiltEngine:
        """Link the plan into ``out``, or copy it where links do not reach."""
        (plan,) = self.backend.files
        link_or_copy(engine.folder / plan, out / plan)
        facts = PlanFacts.read(engine.folder)
        return BuiltEngine((plan,), facts.weight_bytes, facts.activation_bytes)

    def working_memory(
        self,
        component: ExportedComponent,
        bounds: Mapping[str, Bounds],
        out: Path,
        progress: Callable[[float, str], None],
    ) -> int:
        """Bytes of working memory at the largest shapes, by compiling the component.

        Args:
            out: an existing directory for the plan.

        Raises:
            Sd35Error: it does not compile, or the library reports no such figure.
        """
        self._compile(component, bounds, out, progress)
        activation_bytes = PlanFacts.read(out).activation_bytes
        if activation_bytes is None:
            raise Sd35Error(f"{self._title} reports no working memory", "leave out --exact")
        return activation_bytes
