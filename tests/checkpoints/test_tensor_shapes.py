"""Names, shapes, keys and defaults are those of diffusers and transformers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, SD3ControlNetModel, SD3Transformer2DModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from sd35_trt.checkpoints.configuration import KINDS, check_configuration, complete
from sd35_trt.checkpoints.structure import Structure, published_config
from sd35_trt.checkpoints.tensor_shapes import tensor_shapes

CLASSES: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
    "transformer": lambda config: SD3Transformer2DModel(**config),
    "text_encoder": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig(**config)),
    "text_encoder_3": lambda config: T5EncoderModel(T5Config(**config)),
    "vae": lambda config: AutoencoderKL(**config),
    "controlnet": lambda config: SD3ControlNetModel(**config),
}

# What Large's nets have: no text stream, and the transformer's embedding of patches.
SINGLE = {
    "num_layers": 3, "num_attention_heads": 38, "joint_attention_dim": None,
    "caption_projection_dim": None, "pos_embed_max_size": None, "use_pos_embed": False,
}  # fmt: skip

CASES = [
    *(("transformer", Structure(name).config("transformer")) for name in ("large", "medium")),
    ("transformer", {**published_config("transformer", "medium"), "qk_norm": None,
                     "num_layers": 14, "out_channels": 32, "patch_size": 4}),
    # Every key left to its class.
    *((part, {}) for part in CLASSES),
    *((part, published_config(part)) for part in CLASSES if part != "controlnet"),
    ("controlnet", SINGLE),
    ("controlnet", {"qk_norm": "rms_norm", "num_layers": 3, "dual_attention_layers": (0, 1)}),
    ("text_encoder_3", {**published_config("text_encoder_3"), "feed_forward_proj": "relu",
                        "num_heads": 32, "d_kv": 96}),
    ("vae", {**published_config("vae"), "use_quant_conv": True, "use_post_quant_conv": True,
             "mid_block_add_attention": False, "layers_per_block": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("part", "config"), CASES)
def test_names_and_shapes(part: str, config: dict[str, Any]) -> None:
    with torch.device("meta"):
        model = CLASSES[part](config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    expected.pop("encoder.embed_tokens.weight", None)  # a copy of T5's "shared.weight"
    assert tensor_shapes(part, complete(part, config)) == expected


@pytest.mark.parametrize("part", CLASSES)
def test_keys_and_defaults(part: str) -> None:
    kind = KINDS[part]
    if kind.closed:
        parameters = inspect.signature(
            {
                "transformer": SD3Transformer2DModel,
                "vae": AutoencoderKL,
                "controlnet": SD3ControlNetModel,
            }[part].__init__
        ).parameters
        assert dict(kind.defaults) == {
            name: parameter.default for name, parameter in parameters.items() if name != "self"
        }
    else:
        config = T5Config() if part == "text_encoder_3" else CLIPTextConfig()
        assert dict(kind.defaults) == {name: getattr(config, name) for name in kind.defaults}


@pytest.mark.parametrize("part", [part for part in CLASSES if part != "controlnet"])
def test_published_configurations_are_computed(part: str) -> None:
    assert check_configuration(part, complete(part, published_config(part))) == []
