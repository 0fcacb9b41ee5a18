"""The fourth step of a build: engines of the components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from sd35_trt.components import COMPILED
from sd35_trt.dimensions import Bounds, dimension_bounds
from sd35_trt.engines.builder import Builder, CompiledComponent, ExportedComponent
from sd35_trt.planning.decide import Decision
from sd35_trt.planning.working_memory import estimated_activations
from sd35_trt.progress import Progress
from sd35_trt.store.cache import StageCache

from .concurrency import count_jobs, run_stages
from .export import Export

# Memory of a compiler: so many times the weights, and what its libraries take.
_COPIES, _COMPILER_BYTES = 3, 2 << 30


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
    components, limits = [], {}
    for name, folder in export.components.items():
        component = ExportedComponent.read(folder)
        bounds = dimension_bounds(name, ranges, defaults, export.clip_tokens, decision.guided)
        components.append(component)
        limits[name] = {d: bounds[d] for port in component.inputs for d in port.dynamic}
    folders = _compile(components, limits, builder, cache, progress, jobs)
    engines = []
    for component in components:
        name = component.name
        engine = CompiledComponent(component, folders[name], limits[name])
        if not builder.backend.reports_memory:
            activations = estimated_activations(
                name,
                builder.backend.name,
                decision.model.checkpoint,
                decision.policy,
                export.clip_tokens,
                decision.guided,
                {dimension: bound[2] for dimension, bound in engine.bounds.items()},
                cache,
            )
            engine = replace(engine, activation_bytes=activations)
        engines.append(engine)
    return engines


def _compile(
    components: Sequence[ExportedComponent],
    bounds: Mapping[str, Mapping[str, Bounds]],
    builder: Builder,
    cache: StageCache,
    progress: Progress,
    jobs: int | None,
) -> dict[str, Path]:
    """Folder of each component's engine by name, compiled where its builder does that before
    loading.

    Where kernels are timed, those of every step are timed alone.
    """
    stages = {c.name: stage for c in components if (stage := builder.stage(c, bounds[c.name]))}
    alone = COMPILED if builder.backend.times_kernels else ()
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
