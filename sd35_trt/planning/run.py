"""Whether a model fits a GPU and how, before anything is built.

Weights follow the policy layer by layer. Activations are estimated, see
:mod:`sd35_trt.export.sizes`, or asked of the compiler, see
:mod:`sd35_trt.planning.working_memory`. Loading is estimated from the bus of the GPU and a disk, at
rates that copies reach in practice.

Activations are those of engines whose largest shapes are the ones asked for. An engine for a wider
range takes what its own largest shapes need, unless the runtime sizes its memory for the shapes at
hand; its manifest holds the former.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sd35_trt.checkpoints.look import look_at_structure
from sd35_trt.compat.requirement import requirement
from sd35_trt.components import BRANCH_DENOISER, COMBINE, SHORT_DENOISER
from sd35_trt.errors import UsageError
from sd35_trt.progress import Progress, silent
from sd35_trt.residency import Residency, plan_residency
from sd35_trt.store.cache import open_cache
from sd35_trt.targets import Target, find_target

from .decide import (
    check_split_guidance,
    decide_features,
    decide_guidance,
    decide_model_features,
    decide_policy,
)
from .footprints import footprints, reserve
from .options import PlanOptions
from .plan import Plan
from .sizes import component_shapes, measure, picture_bounds
from .working_memory import check_exact, compiled_activations

if TYPE_CHECKING:
    from sd35_trt.export.sizes import Sizes


def plan(options: PlanOptions, progress: Progress = silent) -> Plan:
    """Plan a model on a target.

    Args:
        progress: of asking the compiler, by component.

    Raises:
        Sd35Error: explained in one line.
    """
    target = find_target(options.target)
    policy = decide_policy(target, options.policy)
    if options.exact:
        check_exact(target)
    if options.batch < 1:
        raise UsageError(f"--batch {options.batch} draws nothing", "use 1 or more")
    with requirement("planning", "build"):
        model = look_at_structure(options)
        guided = decide_guidance(model.variant, options.guidance)
        size = options.size or model.variant.size
        model.sizes.check(*size)
        features = decide_features(
            short_steps=options.short_steps, split_guidance=options.split_guidance
        )
        if features.split_guidance:
            check_split_guidance(features, guided)
        features = decide_model_features(model, features)
        sizes = measure(model, policy, size, options.batch, guided, features)
        if options.exact:
            cache = open_cache(options.cache_dir)
            shapes = component_shapes(model, size, options.batch, guided, features)
            for name, form, dims in shapes:
                bounds = picture_bounds(dims, guided)
                bytes_reported = compiled_activations(
                    name, model.checkpoint, policy, form, bounds, target, cache, progress
                )
                sizes[name] = replace(sizes[name], compiled=bytes_reported)
    budget = target.memory_bytes if options.vram is None else options.vram
    second = {name: sizes[name] for name in (BRANCH_DENOISER, COMBINE) if name in sizes}
    if second:
        sizes = {n: size for n, size in sizes.items() if n not in ("denoiser", SHORT_DENOISER)}
    residency, least = _residency(sizes, model.variant.steps, target, budget)
    result = Plan(
        model=model.name,
        variant=model.variant.name,
        target=target,
        policy=policy.name,
        size=size,
        batch=options.batch,
        steps=model.variant.steps,
        guided=guided,
        components=sizes,
        residency=residency,
        budget=budget,
        least_bytes=least,
    )
    if not second:
        return result
    theirs, least = _residency(second, model.variant.steps, target, budget)
    other = replace(result, components=second, residency=theirs, least_bytes=least)
    return replace(result, second=other)


def replan(other: Plan, target: Target, vram: int | None = None) -> Plan:
    """The same model and policy on another GPU; nothing is measured again.

    What the compiler reported counts for the GPUs that it compiled for; for others, the estimate.

    Args:
        vram: bytes of device memory to stay within; None takes the target's.
    """
    budget = target.memory_bytes if vram is None else vram
    sizes = dict(other.components)
    if target.builders != other.target.builders:
        sizes = {name: replace(size, compiled=None) for name, size in sizes.items()}
    residency, least = _residency(sizes, other.steps, target, budget)
    return replace(
        other,
        target=target,
        components=sizes,
        residency=residency,
        budget=budget,
        least_bytes=least,
        second=None if other.second is None else replan(other.second, target, vram),
    )


def _residency(
    sizes: Mapping[str, Sizes], steps: int, target: Target, budget: int | None
) -> tuple[Residency, int]:
    """The plan within a budget, and the lowest peak that there is."""
    engines, reserved = footprints(sizes, steps, target), reserve(target)
    least = plan_residency(engines, 0, reserved).peak_bytes
    return plan_residency(engines, budget, reserved), least
