"""The figures of a contender, and of two beside each other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sd35_trt.quality.metrics import psnr, squared_error

from .contenders import TIMINGS, Contender, Run
from .workload import Workload

# Pictures of one prompt and seed are more alike than those of two seeds, by so many dB.
_MARGIN = 3.0


@dataclass
class Side:
    """What was measured of a contender."""

    contender: Contender
    load: float = 0.0
    first: float = 0.0
    warm_images: np.ndarray | None = None
    memory: dict[str, dict[str, int | None] | None] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    joules: list[float | None] = field(default_factory=list)


def describe(side: Side, workload: Workload) -> dict[str, Any]:
    """Identity and figures of a contender."""
    runs = side.runs
    stages = {
        name: _spread(run.timings[name] for run in runs) if name in runs[0].timings else None
        for name in TIMINGS
    }
    joules = [j for j in side.joules if j is not None]
    whole = len(joules) == len(runs)
    images = workload.batch * len(runs)
    return {
        **side.contender.describe(),
        "load_seconds": round(side.load, 6),
        "first_seconds": round(side.first, 6),
        "stages": stages,
        "short_steps": runs[-1].short_steps,
        "step": _spread(step for run in runs for step in run.steps),
        "images_per_second": round(
            workload.batch / float(np.median([run.timings["total"] for run in runs])), 6
        ),
        "memory": side.memory,
        "joules_per_image": round(sum(joules) / images, 3) if whole else None,
        "runs": [
            {
                **{name: round(value, 6) for name, value in run.timings.items()},
                "steps": [round(step, 6) for step in run.steps],
                "joules": energy,
            }
            for run, energy in zip(runs, side.joules, strict=True)
        ],
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Median, and the bounds of the middle 80 %."""
    numbers = list(values)
    low, median, high = np.percentile(numbers, (10, 50, 90)).tolist()
    return {
        "median": round(median, 6), "p10": round(low, 6), "p90": round(high, 6), "n": len(numbers)
    }  # fmt: skip


def compare(ours: Side, peer: Side) -> dict[str, Any]:
    """Ratios of ours to the peer's, the median over the pairs of runs; and how alike the last
    pictures are, None for equal ones."""
    ratios: dict[str, Any] = {"load": {"ratio": round(ours.load / peer.load, 4)}}
    for name in TIMINGS:
        if name in ours.runs[0].timings and name in peer.runs[0].timings:
            pairs = [[run.timings[name] for run in side.runs] for side in (ours, peer)]
            ratios[name] = _ratio(*pairs)
    steps = [[float(np.median(run.steps)) for run in side.runs] for side in (ours, peer)]
    ratios["step"] = _ratio(*steps)
    last, other = ours.runs[-1].images, ours.warm_images
    if other is None:
        raise RuntimeError("nothing was drawn to warm up")
    alike = psnr(squared_error(last, peer.runs[-1].images))
    unlike = psnr(squared_error(last, other))
    return {
        "ratios": ratios,
        "psnr_db": alike,
        "psnr_of_two_seeds_db": unlike,
        "same_work": alike is None or unlike is None or alike > unlike + _MARGIN,
    }


def _ratio(ours: Sequence[float], peer: Sequence[float]) -> dict[str, float]:
    """Over the pairs of runs: what disturbs the machine for a while disturbs both of a pair."""
    low, median, high = np.percentile(np.divide(ours, peer), (10, 50, 90)).tolist()
    return {"ratio": round(median, 4), "p10": round(low, 4), "p90": round(high, 4)}
