"""A weight that is quantized, and how one that is not read is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: What a tensor that is not quantized may be stored in.
PLAIN = ("F64", "F32", "F16", "BF16")

#: Types whose numbers are values without a scale; the 8-bit ones are a cast alone.
FLOATS = (*PLAIN, "F8_E4M3", "F8_E5M2")

# What ``quantization_config`` may name.
_METHODS = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "quanto")

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
        config: it; its ``quantization_config`` is looked at.

    Raises:
        CheckpointError: names the method.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise CheckpointError(f"{path}: quantization_config is no JSON object", _WAYS)
    method = quantization.get("quant_method")
    if method not in _METHODS:
        raise CheckpointError(
            f"{path}: its weights are quantized by {method or 'a method that it does not name'}",
            _WAYS,
        )
    blocks = quantization.get("weight_block_size")
    if blocks not in _BLOCKS:
        raise CheckpointError(f"{path}: its weights have scales for blocks of {blocks}", _WAYS)
