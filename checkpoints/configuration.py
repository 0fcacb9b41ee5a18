"""Configurations of a model's parts: their classes, their keys, and what is computed of them.

Keys and defaults are those of diffusers and transformers, so that a file means here what it means
there; a test compares them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from types import MappingProxyType
from typing import Any

from sd35_trt.components import CONTROLNET, LATENT_SCALE, part_kind


@dataclass(frozen=True)
class PartKind:
    """What may stand in a part's folder.

    Attributes:
        title: what users call it.
        classes: of which the part is taken, the first being SD3.5's own.
        defaults: of the keys that its configuration has.
        closed: whether the class knows no other keys; transformers' configurations carry
            settings of generation, which no encoder reads.
        optional: whole numbers that may be null, or 0.
    """

    title: str
    classes: tuple[str, ...]
    defaults: Mapping[str, Any]
    closed: bool = False
    optional: tuple[str, ...] = ()


_TRANSFORMER = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "num_layers": 18,
    "attention_head_dim": 64, "num_attention_heads": 18, "joint_attention_dim": 4096,
    "caption_projection_dim": 1152, "pooled_projection_dim": 2048, "out_channels": 16,
    "pos_embed_max_size": 96, "dual_attention_layers": (), "qk_norm": None,
}  # fmt: skip
_CONTROLNET = {
    **_TRANSFORMER, "extra_conditioning_channels": 0, "pos_embed_type": "sincos",
    "use_pos_embed": True, "force_zeros_for_pooled_projection": True,
}  # fmt: skip
_VAE = {
    "in_channels": 3, "out_channels": 3, "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (64,), "layers_per_block": 1,
    "act_fn": "silu", "latent_channels": 4, "norm_num_groups": 32, "sample_size": 32,
    "scaling_factor": 0.18215, "shift_factor": None, "latents_mean": None, "latents_std": None,
    "force_upcast": True, "use_quant_conv": True, "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}  # fmt: skip
_CLIP = {
    "vocab_size": 49408, "hidden_size": 512, "intermediate_size": 2048, "projection_dim": 512,
    "num_hidden_layers": 12, "num_attention_heads": 8, "max_position_embeddings": 77,
    "hidden_act": "quick_gelu", "eos_token_id": 49407,
}  # fmt: skip
_T5 = {
    "vocab_size": 32128, "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6,
    "num_heads": 8, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128,
    "feed_forward_proj": "relu",
}  # fmt: skip
_CLIPS = ("CLIPTextModelWithProjection", "CLIPModel", "CLIPTextModel")

#: Part → its kind.
KINDS: Mapping[str, PartKind] = MappingProxyType(
    {
        "transformer": PartKind("transformer", ("SD3Transformer2DModel",), _TRANSFORMER, True),
        "text_encoder": PartKind("CLIP-L", _CLIPS, _CLIP),
        "text_encoder_2": PartKind("CLIP-G", _CLIPS, _CLIP),
        "text_encoder_3": PartKind(
            "T5", ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model"), _T5
        ),
        "vae": PartKind("autoencoder", ("AutoencoderKL",), _VAE, True),
        CONTROLNET: PartKind(
            "ControlNet",
            ("SD3ControlNetModel",),
            _CONTROLNET,
            True,
            (
                "joint_attention_dim",
                "caption_projection_dim",
                "pos_embed_max_size",
                "out_channels",
                "sample_size",
                "extra_conditioning_channels",
            ),
        ),
    }
)

# What other classes are, for the message.
_OTHERS = {
    "FluxTransformer2DModel": "FLUX's transformer",
    "UNet2DConditionModel": "the UNet of Stable Diffusion 1, 2 or XL",
    "QwenImageTransformer2DModel": "Qwen-Image's transformer",
    "SD3ControlNetModel": "a ControlNet",
    "AutoencoderTiny": "a tiny autoencoder (TAESD)",
    "AutoencoderKLQwenImage": "Qwen-Image's autoencoder",
    "AutoencoderKLFlux2": "FLUX.2's autoencoder",
    "UMT5EncoderModel": "UMT5, not T5",
    "MT5EncoderModel": "mT5, not T5",
}

# Counts of layers; more are a mistake, and would take for ever to list.
_LAYERS = ("num_layers", "num_hidden_layers", "layers_per_block")
_MOST_LAYERS = 1000
_MOST = 2**31 - 1

# How latents are scaled; without, diffusers' pipeline draws nothing, or takes Stable Diffusion 1's.
_VAE_FACTORS = {"scaling_factor": 1.5305, "shift_factor": 0.0609}

_ACTIVATIONS = ("quick_gelu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu", "swish")


def check_class(part: str, name: str | None) -> str | None:
    """What is wrong with the class that a part's configuration names; None where it names none."""
    kind = KINDS[part_kind(part)]
    if name is None or name in kind.classes:
        return None
    title = f" ({_OTHERS[name]})" if name in _OTHERS else ""
    return f"has the class {name}{title}, not {kind.classes[0]}"


def class_name(data: Mapping[str, Any]) -> Any:
    """The class that a file of diffusers or transformers names; None where it names none."""
    architectures = data.get("architectures")
    listed = architectures[0] if isinstance(architectures, list) and architectures else None
    return data.get("_class_name") or listed


def complete(part: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A part's configuration as its class takes it.

    Without the keys that begin with an underscore and, of a class that knows no others, without
    unknown ones that are null, false or empty; with the class's defaults for those that are
    absent. Of a whole CLIP, the configuration of its text model.
    """
    kind = KINDS[part_kind(part)]
    nested = data.get("text_config")
    if isinstance(nested, dict) and kind.classes is _CLIPS:
        data = nested
    values = {key: value for key, value in data.items() if not key.startswith("_")}
    if not kind.closed:
        return {**kind.defaults, **values}
    result = {**kind.defaults}
    result |= {k: v for k, v in values.items() if k in kind.defaults or v}
    if part_kind(part) in ("transformer", CONTROLNET) and result["dual_attention_layers"] is None:
        result["dual_attention_layers"] = ()
    return result


def check_configuration(part: str, config: Mapping[str, Any]) -> list[str]:
    """What is wrong with a part's configuration; each ends a sentence that begins with its file.

    Args:
        config: of :func:`complete`.
    """
    kind = KINDS[part_kind(part)]
    unknown = [key for key in config if kind.closed and key not in kind.defaults]
    problems = []
    if unknown:
        listed = ", ".join(f"{key} = {json.dumps(config[key])}" for key in unknown)
        problems.append(f"sets {listed}, which {kind.classes[0]} does not have")
    for key, default in kind.defaults.items():
        if isinstance(default, int) and not isinstance(default, bool) and key != "eos_token_id":
            most = _MOST_LAYERS if key in _LAYERS else _MOST
            if key in kind.optional and not config[key]:
                continue
            if not _whole(config[key], most):
                problems.append(
                    f"has {key} = {_shown(config[key])}, not a whole number from 1 to {most}"
                )
    if problems:
        return problems
    return list(_CHECKS.get(part_kind(part), _check_clip)(config))


def _whole(value: Any, most: int = _MOST) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)


def _choice(config: Mapping[str, Any], key: str, values: Collection[Any]) -> Iterator[str]:
    if config[key] not in values:
        listed = " or ".join(map(_shown, values))
        yield f"has {key} = {_shown(config[key])}; what is computed here is {listed}"


def _check_transformer(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _choice(config, "qk_norm", ("rms_norm", None))
    dual = config["dual_attention_layers"]
    if not isinstance(dual, list | tuple) or not all(type(block) is int for block in dual):
        yield f"has dual_attention_layers = {_shown(dual)}, not a list of numbers of blocks"
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = config["caption_projection_dim"]
    if width != text:
        yield (
            f"has caption_projection_dim = {text}, but num_attention_heads × attention_head_dim "
            f"= {width}"
        )
    if config["in_channels"] != config["out_channels"]:
        yield (
            f"has {config['in_channels']} input channels and {config['out_channels']} output "
            "channels: an inpainting or control model, or another family's"
        )


def _check_controlnet(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _choice(config, "qk_norm", ("rms_norm", None))
    yield from _choice(config, "extra_conditioning_channels", (0,))
    for key in ("use_pos_embed", "force_zeros_for_pooled_projection"):
        yield from _choice(config, key, (True, False))
    if config["use_pos_embed"]:
        yield from _choice(config, "pos_embed_type", ("sincos",))
        if not config["pos_embed_max_size"]:
            yield "has no pos_embed_max_size, which use_pos_embed needs"
    dual = config["dual_attention_layers"]
    if not isinstance(dual, list | tuple) or not all(type(block) is int for block in dual):
        yield f"has dual_attention_layers = {_shown(dual)}, not a list of numbers of blocks"
    width = config["num_attention_heads"] * config["attention_head_dim"]
    text = config["caption_projection_dim"]
    if config["joint_attention_dim"] is not None and width != text:
        yield (
            f"has caption_projection_dim = {text}, but num_attention_heads × attention_head_dim "
            f"= {width}"
        )


def _check_clip(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _choice(config, "hidden_act", _ACTIVATIONS)
    yield from _divides(config, "num_attention_heads", "hidden_size", [config["hidden_size"]])


def _check_t5(config: Mapping[str, Any]) -> Iterator[str]:
    acts = [prefix + act for prefix in ("gated-", "") for act in ("gelu", *_ACTIVATIONS[2:])]
    yield from _choice(config, "feed_forward_proj", dict.fromkeys(acts))


def _check_vae(config: Mapping[str, Any]) -> Iterator[str]:
    yield from _choice(config, "act_fn", ("silu", "swish"))
    widths = config["block_out_channels"]
    if not isinstance(widths, list | tuple) or not all(map(_whole, widths)):
        yield f"has block_out_channels = {_shown(widths)}, not a list of whole numbers"
        return
    if 2 ** (len(widths) - 1) != LATENT_SCALE:
        yield (
            f"reduces {2 ** (len(widths) - 1)} times ({len(widths)} block_out_channels), "
            f"SD3.5's {LATENT_SCALE} times"
        )
        return
    for key, kind in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if list(config[key] or ()) != [kind] * len(widths):
            yield f"has {key} = {_shown(config[key])}; what is computed here is {kind} alone"
    yield from _divides(config, "norm_num_groups", "block_out_channels", widths)
    for key in ("in_channels", "out_channels"):
        if config[key] != 3:
            yield f"has {key} = {config[key]}; a picture has 3"
    for key, fits in (("scaling_factor", _positive), ("shift_factor", _finite)):
        if not fits(config[key]):
            yield f"has {key} = {_shown(config[key])}; SD3.5's is {_VAE_FACTORS[key]}"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _positive(value: Any) -> bool:
    return _finite(value) and value > 0


def _divides(
    config: Mapping[str, Any], key: str, other: str, widths: Collection[int]
) -> Iterator[str]:
    if any(width % config[key] for width in widths):
        yield f"has {key} = {config[key]}, which does not divide {other} = {_shown(config[other])}"


_CHECKS = {"transformer": _check_transformer, "text_encoder_3": _check_t5, "vae": _check_vae,
           CONTROLNET: _check_controlnet}  # fmt: skip
