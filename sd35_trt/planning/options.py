"""What a plan is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd35_trt.checkpoints.given_parts import PartOptions


@dataclass(frozen=True)
class PlanOptions(PartOptions):
    """What ``sd35-trt plan`` takes; parts in place of the model's: see :class:`PartOptions`.

    Attributes:
        model: ``large``, ``large-turbo``, ``medium`` (no checkpoint needed), ``mini``, a diffusers
            directory, a file in the original layout, or a hub id.
        target: see :func:`sd35_trt.targets.find_target`.
        policy: name or path; None takes the target's default.
        vram: bytes of device memory to stay within; None takes the target's.
        size: width and height in pixels; None takes the model's native size.
        batch: pictures at once.
        guidance: whether both branches are computed; None asks the model variant.
        exact: ask TensorRT for RTX for the activations, which takes a minute or two the first time.
        cache_dir: where its answers are kept; None takes the build's.
        scheduler, variant: see :class:`sd35_trt.build.options.BuildOptions`.
    """

    model: str = "mini"
    target: str = "cpu"
    policy: str | None = None
    vram: int | None = None
    size: tuple[int, int] | None = None
    batch: int = 1
    guidance: bool | None = None
    exact: bool = False
    cache_dir: Path | None = None
    scheduler: Path | None = None
    variant: str | None = None
