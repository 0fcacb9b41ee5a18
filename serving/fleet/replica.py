"""A replica: it draws orders, with the bundles that it has loaded."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sd35_trt.errors import Sd35Error
from sd35_trt.runtime import Pipeline, PipelinePool

from ..drawing import Drawing
from ..failures import EngineHealth, engine_failed
from .orders import Answers, Order

logger = logging.getLogger("sd35_trt")

_NAME = "bundle"


@dataclass(frozen=True)
class Engines:
    """How a replica's engines run.

    Attributes:
        adapters: files by name, for bundles that take adapters.
        queue: how many requests may wait for a bundle.
        threads, device, vram_budget, trust_kernels: see :meth:`sd35_trt.runtime.Pipeline.load`.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    queue: int = 64
    threads: int | None = None
    device: str | None = None
    vram_budget: str | None = None
    trust_kernels: bool = False


class Studio:
    """A loaded bundle.

    Args:
        path: of the bundle.
        engines: how its engines run.

    Raises:
        BundleError, OutOfMemory, Sd35Error: see :meth:`sd35_trt.runtime.Pipeline.load`.
        UsageError: an adapter that does not fit.
    """

    def __init__(self, path: Path, engines: Engines) -> None:
        pipe = Pipeline.load(
            path, threads=engines.threads, device=engines.device,
            vram_budget=engines.vram_budget, trust_kernels=engines.trust_kernels,
        )  # fmt: skip
        self.pool = PipelinePool({_NAME: pipe}, queue_limit=engines.queue)
        if pipe.manifest.adapter_ranks:
            for name, file in engines.adapters.items():
                self.pool.load_adapter(name, file)

    def __del__(self) -> None:
        """Ray Serve calls it where another bundle needs the room: what was accepted is drawn."""
        if hasattr(self, "pool"):
            self.pool.close()


async def answers(
    pool: PipelinePool, order: Order, health: EngineHealth, hold: float = 0.0
) -> Answers:
    """Draw an order. It is given up where the answers are not read to the end.

    Args:
        pool: of a studio.
        health: is told how it went.
        hold: seconds after which broken engines' failure is told: the replica that has least to do
            is sent most, and until it is replaced, one that fails at once would have all.

    Yields:
        See :data:`~sd35_trt.serving.fleet.orders.Answers`.
    """
    try:
        drawing = Drawing(pool, _NAME, order.arguments, order.seconds, order.shown)
        try:
            async for seen in drawing.steps(order.seconds):
                if seen is not None:
                    yield seen
            result = drawing.outcome()
        finally:
            drawing.cancel()
    except Sd35Error as error:
        if engine_failed(error):
            logger.error("a request failed", exc_info=error)
        health.failed(error)
        if health.broken:
            await asyncio.sleep(hold)
        yield error
    else:
        health.succeeded()
        yield result
