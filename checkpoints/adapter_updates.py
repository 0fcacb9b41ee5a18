"""What an adapter adds to a layer's weight: PEFT's formulas, in FP32.

A LoRA adds s·B·A, a LoHa s·(A₁·B₁ ∘ A₂·B₂), a LoKr s·(W₁ ⊗ W₂); a DoRA then gives each row the
length that it has learnt. Sources: ``peft/tuners/{lora,loha,lokr}``.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

if TYPE_CHECKING:
    import torch

#: Role → shape.
Shapes = Mapping[str, tuple[int, ...]]


class Kind(abc.ABC):
    """A kind of adapter of one layer.

    Attributes:
        title: what users call it.
        needed: roles that each has.
        allowed: roles that it may have besides.
    """

    title: ClassVar[str]
    needed: ClassVar[frozenset[str]]
    allowed: ClassVar[frozenset[str]] = frozenset({"alpha"})

    @staticmethod
    @abc.abstractmethod
    def rank(shapes: Shapes) -> int | None:
        """Of the matrices; None where none of them has less than full rank."""

    @staticmethod
    @abc.abstractmethod
    def fits(shapes: Shapes, weight: tuple[int, ...]) -> bool:
        """Whether the tensors fit a weight [out, in, …]."""

    @staticmethod
    @abc.abstractmethod
    def delta(
        tensors: Mapping[str, torch.Tensor],
        weight: tuple[int, ...],
        take: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """What is added to the weight, before scaling.

        Args:
            tensors: by role, in FP32.
            weight: shape of the layer that the file adapts.
            take: the rows that are meant, from all.
        """


class LowRank(Kind):
    """B·A; also of a convolution, whose A has its kernel."""

    title = "LoRA"
    needed = frozenset({"down", "up"})
    allowed = frozenset({"alpha", "bias", "magnitude"})

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["down"][0]

    @staticmethod
    def fits(shapes: Shapes, weight: tuple[int, ...]) -> bool:
        rank = shapes["down"][0]
        return (
            shapes["down"] == (rank, *weight[1:])
            and shapes["up"] == (weight[0], rank, *(1 for _ in weight[2:]))
            and shapes.get("bias", weight[:1]) == weight[:1]
            and shapes.get("magnitude", weight[:1]) in _lengths(weight)
        )

    @staticmethod
    def delta(
        tensors: Mapping[str, torch.Tensor],
        weight: tuple[int, ...],
        take: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        up = take(tensors["up"].flatten(1))
        return (up @ tensors["down"].flatten(1)).reshape(up.shape[0], *weight[1:])


def _lengths(weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of a length for each row; PEFT's of a convolution is the last."""
    rows, ones = weight[:1], (1,) * len(weight[2:])
    return rows, (*rows, 1, *ones), (1, *rows, *ones) if ones else rows


class Hadamard(Kind):
    """The product, element by element, of two products of matrices."""

    title = "LoHa"
    needed = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return shapes["hada_w1_b"][0]

    @staticmethod
    def fits(shapes: Shapes, weight: tuple[int, ...]) -> bool:
        columns = math.prod(weight[1:])
        return all(
            shapes[f"hada_{w}_a"] == (weight[0], shapes[f"hada_{w}_b"][0])
            and shapes[f"hada_{w}_b"][1:] == (columns,)
            for w in ("w1", "w2")
        )

    @staticmethod
    def delta(
        tensors: Mapping[str, torch.Tensor],
        weight: tuple[int, ...],
        take: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        first, second = (
            take(tensors[f"hada_{w}_a"]) @ tensors[f"hada_{w}_b"] for w in ("w1", "w2")
        )
        return (first * second).reshape(-1, *weight[1:])


class Kronecker(Kind):
    """The Kronecker product of two matrices, each whole or a product."""

    title = "LoKr"
    needed = frozenset()
    allowed = frozenset(
        {"alpha", *(f"lokr_{w}{x}" for w in ("w1", "w2") for x in ("", "_a", "_b"))}
    )

    @staticmethod
    def rank(shapes: Shapes) -> int | None:
        return next((shapes[n][0] for n in ("lokr_w2_b", "lokr_w1_b") if n in shapes), None)

    @staticmethod
    def fits(shapes: Shapes, weight: tuple[int, ...]) -> bool:
        first, second = (_factor_shape(shapes, f"lokr_{w}") for w in ("w1", "w2"))
        if first is None or second is None or len(first) != 2:
            return False
        columns = first[1] * math.prod(second[1:])
        return first[0] * second[0] == weight[0] and columns == math.prod(weight[1:])

    @staticmethod
    def delta(
        tensors: Mapping[str, torch.Tensor],
        weight: tuple[int, ...],
        take: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        import torch

        first, second = (_factor(tensors, f"lokr_{w}") for w in ("w1", "w2"))
        first = first.reshape(*first.shape, *(1 for _ in second.shape[2:]))
        return take(torch.kron(first, second.contiguous()).reshape(weight))


def _factor_shape(shapes: Shapes, name: str) -> tuple[int, ...] | None:
    """Shape of a matrix of a LoKr; None where it is neither whole nor a product, or both."""
    parts = [shapes.get(f"{name}_{x}") for x in "ab"]
    if name in shapes:
        return shapes[name] if parts == [None, None] and len(shapes[name]) > 1 else None
    if parts[0] is None or parts[1] is None or len(parts[0]) != 2 or len(parts[1]) < 2:
        return None
    return (parts[0][0], *parts[1][1:]) if parts[0][1] == parts[1][0] else None


def _factor(tensors: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name in tensors:
        return tensors[name]
    return tensors[f"{name}_a"] @ tensors[f"{name}_b"].flatten(1)


#: The special before the general.
KINDS: tuple[type[Kind], ...] = (LowRank, Hadamard, Kronecker)


@dataclass(frozen=True)
class WeightUpdate:
    """What one adapter does to one weight.

    Attributes:
        kind: its formula.
        tensors: by role, in FP32.
        shape: of the weight of the file's layer, of which the weight may be a part.
        take: the weight's rows, from those of the file's layer.
        scale: of the whole: the adapter's own, times the user's.
        magnitude: whether it sets the rows' lengths.
    """

    kind: type[Kind]
    tensors: Mapping[str, torch.Tensor]
    shape: tuple[int, ...]
    take: Callable[[torch.Tensor], torch.Tensor]
    scale: float
    magnitude: bool = False

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The weight with the update.

        Args:
            value: the weight with what other adapters did to it, FP32.
            base: without any, FP32.
        """
        delta = self.kind.delta(self.tensors, self.shape, self.take) * self.scale
        if not self.magnitude:
            return value + delta
        # The length that a row has with this adapter alone, as PEFT merges several.
        norm = (base + delta).flatten(1).norm(dim=1)
        factor = self.take(self.tensors["magnitude"].flatten()) / norm
        return factor.reshape(-1, *(1 for _ in value.shape[1:])) * (value + delta)


@dataclass(frozen=True)
class BiasUpdate:
    """What one adapter adds to a bias; see :class:`WeightUpdate`."""

    tensors: Mapping[str, torch.Tensor]
    take: Callable[[torch.Tensor], torch.Tensor]
    scale: float

    def apply(self, value: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """As :meth:`WeightUpdate.apply`."""
        return value + self.take(self.tensors["bias"]) * self.scale


#: What one adapter does to one tensor.
Update: TypeAlias = WeightUpdate | BiasUpdate
