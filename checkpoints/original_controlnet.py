"""Stability's ControlNets of Large in one file: where diffusers' tensors are in it.

Names: diffusers' ``scripts/convert_sd3_controlnet_to_diffusers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from .origin import Origin, Origins, third
from .weights import Weights

# Of which every such file has one.
_ANCHOR = "transformer_blocks.0.attn.qkv.weight"

_HEAD = 64

_BLOCK = {
    **{f"attn.to_{letter}": Origin("attn.qkv", third(k)) for k, letter in enumerate("qkv")},
    "attn.to_out.0": Origin("attn.proj"),
    "ff.net.0.proj": Origin("mlp.fc1"),
    "ff.net.2": Origin("mlp.fc2"),
    "norm1.linear": Origin("adaLN_modulation.1"),
}


def is_original(names: Collection[str]) -> bool:
    """Whether tensors have the names of Stability's files."""
    return _ANCHOR in names


def net_origins(names: Collection[str]) -> Origins:
    """From diffusers' names to those of a file, which may be the same."""
    return _find if is_original(names) else Origin


def _find(name: str) -> Origin:
    module, _, parameter = name.rpartition(".")
    block = re.fullmatch(r"(transformer_blocks\.\d+\.)(.+)", module)
    origin = _BLOCK.get(block[2]) if block is not None else None
    if block is None or origin is None:
        return Origin(name)
    return Origin(f"{block[1]}{origin.source}.{parameter}", origin.take)


def net_config(weights: Weights) -> dict[str, Any]:
    """A configuration by shapes; what they do not show is as in the published nets.

    Raises:
        CheckpointError: a tensor is missing.
    """
    width, channels, patch, _ = weights.shape("pos_embed_input.proj.weight")
    _, pooled = weights.shape("time_text_embed.text_embedder.linear_1.weight")
    layers = 0
    while f"controlnet_blocks.{layers}.weight" in weights:
        layers += 1
    return {
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": channels,
        "num_layers": layers,
        "attention_head_dim": _HEAD,
        "num_attention_heads": width // _HEAD,
        "pooled_projection_dim": pooled,
        "joint_attention_dim": None,
        "caption_projection_dim": None,
        "pos_embed_max_size": None,
        "pos_embed_type": None,
        "use_pos_embed": False,
        "force_zeros_for_pooled_projection": False,
    }
