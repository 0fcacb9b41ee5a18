"""What a device is: where buffers live and work is queued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np


class Buffer(Protocol):
    """Memory of a device, C-contiguous. A numpy array is one, of the CPU.

    An index or a slice of step 1 of the first axis, and another shape of as many elements, is a
    buffer that shares the memory; it is freed with the last of them.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...
    def reshape(self, shape: tuple[int, ...], /) -> Any: ...


class Fetch(Protocol):
    """A copy on its way to the host."""

    def wait(self) -> np.ndarray:
        """The array, once it is there; overwritten when its slot is used again."""

    def fence(self) -> None:
        """What is queued from now on runs after the copy: the source may be overwritten."""


class Mark(Protocol):
    """A moment of a device's queue."""


class RecordedGraph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Queue it once more, on the same buffers."""

    def close(self) -> None:
        """Release it."""


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device's memory.

    Attributes:
        used: by this process since the device was opened, as near as the device tells: of a
            CUDA device the change of its free memory, of the CPU the process's resident set.
        peak: the largest ``used`` that was seen.
        total: what the device has; None for the CPU.
    """

    used: int
    peak: int
    total: int | None


class Device(Protocol):
    """Buffers, and one queue of work in order.

    Attributes:
        name: ``cpu`` or ``cuda:N``.
        kind: ``cpu`` or ``cuda``.
        index: N; 0 for the CPU.
        stream: handle of the queue, for engines that take one; 0 for the CPU.
        queues: whether work is done later than it is asked for.
    """

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def stream(self) -> int: ...
    @property
    def queues(self) -> bool: ...

    def activate(self) -> None:
        """Make it the calling thread's device."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Buffer:
        """A new buffer with any content.

        Raises:
            Sd35Error: no memory.
        """

    def pointer(self, buffer: Buffer) -> int:
        """Its address."""

    def upload(self, array: np.ndarray) -> Buffer:
        """An array on the device; the array may be changed when this returns."""

    def copy(self, source: Buffer, target: Buffer) -> None:
        """Queue a copy between buffers of as many bytes."""

    def download(self, buffer: Buffer) -> np.ndarray:
        """The buffer's content when all queued work is done."""

    def slots(self, shape: tuple[int, ...], dtype: Any, count: int) -> list[np.ndarray]:
        """Host memory that :meth:`fetch` copies to; none where it does not copy."""

    def fetch(self, buffer: Buffer, slot: np.ndarray | None) -> Fetch:
        """Begin to copy a buffer to the host, beside the work that is queued after this."""

    def mark(self) -> Mark:
        """This moment of the queue, for another device of its kind; on the active device."""

    def wait_for(self, mark: Any) -> None:
        """What is queued from now on runs after what another device was asked for before a mark."""

    def reaches(self, other: Any) -> bool:
        """Whether copies from and to another device of its kind go directly; makes it so."""

    def receive(self, target: Buffer, source: Buffer, other: Any) -> None:
        """Queue a copy of another device's buffer; see :mod:`.peer_copies` for their order."""

    def capture(self, work: Callable[[], None]) -> RecordedGraph:
        """Record what ``work`` queues, without doing it.

        Raises:
            Sd35Error: it cannot be recorded.
        """

    def scratch(self, nbytes: int) -> int:
        """Address of working memory that engines share, one running at a time.

        It moves when it has to grow; see :attr:`scratch_version`.
        """

    @property
    def scratch_version(self) -> int:
        """Changes when the address of the working memory does."""

    def synchronize(self) -> None:
        """Wait until all queued work is done.

        Raises:
            Sd35Error: some of it failed.
        """

    def trim(self) -> None:
        """Give back the memory that nobody uses, the working memory included."""

    def memory(self) -> DeviceMemory:
        """What is used now."""

    def close(self) -> None:
        """Free everything, buffers that are still referred to included, also when a part of that
        fails. A second call does no harm."""
