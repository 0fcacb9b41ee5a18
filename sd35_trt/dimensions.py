"""Bounds of the components' dynamic dimensions: what an engine is compiled to accept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import Struct

from .components import LATENT_SCALE, component_row
from .errors import CheckpointError, UsageError
from .features import PLAIN, Features

#: Smallest, most usual and largest value of a dimension, as an optimization profile takes them.
Bounds = tuple[int, int, int]

#: Length of T5's part of the text: diffusers' default ``max_sequence_length``. Without T5, its part
#: is this many zeros.
T5_TOKENS = 256

#: Steps that one run of the conditioner computes at most: its memory grows with them.
MAX_STEPS_AT_ONCE = 32

# Of an image token: SD3's patches are 2×2 latent pixels.
_PATCH_PIXELS = (2 * LATENT_SCALE) ** 2

# No dimension of a tensor is larger.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class SizeLimits:
    """Widths and heights that a model can draw, in pixels.

    Attributes:
        unit: they are multiples of this: a patch of the transformer.
        largest: as many patches as its table of positions has.
    """

    unit: int
    largest: int

    @classmethod
    def of(cls, transformer: Mapping[str, Any]) -> SizeLimits:
        """Those of a transformer.

        Args:
            transformer: its configuration.

        Raises:
            CheckpointError: names the key that is missing or no number.
        """
        unit = LATENT_SCALE * whole_number({"patch_size": 2, **transformer}, "patch_size")
        return cls(unit, unit * whole_number(transformer, "pos_embed_max_size"))

    def check(self, width: int, height: int) -> None:
        """Refuse a size that the model cannot draw.

        Raises:
            UsageError: names the sizes that it can.
        """
        sides = (width, height)
        if any(side % self.unit or not self.unit <= side <= self.largest for side in sides):
            example = min(1024, self.largest)
            raise UsageError(
                f"--size {width}x{height} is not within {self.unit}:{self.largest} in steps of "
                f"{self.unit}",
                f"use for example --size {example}x{example}",
            )


def whole_number(transformer: Mapping[str, Any], key: str) -> int:
    """A whole number of a transformer's configuration.

    Raises:
        CheckpointError: names the key that is missing or no number.
    """
    value = transformer.get(key)
    if not isinstance(value, int):
        raise CheckpointError(
            f"transformer/config.json has {key} = {value!r}",
            "take the original model's config.json",
        )
    return value


class Ranges(Struct, frozen=True):
    """What the engines accept: inclusive bounds; sizes in pixels, in steps of ``size_step``."""

    batch: tuple[int, int]
    size: tuple[int, int]
    size_step: int
    t5_tokens: tuple[int, int]

    def __post_init__(self) -> None:
        for name in ("batch", "size", "t5_tokens"):
            low, high = getattr(self, name)
            if not 1 <= low <= high <= _MOST:
                raise ValueError(f"{name} {low} to {high} is no range")
        if not 1 <= self.size_step <= _MOST:
            raise ValueError(f"size_step {self.size_step} is no step")

    def include(self, other: Ranges) -> bool:
        """Whether engines with these ranges accept all that engines with the other do."""
        pairs = (
            (self.batch, other.batch),
            (self.size, other.size),
            (self.t5_tokens, other.t5_tokens),
        )
        inside = all(low <= first and last <= high for (low, high), (first, last) in pairs)
        return inside and other.size_step % self.size_step == 0


class Defaults(Struct, frozen=True):
    """What a request gets that does not say otherwise.

    Attributes:
        size: (width, height) in pixels.
        sampler: a key of :data:`sd35_trt.runtime.schedule.SAMPLERS`.
        t5_tokens: length of T5's part of the text.
    """

    steps: int
    guidance: float
    size: tuple[int, int]
    sampler: str
    t5_tokens: int

    def __post_init__(self) -> None:
        for name in ("steps", "t5_tokens"):
            if not 1 <= getattr(self, name) <= _MOST:
                raise ValueError(f"{name} {getattr(self, name)} is no count")
        if not all(1 <= side <= _MOST for side in self.size):
            raise ValueError(f"size {self.size[0]}x{self.size[1]} is none of a picture")


def dimension_bounds(
    component: str,
    ranges: Ranges,
    defaults: Defaults,
    clip_tokens: int,
    guided: bool,
    features: Features = PLAIN,
    least_rank: int = 1,
) -> dict[str, Bounds]:
    """Bounds of a component's dynamic dimensions by name.

    Args:
        component: a name that :func:`sd35_trt.components.component_row` knows.
        defaults: whose ``steps``, ``size`` and ``t5_tokens`` are the most usual values.
        clip_tokens: CLIP's part of the text.
        guided: whether both guidance branches are computed; the text encoders and the
            conditioner then get two texts for each image.
        features: of the bundle. The third branch of guidance has no image in most steps.
        least_rank: of adapters, in a run without any; see :class:`sd35_trt.backends.Backend`.
    """
    images, most_images = ranges.batch
    branches = 2 if guided else 1
    texts = (branches * images, branches * images, branches * most_images)
    short, long = ranges.t5_tokens
    t5 = (short, defaults.t5_tokens, long)
    smallest, largest = ranges.size
    width, height = ((smallest, pixels, largest) for pixels in defaults.size)

    def scaled(bounds: Bounds, divisor: int) -> Bounds:
        low, usual, high = (value // divisor for value in bounds)
        return low, usual, high

    ranks = features.adapter_ranks

    text_encoder = component_row(component).tokenizer is not None
    low, usual, high = t5
    return {
        # Texts that were encoded before are not encoded again: there may be one left.
        "batch": (1, *texts[1:]) if text_encoder else (images, images, most_images),
        "samples": texts,
        "steps": (1, min(defaults.steps, MAX_STEPS_AT_ONCE), MAX_STEPS_AT_ONCE),
        "tokens": t5
        if text_encoder
        else (clip_tokens + low, clip_tokens + usual, clip_tokens + high),
        "height": scaled(height, LATENT_SCALE),
        "width": scaled(width, LATENT_SCALE),
        "image_height": height,
        "image_width": width,
        **({"rank": (least_rank, ranks[0], ranks[-1])} if ranks else {}),
        **({"skipped": (0, 0, most_images)} if features.skip_layer_guidance else {}),
        **({"pixels": _patches(width, height)} if features.has_tokens else {}),
        **(_control_bounds(texts, width, height) if features.control_blocks else {}),
    }


def _patches(width: Bounds, height: Bounds) -> Bounds:
    low, usual, high = (
        across * down // _PATCH_PIXELS for across, down in zip(width, height, strict=True)
    )
    return low, usual, high


def _control_bounds(samples: Bounds, width: Bounds, height: Bounds) -> dict[str, Bounds]:
    """Of what ControlNets make: it is one token of zeros for all samples where there is none."""
    _, usual, high = _patches(width, height)
    return {
        "residual_samples": (1, samples[1], samples[2]),
        "residual_pixels": (1, usual, high),
    }
