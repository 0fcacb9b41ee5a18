"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd35_trt.checkpoints.model_options import ModelOptions


@dataclass(frozen=True)
class PlanOptions(ModelOptions):
    """What ``sd35-trt plan`` takes; which model: see :class:`ModelOptions`. It may also be one of
    ``large``, ``large-turbo`` and ``medium``, which need no checkpoint; tokenizers are not read.

    Attributes:
        target: see :func:`sd35_trt.targets.find_target`.
        policy: name or path; None takes the target's default.
        vram: bytes of device memory to stay within; None takes the target's.
        size: width and height in pixels; None takes the model's native size.
        batch: pictures at once.
        guidance: whether both branches are computed; None asks the model variant.
        short_steps: blocks that a short step computes; None is without such steps.
        split_guidance: two GPUs draw one picture, each a branch of guidance.
        exact: ask TensorRT for RTX for the activations, which takes a minute or two the first time.
        cache_dir: where its answers are kept; None takes the build's.
    """

    target: str = "cpu"
    policy: str | None = None
    vram: int | None = None
    size: tuple[int, int] | None = None
    batch: int = 1
    guidance: bool | None = None
    short_steps: int | None = None
    split_guidance: bool = False
    exact: bool = False
    cache_dir: Path | None = None
