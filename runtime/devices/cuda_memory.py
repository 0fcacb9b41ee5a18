"""A GPU's memory: buffers, the pool that they come from, and pinned memory of the host."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cuda.bindings import driver
from cuda.bindings import runtime as cudart

from sd35_trt.errors import OutOfMemory
from sd35_trt.runtime.process import HomeProcess
from sd35_trt.units import format_bytes

from .cuda_runtime import check


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


class MemoryPool:
    """Memory of one GPU, allocated and freed in the order of a stream. Memory may be freed from
    any thread.

    Args:
        index: the GPU's number.
        name: the device's, for messages.
        stream: handle of the stream.

    Attributes:
        scratch_version: changes when the address of the scratch memory does.
    """

    def __init__(self, index: int, name: str, stream: Any) -> None:
        self.scratch_version = 0
        self._home = HomeProcess()
        self._name = name
        self._stream = stream
        self._lock = threading.Lock()
        self._allocated: dict[int, int] = {}  # address → bytes
        self._recording = False
        self._deferred: list[int] = []
        self._closed = False
        self._scratch = 0
        self._scratch_bytes = 0
        self._pool = check(cudart.cudaMemPoolCreate(_properties(index)))
        # Freed buffers stay with the pool until the device is closed: steps of one size come
        # after each other.
        check(
            cudart.cudaMemPoolSetAttribute(
                self._pool,
                cudart.cudaMemPoolAttr.cudaMemPoolAttrReleaseThreshold,
                driver.cuuint64_t(2**64 - 1),
            )
        )

    def empty(self, shape: tuple[int, ...], dtype: Any) -> CudaBuffer:
        """A new buffer with any content.

        Raises:
            OutOfMemory: the GPU has no room for it.
        """
        kind = np.dtype(dtype)
        memory = _Memory()
        # An engine wants an address also for what is empty.
        address = self._allocate(max(math.prod(shape) * kind.itemsize, 1))
        weakref.finalize(memory, _free, weakref.ref(self), address)
        return CudaBuffer(address, tuple(shape), kind, memory)

    def scratch(self, nbytes: int) -> int:
        """See :meth:`sd35_trt.runtime.devices.device.Device.scratch`."""
        if nbytes > self._scratch_bytes:
            self.free_scratch()
            self._scratch = self._allocate(nbytes)
            self._scratch_bytes = nbytes
            self.scratch_version += 1
        return self._scratch

    def free_scratch(self) -> None:
        """Free the scratch memory, after what is queued; it is allocated again when asked for."""
        if self._scratch:
            self.release(self._scratch)
            self._scratch = self._scratch_bytes = 0
            self.scratch_version += 1

    def share(self, index: int) -> None:
        """Let another GPU read and write the memory; peer access lets it at others' alone."""
        access = cudart.cudaMemAccessDesc()
        access.location.type = cudart.cudaMemLocationType.cudaMemLocationTypeDevice
        access.location.id = index
        access.flags = cudart.cudaMemAccessFlags.cudaMemAccessFlagsProtReadWrite
        check(cudart.cudaMemPoolSetAccess(self._pool, [access], 1))

    def trim(self) -> None:
        """Give what has been freed back to the driver."""
        check(cudart.cudaMemPoolTrimTo(self._pool, 0))

    def _allocate(self, nbytes: int) -> int:
        try:
            pointer = check(
                cudart.cudaMallocFromPoolAsync(max(nbytes, 1), self._pool, self._stream)
            )
        except OutOfMemory as error:
            raise OutOfMemory(
                f"{self._name} has no room for {format_bytes(nbytes)} more", error.fix
            ) from error
        with self._lock:
            self._allocated[int(pointer)] = nbytes
        return int(pointer)

    def release(self, address: int) -> None:
        """Free an allocation, after what is queued."""
        if not self._home.is_this:  # a fork has no driver
            return
        with self._lock:
            if self._recording:  # the graph would free it in every replay
                self._deferred.append(address)
                return
            owned = self._allocated.pop(address, None) is not None
        if owned and not self._closed:
            check(cudart.cudaFreeAsync(address, self._stream))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While the stream is recorded: what is freed inside is freed at the end."""
        with self._lock:
            self._recording = True
        try:
            yield
        finally:
            with self._lock:
                self._recording = False
                deferred, self._deferred = self._deferred, []
            for address in deferred:
                self.release(address)

    def free_all(self) -> None:
        """Free every allocation, buffers that are still referred to included."""
        self._closed = True
        with self._lock:
            addresses = list(self._allocated)
            self._allocated.clear()
        for address in addresses:
            check(cudart.cudaFreeAsync(address, self._stream))

    def close(self) -> None:
        """Give the memory back to the driver, when all has been freed."""
        check(cudart.cudaMemPoolDestroy(self._pool))


def _properties(index: int) -> Any:
    properties = cudart.cudaMemPoolProps()
    properties.allocType = cudart.cudaMemAllocationType.cudaMemAllocationTypePinned
    properties.location.type = cudart.cudaMemLocationType.cudaMemLocationTypeDevice
    properties.location.id = index
    return properties


def _free(pool: weakref.ref[MemoryPool], address: int) -> None:
    owner = pool()
    if owner is not None:
        owner.release(address)


def pinned_array(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in pinned memory of the host, with any content.

    Raises:
        OutOfMemory: the host has no such memory left.
    """
    kind = np.dtype(dtype)
    nbytes = max(math.prod(shape) * kind.itemsize, 1)
    address = int(check(cudart.cudaHostAlloc(nbytes, cudart.cudaHostAllocDefault)))
    block = (ctypes.c_char * nbytes).from_address(address)
    # With the last array on it, which a caller may keep longer than the device.
    weakref.finalize(block, _free_pinned, HomeProcess(), cudart.cudaFreeHost, address)
    return np.frombuffer(block, kind, math.prod(shape)).reshape(shape)


def _free_pinned(home: HomeProcess, free: Callable[[int], object], address: int) -> None:
    if home.is_this:  # a fork has no driver
        free(address)
