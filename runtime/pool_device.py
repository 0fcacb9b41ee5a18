"""One of a pool's devices: the pipelines on it, and the thread that draws with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sd35_trt.errors import Sd35Error

from .worker import Worker

if TYPE_CHECKING:
    from .pipeline import Pipeline
    from .resident import MemoryReport


@dataclass(frozen=True, eq=False)
class PoolDevice:
    """A pipeline of every bundle of a pool.

    Attributes:
        name: its device's; of several on one device, with a number.
        pipelines: by the bundle's name.
        worker: in whose thread they draw.
    """

    name: str
    pipelines: Mapping[str, Pipeline]
    worker: Worker = field(default_factory=Worker)

    def memory(self) -> dict[str, MemoryReport]:
        """What each pipeline takes, by the bundle's name; may be called from any thread.

        Raises:
            Sd35Error: it is closed, or the device does not answer.
        """
        return {name: pipe.memory() for name, pipe in self.pipelines.items()}

    @property
    def used_bytes(self) -> int:
        """Of its device's memory, by this process; 0 where that cannot be asked."""
        try:
            # Each counts from when it was opened.
            return max(report.device.used for report in self.memory().values())
        except Sd35Error:
            return 0
