"""What a build is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd35_trt.checkpoints.model_options import ModelOptions


@dataclass(frozen=True)
class BuildOptions(ModelOptions):
    """What ``sd35-trt build`` takes; which model: see :class:`ModelOptions`.

    Attributes:
        target: a GPU family, a product, ``cpu`` or ``auto``; see :func:`sd35_trt.targets.targets`.
        policy: name or path; None takes the target's default.
        calibration: what ``sd35-trt calibrate`` wrote: scales for FP8, ranges for the guard. None
            takes the packaged one for ``mini``, or the input scales of an FP8 file, where the
            policy needs scales.
        out: the bundle's directory; None makes ``bundles/<model>-<target>``.
        guidance: whether the denoiser computes both branches; None asks the model variant.
        batch: inclusive range of images per run; None is 1 to 4.
        size: inclusive range of width and height in pixels; None is half to one and a half times
            the model's native size.
        size_step: sizes are multiples of this many pixels.
        adapters: the largest rank of adapters that a run takes as inputs; None builds without.
        inpainting: a denoiser that keeps what a mask leaves of a picture.
        skip_layer_guidance: a denoiser for skip-layer guidance.
        split_guidance: a denoiser of one branch of guidance, for two GPUs.
        short_steps: blocks that a short step computes; None takes the step cache's, or builds
            without short steps.
        step_cache: what ``sd35-trt calibrate --step-cache`` wrote: which steps are short.
        builder: one of those that serve the target; None takes the preferred one.
        weight_streaming: engines that can keep part of their weights in the host's memory.
        refit: engines whose weights can be exchanged.
        autotune: try more kernels, with the ``inductor`` builder.
        optimization_level: how many kernels are tried, 0 to 5, with the ``tensorrt`` builder; None
            is its default, 3.
        jobs: components that are exported, or compiled, at the same time; None takes what the
            machine has room for.
        cache_dir: where stages are kept.
        command: recorded as the command that made the bundle.
    """

    target: str = "cpu"
    policy: str | None = None
    calibration: Path | None = None
    out: Path | None = None
    guidance: bool | None = None
    batch: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    size_step: int = 64
    adapters: int | None = None
    inpainting: bool = False
    skip_layer_guidance: bool = False
    split_guidance: bool = False
    short_steps: int | None = None
    step_cache: Path | None = None
    builder: str | None = None
    weight_streaming: bool = False
    refit: bool = False
    autotune: bool = False
    optimization_level: int | None = None
    jobs: int | None = None
    cache_dir: Path | None = None
    command: str = ""
