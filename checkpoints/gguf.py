"""Tensors of one GGUF file, each dequantized when it is read.

Two layouts are read: the transformer as ComfyUI-GGUF and stable-diffusion.cpp write it, in the
original's names, and T5's encoder as llama.cpp writes it, which gets transformers' names here.
A file without an architecture, as stable-diffusion.cpp writes it, has the names of what it was
made from.

Source: ``docs/gguf.md`` of ggml; ``loader.py`` of ComfyUI-GGUF.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sd35_trt.compat.requirement import requirement
from sd35_trt.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader, ReaderTensor

#: Of the files' names.
SUFFIX = ".gguf"

#: Distribution that reads and dequantizes, for the versions that a build records.
LIBRARY = "gguf"

# ``general.architecture``; "pig" is what a fork of ComfyUI-GGUF writes into every file.
_T5 = ("t5", "t5encoder")
_ARCHITECTURES = (None, "pig", "sd3", *_T5)

# llama.cpp's names of T5's encoder → transformers'. ``gguf.TensorNameMap`` has the other way.
_T5_OUTER = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
}
_T5_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}

# T5 has a table of positions in its first block alone.
_UMT5 = "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"

# ggml drops leading dimensions of 1; the original has them in this tensor alone.
_TABLE = "pos_embed"

# What is dequantized at once, in values: a part of a large tensor, so that gguf's intermediate
# results stay small.
_CHUNK = 1 << 22

_AGAIN = "download the file again, or take the model's .safetensors file"
_OTHER = "take a GGUF of Q8_0, Q4_0 to Q6_K, F16 or BF16, or the model's .safetensors file"


class GgufFile:
    """A GGUF file; its interface is that of
    :class:`~sd35_trt.checkpoints.tensor_values.TensorValues`.

    Args:
        path: the file; it is mapped, and tensors that are not quantized are views of it.

    Attributes:
        names: of the tensors; T5's are transformers'.
        quantization: how many tensors there are of each type, e.g. ``310 Q4_K, 120 F16``.

    Raises:
        CheckpointError: missing, truncated or damaged; big-endian, one of several shards, of
            another model.
        Sd35Error: gguf is not installed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        reader = _open(path)
        architecture = _field(reader, "general.architecture")
        if architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"{path} is neither Stable Diffusion 3.5 nor T5: its architecture is "
                f"{architecture!r}",
                "give a GGUF of the architecture sd3, with a T5 of t5encoder beside it",
            )
        rename = _t5_name if architecture in _T5 else str
        self._tensors: dict[str, ReaderTensor] = {rename(t.name): t for t in reader.tensors}
        self.names = frozenset(self._tensors)
        if _UMT5 in self.names:
            raise CheckpointError(f"{path} is UMT5, not T5", "take a GGUF of T5 v1.1 XXL's encoder")
        self._shapes = {name: self._shape(reader, name) for name in self.names}
        self.quantization = ", ".join(
            f"{count} {kind}"
            for kind, count in Counter(t.tensor_type.name for t in reader.tensors).most_common()
        )
        # The tensor that was dequantized last: a fused projection is read for its queries, keys
        # and values, a weight for its scale and itself.
        self._last: tuple[str, torch.Tensor] | None = None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Type of a tensor as ggml calls it, e.g. ``BF16`` or ``Q4_K``."""
        return str(self._tensors[name].tensor_type.name)

    def values(self, name: str) -> torch.Tensor:
        """A tensor's values: F32, F16 and BF16 as stored, others in FP32 as ``gguf`` makes them."""
        import torch

        data, shape = self._tensors[name].data, self._shapes[name]
        kind = self.dtype(name)
        if kind in ("F32", "F16"):
            return torch.from_numpy(data).reshape(shape)
        if kind == "BF16":
            return torch.from_numpy(data).view(torch.bfloat16).reshape(shape)
        last = self._last
        if last is None or last[0] != name:
            self._last = last = None  # frees it before the next one is made
            last = name, torch.from_numpy(self._dequantize(name)).reshape(shape)
            self._last = last
        return last[1]

    def fp8(self, name: str) -> None:
        """There are no E4M3 tensors in GGUF."""

    def input_amax(self, name: str) -> None:
        """There are no input scales in GGUF."""

    def file(self, name: str) -> Path:
        """The file."""
        return self.path

    def check(self, prefix: str) -> None:
        """Refuse types that ``gguf`` does not dequantize among the tensors with a prefix.

        Raises:
            CheckpointError: names the first such tensor and its type.
        """
        for name in sorted(self.names):
            parameter = name.rpartition(".")[2] in ("weight", "bias", _TABLE)
            if name.startswith(prefix) and parameter and not _dequantizes(self._tensors[name]):
                raise CheckpointError(
                    f"{self.path}: {self._tensors[name].name!r} is of the type {self.dtype(name)}, "
                    "which is not read here",
                    _OTHER,
                )

    def _dequantize(self, name: str) -> np.ndarray:
        from gguf import dequantize

        tensor = self._tensors[name]
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        # Blocks lie within rows, so that rows can be dequantized apart.
        result = np.empty((len(rows), tensor.n_elements // len(rows)), np.float32)
        step = max(1, _CHUNK // result.shape[1])
        for first in range(0, len(rows), step):
            chunk = slice(first, first + step)
            result[chunk] = dequantize(rows[chunk], tensor.tensor_type)
        return result

    def _shape(self, reader: GGUFReader, name: str) -> tuple[int, ...]:
        """ComfyUI-GGUF's record of a tensor's shape, or the tensor's own, which is reversed."""
        tensor = self._tensors[name]
        key = f"comfy.gguf.orig_shape.{tensor.name}"
        shape = tuple(int(length) for length in reversed(tensor.shape))
        original = _field(reader, key)
        if original is not None:
            lengths = [n for n in np.atleast_1d(original).tolist() if isinstance(n, int) and n > 0]
            if lengths != original or math.prod(lengths) != tensor.n_elements:
                raise CheckpointError(
                    f"{self.path}: {key} is {original}, the tensor has {list(shape)}", _AGAIN
                )
            return tuple(lengths)
        return (1, *shape) if name.endswith(_TABLE) and len(shape) == 2 else shape


def _open(path: Path) -> GGUFReader:
    """Raises: see :class:`GgufFile`."""
    with requirement("reading GGUF files", "build"):
        from .gguf_reader import Reader
    try:
        # Private, as safetensors maps its files: PyTorch wants memory that can be written to.
        reader = Reader(path, "c")
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing", "download the file again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}", "download the file again"
        ) from error
    except (ValueError, LookupError, OverflowError, MemoryError, RecursionError) as error:
        if "GGMLQuantizationType" in str(error):
            raise CheckpointError(
                f"{path} has a tensor of an unknown type ({error})", _OTHER
            ) from error
        raise CheckpointError(
            f"{path} is truncated, damaged or no GGUF file ({error})", _AGAIN
        ) from error
    if reader.byte_order == "S":
        raise CheckpointError(f"{path} is of the other byte order (big-endian)", _AGAIN)
    shards = _field(reader, "split.count")
    if shards not in (None, 0, 1):
        raise CheckpointError(
            f"{path} is one of {shards} shards",
            "join them with llama.cpp: llama-gguf-split --merge FIRST.gguf WHOLE.gguf",
        )
    return reader


def _field(reader: GGUFReader, key: str) -> Any:
    """A value of the metadata, of whatever type the file has it in; None where it has none."""
    field = reader.get_field(key)
    try:
        return None if field is None else field.contents()
    except UnicodeDecodeError:
        return "unreadable"


def _dequantizes(tensor: ReaderTensor) -> bool:
    """Whether the library can; it tells by trying."""
    from gguf import GGML_QUANT_SIZES, dequantize

    _, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
    try:
        dequantize(np.zeros((1, block_bytes), np.uint8), tensor.tensor_type)
    except NotImplementedError:
        return False
    return True


def _t5_name(name: str) -> str:
    module, _, parameter = name.rpartition(".")
    if module in _T5_OUTER:
        return f"{_T5_OUTER[module]}.{parameter}"
    block = re.fullmatch(r"enc\.blk\.(\d+)\.(\w+)", module)
    if block is None or block[2] not in _T5_BLOCK:
        return name
    return f"encoder.block.{block[1]}.{_T5_BLOCK[block[2]]}.{parameter}"
