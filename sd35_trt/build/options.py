"""What a build is asked for."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.checkpoints.beside import OPTIONS
from sd35_trt.checkpoints.given_parts import PartOptions


@dataclass(frozen=True)
class BuildOptions(PartOptions):
    """What ``sd35-trt build`` takes; parts in place of the model's: see :class:`PartOptions`.

    Attributes:
        model: ``mini``, a diffusers directory, a file in the original layout, or a hub id.
        tokenizers: a directory with the tokenizers' folders, for a model in a file; None looks
            beside it, then on the hub.
        scheduler: a ``scheduler_config.json``, or a folder with one; None takes the model's.
        variant: ``large``, ``large-turbo``, ``medium``, ``mini`` or ``custom``; None asks the
            model's structure and its name.
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

    model: str = "mini"
    tokenizers: Path | None = None
    scheduler: Path | None = None
    variant: str | None = None
    target: str = "cpu"
    policy: str | None = None
    calibration: Path | None = None
    out: Path | None = None
    guidance: bool | None = None
    batch: tuple[int, int] | None = None
    size: tuple[int, int] | None = None
    size_step: int = 64
    builder: str | None = None
    weight_streaming: bool = False
    refit: bool = False
    autotune: bool = False
    optimization_level: int | None = None
    jobs: int | None = None
    cache_dir: Path | None = None
    command: str = ""

    @property
    def model_words(self) -> str:
        """The model as on the command line."""
        options = {
            "--model": self.model,
            **{OPTIONS[part]: path for part, path in self.part_paths.items()},
            "--tokenizers": self.tokenizers,
            "--scheduler": self.scheduler,
            "--model-variant": self.variant,
        }
        words = [(name, str(value)) for name, value in options.items() if value is not None]
        return shlex.join(word for pair in words for word in pair)
