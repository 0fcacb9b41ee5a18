"""FP8: linear layers and attention matmuls on E4M3 operands (W8A8, static scales per tensor).

The graph holds a standard QuantizeLinear and DequantizeLinear on every activation and a
DequantizeLinear on every weight, which an engine turns into FP8 arithmetic; here the operands are
rounded to E4M3 and multiplied in FP16, or in FP32 where the range guard says so.

A scale is amax / 448 in the precision of the arithmetic around it: engines want one type on either
side of a Q/DQ (ONNX Runtime's CPU kernels refuse a mixture), so that FP16 graphs have FP16 scales,
floored where FP16 would be subnormal. Everything is quantized against the scale as stored. A weight
that the checkpoint has in E4M3 is taken over with its scale.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from sd35_trt.formats.calibration import ATTENTION_OPERANDS, E4M3_MAX

from .layers import ExportLinear, Layer, Sources, cast

_E4M3 = torch.float8_e4m3fn

#: Linears of diffusers' Attention that give query, key and value: of the image, of the text.
IMAGE_PROJECTIONS = ("to_q", "to_k", "to_v")
TEXT_PROJECTIONS = ("add_q_proj", "add_k_proj", "add_v_proj")

_TakeOver = Callable[[torch.Tensor, torch.Tensor], "torch.Tensor | None"]


def fp8_scale(amax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale of a tensor as stored: amax / 448, at least the smallest normal of ``dtype``."""
    return (amax.float() / E4M3_MAX).clamp(min=torch.finfo(dtype).tiny).to(dtype)


def fp8_weight(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] → E4M3 [in, out], against the scale as stored in ``dtype``."""
    scaled = weight.float() / fp8_scale(weight.abs().amax(), dtype).float()
    # PyTorch's conversion gives NaN where ONNX's saturates.
    return scaled.clamp_(-E4M3_MAX, E4M3_MAX).to(_E4M3).t()


def _dequantize(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = torch.onnx.ops.symbolic(
        "DequantizeLinear", (x, scale), dtype=scale.dtype, shape=x.shape
    )
    return y


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """QuantizeLinear and DequantizeLinear; computed and returned in the scale's dtype.

    Args:
        zero: E4M3's, whose type says what is rounded to: TensorRT 10.6 reads no attribute for it.
    """
    x = cast(x, scale.dtype)
    rounded = torch.onnx.ops.symbolic(
        "QuantizeLinear", (x, scale, zero), dtype=_E4M3, shape=x.shape
    )
    return _dequantize(rounded, scale)


def _scalar(dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty((), dtype=dtype), requires_grad=False)


def _zero(_: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=_E4M3)


class Fp8Linear(Layer):
    """``fake_quantize(x) @ dequantize(weight) + bias``; the weight is E4M3 [in, out].

    Args:
        linear: the layer it replaces.
        input_amax: largest magnitude of its input; None for a layer whose weights are not to be
            written.
    """

    calibrated = True

    def __init__(self, linear: ExportLinear, input_amax: float | None) -> None:
        super().__init__()
        self.in_features, self.out_features = shape = (linear.in_features, linear.out_features)
        self.input_amax = input_amax
        self.weight = nn.Parameter(torch.empty(shape, dtype=_E4M3), requires_grad=False)
        self.weight_scale = _scalar(torch.float16)
        self.input_scale = _scalar(torch.float16)
        self.zero_point = _scalar(_E4M3)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.to(torch.float16))

        def input_scale(weight: torch.Tensor) -> torch.Tensor:
            if input_amax is None:
                raise ValueError("an FP8 linear that was not calibrated cannot be written")
            return fp8_scale(torch.tensor(input_amax), self.input_scale.dtype)

        self.SOURCES: Sources = {
            "weight": ("weight", lambda w: fp8_weight(w, self.weight_scale.dtype)),
            "weight_scale": (
                "weight",
                lambda w: fp8_scale(w.abs().amax(), self.weight_scale.dtype),
            ),
            "input_scale": ("weight", input_scale),
            "zero_point": ("weight", _zero),
        }

        self.FP8_SOURCES: dict[str, _TakeOver] = {
            "weight": lambda weight, scale: weight.t() if self._holds(scale) else None,
            "weight_scale": lambda weight, scale: scale if self._holds(scale) else None,
        }

    def _holds(self, scale: torch.Tensor) -> bool:
        """Whether a scale is a normal number in the stored precision."""
        limits = torch.finfo(self.weight_scale.dtype)
        return limits.tiny <= float(scale) <= limits.max

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16

    def compute_dtype(self, x: torch.Tensor) -> torch.dtype:
        return self.weight_scale.dtype

    def widen(self) -> None:
        super().widen()
        self.follow()

    def follow(self) -> None:
        super().follow()
        for parameter in (self.weight_scale, self.input_scale, self.bias):
            if parameter is not None:
                parameter.data = parameter.data.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.compute_dtype(x)
        weight = _dequantize(self.weight, self.weight_scale)
        y = torch.matmul(fake_quantize(x, self.input_scale, self.zero_point), weight)
        return cast(y if self.bias is None else y + cast(self.bias, dtype), self.output_dtype)


class AttentionProcessor:
    """diffusers' JointAttnProcessor2_0, projections and matmuls being for a subclass to say."""

    def project(
        self, attn: Any, x: torch.Tensor, names: tuple[str, str, str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value [N, T, D] of a stream, by the names of their linears."""
        query, key, value = (getattr(attn, name)(x) for name in names)
        return query, key, value

    def join(
        self, attn: Any, image: tuple[torch.Tensor, ...], text: tuple[torch.Tensor, ...] | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value of all tokens, normalized, [N, heads, T, d].

        Args:
            image, text: projections of each, [N, T, heads · d].
        """

        def heads(x: torch.Tensor, norm: nn.Module | None = None) -> torch.Tensor:
            y = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            return y if norm is None else norm(y)

        query, key, value = image
        query, key, value = heads(query, attn.norm_q), heads(key, attn.norm_k), heads(value)
        if text is not None:
            query = torch.cat([query, heads(text[0], attn.norm_added_q)], dim=2)
            key = torch.cat([key, heads(text[1], attn.norm_added_k)], dim=2)
            value = torch.cat([value, heads(text[2])], dim=2)
        return query, key, value

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Softmax(Q Kᵀ / √d) V; all [N, heads, T, d]."""
        raise NotImplementedError

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> Any:
        pixels = hidden_states.shape[1]
        image = self.project(attn, hidden_states, IMAGE_PROJECTIONS)
        text = None
        if encoder_hidden_states is not None:
            text = self.project(attn, encoder_hidden_states, TEXT_PROJECTIONS)
        query, key, value = self.join(attn, image, text)
        mixed = self.attend(attn, query, key, value).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return attn.to_out[0](mixed)
        rest = mixed[:, pixels:]
        added = rest if attn.context_pre_only else attn.to_add_out(rest)
        return attn.to_out[0](mixed[:, :pixels]), added


class Fp8AttentionProcessor(AttentionProcessor):
    """Its two matmuls on E4M3 operands.

    Attention is spelled out, not one operator: ONNX's Attention has no place for the Q/DQ of the
    softmax output, and TensorRT fuses this form into its FP8 attention.

    The scales are parameters of the attention module, ``q_scale``, ``k_scale``, ``v_scale`` and
    ``p_scale`` (softmax output); see :func:`quantize_attention`.
    """

    def attend(
        self, attn: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """See :class:`AttentionProcessor`."""
        return fp8_attention(partial(fake_quantize, zero=attn.zero_point), attn, query, key, value)


def fp8_attention(
    quantize: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    attn: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
) -> torch.Tensor:
    """Attention on operands that ``quantize`` rounds, given an operand and its scale."""
    scores = torch.matmul(
        quantize(query, attn.q_scale), quantize(key, attn.k_scale).transpose(2, 3)
    )
    weights = torch.softmax(scores * query.shape[-1] ** -0.5, dim=-1)
    return torch.matmul(quantize(weights, attn.p_scale), quantize(value, attn.v_scale))


def quantize_attention(attn: Any, amax: dict[str, float] | None) -> None:
    """Compute an attention's matmuls in FP8.

    Args:
        attn: diffusers' Attention, as in a JointTransformerBlock.
        amax: largest magnitude by operand (q, k, v, p); None where nothing is to be written.
    """
    attn.SOURCES = {}
    for operand in ATTENTION_OPERANDS:
        name = f"{operand}_scale"
        scale = _scalar(torch.float16)
        setattr(attn, name, scale)

        # Any tensor of the module will do: the value is the calibration's.
        def value(_: torch.Tensor, operand: str = operand, scale: nn.Parameter = scale) -> Any:
            if amax is None:
                raise ValueError("an FP8 attention that was not calibrated cannot be written")
            return fp8_scale(torch.tensor(amax[operand]), scale.dtype)

        attn.SOURCES[name] = ("to_q.weight", value)
    attn.zero_point = _scalar(_E4M3)
    attn.SOURCES["zero_point"] = ("to_q.weight", _zero)
    attn.set_processor(Fp8AttentionProcessor())
