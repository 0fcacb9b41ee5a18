"""Finds which steps of a bundle's pictures can be short, and by which coefficients.

The changes of full steps say, by their inner products, which choice of short steps misses least
for each number of full ones. How many are needed is then measured on pictures: the fewest whose
last latents stay within an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import replace

from sd35_trt.calibration.prompts import digest, packaged_prompts, read_prompts
from sd35_trt.calibration.step_extrapolation import least_squares
from sd35_trt.calibration.step_search import Schedule, best_schedules
from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.formats.calibration import PromptsIdentity
from sd35_trt.formats.step_cache import Key, StepCache, StepPlan, transformer_files
from sd35_trt.mini import calibration_prompts_path
from sd35_trt.progress import Progress, silent
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.schedule import SAMPLERS, coefficients, make_sigmas
from sd35_trt.runtime.sessions.session import Session, SessionOptions, open_session
from sd35_trt.variants import VARIANTS

from .metrics import relative_errors
from .onnx_graph import Arrays
from .watched_session import WatchedSession

#: The median error of the last latents within which mini loses no more than a point of its scenes.
ERROR = 0.032

# The search looks at every three steps.
_LEAST_STEPS, _MOST_STEPS = 4, 150

# Prompts unless others are asked for: every choice of steps is drawn with all of them.
_PROMPTS = 16

# Far from the seeds that people try.
_SEED = 100_000


@dataclass(frozen=True)
class StepCacheOptions:
    """What ``sd35-trt calibrate --step-cache`` takes.

    Attributes:
        bundle: built with short steps.
        plans: steps, sampler and shift of each plan; None, the bundle's default.
        error: of the last latents against those of full steps, relative, its median over pictures.
        prompts: a prompt file; None takes mini's own, or the packaged one.
        limit: draw this many prompts, evenly chosen from the set.
        guidance: None takes the bundle's default.
        size: (width, height) in pixels; None takes the bundle's default.
        seed: of the first prompt.
        device: that draws; None takes what the bundle was built for.
        command: kept in the file.
    """

    bundle: Path
    plans: tuple[Key, ...] = ()
    error: float = ERROR
    prompts: Path | None = None
    limit: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    seed: int = _SEED
    device: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Errors:
    """Of the last latents, relative, over pictures."""

    median: float
    mean: float
    worst: float

    @classmethod
    def of(cls, latents: np.ndarray, exact: np.ndarray) -> Errors:
        """Of latents [n, C, h, w]."""
        errors = relative_errors(latents, exact, (1, 2, 3))
        return cls(float(np.median(errors)), float(errors.mean()), float(errors.max()))


@dataclass(frozen=True)
class Found:
    """A step cache, and the errors of its plans."""

    cache: StepCache
    errors: tuple[Errors, ...]


def find_step_cache(options: StepCacheOptions, progress: Progress = silent) -> Found:
    """Choose the short steps of a bundle's pictures.

    Raises:
        BundleError: it is no bundle, or damaged.
        UsageError: it has no short steps; a plan, a size or a prompt that it does not draw.
        Sd35Error: an engine failed.
    """
    bundle = Bundle.open(options.bundle)
    blocks = _blocks(bundle, options.bundle)
    keys = options.plans or (_default_key(bundle),)
    _check(keys, options.error)
    prompts = _prompts(bundle, options)
    kept: list[np.ndarray] = []

    def watch(
        bundle: Bundle, component: Component, device: Device, session: SessionOptions
    ) -> Session:
        opened = open_session(bundle, component, device, session)
        if component.name != "denoiser":
            return opened

        def keep(inputs: Arrays, outputs: Arrays) -> None:
            kept.append(_guided(outputs["change"], inputs.get("guidance")))

        return WatchedSession(opened, device, after=keep)

    cache = StepCache(
        short_blocks=bundle.manifest.short_steps, blocks=blocks,
        files=transformer_files(bundle.manifest.model.files), plans=(),
    )  # fmt: skip
    plans, errors = [], []
    with Pipeline(bundle, open_session=watch, device=options.device) as pipe:
        pictures = _Pictures(pipe, prompts, options, cache, kept)
        for key in keys:
            pipe.request(prompts[0], **pictures.arguments(key))  # refused before any work
        for key in keys:
            plan, error = _find(pictures, key, options.error, progress)
            plans.append(plan)
            errors.append(error)
        size = options.size or pipe.manifest.defaults.size
    manifest = bundle.manifest
    cache = replace(
        cache, plans=tuple(plans), prompts=PromptsIdentity(digest(prompts), len(prompts)),
        guidance=_guidance(bundle, options), sizes=(size,), seed=options.seed,
        policy=manifest.policy.name, versions=manifest.versions, command=options.command,
    )  # fmt: skip
    return Found(cache, tuple(errors))


class _Pictures:
    """The calibration's pictures, one at a time, by one plan after another."""

    def __init__(
        self, pipe: Pipeline, prompts: Sequence[str], options: StepCacheOptions,
        cache: StepCache, kept: list[np.ndarray],
    ) -> None:  # fmt: skip
        self._pipe = pipe
        self._prompts = prompts
        self._options = options
        self._cache = cache
        self._kept = kept

    def __len__(self) -> int:
        return len(self._prompts)

    def arguments(self, key: Key) -> dict[str, Any]:
        """Of :meth:`Pipeline.generate`, but prompt and seed."""
        steps, sampler, shift = key
        return {
            "steps": steps, "sampler": sampler, "shift": shift,
            "guidance": self._options.guidance, "size": self._options.size, "decode": False,
        }  # fmt: skip

    def exact(self, key: Key, drawn: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        """Latents [n, C, h, w], and the inner products of the changes, float64 [steps, steps]."""
        products = np.zeros((key[0], key[0]))
        latents = []
        for number in range(len(self)):
            self._kept.clear()
            latents.append(self._draw(key, number, "exact"))
            products += _inner_products(self._kept)
            drawn()
        self._kept.clear()
        return np.concatenate(latents), products

    def short(self, plan: StepPlan, drawn: Callable[[], None]) -> np.ndarray:
        """Latents [n, C, h, w] with a plan's short steps."""
        self._pipe.use_step_cache(replace(self._cache, plans=(plan,)))
        latents = []
        for number in range(len(self)):
            latents.append(self._draw(plan.key, number, "fast"))
            self._kept.clear()
            drawn()
        return np.concatenate(latents)

    def _draw(self, key: Key, number: int, step_cache: str) -> np.ndarray:
        seed = self._options.seed + number
        result = self._pipe.generate(
            self._prompts[number], seed=seed, step_cache=step_cache,
            **self.arguments(key),
        )  # fmt: skip
        return result.latents.copy()


def _find(
    pictures: _Pictures, key: Key, most: float, progress: Progress
) -> tuple[StepPlan, Errors]:
    """The plan with the fewest full steps within an error, by bisection over their number."""
    steps, sampler, shift = key
    stage = f"{steps} {sampler}"
    trials = 2 + (steps - 3).bit_length()
    total, done = trials * len(pictures), 0

    def drawn() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    exact, products = pictures.exact(key, drawn)
    weights = step_weights(steps, sampler, shift)
    schedules: dict[int, Schedule] = best_schedules(products, weights, least_squares(products))
    within = (StepPlan(steps=steps, sampler=sampler, shift=shift,
                       coefficients=(None,) * steps, error=0.0), Errors(0.0, 0.0, 0.0))  # fmt: skip
    fewest, enough = min(schedules), steps
    while fewest < enough:
        count = (fewest + enough) // 2
        plan = replace(within[0], coefficients=schedules[count])
        errors = Errors.of(pictures.short(plan, drawn), exact)
        if errors.median <= most:
            within, enough = (replace(plan, error=errors.median), errors), count
        else:
            fewest = count + 1
    progress(stage, total, total)
    return within


def step_weights(steps: int, sampler: str, shift: float) -> np.ndarray:
    """How far an error of a step's velocity moves the latents: float64 [steps]."""
    sigmas = make_sigmas(steps, shift)
    table = coefficients(sampler, sigmas).astype(np.float64)
    return np.abs(table[:, 1] + np.append(table[1:, 2], 0.0)) * sigmas[:-1]


def _guided(change: np.ndarray, guidance: np.ndarray | None) -> np.ndarray:
    """Of both branches' changes [2B, pixels, D], as guidance joins them; float32 [B, pixels, D]."""
    change = change.astype(np.float32)
    if guidance is None:
        return change
    without, with_ = np.split(change, 2)
    return without + guidance.reshape(-1, 1, 1) * (with_ - without)


def _inner_products(changes: Sequence[np.ndarray]) -> np.ndarray:
    # Large's changes are 40 MB each: no second copy of all.
    rows = [change.ravel() for change in changes]
    return np.array([[float(np.dot(one, other)) for other in rows] for one in rows])


def _blocks(bundle: Bundle, name: Path) -> int:
    """Of a full step."""
    if not bundle.manifest.features.short_steps:
        raise UsageError(
            f"{name} was built without short steps", "build it with: sd35-trt build --short-steps K"
        )
    name_of = bundle.manifest.model.variant
    layers = [variant.num_layers for variant in VARIANTS if variant.name == name_of]
    if layers:
        return layers[0]
    conditioner = bundle.manifest.component("conditioner")
    rows = conditioner.output("modulation").shape[2] if conditioner else 0
    # Twelve of each block, but eight of the last, and two of the output layers.
    return (int(rows) + 2) // 12


def _default_key(bundle: Bundle) -> Key:
    defaults = bundle.manifest.defaults
    return defaults.steps, defaults.sampler, bundle.manifest.scheduler.shift


def _check(keys: Sequence[Key], error: float) -> None:
    if not 0 < error < 1:
        raise UsageError(f"--step-cache-error {error:g} is not between 0 and 1", "use e.g. 0.032")
    for steps, sampler, shift in keys:
        if not _LEAST_STEPS <= steps <= _MOST_STEPS:
            raise UsageError(
                f"--plan: {steps} steps are not within {_LEAST_STEPS} to {_MOST_STEPS}",
                "leave the others exact",
            )
        if sampler not in SAMPLERS:
            raise UsageError(
                f"--plan: there is no sampler {sampler!r}", f"use one of: {', '.join(SAMPLERS)}"
            )
        if not shift > 0:
            raise UsageError(f"--plan: shift {shift:g} is not above 0", "use e.g. 3")
    if twice := [key for key in keys if list(keys).count(key) > 1]:
        raise UsageError("--plan: {} steps of {} with shift {:g} twice".format(*twice[0]),
                         "leave one out")  # fmt: skip


def _prompts(bundle: Bundle, options: StepCacheOptions) -> list[str]:
    own = calibration_prompts_path() if bundle.manifest.model.variant == "mini" else None
    prompts = read_prompts(options.prompts or own or packaged_prompts())
    limit = options.limit or (len(prompts) if options.prompts else _PROMPTS)
    count = min(limit, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _guidance(bundle: Bundle, options: StepCacheOptions) -> float:
    default = bundle.manifest.defaults.guidance
    return default if options.guidance is None else options.guidance
