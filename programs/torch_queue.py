"""PyTorch on somebody else's stream, so that what it queues can be recorded from outside.

A recorded graph may use no other stream, and nobody else the memory that it writes to. So programs
run

- on the given stream, which PyTorch knows as an ``ExternalStream``;
- with intermediate results in a ``torch.cuda.MemPool``, which is used for nothing else: nothing in
  it outlives a run. A recorded graph finds its addresses there as long as a queue is open, since
  PyTorch returns a pool's memory only when the pool is gone;
- after products that make cuBLAS take its workspace, once per stream, outside the pool, where
  the workspace stays.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch

from sd35_trt.compat.torch import clear_cublas_workspaces, scaled_mm


class TorchQueue:
    """A CUDA stream as PyTorch knows it, and memory for what runs on it.

    Args:
        index: the GPU's number.
        stream: handle of the stream.

    Attributes:
        device: the GPU.
        stream: as PyTorch knows it.
    """

    def __init__(self, index: int, stream: int) -> None:
        self.device = torch.device("cuda", index)
        self.stream = torch.cuda.ExternalStream(stream, device=self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            operand = torch.zeros(16, 16, dtype=torch.float16, device=self.device)
            torch.matmul(operand, operand)
            if torch.cuda.get_device_capability(self.device) >= (8, 9):
                scale = torch.ones((), device=self.device)
                narrow = operand.to(torch.float8_e4m3fn)
                scaled_mm(narrow, narrow.t(), scale, scale, out_dtype=torch.float16)
            self._pool = torch.cuda.MemPool()

    @contextlib.contextmanager
    def running(self, own_bytes: int | None = None) -> Iterator[None]:
        """What PyTorch is asked for inside is queued here.

        Args:
            own_bytes: of memory for this alone, which is given back after it; None takes what is
                kept for recorded graphs.
        """
        pool = self._pool if own_bytes is None else torch.cuda.MemPool()
        try:
            with (
                torch.cuda.device(self.device),
                torch.cuda.stream(self.stream),
                torch.cuda.use_mem_pool(pool, self.device),
            ):
                if own_bytes:
                    whole = torch.empty(own_bytes, dtype=torch.uint8, device=self.device)
                    del whole
                yield
        finally:
            if own_bytes is not None:
                del pool
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def loading(self) -> Iterator[None]:
        """Copies to the GPU beside what is queued: it may be recorded in another thread."""
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.device(self.device), torch.cuda.stream(stream):
            yield
            stream.synchronize()


class HostQueue:
    """The CPU: no stream, no pool."""

    device = torch.device("cpu")

    def running(self, own_bytes: int | None = None) -> Any:
        """See :meth:`TorchQueue.running`."""
        return contextlib.nullcontext()

    loading = running


# One for all that runs on a stream, by GPU and handle.
_QUEUES: weakref.WeakValueDictionary[tuple[int, int], TorchQueue] = weakref.WeakValueDictionary()
_QUEUES_LOCK = threading.Lock()


def shared_queue(index: int, stream: int) -> TorchQueue:
    """The queue of a stream, which lives while somebody refers to it. Any thread may ask."""
    with _QUEUES_LOCK:
        queue = _QUEUES.get((index, stream))
        if queue is None:
            queue = _QUEUES[index, stream] = TorchQueue(index, stream)
        return queue


def release_memory() -> None:
    """Give back to the driver what PyTorch keeps for no queue that is open."""
    with _QUEUES_LOCK:
        if not _QUEUES:
            # PyTorch keeps one for every stream that it has seen. A recorded graph of another
            # queue would go on using its.
            clear_cublas_workspaces()
    torch.cuda.empty_cache()
