"""A GPU's streams, the events between them, and graphs of what a stream was given."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from .cuda_runtime import CudaError, check
from .device import Buffer

# Streams of devices that were closed, by GPU. They are taken again: libraries keep a workspace for
# every stream that they have seen.
_IDLE: dict[int, list[Any]] = {}


def take_stream(index: int) -> Any:
    """A stream of a GPU for engines, most likely one that was given back."""
    try:
        return _IDLE.setdefault(index, []).pop()
    except IndexError:
        return create_stream()


def give_stream_back(index: int, stream: Any) -> None:
    """Keep a stream on which nothing is queued for the next device."""
    _IDLE[index].append(stream)


def create_stream() -> Any:
    """A new stream of the calling thread's GPU."""
    return check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))


class Events:
    """Events, used again when nobody waits for them any more."""

    def __init__(self) -> None:
        self._all: list[Any] = []
        self._idle: list[Any] = []

    def take(self) -> Any:
        """An event, which is the caller's."""
        if self._idle:
            return self._idle.pop()
        event = check(cudart.cudaEventCreateWithFlags(cudart.cudaEventDisableTiming))
        self._all.append(event)
        return event

    def give_back_with(self, owner: object, *events: Any) -> None:
        """Take events back when an object is gone."""
        weakref.finalize(owner, self._idle.extend, events)

    def close(self) -> None:
        """Destroy every event."""
        for event in self._all:
            check(cudart.cudaEventDestroy(event))


class CudaFetch:
    """See :class:`sd35_trt.runtime.devices.device.Fetch`.

    Args:
        source: what is copied; not freed before the copy.
        slot: memory of the host that it goes to.
        event: recorded behind the copy.
        stream: whose later work :meth:`fence` holds back.
    """

    def __init__(self, source: Buffer, slot: np.ndarray, event: Any, stream: Any) -> None:
        self._source, self._slot, self._event, self._stream = source, slot, event, stream

    def wait(self) -> np.ndarray:
        check(cudart.cudaEventSynchronize(self._event))
        return self._slot

    def fence(self) -> None:
        check(cudart.cudaStreamWaitEvent(self._stream, self._event, 0))


class CudaMark:
    """See :class:`sd35_trt.runtime.devices.device.Mark`.

    Args:
        event: recorded at that moment.

    Attributes:
        event: as given.
    """

    def __init__(self, event: Any) -> None:
        self.event = event


class CudaGraph:
    """See :class:`sd35_trt.runtime.devices.device.RecordedGraph`."""

    def __init__(self, executable: Any, stream: Any) -> None:
        self._executable: Any = executable
        self._stream = stream

    def replay(self) -> None:
        check(cudart.cudaGraphLaunch(self._executable, self._stream))

    def close(self) -> None:
        if self._executable is not None:
            check(cudart.cudaGraphExecDestroy(self._executable))
            self._executable = None


def record(stream: Any, work: Callable[[], None]) -> CudaGraph:
    """What ``work`` queues on a stream, as a graph.

    Raises:
        CudaError: it cannot be recorded.
    """
    # Other threads may allocate meanwhile: an engine that is loaded ahead.
    mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    check(cudart.cudaStreamBeginCapture(stream, mode))
    try:
        work()
    except BaseException:
        # The capture has to end before anything else is queued; its own error says less.
        with contextlib.suppress(CudaError):
            check(cudart.cudaGraphDestroy(check(cudart.cudaStreamEndCapture(stream))))
        raise
    recording = check(cudart.cudaStreamEndCapture(stream))
    try:
        return CudaGraph(check(cudart.cudaGraphInstantiate(recording, 0)), stream)
    finally:
        check(cudart.cudaGraphDestroy(recording))
