"""A weight that is quantized, what belongs to it, and how one that is not read is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.errors import CheckpointError

from .tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

#: What a tensor that is not quantized may be stored in.
PLAIN = ("F64", "F32", "F16", "BF16")

#: Types whose numbers are values without a scale; the 8-bit ones are a cast alone.
FLOATS = (*PLAIN, "F8_E4M3", "F8_E5M2")

# Of a tensor that describes a layer, in bytes.
_LONGEST = 1 << 16

# What ``quantization_config`` may name.
_METHODS = (
    "bitsandbytes",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "compressed-tensors",
    "fbgemm_fp8",
    "fp8",
    "modelopt",
    "quanto",
)

# Its keys; the second one is of older compressed-tensors.
_KEYS = ("quantization_config", "compression_config")

# What bitsandbytes' first versions say in place of a method.
_LOADS = ("load_in_8bit", "load_in_4bit")

# Of modelopt: one scale a tensor.
_ALGORITHM = "FP8"

# Of compressed-tensors: weights that are rotated, or whose zeros are left out.
_CHANGES = ("transform_config", "sparsity_config")

# Of ``fp8``: what blocks are taken for.
_BLOCKS = ([128, 128], (128, 128), None)

_WAYS = (
    "take the model's BF16, FP16 or FP8 file, or load it with the library that made it and save "
    "what dequantize() gives"
)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized weight.

    Attributes:
        spelling: the word that shows how.
        beside: names of the tensors that belong to it.
        shape: of its values.
        values: makes them, in FP32, or in the type that bitsandbytes names.
        scale: its only scale, FP32 []; None where there are several.
    """

    spelling: str
    beside: frozenset[str]
    shape: tuple[int, ...]
    values: Callable[[], torch.Tensor]
    scale: Callable[[], torch.Tensor] | None = None


def refusal(path: Path, layer: str, kind: str) -> CheckpointError:
    """The one line about a layer that is quantized otherwise.

    Args:
        path: the file or the folder.
        kind: how, by types and names.
    """
    return CheckpointError(
        f"{path}: {layer!r} is quantized in a way that is not read here ({kind})", _WAYS
    )


def described_bytes(tensors: TensorFiles, name: str) -> bytes | None:
    """A small tensor of bytes, which describes a layer; None for one of another type, or long."""
    if tensors.dtype(name) != "U8" or math.prod(tensors.shape(name)) > _LONGEST:
        return None
    return bytes(tensors.stored(name).reshape(-1).numpy())


def check_scales(path: Path, layer: str, word: str, scales: torch.Tensor) -> None:
    """Refuse scales that make no weight of what they multiply.

    A row of zeros may have the scale 0. A whole tensor of zeros is no layer's.

    Args:
        word: what they are called.
        scales: floating-point, of any shape.

    Raises:
        CheckpointError: one is negative, infinite or no number, or the only one is 0.
    """
    if not scales.numel():
        return
    least, most = (float(value) for value in scales.aminmax())
    if scales.numel() == 1 and most == 0:
        raise refusal(path, layer, f"{word} of 0")
    if not (least >= 0 and math.isfinite(most)):
        worst = most if least >= 0 else least
        raise refusal(path, layer, f"{word} with {worst:g} among its values")


def block_values(
    numbers: torch.Tensor, scales: torch.Tensor, sides: tuple[int, int]
) -> torch.Tensor:
    """Numbers times the scale of their block; the last blocks may be smaller.

    Args:
        numbers: [rows, columns].
        scales: [blocks of rows, blocks of columns].
        sides: rows and columns of a block.
    """
    wide = scales.repeat_interleave(sides[0], 0).repeat_interleave(sides[1], 1)
    return numbers * wide[: numbers.shape[0], : numbers.shape[1]]


def check_method(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a part whose configuration names a quantization that is not read.

    Args:
        path: of the configuration, for the message.
        config: it; what it says of its quantization is looked at.

    Raises:
        CheckpointError: names the method, or what of it is not read.
    """
    for key in _KEYS:
        quantization = config.get(key)
        if quantization is None:
            continue
        if not isinstance(quantization, Mapping):
            raise CheckpointError(f"{path}: {key} is no JSON object", _WAYS)
        if problem := _problem(quantization):
            raise CheckpointError(f"{path}: its weights {problem}", _WAYS)


def _problem(quantization: Mapping[str, Any]) -> str | None:
    """What is not read of a method, after "its weights"; None where it is."""
    method = quantization.get("quant_method")
    if method is None and any(quantization.get(key) for key in _LOADS):
        method = "bitsandbytes"
    if method not in _METHODS:
        return f"are quantized by {method or 'a method that it does not name'}"
    algorithm = quantization.get("quant_algo")
    if method == "modelopt" and algorithm != _ALGORITHM:
        return f"are quantized by modelopt to {algorithm or 'what it does not name'}"
    for change in _CHANGES:
        value = quantization.get(change)
        if value and not (isinstance(value, Mapping) and value.get("format") == "dense"):
            return f"are quantized by {method} with {change}"
    blocks = quantization.get("weight_block_size")
    if blocks not in _BLOCKS:
        return f"have scales for blocks of {blocks}"
    return None
