"""The parts of the CUDA runtime that the device layer uses, on the host's memory.

Streams are as late as CUDA lets them be: what is queued is done when somebody waits for it, on
another stream only if an event demands it. Work that reads what should have been protected by an
event finds it overwritten.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np


class Status(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorPeerAccessAlreadyEnabled = 704
    cudaErrorInsufficientDriver = 35
    cudaErrorStreamCaptureInvalidated = 901


class _Stream:
    def __init__(self, number: int, device: int) -> None:
        self.number = number
        self.device = device
        self.work: deque[Callable[[], bool]] = deque()
        self.recording: list[Callable[[], bool]] | None = None

    def __int__(self) -> int:
        return self.number


class _Event:
    def __init__(self, device: int) -> None:
        self.device = device
        self.recorded = 0
        self.done: set[int] = set()  # of its recordings
        self.stream: _Stream | None = None


class FakeCuda:
    """Stands in for ``cuda.bindings.runtime``.

    Attributes:
        devices: how many GPUs there are; below 0, the driver is too old, or none.
        driver: its version; 0 where there is none.
        total: bytes of memory.
        used: bytes of it that are allocated.
        calls: names of the functions that were called.
        alive: handles that were made and not destroyed: streams, events, pools, graphs, pinned.
        peers: pairs of GPUs, of which the first may have access to the second's memory.
        shared: pairs of GPUs, of which the second's pool was shared with the first.
    """

    cudaError_t = Status
    cudaStreamNonBlocking = 1
    cudaEventDisableTiming = 2
    cudaHostAllocDefault = 0
    cudaMemcpyKind = SimpleNamespace(
        cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2, cudaMemcpyDeviceToDevice=3
    )
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)
    cudaMemPoolAttr = SimpleNamespace(cudaMemPoolAttrReleaseThreshold=4)
    cudaMemAccessFlags = SimpleNamespace(cudaMemAccessFlagsProtReadWrite=3)
    cudaMemAllocationType = SimpleNamespace(cudaMemAllocationTypePinned=1)
    cudaMemLocationType = SimpleNamespace(cudaMemLocationTypeDevice=1)
    cudaDeviceAttr = SimpleNamespace(
        cudaDevAttrComputeCapabilityMajor="major", cudaDevAttrComputeCapabilityMinor="minor"
    )

    def __init__(self, devices: int = 1, total: int = 1 << 33, driver: int = 13000) -> None:
        self.devices = devices
        self.driver = driver
        self.total = total
        self.used = 0
        self.calls: list[str] = []
        self.alive: dict[str, int] = {}
        self.peers = {(i, j) for i in range(devices) for j in range(devices) if i != j}
        self.shared: set[tuple[int, int]] = set()
        self._enabled: set[tuple[int, int]] = set()
        self._active = threading.local()
        self._memory: dict[int, Any] = {}
        # GPU and size → blocks to use again, as pools do
        self._free: dict[tuple[int, int], list[Any]] = {}
        self._streams: dict[int, _Stream] = {}

    def __getattribute__(self, name: str) -> Any:
        if (
            name.startswith("cuda")
            and name[4].isupper()
            and callable(found := object.__getattribute__(self, name))
            and not isinstance(found, type)
        ):
            object.__getattribute__(self, "calls").append(name)
        return object.__getattribute__(self, name)

    # What a session does on a stream.

    def launch(self, stream: int, work: Callable[[], None]) -> None:
        """Queue work, as a kernel launch does."""

        def run() -> bool:
            work()
            return True

        assert self._streams[stream].device == self._device, "a launch on another GPU's stream"
        self._queue(self._streams[stream], run)

    def _queue(self, stream: _Stream, work: Callable[[], bool]) -> None:
        (stream.work if stream.recording is None else stream.recording).append(work)

    def _drain(self, stream: _Stream, until: Callable[[], bool] = lambda: False) -> None:
        while stream.work and not until():
            if stream.work[0]():
                stream.work.popleft()

    # Devices.

    def cudaGetErrorString(self, status: Status) -> tuple[Any, ...]:
        return Status.cudaSuccess, status.name.encode()

    def cudaGetDeviceCount(self) -> tuple[Any, ...]:
        if self.devices < 0:
            return Status.cudaErrorInsufficientDriver, None
        return Status.cudaSuccess, self.devices

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, self.driver

    @property
    def _device(self) -> int:
        """The calling thread's."""
        return getattr(self._active, "index", 0)

    def cudaSetDevice(self, index: int) -> tuple[Any, ...]:
        if index >= self.devices:
            return (Status.cudaErrorInvalidValue,)
        self._active.index = index
        return (Status.cudaSuccess,)

    def cudaGetLastError(self) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaDeviceCanAccessPeer(self, index: int, peer: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, int((index, peer) in self.peers)

    def cudaDeviceEnablePeerAccess(self, peer: int, flags: int) -> tuple[Any, ...]:
        pair = self._device, peer
        assert pair in self.peers
        if pair in self._enabled:
            return (Status.cudaErrorPeerAccessAlreadyEnabled,)
        self._enabled.add(pair)
        return (Status.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[Any, ...]:
        return Status.cudaSuccess, self.total - self.used, self.total

    def cudaDeviceGetAttribute(self, kind: str, index: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, {"major": 9, "minor": 0}[kind]

    def cudaGetDeviceProperties(self, index: int) -> tuple[Any, ...]:
        return Status.cudaSuccess, SimpleNamespace(name=b"Fake GPU")

    # Memory.

    def _make(self, kind: str, count: int = 1) -> None:
        self.alive[kind] = self.alive.get(kind, 0) + count

    def cudaMemPoolProps(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def cudaMemPoolCreate(self, properties: Any) -> tuple[Any, ...]:
        self._make("pool")
        return Status.cudaSuccess, SimpleNamespace(device=properties.location.id)

    def cudaMemAccessDesc(self) -> Any:
        return SimpleNamespace(location=SimpleNamespace())

    def cudaMemPoolSetAccess(self, pool: Any, accesses: list[Any], count: int) -> tuple[Any, ...]:
        assert count == len(accesses)
        self.shared |= {(access.location.id, pool.device) for access in accesses}
        return (Status.cudaSuccess,)

    def cudaMemPoolSetAttribute(self, pool: Any, attribute: int, value: Any) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaMemPoolTrimTo(self, pool: Any, keep: int) -> tuple[Any, ...]:
        return (Status.cudaSuccess,)

    def cudaMemPoolDestroy(self, pool: Any) -> tuple[Any, ...]:
        self._make("pool", -1)
        return (Status.cudaSuccess,)

    def cudaMallocFromPoolAsync(self, size: int, pool: Any, stream: _Stream) -> tuple[Any, ...]:
        if self.used + size > self.total:
            return Status.cudaErrorMemoryAllocation, None
        assert stream.recording is None, "allocation in a graph"
        again = self._free.get((stream.device, size))
        block = again.pop() if again else (ctypes.c_char * size)()
        # Nobody may count on what is in new memory.
        self._queue(stream, lambda: bool(ctypes.memset(block, 0xFF, size)))
        address = ctypes.addressof(block)
        self._memory[address] = block
        self.used += size
        return Status.cudaSuccess, address

    def cudaFreeAsync(self, address: int, stream: _Stream) -> tuple[Any, ...]:
        assert stream.recording is None, "free in a graph"
        block = self._memory.pop(address)
        self.used -= len(block)

        self._queue(stream, lambda: bool(ctypes.memset(block, 0xFF, len(block))))
        self._free.setdefault((stream.device, len(block)), []).append(block)
        return (Status.cudaSuccess,)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        block = (ctypes.c_char * size)()
        self._memory[ctypes.addressof(block)] = block
        self._make("pinned")
        return Status.cudaSuccess, ctypes.addressof(block)

    def cudaFreeHost(self, address: int) -> tuple[Any, ...]:
        del self._memory[address]
        self._make("pinned", -1)
        return (Status.cudaSuccess,)

    def cudaMemcpyAsync(
        self, target: int, source: int, size: int, kind: int, stream: _Stream
    ) -> tuple[Any, ...]:
        def copy() -> bool:
            ctypes.memmove(target, source, size)
            return True

        self._queue(stream, copy)
        return (Status.cudaSuccess,)

    def cudaMemcpyPeerAsync(
        self, target: int, to: int, source: int, origin: int, size: int, stream: _Stream
    ) -> tuple[Any, ...]:
        assert stream.recording is None, "a copy between GPUs in a graph"
        assert to == stream.device
        if to != origin:
            assert {(to, origin), (origin, to)} <= self._enabled & self.shared
        return self.cudaMemcpyAsync(target, source, size, 3, stream)

    # Streams and events.

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = _Stream(len(self._streams) + 1, self._device)
        self._streams[stream.number] = stream
        self._make("stream")
        return Status.cudaSuccess, stream

    def cudaStreamDestroy(self, stream: _Stream) -> tuple[Any, ...]:
        self._drain(stream)
        self._make("stream", -1)
        return (Status.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: _Stream) -> tuple[Any, ...]:
        assert stream.recording is None, "synchronization in a graph"
        self._drain(stream)
        return (Status.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        self._make("event")
        return Status.cudaSuccess, _Event(self._device)

    def cudaEventDestroy(self, event: _Event) -> tuple[Any, ...]:
        self._make("event", -1)
        return (Status.cudaSuccess,)

    def cudaEventRecord(self, event: _Event, stream: _Stream) -> tuple[Any, ...]:
        assert event.device == stream.device, "an event on another GPU's stream"
        event.recorded += 1
        event.stream = stream
        number = event.recorded

        def record() -> bool:
            event.done.add(number)
            return True

        self._queue(stream, record)
        return (Status.cudaSuccess,)

    def cudaStreamWaitEvent(self, stream: _Stream, event: _Event, flags: int) -> tuple[Any, ...]:
        number, source = event.recorded, event.stream

        def wait() -> bool:
            if source is not None and number not in event.done:
                self._drain(source, lambda: number in event.done)
            return True

        self._queue(stream, wait)
        return (Status.cudaSuccess,)

    def cudaEventSynchronize(self, event: _Event) -> tuple[Any, ...]:
        number = event.recorded
        if event.stream is not None:
            self._drain(event.stream, lambda: number in event.done)
        return (Status.cudaSuccess,)

    # Graphs.

    def cudaStreamBeginCapture(self, stream: _Stream, mode: int) -> tuple[Any, ...]:
        stream.recording = []
        return (Status.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: _Stream) -> tuple[Any, ...]:
        work, stream.recording = stream.recording, None
        self._make("graph")
        return Status.cudaSuccess, work

    def cudaGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, ...]:
        self._make("executable")
        return Status.cudaSuccess, list(graph)

    def cudaGraphDestroy(self, graph: Any) -> tuple[Any, ...]:
        self._make("graph", -1)
        return (Status.cudaSuccess,)

    def cudaGraphExecDestroy(self, graph: Any) -> tuple[Any, ...]:
        self._make("executable", -1)
        return (Status.cudaSuccess,)

    def cudaGraphLaunch(self, graph: Any, stream: _Stream) -> tuple[Any, ...]:
        assert stream.device == self._device, "a graph on another GPU's stream"
        for work in graph:
            self._queue(stream, work)
        return (Status.cudaSuccess,)


def host_array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """What is at an address of the fake's memory."""
    kind = np.dtype(dtype)
    count = int(np.prod(shape))
    block = (ctypes.c_char * max(count * kind.itemsize, 1)).from_address(address)
    return np.frombuffer(block, kind, count).reshape(shape)
