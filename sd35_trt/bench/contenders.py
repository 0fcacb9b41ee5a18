"""What can be measured, and what comes of a run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np

from sd35_trt.formats.bundle import MANIFEST, Bundle, sha256_file
from sd35_trt.runtime import Pipeline, Step

from .workload import Workload

#: What is timed of a run. ``loop`` is conditioning and denoising together: a peer that computes the
#: conditioning in every step can be compared by it. Text, loop and decode make up ``total`` but for
#: the handling of the request.
TIMINGS = ("text", "conditioning", "denoise", "loop", "decode", "total")


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        timings: seconds of those of :data:`TIMINGS` that are known.
        steps: seconds from the end of one denoising step to that of the next, so one fewer than
            there are steps; of a single step, the loop's.
        images: uint8 [B, H, W, 3].
        notes, short_steps: as in :class:`sd35_trt.runtime.Result`.
    """

    timings: dict[str, float]
    steps: tuple[float, ...]
    images: np.ndarray
    notes: tuple[str, ...] = ()
    short_steps: int = 0


class Contender(Protocol):
    """What can be measured."""

    def load(self) -> float:
        """Load all that drawing needs; seconds that it took."""

    def draw(self, prompt: str, seed: int) -> Run:
        """Draw a batch from consecutive seeds."""

    def describe(self) -> dict[str, Any]:
        """What it is, JSON-serializable."""

    def close(self) -> None:
        """Release its memory."""


class EngineContender:
    """A bundle on this project's runtime."""

    def __init__(self, bundle: Bundle, workload: Workload) -> None:
        self._bundle = bundle
        self._workload = workload
        self._pipe: Pipeline | None = None

    def load(self) -> float:
        """Open the bundle and load every engine; the import of their library is in it.

        Raises:
            BundleError: as :meth:`sd35_trt.runtime.Pipeline.load`.
        """
        start = time.perf_counter()
        self._pipe = Pipeline.load(
            self._bundle.root,
            threads=self._workload.threads,
            device=self._workload.device,
            vram_budget=self._workload.vram_budget,
            trust_kernels=self._bundle.trust_kernels,
        )
        self._pipe.preload()
        return time.perf_counter() - start

    def draw(self, prompt: str, seed: int) -> Run:
        """See :class:`Contender`."""
        if self._pipe is None:
            raise RuntimeError("load() comes before draw()")
        ends: list[float] = []

        def after_step(_: Step) -> None:
            ends.append(time.perf_counter())

        w = self._workload
        start = time.perf_counter()
        result = self._pipe.generate(
            prompt, seed=seed, callback=after_step, steps=w.steps, size=w.size, batch=w.batch,
            guidance=w.guidance, sampler=w.sampler, t5_tokens=w.t5_tokens, step_cache=w.step_cache,
        )  # fmt: skip
        total = time.perf_counter() - start
        timings = {name: result.timings[name] for name in TIMINGS if name in result.timings}
        timings |= {"loop": timings["conditioning"] + timings["denoise"], "total": total}
        steps = step_seconds(ends, timings["loop"])
        return Run(timings, steps, result.images, result.notes, result.short_steps)

    def describe(self) -> dict[str, Any]:
        """The bundle's identity."""
        m = self._bundle.manifest
        return {
            "kind": "bundle",
            "path": str(self._bundle.root),
            "manifest_sha256": sha256_file(self._bundle.root / MANIFEST),
            "model": m.model.name,
            "variant": m.model.variant,
            "policy": m.policy.name,
            "policy_sha256": m.policy.sha256,
            "target": m.target,
            "builder": m.builder,
            "guided": m.guided,
            "weight_bytes": sum(c.weight_bytes for c in m.components),
            "residency": None if self._pipe is None else asdict(self._pipe.memory()),
            "made": m.created,
        }

    def close(self) -> None:
        """Release the engines."""
        if self._pipe is not None:
            self._pipe.close()


def step_seconds(ends: Sequence[float], loop: float) -> tuple[float, ...]:
    """Seconds of every step but the first, whose beginning is not seen.

    Args:
        ends: when each step ended.
        loop: seconds of all of them, which are those of a single step.
    """
    return tuple(np.diff(ends).tolist()) or (loop,)
