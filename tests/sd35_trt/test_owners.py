"""Which component has a module, and what of a part a policy computes in FP8."""

from __future__ import annotations

import pytest

from sd35_trt.components import layer_owner, module_owner
from sd35_trt.policies import Policy, Rule
from sd35_trt.policies.fp8 import fp8_attentions, fp8_linears


@pytest.mark.parametrize(
    ("part", "module", "layer", "component"),
    [
        ("transformer", "transformer_blocks.3.attn.to_q", "denoiser", "denoiser"),
        ("transformer", "transformer_blocks.3.norm1.linear", "conditioner", "conditioner"),
        ("transformer", "transformer_blocks.3", None, "denoiser"),
        ("transformer", "transformer_blocks.3.norm1", None, "denoiser"),
        ("transformer", "time_text_embed", None, "conditioner"),
        ("text_encoder_3", "encoder.block.0", "t5", "t5"),
        ("text_encoder_3", "shared", None, None),
        ("vae", "post_quant_conv", "vae_decoder", "vae_decoder"),
        ("vae", "encoder.conv_in", "vae_encoder", "vae_encoder"),
        ("unet", "conv_in", None, None),
        ("control_a", "transformer_blocks.3.attn.to_q", "control_a", "control_a"),
        ("control_a", "controlnet_blocks.3", "control_a", "control_a"),
        ("control_a", "pos_embed_input.proj", "control_a", "control_a"),
        ("control_a", "transformer_blocks.3", None, "control_a"),
        (
            "control_a",
            "transformer_blocks.3.norm1.linear",
            "control_a_conditioner",
            "control_a_conditioner",
        ),
    ],
)
def test_owners(part: str, module: str, layer: str | None, component: str | None) -> None:
    assert layer_owner(part, module) == layer
    assert module_owner(part, module) == component


def test_names_in_fp8() -> None:
    rules = (
        Rule("*", "*", "half", ""),
        Rule("denoiser", "*.attn.to_*", "fp8", ""),
        Rule("denoiser", "*.attn", "fp8", ""),
        Rule("vae_*", "*.attentions.0", "fp8", ""),
    )
    policy = Policy("some", "", rules)
    linears = ["blocks.0.attn.to_q", "blocks.0.norm1.linear", "blocks.0.ff.net.2", "elsewhere"]
    assert fp8_linears("transformer", linears, policy) == ["denoiser/blocks.0.attn.to_q"]
    assert fp8_attentions("transformer", ["blocks.0.attn"], policy) == ["denoiser/blocks.0.attn"]
    # The autoencoder's attentions compute as their operands are.
    assert fp8_attentions("vae", ["decoder.mid_block.attentions.0"], policy) == []
