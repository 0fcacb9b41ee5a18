"""A checked request: what the caller asked for, filled with the model's defaults."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Manifest

from .schedule import SAMPLERS

if TYPE_CHECKING:
    # Loaded where pictures are made of arrays, or arrays of pictures: it takes a fifth of the
    # import.
    from PIL import Image

MAX_STEPS = 1000


@dataclass(frozen=True)
class Request:
    """One run: every list has one entry per image."""

    prompts: tuple[str, ...]
    negatives: tuple[str, ...]
    seeds: tuple[int, ...]
    guidance: tuple[float, ...]
    steps: int
    shift: float
    width: int
    height: int
    sampler: str
    t5_tokens: int
    latent_scale: int
    image: np.ndarray | None
    strength: float

    @property
    def latent_size(self) -> tuple[int, int]:
        """(height, width) in latent pixels."""
        return self.height // self.latent_scale, self.width // self.latent_scale

    @property
    def dims(self) -> dict[str, int]:
        """Sizes of the dynamic dimensions of the VAE and the denoiser."""
        height, width = self.latent_size
        return {
            "batch": len(self.seeds),
            "height": height,
            "width": width,
            "image_height": self.height,
            "image_width": self.width,
        }

    @property
    def first_step(self) -> int:
        """Steps left out at the start when an image is given."""
        return int(max(self.steps - min(self.steps * self.strength, self.steps), 0))

    @property
    def in_common(self) -> tuple[Any, ...] | None:
        """What requests must agree in to be drawn in one run; None if it is drawn by itself."""
        if self.image is not None:
            return None
        return self.width, self.height, self.steps, self.shift, self.sampler, self.t5_tokens

    def parameters(self) -> dict[str, Any]:
        """What would draw the same images again, except the image started from.

        Of a request as :func:`make_request` returns it, whose images have one guidance.
        """
        parameters: dict[str, Any] = {
            "prompt": list(self.prompts),
            "negative": list(self.negatives),
            "seed": list(self.seeds),
            "steps": self.steps,
            "guidance": self.guidance[0],
            "shift": self.shift,
            "size": [self.width, self.height],
            "sampler": self.sampler,
            "t5_tokens": self.t5_tokens,
        }
        if self.image is not None:
            parameters["strength"] = self.strength
        return parameters


def make_request(
    manifest: Manifest,
    *,
    prompt: str | Sequence[str],
    negative: str | Sequence[str],
    seed: int | Sequence[int],
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    size: tuple[int, int] | None,
    batch: int,
    sampler: str | None,
    t5_tokens: int | None,
    image: Image.Image | np.ndarray | None,
    strength: float,
) -> Request:
    """Check the arguments of :meth:`sd35_trt.runtime.Pipeline.generate` against a bundle.

    Raises:
        UsageError: names the argument and the nearest value that works.
    """
    defaults, ranges = manifest.defaults, manifest.ranges
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    negatives = [negative] * len(prompts) if isinstance(negative, str) else list(negative)
    if len(negatives) != len(prompts):
        raise UsageError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts", "give one, or one each"
        )
    if batch < 1:
        raise UsageError(f"batch must be at least 1, not {batch}")
    count = len(prompts) * batch
    low, high = ranges.batch
    if not low <= count <= high:
        raise UsageError(
            f"{count} images at once, this bundle draws {low} to {high}",
            f"draw {max(low, min(count, high))}, or build with: --batch {low}:{max(count, high)}",
        )
    if isinstance(seed, (int, np.integer)):
        seed = [int(seed) + i for i in range(count)]
    seeds = [int(s) for s in seed]
    if len(seeds) != count:
        raise UsageError(f"{len(seeds)} seeds for {count} images", "give one, or one each")
    if any(s < 0 for s in seeds):
        raise UsageError(f"seed must not be negative, not {min(seeds)}")
    steps = defaults.steps if steps is None else steps
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"steps must be 1 to {MAX_STEPS}, not {steps}")
    guidance = _positive("guidance", defaults.guidance if guidance is None else guidance)
    if not manifest.guided and guidance != 1.0:
        raise UsageError(
            f"this bundle was built without guidance, so guidance is 1, not {guidance:g}",
            "leave it out, or build with: --guidance",
        )
    shift = _positive("shift", manifest.scheduler.shift if shift is None else shift)
    sampler = defaults.sampler if sampler is None else sampler
    if sampler not in SAMPLERS:
        raise UsageError(f"unknown sampler {sampler!r}", f"use one of: {', '.join(SAMPLERS)}")
    t5_tokens = defaults.t5_tokens if t5_tokens is None else t5_tokens
    shortest, longest = ranges.t5_tokens
    if not shortest <= t5_tokens <= longest:
        raise UsageError(f"t5_tokens must be {shortest} to {longest}, not {t5_tokens}")
    if not 0 < strength <= 1:
        raise UsageError(f"strength must be above 0 and at most 1, not {strength:g}")
    pixels = None if image is None else _pixels(image, size)
    if pixels is not None:
        size = (pixels.shape[1], pixels.shape[0])
    width, height = size or defaults.size
    _check_size(width, height, manifest)
    return Request(
        prompts=tuple(p for p in prompts for _ in range(batch)),
        negatives=tuple(n for n in negatives for _ in range(batch)),
        seeds=tuple(seeds),
        guidance=(guidance,) * count,
        steps=steps,
        shift=shift,
        width=width,
        height=height,
        sampler=sampler,
        t5_tokens=t5_tokens,
        latent_scale=manifest.latent_scale,
        image=None if pixels is None else np.repeat(pixels[None], count, axis=0),
        strength=strength,
    )


def least_request(manifest: Manifest) -> Request:
    """The smallest batch of the usual size."""
    return make_request(
        manifest,
        prompt=[""] * manifest.ranges.batch[0],
        negative="",
        seed=0,
        steps=None,
        guidance=None,
        shift=None,
        size=None,
        batch=1,
        sampler=None,
        t5_tokens=None,
        image=None,
        strength=0.6,
    )


def join(requests: Sequence[Request]) -> Request:
    """All images of requests that agree in :attr:`Request.in_common`, in order."""
    if len(requests) == 1:
        return requests[0]
    return replace(
        requests[0],
        prompts=tuple(chain.from_iterable(r.prompts for r in requests)),
        negatives=tuple(chain.from_iterable(r.negatives for r in requests)),
        seeds=tuple(chain.from_iterable(r.seeds for r in requests)),
        guidance=tuple(chain.from_iterable(r.guidance for r in requests)),
    )


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise UsageError(f"{name} must be a positive number, not {value}")
    return float(value)


def _check_size(width: int, height: int, manifest: Manifest) -> None:
    ranges = manifest.ranges
    low, high = ranges.size

    def nearest(value: int) -> int:
        return max(low, min(high, round(value / ranges.size_step) * ranges.size_step))

    if (nearest(width), nearest(height)) != (width, height):
        raise UsageError(
            f"size {width}x{height} is not in {low} to {high} in steps of {ranges.size_step}",
            f"the nearest is {nearest(width)}x{nearest(height)}",
        )


def _pixels(image: Image.Image | np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, 3], resized to ``size`` (width, height) if one is given."""
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise UsageError(
                f"image is {image.dtype} {list(image.shape)}, not uint8 [height, width, 3]"
            )
        image = Image.fromarray(image)
    image = image.convert("RGB")
    if size is not None and image.size != tuple(size):
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)
