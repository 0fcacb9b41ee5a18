"""When each stage of a request began and ended."""

from __future__ import annotations

import time
from dataclasses import dataclass

# What time.perf_counter_ns has to be moved by to count from the epoch. Taken once, so that a
# change of the wall clock makes no stage negative.
_EPOCH = time.time_ns() - time.perf_counter_ns()


def now_ns() -> int:
    """Nanoseconds since the epoch; never goes back."""
    return _EPOCH + time.perf_counter_ns()


@dataclass
class Interval:
    """When a stage began first and ended last, and the time that it took itself, in nanoseconds."""

    start_ns: int
    end_ns: int
    taken_ns: int


class Clock:
    """Splits the time since it was made among stages.

    Attributes:
        start_ns: when it was made, as :func:`now_ns` counts.
        stages: by name, in the order of their start.
    """

    def __init__(self) -> None:
        self.start_ns = self._last = now_ns()
        self.stages: dict[str, Interval] = {}

    def lap(self, name: str) -> None:
        """What passed since the last call, or the start, was for this stage."""
        now = now_ns()
        interval = self.stages.setdefault(name, Interval(self._last, now, 0))
        interval.end_ns = now
        interval.taken_ns += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Seconds by stage."""
        return {name: interval.taken_ns / 1e9 for name, interval in self.stages.items()}
