"""Linear layers whose weights are stored as integers and expanded in the graph.

The graph holds a standard DequantizeLinear in front of each product; the weight streamer quantizes
on the way to disk. Symmetric, rounded to nearest, against the scale as stored: in FP16, or in FP32
in a layer with a scale that FP16 would have as a subnormal, or as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import nn

from sd35_trt.compat.torch import unset_fake_temporarily

from .layers import ExportLinear, Layer, Sources, cast

_DTYPE = torch.float16

#: Input channels that share a scale in INT4: the first that divides them.
INT4_BLOCKS = (128, 64)


def _amax(weight: torch.Tensor, block: int | None) -> torch.Tensor:
    """Of what shares a scale: [out, in] → [out], or by ``block`` inputs [in / block, out]."""
    if block is None:
        return weight.abs().amax(dim=1).float()
    return weight.abs().unflatten(1, (-1, block)).amax(dim=2).t().float()


@dataclass(frozen=True)
class IntegerFormat:
    """How weights are stored.

    Attributes:
        levels: the largest integer; the smallest is its negative.
        block: inputs that share a scale; None where all of an output channel do.
    """

    levels: int
    block: int | None = None

    def scale(self, weight: torch.Tensor, dtype: torch.dtype = _DTYPE) -> torch.Tensor:
        """Scales of a weight [out, in]: [out], or [in / block, out].

        Args:
            dtype: that they are stored in; none is below its smallest normal number.
        """
        least = torch.finfo(dtype).tiny
        return (_amax(weight, self.block) / self.levels).clamp(min=least).to(dtype)

    def scale_dtype(self, weight: torch.Tensor) -> torch.dtype:
        """FP16, or FP32 where a scale would lose precision in FP16; rows of zeros have none."""
        amax = _amax(weight, self.block)
        least = torch.finfo(_DTYPE).tiny * self.levels
        return torch.float32 if ((amax > 0) & (amax < least)).any() else _DTYPE

    def integers(self, weight: torch.Tensor, dtype: torch.dtype = _DTYPE) -> torch.Tensor:
        """[out, in] → INT8 [in, out], of ``levels`` at most."""
        scale = self.scale(weight, dtype).float()
        wide = weight.float().t()
        if self.block is None:
            steps = wide / scale
        else:
            steps = (wide.unflatten(0, (-1, self.block)) / scale[:, None]).flatten(0, 1)
        return steps.round().clamp(-self.levels, self.levels).to(torch.int8)


def pack_int4(tensor: torch.Tensor) -> torch.Tensor:
    """Two values to a byte in row-major order, the first in the low half (ONNX, INT4)."""
    flat = nn.functional.pad(tensor.reshape(-1), (0, tensor.numel() % 2))
    return (flat[0::2] & 0xF) | (flat[1::2] << 4)


class WeightOnlyLinear(Layer):
    """``x @ dequantize(weight, scale) + bias`` in FP16; the weight is [in, out], the scale FP16 or
    FP32.

    Args:
        linear: the layer it replaces.
        stored: how its weights are.
        onnx_type: the weight's type in the file.
        scale_dtype: as :meth:`IntegerFormat.scale_dtype` says of its weights.
    """

    def __init__(
        self,
        linear: ExportLinear,
        stored: IntegerFormat,
        onnx_type: ir.DataType,
        scale_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.SOURCES: Sources = {
            "weight": ("weight", lambda weight: stored.integers(weight, scale_dtype)),
            "scale": ("weight", lambda weight: stored.scale(weight, scale_dtype)),
        }
        self.ONNX_TYPES = {"weight": onnx_type}
        self.in_features, self.out_features = shape = (linear.in_features, linear.out_features)
        if stored.block is None:
            self.attributes = {"axis": 1}
            scale_shape: tuple[int, ...] = (linear.out_features,)
        else:
            self.attributes = {"axis": 0, "block_size": stored.block}
            scale_shape = (linear.in_features // stored.block, linear.out_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(scale_shape, dtype=scale_dtype), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(_DTYPE))

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPE

    @property
    def packed(self) -> bool:
        """Whether two weights share a byte."""
        return self.ONNX_TYPES["weight"] == ir.DataType.INT4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight = torch.onnx.ops.symbolic(
            "DequantizeLinear",
            (self.weight, self.scale),
            {**self.attributes},
            dtype=self.scale.dtype,
            shape=self.weight.shape,
        )
        y = torch.matmul(cast(x, dtype), cast(weight, dtype))
        return cast(y if self.bias is None else y + cast(self.bias, dtype), self.output_dtype)


def _format(precision: str, in_features: int) -> tuple[IntegerFormat, ir.DataType]:
    """How a linear's weights are stored: INT8 where no block of INT4 divides its inputs."""
    block = next((b for b in INT4_BLOCKS if in_features % b == 0), None)
    if precision == "int4-weight" and block is not None:
        return IntegerFormat(7, block), ir.DataType.INT4
    return IntegerFormat(127), ir.DataType.INT8


def weight_only_linear(
    linear: ExportLinear, precision: str, weight: Callable[[], torch.Tensor] | None = None
) -> WeightOnlyLinear:
    """The layer that takes a linear's place.

    Args:
        precision: one of :data:`WEIGHT_ONLY`.
        weight: reads the linear's weight [out, in]; None where only shapes are asked for, with
            scales in FP16.
    """
    stored, onnx_type = _format(precision, linear.in_features)
    scale_dtype = _DTYPE
    if weight is not None:
        with unset_fake_temporarily():
            scale_dtype = stored.scale_dtype(weight())
    return WeightOnlyLinear(linear, stored, onnx_type, scale_dtype)


#: Precisions of a policy that :func:`weight_only_linear` takes.
WEIGHT_ONLY = ("int8-weight", "int4-weight")
