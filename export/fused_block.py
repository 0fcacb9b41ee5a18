"""Blocks of the MMDiT on the operators of :mod:`sd35_trt.programs.fused`, for programs."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn

from sd35_trt.programs import fused

from .layers import ExportLinear, ExportRMSNorm, Layer
from .range_guard import carries_fp32
from .torch_layers import JoinedLinear, ScaledLinear


class LinearAdapters(Protocol):
    """What adapters add to the linears of a block; see :mod:`.adapters`."""

    @property
    def scales(self) -> torch.Tensor | None:
        """Of the run, [samples, rank]; None where it has no adapters."""

    def matrices(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [in, linears, rank] and B [linears, rank, out] of the linears that share a product.

        Args:
            linear: one of them, by its name in the block.
        """


class _OutLinear(Layer):
    """A half-precision linear whose weight is as the checkpoint has it, [out, in]."""

    def __init__(self, linear: ExportLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
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
    return all(
        isinstance(getattr(attention, joined, None), JoinedLinear)
        and (_has_plain_norms(attention, norms) or _has_no_norm(attention, norms))
        and (
            not out
            or _is_plain(
                attention.to_out[0] if out == "to_out" else attention.to_add_out, ExportLinear
            )
        )
        for joined, *norms, out in names
    )


def _has_no_norm(attention: Any, norms: list[str]) -> bool:
    # Operands that are quantized are normalized before.
    no_scales = not hasattr(attention, "q_scale")
    return no_scales and all(getattr(attention, norm) is None for norm in norms)


def _has_plain_norms(attention: Any, norms: list[str]) -> bool:
    return all(_is_plain(getattr(attention, norm), ExportRMSNorm) for norm in norms)


def _fuses_feed_forward(layer: Any) -> bool:
    return all(_is_plain(linear, ScaledLinear) for linear in (layer.net[0].proj, layer.net[2]))


_IMAGE = ("joined", "norm_q", "norm_k", "to_out")
_TEXT = ("joined_added", "norm_added_q", "norm_added_k", "to_add_out")


def fuses(block: Any) -> bool:
    """Whether a block, its policy applied and its layers replaced, is FP8 where the operators are,
    and FP16 where they are that."""
    streams = [_IMAGE]
    if has_text := hasattr(block, "norm1_context"):
        streams.append((*_TEXT[:3], "") if block.context_pre_only else _TEXT)
    return (
        not carries_fp32(block)
        and _fuses_attention(block.attn, streams)
        and (
            not getattr(block, "use_dual_attention", False)
            or _fuses_attention(block.attn2, [_IMAGE])
        )
        and _fuses_feed_forward(block.ff)
        and (not has_text or block.context_pre_only or _fuses_feed_forward(block.ff_context))
    )


class FusedBlock(nn.Module):
    """diffusers' JointTransformerBlock; layers keep their names.

    Args:
        block: one that :func:`fuses`.

    Attributes:
        adapted: what adapters add to its linears; None where it takes none.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.adapted: LinearAdapters | None = None
        self.context_pre_only = getattr(block, "context_pre_only", False)
        self.use_dual_attention = getattr(block, "use_dual_attention", False)
        for name, child in block.named_children():
            self.add_module(name, child)
        attentions = (block.attn, getattr(block, "attn2", None))
        for attention in filter(None, attentions):
            for joined, *norms, _ in (_IMAGE, _TEXT):
                if hasattr(attention, joined) and getattr(attention, norms[0]) is not None:
                    getattr(attention, joined).add_norms(norms, getattr(attention, norms[0]).weight)
                if hasattr(attention, joined) and hasattr(attention, "q_scale"):
                    getattr(attention, joined).add_operand_scales(attention.heads)
            attention.to_out[0] = _OutLinear(attention.to_out[0])
            if getattr(attention, "to_add_out", None) is not None:
                attention.to_add_out = _OutLinear(attention.to_add_out)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        added: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """As the block that it replaces.

        Args:
            added: to the image.
        """
        states = self._compute([hidden_states, encoder_hidden_states], temb, added)
        return (states[1] if len(states) > 1 else None), states[0]

    def _compute(
        self, states: list[torch.Tensor], temb: torch.Tensor, added: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """The streams after the block, those that go on.

        Args:
            states: the image's, and the text's where there is one.
        """
        hidden_states = states[0]
        image = _rows(self.norm1, temb)
        attended, rest = [image[:3]], [image[3:6]]
        if self.context_pre_only:
            scale, shift = _rows(self.norm1_context, temb)
            attended.append([shift, scale])
        elif len(states) > 1:
            text = _rows(self.norm1_context, temb)
            attended.append(text[:3])
            rest.append(text[3:6])
        norm: Any = self.norm1.norm
        eps = norm.eps
        old = states[: len(rest)]
        gates = [rows[2] for rows in attended[: len(rest)]]
        mixed = self._attend("attn", [_IMAGE, _TEXT][: len(states)], eps, states, attended)
        states = self._project("attn", mixed, gates, old)
        if self.use_dual_attention:
            dual = image[6:9]
            mixed = self._attend("attn2", [_IMAGE], eps, [hidden_states], [dual])
            states[:1] = self._project("attn2", mixed, [dual[2]], states[:1])
        names = ["ff", "ff_context"][: len(rest)]
        forwards: list[Any] = [getattr(self, name) for name in names]
        first: list[Any] = [forward.net[0].proj for forward in forwards]
        second: list[Any] = [forward.net[2] for forward in forwards]
        inner = fused.modulated(
            states, [rows[0] for rows in rest], [rows[1] for rows in rest],
            [linear.input_scale for linear in first], eps,
        )  # fmt: skip
        scales = [linear.input_scale for linear in first]
        adapters = self._adapters([f"{name}.net.0.proj" for name in names], inner, scales)
        scales = [linear.input_scale for linear in second]
        inner = fused.gelu(inner, *_parameters(first), scales, **adapters)
        adapters = self._adapters([f"{name}.net.2" for name in names], inner, scales)
        adapters |= {} if added is None else {"added": added}
        gates = [rows[2] for rows in rest]
        return list(fused.gated(inner, *_parameters(second), gates, states, **adapters))

    def _adapters(
        self, linears: list[str], x: list[torch.Tensor], input_scales: list[torch.Tensor]
    ) -> dict[str, Any]:
        """Arguments of a product for adapters; none where there are none.

        Args:
            linears: one of each stream's.
            x: what they read.
            input_scales: by which that was divided.
        """
        if self.adapted is None or self.adapted.scales is None:
            return {}
        down, up = map(list, zip(*map(self.adapted.matrices, linears), strict=True))
        return {"hidden": fused.low_rank(x, down, self.adapted.scales, input_scales), "up": up}

    def _attend(
        self,
        name: str,
        names: list[tuple[str, str, str, str]],
        eps: float,
        states: list[torch.Tensor],
        modulation: list[list[torch.Tensor]],
    ) -> torch.Tensor:
        """What the tokens of the streams make of each other, FP16 [N, tokens, D].

        Args:
            name: of the attention.
            eps: of the normalization before.
            modulation: shift and scale, by stream.
        """
        attention: Any = getattr(self, name)
        joined = [getattr(attention, own) for own, *_ in names]
        weights, input_scales, weight_scales, biases = _parameters(joined)
        shifts, scales = ([rows[k] for rows in modulation] for k in range(2))
        x = fused.modulated(states, shifts, scales, input_scales, eps)
        adapters = self._adapters([f"{name}.{own.names[0]}" for own in joined], x, input_scales)
        scale = getattr(joined[0], "operand_scale", None)
        packed = fused.qkv(
            x, weights, input_scales, weight_scales, [linear.factor for linear in joined], biases,
            [linear.norm for linear in joined if hasattr(linear, "norm")],
            0.0 if attention.norm_q is None else attention.norm_q.eps, **adapters,
            **({} if scale is None else {"operand_scale": scale}),
        )  # fmt: skip
        packed = packed.unflatten(-1, (3, attention.heads, -1))
        if scale is not None:
            operands = (packed[:, :, k] for k in range(3))
            return fused.fp8_attention(*operands, scale).flatten(2)
        query, key, value = (packed[:, :, k].transpose(1, 2) for k in range(3))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).flatten(2)

    def _project(
        self, name: str, mixed: torch.Tensor, gates: list[torch.Tensor], states: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The streams after an attention, those that it has an output for."""
        attention: Any = getattr(self, name)
        names = ["to_out.0", "to_add_out"][: len(states)]
        outs: list[Any] = [attention.get_submodule(own) for own in names]
        weights, biases = ([getattr(out, key) for out in outs] for key in ("weight", "bias"))
        adapters: dict[str, Any] = {}
        if self.adapted is not None:
            first = states[0].shape[1]
            x = [mixed[:, :first], mixed[:, first:]][: len(states)]
            adapters = self._adapters([f"{name}.{own}" for own in names], x, [])
        return list(fused.gated_half(mixed, weights, biases, gates, states, **adapters))


class FusedSingleBlock(FusedBlock):
    """diffusers' SD3SingleTransformerBlock, which has no text stream; layers keep their names."""

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, temb: torch.Tensor
    ) -> torch.Tensor:
        """As the block that it replaces."""
        return self._compute([hidden_states], temb)[0]


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


def fuse_blocks(part: nn.Module) -> None:
    """Put fused blocks in place of a transformer's that can be; other parts stay as they are."""
    blocks: Any = getattr(part, "transformer_blocks", ())
    for k, block in enumerate(blocks):
        if fuses(block):
            joint = hasattr(block, "norm1_context")
            blocks[k] = FusedBlock(block) if joint else FusedSingleBlock(block)
