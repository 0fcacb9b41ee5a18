"""Linear layers whose weights are stored as integers and expanded in the graph.

The graph holds a standard DequantizeLinear in front of each product; the weight streamer quantizes
on the way to disk. Symmetric, rounded to nearest; scales are FP16 and floored where FP16 would be
subnormal, and weights are quantized against the scale as stored.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import nn

from .layers import ExportLinear, Layer, Sources, cast

_DTYPE = torch.float16

# The smallest normal FP16; below it, a scale would lose precision.
_SMALLEST_SCALE = 2.0**-14

#: Input channels that share a scale in INT4: the first that divides them.
INT4_BLOCKS = (128, 64)


def _scale(amax: torch.Tensor, levels: int) -> torch.Tensor:
    return (amax.float() / levels).clamp(min=_SMALLEST_SCALE).to(_DTYPE)


def int8_scale(weight: torch.Tensor) -> torch.Tensor:
    """One FP16 scale per output channel: [out, in] → [out]."""
    return _scale(weight.abs().amax(dim=1), 127)


def int8_weight(weight: torch.Tensor) -> torch.Tensor:
    """[out, in] → INT8 [in, out]."""
    scale = int8_scale(weight).float()[:, None]
    return (weight.float() / scale).round().clamp(-127, 127).to(torch.int8).t()


def int4_scale(weight: torch.Tensor, block: int) -> torch.Tensor:
    """One FP16 scale per output channel and ``block`` inputs: [out, in] → [in / block, out]."""
    return _scale(weight.abs().unflatten(1, (-1, block)).amax(dim=2), 7).t()


def int4_weight(weight: torch.Tensor, block: int) -> torch.Tensor:
    """[out, in] → signed values of -7 to 7 in INT8, [in, out]."""
    scale = int4_scale(weight, block).t().float()
    blocks = weight.float().unflatten(1, (-1, block)) / scale[..., None]
    return blocks.round().clamp(-7, 7).flatten(1).to(torch.int8).t()


def pack_int4(tensor: torch.Tensor) -> torch.Tensor:
    """Two values to a byte in row-major order, the first in the low half (ONNX, INT4)."""
    flat = nn.functional.pad(tensor.reshape(-1), (0, tensor.numel() % 2))
    return (flat[0::2] & 0xF) | (flat[1::2] << 4)


class WeightOnlyLinear(Layer):
    """``x @ dequantize(weight, scale) + bias`` in FP16; the weight is [in, out].

    Args:
        linear: the layer it replaces.
        scale_shape: shape of the scales.
        attributes: of DequantizeLinear.
        sources: see :mod:`sd35_trt.export.layers`.
        onnx_type: the weight's type in the file.
    """

    def __init__(
        self,
        linear: ExportLinear,
        scale_shape: tuple[int, ...],
        attributes: dict[str, int],
        sources: Sources,
        onnx_type: ir.DataType,
    ) -> None:
        super().__init__()
        self.SOURCES = sources
        self.ONNX_TYPES = {"weight": onnx_type}
        self.attributes = attributes
        self.in_features, self.out_features = shape = (linear.in_features, linear.out_features)
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
        self.scale = nn.Parameter(torch.empty(scale_shape, dtype=_DTYPE), requires_grad=False)
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
            dtype=_DTYPE,
            shape=self.weight.shape,
        )
        y = torch.matmul(cast(x, dtype), cast(weight, dtype))
        return cast(y if self.bias is None else y + cast(self.bias, dtype), self.output_dtype)


def _int8(linear: ExportLinear) -> WeightOnlyLinear:
    """W8A16: INT8 weights with a scale per output channel."""
    sources: Sources = {"weight": ("weight", int8_weight), "scale": ("weight", int8_scale)}
    return WeightOnlyLinear(linear, (linear.out_features,), {"axis": 1}, sources, ir.DataType.INT8)


def _int4(linear: ExportLinear) -> WeightOnlyLinear:
    """W4A16: INT4 weights with a scale per block of inputs; INT8 where no block divides them."""
    block = next((b for b in INT4_BLOCKS if linear.in_features % b == 0), None)
    if block is None:
        return _int8(linear)
    sources: Sources = {
        "weight": ("weight", lambda w: int4_weight(w, block)),
        "scale": ("weight", lambda w: int4_scale(w, block)),
    }
    shape = (linear.in_features // block, linear.out_features)
    attributes = {"axis": 0, "block_size": block}
    return WeightOnlyLinear(linear, shape, attributes, sources, ir.DataType.INT4)


#: Policy precision → the layer that takes a linear's place.
WEIGHT_ONLY: dict[str, Callable[[ExportLinear], WeightOnlyLinear]] = {
    "int8-weight": _int8,
    "int4-weight": _int4,
}
