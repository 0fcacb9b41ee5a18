"""The ONNX graphs behind a bundle's engines: in the cache, or exported anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd35_trt.backends import BACKENDS
from sd35_trt.checkpoints.controlnets import part_folders
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.scheduler import write_scheduler
from sd35_trt.components import component_row
from sd35_trt.dialects import DIALECTS, ONNX
from sd35_trt.formats.bundle import Bundle, PolicyRecord
from sd35_trt.formats.calibration import Calibration, CalibrationExtract
from sd35_trt.formats.component import MODEL_FILE
from sd35_trt.planning.decide import Decision
from sd35_trt.policies import Policy, Rule
from sd35_trt.progress import Progress
from sd35_trt.store.cache import REFERENCES, WORK_PREFIX, StageCache
from sd35_trt.store.stages import recorded_stages
from sd35_trt.store.working import working_directory
from sd35_trt.targets import find_target

from .export import export_model
from .stages import chosen_inputs


def cached_graphs(bundle: Bundle, cache: StageCache) -> dict[str, Path]:
    """Graphs of a bundle's components by name, as far as the cache has them.

    A graph is the bundle's where the checkpoint's files, the policy, the calibration and the
    versions of libraries are those of the manifest.
    """
    graphs = {}
    for component in bundle.manifest.components:
        expected = _stage_inputs(bundle, component.name)
        for folder, inputs in recorded_stages(cache, component.name):
            versions = inputs.pop("versions", {})
            inputs.pop("config", None)  # a file's, whose hash is among the others
            if inputs == expected and versions.items() <= bundle.manifest.versions.items():
                graphs[component.name] = folder / MODEL_FILE
                break
    return graphs


def export_graphs(
    bundle: Bundle, source: ModelOptions, cache: StageCache, progress: Progress
) -> dict[str, Path]:
    """Graphs of a bundle's components by name, exported where the cache lacks them.

    Args:
        source: the checkpoint that the bundle was made from; the scheduler is the bundle's.

    Raises:
        CheckpointError: there is no such model, or it cannot be read.
        Sd35Error: a library that exports is not installed.
    """
    from sd35_trt.export.provenance import tool_versions

    m = bundle.manifest
    with working_directory(cache.root / REFERENCES, WORK_PREFIX) as folder:
        scheduler = write_scheduler(folder, m.scheduler)
        model = look(replace(source, scheduler=scheduler))
        decision = Decision(
            model=model,
            target=find_target(m.target),
            policy=_policy(m.policy),
            guided=m.guided,
            batch=m.ranges.batch,
            size=m.ranges.size,
            size_step=m.ranges.size_step,
            latent_channels=m.latent_channels,
            features=m.features,
        )
        versions = tool_versions(*model.libraries)
        calibration, dialect = _calibration(bundle), _dialect(bundle)
        export = export_model(decision, calibration, dialect, versions, cache, progress)
    return {c.name: export.components[c.name] / MODEL_FILE for c in m.components}


def _dialect(bundle: Bundle) -> str:
    """What the bundle's builder reads; the compact one where it reads no ONNX."""
    m = bundle.manifest
    dialect = BACKENDS[m.builder].dialect(m.versions.get(m.builder))
    return ONNX if DIALECTS[dialect].opset is None else dialect


def _calibration(bundle: Bundle) -> Calibration | None:
    if bundle.manifest.calibration is None:
        return None
    return CalibrationExtract.of(bundle).calibration


def _policy(record: PolicyRecord) -> Policy:
    rules = (Rule(r.component, r.match, r.precision, r.reason) for r in record.rules)
    return Policy(record.name, "", tuple(rules))


def _stage_inputs(bundle: Bundle, name: str) -> dict[str, Any]:
    """The inputs of the stage that exported a component, without versions and configuration."""
    m, folders = bundle.manifest, part_folders(component_row(name).part)
    inputs = chosen_inputs(
        name, _policy(m.policy), _calibration(bundle), m.tokenizers["clip_l"].length, m.guided,
        _dialect(bundle), m.features,
    )  # fmt: skip
    files = {k: v for k, v in m.model.files.items() if k.partition("/")[0] in folders}
    # As they were recorded: JSON makes lists of tuples.
    loaded: dict[str, Any] = json.loads(json.dumps({**inputs, "files": files}))
    return loaded
