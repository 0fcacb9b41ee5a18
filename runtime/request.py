"""A checked request: what the caller asked for, filled with the model's defaults."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Manifest
from sd35_trt.formats.step_cache import StepCache, StepPlan

from .adapters import AdapterShelf, Mix, parameters_of
from .arguments import flag, number, several, shown, text, whole
from .controls import ControlUse, control_uses, join_controls
from .prompts import Prompt, make_prompts, parameters_of_prompts
from .schedule import SAMPLERS
from .short_steps import PlannedStep, StepKinds, planned_steps
from .sizes import check_count, check_latents, check_size
from .skip_layers import SkipLayers, skip_layers, skip_scales
from .source_pictures import latent_mask, mask_of, pixels_of

if TYPE_CHECKING:
    from .controls import Control
    from .source_pictures import PictureLike

MAX_STEPS = 1000
MAX_PROMPT_CHARS = 10_000

#: How steps are computed: as the step cache says, or all of them in full.
FAST, EXACT = "fast", "exact"

_LARGEST = 2**31 - 1
# Of torch.Generator.manual_seed.
_LARGEST_SEED = 2**64 - 1


@dataclass(frozen=True)
class Request:
    """One run: every list has one entry per image.

    Attributes:
        image: to start from, uint8 [B, H, W, 3]; None starts from noise alone.
        mask: bool [B, H, W], which of its pixels are drawn anew; None is all.
        paste: whether the others are the picture's own in the end.
        skips: skip-layer guidance; None is without.
        latents: of a picture to start from, in place of ``image``: float32 [B, C, h, w].
        decode: whether the result has images.
        controls: ControlNets, which all images have.
        fast: whether steps may be short.
        plan: of the step cache, of a fast one; None where it has none for the request.
        short_blocks: that short steps compute in the bundle that the plan is of.
    """

    prompts: tuple[Prompt, ...]
    negatives: tuple[Prompt, ...]
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
    adapters: tuple[Mix, ...] = ()
    mask: np.ndarray | None = None
    paste: bool = False
    skips: tuple[SkipLayers | None, ...] = ()
    latents: np.ndarray | None = None
    decode: bool = True
    controls: tuple[ControlUse, ...] = ()
    fast: bool = False
    plan: StepPlan | None = None
    short_blocks: int = 0

    @property
    def from_noise(self) -> bool:
        """Whether it starts from noise alone, not from a picture."""
        return self.image is None and self.latents is None

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
        """Steps left out at the start when a picture is given."""
        return _first_step(self.steps, self.strength)

    @property
    def drawn_steps(self) -> int:
        """Steps that are computed."""
        return self.steps if self.from_noise else self.steps - self.first_step

    @property
    def in_common(self) -> tuple[Any, ...] | None:
        """What requests must agree in to be drawn in one run; None if it is drawn by itself."""
        if not self.from_noise:
            return None
        kind = self.width, self.height, self.steps, self.shift, self.sampler, self.t5_tokens
        return *kind, self.decode, self.planned_steps, *(use.key for use in self.controls)

    @cached_property
    def planned_steps(self) -> tuple[PlannedStep, ...]:
        """The steps, where some of them are short; else empty."""
        if self.plan is None:
            return ()
        steps = range(count := self.drawn_steps)
        scales = skip_scales(self.skips, self.guidance, count)
        nets = [tuple(use.counts(step, count) for use in self.controls) for step in steps]
        kinds = StepKinds([bool(row.any()) for row in scales], nets)
        return planned_steps(self.plan.coefficients, kinds)

    def parameters(self) -> dict[str, Any]:
        """What would draw the same images again, except the picture started from.

        Of a request as :func:`make_request` returns it, whose images have one guidance.
        """
        parameters: dict[str, Any] = {
            **parameters_of_prompts("prompt", self.prompts),
            **parameters_of_prompts("negative", self.negatives),
            "seed": list(self.seeds),
            "steps": self.steps,
            "guidance": self.guidance[0],
            "shift": self.shift,
            "size": [self.width, self.height],
            "sampler": self.sampler,
            "t5_tokens": self.t5_tokens,
        }
        if not self.from_noise:
            parameters["strength"] = self.strength
        if self.prompts[0].weighted:
            parameters["weighting"] = True
        if self.paste:
            parameters["paste"] = True
        if any(self.adapters):
            parameters["adapters"] = parameters_of(self.adapters)
        if self.skips and self.skips[0] is not None:
            parameters |= self.skips[0].parameters()
        if self.fast:
            parameters["step_cache"] = FAST
        if self.controls:
            parameters["controls"] = {use.name: use.parameters() for use in self.controls}
        return parameters


def make_request(
    manifest: Manifest,
    *,
    prompt: str | Sequence[str],
    negative: str | Sequence[str] = "",
    seed: int | Sequence[int] = 0,
    steps: int | None = None,
    guidance: float | None = None,
    shift: float | None = None,
    size: tuple[int, int] | None = None,
    batch: int = 1,
    sampler: str | None = None,
    t5_tokens: int | None = None,
    image: PictureLike | None = None,
    strength: float = 0.6,
    max_prompt_chars: int = MAX_PROMPT_CHARS,
    adapters: Any = None,
    shelf: AdapterShelf | None = None,
    mask: PictureLike | None = None,
    paste: bool = False,
    skip_guidance_layers: Sequence[int] | None = None,
    skip_layer_guidance_scale: float = 2.8,
    skip_layer_guidance_start: float = 0.01,
    skip_layer_guidance_stop: float = 0.2,
    prompt_2: str | Sequence[str] | None = None,
    prompt_3: str | Sequence[str] | None = None,
    negative_2: str | Sequence[str] | None = None,
    negative_3: str | Sequence[str] | None = None,
    weighting: bool = False,
    latents: np.ndarray | None = None,
    decode: bool = True,
    controls: Mapping[str, PictureLike | Control] | None = None,
    step_cache: str = EXACT,
    plans: StepCache | None = None,
) -> Request:
    """Check the arguments of :meth:`sd35_trt.runtime.Pipeline.generate` against a bundle.

    Args:
        max_prompt_chars: of a prompt; longer texts take long to be cut into tokens, of which few
            are read.
        shelf: the adapters that there are; None where ``adapters`` is.
        plans: of the bundle; None where it has none.

    Raises:
        UsageError: names the argument and the nearest value that works.
    """
    defaults, ranges = manifest.defaults, manifest.ranges

    def one_text(name: str, value: Any) -> str:
        return text(name, value, max_prompt_chars)

    weighting = flag("weighting", weighting)
    prompts = make_prompts("prompt", (prompt, prompt_2, prompt_3), one_text, weighting)
    texts = (negative, negative_2, negative_3)
    negatives = make_prompts("negative", texts, one_text, weighting)
    if isinstance(negative, str) and len(negatives) == 1:
        negatives *= len(prompts)
    if len(negatives) != len(prompts):
        raise UsageError(
            f"{len(negatives)} negative prompts for {len(prompts)} prompts",
            "give a text, which is for all prompts, or a list of one for each",
        )
    batch = whole("batch", batch, 1, _LARGEST)
    count = len(prompts) * batch
    check_count(count, manifest)
    seeds = _seeds(seed, count)
    steps = whole("steps", defaults.steps if steps is None else steps, 1, MAX_STEPS)
    # The bundle's own values are what it was built for, whatever they are.
    guidance = defaults.guidance if guidance is None else number("guidance", guidance, 0, 100)
    # As in diffusers: up to 1, the picture is that of the prompt alone.
    guidance = max(float(guidance), 1.0)
    if not manifest.guided and guidance != 1.0:
        raise UsageError(
            f"this bundle was built without guidance, so guidance is 1, not {guidance:g}",
            "leave it out, or build with: --guidance",
        )
    own_shift = float(manifest.scheduler.shift)
    shift = own_shift if shift is None else number("shift", shift, 0.01, 100)
    sampler = defaults.sampler if sampler is None else sampler
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise UsageError(f"unknown sampler {shown(sampler)}", f"use one of: {', '.join(SAMPLERS)}")
    shortest, longest = ranges.t5_tokens
    t5_tokens = defaults.t5_tokens if t5_tokens is None else t5_tokens
    t5_tokens = whole("t5_tokens", t5_tokens, shortest, longest)
    strength = number("strength", strength, 0, 1)
    if size is not None:
        size = _size(size)
        check_size(*size, manifest)
    pixels = None if image is None else pixels_of("image", image, size)
    source = _source(latents, image, size, count, manifest)
    own = _size_of(pixels, source, manifest)
    if own is not None and _first_step(steps, strength) == steps:
        raise UsageError(
            f"strength {strength:g} of {steps} steps is none",
            f"give at least {math.ceil(1000 / steps) / 1000:g}",
        )
    width, height = own or size or defaults.size
    check_size(width, height, manifest)
    paste, decode = flag("paste", paste), flag("decode", decode)
    if paste and (source is not None or not decode):
        raise UsageError(
            "paste is of pixels, and latents have none", "give the picture as image, and decode it"
        )
    drawn = _mask(manifest, mask, paste, own)
    skip = skip_layers(
        manifest,
        skip_guidance_layers,
        skip_layer_guidance_scale,
        skip_layer_guidance_start,
        skip_layer_guidance_stop,
    )
    fast = _is_fast(manifest, step_cache)
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
        adapters=((),) * count if shelf is None else shelf.mixes(adapters, count),
        mask=None if drawn is None else np.repeat(drawn[None], count, axis=0),
        paste=paste,
        skips=(skip,) * count,
        latents=source,
        decode=decode,
        controls=control_uses(manifest, controls, (width, height), count),
        fast=fast,
        plan=plans.plan(steps, sampler, shift) if fast and plans is not None else None,
        short_blocks=manifest.features.short_steps,
    )


def least_request(manifest: Manifest) -> Request:
    """The smallest batch of the usual size."""
    return make_request(manifest, prompt=[""] * manifest.ranges.batch[0])


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
        adapters=tuple(chain.from_iterable(r.adapters for r in requests)),
        skips=tuple(chain.from_iterable(r.skips for r in requests)),
        controls=join_controls([r.controls for r in requests]),
    )


def _is_fast(manifest: Manifest, step_cache: str) -> bool:
    if step_cache not in (FAST, EXACT):
        raise UsageError(f"unknown step_cache {shown(step_cache)}", f"use one of: {FAST}, {EXACT}")
    if step_cache == FAST and not manifest.features.short_steps:
        raise UsageError(
            "this bundle was built without short steps",
            f"leave out step_cache={FAST}, or build with: --short-steps",
        )
    return step_cache == FAST


def _mask(
    manifest: Manifest, mask: PictureLike | None, paste: bool, size: tuple[int, int] | None
) -> np.ndarray | None:
    """Which pixels of a picture are drawn anew: bool [H, W]; None where all are.

    Args:
        size: of the picture, (width, height); None where there is none.
    """
    if mask is None:
        if paste:
            raise UsageError("paste keeps what a mask leaves, and there is none", "give a mask")
        return None
    if not manifest.features.inpainting:
        raise UsageError(
            "this bundle was built without inpainting",
            "leave out the mask, or build with: --inpainting",
        )
    if size is None:
        raise UsageError("a mask needs the picture that it is of", "give it as image, too")
    drawn = mask_of(mask, size)
    if not latent_mask(drawn, manifest.latent_scale).any():
        raise UsageError(
            "the mask leaves nothing to be drawn", "make it white where the picture is to change"
        )
    return drawn


def _source(
    latents: Any, image: Any, size: tuple[int, int] | None, count: int, manifest: Manifest
) -> np.ndarray | None:
    """Latents that are started from, one for each image: float32 [B, C, h, w]."""
    if latents is None:
        return None
    if image is not None:
        raise UsageError("image and latents are both what to start from", "give one of them")
    source = check_latents(latents, manifest)
    own = _size_of(None, source, manifest)
    if size is not None and size != own:
        raise UsageError(f"size is {size}, that of the latents {own}", "leave out the size")
    if len(source) not in (1, count):
        raise UsageError(f"{len(source)} latents for {count} images", "give one, or one each")
    # A copy: the caller's may change before they are drawn from.
    return np.array(np.broadcast_to(source, (count, *source.shape[1:])))


def _size_of(
    pixels: np.ndarray | None, latents: np.ndarray | None, manifest: Manifest
) -> tuple[int, int] | None:
    """(width, height) of the picture that is started from; None where there is none."""
    if pixels is not None:
        return pixels.shape[1], pixels.shape[0]
    if latents is not None:
        return latents.shape[3] * manifest.latent_scale, latents.shape[2] * manifest.latent_scale
    return None


def _first_step(steps: int, strength: float) -> int:
    """As diffusers rounds it: what remains of a step is one."""
    return int(max(steps - min(steps * strength, steps), 0))


def _seeds(seed: Any, count: int) -> list[int]:
    """One for each image."""

    def one_seed(name: str, value: Any) -> int:
        return whole(name, value, 0, _LARGEST_SEED)

    if isinstance(seed, list | tuple | np.ndarray):
        seeds = several("seed", seed, one_seed, "a whole number, or one for each image")
        if len(seeds) != count:
            raise UsageError(
                f"{len(seeds)} seeds for {count} images",
                "give a number, which counts up, or a list of one for each",
            )
        return seeds
    first = one_seed("seed", seed)
    one_seed("seed of the last image", first + count - 1)
    return [first + i for i in range(count)]


def _size(size: Any) -> tuple[int, int]:
    what = "(width, height)"

    def side(name: str, value: Any) -> int:
        return whole(name, value, -_LARGEST, _LARGEST)

    sides = several("size", size, side, what)
    if len(sides) != 2:
        raise UsageError(f"size must be {what}, not {shown(size)}")
    return sides[0], sides[1]
