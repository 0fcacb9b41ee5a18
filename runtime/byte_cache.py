"""A cache that is bounded in bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    """What knows how large it is."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""


_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V", bound=Sized)


class ByteCache(Generic[_K, _V]):
    """The values that were used last, of together no more than so many bytes. One thread at a time.

    Args:
        limit: bytes; what is larger alone is not kept.

    Attributes:
        nbytes: of what it holds.
    """

    def __init__(self, limit: int) -> None:
        self.nbytes = 0
        self._limit = limit
        self._values: OrderedDict[_K, _V] = OrderedDict()

    def get(self, key: _K) -> _V | None:
        """A value, which counts as used; None where it is not held."""
        value = self._values.get(key)
        if value is not None:
            self._values.move_to_end(key)
        return value

    def put(self, key: _K, value: _V) -> None:
        """Hold a value, in the place of those that were not used for longest."""
        if (old := self._values.pop(key, None)) is not None:
            self.nbytes -= old.nbytes
        self._values[key] = value
        self.nbytes += value.nbytes
        while self.nbytes > self._limit:
            _, oldest = self._values.popitem(last=False)
            self.nbytes -= oldest.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._values.clear()
        self.nbytes = 0
