"""A part's tensors with some of another part's."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .weights import Weights

if TYPE_CHECKING:
    import torch


class BorrowedWeights(Weights):
    """The tensors of a part, those of a prefix being another part's.

    Args:
        own: the part's.
        other: that the others are taken from, by the same names.
        prefix: of their names.
    """

    def __init__(self, own: Weights, other: Weights, prefix: str) -> None:
        self.folder = own.folder
        self.files = own.files
        self.quantization = own.quantization
        self.advice = own.advice
        self._own = own
        self._other = other
        self._prefix = prefix

    def _of(self, name: str) -> Weights:
        return self._other if name.startswith(self._prefix) else self._own

    def __contains__(self, name: str) -> bool:
        return name in self._of(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """See :meth:`Weights.shape`."""
        return self._of(name).shape(name)

    def dtype(self, name: str) -> str:
        """See :meth:`Weights.dtype`."""
        return self._of(name).dtype(name)

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`; of the part's own."""
        return self._own.unused([n for n in names if not n.startswith(self._prefix)])

    def source(self, name: str) -> str:
        """See :meth:`Weights.source`."""
        return self._of(name).source(name)

    def read(self, name: str) -> torch.Tensor:
        """See :meth:`Weights.read`."""
        return self._of(name).read(name)

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`."""
        return self._of(name).fp8(name)

    def input_amax(self, layer: str) -> float | None:
        """See :meth:`Weights.input_amax`."""
        return self._of(layer).input_amax(layer)

    def _file(self, name: str) -> Path:
        return self._of(name)._file(name)
