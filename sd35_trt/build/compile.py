"""The fourth step of a build: engines of the components."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sd35_trt.components import runs_every_step
from sd35_trt.dimensions import Bounds, dimension_bounds
from sd35_trt.engines.builder import Builder, CompiledComponent, ExportedComponent
from sd35_trt.planning.decide import Decision
from sd35_trt.planning.working_memory import estimated_activations
from sd35_trt.progress import Progress
from sd35_trt.store.cache import StageCache
from sd35_trt.targets import present_gpus

from .concurrency import count_jobs, run_stages
from .export import Export

# Memory of a compiler: so many times the weights, and what its libraries take.
_COPIES, _COMPILER_BYTES = 3, 2 << 30

# Of the GPU's memory, what a component may take beside others while its kernels are timed: in too
# little, TensorRT finds none for a convolution. It holds the tensors of the largest shapes, copies
# in other layouts, and workspaces; that is never more than so many times its inputs and outputs.
_SHARE, _TIMED_COPIES, _PORTS = 0.25, 3, 2000


def compile_model(
    decision: Decision,
    export: Export,
    builder: Builder,
    cache: StageCache,
    progress: Progress,
    jobs: int | None = None,
) -> list[CompiledComponent]:
    """Compile every component, or take its engine from the cache.

    Args:
        jobs: how many at the same time; None takes what the machine has room for.

    Raises:
        Sd35Error: a component does not compile.
    """
    ranges, defaults = decision.ranges(export.t5_tokens), decision.defaults(export.t5_tokens)
    components, limits, largest = [], {}, {}
    for name, folder in export.components.items():
        component = ExportedComponent.read(folder)
        bounds = dimension_bounds(
            name, ranges, defaults, export.clip_tokens, decision.guided, decision.features,
            builder.backend.least_rank,
        )  # fmt: skip
        components.append(component)
        largest[name] = {d: bound[-1] for d, bound in bounds.items()}
        limits[name] = {d: bounds[d] for port in component.inputs for d in port.dynamic}

    @functools.cache
    def activations(name: str) -> int:
        return estimated_activations(
            name,
            builder.backend.name,
            decision.model.checkpoint,
            decision.policy,
            export.clip_tokens,
            decision.guided,
            decision.features,
            {dimension: bound[2] for dimension, bound in limits[name].items()},
            cache,
        )

    alone: frozenset[str] = frozenset()
    if builder.backend.times_kernels:
        gpus, _ = present_gpus()
        room = min((gpu.memory_bytes for gpu in gpus), default=0)
        alone = compiled_alone(components, largest, activations, room)
    folders = _compile(components, limits, builder, alone, cache, progress, jobs)
    engines = [CompiledComponent(c, folders[c.name], limits[c.name]) for c in components]
    if builder.backend.reports_memory:
        return engines
    return [replace(e, activation_bytes=activations(e.component.name)) for e in engines]


def compiled_alone(
    components: Sequence[ExportedComponent],
    dims: Mapping[str, Mapping[str, int]],
    activations: Callable[[str], int],
    device_bytes: int,
) -> frozenset[str]:
    """What is compiled alone where kernels are timed: those of every step, and what takes much of
    the GPU's memory.

    Args:
        dims: of each component, its dynamic dimensions at their largest.
        activations: bytes of a component's working memory at these; takes seconds to find out.
        device_bytes: the GPU's memory.
    """
    room = _SHARE * device_bytes
    large = set()
    for component in components:
        ports = sum(
            math.prod(port.resolve(**dims[component.name])) * np.dtype(port.dtype).itemsize
            for port in (*component.inputs, *component.outputs)
        )
        if component.weight_bytes + _PORTS * ports <= room:
            continue
        if component.weight_bytes + _TIMED_COPIES * activations(component.name) > room:
            large.add(component.name)
    loop = (c.name for c in components if runs_every_step(c.name))
    return frozenset((*loop, *large))


def _compile(
    components: Sequence[ExportedComponent],
    bounds: Mapping[str, Mapping[str, Bounds]],
    builder: Builder,
    alone: Collection[str],
    cache: StageCache,
    progress: Progress,
    jobs: int | None,
) -> dict[str, Path]:
    """Folder of each component's engine by name, compiled where its builder does that before
    loading.

    Args:
        alone: components that are not compiled while others are.
    """
    stages = {c.name: stage for c in components if (stage := builder.stage(c, bounds[c.name]))}
    need = [
        _COPIES * c.weight_bytes + _COMPILER_BYTES
        for c in components
        if c.name in stages and c.name not in alone
    ]
    jobs = count_jobs(need, jobs) if builder.backend.compiles_apart else 1
    together = [stage for name, stage in stages.items() if name not in alone]
    folders = run_stages(cache, together, progress, jobs)
    folders |= run_stages(cache, [s for n, s in stages.items() if n in alone], progress, jobs=1)
    return {
        c.name: folders[stages[c.name].name] if c.name in stages else c.folder for c in components
    }
