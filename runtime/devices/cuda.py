"""CUDA memory, streams, events and graphs, through cuda-bindings.

Source: CUDA Runtime API reference (docs.nvidia.com/cuda/cuda-runtime-api), whose names these are.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.bindings import runtime as cudart

from sd35_trt.errors import OutOfMemory, Sd35Error
from sd35_trt.units import format_bytes

from .device import Buffer, DeviceMemory, Fetch, Graph

# Streams of devices that were closed, by GPU. They are taken again: libraries keep a workspace for
# every stream that they have seen.
_IDLE: dict[int, list[Any]] = {}

# Host memory through which uploads and downloads pass, at least so large.
_STAGING = 16 << 20


class CudaError(Sd35Error):
    """A call of the CUDA runtime failed.

    Attributes:
        reason: the runtime's own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"CUDA failed: {reason}", "check the driver with: nvidia-smi")
        self.reason = reason


def _check(result: tuple[Any, ...]) -> Any:
    """The value of a call, without its status.

    Raises:
        Sd35Error: the call failed.
    """
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemory(
                f"the GPU has no memory left ({reason})",
                "draw a smaller size or batch, or load with a vram_budget",
            )
        raise CudaError(reason)
    return values[0] if len(values) == 1 else tuple(values)


class CudaBuffer:
    """See :class:`sd35_trt.runtime.devices.device.Buffer`.

    Attributes:
        address: in the device's memory.
    """

    __slots__ = ("_memory", "address", "dtype", "shape")

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: np.dtype[Any], memory: _Memory
    ) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self._memory = memory

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: int | slice) -> CudaBuffer:
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(key, slice):
            first, end, step = key.indices(self.shape[0])
            if step != 1:
                raise IndexError("a buffer is sliced in steps of 1")
            shape = (max(end - first, 0), *self.shape[1:])
            return CudaBuffer(self.address + first * row, shape, self.dtype, self._memory)
        index = range(self.shape[0])[key]
        return CudaBuffer(self.address + index * row, self.shape[1:], self.dtype, self._memory)

    def reshape(self, shape: tuple[int, ...], /) -> CudaBuffer:
        if math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"a buffer of shape {self.shape} cannot have {shape}")
        return CudaBuffer(self.address, tuple(shape), self.dtype, self._memory)


class _Memory:
    """An allocation; freed when the last buffer on it is gone."""


class _CudaFetch:
    def __init__(self, device: CudaDevice, source: Buffer, slot: np.ndarray, event: Any) -> None:
        self._device, self._slot, self._event = device, slot, event
        self._source = source  # not freed before the copy

    def wait(self) -> np.ndarray:
        _check(cudart.cudaEventSynchronize(self._event))
        return self._slot

    def fence(self) -> None:
        _check(cudart.cudaStreamWaitEvent(self._device.stream_handle, self._event, 0))


class _CudaGraph:
    def __init__(self, executable: Any, stream: Any) -> None:
        self._executable: Any = executable
        self._stream = stream

    def replay(self) -> None:
        _check(cudart.cudaGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        if self._executable is not None:
            _check(cudart.cudaGraphExecDestroy(self._executable))
            self._executable = None


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
        try:
            count = _check(cudart.cudaGetDeviceCount())
        except CudaError as error:
            status, version = cudart.cudaDriverGetVersion()
            missing = status == cudart.cudaError_t.cudaSuccess and version == 0
            reason = "this machine has no NVIDIA driver" if missing else error.reason
            raise Sd35Error(
                f"{self.name} cannot be used: {reason}",
                "install the NVIDIA driver, or build for this machine with: "
                "sd35-trt build --gpu cpu",
            ) from error
        if index >= count:
            raise Sd35Error(f"there is no {self.name}: this machine has {count} GPU(s)", "use cuda")
        self.activate()
        free, _ = _check(cudart.cudaMemGetInfo())
        self._free_at_start = int(free)
        self._peak = 0
        self._lock = threading.Lock()
        self._allocated: dict[int, int] = {}  # address → bytes
        self._events: list[Any] = []
        self._free_events: list[Any] = []
        self._capturing = False
        self._freed_later: list[int] = []
        self._closed = False
        flags = cudart.cudaStreamNonBlocking
        idle = _IDLE.setdefault(index, [])
        try:
            self.stream_handle = idle.pop()
        except IndexError:
            self.stream_handle = _check(cudart.cudaStreamCreateWithFlags(flags))
        self._copies = _check(cudart.cudaStreamCreateWithFlags(flags))
        self._pool = _check(cudart.cudaMemPoolCreate(self._pool_properties()))
        # Freed buffers stay with the pool until the device is closed: steps of one size come
        # after each other.
        _check(
            cudart.cudaMemPoolSetAttribute(
                self._pool,
                cudart.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold,
                driver.cuuint64_t(2**64 - 1),
            )
        )
        self._staging = self.slots((_STAGING,), np.uint8, 1)[0]
        self._staged = self._event()
        self._scratch = 0
        self._scratch_bytes = 0
        self.scratch_version = 0

    def _pool_properties(self) -> Any:
        properties = cudart.cudaMemPoolProps()
        properties.allocType = cudart.cudaMemAllocationType.cudaMemAllocationTypePinned
        properties.location.type = cudart.cudaMemLocationType.cudaMemLocationTypeDevice
        properties.location.id = self.index
        return properties

    @property
    def stream(self) -> int:
        return int(self.stream_handle)

    @property
    def title(self) -> str:
        """Its name and compute capability."""
        name = _check(cudart.cudaGetDeviceProperties(self.index)).name
        text = name.decode() if isinstance(name, bytes) else str(name)
        return f"{text} ({self.compute_capability})"

    @property
    def compute_capability(self) -> str:
        """Such as ``8.9``."""
        kinds = cudart.cudaDeviceAttr
        major, minor = (
            _check(cudart.cudaDeviceGetAttribute(kind, self.index))
            for kind in (
                kinds.cudaDevAttrComputeCapabilityMajor,
                kinds.cudaDevAttrComputeCapabilityMinor,
            )
        )
        return f"{major}.{minor}"

    def activate(self) -> None:
        _check(cudart.cudaSetDevice(self.index))

    def empty(self, shape: tuple[int, ...], dtype: Any) -> CudaBuffer:
        kind = np.dtype(dtype)
        nbytes = math.prod(shape) * kind.itemsize
        memory = _Memory()
        address = self._allocate(nbytes)
        weakref.finalize(memory, _free, weakref.ref(self), address)
        return CudaBuffer(address, tuple(shape), kind, memory)

    def _allocate(self, nbytes: int) -> int:
        try:
            pointer = _check(
                cudart.cudaMallocFromPoolAsync(max(nbytes, 1), self._pool, self.stream_handle)
            )
        except OutOfMemory as error:
            raise OutOfMemory(
                f"{self.name} has no room for {format_bytes(nbytes)} more", error.fix
            ) from error
        with self._lock:
            self._allocated[int(pointer)] = nbytes
        return int(pointer)

    def _release(self, address: int) -> None:
        with self._lock:
            if self._capturing:  # the graph would free it in every replay
                self._freed_later.append(address)
                return
            known = self._allocated.pop(address, None) is not None
        if known and not self._closed:
            _check(cudart.cudaFreeAsync(address, self.stream_handle))

    def pointer(self, buffer: Buffer) -> int:
        assert isinstance(buffer, CudaBuffer)
        return buffer.address

    def upload(self, array: np.ndarray) -> CudaBuffer:
        buffer = self.empty(array.shape, array.dtype)
        source = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for first in range(0, len(source), len(self._staging)):
            part = source[first : first + len(self._staging)]
            # The piece before this one must have left the staging memory.
            _check(cudart.cudaEventSynchronize(self._staged))
            self._staging[: len(part)] = part
            self._memcpy(
                buffer.address + first,
                self._staging.ctypes.data,
                len(part),
                cudart.cudaMemcpyKind.cudaMemcpyHostToDevice,
                self.stream_handle,
            )
            _check(cudart.cudaEventRecord(self._staged, self.stream_handle))
        return buffer

    def copy(self, source: Buffer, target: Buffer) -> None:
        assert source.nbytes == target.nbytes
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
            _check(cudart.cudaEventSynchronize(self._staged))
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
        kind = np.dtype(dtype)
        nbytes = max(math.prod(shape) * kind.itemsize, 1)
        arrays = []
        for _ in range(count):
            address = int(_check(cudart.cudaHostAlloc(nbytes, cudart.cudaHostAllocDefault)))
            block = (ctypes.c_char * nbytes).from_address(address)
            # With the last array on it, which a caller may keep longer than the device.
            weakref.finalize(block, cudart.cudaFreeHost, address)
            arrays.append(np.frombuffer(block, kind, math.prod(shape)).reshape(shape))
        return arrays

    def fetch(self, buffer: Buffer, slot: np.ndarray | None) -> Fetch:
        assert slot is not None
        assert slot.nbytes == buffer.nbytes
        ready, copied = self._event(), self._event()
        _check(cudart.cudaEventRecord(ready, self.stream_handle))
        _check(cudart.cudaStreamWaitEvent(self._copies, ready, 0))
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._memcpy(slot.ctypes.data, self.pointer(buffer), slot.nbytes, kind, self._copies)
        _check(cudart.cudaEventRecord(copied, self._copies))
        fetch = _CudaFetch(self, buffer, slot, copied)
        # Events are taken again when nobody waits for them any more.
        weakref.finalize(fetch, self._free_events.extend, (ready, copied))
        return fetch

    def _event(self) -> Any:
        if self._free_events:
            return self._free_events.pop()
        event = _check(cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming))
        self._events.append(event)
        return event

    def _memcpy(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> None:
        _check(cudart.cudaMemcpyAsync(target, source, nbytes, kind, stream))

    def capture(self, work: Callable[[], None]) -> Graph:
        # Other threads may allocate meanwhile: an engine that is loaded ahead.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        with self._lock:
            self._capturing = True
        try:
            _check(cudart.cudaStreamBeginCapture(self.stream_handle, mode))
            try:
                work()
            except BaseException:
                # The capture has to end before anything else is queued; its own error says less.
                with contextlib.suppress(CudaError):
                    self._destroy(_check(cudart.cudaStreamEndCapture(self.stream_handle)))
                raise
            recorded = _check(cudart.cudaStreamEndCapture(self.stream_handle))
        finally:
            with self._lock:
                self._capturing = False
                later, self._freed_later = self._freed_later, []
            for address in later:
                self._release(address)
        try:
            executable = _check(cudart.cudaGraphInstantiate(recorded, 0))
        finally:
            self._destroy(recorded)
        return _CudaGraph(executable, self.stream_handle)

    def _destroy(self, graph: Any) -> None:
        _check(cudart.cudaGraphDestroy(graph))

    def scratch(self, nbytes: int) -> int:
        if nbytes > self._scratch_bytes:
            if self._scratch:
                self._release(self._scratch)
                self._scratch = self._scratch_bytes = 0
            self._scratch = self._allocate(nbytes)
            self._scratch_bytes = nbytes
            self.scratch_version += 1
        return self._scratch

    def synchronize(self) -> None:
        _check(cudart.cudaStreamSynchronize(self.stream_handle))

    def memory(self) -> DeviceMemory:
        free, total = _check(cudart.cudaMemGetInfo())
        used = self._free_at_start - int(free)
        self._peak = max(self._peak, used)
        return DeviceMemory(used, self._peak, int(total))

    def close(self) -> None:
        if self._closed:
            return
        self.activate()
        _check(cudart.cudaStreamSynchronize(self._copies))
        self.synchronize()
        self._closed = True
        with self._lock:
            addresses = list(self._allocated)
            self._allocated.clear()
        for address in addresses:
            _check(cudart.cudaFreeAsync(address, self.stream_handle))
        self.synchronize()
        for event in self._events:
            _check(cudart.cudaEventDestroy(event))
        del self._staging
        _check(cudart.cudaMemPoolDestroy(self._pool))
        _check(cudart.cudaStreamDestroy(self._copies))
        _IDLE[self.index].append(self.stream_handle)


def _free(device: weakref.ref[CudaDevice], address: int) -> None:
    owner = device()
    if owner is not None:
        owner._release(address)
