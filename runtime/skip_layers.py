"""Skip-layer guidance: away from what the model draws without some of its blocks.

Stability AI's method for SD3.5 Medium, with the arguments and the arithmetic of diffusers'
``StableDiffusion3Pipeline``: velocity + scale · (velocity with text − the same, blocks skipped).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Manifest

from .arguments import number, several, whole


@dataclass(frozen=True)
class SkipLayers:
    """What an image has of it.

    Attributes:
        layers: blocks that the third branch leaves out.
        scale: of the difference.
        start, stop: fractions of the steps between which it counts, both exclusive.
    """

    layers: tuple[int, ...]
    scale: float
    start: float
    stop: float

    def counts(self, step: int, steps: int) -> bool:
        """Whether it does in a step of so many."""
        return steps * self.start < step < steps * self.stop

    def parameters(self) -> dict[str, Any]:
        """As :meth:`sd35_trt.runtime.Pipeline.generate` takes it."""
        return {
            "skip_guidance_layers": list(self.layers),
            "skip_layer_guidance_scale": self.scale,
            "skip_layer_guidance_start": self.start,
            "skip_layer_guidance_stop": self.stop,
        }


def skip_layers(
    manifest: Manifest, layers: Any, scale: Any, start: Any, stop: Any
) -> SkipLayers | None:
    """The arguments, checked; None where no layers are named.

    Raises:
        UsageError: an argument out of range, or a bundle that cannot skip any.
    """
    factor = number("skip_layer_guidance_scale", scale, -100, 100)
    first = number("skip_layer_guidance_start", start, 0, 1)
    last = number("skip_layer_guidance_stop", stop, 0, 1)
    if layers is None:
        return None
    count = layer_count(manifest)
    if count is None:
        raise UsageError(
            "this bundle was built without skip-layer guidance",
            "leave out skip_guidance_layers, or build with: --skip-layer-guidance",
        )

    def layer(name: str, value: Any) -> int:
        return whole(name, value, 0, count - 1)

    chosen = several("skip_guidance_layers", layers, layer, "a list of numbers of blocks")
    return SkipLayers(tuple(sorted(set(chosen))), factor, first, last)


def layer_count(manifest: Manifest) -> int | None:
    """Blocks that a bundle's denoiser can skip; None where it skips none."""
    denoiser = manifest.component("denoiser")
    if denoiser is None or not manifest.features.skip_layer_guidance:
        return None
    return int(denoiser.input("layer_mask").shape[1])


def skip_scales(
    skips: Sequence[SkipLayers | None], guidance: Sequence[float], steps: int
) -> np.ndarray:
    """How much each image has in each step: float32 [steps, len(skips)].

    Args:
        guidance: of each image; where it is 1, there is none of this either, as in diffusers.
    """
    scales = np.zeros((steps, len(skips)), np.float32)
    for image, own in enumerate(skips):
        if own is None or guidance[image] == 1.0:
            continue
        for step in range(steps):
            if own.counts(step, steps):
                scales[step, image] = own.scale
    return scales


def layer_masks(skips: Sequence[SkipLayers | None], count: int) -> np.ndarray:
    """What the third branch computes of each image's blocks: float32 [len(skips), count]."""
    masks = np.ones((len(skips), count), np.float32)
    for image, own in enumerate(skips):
        if own is not None:
            masks[image, list(own.layers)] = 0.0
    return masks
