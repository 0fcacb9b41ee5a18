"""Sizes and batches that a bundle draws, and latents that are of such a size."""

from __future__ import annotations

from typing import Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Manifest

from .arguments import shown


def check_count(count: int, manifest: Manifest) -> None:
    """Refuse what is not a batch of a bundle.

    Raises:
        UsageError: names the nearest that is.
    """
    low, high = manifest.ranges.batch
    if not low <= count <= high:
        raise UsageError(
            f"{count} images at once, this bundle draws {low} to {high}",
            f"draw {max(low, min(count, high))}, or build with: --batch {low}:{max(count, high)}",
        )


def check_size(width: int, height: int, manifest: Manifest) -> None:
    """Refuse a size in pixels that a bundle does not draw.

    Raises:
        UsageError: names the nearest that it does.
    """
    ranges = manifest.ranges
    low, high = ranges.size

    def nearest(value: int) -> int:
        return max(low, min(high, round(value / ranges.size_step) * ranges.size_step))

    if (nearest(width), nearest(height)) != (width, height):
        raise UsageError(
            f"size {width}x{height} is not in {low} to {high} in steps of {ranges.size_step}",
            f"the nearest is {nearest(width)}x{nearest(height)}",
        )


def check_latents(latents: Any, manifest: Manifest) -> np.ndarray:
    """Latents of pictures that a bundle draws, as float32 [B, C, h, w].

    Args:
        latents: the same, or those of one picture [C, h, w].

    Raises:
        UsageError: another type or shape, a size that the bundle does not draw, or values that are
            not finite.
    """
    channels, scale = manifest.latent_channels, manifest.latent_scale
    if not isinstance(latents, np.ndarray):
        raise UsageError(f"latents must be an array, not {shown(latents)}")
    batch = latents[None] if latents.ndim == 3 else latents
    if batch.dtype != np.float32 or batch.ndim != 4 or batch.shape[1] != channels or not batch.size:
        raise UsageError(
            f"latents are {latents.dtype} {list(latents.shape)}, "
            f"not float32 [images, {channels}, height, width]"
        )
    check_size(batch.shape[3] * scale, batch.shape[2] * scale, manifest)
    if not np.isfinite(batch).all():
        raise UsageError("latents are not finite", "look at what made them")
    return batch
