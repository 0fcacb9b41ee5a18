"""Random checkpoints of SD3.5's exact structure, written file by file in bounded memory.

python benchmarks/random_checkpoint.py large /tmp/large
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import nn

from sd35_trt.checkpoints.structure import PUBLISHED, Structure
from sd35_trt.export.component import fake_tensors
from sd35_trt.export.modules import build_clip, build_t5, build_transformer, build_vae
from sd35_trt.mini import checkpoint_path

#: SD3.5 Large's transformer/config.json; depth is ``num_layers``.
LARGE: dict[str, Any] = Structure("large").config("transformer")

_BUILD: dict[str, Callable[[dict[str, Any], None], nn.Module]] = {
    "text_encoder": build_clip,
    "text_encoder_2": build_clip,
    "text_encoder_3": build_t5,
    "vae": build_vae,
    "transformer": build_transformer,
}

_TABLE = "pos_embed.pos_embed"

# Published lengths of texts.
_TOKENS = {"tokenizer": 77, "tokenizer_2": 77, "tokenizer_3": 512}

# Bytes after which a new file is begun.
_SHARD = 1 << 30


def write_part(root: Path, part: str, config: dict[str, Any], seed: int = 0) -> int:
    """Write ``root/part`` in BF16: configuration, and random weights in files of about 1 GB.

    Tensors of one shape hold the same numbers, rolled and scaled: drawing billions would take
    longer than what is to be measured, and compilers merge layers whose quantization scales are
    equal, which a trained model's are not.

    Returns:
        Bytes of the weights.
    """
    folder = root / part
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with fake_tensors():
        state = _BUILD[part](config, None).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    shapes.pop("encoder.embed_tokens.weight", None)  # T5's, tied to "shared.weight"
    for name in [name for name in shapes if name.startswith(f"{_TABLE}.")]:
        del shapes[name]
        shapes[_TABLE] = ()
    stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
    generator = torch.Generator().manual_seed(seed)
    pool: dict[tuple[int, ...], torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    total = 0

    def write() -> None:
        nonlocal total
        file = f"{stem}-{len(set(weight_map.values())):05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map.update(dict.fromkeys(tensors, file))
        total += _bytes(tensors)
        tensors.clear()

    for index, (name, shape) in enumerate(shapes.items()):
        if name == _TABLE:
            tensors[name] = _position_table(config)
        elif len(shape) == 1 and "norm" in name and name.endswith("weight"):
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            if shape not in pool:
                scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
                pool[shape] = (torch.randn(shape, generator=generator) * scale).bfloat16()
            tensors[name] = pool[shape].roll(index, 0) * (1 + index % 61 / 64)
        if _bytes(tensors) >= _SHARD:
            write()
    if tensors:
        write()
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    )
    return total


def _bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _position_table(config: dict[str, Any]) -> torch.Tensor:
    from sd35_trt.compat.diffusers import get_2d_sincos_pos_embed

    width = config["num_attention_heads"] * config["attention_head_dim"]
    base = config["sample_size"] // config["patch_size"]
    size = config["pos_embed_max_size"]
    table = get_2d_sincos_pos_embed(width, size, base_size=base, output_type="pt")
    return table.bfloat16()[None].contiguous()


def write_transformer(root: Path, config: dict[str, Any], seed: int = 0) -> int:
    """Write a checkpoint that is a transformer alone, for parts of the pipeline.

    Args:
        root: the model directory; ``model_index.json`` is written too.
        config: of ``SD3Transformer2DModel``.

    Returns:
        Bytes of the weights.
    """
    _write_index(root, ["transformer"])
    return write_part(root, "transformer", config, seed)


def write_checkpoint(root: Path, name: str, blocks: int | None = None) -> dict[str, int]:
    """Write every part of a published model; tokenizers are the packaged model's, for texts as long
    as the published ones take.

    Args:
        root: the model directory.
        name: as :class:`~sd35_trt.checkpoints.structure.Structure` takes it.
        blocks: of the transformer, and at most as many of T5; None writes all.

    Returns:
        Bytes of the weights by part.
    """
    structure = Structure(name)
    sizes = {}
    for part in _BUILD:
        config = structure.config(part)
        for key in ("num_layers",) if blocks else ():
            if key in config:
                config[key] = min(config[key], blocks)
        sizes[part] = write_part(root, part, config)
    mini = checkpoint_path()
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"):
        shutil.copytree(mini / folder, root / folder)
        if folder in _TOKENS:
            path = root / folder / "tokenizer_config.json"
            settings = json.loads(path.read_text("utf-8"))
            path.write_text(json.dumps({**settings, "model_max_length": _TOKENS[folder]}))
    _write_index(root, [*_BUILD, "tokenizer", "tokenizer_2", "tokenizer_3", "scheduler"])
    return sizes


def _write_index(root: Path, parts: list[str]) -> None:
    root.mkdir(parents=True, exist_ok=True)
    published: dict[str, Any] = json.loads((checkpoint_path() / "model_index.json").read_text())
    index = {
        part: kind if part in parts or part.startswith("_") else [None, None]
        for part, kind in published.items()
    }
    (root / "model_index.json").write_text(json.dumps(index))


@click.command()
@click.argument("name", type=click.Choice(sorted(PUBLISHED)))
@click.argument("root", type=click.Path(path_type=Path))
@click.option("--blocks", type=int, help="Of the transformer and of T5. Default: all.")
def main(name: str, root: Path, blocks: int | None) -> None:
    """Write a checkpoint of a published structure; its tokenizers are mini's."""
    if root.exists():
        raise click.ClickException(f"{root} exists: name another folder")
    for part, size in write_checkpoint(root, name, blocks).items():
        print(f"{part:16}{size / 1e9:8.2f} GB")


if __name__ == "__main__":
    main()
