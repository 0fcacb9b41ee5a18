"""The layers inside diffusers' models are as we rely on."""

from __future__ import annotations

import inspect

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from torch import nn

from sd35_trt.compat.diffusers import (
    Attention,
    RMSNorm,
    get_2d_sincos_pos_embed,
    has_joint_processor,
)


def small_transformer() -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=4, dual_attention_layers=(0,), qk_norm="rms_norm",
    )  # fmt: skip


def test_attentions_of_the_transformer_are_joint() -> None:
    attentions = [m for m in small_transformer().modules() if isinstance(m, Attention)]
    assert len(attentions) == 3
    assert all(map(has_joint_processor, attentions))
    for attention in attentions:
        assert isinstance(attention.to_q, nn.Linear)
        assert isinstance(attention.norm_q, RMSNorm)
        assert attention.norm_q.eps > 0
        assert isinstance(attention.to_out[0], nn.Linear)


def test_those_of_the_autoencoder_are_not() -> None:
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)
    attentions = [m for m in model.modules() if isinstance(m, Attention)]
    assert attentions
    assert not any(map(has_joint_processor, attentions))


def test_blocks_have_the_parts_that_the_exporter_replaces() -> None:
    for block in small_transformer().transformer_blocks:  # type: ignore[union-attr]
        assert isinstance(block.norm1.linear, nn.Linear)
        assert isinstance(block.norm1.silu, nn.SiLU)
        assert isinstance(block.norm1_context.linear, nn.Linear)
        assert "AdaLayerNorm" in type(block.norm1_context).__name__
        parameters = inspect.signature(block.forward).parameters
        assert {"hidden_states", "encoder_hidden_states", "temb"} <= parameters.keys()


def test_the_position_table_is_beside_and_below() -> None:
    table = get_2d_sincos_pos_embed(8, 4, base_size=2, output_type="pt")
    assert tuple(torch.as_tensor(table).shape) == (16, 8)
