"""Layers that trace to the operators we want and say which checkpoint tensors they are made of.

A layer whose parameters differ from the checkpoint's names its sources in ``SOURCES``: parameter →
(checkpoint tensor in the same module, function from that tensor to the parameter's value); an empty
name is the tensor that the module itself stands for.
Everything else is taken over by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn

Sources = dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]


class Linear(nn.Module):
    """``x @ weight + bias`` with the weight stored [in, out], so that no Transpose is traced.

    The input is cast to the weight's dtype: layers of several precisions can be chained.
    """

    SOURCES: ClassVar[Sources] = {"weight": ("weight", torch.t)}

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weight = nn.Parameter(linear.weight.t(), requires_grad=False)
        self.bias = linear.bias

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the product."""
        return self.weight.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.matmul(x.to(self.weight.dtype), self.weight)
        return y if self.bias is None else y + self.bias


class RMSNorm(nn.Module):
    """Traces to one RMSNormalization; the output has the weight's dtype."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.rms_norm(x, weight.shape, weight, self.eps).to(self.weight.dtype)


class ModulationRows(nn.Module):
    """Stands in for an adaLN linear: reads its output from the precomputed modulation.

    Input [N, R, D], output [N, count * D], as the linear would have given for ``N`` samples.
    """

    def __init__(self, start: int, count: int) -> None:
        super().__init__()
        self.start = start
        self.count = count

    def forward(self, modulation: torch.Tensor) -> torch.Tensor:
        return modulation[:, self.start : self.start + self.count].flatten(1)


def is_separable(table: torch.Tensor) -> bool:
    """Whether a [1, size², D] position table is columns(x) beside rows(y), exactly.

    Every SD3 model's is: a fixed 2-D sin-cos table (Peebles and Xie, 2022).
    """
    square = _square(table)
    half = square.shape[-1] // 2
    columns, rows = square[..., :half], square[..., half:]
    return bool((columns == columns[:1]).all() and (rows == rows[:, :1]).all())


def _square(table: torch.Tensor) -> torch.Tensor:
    size = round(table.shape[1] ** 0.5)
    return table.view(size, size, -1)


class PositionTable(nn.Module):
    """Centre crop of the stored position table.

    Args:
        size: side of the table in patches.
        channels: D.
    """

    SOURCES: ClassVar[Sources] = {"table": ("", _square)}

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.table = nn.Parameter(torch.empty(size, size, channels), requires_grad=False)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """[1, height * width, D]; height and width in patches."""
        top, left = (self.size - height) // 2, (self.size - width) // 2
        crop = self.table[top : top + height, left : left + width]
        return crop.reshape(1, height * width, -1)


class SeparablePositionTable(nn.Module):
    """The same crop from the table's two one-dimensional halves, each [size, D / 2].

    The checkpoint stores every combination of them: 0.45 GB for Medium.
    """

    SOURCES: ClassVar[Sources] = {
        "columns": ("", lambda t: _square(t)[0, :, : t.shape[-1] // 2]),
        "rows": ("", lambda t: _square(t)[:, 0, t.shape[-1] // 2 :]),
    }

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.size = size
        self.columns = nn.Parameter(torch.empty(size, channels // 2), requires_grad=False)
        self.rows = nn.Parameter(torch.empty(size, channels // 2), requires_grad=False)

    def forward(self, height: int, width: int) -> torch.Tensor:
        """[1, height * width, D]; height and width in patches."""
        top, left = (self.size - height) // 2, (self.size - width) // 2
        columns = self.columns[None, left : left + width].expand(height, -1, -1)
        rows = self.rows[top : top + height, None].expand(-1, width, -1)
        return torch.cat([columns, rows], dim=-1).reshape(1, height * width, -1)


def replace_layers(model: nn.Module) -> None:
    """Put this module's layers in place of PyTorch's, diffusers' and transformers' own."""
    from diffusers.models.normalization import RMSNorm as DiffusersRMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, Linear(child))
            elif isinstance(child, DiffusersRMSNorm):
                setattr(module, name, RMSNorm(child.weight, child.eps))
            elif isinstance(child, T5LayerNorm):
                setattr(module, name, RMSNorm(child.weight, child.variance_epsilon))
            elif (
                isinstance(child, (nn.Conv2d, nn.LayerNorm, nn.GroupNorm))
                and child.weight is not None
            ):
                child.register_forward_pre_hook(_cast_to_weight)


def _cast_to_weight(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(x.to(module.weight.dtype) for x in args)  # type: ignore[arg-type]
