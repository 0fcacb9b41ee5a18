"""The original layout of SD3.5: where diffusers' tensors are in it, and what its shapes tell.

A diffusers tensor is found by its name: :class:`Origin` says which tensor of the original it is
made from, and how. Configurations come from shapes; what shapes do not show is as in the published
models.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sd35_trt.components import LATENT_SCALE

from .origin import Origin, Origins, third
from .structure import published_config
from .text_names import CLIP_ANCHORS, T5_ANCHOR, clip_l_origins, clip_origins, t5_origins

if TYPE_CHECKING:
    import torch

    from .diffusers import Weights

#: Channels of an attention head, in the MMDiT and in both CLIPs.
_HEAD = 64


@dataclass(frozen=True)
class Layout:
    """One part in the original layout.

    Attributes:
        title: what users call it.
        prefixes: in front of its tensors' names, in a file that holds several parts.
        alone: as ``prefixes``, in a file of its own.
        anchors: tensors of which every such part has one, by spelling.
        origins: makes its :data:`Origins` from the names in the file, without prefix.
        configure: makes its configuration; raises ValueError or ZeroDivisionError for shapes that
            no SD3.5 has.
    """

    title: str
    prefixes: tuple[str, ...]
    alone: tuple[str, ...]
    anchors: tuple[str, ...]
    origins: Callable[[Collection[str]], Origins]
    configure: Callable[[Weights], dict[str, Any]]


def _count(names: Collection[str] | Weights, pattern: str) -> int:
    """How many of ``pattern.format(0)``, ``pattern.format(1)``, … there are without a gap."""
    count = 0
    while pattern.format(count) in names:
        count += 1
    return count


# The MMDiT.


def _swap_halves(tensor: torch.Tensor) -> torch.Tensor:
    """Shift and scale, which the last layers' modulation has in the other order in diffusers."""
    return tensor.roll(tensor.shape[0] // 2, 0)


_OUTER = {
    "pos_embed.proj": Origin("x_embedder.proj"),
    "time_text_embed.timestep_embedder.linear_1": Origin("t_embedder.mlp.0"),
    "time_text_embed.timestep_embedder.linear_2": Origin("t_embedder.mlp.2"),
    "time_text_embed.text_embedder.linear_1": Origin("y_embedder.mlp.0"),
    "time_text_embed.text_embedder.linear_2": Origin("y_embedder.mlp.2"),
    "context_embedder": Origin("context_embedder"),
    "norm_out.linear": Origin("final_layer.adaLN_modulation.1", _swap_halves),
    "proj_out": Origin("final_layer.linear"),
}


def _stream(ours: dict[str, str], theirs: str, attention: str) -> dict[str, Origin]:
    """One of a block's two streams, from the module's name in diffusers."""
    origins = {ours[name]: Origin(f"{theirs}.{name}") for name in ours if "attn" not in name}
    for index, letter in enumerate("qkv"):
        projection = ours["attn." + letter]
        origins[projection] = Origin(f"{theirs}.{attention}.qkv", third(index))
    for name in ("proj", "ln_q", "ln_k"):
        origins[ours[f"attn.{name}"]] = Origin(f"{theirs}.{attention}.{name}")
    return origins


_IMAGE = {
    "attn.q": "attn.to_q", "attn.k": "attn.to_k", "attn.v": "attn.to_v",
    "attn.ln_q": "attn.norm_q", "attn.ln_k": "attn.norm_k", "attn.proj": "attn.to_out.0",
    "adaLN_modulation.1": "norm1.linear", "mlp.fc1": "ff.net.0.proj", "mlp.fc2": "ff.net.2",
}  # fmt: skip
_SECOND = {name: ours.replace("attn", "attn2") for name, ours in _IMAGE.items() if "attn" in name}
_TEXT = {
    "attn.q": "attn.add_q_proj", "attn.k": "attn.add_k_proj", "attn.v": "attn.add_v_proj",
    "attn.ln_q": "attn.norm_added_q", "attn.ln_k": "attn.norm_added_k",
    "attn.proj": "attn.to_add_out", "adaLN_modulation.1": "norm1_context.linear",
    "mlp.fc1": "ff_context.net.0.proj", "mlp.fc2": "ff_context.net.2",
}  # fmt: skip

_BLOCK = {
    **_stream(_IMAGE, "x_block", "attn"),
    **_stream(_SECOND, "x_block", "attn2"),
    **_stream(_TEXT, "context_block", "attn"),
}
_QKV = "joint_blocks.{}.x_block.attn.qkv.weight"


def _transformer_origins(names: Collection[str]) -> Origins:
    last = _count(names, _QKV) - 1

    def find(name: str) -> Origin:
        if name == "pos_embed.pos_embed":
            return Origin("pos_embed")
        module, _, parameter = name.rpartition(".")
        block = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", module)
        if block is None:
            origin = _OUTER.get(module, Origin(module))
            return Origin(f"{origin.source}.{parameter}", origin.take)
        origin = _BLOCK.get(block[2], Origin(block[2]))
        # The last block's text stream ends in its attention: a shift and a scale are left.
        final = int(block[1]) == last and block[2] == "norm1_context.linear"
        source = f"joint_blocks.{block[1]}.{origin.source}.{parameter}"
        return Origin(source, _swap_halves if final else origin.take)

    return find


def _transformer_config(weights: Weights) -> dict[str, Any]:
    layers = _count(weights, "transformer_blocks.{}.attn.to_q.weight")
    dual = [i for i in range(layers) if f"transformer_blocks.{i}.attn2.to_q.weight" in weights]
    width, text = weights.shape("context_embedder.weight")
    _, channels, patch, _ = weights.shape("pos_embed.proj.weight")
    _, positions, _ = weights.shape("pos_embed.pos_embed")
    rows, _ = weights.shape("proj_out.weight")
    _, pooled = weights.shape("time_text_embed.text_embedder.linear_1.weight")
    config = published_config("transformer")
    side = math.isqrt(positions)
    return {
        **config,
        # A model for smaller pictures than its position table covers would not show it.
        "sample_size": min(config["sample_size"], side * patch),
        "patch_size": patch,
        "in_channels": channels,
        "out_channels": rows // patch**2,
        "num_layers": layers,
        "attention_head_dim": _HEAD,
        "num_attention_heads": width // _HEAD,
        "joint_attention_dim": text,
        "caption_projection_dim": width,
        "pooled_projection_dim": pooled,
        "pos_embed_max_size": side,
        "dual_attention_layers": dual,
        "qk_norm": config["qk_norm"]
        if "transformer_blocks.0.attn.norm_q.weight" in weights
        else None,
    }


# The text encoders.


def _clip_config(part: str, weights: Weights) -> dict[str, Any]:
    vocabulary, width = weights.shape(CLIP_ANCHORS[0])
    positions, _ = weights.shape("text_model.embeddings.position_embedding.weight")
    inner, _ = weights.shape("text_model.encoder.layers.0.mlp.fc1.weight")
    projection, _ = weights.shape("text_projection.weight")
    return {
        **published_config(part),
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": _count(
            weights, "text_model.encoder.layers.{}.self_attn.q_proj.weight"
        ),
        "num_attention_heads": width // _HEAD,
        "projection_dim": projection,
    }


def _t5_config(weights: Weights) -> dict[str, Any]:
    vocabulary, width = weights.shape("shared.weight")
    first = "encoder.block.0.layer.0.SelfAttention"
    rows, _ = weights.shape(f"{first}.q.weight")
    buckets, heads = weights.shape(f"{first}.relative_attention_bias.weight")
    inner, _ = weights.shape("encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    return {
        **published_config("text_encoder_3"),
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": rows // heads,
        "d_ff": inner,
        "num_layers": _count(weights, "encoder.block.{}.layer.0.SelfAttention.q.weight"),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
    }


# The autoencoder.

_DIFFUSERS_VAE = "encoder.down_blocks.0.resnets.0.conv1.weight"

# Modules of the mid-block's attention: 1×1 convolutions in the original, linears in diffusers.
_VAE_ATTENTION = {"to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def _vae_origins(names: Collection[str]) -> Origins:
    if _DIFFUSERS_VAE in names:
        return Origin
    last = _count(names, "encoder.down.{}.block.0.conv1.weight") - 1

    def up(match: re.Match[str]) -> str:
        # The original numbers them from the picture, diffusers from the latents.
        return f"decoder.up.{last - int(match[1])}."

    def middle(match: re.Match[str]) -> str:
        return f".mid.block_{int(match[1]) + 1}."

    def find(name: str) -> Origin:
        name = re.sub(r"^encoder\.down_blocks\.", "encoder.down.", name)
        name = re.sub(r"^decoder\.up_blocks\.(\d+)\.", up, name)
        name = re.sub(r"\.mid_block\.resnets\.(\d+)\.", middle, name)
        name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
        name = re.sub(r"\.(down|up)samplers\.0\.", r".\1sample.", name)
        name = name.replace(".conv_shortcut.", ".nin_shortcut.")
        name = name.replace(".conv_norm_out.", ".norm_out.")
        attention = re.fullmatch(r"(.*)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name)
        if attention is None:
            return Origin(name)
        base, module, parameter = attention.groups()
        source = f"{base}.mid.attn_1.{_VAE_ATTENTION.get(module, 'norm')}.{parameter}"
        flat = module in _VAE_ATTENTION and parameter == "weight"
        return Origin(source, lambda tensor: tensor.flatten(1)) if flat else Origin(source)

    return find


def _vae_config(weights: Weights) -> dict[str, Any]:
    config = published_config("vae")
    blocks = _count(weights, "encoder.down_blocks.{}.resnets.0.conv1.weight")
    _, latents, _, _ = weights.shape("decoder.conv_in.weight")
    channels = [
        weights.shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(blocks)
    ]
    if 2 ** (blocks - 1) != LATENT_SCALE:
        raise ValueError
    return {
        **config,
        "latent_channels": latents,
        "block_out_channels": channels,
        "layers_per_block": _count(weights, "encoder.down_blocks.0.resnets.{}.conv1.weight"),
        "use_quant_conv": "quant_conv.weight" in weights,
        "use_post_quant_conv": "post_quant_conv.weight" in weights,
        "mid_block_add_attention": "decoder.mid_block.attentions.0.to_q.weight" in weights,
    }


# Of files that hold several encoders: ComfyUI's, diffusers', and those of SD 1 and XL.
_CLIP_L_PREFIXES = (
    "text_encoders.clip_l.transformer.",
    "text_encoders.clip_l.",
    "clip_l.transformer.",
    "clip_l.",
    "text_encoder.",
    "conditioner.embedders.0.transformer.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
    "cond_stage_model.",
)
_CLIP_G_PREFIXES = (
    "text_encoders.clip_g.transformer.",
    "text_encoders.clip_g.model.",
    "text_encoders.clip_g.",
    "clip_g.transformer.",
    "clip_g.",
    "text_encoder_2.",
    "conditioner.embedders.1.model.",
)
_T5_PREFIXES = (
    "text_encoders.t5xxl.transformer.",
    "text_encoders.t5xxl.",
    "t5xxl.transformer.",
    "t5xxl.",
    "text_encoder_3.",
)
# Of a file with one CLIP.
_CLIP_ALONE = (
    "", "transformer.", "model.", "text.", "cond_stage_model.transformer.",
    "cond_stage_model.model.", "cond_stage_model.",
)  # fmt: skip

#: Part → its layout.
LAYOUTS = {
    "transformer": Layout(
        "transformer",
        ("model.diffusion_model.", "diffusion_model.", "model.", ""),
        (),
        (_QKV.format(0),),
        _transformer_origins,
        _transformer_config,
    ),
    "text_encoder": Layout(
        "CLIP-L",
        _CLIP_L_PREFIXES,
        _CLIP_ALONE,
        CLIP_ANCHORS,
        clip_l_origins,
        lambda weights: _clip_config("text_encoder", weights),
    ),
    "text_encoder_2": Layout(
        "CLIP-G",
        _CLIP_G_PREFIXES,
        _CLIP_ALONE,
        CLIP_ANCHORS,
        clip_origins,
        lambda weights: _clip_config("text_encoder_2", weights),
    ),
    "text_encoder_3": Layout(
        "T5",
        _T5_PREFIXES,
        ("", "transformer.", "model."),
        (T5_ANCHOR,),
        t5_origins,
        _t5_config,
    ),
    "vae": Layout(
        "autoencoder",
        ("first_stage_model.", "vae."),
        ("",),
        ("decoder.conv_in.weight",),
        _vae_origins,
        _vae_config,
    ),
}
