"""Several bundles behind one queue, for servers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

from sd35_trt.errors import Cancelled, Sd35Error, UsageError

from .arguments import check_watchers, key_of_traffic, seconds, shown
from .job import Job, Result, Step
from .pipeline import Pipeline
from .pool_device import PoolDevice
from .pool_devices import Source, open_devices
from .process import HomeProcess, leave_at_exit
from .request import MAX_PROMPT_CHARS
from .resident import MemoryReport
from .ticket import Ticket, deadline_after
from .ticket_queue import TicketQueue
from .timing import now_ns
from .tracing import Observer, Span, outcome_attributes, request_spans, retry_span
from .traffic import Traffic

logger = logging.getLogger("sd35_trt")


class PipelinePool:
    """Pipelines that stay loaded, a thread for each device that draws with them, and one queue.

    Requests are drawn in order of arrival; those that wait are drawn in one run with the first
    where they go to the same bundle, agree in size, steps, shift, sampler and text length, start
    from noise, and the bundle takes as many images. An image depends on its own request alone.
    With several devices, what one fails to draw is drawn again by another, once; steps then count
    from 0 again.

    Methods may be called from any thread; :meth:`generate` and :meth:`close`, which wait for the
    threads that draw, not from a callback, an observer or a future's callback in such a thread.
    When the process ends, what waits is cancelled.

    Args:
        bundles: name → a bundle's directory, or a pipeline (one with a fallback, say), or one for
            each device; pipelines then belong to the pool.
        devices: where directories are loaded, each on all of them; see ``device`` of
            :meth:`Pipeline.load`. None takes one, the bundle's usual one.
        default: where requests go until :meth:`switch` or :meth:`set_traffic`; None takes the
            first.
        queue_limit: how many requests may wait.
        threads: CPU threads of each engine; None takes all cores.
        preload: load every engine now. Otherwise they load at first use.
        trust_kernels, max_prompt_chars: see :meth:`Pipeline.load`; a pipeline has its own.
        observer: called with the spans of every request as it ends; what it raises is logged.

    Attributes:
        pipelines: by name; of several devices, the first's.
        devices: the pipelines of each device.

    Raises:
        UsageError: no bundle, an unknown default, no device, or bundles with pipelines for
            another number of devices.
        BundleError: see :meth:`Pipeline.load`.
    """

    def __init__(
        self,
        bundles: Mapping[str, Source],
        *,
        devices: Sequence[str] | None = None,
        default: str | None = None,
        queue_limit: int = 64,
        threads: int | None = None,
        preload: bool = True,
        trust_kernels: bool = False,
        max_prompt_chars: int = MAX_PROMPT_CHARS,
        observer: Observer | None = None,
    ) -> None:
        if not bundles:
            raise UsageError("a pool needs a bundle")
        if queue_limit < 1:
            raise UsageError(f"queue_limit must be at least 1, not {queue_limit}")
        self._observer = observer
        self._queue = TicketQueue(queue_limit)
        self._home = HomeProcess()

        def open_pipeline(path: str | os.PathLike[str], device: str | None) -> Pipeline:
            return Pipeline.load(
                path, device=device, threads=threads, trust_kernels=trust_kernels,
                max_prompt_chars=max_prompt_chars,
            )  # fmt: skip

        with contextlib.ExitStack() as opened:
            self.devices: Sequence[PoolDevice] = open_devices(
                bundles, devices, open_pipeline, preload, opened
            )
            self.pipelines: Mapping[str, Pipeline] = self.devices[0].pipelines
            self.switch(next(iter(bundles)) if default is None else default)
            self._open = opened.pop_all()
        leave_at_exit(self)

    def __enter__(self) -> PipelinePool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(wait=kind is None)

    @property
    def waiting(self) -> int:
        """How many requests wait, those that are being drawn not counted."""
        return self._queue.waiting

    @property
    def traffic(self) -> dict[str, float]:
        """Percent of the requests by name of the bundle, as last set."""
        return dict(self._traffic.shares)

    def load_adapter(self, name: str, path: str | os.PathLike[str]) -> None:
        """Know an adapter by a name in every bundle that takes adapters; see
        :meth:`Pipeline.load_adapter`.

        Raises:
            UsageError: no bundle takes adapters, or one refuses it.
        """
        own = [p for p in self.pipelines.values() if p.manifest.adapter_ranks]
        for pipeline in own or self.pipelines.values():
            pipeline.load_adapter(name, path)

    @property
    def on_fallback(self) -> list[str]:
        """Names of the bundles whose fallback draws, on any device."""
        return [
            name
            for name in self.pipelines
            if any(device.pipelines[name].on_fallback for device in self.devices)
        ]

    def restore(self, name: str) -> None:
        """Draw with a bundle itself again, on every device, from the next request on.

        Raises:
            UsageError: an unknown name.
        """
        self._check_name(name)
        for device in self.devices:
            device.pipelines[name].restore()

    def memory(self) -> dict[str, dict[str, MemoryReport]]:
        """What is taken of each device: its name → the bundle's → the pipeline's.

        Raises:
            Sd35Error: the pool is closed, or a device does not answer.
        """
        return {device.name: device.memory() for device in self.devices}

    def set_traffic(self, shares: Mapping[str, float]) -> None:
        """Split new requests among bundles; see :class:`~sd35_trt.runtime.traffic.Traffic`.

        Args:
            shares: name → percent, 100 in all. Bundles that are not named get none.

        Raises:
            UsageError: an unknown name, a share below 0, or another sum.
        """
        for name in shares:
            self._check_name(name)
        self._traffic = Traffic(shares)

    def switch(self, name: str) -> None:
        """Send all new requests to one bundle.

        Raises:
            UsageError: an unknown name.
        """
        self.set_traffic({name: 100})

    def choose(self, key: str | None = None) -> str:
        """The bundle that a new request goes to; without a key, a draw by the shares."""
        return self._traffic.choose(key_of_traffic(key))

    def _check_name(self, name: str) -> None:
        if not isinstance(name, str) or name not in self.pipelines:
            raise UsageError(
                f"the pool has no bundle {shown(name)}", f"use one of: {', '.join(self.pipelines)}"
            )

    def generate(
        self, prompt: str | Sequence[str], *, timeout: float | None = None, **arguments: Any
    ) -> Result:
        """Draw, and wait for the result; arguments as for :meth:`submit`.

        Raises:
            Cancelled: ``cancel`` was set, the callback returned False, or the pool was closed.
            TimedOut: not drawn in ``timeout`` seconds.
            UsageError: it was called in a thread that draws.
            Sd35Error: as :meth:`submit` and :meth:`Pipeline.generate` raise it.
        """
        self._check_thread("generate()", "use submit()")
        future = self.submit(prompt, timeout=timeout, **arguments)
        try:
            concurrent.futures.wait([future], timeout)
            ticket = self._queue.find(future)
            if ticket is not None:
                ticket.expire()
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the request was cancelled: the pool was closed") from None
        finally:
            future.cancel()  # where the caller was interrupted

    def submit(
        self,
        prompt: str | Sequence[str],
        *,
        bundle: str | None = None,
        key: str | None = None,
        timeout: float | None = None,
        cancel: threading.Event | None = None,
        callback: Callable[[Step], object] | None = None,
        trace: Any = None,
        **arguments: Any,
    ) -> Future[Result]:
        """Accept a request and return at once.

        Args:
            prompt: one prompt, or several.
            bundle: the bundle's name; None leaves it to the traffic.
            key: requests with the same key go to the same bundle while the traffic stays.
            timeout: seconds from now, for waiting and drawing together; checked between steps.
            cancel: cancels the request when it is set; looked at between steps.
            callback: called after every step with this request's latents, in the thread that
                draws; returning False cancels.
            trace: handed to the observer, an OpenTelemetry context for instance.
            arguments: see :meth:`Pipeline.request`.

        Returns:
            A future. ``cancel()`` works at any time before there is a result; what was to be
            drawn in the same run goes on. ``asyncio.wrap_future`` takes it.

        Raises:
            UsageError: an argument out of range, an unknown bundle, or a pool from before a fork.
            PoolBusy: ``queue_limit`` requests are waiting.
            Sd35Error: the pool is closed.
        """
        start = now_ns()
        self._home.check("the pool")
        check_watchers(cancel, callback)
        key, timeout = key_of_traffic(key), seconds(timeout)
        name = self.choose(key) if bundle is None else bundle
        self._check_name(name)
        try:
            request = self.pipelines[name].request(prompt, **arguments)
            future: Future[Result] = Future()
            future.add_done_callback(self._ended)
            job = Job(request, self._watch(future, callback), start)
            ticket = Ticket(name, job, future, deadline_after(timeout), cancel, trace)
            self._queue.add(ticket)
            self._wake(self.devices)
        except Sd35Error as error:
            refused = Span("request", start, now_ns(), outcome_attributes(name, error), trace)
            self._report([refused])
            raise
        return future

    def _watch(
        self, future: Future[Result], callback: Callable[[Step], object] | None
    ) -> Callable[[Step], object]:
        def after_step(step: Step) -> object:
            self._queue.give_up()
            if future.done():
                return False
            return None if callback is None else callback(step)

        return after_step

    def _wake(self, devices: Sequence[PoolDevice]) -> None:
        """Have them look for requests; called once for each request that comes to wait: one that
        looks may take a single one."""
        for device in devices:
            device.worker.submit(functools.partial(self._draw_next, device))

    def _draw_next(self, device: PoolDevice) -> None:
        """Draw the request that waits longest, and what fits with it."""
        self._queue.give_up()
        batch = self._queue.take(device, self.devices)
        if not batch:
            return
        failure: BaseException | None = None
        try:
            device.pipelines[batch[0].bundle].draw([ticket.job for ticket in batch])
        except BaseException as error:  # noqa: BLE001 raised where the callers wait
            failure = error
            batch = self._left_to_others(batch, device, error)
        for ticket in batch:
            ticket.settle(ticket.job.outcome or failure)

    def _left_to_others(
        self, batch: Sequence[Ticket], device: PoolDevice, error: BaseException
    ) -> list[Ticket]:
        """Leave to other devices what one failed to draw; returns the rest."""
        others = [one for one in self.devices if one is not device]
        again = [
            ticket
            for ticket in batch
            if others and ticket.job.outcome is None and ticket.failed_on is None
        ]
        if again:
            logger.error("%s failed, another device draws instead: %s", device.name, error)
            self._report([retry_span(one.bundle, device.name, one.trace, error) for one in again])
            self._queue.put_back(again)
            for _ in again:
                self._wake(others)
        return [ticket for ticket in batch if ticket not in again]

    def _ended(self, future: Future[Result]) -> None:
        """Forget a request and report it; called once, in the thread that gave the outcome."""
        ticket = self._queue.forget(future)
        if future.cancelled():
            future.set_running_or_notify_cancel()  # tells concurrent.futures.wait
            self._report(_spans(ticket, Cancelled("cancelled")))
        else:
            self._report(_spans(ticket, future.exception()))

    def _report(self, spans: Sequence[Span]) -> None:
        if self._observer is None:
            return
        try:
            for span in spans:
                self._observer(span)
        except Exception:
            logger.exception("the pool's observer failed")

    def close(self, wait: bool = True, timeout: float | None = None) -> None:
        """Refuse new requests, end those there are, and release every engine.

        Every request has an outcome when it returns. A second call does no harm.

        Args:
            wait: draw what is waiting. Otherwise it is cancelled, and what is being drawn stops
                after its step.
            timeout: seconds to wait for that; then the rest is cancelled.

        Raises:
            UsageError: it was called in a thread that draws.
        """
        if not self._home.is_this:  # nothing of it is in this process
            return
        self._check_thread("close()", "call it in another thread")
        futures = self._queue.close()
        try:
            if wait:
                concurrent.futures.wait(futures, timeout)
        finally:
            for future in futures:
                future.cancel()  # does nothing to those that have ended
            for device in self.devices:
                device.worker.close()
            self._open.close()

    def leave(self) -> None:
        """Cancel what waits and what is being drawn, and close: the process ends."""
        self.close(wait=False)

    def _check_thread(self, what: str, fix: str) -> None:
        if any(device.worker.is_current for device in self.devices):
            raise UsageError(f"{what} was called in the thread that draws for the pool", fix)


def _spans(ticket: Ticket, error: BaseException | None) -> list[Span]:
    device = None if ticket.drawer is None else ticket.drawer.name
    return request_spans(ticket.job, ticket.bundle, ticket.trace, error, device)
