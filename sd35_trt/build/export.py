"""The third step of a build: the tokenizers and the components, exported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.dimensions import T5_TOKENS
from sd35_trt.formats.calibration import Calibration
from sd35_trt.formats.tokenizers import TokenizerFacts, read_tokenizers
from sd35_trt.planning.calibration import check_calibration
from sd35_trt.planning.decide import Decision
from sd35_trt.progress import Progress
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import run_stage

from .concurrency import count_jobs, run_stages
from .stages import StageInputs, apart, component_stage, tokenizer_stage

# What the libraries and a traced graph take; weights pass through.
_EXPORT_BYTES = 3 << 30

# A new process takes longer to get going than a small component takes to export: two at the same
# time take 1.6 times as long as one after the other.
_WORTHWHILE = 4


@dataclass(frozen=True)
class Export:
    """What was exported of a model.

    Attributes:
        tokenizers: folder of their files.
        texts: length and padding of each text encoder's tokens.
        components: folder of each, in the contract's order.
        files: SHA-256 of the checkpoint's files that they were made from, and of its scheduler's,
            by ``folder/name``.
    """

    tokenizers: Path
    texts: Mapping[str, TokenizerFacts]
    components: Mapping[str, Path]
    files: Mapping[str, str]

    @property
    def clip_tokens(self) -> int:
        """Length of CLIP's part of the text."""
        return self.texts["clip_l"].length

    @property
    def t5_tokens(self) -> int:
        """Length of T5's part of the text."""
        return self.texts["t5"].length if "t5" in self.texts else T5_TOKENS


def export_model(
    decision: Decision,
    calibration: Calibration | None,
    dialect: str,
    versions: Mapping[str, str],
    cache: StageCache,
    progress: Progress,
    jobs: int | None = None,
) -> Export:
    """Export every component, or take it from the cache.

    Args:
        dialect: what is written; see :data:`sd35_trt.dialects.DIALECTS`.
        versions: of the libraries that take part.
        jobs: how many at the same time; None takes what the machine has room for.

    Raises:
        CheckpointError: a tensor or a tokenizer is missing or unusable.
        UsageError: the policy or the calibration does not fit the model.
    """
    model = decision.model
    inputs = StageInputs(model.checkpoint, cache, versions)
    tokenizers = run_stage(cache, tokenizer_stage(inputs, model.components), progress)
    texts = read_tokenizers(tokenizers)
    clip_tokens = texts["clip_l"].length
    stages = [
        component_stage(inputs, name, decision, calibration, clip_tokens, dialect)
        for name in decision.components
    ]
    files = {name: digest for stage in stages for name, digest in stage.inputs["files"].items()}
    # What is in the cache was made with a calibration that was checked.
    if calibration and not all(cache.find(stage.name, stage.key) for stage in stages):
        check_calibration(calibration, model, decision.policy, files)
    if jobs is None:
        room = count_jobs([_EXPORT_BYTES] * len(stages))
        jobs = room if room >= _WORTHWHILE else 1
    if jobs > 1:
        stages = [apart(stage) for stage in stages]
    folders = run_stages(cache, stages, progress, jobs)
    return Export(tokenizers, texts, folders, files | model.scheduler.hashes(cache))
