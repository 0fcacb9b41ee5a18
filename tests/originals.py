"""Single files in SD3.5's original layout, written from a diffusers checkpoint, for the tests.

The mapping is the inverse of the exporter's and written independently of it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]

PARTS = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae")
PREFIXES = {
    "transformer": "model.diffusion_model.",
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
    "text_encoder_3": "text_encoders.t5xxl.transformer.",
    "vae": "first_stage_model.",
}
BESIDE = {
    "text_encoder": "text_encoders/clip_l.safetensors",
    "text_encoder_2": "text_encoders/clip_g.safetensors",
    "text_encoder_3": "clip/t5xxl_fp16.safetensors",
    "vae": "vae/sd3_vae.safetensors",
}


def part_tensors(checkpoint: Path, part: str) -> Tensors:
    """A part's tensors in the diffusers checkpoint."""
    (path,) = (checkpoint / part).glob("*.safetensors")
    return load_file(path)


def original_transformer(tensors: Tensors) -> Tensors:
    """The MMDiT: fused qkv, and scale before shift in the final layers."""
    result: Tensors = {}
    rest = dict(tensors)

    def move(ours: str, theirs: str) -> None:
        for parameter in ("weight", "bias"):
            if f"{ours}.{parameter}" in rest:
                result[f"{theirs}.{parameter}"] = rest.pop(f"{ours}.{parameter}")

    def fuse(ours: list[str], theirs: str) -> None:
        for parameter in ("weight", "bias"):
            three = [rest.pop(f"{name}.{parameter}") for name in ours]
            result[f"{theirs}.{parameter}"] = torch.cat(three)

    def swap(name: str) -> None:
        for parameter in ("weight", "bias"):
            first, second = result[f"{name}.{parameter}"].chunk(2)
            result[f"{name}.{parameter}"] = torch.cat([second, first])

    result["pos_embed"] = rest.pop("pos_embed.pos_embed")
    move("pos_embed.proj", "x_embedder.proj")
    for ours, theirs in (("timestep_embedder", "t_embedder"), ("text_embedder", "y_embedder")):
        move(f"time_text_embed.{ours}.linear_1", f"{theirs}.mlp.0")
        move(f"time_text_embed.{ours}.linear_2", f"{theirs}.mlp.2")
    move("context_embedder", "context_embedder")
    move("proj_out", "final_layer.linear")
    move("norm_out.linear", "final_layer.adaLN_modulation.1")
    swap("final_layer.adaLN_modulation.1")
    count = 1 + max(int(name.split(".")[1]) for name in rest)
    for i in range(count):
        block = f"transformer_blocks.{i}"
        image, text = f"joint_blocks.{i}.x_block", f"joint_blocks.{i}.context_block"
        for attention in ("attn", "attn2"):
            ours, theirs = f"{block}.{attention}", f"{image}.{attention}"
            if f"{ours}.to_q.weight" in rest:
                fuse([f"{ours}.to_{x}" for x in "qkv"], f"{theirs}.qkv")
                move(f"{ours}.norm_q", f"{theirs}.ln_q")
                move(f"{ours}.norm_k", f"{theirs}.ln_k")
                move(f"{ours}.to_out.0", f"{theirs}.proj")
        fuse([f"{block}.attn.add_{x}_proj" for x in "qkv"], f"{text}.attn.qkv")
        move(f"{block}.attn.norm_added_q", f"{text}.attn.ln_q")
        move(f"{block}.attn.norm_added_k", f"{text}.attn.ln_k")
        move(f"{block}.attn.to_add_out", f"{text}.attn.proj")
        move(f"{block}.norm1.linear", f"{image}.adaLN_modulation.1")
        move(f"{block}.norm1_context.linear", f"{text}.adaLN_modulation.1")
        for ours, theirs in (("ff", image), ("ff_context", text)):
            move(f"{block}.{ours}.net.0.proj", f"{theirs}.mlp.fc1")
            move(f"{block}.{ours}.net.2", f"{theirs}.mlp.fc2")
    swap(f"joint_blocks.{count - 1}.context_block.adaLN_modulation.1")
    assert not rest, sorted(rest)
    return result


def original_vae(tensors: Tensors) -> Tensors:
    """The autoencoder: the decoder's blocks counted from the picture, 1×1 convolutions."""
    ups = {int(m[1]) for name in tensors if (m := re.match(r"decoder\.up_blocks\.(\d+)", name))}
    result = {}
    for name, tensor in tensors.items():
        side, *path, parameter = name.split(".")
        if path[0] in ("down_blocks", "up_blocks"):
            number = int(path[1]) if path[0] == "down_blocks" else max(ups) - int(path[1])
            base = f"{side}.{path[0].removesuffix('_blocks')}.{number}"
            if path[2] == "resnets":
                layer = path[4].replace("conv_shortcut", "nin_shortcut")
                theirs = f"{base}.block.{path[3]}.{layer}"
            else:
                theirs = f"{base}.{path[2][:-2]}.conv"
        elif path[0] == "mid_block" and path[1] == "resnets":
            theirs = f"{side}.mid.block_{int(path[2]) + 1}.{path[3]}"
        elif path[0] == "mid_block":
            layer = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
                     "to_out": "proj_out"}[path[3]]  # fmt: skip
            theirs = f"{side}.mid.attn_1.{layer}"
            if tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
        else:
            theirs = f"{side}.{path[0].replace('conv_norm_out', 'norm_out')}"
        result[f"{theirs}.{parameter}"] = tensor
    return result


def quantized(tensors: Tensors, prefix: str, spelling: str, input_scales: bool = True) -> Tensors:
    """The blocks' linears, adaLN aside, in ComfyUI's scaled FP8.

    Args:
        prefix: in front of the transformer's names.
        spelling: ``scaled_fp8``, ``comfy_quant``, or ``metadata`` (whose layers are described
            elsewhere).
    """
    weight, incoming = {
        "scaled_fp8": ("scale_weight", "scale_input"),
    }.get(spelling, ("weight_scale", "input_scale"))
    result = dict(tensors)
    if spelling == "scaled_fp8":
        result[f"{prefix}scaled_fp8"] = torch.empty(0, dtype=torch.float8_e4m3fn)
    for index, name in enumerate(quantized_layers(tensors, prefix)):
        value = tensors[f"{name}.weight"].float()
        # Not the scale that the exporter would take.
        scale = value.abs().max() / 400
        result[f"{name}.weight"] = (value / scale).to(torch.float8_e4m3fn)
        result[f"{name}.{weight}"] = scale
        if input_scales:
            result[f"{name}.{incoming}"] = torch.tensor(0.01 + 0.001 * index)
        if spelling == "comfy_quant":
            described = json.dumps({"format": "float8_e4m3fn"}).encode()
            result[f"{name}.comfy_quant"] = torch.tensor(list(described), dtype=torch.uint8)
    return result


def quantized_layers(tensors: Tensors, prefix: str) -> list[str]:
    """Original names of the layers that :func:`quantized` quantizes."""
    pattern = (
        re.escape(prefix) + r"joint_blocks\.\d+\.\w+\.(attn2?|mlp)\.(qkv|proj|fc1|fc2)\.weight"
    )
    return sorted(n.removesuffix(".weight") for n in tensors if re.fullmatch(pattern, n))


def original(checkpoint: Path, part: str, dtype: torch.dtype | None = None) -> Tensors:
    """A part's tensors under the original names, without prefix."""
    tensors = part_tensors(checkpoint, part)
    if dtype is not None:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    convert = {"transformer": original_transformer, "vae": original_vae}.get(part, dict)
    result = convert(tensors)
    if part == "text_encoder":
        result.pop("text_projection.weight")  # CLIP-L's file has none
    return result


def save(tensors: Tensors, path: Path, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, path, metadata)
    return path


def write_single(
    checkpoint: Path,
    path: Path,
    parts: Iterable[str] = PARTS,
    dtype: torch.dtype | None = None,
    spelling: str | None = None,
    input_scales: bool = True,
    tokenizers: bool = True,
) -> Path:
    """Write a checkpoint's parts to one file, the others beside it, and its tokenizers.

    Args:
        path: the file; the transformer's names have no prefix where it is the only part in it.
        dtype: None keeps the checkpoint's.
        spelling: see :func:`quantized`; None does not quantize.
    """
    parts = list(parts)
    tensors: Tensors = {}
    for part in parts:
        prefix = PREFIXES[part] if len(parts) > 1 else ""
        result = {prefix + k: v for k, v in original(checkpoint, part, dtype).items()}
        if part == "transformer" and spelling is not None:
            result = quantized(result, prefix, spelling, input_scales)
        tensors |= result
    metadata = {}
    if spelling == "metadata":
        layers = {
            name.removesuffix(".weight_scale"): {"format": "float8_e4m3fn"}
            for name in tensors
            if name.endswith(".weight_scale")
        }
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    save(tensors, path, **metadata)
    for part, name in BESIDE.items():
        if part not in parts and (checkpoint / part).is_dir():
            save(original(checkpoint, part, dtype), path.parent / name)
    if tokenizers:
        for folder in checkpoint.glob("tokenizer*"):
            shutil.copytree(folder, path.parent / folder.name, dirs_exist_ok=True)
    return path
