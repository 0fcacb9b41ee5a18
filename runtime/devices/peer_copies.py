"""Copies between two devices of one kind, and the order between their queues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .device import Buffer, Device


class Copy(NamedTuple):
    """A copy to a device, from the other one of a pair.

    Attributes:
        target: of the device itself.
        source: of the other device, with as many bytes.
    """

    target: Buffer
    source: Buffer


def exchange(
    one: Device, other: Device, to_one: Sequence[Copy] = (), to_other: Sequence[Copy] = ()
) -> None:
    """Queue copies between two devices, which run at the same time.

    They run behind all that both were asked for until now. What both are asked for from now on
    runs after the copies: it may read what came, and overwrite what went.
    """
    _meet(one, other)
    for here, there, copies in ((one, other, to_one), (other, one, to_other)):
        here.activate()
        for copy in copies:
            here.receive(copy.target, copy.source, there)
    _meet(one, other)
    one.activate()


def _meet(one: Device, other: Device) -> None:
    """Let neither queue go on before the other has come as far."""
    marks = []
    for device in (one, other):
        device.activate()
        marks.append(device.mark())
    one.wait_for(marks[1])
    other.wait_for(marks[0])
