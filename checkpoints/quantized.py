"""Weights that others have quantized: which are read, and what they are worth.

A weight's value is its stored numbers times scales, which lie beside it: one for the tensor, one
for each row, or one for each block. What is not one of the spellings here is refused, for its
numbers without the scales would be taken for weights.

Sources: ``bitsandbytes.functional.QuantState.as_dict`` and ``backends/default/ops.py``; the
``weight_scale_inv`` of DeepSeek-V3 and transformers' ``finegrained_fp8``; ComfyUI's
``scaled_fp8``; the ``state_dict`` of optimum-quanto's ``WeightQBytesTensor``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sd35_trt.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: What a tensor that is not quantized may be stored in; the 8-bit types are a cast alone.
PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")

# Beside a weight: what multiplies it. The last one's name means that it divided.
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")

# Side of the blocks that have a scale each.
_BLOCK = 128

# bitsandbytes' LLM.int8 multiplies by this, not by 1/127.
_INT8 = 7.874015718698502e-3

_STATE = "quant_state.bitsandbytes__"

# Of what bitsandbytes leaves beside a weight, by what it is called there.
_NESTED = ("nested_absmax", "nested_quant_map")

# Last words of tensors that only packed weights have: GPTQ and AWQ, compressed-tensors, modelopt.
_PACKED = ("qweight", "qzeros", "g_idx", "weight_packed", "weight_shape", "weight_zero_point")

# What ``quantization_config`` may name.
_READ = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit", "fp8", "quanto")

_WAYS = (
    "take the model's BF16, FP16 or FP8 file, or load it with the library that made it and save "
    "what dequantize() gives"
)


class Stored(Protocol):
    """Tensors as a file has them; implemented by what opens files."""

    @property
    def path(self) -> Path: ...

    @property
    def names(self) -> Collection[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> str: ...

    def stored(self, name: str) -> torch.Tensor: ...


@dataclass(frozen=True)
class Quantized:
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


def quantized_weights(file: Stored, prefix: str = "") -> dict[str, Quantized]:
    """The quantized weights among the tensors with a prefix, by name; from headers alone, but for
    descriptions of a few bytes.

    Raises:
        CheckpointError: names a layer whose weight is stored in a way that is not read, or has a
            scale that is not understood.
    """
    names = frozenset(name for name in file.names if name.startswith(prefix))
    weights = dict(_weights(file, names))
    beside = {name for weight in weights.values() for name in weight.beside}
    children: dict[str, list[str]] = {}
    for name in names:
        children.setdefault(name.rpartition(".")[0], []).append(name)
    for name in sorted(names - beside):
        layer, _, last = name.rpartition(".")
        if last in _PACKED or "_quantizer" in name:
            raise refusal(file, layer, last)
        kind = file.dtype(name)
        if name in weights or last in ("scaled_fp8", "comfy_quant"):
            continue
        if last == "weight" and kind not in PLAIN:
            others = sorted({n.rpartition(".")[2] for n in _siblings(children, name)} - {"bias"})
            raise refusal(file, layer, f"{kind} with {', '.join(others)}" if others else kind)
        if kind.startswith("F8_"):
            for other in _siblings(children, name):
                word = other.rpartition(".")[2]
                if other not in beside and _is_scale(word):
                    raise refusal(file, layer, word)
    return weights


def stored_fp8(
    file: Stored, name: str, weights: Mapping[str, Quantized]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """An E4M3 tensor as stored and its only scale in FP32 []; None for any other.

    Args:
        weights: the file's quantized ones.
    """
    import torch

    weight = weights.get(name)
    if (weight is not None and weight.scale is None) or file.dtype(name) != "F8_E4M3":
        return None
    scale = torch.ones(()) if weight is None or weight.scale is None else weight.scale()
    return file.stored(name), scale


def check_method(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a part whose configuration names a quantization that is not read.

    Args:
        path: of the configuration, for the message.
        config: ``quantization_config`` there.

    Raises:
        CheckpointError: names the method.
    """
    method = config.get("quant_method")
    if method not in _READ:
        raise CheckpointError(
            f"{path}: its weights are quantized by {method or 'a method that it does not name'}",
            _WAYS,
        )


def refusal(file: Stored, layer: str, kind: str) -> CheckpointError:
    """The one line about a layer that is quantized otherwise."""
    return CheckpointError(
        f"{file.path}: {layer!r} is quantized in a way that is not read here ({kind})", _WAYS
    )


def _siblings(children: Mapping[str, list[str]], name: str) -> Iterator[str]:
    """What lies beside a weight, in its layer or below itself."""
    layer = name.rpartition(".")[0]
    yield from (n for n in children.get(layer, []) if n != name)
    yield from children.get(name, [])


def _is_scale(word: str) -> bool:
    """Whether a tensor of that name would be needed to know a weight's values."""
    inputs = word.startswith(("input", "output")) or word in ("scale_input", "scale_output")
    parts = ("scale", "absmax", "amax", "zero", "scb", "quant")
    return not inputs and any(part in word.lower() for part in parts)


def _weights(file: Stored, names: frozenset[str]) -> Iterator[tuple[str, Quantized]]:
    for name in names:
        layer, _, last = name.rpartition(".")
        if last == "_data" and layer.endswith("weight"):
            yield layer, _quanto(file, names, layer)
        if last != "weight":
            continue
        state = [n for n in (f"{name}.{_STATE}nf4", f"{name}.{_STATE}fp4") if n in names]
        scales = [f"{layer}.{s}" for s in _SCALES if f"{layer}.{s}" in names]
        if state:
            yield name, _four_bits(file, names, name, state[0])
        elif f"{layer}.SCB" in names:
            yield name, _int8(file, names, layer)
        elif scales:
            yield name, _scaled(file, name, scales)


def _scaled(file: Stored, name: str, scales: list[str]) -> Quantized:
    """A weight with one of :data:`_SCALES`."""
    layer, scale = name.rpartition(".")[0], scales[0]
    word = scale.rpartition(".")[2]
    if len(scales) > 1:
        raise refusal(file, layer, " and ".join(s.rpartition(".")[2] for s in scales))
    if file.dtype(name) not in ("F8_E4M3", "F8_E5M2", "I8"):
        raise refusal(file, layer, f"{file.dtype(name)} with {word}")
    shape, form = file.shape(name), file.shape(scale)
    if file.dtype(scale) not in PLAIN[:4]:
        raise refusal(file, layer, f"{word} in {file.dtype(scale)}")

    def scaling() -> torch.Tensor:
        return file.stored(scale).float()

    beside = frozenset([scale])
    if math.prod(form) == 1:
        return Quantized(
            word,
            beside,
            shape,
            lambda: file.stored(name).float() * scaling().reshape(()),
            lambda: scaling().reshape(()),
        )
    rows = (shape[0], *[1] * (len(shape) - 1))
    if form in (shape[:1], rows):
        return Quantized(
            word, beside, shape, lambda: file.stored(name).float() * scaling().reshape(rows)
        )
    if len(shape) == 2 and form == tuple(-(-length // _BLOCK) for length in shape):

        def by_blocks() -> torch.Tensor:
            wide = scaling().repeat_interleave(_BLOCK, 0).repeat_interleave(_BLOCK, 1)
            return file.stored(name).float() * wide[: shape[0], : shape[1]]

        return Quantized(word, beside, shape, by_blocks)
    raise refusal(file, layer, f"{word} of shape {list(form)} for a weight of {list(shape)}")


def _quanto(file: Stored, names: frozenset[str], weight: str) -> Quantized:
    """Optimum-quanto's 8-bit weight: ``_data``, and a ``_scale`` for each row."""
    data, scale, layer = f"{weight}._data", f"{weight}._scale", weight.rpartition(".")[0]
    shape = file.shape(data)
    rows = (shape[0], *[1] * (len(shape) - 1))
    if scale not in names or file.dtype(data) not in ("I8", "F8_E4M3"):
        raise refusal(file, layer, f"quanto's {file.dtype(data)}")
    if file.shape(scale) != rows:
        raise refusal(file, layer, f"quanto's scales of shape {list(file.shape(scale))}")
    scales = {f"{layer}.input_scale", f"{layer}.output_scale"} & names
    return Quantized(
        "quanto",
        frozenset({data, scale, *scales}),
        shape,
        lambda: file.stored(data).float() * file.stored(scale).float(),
    )


def _int8(file: Stored, names: frozenset[str], layer: str) -> Quantized:
    """Bitsandbytes' LLM.int8: ``SCB`` is the largest magnitude of each row."""
    weight, rows, form = (f"{layer}.{x}" for x in ("weight", "SCB", "weight_format"))
    shape = file.shape(weight)
    if file.dtype(weight) != "I8" or file.shape(rows) != shape[:1]:
        raise refusal(file, layer, f"SCB with a weight in {file.dtype(weight)}")
    beside = {rows}
    if form in names:
        beside.add(form)
        if int(file.stored(form).reshape(())) != 0:
            raise refusal(file, layer, "LLM.int8 in a layout of a GPU")
    return Quantized(
        "LLM.int8",
        frozenset(beside),
        shape,
        lambda: file.stored(weight) * file.stored(rows).float().view(-1, 1) * _INT8,
    )


def _four_bits(file: Stored, names: frozenset[str], weight: str, state: str) -> Quantized:
    """Bitsandbytes' NF4 and FP4: two values a byte, the first in its high half."""
    layer, kind = weight.rpartition(".")[0], state.rpartition("__")[2]
    try:
        facts: dict[str, Any] = json.loads(bytes(file.stored(state).numpy()))
        shape = tuple(int(length) for length in facts["shape"])
        block, dtype = int(facts["blocksize"]), str(facts["dtype"])
        nested = int(facts["nested_blocksize"]) if "nested_blocksize" in facts else None
        offset = float(facts.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise refusal(file, layer, f"a {kind} state that is unreadable") from error
    own = {word: f"{weight}.{word}" for word in ("absmax", "quant_map", *_NESTED)}
    needed = own.values() if nested else [own["absmax"], own["quant_map"]]
    lacking = [name for name in needed if name not in names]
    if lacking or dtype not in ("bfloat16", "float16", "float32") or block < 1:
        raise refusal(file, layer, f"{kind} without {lacking[0]}" if lacking else f"{kind} {dtype}")
    count, packed = math.prod(shape), math.prod(file.shape(weight))
    if file.dtype(weight) != "U8" or packed != -(-count // 2):
        raise refusal(file, layer, f"{kind} of {packed} bytes for {list(shape)}")

    def values() -> torch.Tensor:
        import torch

        absmax = file.stored(own["absmax"])
        if nested:
            codes = file.stored(own["nested_quant_map"])[absmax.long()]
            absmax = _by_blocks(codes, file.stored(own["nested_absmax"]), nested) + offset
        data = file.stored(weight).reshape(-1)
        halves = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[:count]
        codes = file.stored(own["quant_map"])[halves.int()]
        result = _by_blocks(codes, absmax, block).reshape(shape)
        return result.to(getattr(torch, dtype))

    return Quantized(kind, frozenset({state, *own.values()} & names), shape, values)


def _by_blocks(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Values times the scale of their block; the last one may be shorter."""
    import torch

    count = values.numel()
    padded = torch.nn.functional.pad(values.reshape(-1), (0, -count % block))
    return (padded.view(-1, block) * scales.float().view(-1, 1)).reshape(-1)[:count]
