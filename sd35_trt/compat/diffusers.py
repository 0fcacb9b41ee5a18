"""What we use of diffusers beside its models, pipelines and schedulers: the layers inside them."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.normalization import RMSNorm

__all__ = ["Attention", "RMSNorm", "get_2d_sincos_pos_embed", "has_joint_processor"]


def has_joint_processor(attention: Any) -> bool:
    """Whether an attention is of the MMDiT's kind, over the tokens of image and text together."""
    return "Joint" in type(attention.processor).__name__
