"""A pool whose requests are drawn by replicas, and again by others where one is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

from sd35_trt.errors import Cancelled, Sd35Error, TimedOut, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.runtime import Observer, PoolDevice, Request, Result, Span
from sd35_trt.runtime.adapters import AdapterShelf
from sd35_trt.runtime.request import make_request
from sd35_trt.runtime.tracing import outcome_attributes
from sd35_trt.runtime.traffic import Traffic

from ..drawing import Seen, Watcher
from ..failures import Refusal, engine_failed
from .orders import Answers, Order, ReplicaLost

logger = logging.getLogger("sd35_trt")

# Seconds before each further try: a lost replica is known to be lost soon. A request that ends
# replicas ends no more of them than there are tries.
_PAUSES = (0.1, 1.0)

# Of a request without a time limit of its own: one that warms up.
_LONG = 3600.0


class RemoteModel:
    """A bundle whose engines are elsewhere: what it accepts is known here.

    Args:
        path: the bundle's directory.
        adapters: files by name; known where the bundle takes adapters.

    Raises:
        BundleError: missing, damaged or foreign.
        UsageError: an adapter that does not fit.
    """

    def __init__(self, path: Path, adapters: Mapping[str, str] | None = None) -> None:
        bundle = Bundle.open(path)
        self.path = str(path)
        self.manifest = bundle.manifest
        self._shelf = AdapterShelf(bundle)
        if bundle.manifest.adapter_ranks:
            for name, file in (adapters or {}).items():
                self._shelf.load(name, file)

    def request(self, prompt: str, **arguments: Any) -> Request:
        """See :meth:`sd35_trt.runtime.Pipeline.request`."""
        return make_request(self.manifest, prompt=prompt, shelf=self._shelf, **arguments)


class Fleet:
    """As :class:`~sd35_trt.runtime.PipelinePool` for the endpoints. A request has its seed before
    the first try, so that another replica draws the same.

    Args:
        pipelines: by name.
        shares: percent by name; empty sends all to the first.
        send: has a replica draw an order. It raises ReplicaLost, and PoolBusy where the replicas'
            queue is full; both may come late.
        loop: of the thread that serves.
        observer: told how each request ended.

    Attributes:
        on_fallback: empty; replicas have no fallback.
        devices: empty; they are the replicas' own.

    Raises:
        UsageError: no bundle, or shares of unknown ones.
    """

    on_fallback: Sequence[str] = ()
    devices: Sequence[PoolDevice] = ()

    def __init__(
        self,
        pipelines: Mapping[str, RemoteModel],
        shares: Mapping[str, float],
        send: Callable[[Order], Answers],
        loop: asyncio.AbstractEventLoop,
        observer: Observer,
    ) -> None:
        if not pipelines:
            raise UsageError("a fleet needs a bundle")
        self.pipelines = pipelines
        self._traffic = Traffic(shares or {next(iter(pipelines)): 100})
        self._send = send
        self._loop = loop
        self._observer = observer
        #: How many requests wait or are drawn.
        self.waiting = 0

    def choose(self, key: str | None = None) -> str:
        """See :meth:`sd35_trt.runtime.PipelinePool.choose`."""
        return self._traffic.choose(key)

    def submit(
        self,
        prompt: str,
        *,
        bundle: str,
        timeout: float | None = None,
        callback: Watcher | None = None,
        **arguments: Any,
    ) -> Future[Result]:
        """Accept a request and return at once; in any thread. Cancelling the future gives the
        request up. See :meth:`sd35_trt.runtime.PipelinePool.submit`.

        Raises:
            UsageError: an argument out of range.
        """
        model = self.pipelines[bundle]
        model.request(prompt, **arguments)
        order = Order(
            model.path,
            {"prompt": prompt, **arguments},
            _LONG if timeout is None else timeout,
            None if callback is None else callback.shown,
        )
        return asyncio.run_coroutine_threadsafe(self._watched(bundle, order, callback), self._loop)

    async def _watched(self, bundle: str, order: Order, callback: Watcher | None) -> Result:
        start = time.time_ns()
        error: BaseException | None = None
        self.waiting += 1
        try:
            return await self._draw(order, callback)
        except asyncio.CancelledError:
            error = Cancelled("cancelled")
            raise
        except Exception as raised:
            error = raised
            raise
        finally:
            self.waiting -= 1
            self._observer(
                Span("request", start, time.time_ns(), outcome_attributes(bundle, error))
            )

    async def _draw(self, order: Order, callback: Watcher | None) -> Result:
        """Try until a replica answers, or too many were lost."""
        deadline = self._loop.time() + order.seconds
        reached = -1

        def see(seen: Seen) -> None:
            """Each step once, though another replica draws it again."""
            nonlocal reached
            if callback is not None and seen.index > reached:
                reached = seen.index
                callback.see(seen)

        pauses = list(_PAUSES)
        while (left := deadline - self._loop.time()) > 0:
            try:
                return await self._once(replace(order, seconds=left), see)
            except ReplicaLost as error:
                logger.warning("a replica is lost: %s", error)
                if not pauses:
                    raise Refusal(
                        503, "the replicas that drew this ended — ask again", "replica_lost",
                        "server_error", headers={"Retry-After": "1"},
                    ) from error  # fmt: skip
            except Sd35Error as error:
                # Another replica's engines may work; one more try does not make it a broken one.
                if not engine_failed(error) or len(pauses) < len(_PAUSES):
                    raise
            await asyncio.sleep(pauses.pop(0))
        raise TimedOut(f"not drawn within the server's {order.seconds:g} s", "ask for less")

    async def _once(self, order: Order, see: Callable[[Seen], None]) -> Result:
        async with aclosing(self._send(order)) as answers:
            async for answer in answers:
                if isinstance(answer, Result):
                    return answer
                if isinstance(answer, Sd35Error):
                    raise answer
                see(answer)
        raise ReplicaLost("its answer has no end")
