"""A request on its way through a pool, as a coroutine sees it."""

from __future__ import annotations

import asyncio
import concurrent.futures
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sd35_trt.errors import Cancelled, TimedOut
from sd35_trt.formats.bundle import Manifest
from sd35_trt.runtime import PoolDevice, Request, Result, Step

# The pool looks at a request's time between steps; this much later, nobody waits for it.
_SLACK = 0.5


@dataclass(frozen=True)
class Seen:
    """What is kept of a step.

    Attributes:
        index, total: of the step, and of all.
        denoised: float32 [B, C, h, w]; None where it is not shown.
    """

    index: int
    total: int
    denoised: np.ndarray | None


class Watcher:
    """A callback of a request's steps, called in the thread that draws.

    Args:
        shown: whether a step is shown as a preview, by its index and their number.
        see: called with each step.
    """

    def __init__(self, shown: Callable[[int, int], bool], see: Callable[[Seen], object]) -> None:
        self.shown = shown
        self.see = see

    def __call__(self, step: Step) -> None:
        """As a pool calls it."""
        shown = self.shown(step.index, step.total)
        self.see(Seen(step.index, step.total, step.denoised.copy() if shown else None))


class Model(Protocol):
    """What the endpoints ask of a bundle: of a :class:`~sd35_trt.runtime.Pipeline`, or of one
    whose engines are elsewhere.
    """

    @property
    def manifest(self) -> Manifest:
        """What it can draw."""

    @property
    def request(self) -> Callable[..., Request]:
        """See :meth:`sd35_trt.runtime.Pipeline.request`."""


class Pool(Protocol):
    """What the endpoints ask of a pool: of a :class:`~sd35_trt.runtime.PipelinePool`, or of one
    that has others draw.
    """

    @property
    def pipelines(self) -> Mapping[str, Model]:
        """By name."""

    @property
    def waiting(self) -> int:
        """How many requests wait."""

    @property
    def devices(self) -> Sequence[PoolDevice]:
        """Of its own, which draw here."""

    @property
    def on_fallback(self) -> Collection[str]:
        """Names of the bundles whose fallback draws."""

    def choose(self, key: str | None = None) -> str:
        """See :meth:`sd35_trt.runtime.PipelinePool.choose`."""

    def submit(
        self,
        prompt: str,
        *,
        bundle: str,
        timeout: float | None = None,
        callback: Watcher | None = None,
        **arguments: Any,
    ) -> Future[Result]:
        """See :meth:`sd35_trt.runtime.PipelinePool.submit`."""


class Drawing:
    """A request that a pool has accepted. Made and used in the event loop's thread.

    Args:
        pool: draws it.
        bundle: its name.
        arguments: of :meth:`sd35_trt.runtime.PipelinePool.submit`.
        time_limit: seconds, waiting and drawing together.
        shown: whether a step is shown as a preview, by its index and their number; None watches
            no step.

    Raises:
        Sd35Error: as the pool does.
    """

    def __init__(
        self,
        pool: Pool,
        bundle: str,
        arguments: Mapping[str, Any],
        time_limit: float,
        shown: Callable[[int, int], bool] | None = None,
    ) -> None:
        self.bundle = bundle
        self._loop = asyncio.get_running_loop()
        self._deadline = self._loop.time() + time_limit + _SLACK
        self._time_limit = time_limit
        self._events: asyncio.Queue[Seen | None] = asyncio.Queue()
        self._future: Future[Result] = pool.submit(
            **arguments,
            bundle=bundle,
            timeout=time_limit,
            callback=None if shown is None else Watcher(shown, self._post),
        )
        self._future.add_done_callback(lambda _: self._post(None))

    def _post(self, event: Seen | None) -> None:
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def cancel(self) -> None:
        """Give up; nothing happens where there is an outcome."""
        self._future.cancel()

    async def steps(self, idle: float) -> AsyncIterator[Seen | None]:
        """Its steps as they are done, until it has an outcome.

        Args:
            idle: seconds after which None says that nothing has happened.

        Raises:
            TimedOut: its time is up.
        """
        while True:
            left = self._deadline - self._loop.time()
            try:
                event = await asyncio.wait_for(self._events.get(), max(0, min(idle, left)))
            except (TimeoutError, asyncio.TimeoutError):
                if left <= idle:
                    raise TimedOut(
                        f"not drawn within the server's {self._time_limit:g} s", "ask for less"
                    ) from None
                yield None
            else:
                if event is None:
                    return
                yield event

    async def result(self) -> Result:
        """Its outcome.

        Raises:
            Cancelled: it was cancelled.
            Sd35Error: as the pool does.
        """
        async for _ in self.steps(self._time_limit + 1):
            pass
        return self.outcome()

    def outcome(self) -> Result:
        """The outcome that there is; raises as :meth:`result` does."""
        try:
            return self._future.result(timeout=0)
        except concurrent.futures.CancelledError:
            raise Cancelled("the server is about to stop", "ask again") from None
