"""From a checkpoint to a bundle in one pass: look, decide, export, compile, assemble."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sd35_trt.checkpoints.identity import file_hashes
from sd35_trt.checkpoints.look import look
from sd35_trt.compat.requirement import requirement
from sd35_trt.dialects import DIALECTS
from sd35_trt.engines.assemble import assemble
from sd35_trt.engines.builder import EngineOptions, load_builder
from sd35_trt.export.provenance import tool_versions
from sd35_trt.formats.bundle import MANIFEST
from sd35_trt.formats.step_cache import read_step_cache
from sd35_trt.mini import step_cache_path
from sd35_trt.planning.calibration import decide_calibration
from sd35_trt.planning.decide import (
    check_dialect,
    decide,
    decide_features,
    decide_policy,
    decide_short_steps,
    packaged_step_cache,
)
from sd35_trt.planning.description import describe
from sd35_trt.progress import Progress, silent
from sd35_trt.store.cache import open_cache
from sd35_trt.store.disk import CACHE, file_errors
from sd35_trt.store.replacement import check_destination
from sd35_trt.targets import choose_builder, find_target

from .compile import compile_model
from .export import export_model
from .facts import manifest_facts
from .options import BuildOptions


def build(
    options: BuildOptions,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda line: None,
) -> Path:
    """Build a bundle.

    Args:
        progress: of the work.
        tell: is given what the model was taken for, line by line, before any work.

    Returns:
        The bundle's directory.

    Raises:
        Sd35Error: explained in one line; nothing half-written is left.
    """
    # What needs no checkpoint is refused before one is fetched.
    target = find_target(options.target)
    policy = decide_policy(target, options.policy)
    backend = choose_builder(target, options.builder)
    step_cache = None if options.step_cache is None else read_step_cache(options.step_cache)
    features = decide_features(
        options.adapters,
        options.inpainting,
        options.skip_layer_guidance,
        decide_short_steps(options.short_steps, step_cache),
        options.split_guidance,
    )
    cache = open_cache(options.cache_dir)
    with requirement("building", "build"):
        wishes = EngineOptions(
            options.weight_streaming,
            options.refit,
            options.autotune,
            options.optimization_level,
            cache.root / "timings",
        )
        builder = load_builder(backend, target.builders[backend], wishes)
        version = builder.versions().get(backend)
        dialect = builder.backend.dialect(version)
        check_dialect(policy, DIALECTS[dialect], f"{builder.backend.title} {version}")
        model = look(options)
        out = options.out or Path("bundles") / f"{model.name}-{target.name}"
        check_destination(out, MANIFEST, "bundle")
        with file_errors(out, "choose another --out", {cache.root: CACHE}):
            decision = decide(
                model,
                target,
                policy,
                guidance=options.guidance,
                batch=options.batch,
                size=options.size,
                size_step=options.size_step,
                features=features,
            )
            versions = tool_versions(*model.libraries)
            advice = (
                f"make one with: sd35-trt calibrate {options.model_words} "
                f"--policy {options.policy or policy.name} --out DIR, and give it as "
                "--calibration DIR"
            )
            step_cache = step_cache or packaged_step_cache(model, options.short_steps)
            if step_cache is not None:
                files = file_hashes(model.checkpoint, ["transformer"], cache)
                step_cache.check_model(files, options.step_cache or step_cache_path())
            calibration = decide_calibration(model, policy, options.calibration, cache, advice)
            for line in describe(decision):
                tell(line)
            export = export_model(
                decision, calibration, dialect, versions, cache, progress, options.jobs
            )
            engines = compile_model(decision, export, builder, cache, progress, options.jobs)
            facts = manifest_facts(decision, export, builder, versions, options.command)
            # Large files of the bundle are links to stages', and so are those of one in its place.
            with cache.relinked(out, *(engine.folder for engine in engines)):
                assemble(out, builder, engines, export.tokenizers, facts, calibration, step_cache)
            progress("bundle", 1, 1, "written")
    return out
