"""The step cache: which steps of a picture are short, as data.

A short step computes the first blocks of the transformer alone, and takes for the change that the
others make what the last two full steps remember of theirs: ``last · c₀ + before · c₁``. A plan
says for one number of steps, sampler and shift which steps these are, with the two coefficients of
each.

``sd35-trt calibrate --step-cache`` writes it as a JSON file; a bundle holds it under the same name.
docs/bundle-format.md specifies it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from sd35_trt.errors import BundleError, Sd35Error, UsageError

from .bundle import Bundle, Manifest
from .calibration import PromptsIdentity
from .reading import (
    Count,
    Digest,
    Name,
    Positive,
    Text,
    check_format,
    encode,
    read_document,
)

#: The file's name in a bundle.
STEP_CACHE = "step_cache.json"

#: Version of the file; a reader accepts exactly its own.
FORMAT = 1

#: Steps that compute all blocks, whatever a plan says of the later ones: without their changes
#: there is nothing to extrapolate.
FIRST_STEPS = 2

_LARGEST = 16 << 20

# No coefficient of an extrapolation over two steps is larger by far.
_LARGEST_COEFFICIENT = 1000.0

_AGAIN = "make it again with: sd35-trt calibrate --step-cache"
_REBUILD = "build it again with: sd35-trt build"

#: Of the last full step's change, and of that before it.
Coefficients = tuple[float, float]

#: What a plan is for: number of steps, sampler, shift.
Key = tuple[int, str, float]


class StepPlan(Struct, frozen=True, kw_only=True):
    """Which steps are short.

    Attributes:
        steps: of the picture, from noise.
        sampler: a key of :data:`sd35_trt.runtime.schedule.SAMPLERS`.
        shift: of the sigmas.
        coefficients: of each step, in order; None where it is a full one. The first two are.
        error: of the last latents against those of full steps, relative (‖a − b‖ / ‖b‖), as it was
            calibrated to.
    """

    steps: Annotated[int, Meta(ge=1, le=1000)]
    sampler: Name
    shift: float
    coefficients: Annotated[tuple[Coefficients | None, ...], Meta(max_length=1000)]
    error: float

    def __post_init__(self) -> None:
        if len(self.coefficients) != self.steps:
            raise ValueError(f"{len(self.coefficients)} coefficients for {self.steps} steps")
        if any(pair is not None for pair in self.coefficients[:FIRST_STEPS]):
            raise ValueError(f"the first {FIRST_STEPS} steps are full, the plan has a short one")
        values = [value for pair in self.coefficients if pair is not None for value in pair]
        if not all(abs(value) <= _LARGEST_COEFFICIENT for value in values):
            raise ValueError(f"coefficients are finite, at most {_LARGEST_COEFFICIENT:g}")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ValueError(f"shift {self.shift} is not above 0")
        if not (math.isfinite(self.error) and self.error >= 0):
            raise ValueError(f"error {self.error} is none")

    @property
    def key(self) -> Key:
        """What it is for."""
        return self.steps, self.sampler, self.shift

    @property
    def short(self) -> int:
        """How many steps are short."""
        return sum(pair is not None for pair in self.coefficients)

    def evaluations(self, short_blocks: int, blocks: int) -> int:
        """Blocks that a picture computes."""
        return (self.steps - self.short) * blocks + self.short * short_blocks


class StepCache(Struct, frozen=True, kw_only=True):
    """What the file holds.

    Attributes:
        short_blocks: that a short step computes, from the first.
        blocks: that a full step computes.
        files: path in the checkpoint → SHA-256, of the transformer, as in a manifest.
        plans: one for each number of steps, sampler and shift.
        prompts, guidance, sizes, seed, policy, versions, command: how it was calibrated; sizes are
            (width, height) in pixels.
    """

    format: int = FORMAT
    short_blocks: Positive
    blocks: Positive
    files: Annotated[dict[Name, Digest], Meta(max_length=65536)]
    plans: Annotated[tuple[StepPlan, ...], Meta(max_length=4096)]
    prompts: PromptsIdentity | None = None
    guidance: float | None = None
    sizes: tuple[tuple[Positive, Positive], ...] | None = None
    seed: Count | None = None
    policy: Text | None = None
    versions: dict[Name, Text] | None = None
    command: Text | None = None

    def __post_init__(self) -> None:
        if self.short_blocks >= self.blocks:
            raise ValueError(f"{self.short_blocks} of {self.blocks} blocks are no short step")
        keys = [plan.key for plan in self.plans]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError("two plans for {} steps of {} with shift {:g}".format(*twice))

    def plan(self, steps: int, sampler: str, shift: float) -> StepPlan | None:
        """The plan of a picture; None where it has none."""
        return next((p for p in self.plans if p.key == (steps, sampler, shift)), None)

    def speed(self, plan: StepPlan) -> float:
        """How many times fewer blocks a plan computes than full steps."""
        return plan.steps * self.blocks / plan.evaluations(self.short_blocks, self.blocks)

    def encode(self) -> bytes:
        """Contents of the file."""
        return encode(self)

    def check(self, manifest: Manifest, name: object) -> None:
        """Refuse a step cache of another model, or of other short steps.

        Args:
            manifest: of the bundle.
            name: of the file, for the message.

        Raises:
            UsageError: names what differs and the fix.
        """
        if not manifest.features.short_steps:
            raise UsageError(
                f"{name}: the bundle has no short steps",
                f"build it with: --short-steps {self.short_blocks}",
            )
        if self.short_blocks != manifest.short_steps:
            raise UsageError(
                f"{name} is of short steps of {self.short_blocks} blocks, the bundle's have "
                f"{manifest.short_steps}",
                f"build it with: --short-steps {self.short_blocks}",
            )
        self.check_model(manifest.model.files, name)

    def check_model(self, files: dict[str, str], name: object) -> None:
        """Refuse a step cache of another transformer.

        Args:
            files: path in the checkpoint → SHA-256, of the transformer and perhaps of other parts.
            name: of the file, for the message.

        Raises:
            UsageError: it was calibrated for another checkpoint.
        """
        if self.files != transformer_files(files):
            raise UsageError(f"{name} was calibrated for another transformer", _AGAIN)

    @classmethod
    def of(cls, bundle: Bundle) -> StepCache | None:
        """That of a bundle; None where it has none.

        Raises:
            BundleError: it is not as it was written, or of another bundle.
        """
        if all(file.path != STEP_CACHE for file in bundle.manifest.files):
            return None
        path = bundle.path(STEP_CACHE)
        cache = _read(path, BundleError, _REBUILD)
        try:
            cache.check(bundle.manifest, path)
        except UsageError as error:
            raise BundleError(str(error)) from error
        return cache


def transformer_files(files: dict[str, str]) -> dict[str, str]:
    """Of a checkpoint's files, those that the weights of the transformer are from."""
    return {path: digest for path, digest in files.items() if path.startswith("transformer/")}


def read_step_cache(path: Path) -> StepCache:
    """Read a file that ``sd35-trt calibrate --step-cache`` wrote.

    Raises:
        UsageError: it is missing, not readable, or not as it was written.
    """
    return _read(path, UsageError, _AGAIN)


def _read(path: Path, error: type[Sd35Error], fix: str) -> StepCache:
    cache = read_document(path, StepCache, _LARGEST, error, fix)
    check_format(cache.format, (FORMAT,), path, error, fix)
    return cache
