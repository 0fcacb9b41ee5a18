"""Blocks of the MMDiT on the operators of :mod:`sd35_trt.programs.fused`, for programs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sd35_trt.programs import fused

from .layers import ExportLinear, ExportRMSNorm, Layer
from .range_guard import carries_fp32
from .torch_layers import JoinedLinear, ScaledLinear


class _OutLinear(Layer):
    """A half-precision linear whose weight is as the checkpoint has it, [out, in]."""

    def __init__(self, linear: ExportLinear) -> None:
        super().__init__()
        shape = (linear.out_features, linear.in_features)
        self.weight = nn.Parameter(
            torch.empty(shape, dtype=linear.weight.dtype), requires_grad=False
        )
        self.bias = linear.bias

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype


def _is_plain(layer: Any, kind: type[Layer]) -> bool:
    """Whether a layer is of a kind and computes in FP16, with a bias where it can have one."""
    return (
        isinstance(layer, kind)
        and not layer.wide
        and (kind is ExportRMSNorm or (not layer.follows and layer.bias is not None))
        and (kind is ScaledLinear or layer.dtype == torch.float16)
    )


def _fuses_attention(attention: Any, names: list[tuple[str, str, str, str]]) -> bool:
    return not hasattr(attention, "q_scale") and all(
        isinstance(getattr(attention, joined, None), JoinedLinear)
        and all(_is_plain(getattr(attention, norm), ExportRMSNorm) for norm in norms)
        and (
            not out
            or _is_plain(
                attention.to_out[0] if out == "to_out" else attention.to_add_out, ExportLinear
            )
        )
        for joined, *norms, out in names
    )


def _fuses_feed_forward(layer: Any) -> bool:
    return all(_is_plain(linear, ScaledLinear) for linear in (layer.net[0].proj, layer.net[2]))


_IMAGE = ("joined", "norm_q", "norm_k", "to_out")
_TEXT = ("joined_added", "norm_added_q", "norm_added_k", "to_add_out")


def fuses(block: Any) -> bool:
    """Whether a block, its policy applied and its layers replaced, is FP8 where the operators are,
    and FP16 where they are that."""
    text = (*_TEXT[:3], "") if block.context_pre_only else _TEXT
    return (
        not carries_fp32(block)
        and _fuses_attention(block.attn, [_IMAGE, text])
        and (block.attn2 is None or _fuses_attention(block.attn2, [_IMAGE]))
        and _fuses_feed_forward(block.ff)
        and (block.context_pre_only or _fuses_feed_forward(block.ff_context))
    )


class FusedBlock(nn.Module):
    """diffusers' JointTransformerBlock; layers keep their names.

    Args:
        block: one that :func:`fuses`.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.context_pre_only = block.context_pre_only
        self.use_dual_attention = block.use_dual_attention
        for name, child in block.named_children():
            self.add_module(name, child)
        attentions: list[Any] = (
            [block.attn, block.attn2] if block.attn2 is not None else [block.attn]
        )
        for attention in attentions:
            for joined, *norms, _ in (_IMAGE, _TEXT):
                if hasattr(attention, joined):
                    getattr(attention, joined).add_norms(norms, getattr(attention, norms[0]).weight)
            attention.to_out[0] = _OutLinear(attention.to_out[0])
            if getattr(attention, "to_add_out", None) is not None:
                attention.to_add_out = _OutLinear(attention.to_add_out)

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As the block that it replaces."""
        states = [hidden_states, encoder_hidden_states]
        image = _rows(self.norm1, temb)
        text = _rows(self.norm1_context, temb)
        if self.context_pre_only:
            scale, shift = text
            attended = [image[:3], [shift, scale]]
            rest = [image[3:6]]
        else:
            attended = [image[:3], text[:3]]
            rest = [image[3:6], text[3:6]]
        norm: Any = self.norm1.norm
        eps = norm.eps
        old = states[: len(rest)]
        gates = [rows[2] for rows in attended[: len(rest)]]
        mixed = _attend(self.attn, [_IMAGE, _TEXT], eps, states, attended)
        states = _project(self.attn, mixed, gates, old)
        if self.use_dual_attention:
            dual = image[6:9]
            mixed = _attend(self.attn2, [_IMAGE], eps, [hidden_states], [dual])
            states[:1] = _project(self.attn2, mixed, [dual[2]], states[:1])
        forwards: list[Any] = [self.ff, getattr(self, "ff_context", None)][: len(rest)]
        first: list[Any] = [forward.net[0].proj for forward in forwards]
        second: list[Any] = [forward.net[2] for forward in forwards]
        inner = fused.modulated(
            states, [rows[0] for rows in rest], [rows[1] for rows in rest],
            [linear.input_scale for linear in first], eps,
        )  # fmt: skip
        inner = fused.gelu(inner, *_parameters(first), [linear.input_scale for linear in second])
        states = fused.gated(inner, *_parameters(second), [rows[2] for rows in rest], states)
        return (states[1] if len(rest) > 1 else None), states[0]


def _rows(norm: Any, modulation: torch.Tensor) -> list[torch.Tensor]:
    """Rows of the modulation of an adaptive normalization, each [N, D].

    Shift, scale and gate of the attention, of the feed-forward, of a second attention; where a
    stream ends with the block, scale and shift.
    """
    first = norm.linear.start
    return [modulation[:, first + k] for k in range(norm.linear.count)]


def _parameters(linears: list[Any]) -> tuple[list[torch.Tensor], ...]:
    """Weights, input scales, weight scales and biases."""
    names = ("weight", "input_scale", "weight_scale", "bias")
    return tuple([getattr(linear, name) for linear in linears] for name in names)


def _attend(
    attention: Any,
    names: list[tuple[str, str, str, str]],
    eps: float,
    states: list[torch.Tensor],
    modulation: list[list[torch.Tensor]],
) -> torch.Tensor:
    """What the tokens of the streams make of each other, FP16 [N, tokens, D].

    Args:
        eps: of the normalization before.
        modulation: shift and scale, by stream.
    """
    joined = [getattr(attention, name) for name, *_ in names]
    weights, input_scales, weight_scales, biases = _parameters(joined)
    shifts, scales = ([rows[k] for rows in modulation] for k in range(2))
    packed = fused.qkv(
        fused.modulated(states, shifts, scales, input_scales, eps),
        weights, input_scales, weight_scales, [linear.factor for linear in joined], biases,
        [linear.norm for linear in joined], attention.norm_q.eps,
    )  # fmt: skip
    packed = packed.unflatten(-1, (3, attention.heads, -1))
    query, key, value = (packed[:, :, k].transpose(1, 2) for k in range(3))
    mixed = nn.functional.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).flatten(2)


def _project(
    attention: Any, mixed: torch.Tensor, gates: list[torch.Tensor], states: list[torch.Tensor]
) -> list[torch.Tensor]:
    """The streams after an attention, those that it has an output for."""
    outs = [attention.to_out[0], getattr(attention, "to_add_out", None)][: len(states)]
    weights, biases = ([getattr(out, name) for out in outs] for name in ("weight", "bias"))
    return list(fused.gated_half(mixed, weights, biases, gates, states))


def fuse_blocks(part: nn.Module) -> None:
    """Put fused blocks in place of a transformer's that can be; other parts stay as they are."""
    blocks: Any = getattr(part, "transformer_blocks", ())
    for k, block in enumerate(blocks):
        if fuses(block):
            blocks[k] = FusedBlock(block)
