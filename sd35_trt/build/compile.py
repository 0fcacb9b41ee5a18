"""The fourth step of a build: engines of the components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from sd35_trt.dimensions import Bounds, dimension_bounds
from sd35_trt.engines.builder import Builder, CompiledComponent, ExportedComponent
from sd35_trt.planning.decide import Decision
from sd35_trt.planning.working_memory import estimated_memory
from sd35_trt.progress import Progress
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import run_stage

from .export import Export


def compile_model(
    decision: Decision, export: Export, builder: Builder, cache: StageCache, progress: Progress
) -> list[CompiledComponent]:
    """Compile every component, or take its engine from the cache.

    Raises:
        Sd35Error: a component does not compile.
    """
    ranges, defaults = decision.ranges(export.t5_tokens), decision.defaults(export.t5_tokens)
    engines = []
    for name, folder in export.components.items():
        component = ExportedComponent.read(folder)
        bounds = dimension_bounds(name, ranges, defaults, export.clip_tokens, decision.guided)
        engine = _engine(builder, component, bounds, cache, progress)
        if not builder.backend.reports_memory:
            memory = estimated_memory(
                name,
                builder.backend.name,
                decision.model.checkpoint,
                decision.policy,
                export.clip_tokens,
                decision.guided,
                {dimension: bound[2] for dimension, bound in engine.bounds.items()},
                cache,
            )
            engine = replace(
                engine,
                activation_bytes=memory.activation_bytes,
                allocated_bytes=memory.allocated_bytes,
            )
        engines.append(engine)
    return engines


def _engine(
    builder: Builder,
    component: ExportedComponent,
    bounds: Mapping[str, Bounds],
    cache: StageCache,
    progress: Progress,
) -> CompiledComponent:
    """Compile a component, where its builder does that before loading."""
    dynamic = {d: bounds[d] for port in component.inputs for d in port.dynamic}
    stage = builder.stage(component, dynamic)
    folder = run_stage(cache, stage, progress) if stage else component.folder
    return CompiledComponent(component, folder, dynamic)
