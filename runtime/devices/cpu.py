"""The CPU as a device: buffers are numpy's arrays, and nothing is queued."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt.errors import OutOfMemory, Sd35Error

from .device import Buffer, DeviceMemory, Fetch, Mark, RecordedGraph


class _Here:
    """A "copy" that is the buffer itself: the CPU's."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array

    def wait(self) -> np.ndarray:
        return self._array

    def fence(self) -> None:
        """The reader has read before the next step begins."""


class _Now:
    """Nothing is queued: what was asked for is done."""


class CpuDevice:
    """The CPU. See :class:`sd35_trt.runtime.devices.device.Device`."""

    name = kind = "cpu"
    index = stream = scratch_version = 0
    queues = False

    def activate(self) -> None:
        """Nothing to do."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        try:
            return np.empty(shape, dtype)
        except (MemoryError, ValueError) as error:  # larger than any address
            raise OutOfMemory(
                f"the CPU has no room for {' x '.join(map(str, shape))} values",
                "try a smaller size or batch",
            ) from error

    def pointer(self, buffer: Buffer) -> int:
        if not isinstance(buffer, np.ndarray) or not buffer.flags.c_contiguous:
            raise TypeError("the CPU's buffers are C-contiguous arrays of numpy")
        return int(buffer.ctypes.data)

    def upload(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array)

    def copy(self, source: Buffer, target: Buffer) -> None:
        if not isinstance(target, np.ndarray):
            raise TypeError("the CPU's buffers are arrays of numpy")
        target[...] = np.asarray(source).reshape(target.shape)

    def download(self, buffer: Buffer) -> np.ndarray:
        return np.asarray(buffer)

    def slots(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[np.ndarray]:
        return []

    def fetch(self, buffer: Buffer, slot: np.ndarray | None) -> Fetch:
        return _Here(np.asarray(buffer))

    def mark(self) -> Mark:
        return _Now()

    def wait_for(self, mark: Any) -> None:
        """It is done."""

    def reaches(self, other: Any) -> bool:
        return isinstance(other, CpuDevice)

    def receive(self, target: Buffer, source: Buffer, other: Any) -> None:
        self.copy(source, target)

    def capture(self, work: Callable[[], None]) -> RecordedGraph:
        raise Sd35Error("the CPU records no graphs", "call the work itself")

    def scratch(self, nbytes: int) -> int:
        raise Sd35Error("engines on the CPU have their own memory", "ask for none")

    def synchronize(self) -> None:
        """Nothing is queued."""

    def trim(self) -> None:
        """numpy keeps none."""

    def memory(self) -> DeviceMemory:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # no Linux
            return DeviceMemory(peak, peak, None)
        usage = pages * resource.getpagesize()
        return DeviceMemory(usage, max(usage, peak), None)

    def close(self) -> None:
        """numpy frees what nobody refers to."""
