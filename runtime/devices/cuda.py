"""A GPU as a device, through cuda-bindings."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from sd35_trt.errors import Sd35Error

from .cuda_memory import CudaBuffer, MemoryPool, pinned_array
from .cuda_runtime import allow_peer, check, count_devices
from .cuda_streams import (
    CudaFetch,
    CudaMark,
    Events,
    create_stream,
    give_stream_back,
    record,
    take_stream,
)
from .device import Buffer, DeviceMemory, Fetch, RecordedGraph

# Bytes of host memory through which uploads and downloads pass.
_STAGING_BYTES = 16 << 20


class CudaDevice:
    """One GPU. See :class:`sd35_trt.runtime.devices.device.Device`.

    Buffers come from a memory pool of its own, in the order of its stream; a second stream copies
    to the host beside the work. Buffers may be freed from any thread; all else is for one at a
    time.

    Args:
        index: the GPU's number.

    Raises:
        Sd35Error: no driver, or no such GPU.
    """

    kind = "cuda"
    queues = True

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self.name = f"cuda:{index}"
        count = count_devices(self.name)
        if index >= count:
            raise Sd35Error(f"there is no {self.name}: this machine has {count} GPU(s)", "use cuda")
        self.activate()
        free, _ = check(cudart.cudaMemGetInfo())
        self._free_at_start = int(free)
        self._peak = 0
        with ExitStack() as opened:
            self.stream_handle = take_stream(index)
            opened.callback(give_stream_back, index, self.stream_handle)
            self._copies = create_stream()
            opened.callback(lambda: check(cudart.cudaStreamDestroy(self._copies)))
            self._pool = MemoryPool(index, self.name, self.stream_handle)
            opened.callback(self._pool.close)
            self._staging = pinned_array((_STAGING_BYTES,), np.uint8)
            opened.callback(self._forget_staging)
            self._events = Events()
            opened.callback(self._events.close)
            self._staged = self._events.take()
            # In the order of the stream: waited for before the pool closes.
            opened.callback(self.synchronize)
            opened.callback(self._pool.free_all)
            opened.callback(self.synchronize)
            opened.callback(lambda: check(cudart.cudaStreamSynchronize(self._copies)))
            opened.callback(self.activate)
            self._open = opened.pop_all()

    @property
    def stream(self) -> int:
        return int(self.stream_handle)

    @property
    def title(self) -> str:
        """Its name and compute capability."""
        name = check(cudart.cudaGetDeviceProperties(self.index)).name
        text = name.decode() if isinstance(name, bytes) else str(name)
        return f"{text} ({self.compute_capability})"

    @property
    def compute_capability(self) -> str:
        """Such as ``8.9``."""
        kinds = cudart.cudaDeviceAttr
        major, minor = (
            check(cudart.cudaDeviceGetAttribute(kind, self.index))
            for kind in (
                kinds.cudaDevAttrComputeCapabilityMajor,
                kinds.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"{major}.{minor}"

    def activate(self) -> None:
        check(cudart.cudaSetDevice(self.index))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> CudaBuffer:
        return self._pool.empty(shape, dtype)

    def pointer(self, buffer: Buffer) -> int:
        if not isinstance(buffer, CudaBuffer):
            raise TypeError(f"{self.name} has no buffer of the type {type(buffer).__name__}")
        return buffer.address

    def upload(self, array: np.ndarray) -> CudaBuffer:
        buffer = self.empty(array.shape, array.dtype)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for first in range(0, len(source), len(self._staging)):
            part = source[first : first + len(self._staging)]
            # The piece before this one must have left the staging memory.
            check(cudart.cudaEventSynchronize(self._staged))
            self._staging[: len(part)] = part
            self._memcpy(
                buffer.address + first,
                self._staging.ctypes.data,
                len(part),
                cudart.cudaMemcpyKind.cudaMemcpyHostToDevice,
                self.stream_handle,
            )
            check(cudart.cudaEventRecord(self._staged, self.stream_handle))
        return buffer

    def copy(self, source: Buffer, target: Buffer) -> None:
        if source.nbytes != target.nbytes:
            raise ValueError(f"{source.nbytes} bytes do not fit a buffer of {target.nbytes}")
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        self._memcpy(
            self.pointer(target), self.pointer(source), source.nbytes, kind, self.stream_handle
        )

    def download(self, buffer: Buffer) -> np.ndarray:
        result = np.empty(buffer.shape, buffer.dtype)
        into = result.reshape(-1).view(np.uint8)
        address = self.pointer(buffer)
        for first in range(0, len(into), len(self._staging)):
            part = into[first : first + len(self._staging)]
            check(cudart.cudaEventSynchronize(self._staged))
            self._memcpy(
                self._staging.ctypes.data,
                address + first,
                len(part),
                cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost,
                self.stream_handle,
            )
            self.synchronize()
            part[:] = self._staging[: len(part)]
        return result

    def slots(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[np.ndarray]:
        return [pinned_array(shape, dtype) for _ in range(count)]

    def fetch(self, buffer: Buffer, slot: np.ndarray | None) -> Fetch:
        if slot is None or slot.nbytes != buffer.nbytes:
            raise ValueError(f"{self.name} copies {buffer.nbytes} bytes to a slot of as many")
        ready, copied = self._events.take(), self._events.take()
        check(cudart.cudaEventRecord(ready, self.stream_handle))
        check(cudart.cudaStreamWaitEvent(self._copies, ready, 0))
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._memcpy(slot.ctypes.data, self.pointer(buffer), slot.nbytes, kind, self._copies)
        check(cudart.cudaEventRecord(copied, self._copies))
        fetch = CudaFetch(buffer, slot, copied, self.stream_handle)
        self._events.give_back_with(fetch, ready, copied)
        return fetch

    def mark(self) -> CudaMark:
        event = self._events.take()
        check(cudart.cudaEventRecord(event, self.stream_handle))
        mark = CudaMark(event)
        self._events.give_back_with(mark, event)
        return mark

    def wait_for(self, mark: Any) -> None:
        check(cudart.cudaStreamWaitEvent(self.stream_handle, mark.event, 0))

    def reaches(self, other: Any) -> bool:
        if not isinstance(other, CudaDevice):
            return False
        return self._lets_in(other) and other._lets_in(self)

    def _lets_in(self, other: CudaDevice) -> bool:
        """Let another GPU at this one's memory, if it can."""
        if other.index == self.index:
            return True
        if not check(cudart.cudaDeviceCanAccessPeer(other.index, self.index)):
            return False
        other.activate()
        allow_peer(self.index)
        self._pool.share(other.index)
        return True

    def receive(self, target: Buffer, source: Buffer, other: Any) -> None:
        if source.nbytes != target.nbytes:
            raise ValueError(f"{source.nbytes} bytes do not fit a buffer of {target.nbytes}")
        check(
            cudart.cudaMemcpyPeerAsync(
                self.pointer(target), self.index, other.pointer(source), other.index,
                source.nbytes, self.stream_handle,
            )
        )  # fmt: skip

    def _memcpy(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> None:
        check(cudart.cudaMemcpyAsync(target, source, nbytes, kind, stream))

    def capture(self, work: Callable[[], None]) -> RecordedGraph:
        with self._pool.recording():
            return record(self.stream_handle, work)

    def scratch(self, nbytes: int) -> int:
        return self._pool.scratch(nbytes)

    @property
    def scratch_version(self) -> int:
        return self._pool.scratch_version

    def synchronize(self) -> None:
        check(cudart.cudaStreamSynchronize(self.stream_handle))

    def trim(self) -> None:
        self._pool.free_scratch()
        self.synchronize()
        self._pool.trim()

    def memory(self) -> DeviceMemory:
        free, total = check(cudart.cudaMemGetInfo())
        usage = self._free_at_start - int(free)
        self._peak = max(self._peak, usage)
        return DeviceMemory(usage, self._peak, int(total))

    def close(self) -> None:
        self._open.close()

    def _forget_staging(self) -> None:
        self._staging = np.empty(0, np.uint8)
