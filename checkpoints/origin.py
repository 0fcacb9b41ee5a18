"""Where a tensor comes from in a file that spells it in another way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class Origin:
    """A tensor made from one of the original layout, of any type.

    Attributes:
        source: the original's name.
        take: from the original to the tensor.
        scaled: whether the tensor's values scale with the original's.
    """

    source: str
    take: Callable[[torch.Tensor], torch.Tensor] = _as_it_is
    scaled: bool = True

    def shape(self, source: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape, from the original's."""
        if self.take is _as_it_is:
            return source
        import torch

        return tuple(self.take(torch.empty(source, device="meta")).shape)


#: From a diffusers name to its origin.
Origins = Callable[[str], Origin]


def third(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Queries, keys or values of a fused projection: a third of its rows."""

    def take(tensor: torch.Tensor) -> torch.Tensor:
        rows = tensor.shape[0] // 3
        return tensor[index * rows : (index + 1) * rows]

    return take
