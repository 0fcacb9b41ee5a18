"""What a comparison of two bundles is asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sd35_trt.checkpoints.model_options import ModelOptions

from .gate import Thresholds
from .reference import HALF


@dataclass(frozen=True)
class VerifyOptions:
    """What ``sd35-trt verify BUNDLE --against`` takes.

    Attributes:
        against: ``half`` or the reference's directory.
        source: see :func:`sd35_trt.quality.reference.open_reference`.
        prompts: a prompt file; None takes mini's held-out captions, or the packaged prompts.
        captions: how many of them; None takes 100 captions of mini, or all of a file.
        seed: of the first picture; the others count up.
        steps: None takes the model's.
        command: recorded in the report.
    """

    bundle: Path
    against: str = HALF
    source: ModelOptions | None = None
    prompts: Path | None = None
    captions: int | None = None
    seed: int = 0
    steps: int | None = None
    cache_dir: Path | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    command: str = ""
