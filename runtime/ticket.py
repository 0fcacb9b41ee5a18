"""A request in a pool: its future, its deadline, and who may end it."""

from __future__ import annotations

import concurrent.futures
import contextlib
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from sd35_trt.errors import Cancelled, TimedOut

from .job import Job, Result
from .pool_device import PoolDevice


def deadline_after(timeout: float | None) -> float | None:
    """The deadline of a request that is accepted now.

    Args:
        timeout: seconds; None gives it all the time.
    """
    return None if timeout is None else time.monotonic() + timeout


@dataclass(eq=False)
class Ticket:
    """A request from when it is accepted until its future has an outcome.

    The future is never marked as running, so that it can be cancelled at any time. Neither it nor
    the job refers to the ticket: images are freed without the garbage collector.

    Attributes:
        bundle: name of the bundle that draws it.
        future: what the caller has.
        deadline: of :func:`time.monotonic`; None has all the time.
        cancel: cancels the request when it is set.
        trace: what the request was given as ``trace``.
        drawer: what draws it; None while it waits.
        failed_on: what failed to draw it, and is not asked again.
    """

    bundle: str
    job: Job
    future: Future[Result]
    deadline: float | None
    cancel: threading.Event | None
    trace: Any
    drawer: PoolDevice | None = None
    failed_on: PoolDevice | None = None

    def settle(self, outcome: Result | BaseException | None) -> None:
        """Give the future its outcome, unless the caller was faster."""
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            if isinstance(outcome, Result):
                self.future.set_result(outcome)
            else:
                self.future.set_exception(outcome)

    def give_up(self) -> None:
        """End the request if its time is up or its event is set."""
        if self.cancel is not None and self.cancel.is_set():
            self.settle(Cancelled("the request was cancelled"))
        elif self.deadline is not None and time.monotonic() >= self.deadline:
            self.expire()

    def expire(self) -> None:
        """End the request because its time is up."""
        where = "waiting" if self.drawer is None else "being drawn"
        self.settle(TimedOut(f"the request's time ended while it was {where}", "allow it more"))
