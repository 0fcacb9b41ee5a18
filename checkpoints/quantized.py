"""Weights that others have quantized: which are read, and what they are worth.

A weight's value is its stored numbers times scales, which lie beside it: one for the tensor, one
for each row, or one for each block. What is not one of the spellings here is refused, for its
numbers without the scales would be taken for weights; and so is a quantized weight beside a tensor
that is not known, which may change its value.

Sources: the ``weight_scale_inv`` of DeepSeek-V3 and transformers' ``finegrained_fp8``; the
``weight_scale`` of compressed-tensors, FBGEMM and modelopt's ``export``; ComfyUI's
``scaled_fp8`` and :mod:`.comfy`; the ``state_dict`` of optimum-quanto's ``WeightQBytesTensor``;
:mod:`.bitsandbytes`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING

from .bitsandbytes import BITS8, four_bits, four_bits_state, int8
from .comfy import INPUT_SCALES, MARKS, check_descriptions
from .quantized_weight import (
    FLOATS,
    PLAIN,
    QuantizedWeight,
    block_values,
    check_scales,
    refusal,
)
from .tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

# Beside a weight: what multiplies it. The last one's name means that it divided.
_SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")

# Beside any weight, and beside one with a scale: what changes no value. FBGEMM bounds inputs.
_IDLE = (*INPUT_SCALES, *MARKS)
_SCALED_IDLE = (*_IDLE, "output_scale", "input_scale_ub")

# Side of the blocks that have a scale each.
_BLOCK = 128

# Types of the numbers that a scale multiplies.
_SCALED = ("F8_E4M3", "F8_E5M2", "I8")

# Of scales, besides what is plain: a power of two in a byte.
_EXPONENT = "F8_E8M0"

# Types that hold codes or packed numbers. Ids and masks are wider, or are no layer's.
_CODES = re.compile(r"[IU](8|16|32)|F[46](_.*)?|F8_E8M0")

# Integers that are no layer's numbers.
_NO_WEIGHTS = re.compile(r"(^|\.)(position_ids|attn_mask|attention_mask|spiece_model)$")

# Parts of words that only what belongs to a quantized weight is called by.
_TELLING = ("scale", "absmax", "amax", "zero", "scb", "quant")


def quantized_weights(tensors: TensorFiles, prefix: str = "") -> dict[str, QuantizedWeight]:
    """The quantized weights among the tensors with a prefix, by name; from headers, descriptions
    and scales; those of groups and of 4 bits, which are many, are checked when they are read.

    Raises:
        CheckpointError: names a layer whose weight is stored in a way that is not read, has a
            scale that is not understood, or lies beside a tensor that is not known.
    """
    names = frozenset(name for name in tensors.names if name.startswith(prefix))
    weights = dict(_weights(tensors, names))
    check_descriptions(tensors, prefix, weights)
    beside = {name for weight in weights.values() for name in weight.beside}
    own_weights = (name for name in names | weights.keys() if name.endswith(".weight"))
    weighted = {name.removesuffix(".weight") for name in own_weights}
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(_layer(name, weighted), []).append(name)
    for layer, own in layers.items():
        # A model's own tensors at the top are no layer's.
        if layer:
            _check_layer(tensors, layer, sorted(own), weights, beside)
    _check_casts(tensors, names, weights)
    return weights


def _check_casts(
    tensors: TensorFiles, names: Collection[str], weights: Mapping[str, QuantizedWeight]
) -> None:
    """Refuse FP8 without a scale where the same layer of another block has one."""
    scaled = {_kind(name): w for name, w in weights.items() if w.spelling in _SCALES}
    for name in sorted(names):
        weight = scaled.get(_kind(name))
        if weight is not None and name not in weights and tensors.dtype(name).startswith("F8_"):
            layer = name.rpartition(".")[0]
            without = f"{tensors.dtype(name)} without {weight.spelling}, which other blocks have"
            raise refusal(tensors.path, layer, without)


def _kind(name: str) -> str:
    """A name without its block's number."""
    return re.sub(r"\.\d+\.", ".#.", name, count=1)


def _layer(name: str, weighted: Collection[str]) -> str:
    """The layer that a tensor belongs to: the one with a weight that it lies in, however deep."""
    layer = parent = name.rpartition(".")[0]
    while layer and layer not in weighted:
        layer = layer.rpartition(".")[0]
    return layer or parent


def _check_layer(
    tensors: TensorFiles,
    layer: str,
    names: list[str],
    weights: Mapping[str, QuantizedWeight],
    beside: set[str],
) -> None:
    weight = f"{layer}.weight"
    stored = tensors.dtype(weight) if weight in names else None
    is_read = weight in weights or stored in FLOATS
    codes = [
        name
        for name in names
        if _CODES.fullmatch(tensors.dtype(name))
        and name not in beside | weights.keys()
        and name.rpartition(".")[2] not in MARKS
        and not _NO_WEIGHTS.search(name)
    ]
    others = [name.removeprefix(f"{layer}.") for name in names if name != weight]
    known = ("bias",) if weight in weights else ("bias", *_IDLE)
    unknown = [word for word in others if f"{layer}.{word}" not in beside and word not in known]
    if codes or not (is_read or stored is None):
        first = codes[0].removeprefix(f"{layer}.") if codes else "weight"
        kind = f"{tensors.dtype(f'{layer}.{first}')} in {first}"
        listed = ", ".join(word for word in others if word not in (first, "bias"))
        raise refusal(tensors.path, layer, f"{kind}, with {listed}" if listed else kind)
    eight_bits = [name for name in names if tensors.dtype(name).startswith("F8_")]
    if weight in weights or weight in eight_bits:
        if unknown:
            raise refusal(tensors.path, layer, f"{stored or 'weight'} with {', '.join(unknown)}")
    else:
        scales = [
            word
            for word in unknown
            if f"{layer}.{word}" not in eight_bits
            and any(part in word.lower() for part in _TELLING)
        ]
        if scales and (stored is not None or eight_bits):
            kind = tensors.dtype(eight_bits[0]) if stored is None else stored
            raise refusal(tensors.path, layer, f"{kind} with {', '.join(scales)}")


def stored_fp8(
    tensors: TensorFiles, name: str, weights: Mapping[str, QuantizedWeight]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """An E4M3 tensor as stored and its only scale in FP32 []; None for any other.

    Args:
        weights: the files' quantized ones.
    """
    import torch

    weight = weights.get(name)
    if (weight is not None and weight.scale is None) or tensors.dtype(name) != "F8_E4M3":
        return None
    scale = torch.ones(()) if weight is None or weight.scale is None else weight.scale()
    return tensors.stored(name), scale


def _weights(tensors: TensorFiles, names: frozenset[str]) -> Iterator[tuple[str, QuantizedWeight]]:
    for name in names:
        layer, _, last = name.rpartition(".")
        if last == "_data" and layer.endswith("weight"):
            yield layer, _quanto(tensors, names, layer)
        if last != "weight":
            continue
        state = four_bits_state(names, name)
        scales = [f"{layer}.{s}" for s in _SCALES if f"{layer}.{s}" in names]
        if state:
            yield name, four_bits(tensors, names, name, state)
        elif f"{layer}.{BITS8}" in names:
            yield name, int8(tensors, names, layer)
        elif scales:
            yield name, _scaled(tensors, names, name, scales)


def _scaled(
    tensors: TensorFiles, names: Collection[str], name: str, scales: list[str]
) -> QuantizedWeight:
    """A weight with one of :data:`_SCALES`."""
    layer, scale = name.rpartition(".")[0], scales[0]
    word = scale.rpartition(".")[2]
    if len(scales) > 1:
        both = " and ".join(s.rpartition(".")[2] for s in scales)
        raise refusal(tensors.path, layer, both)
    if tensors.dtype(name) not in _SCALED:
        raise refusal(tensors.path, layer, f"{tensors.dtype(name)} with {word}")
    shape, form = tensors.shape(name), tensors.shape(scale)
    if tensors.dtype(scale) not in (*PLAIN, _EXPONENT):
        raise refusal(tensors.path, layer, f"{word} in {tensors.dtype(scale)}")

    def scaling() -> torch.Tensor:
        scales = tensors.stored(scale).float()
        check_scales(tensors.path, layer, word, scales)
        return scales

    beside = frozenset([scale, *(f"{layer}.{w}" for w in _SCALED_IDLE if f"{layer}.{w}" in names)])
    if math.prod(form) == 1:
        scaling()
        return QuantizedWeight(
            word,
            beside,
            shape,
            lambda: tensors.stored(name).float() * scaling().reshape(()),
            lambda: scaling().reshape(()),
        )
    rows = (*shape[:1], *[1] * (len(shape) - 1))
    if form in (shape[:1], rows):
        scaling()
        return QuantizedWeight(
            word, beside, shape, lambda: tensors.stored(name).float() * scaling().reshape(rows)
        )
    if len(shape) == len(form) == 2:
        in_squares = form == tuple(-(-length // _BLOCK) for length in shape)
        in_groups = form[0] == shape[0] and form[1] > 0 and shape[1] % form[1] == 0
        sides = (_BLOCK, _BLOCK) if in_squares else (1, shape[1] // max(form[1], 1))
        if in_squares:
            scaling()
        if in_squares or in_groups:

            def by_blocks() -> torch.Tensor:
                return block_values(tensors.stored(name).float(), scaling(), sides)

            return QuantizedWeight(word, beside, shape, by_blocks)
    raise refusal(
        tensors.path, layer, f"{word} of shape {list(form)} for a weight of {list(shape)}"
    )


def _quanto(tensors: TensorFiles, names: frozenset[str], weight: str) -> QuantizedWeight:
    """Optimum-quanto's 8-bit weight: ``_data``, and a ``_scale`` for each row."""
    data, scale, layer = f"{weight}._data", f"{weight}._scale", weight.rpartition(".")[0]
    shape = tensors.shape(data)
    rows = (*shape[:1], *[1] * (len(shape) - 1))
    if scale not in names or weight in names or tensors.dtype(data) not in ("I8", "F8_E4M3"):
        raise refusal(tensors.path, layer, f"quanto's {tensors.dtype(data)}")
    if tensors.dtype(scale) not in PLAIN:
        raise refusal(tensors.path, layer, f"quanto's scales in {tensors.dtype(scale)}")
    if tensors.shape(scale) != rows:
        form = list(tensors.shape(scale))
        raise refusal(tensors.path, layer, f"quanto's scales of shape {form}")
    check_scales(tensors.path, layer, "quanto's scale", tensors.stored(scale).float())
    scales = {f"{layer}.input_scale", f"{layer}.output_scale"} & names
    return QuantizedWeight(
        "quanto",
        frozenset({data, scale, *scales}),
        shape,
        lambda: tensors.stored(data).float() * tensors.stored(scale).float(),
    )
