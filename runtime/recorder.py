"""Work of fixed buffers: computed at first, then the replay of a graph."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from .devices.device import Device, RecordedGraph


class Recorder:
    """Records what is done a second time, on a device that can.

    The first time, engines allocate and choose kernels.

    Args:
        records: whether what is done can be recorded.
    """

    def __init__(self, device: Device, records: bool) -> None:
        self._device = device
        self._records = records
        self._graphs: dict[Hashable, RecordedGraph] = {}
        self._ran: set[Hashable] = set()
        self._scratch_version = device.scratch_version

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Queue work.

        Args:
            key: of work that is the same, on the same buffers.
        """
        if not self._records:
            work()
            return
        if self._device.scratch_version != self._scratch_version:
            self.forget()
        if key not in self._ran:
            work()
            self._ran.add(key)
            return
        if key not in self._graphs:
            self._graphs[key] = self._device.capture(work)
        self._graphs[key].replay()

    def forget(self) -> None:
        """Release the graphs: buffers are others from now on."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self._ran.clear()
        self._scratch_version = self._device.scratch_version
