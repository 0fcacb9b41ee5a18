"""One request on its way through a pipeline, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.errors import Cancelled

from .latent_guard import Anomaly
from .request import Request
from .timing import Clock, now_ns

if TYPE_CHECKING:
    # Loaded where pictures are made of arrays, or arrays of pictures: it takes a fifth of the
    # import.
    from PIL import Image


@dataclass(frozen=True)
class Step:
    """What a callback sees after each denoising step.

    Attributes:
        index: 0 … total - 1.
        total: number of steps of this run.
        sigma: noise level after the step; 0 after the last.
        latents: float32 [B, C, h, w], the loop's own buffer: copy what you keep.
        fetch_denoised: see :attr:`denoised`.
    """

    index: int
    total: int
    sigma: float
    latents: np.ndarray
    fetch_denoised: Callable[[], np.ndarray] = field(repr=False)

    @property
    def denoised(self) -> np.ndarray:
        """The step's estimate of the finished latents, float32 [B, C, h, w]: what a preview shows.

        It is fetched from the device when it is asked for, within the callback; copy what you
        keep. A GPU ends the step that it is at first.
        """
        return self.fetch_denoised()

    def part(self, images: slice) -> Step:
        """The same step as some of the images see it."""
        return replace(
            self, latents=self.latents[images], fetch_denoised=lambda: self.denoised[images]
        )


@dataclass(frozen=True)
class Result:
    """Images and how they came about.

    Attributes:
        images: uint8 [B, H, W, 3]; [0, H, W, 3] of a request that leaves them out.
        latents: float32 [B, C, h, w], what the VAE decodes.
        seeds: seed of each image.
        parameters: everything that would draw the same images again.
        timings: seconds by stage: ``queue`` (waiting for other requests), ``text``,
            ``conditioning``, ``denoise``, ``decode``, ``total``. Requests that are drawn in one
            run have its stages in common.
        notes: what the user should know, such as a prompt that was cut.
        anomalies: images whose latents were unlike those of calibration.
        short_steps: how many of the steps computed the first blocks alone.
    """

    images: np.ndarray
    latents: np.ndarray
    seeds: tuple[int, ...]
    parameters: dict[str, Any]
    timings: dict[str, float]
    notes: tuple[str, ...] = ()
    anomalies: tuple[Anomaly, ...] = ()
    short_steps: int = 0

    def pil(self) -> list[Image.Image]:
        """The images as PIL images."""
        from PIL import Image

        return [Image.fromarray(image) for image in self.images]


@dataclass(eq=False)
class Job:
    """A request that is drawn, alone or in one run with others.

    Attributes:
        callback: see :meth:`sd35_trt.runtime.Pipeline.generate`.
        created_ns: when it began to wait, of :func:`sd35_trt.runtime.timing.now_ns`.
        clock: the stages of the run that draws it; None while it waits.
        anomalies: found so far.
        outcome: the result, or why there is none; None until it is known.
    """

    request: Request
    callback: Callable[[Step], object] | None = None
    created_ns: int = field(default_factory=now_ns)
    clock: Clock | None = None
    anomalies: list[Anomaly] = field(default_factory=list)
    outcome: Result | BaseException | None = None

    def start_again(self) -> None:
        """Forget what was drawn of it."""
        self.clock, self.outcome = None, None
        self.anomalies.clear()

    def after_step(self, step: Step) -> None:
        """Call the callback, which may end the job."""
        if self.callback is None:
            return
        try:
            if self.callback(step) is False:
                self.outcome = Cancelled(f"cancelled after step {step.index + 1} of {step.total}")
        except BaseException as error:  # noqa: BLE001 raised where the job's caller waits
            self.outcome = error
