"""GGUF files as ComfyUI-GGUF, stable-diffusion.cpp and llama.cpp write them, for the tests."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter

Tensors = dict[str, torch.Tensor]

#: Types that ``gguf`` dequantizes, of models that people share.
KINDS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
    "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS",
)  # fmt: skip

_FALLBACKS = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.F16)

_T5_SPELLINGS = {
    "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm",
    "SelfAttention.relative_attention_bias": "attn_rel_b",
    "SelfAttention.q": "attn_q", "SelfAttention.k": "attn_k", "SelfAttention.v": "attn_v",
    "SelfAttention.o": "attn_o", "DenseReluDense.wi_0": "ffn_gate",
    "DenseReluDense.wi_1": "ffn_up", "DenseReluDense.wo": "ffn_down",
}  # fmt: skip


@functools.cache
def _pool(kind: GGMLQuantizationType) -> np.ndarray:
    """Random blocks whose values are finite and below 4."""
    _, size = GGML_QUANT_SIZES[kind]
    drawn = np.random.default_rng(0).integers(0, 256, (1 << 12, size), np.uint8)
    with np.errstate(all="ignore"):
        return drawn[(np.abs(gguf.dequantize(drawn, kind)) < 4).all(axis=1)]


def blocks(shape: tuple[int, ...], kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    """Random blocks of a quantized tensor."""
    pool, count = _pool(kind), int(np.prod(shape)) // GGML_QUANT_SIZES[kind][0]
    chosen = np.random.default_rng(seed).integers(0, len(pool), count)
    return pool[chosen].reshape(*shape[:-1], -1)


def _stored(tensor: torch.Tensor, kind: GGMLQuantizationType, seed: int) -> np.ndarray:
    values = tensor.float().numpy()
    try:
        return gguf.quantize(values, kind)
    except NotImplementedError:
        return blocks(values.shape, kind, seed)


def _kind(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Vectors, tables and convolutions stay in F32; what blocks do not divide falls back."""
    if len(shape) != 2:
        return GGMLQuantizationType.F32
    return next(k for k in (kind, *_FALLBACKS) if shape[1] % GGML_QUANT_SIZES[k][0] == 0)


def write_gguf(
    tensors: Tensors,
    path: Path,
    kind: str = "Q8_0",
    architecture: str | None = "sd3",
    reshaped: bool = False,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Tensors:
    """Write tensors; matrices are quantized.

    Args:
        architecture: None leaves it out, as stable-diffusion.cpp does.
        extra: adds metadata.
        reshaped: rows are of 256 values where the tensor has others, with a record of its shape.

    Returns:
        The values that are in the file, in FP32 by ``gguf``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture or "", endianess=endian)
    values: Tensors = {}
    for seed, (name, tensor) in enumerate(tensors.items()):
        shape = tuple(tensor.shape)
        if reshaped and len(shape) == 2 and shape[1] % 256 and tensor.numel() % 256 == 0:
            writer.add_array(f"comfy.gguf.orig_shape.{name}", shape)
            tensor = tensor.reshape(-1, 256)
        own = _kind(tuple(tensor.shape), GGMLQuantizationType[kind])
        data = _stored(tensor, own, seed)
        writer.add_tensor(name, data, raw_dtype=own)
        values[name] = torch.from_numpy(gguf.dequantize(data, own).reshape(shape).copy())
    extra(writer)
    _finish(writer)
    return values


def _finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_types(path: Path, types: Mapping[str, GGMLQuantizationType], architecture: str) -> Path:
    """A file with tensors of one block each, all zero."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, architecture)
    for name, kind in types.items():
        _, size = GGML_QUANT_SIZES[kind]
        writer.add_tensor(name, np.zeros((1, size), np.uint8), raw_dtype=kind)
    _finish(writer)
    return path


def llama_names(t5: Tensors) -> Tensors:
    """T5's encoder by llama.cpp's names."""

    def rename(name: str) -> str:
        for theirs, ours in _T5_SPELLINGS.items():
            pattern = rf"^encoder\.block\.(\d+)\.(?:.*\.)?{re.escape(theirs)}\."
            name = re.sub(pattern, rf"enc.blk.\1.{ours}.", name)
        name = name.replace("encoder.final_layer_norm", "enc.output_norm")
        return name.replace("shared", "token_embd")

    return {rename(name): t for name, t in t5.items() if name != "encoder.embed_tokens.weight"}


def t5_metadata(writer: GGUFWriter, config: Mapping[str, Any], tokens: int = 20) -> None:
    """What llama.cpp's converter writes of T5: its configuration and a tokenizer."""
    writer.add_context_length(512)
    writer.add_embedding_length(config["d_model"])
    writer.add_feed_forward_length(config["d_ff"])
    writer.add_block_count(config["num_layers"])
    writer.add_head_count(config["num_heads"])
    writer.add_key_length(config["d_kv"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_relative_attn_buckets_count(config["relative_attention_num_buckets"])
    writer.add_layer_norm_rms_eps(config["layer_norm_epsilon"])
    writer.add_tokenizer_model("t5")
    writer.add_token_list([f"token {i}" for i in range(tokens)])
    writer.add_token_scores([-0.5 * i for i in range(tokens)])
    writer.add_token_types([1] * tokens)
    writer.add_precompiled_charsmap(bytes(range(256)))
