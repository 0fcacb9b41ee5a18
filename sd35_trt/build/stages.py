"""The stages of a build that export: the tokenizers, and one component each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sd35_trt.checkpoints.controlnets import part_folders, part_source
from sd35_trt.checkpoints.identity import file_hashes
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.components import component_row, part_rows, runs_every_step
from sd35_trt.engines.child_process import run_in_child
from sd35_trt.export.scales import Scales
from sd35_trt.features import PLAIN, Features
from sd35_trt.formats.calibration import Calibration
from sd35_trt.planning.decide import Decision
from sd35_trt.policies import Policy
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage

# Inputs of a component's stage that its graph does not depend on, or that the graphs' own key has.
_OF_WEIGHTS = ("files", "calibration", "config")


@dataclass(frozen=True)
class StageInputs:
    """What all stages read from, and what identifies it.

    Attributes:
        versions: of the libraries that take part.
    """

    checkpoint: AnyCheckpoint
    cache: StageCache
    versions: Mapping[str, str]

    def describe(self, *folders: str) -> dict[str, Any]:
        """Versions, and the hashes of the checkpoint's files in these folders.

        Raises:
            CheckpointError: a file is missing.
        """
        files = file_hashes(self.checkpoint, folders, self.cache)
        return {"versions": dict(self.versions), "files": files}


def tokenizer_stage(inputs: StageInputs, components: list[str]) -> Stage:
    """The stage that writes the tokenizers of some components."""

    def run(out: Path, progress: Callable[[float, str], None]) -> None:
        from sd35_trt.export.tokenizers import export_tokenizers

        progress(0.0, "converting")
        export_tokenizers(inputs.checkpoint, components, out)

    folders = [row.tokenizer for name in components if (row := component_row(name)).tokenizer]
    # CLIP's configuration holds the length of its position table.
    configs = {n: inputs.checkpoint.config(component_row(n).part) for n in ("clip_l", "clip_g")}
    description = {**inputs.describe(*folders), "configs": configs}
    return Stage("tokenizers", description, ("sd35_trt.export.tokenizers",), run)


@dataclass(frozen=True)
class ComponentExport:
    """What the stage of a component does; another process can be given it.

    Attributes:
        description: the stage's inputs.
    """

    name: str
    checkpoint: AnyCheckpoint
    cache: StageCache
    policy: Policy
    scales: Scales | None
    clip_tokens: int
    guided: bool
    dialect: str
    features: Features
    description: Mapping[str, Any]

    def __call__(self, out: Path, progress: Callable[[float, str], None]) -> None:
        """Export into an existing directory."""
        from sd35_trt.export.component import ExportOptions, export_component
        from sd35_trt.export.graphs import GraphCache

        options = ExportOptions(self.clip_tokens, self.guided, self.dialect, features=self.features)
        # Who saved a configuration, and how, is of no effect on a graph.
        graph = {k: v for k, v in self.description.items() if k not in _OF_WEIGHTS}
        if self.scales:
            graph["calibration"] = self.scales.structure(self.name)
        graphs = GraphCache(self.cache, self.description["config"], graph)
        export_component(
            self.name, self.checkpoint, self.policy, options, out, progress, self.scales, graphs
        )


def apart(stage: Stage) -> Stage:
    """The stage, its work being done in a child process."""

    def run(out: Path, progress: Callable[[float, str], None]) -> None:
        run_in_child(f"exporting {stage.name}", _export, (stage.run, out), progress)

    return replace(stage, run=run)


def _export(job: tuple[Callable[..., None], Path], progress: Callable[[float, str], None]) -> None:
    run, out = job
    run(out, progress)


def component_stage(
    inputs: StageInputs,
    name: str,
    decision: Decision,
    calibration: Calibration | None,
    clip_tokens: int,
    dialect: str,
) -> Stage:
    """The stage that exports a component.

    Args:
        clip_tokens: length of CLIP's part of the text.
        dialect: what is written; see :data:`sd35_trt.dialects.DIALECTS`.
    """
    part = component_row(name).part
    policy, guided = decision.policy, decision.guided
    scales = Scales.of(calibration, part) if calibration else None
    # A single file's configuration is not among the files.
    config = {"config": part_source(inputs.checkpoint, part)[0]}
    chosen = chosen_inputs(
        name, policy, calibration, clip_tokens, guided, dialect, decision.features
    )
    description = {**inputs.describe(*part_folders(part)), **config, **chosen}
    run = ComponentExport(
        name, inputs.checkpoint, inputs.cache, policy, scales, clip_tokens, guided, dialect,
        decision.features.of_component(name), description,
    )  # fmt: skip
    return Stage(name, description, ("sd35_trt.export.component",), run)


def chosen_inputs(
    name: str,
    policy: Policy,
    calibration: Calibration | None,
    clip_tokens: int,
    guided: bool,
    dialect: str,
    features: Features = PLAIN,
) -> dict[str, Any]:
    """What a component's stage depends on besides the checkpoint and versions.

    Args:
        clip_tokens, dialect: as of :func:`component_stage`.
        features: of the bundle.
    """
    row = component_row(name)
    # A part's components meet in their dtypes, so that the rules of each count for all of them.
    digest = policy.digest(other.name for other in part_rows(row.part))
    inputs: dict[str, Any] = {"dialect": dialect, "policy": digest}
    if calibration and (effect := Scales.of(calibration, row.part).describe(name)):
        inputs["calibration"] = effect
    if row.tokenizer:
        inputs["clip_tokens"] = clip_tokens
    if runs_every_step(name):
        inputs["guided"] = guided
    return inputs | features.of_component(name).describe()
