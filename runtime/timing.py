"""When each stage of a request began and ended, as tracing and metrics take it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# What time.perf_counter_ns has to be moved by to count from the epoch. Taken once, so that a
# change of the wall clock makes no stage negative.
_EPOCH = time.time_ns() - time.perf_counter_ns()


def now_ns() -> int:
    """Nanoseconds since the epoch; never goes back."""
    return _EPOCH + time.perf_counter_ns()


@dataclass(frozen=True)
class Span:
    """A stage of a request, or the whole of it.

    It is what OpenTelemetry takes: ``tracer.start_span(span.name, context=span.trace,
    start_time=span.start_ns, attributes=span.attributes).end(span.end_ns)``.

    Attributes:
        name: ``request`` for the whole, last; before it its stages ``queue``, ``text``,
            ``encode``, ``conditioning``, ``denoise`` and ``decode``; ``anomaly`` for a moment.
        start_ns, end_ns: nanoseconds since the epoch.
        attributes: strings, numbers and booleans. Always ``bundle``; of a stage ``seconds``, the
            time that it took itself: conditioning and denoising take turns.
        trace: what the request was given as ``trace``.
    """

    name: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, str | float | bool] = field(default_factory=dict)
    trace: Any = None


#: Called with every span, in whichever thread ends the request.
Observer = Callable[[Span], object]


@dataclass
class Stage:
    """First start, last end and time taken of a stage, in nanoseconds."""

    start_ns: int
    end_ns: int
    taken_ns: int


class Clock:
    """Splits the time since it was made among stages."""

    def __init__(self) -> None:
        self.start_ns = self._last = now_ns()
        self.stages: dict[str, Stage] = {}

    def lap(self, name: str) -> None:
        """What passed since the last call, or the start, was for this stage."""
        now = now_ns()
        stage = self.stages.setdefault(name, Stage(self._last, now, 0))
        stage.end_ns = now
        stage.taken_ns += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return {name: stage.taken_ns / 1e9 for name, stage in self.stages.items()}
