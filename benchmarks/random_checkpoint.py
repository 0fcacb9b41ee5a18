"""Random transformers of SD3.5's exact structure, written shard by shard in bounded memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode

from sd35_trt.export.structure import Structure

#: SD3.5 Large's transformer/config.json; depth is ``num_layers``.
LARGE: dict[str, Any] = Structure("large").config("transformer")


def write_transformer(
    root: Path, config: dict[str, Any], dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> int:
    """Write ``root/transformer`` with random weights, one shard per block.

    Args:
        root: the model directory; ``model_index.json`` is written too.
        config: of ``SD3Transformer2DModel``.

    Returns:
        Bytes of the weights.
    """
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    folder = root / "transformer"
    folder.mkdir(parents=True, exist_ok=True)
    (root / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusion3Pipeline", "text_encoder_3": [None, None]})
    )
    (folder / "config.json").write_text(json.dumps(config))
    with FakeTensorMode():
        model = SD3Transformer2DModel(**{**config, "pos_embed_max_size": 1})
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        group = name.split(".")
        key = f"block-{int(group[1]):02d}" if group[0] == "transformer_blocks" else "rest"
        shards.setdefault(key, []).append(name)
    generator = torch.Generator().manual_seed(seed)
    weight_map, total = {}, 0
    for key, names in shards.items():
        file = f"diffusion_pytorch_model-{key}.safetensors"
        tensors = {}
        for name in names:
            shape = shapes[name]
            if name == "pos_embed.pos_embed":
                size = config["pos_embed_max_size"]
                width = config["num_attention_heads"] * config["attention_head_dim"]
                base = config["sample_size"] // config["patch_size"]
                table = get_2d_sincos_pos_embed(width, size, base_size=base, output_type="pt")
                tensors[name] = table.to(dtype)[None].contiguous()
            elif len(shape) == 1 and "norm" in name:
                tensors[name] = torch.ones(shape, dtype=dtype)
            else:
                scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
                tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total
