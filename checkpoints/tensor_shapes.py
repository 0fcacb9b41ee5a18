"""Names and shapes of the tensors that a part's configuration asks for, in diffusers' names.

Known from the structure alone, so that a look at a model imports no framework. They are the
parameters of diffusers' ``SD3Transformer2DModel`` and ``AutoencoderKL``, of transformers'
``CLIPTextModelWithProjection`` and ``T5EncoderModel``, and the transformer's table of positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sd35_trt.components import CONTROLNET, part_kind

#: Name → shape.
Shapes = dict[str, tuple[int, ...]]

# Of the sinusoidal embedding of a timestep.
_TIMESTEP = 256

_NAMED = Iterator[tuple[str, tuple[int, ...]]]


def tensor_shapes(part: str, config: Mapping[str, Any]) -> Shapes:
    """The tensors of a part.

    Args:
        part: its folder, such as ``transformer``.
        config: with every key that the shapes depend on; see
            :func:`sd35_trt.checkpoints.configuration.complete`.
    """
    kinds = {"transformer": _transformer, "vae": _autoencoder, "text_encoder_3": _t5,
             CONTROLNET: _controlnet}  # fmt: skip
    return dict(kinds.get(part_kind(part), _clip)(config))


def _layer(name: str, *shape: int) -> _NAMED:
    """A linear, a convolution or a norm: weight and bias."""
    yield f"{name}.weight", shape
    yield f"{name}.bias", shape[:1]


def _transformer(config: Mapping[str, Any]) -> _NAMED:
    heads, head = config["num_attention_heads"], config["attention_head_dim"]
    width, patch, side = heads * head, config["patch_size"], config["pos_embed_max_size"]
    text = config["caption_projection_dim"]
    yield "pos_embed.pos_embed", (1, side * side, width)
    yield from _layer("pos_embed.proj", width, config["in_channels"], patch, patch)
    yield from _time_and_text(width, config)
    yield from _layer("context_embedder", text, config["joint_attention_dim"])
    yield from _layer("norm_out.linear", 2 * width, width)
    yield from _layer("proj_out", patch * patch * config["out_channels"], width)
    for index in range(config["num_layers"]):
        yield from _joint_block(index, index == config["num_layers"] - 1, config)


def _time_and_text(width: int, config: Mapping[str, Any]) -> _NAMED:
    for name, inputs in (("timestep", _TIMESTEP), ("text", config["pooled_projection_dim"])):
        embedder = f"time_text_embed.{name}_embedder"
        yield from _layer(f"{embedder}.linear_1", width, inputs)
        yield from _layer(f"{embedder}.linear_2", width, width)


def _joint_block(index: int, last: bool, config: Mapping[str, Any]) -> _NAMED:
    """A block with both streams.

    Args:
        last: whether its text stream ends in its attention.
    """
    head, text = config["attention_head_dim"], config["caption_projection_dim"]
    width = config["num_attention_heads"] * head
    block = f"transformer_blocks.{index}"
    dual = index in config["dual_attention_layers"]
    yield from _layer(f"{block}.norm1.linear", (9 if dual else 6) * width, width)
    yield from _layer(f"{block}.norm1_context.linear", (2 if last else 6) * width, width)
    attention = f"{block}.attn"
    yield from _image_attention(attention, config)
    for letter in "qkv":
        yield from _layer(f"{attention}.add_{letter}_proj", width, text)
    if config["qk_norm"]:
        yield f"{attention}.norm_added_q.weight", (head,)
        yield f"{attention}.norm_added_k.weight", (head,)
    if dual:
        yield from _image_attention(f"{block}.attn2", config)
    streams = [("ff", width)]
    if not last:
        yield from _layer(f"{attention}.to_add_out", text, width)
        streams.append(("ff_context", text))
    for name, channels in streams:
        yield from _layer(f"{block}.{name}.net.0.proj", 4 * channels, channels)
        yield from _layer(f"{block}.{name}.net.2", channels, 4 * channels)


def _controlnet(config: Mapping[str, Any]) -> _NAMED:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, channels = config["patch_size"], config["in_channels"]
    if config["use_pos_embed"]:
        yield "pos_embed.pos_embed", (1, config["pos_embed_max_size"] ** 2, width)
        yield from _layer("pos_embed.proj", width, channels, patch, patch)
    hint = channels + config["extra_conditioning_channels"]
    yield from _layer("pos_embed_input.proj", width, hint, patch, patch)
    yield from _time_and_text(width, config)
    joint = config["joint_attention_dim"]
    if joint is not None:
        yield from _layer("context_embedder", config["caption_projection_dim"], joint)
    for index in range(config["num_layers"]):
        block = f"transformer_blocks.{index}"
        if joint is not None:
            yield from _joint_block(index, False, config)
        else:
            yield from _layer(f"{block}.norm1.linear", 6 * width, width)
            yield from _image_attention(f"{block}.attn", {**config, "qk_norm": None})
            yield from _layer(f"{block}.ff.net.0.proj", 4 * width, width)
            yield from _layer(f"{block}.ff.net.2", width, 4 * width)
        yield from _layer(f"controlnet_blocks.{index}", width, width)


def _image_attention(name: str, config: Mapping[str, Any]) -> _NAMED:
    head = config["attention_head_dim"]
    width = config["num_attention_heads"] * head
    for module in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _layer(f"{name}.{module}", width, width)
    if config["qk_norm"]:
        yield f"{name}.norm_q.weight", (head,)
        yield f"{name}.norm_k.weight", (head,)


def _clip(config: Mapping[str, Any]) -> _NAMED:
    width, inner = config["hidden_size"], config["intermediate_size"]
    embeddings = "text_model.embeddings"
    yield f"{embeddings}.token_embedding.weight", (config["vocab_size"], width)
    positions = config["max_position_embeddings"]
    yield f"{embeddings}.position_embedding.weight", (positions, width)
    for index in range(config["num_hidden_layers"]):
        block = f"text_model.encoder.layers.{index}"
        for module in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _layer(f"{block}.self_attn.{module}", width, width)
        yield from _layer(f"{block}.mlp.fc1", inner, width)
        yield from _layer(f"{block}.mlp.fc2", width, inner)
        yield from _layer(f"{block}.layer_norm1", width)
        yield from _layer(f"{block}.layer_norm2", width)
    yield from _layer("text_model.final_layer_norm", width)
    yield "text_projection.weight", (config["projection_dim"], width)


def _t5(config: Mapping[str, Any]) -> _NAMED:
    width, inner, heads = config["d_model"], config["d_ff"], config["num_heads"]
    projected = heads * config["d_kv"]
    gated = config["feed_forward_proj"].startswith("gated-")
    yield "shared.weight", (config["vocab_size"], width)
    for index in range(config["num_layers"]):
        block = f"encoder.block.{index}"
        attention, forward = f"{block}.layer.0.SelfAttention", f"{block}.layer.1.DenseReluDense"
        for letter in "qkv":
            yield f"{attention}.{letter}.weight", (projected, width)
        yield f"{attention}.o.weight", (width, projected)
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            yield f"{forward}.{name}.weight", (inner, width)
        yield f"{forward}.wo.weight", (width, inner)
        for layer in (0, 1):
            yield f"{block}.layer.{layer}.layer_norm.weight", (width,)
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    yield table, (config["relative_attention_num_buckets"], heads)
    yield "encoder.final_layer_norm.weight", (width,)


def _autoencoder(config: Mapping[str, Any]) -> _NAMED:
    channels, latents = list(config["block_out_channels"]), config["latent_channels"]
    layers = config["layers_per_block"]
    if config["use_quant_conv"]:
        yield from _layer("quant_conv", 2 * latents, 2 * latents, 1, 1)
    if config["use_post_quant_conv"]:
        yield from _layer("post_quant_conv", latents, latents, 1, 1)
    sides = (
        ("encoder", "down", channels, layers, config["in_channels"], 2 * latents),
        ("decoder", "up", channels[::-1], layers + 1, latents, config["out_channels"]),
    )
    for side, direction, widths, count, incoming, outgoing in sides:
        yield from _layer(f"{side}.conv_in", widths[0], incoming, 3, 3)
        width = widths[0]
        for index, wide in enumerate(widths):
            block = f"{side}.{direction}_blocks.{index}"
            for number in range(count):
                yield from _resnet(f"{block}.resnets.{number}", width, wide)
                width = wide
            if index < len(widths) - 1:
                yield from _layer(f"{block}.{direction}samplers.0.conv", wide, wide, 3, 3)
        yield from _middle(f"{side}.mid_block", channels[-1], config["mid_block_add_attention"])
        yield from _layer(f"{side}.conv_norm_out", widths[-1])
        yield from _layer(f"{side}.conv_out", outgoing, widths[-1], 3, 3)


def _middle(name: str, width: int, attends: bool) -> _NAMED:
    for number in (0, 1):
        yield from _resnet(f"{name}.resnets.{number}", width, width)
    if attends:
        yield from _layer(f"{name}.attentions.0.group_norm", width)
        for module in ("to_q", "to_k", "to_v", "to_out.0"):
            yield from _layer(f"{name}.attentions.0.{module}", width, width)


def _resnet(name: str, inputs: int, outputs: int) -> _NAMED:
    yield from _layer(f"{name}.norm1", inputs)
    yield from _layer(f"{name}.conv1", outputs, inputs, 3, 3)
    yield from _layer(f"{name}.norm2", outputs)
    yield from _layer(f"{name}.conv2", outputs, outputs, 3, 3)
    if inputs != outputs:
        yield from _layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)
