"""Device memory that ONNX Runtime's CUDA provider takes for what it allocates.

Source: onnxruntime/core/framework/bfc_arena.cc with ``kSameAsRequested``: what no free chunk has
room for is a region of its own, chunks of different regions are never joined, and no region is
given back during a run. So the arena grows beyond what is alive at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

# Chunks are multiples of this.
_ALIGNMENT = 256

# The rest of a chunk that is larger than what was asked for becomes a chunk of its own from this
# size on, or where it is as large as what was asked for.
_SPLIT = 128 << 20

# cudaMalloc takes multiples of this, many small allocations in one.
_PAGE = 2 << 20
_SMALL = 1 << 20

# Workspaces of the cuBLAS and cuBLASLt handles that each session has (Hopper: 32 MiB each).
_HANDLES = 64 << 20


@dataclass(eq=False)
class Chunk:
    """A part of a region, and its neighbours there."""

    address: int
    size: int
    used: bool = False
    before: Chunk | None = None
    after: Chunk | None = None


class Arena:
    """Adds up the regions that a sequence of allocations needs.

    Attributes:
        total: bytes of all regions.
    """

    def __init__(self) -> None:
        self.total = 0
        self._free: set[Chunk] = set()

    def allocate(self, count: int) -> Chunk:
        """Room for ``count`` bytes: the smallest free chunk, or a new region."""
        size = _round_up(max(count, 1), _ALIGNMENT)
        fitting = (chunk for chunk in self._free if chunk.size >= size)
        chunk = min(fitting, key=lambda c: (c.size, c.address), default=None)
        if chunk is None:
            chunk = Chunk(self.total, size, used=True)
            self.total += size
            return chunk
        self._free.remove(chunk)
        chunk.used = True
        rest = chunk.size - size
        if rest >= size or rest >= _SPLIT:
            chunk.size = size
            other = Chunk(chunk.address + size, rest, before=chunk, after=chunk.after)
            self._link(other)
            self._free.add(other)
        return chunk

    def free(self, chunk: Chunk) -> None:
        """Give a chunk back, joined with free neighbours."""
        chunk.used = False
        for other in (chunk.before, chunk.after):
            if other is None or other.used:
                continue
            self._free.remove(other)
            other.size += chunk.size
            first, second = (other, chunk) if other is chunk.before else (chunk, other)
            other.address, other.before, other.after = first.address, first.before, second.after
            self._link(other)
            chunk = other
        self._free.add(chunk)

    @staticmethod
    def _link(chunk: Chunk) -> None:
        if chunk.before is not None:
            chunk.before.after = chunk
        if chunk.after is not None:
            chunk.after.before = chunk


def allocated_bytes(weights: Iterable[int]) -> int:
    """Device memory of a session that holds weights of these sizes and has not run yet."""
    sizes = list(weights)
    small = sum(size for size in sizes if size < _SMALL)
    large = sum(_round_up(size, _PAGE) for size in sizes if size >= _SMALL)
    return large + _round_up(small, _PAGE) + _HANDLES


def _round_up(count: int, unit: int) -> int:
    return -(-count // unit) * unit
