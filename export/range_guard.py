"""The range guard: what comes near FP16's limit in a calibration is computed and carried in FP32.

A layer whose output is beyond the limit computes in FP32, and so does what consumes it before a
normalization brings it back. A residual stream beyond the limit is carried in FP32 from there on.
Layers that the policy computes in FP32 anyway are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sd35_trt.components import part_rows

from .layers import GatedFeedForward, Layer, PlainLayerNorm, cast
from .scales import HALF_LIMIT, Scales

# Consumers that no normalization stands before, and the layers whose outputs bound their input.
_FED_BY = (
    (r"(.*\bff(?:_context)?)\.net\.2", r"\1.net.0.proj"),
    (r"(.*\battn2?)\.to_(?:out\.0|add_out)", r"\1.to_v", r"\1.add_v_proj"),
    (r"(.*attentions\.\d+)\.to_out\.0", r"\1.to_v"),
    (r"(.*DenseReluDense)\.wo", r"\1.wi_0", r"\1.wi_1", r"\1.dropout"),
    (r"(.*SelfAttention)\.o", r"\1.v"),
    (r"(.*mlp)\.fc2", r"\1.fc1"),
    (r"(.*self_attn)\.out_proj", r"\1.v_proj"),
    (r"(time_text_embed\.\w+)\.linear_2", r"\1.linear_1"),
    (
        r".*norm(?:1|1_context|_out)\.linear",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.text_embedder.linear_2",
    ),
)

# Convolutions that read the residual stream itself.
_STREAM_CONVOLUTION = re.compile(r".*(\.conv_shortcut|samplers\.0\.conv)")

# The first layers of a text's way into the transformer.
_READS_TEXT = ("context_embedder", "time_text_embed.text_embedder.linear_1")

# What puts out the operands of an attention, by the attention's class; a norm behind a projection
# counts in its place.
_OPERANDS = {
    "Attention": (
        ("norm_q", "to_q"),
        ("norm_k", "to_k"),
        ("to_v",),
        ("norm_added_q", "add_q_proj"),
        ("norm_added_k", "add_k_proj"),
        ("add_v_proj",),
    ),
    "T5Attention": (("q",), ("k",), ("v",)),
    "CLIPAttention": (("q_proj",), ("k_proj",), ("v_proj",)),
}

_CARRIES = "carries_fp32"

# They cast where their stream enters and leaves FP32 themselves.
_MMDIT_BLOCKS = ("JointTransformerBlock", "SD3SingleTransformerBlock")

_STREAM_BLOCKS = ("ResnetBlock2D", "CLIPEncoderLayer", "T5Block", *_MMDIT_BLOCKS)


def carries_fp32(block: nn.Module) -> bool:
    """Whether a block's residual stream is to be carried in FP32."""
    return getattr(block, _CARRIES, False)


def guard(part: nn.Module, folder: str, scales: Scales) -> dict[str, float]:
    """Widen what the calibration found beyond the limit.

    Args:
        part: the module with the policy applied; changed in place.
        folder: the part's in the checkpoint.

    Returns:
        ``component/module`` → amax of every place that is in FP32 because of it.
    """
    owners = [row.name for row in part_rows(folder)]
    wide = {
        key.partition("/")[2]: (key, amax)
        for key, amax in scales.wide.items()
        if key.partition("/")[0] in owners
    }
    modules = dict(part.named_modules())
    places = {}
    for name, (key, amax) in wide.items():
        module = modules.get(name)
        parent = modules.get(name.rpartition(".")[0])
        feed_forward = parent if isinstance(parent, GatedFeedForward) else None
        behind_gate = name.endswith((".wo", ".dropout"))
        if feed_forward is not None and behind_gate and feed_forward.scales_tokens:
            continue
        if isinstance(module, Layer) and module.dtype == torch.float16:
            module.widen()
            places[key] = amax
        elif module is not None and _is_stream(module) and _is_in_half(module):
            setattr(module, _CARRIES, True)
            places[key] = amax
        elif "AdaLayerNorm" in type(module).__name__ and _computes_in_half(part):
            block, _, norm = name.rpartition(".")
            _widen_modulation(
                [modules["norm_out"], modules["proj_out"]]
                if norm == "norm_out"
                else [modules[block]]
            )
            places[key] = amax
        elif feed_forward is not None and name.endswith(".dropout"):
            # The product of two outputs in range: with one in FP32, so is the product.
            wi: Any = feed_forward.wi_1
            if wi.dtype == torch.float16:
                wi.widen()
                places[key] = amax
    for name, module in modules.items():
        if isinstance(module, Layer):
            _let_follow(name, module, set(wide), owners, scales)
        elif type(module).__name__ in _OPERANDS:
            _agree(module)
    if any(carries_fp32(module) for module in modules.values()):
        _carry(part)
    return places


def _is_stream(module: nn.Module) -> bool:
    kind = type(module).__name__
    return kind in _STREAM_BLOCKS or (kind == "Attention" and bool(module.residual_connection))


def _computes_in_half(module: nn.Module) -> bool:
    return any(m.dtype == torch.float16 for m in module.modules() if isinstance(m, Layer))


def _is_in_half(block: nn.Module) -> bool:
    """Whether the residual stream in a block would be FP16."""
    for module in block.modules():
        if isinstance(module, GatedFeedForward):
            return bool(module.wo.dtype == torch.float16 and not module.scales_tokens)
    return _computes_in_half(block)


def _let_follow(name: str, layer: Layer, wide: set[str], owners: list[str], scales: Scales) -> None:
    producers = [
        re.sub(pattern, producer, name)
        for pattern, *fed_by in _FED_BY
        if re.fullmatch(pattern, name)
        for producer in fed_by
    ]
    inputs = [scales.inputs.get(f"{owner}/{name}", 0.0) for owner in owners]
    if (
        wide.intersection(producers)
        or max(inputs) > HALF_LIMIT
        or _STREAM_CONVOLUTION.fullmatch(name)
        or (scales.wide_text and name in _READS_TEXT)
    ):
        layer.follow()


def _widen_modulation(tops: Iterable[nn.Module]) -> None:
    """Below these modules: modulate in FP32, and let the linears behind it take FP32."""
    for module in (m for top in tops for m in top.modules()):
        if isinstance(module, PlainLayerNorm):
            module.output_dtype = torch.float32
        elif isinstance(module, Layer):
            module.follow()


def _agree(attention: nn.Module) -> None:
    """Where one operand of an attention is in FP32, all are."""
    layers: list[Any] = []
    for names in _OPERANDS[type(attention).__name__]:
        operands = [getattr(attention, n) for n in names if getattr(attention, n, None) is not None]
        layers += operands[:1]
    if any(layer.wide for layer in layers):
        for layer in layers:
            if layer.dtype == torch.float16:
                layer.widen()
        for name in ("q_scale", "k_scale", "v_scale", "p_scale"):
            if hasattr(attention, name):
                scale = getattr(attention, name)
                scale.data = scale.data.float()
        if type(attention).__name__ == "CLIPAttention":
            attention.register_forward_pre_hook(_widen_mask, with_kwargs=True)


def _widen_mask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    mask = kwargs.get("attention_mask")
    return args, kwargs if mask is None else {**kwargs, "attention_mask": mask.float()}


def _carry(part: nn.Module) -> None:
    """Cast where the residual stream enters and leaves FP32."""
    for module in part.modules():
        if not _is_stream(module) or type(module).__name__ in _MMDIT_BLOCKS:
            continue
        if carries_fp32(module):
            module.register_forward_pre_hook(lambda m, args: (args[0].float(), *args[1:]))
        elif type(module).__name__ == "ResnetBlock2D":
            # Pictures are large: back to FP16 as soon as they fit.
            dtype: Any = module.conv2.dtype
            module.register_forward_hook(lambda m, args, out, dtype=dtype: cast(out, dtype))
