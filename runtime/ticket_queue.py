"""The requests of a pool that have no outcome yet, in order of arrival."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from concurrent.futures import Future

from sd35_trt.errors import PoolBusy, Sd35Error
from sd35_trt.formats.bundle import Manifest

from .adapters import Mix, total_rank
from .job import Result
from .pool_device import PoolDevice
from .ticket import Ticket


class TicketQueue:
    """Hands requests to those that draw, and knows the others. Any thread.

    Args:
        limit: how many may wait.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._tickets: dict[Future[Result], Ticket] = {}
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wait, those that are being drawn not counted."""
        with self._lock:
            return self._waiting()

    def _waiting(self) -> int:
        return sum(ticket.drawer is None for ticket in self._tickets.values())

    def add(self, ticket: Ticket) -> None:
        """Accept a request.

        Raises:
            PoolBusy: as many wait as may.
            Sd35Error: the queue is closed.
        """
        with self._lock:
            if self._closed:
                raise Sd35Error("the pool is closed", "make another")
            if self._waiting() >= self._limit:
                raise PoolBusy(
                    f"{self._limit} requests are waiting, which is the pool's limit",
                    "try again later, or raise queue_limit",
                )
            self._tickets[ticket.future] = ticket

    def find(self, future: Future[Result]) -> Ticket | None:
        """The request of a future; None where it has an outcome."""
        with self._lock:
            return self._tickets.get(future)

    def forget(self, future: Future[Result]) -> Ticket:
        """Take out a request that has an outcome."""
        with self._lock:
            return self._tickets.pop(future)

    def give_up(self) -> None:
        """End every request, waiting or not, whose time is up or which was cancelled."""
        with self._lock:
            tickets = list(self._tickets.values())
        # Without the lock: an outcome calls back.
        for ticket in tickets:
            ticket.give_up()

    def close(self) -> list[Future[Result]]:
        """Accept no more; returns the futures that have no outcome."""
        with self._lock:
            self._closed = True
            return list(self._tickets)

    def take(self, device: PoolDevice, devices: Sequence[PoolDevice]) -> list[Ticket]:
        """The request that waits longest of those that a device may draw, and what fits in one
        run with it; none where none waits.

        Args:
            device: that draws nothing now.
            devices: all that there are; those that draw nothing either are left their share.
        """
        with self._lock:
            waiting = [
                ticket
                for ticket in self._tickets.values()
                if ticket.drawer is None and ticket.failed_on is not device
            ]
            if not waiting:
                return []
            busy = {ticket.drawer for ticket in self._tickets.values()}
            idle = sum(one not in busy for one in devices)
            batch = _fitting(waiting, device.pipelines[waiting[0].bundle].manifest, idle)
            for ticket in batch:
                ticket.drawer = device
            return batch

    def put_back(self, tickets: Sequence[Ticket]) -> None:
        """Leave to other devices what one failed to draw, in its place in the order."""
        with self._lock:
            for ticket in tickets:
                ticket.job.start_again()
                ticket.failed_on, ticket.drawer = ticket.drawer, None


def _fitting(waiting: Sequence[Ticket], manifest: Manifest, shares: int) -> list[Ticket]:
    """The first of those that wait, and those that can be drawn in one run with it: of all such
    images, one of so many shares."""
    first = waiting[0]
    kind = first.bundle, first.job.request.in_common
    alike = [
        ticket
        for ticket in waiting
        if ticket.job.request.from_noise and (ticket.bundle, ticket.job.request.in_common) == kind
    ]
    images = sum(len(ticket.job.request.seeds) for ticket in alike)
    room = min(manifest.ranges.batch[1], math.ceil(images / shares))
    most = max(manifest.adapter_ranks, default=0)
    batch: list[Ticket] = []
    mixes: list[Mix] = []
    for ticket in [first, *(one for one in alike if one is not first)]:
        request = ticket.job.request
        fits = len(request.seeds) <= room
        if ticket is first or (fits and total_rank([*mixes, *request.adapters]) <= most):
            batch.append(ticket)
            room -= len(request.seeds)
            mixes += request.adapters
    return batch
