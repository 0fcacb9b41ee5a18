"""Layers that trace to the operators we want and say which checkpoint tensors they are made of.

A layer whose parameters differ from the checkpoint's names its sources in ``SOURCES``: parameter →
(checkpoint tensor in the same module, function from that tensor to the parameter's value); an empty
name is the tensor that the module itself stands for.
Everything else is taken over by name.

A layer with FP8 weights also has ``FP8_SOURCES``: parameter → function from an E4M3 tensor and its
scale, as the checkpoint stores them, to the parameter's value, or to None where they are of no use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

Sources = dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]]


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``x.to(dtype)``, without the operators that tracing records where nothing changes.

    They were most of a traced graph, and of the time that tracing takes.
    """
    return x if x.dtype == dtype else x.to(dtype)


class Layer(nn.Module):
    """A layer with a precision: it returns its weight's, or FP32 where the range guard says so.

    Attributes:
        wide: the output may exceed FP16: compute and return FP32. The weight stays as stored.
        follows: the input may exceed FP16: where it comes in FP32, compute in FP32.
        calibrated: the input is quantized against the largest magnitude that a calibration saw.
    """

    wide = False
    follows = False
    calibrated = False

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the policy gives."""
        raise NotImplementedError

    @property
    def output_dtype(self) -> torch.dtype:
        return torch.float32 if self.wide else self.dtype

    def widen(self) -> None:
        """Set ``wide``."""
        self.wide = True

    def follow(self) -> None:
        """Set ``follows``."""
        self.follows = True

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        """Precision of the arithmetic on this input."""
        if not self.follows or x.dtype == self.output_dtype:
            return self.output_dtype
        return torch.promote_types(self.output_dtype, x.dtype)


class _Weighted(Layer):
    weight: nn.Parameter
    bias: nn.Parameter | None

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def parameters_as(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias in a precision."""
        return cast(self.weight, dtype), None if self.bias is None else cast(self.bias, dtype)


class ExportLinear(_Weighted):
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight, bias = self.parameters_as(dtype)
        y = torch.matmul(cast(x, dtype), weight)
        return cast(y if bias is None else y + bias, self.output_dtype)


class ExportConv2d(_Weighted):
    """A convolution whose input is cast to the weight's dtype."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.weight = conv.weight
        self.bias = conv.bias
        self.options: dict[str, Any] = {
            name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")
        }

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight, bias = self.parameters_as(dtype)
        y = nn.functional.conv2d(cast(x, dtype), weight, bias, **self.options)
        return cast(y, self.output_dtype)


class _Norm(_Weighted):
    """Computes in the wider of its input's and its weight's precision.

    A normalization takes a stream that exceeds FP16 back into its range.
    """

    follows = True


class ExportRMSNorm(_Norm):
    """Traces to one RMSNormalization; the output has the weight's dtype."""

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.bias = None
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight, _ = self.parameters_as(dtype)
        y = nn.functional.rms_norm(cast(x, dtype), weight.shape, weight, self.eps)
        return cast(y, self.output_dtype)


class ExportGroupNorm(_Norm):
    """Traces to GroupNormalization; the output has the weight's dtype."""

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, groups: int, eps: float
    ) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.groups, self.eps = groups, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        parameters = self.parameters_as(dtype)
        y = nn.functional.group_norm(cast(x, dtype), self.groups, *parameters, self.eps)
        return cast(y, self.output_dtype)


class ExportLayerNorm(_Norm):
    """Traces to one LayerNormalization; the output has the weight's dtype."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.bias = norm.bias
        self.shape, self.eps = norm.normalized_shape, norm.eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        parameters = self.parameters_as(dtype)
        y = nn.functional.layer_norm(cast(x, dtype), self.shape, *parameters, self.eps)
        return cast(y, self.output_dtype)


class PlainLayerNorm(nn.Module):
    """A LayerNormalization without parameters.

    Attributes:
        output_dtype: of what it returns; None returns its input's. A stream in FP32 is narrowed.
    """

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.shape, self.eps = norm.normalized_shape, norm.eps
        self.output_dtype: torch.dtype | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.layer_norm(x, self.shape, eps=self.eps)
        return y if self.output_dtype is None else cast(y, self.output_dtype)


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


class GatedFeedForward(nn.Module):
    """T5's ``wo(act(wi_0(x)) * wi_1(x))``, in FP32 where FP16 is too narrow for it.

    What T5 v1.1 puts out here exceeds FP16 (huggingface/transformers#20287). wo has no bias, so a
    half-precision one takes each token's product divided by its largest magnitude, and its output
    is multiplied by that in FP32: tensor cores run it, and no FP32 weight is kept.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.wi_0, self.wi_1, self.wo, self.act = layer.wi_0, layer.wi_1, layer.wo, layer.act

    @property
    def scales_tokens(self) -> bool:
        """Whether products are divided by their magnitude, so that none is too large."""
        wo: Any = self.wo
        return wo.dtype == torch.float16 and not wo.calibrated

    @property
    def output_dtype(self) -> torch.dtype:
        wo: Any = self.wo
        return torch.float32 if self.scales_tokens else wo.output_dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, value = self.act(self.wi_0(x)), self.wi_1(x)
        if not self.scales_tokens:
            return self.wo(gate * value)
        product = gate.float() * value.float()
        magnitude = product.abs().amax(-1, keepdim=True).clamp(torch.finfo(torch.float32).tiny)
        y = self.wo((product / magnitude).half())
        return y * magnitude


def replace_layers(model: nn.Module) -> None:
    """Put this module's layers in place of PyTorch's, diffusers' and transformers' own."""
    for name, child in list(model.named_children()):
        replace_layers(child)
        replacement = _replacement(child)
        if replacement is not None:
            setattr(model, name, replacement)


def _replacement(layer: Any) -> nn.Module | None:
    from sd35_trt.compat.diffusers import RMSNorm
    from sd35_trt.compat.transformers import T5DenseGatedActDense, T5LayerNorm

    if isinstance(layer, nn.Linear):
        return ExportLinear(layer)
    if isinstance(layer, nn.Conv2d):
        return ExportConv2d(layer)
    if isinstance(layer, RMSNorm):
        return ExportRMSNorm(layer.weight, layer.eps)
    if isinstance(layer, T5LayerNorm):
        return ExportRMSNorm(layer.weight, layer.variance_epsilon)
    if isinstance(layer, nn.GroupNorm):
        return ExportGroupNorm(layer.weight, layer.bias, layer.num_groups, layer.eps)
    if isinstance(layer, nn.LayerNorm):
        return PlainLayerNorm(layer) if layer.weight is None else ExportLayerNorm(layer)
    if isinstance(layer, T5DenseGatedActDense):
        return GatedFeedForward(layer)
    return None
