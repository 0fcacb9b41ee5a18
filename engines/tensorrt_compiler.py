"""Compiling one component to a plan.

Networks are strongly typed: the precision of everything is what the exporter wrote. Sources: the
Python API references of TensorRT for RTX and of TensorRT 10 and 11
(docs.nvidia.com/deeplearning/tensorrt-rtx and .../tensorrt).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import Struct

from sd35_trt.backends import BACKENDS, Backend
from sd35_trt.compat.library import load_library
from sd35_trt.compat.tensorrt import logged_memory, make_builder, make_logger
from sd35_trt.compat.tensorrt_plan import read_header
from sd35_trt.dimensions import Bounds
from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.reading import Count, encode, read_document

from .builder import EngineOptions, ExportedComponent
from .tensorrt_callbacks import progress_monitor, write_plan
from .tensorrt_network import optimization_profile, parse_network
from .timing_cache import timing_cache

#: Beside a plan.
FACTS_FILE = "engine.json"

# Bytes of weights in a plan may differ from the exported ones by alignment and folded constants.
_TOLERANCE, _SLACK = 0.03, 1 << 20


def sm_name(capability: str) -> str:
    """The library's name of a compute capability: ``SM89`` of ``8.9``."""
    return "SM" + capability.replace(".", "")


class PlanFacts(Struct, frozen=True):
    """What the library said of a plan; what ``engine.json`` holds.

    Attributes:
        weight_bytes: bytes of weights in it.
        activation_bytes: working memory at the largest shapes; None where it is not reported.
    """

    weight_bytes: Count
    activation_bytes: Count | None

    def write(self, folder: Path) -> None:
        """Write ``engine.json``."""
        (folder / FACTS_FILE).write_bytes(encode(self))

    @classmethod
    def read(cls, folder: Path) -> PlanFacts:
        """Read ``engine.json``.

        Raises:
            BundleError: missing, or not as it was written.
        """
        fix = "delete it: the next build writes it again"
        return read_document(folder / FACTS_FILE, cls, 1 << 16, BundleError, fix)


# What a library that times kernels says where the GPU's memory does not suffice for that.
_NO_ROOM = re.compile("out of ?memory|could not find any implementation", re.IGNORECASE)


@dataclass(frozen=True)
class PlanJob:
    """One component to compile.

    Attributes:
        backend: name of the library's row.
        capabilities: compute capabilities to compile for.
        bounds: of the component's dynamic dimensions.
        out: an existing directory.
    """

    backend: str
    capabilities: tuple[str, ...]
    options: EngineOptions
    component: ExportedComponent
    bounds: Mapping[str, Bounds]
    out: Path


def compile_plan(job: PlanJob, progress: Callable[[float, str], None]) -> None:
    """Write the plan, and what the library said about it as :data:`FACTS_FILE`.

    Args:
        progress: called with a fraction and what is being done.

    Raises:
        Sd35Error: a node that the library does not take, or no plan; with its reasons.
        OSError: the disk is full or not writable.
    """
    backend = BACKENDS[job.backend]
    _PlanCompiler(backend, load_library(backend), job).compile(progress)


class _PlanCompiler:
    """Compiles one component.

    Args:
        library: the imported package, whose names the TensorRT API documents.
    """

    def __init__(self, backend: Backend, library: Any, job: PlanJob) -> None:
        self._backend = backend
        self._trt = library
        self._capabilities = job.capabilities
        self._options = job.options
        self._component = job.component
        self._bounds = job.bounds
        self._out = job.out
        self._title = f"{backend.title} {library.__version__}"

    def compile(self, progress: Callable[[float, str], None]) -> None:
        """See :func:`compile_plan`."""
        trt, component = self._trt, self._component
        progress(0.0, "parsing")
        log = make_logger(trt)
        memory: dict[str, int] = {}
        log.on_message = lambda message: memory.update(logged_memory(message))
        builder = make_builder(trt, self._title, log)
        builder.max_threads = len(os.sched_getaffinity(0))
        network, _parser = parse_network(trt, self._title, builder, component, log)
        config = builder.create_builder_config()
        self._configure(config)
        config.add_optimization_profile(optimization_profile(builder, component, self._bounds))
        monitor = progress_monitor(trt, progress)
        config.progress_monitor = monitor
        plan = self._out / self._backend.files[0]
        folder = self._options.timing if self._backend.times_kernels else None
        with timing_cache(trt, config, folder), plan.open("wb") as stream:
            size = write_plan(trt, builder, network, config, stream)
        if not size:
            reasons = log.reasons()
            raise Sd35Error(
                f"{self._title} cannot compile {component.name} for "
                f"{', '.join(self._capabilities)}: {reasons}",
                self._advice(reasons),
            )
        weight_bytes = memory.get("Weights", component.weight_bytes)
        if self._backend.crosses:
            weight_bytes = self._read_back(plan)
        PlanFacts(weight_bytes, memory.get("Activation")).write(self._out)

    def _advice(self, reasons: str) -> str:
        """What may help where there is no plan."""
        if self._backend.times_kernels and _NO_ROOM.search(reasons):
            return "free the GPU's memory, or build for less: --batch 1:1, a smaller --size"
        if self._options.refit and self._backend.crosses:
            return "build on the GPU itself, or leave out --refit"
        return "try another --policy, or report this with the command"

    def _configure(self, config: Any) -> None:
        trt = self._trt
        if self._backend.crosses:
            config.num_compute_capabilities = len(self._capabilities)
            for i, capability in enumerate(self._capabilities):
                config.set_compute_capability(
                    getattr(trt.ComputeCapability, sm_name(capability)), i
                )
        # What is FP32 has a reason: it is the reference, or would leave FP16's range.
        config.clear_flag(trt.BuilderFlag.TF32)
        # For `inspect --engines`: layers by type and precision, in a plan of the same size.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        level = self._options.level(self._backend, self._component.name)
        if level is not None:
            config.builder_optimization_level = level
        if self._options.weight_streaming:
            config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
        if self._options.refit:
            config.set_flag(trt.BuilderFlag.REFIT)

    def _read_back(self, plan: Path) -> int:
        """Bytes of weights in a plan whose header says what was asked for.

        Raises:
            Sd35Error: it is for other GPUs, or its weights are not as small as the policy's.
        """
        component = self._component
        header = read_header(plan)
        if header.compute_capabilities != tuple(sorted(self._capabilities, key=float)):
            raise Sd35Error(
                f"the plan of {component.name} is for compute capability "
                f"{', '.join(header.compute_capabilities)}, not {', '.join(self._capabilities)}",
                "report this with the command",
            )
        excess = header.weight_bytes - component.weight_bytes
        if excess > _TOLERANCE * component.weight_bytes + _SLACK:
            raise Sd35Error(
                f"the plan of {component.name} has {header.weight_bytes:,} bytes of weights, "
                f"the policy's are {component.weight_bytes:,}: {self._title} expanded them",
                "choose another --policy",
            )
        return header.weight_bytes
