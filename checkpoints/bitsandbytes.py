"""Weights that bitsandbytes quantized: LLM.int8, NF4 and FP4.

Sources: ``bitsandbytes.functional.QuantState.as_dict`` and ``backends/default/ops.py``.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import msgspec

from .quantized_weight import PLAIN, QuantizedWeight, check_scales, described_bytes, refusal
from .tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

#: Beside a weight of LLM.int8: the largest magnitude of each row.
BITS8 = "SCB"

# By which the largest magnitude of a row is multiplied, not by 1/127.
_INT8 = 7.874015718698502e-3

_STATE = "quant_state.bitsandbytes__"
_TENSORS = ("absmax", "quant_map")
_NESTED = ("nested_absmax", "nested_quant_map")

# Bytes of the types that 4-bit numbers may be packed in.
_CONTAINERS = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}

# Length of a table for 4 bits, and for scales in a byte.
_CODES, _NESTED_CODES = 16, 256


class _State(msgspec.Struct, forbid_unknown_fields=True):
    """What of a 4-bit weight is no tensor; the keys are bitsandbytes'."""

    quant_type: Literal["nf4", "fp4"]
    blocksize: Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: list[int]
    nested_blocksize: int | None = None
    nested_dtype: Literal["float32"] | None = None
    nested_offset: float | None = None


def int8(tensors: TensorFiles, names: Collection[str], layer: str) -> QuantizedWeight:
    """A weight of LLM.int8.

    Raises:
        CheckpointError: in a layout of a GPU, or of other types.
    """
    weight, rows, form = (f"{layer}.{x}" for x in ("weight", BITS8, "weight_format"))
    shape = tensors.shape(weight)
    if tensors.dtype(weight) != "I8" or tensors.dtype(rows) not in PLAIN:
        kinds = f"SCB in {tensors.dtype(rows)} with a weight in {tensors.dtype(weight)}"
        raise refusal(tensors.path, layer, kinds)
    if len(shape) != 2 or tensors.shape(rows) != shape[:1]:
        forms = f"SCB of shape {list(tensors.shape(rows))} for a weight of {list(shape)}"
        raise refusal(tensors.path, layer, forms)
    check_scales(tensors.path, layer, BITS8, tensors.stored(rows).float())
    beside = {rows}
    if form in names:
        beside.add(form)
        if described_bytes(tensors, form) != b"\0":
            raise refusal(tensors.path, layer, "LLM.int8 in a layout of a GPU")
    return QuantizedWeight(
        "LLM.int8",
        frozenset(beside),
        shape,
        lambda: tensors.stored(weight) * tensors.stored(rows).float().view(-1, 1) * _INT8,
    )


def four_bits_state(names: Collection[str], weight: str) -> str | None:
    """The tensor that describes a 4-bit weight; None where there is none."""
    states = (f"{weight}.{_STATE}{kind}" for kind in ("nf4", "fp4"))
    return next((name for name in states if name in names), None)


def four_bits(
    tensors: TensorFiles, names: Collection[str], weight: str, state: str
) -> QuantizedWeight:
    """A weight of NF4 or FP4: two values a byte, the first in its high half.

    Raises:
        CheckpointError: the description does not fit the tensors.
    """
    layer, kind = weight.rpartition(".")[0], state.rpartition("__")[2]
    facts = _read_state(tensors, layer, state)
    shape, count = tuple(facts.shape), math.prod(facts.shape)
    own = {word: f"{weight}.{word}" for word in (*_TENSORS, *_NESTED)}
    offset, nested = facts.nested_offset or 0.0, facts.nested_blocksize
    stored = tensors.dtype(weight)
    packed = math.prod(tensors.shape(weight)) * _CONTAINERS.get(stored, 0)
    if packed != -(-count // 2):
        raise refusal(tensors.path, layer, f"{kind} in {stored}, {packed} bytes for {list(shape)}")
    blocks = -(-count // facts.blocksize)
    expected: dict[str, tuple[int, tuple[str, ...]]] = {
        "absmax": (blocks, PLAIN if nested is None else ("U8",)),
        "quant_map": (_CODES, PLAIN),
    }
    if nested is not None:
        expected["nested_absmax"] = (-(-blocks // nested), PLAIN)
        expected["nested_quant_map"] = (_NESTED_CODES, PLAIN)
    for word, (length, types) in expected.items():
        if own[word] not in names:
            raise refusal(tensors.path, layer, f"{kind} without {word}")
        form, dtype = tensors.shape(own[word]), tensors.dtype(own[word])
        if math.prod(form) != length or dtype not in types:
            raise refusal(tensors.path, layer, f"{kind} with {word} in {dtype}, {list(form)}")

    def values() -> torch.Tensor:
        import torch

        absmax = tensors.stored(own["absmax"]).reshape(-1)
        if nested is not None:
            codes = tensors.stored(own["nested_quant_map"]).float()[absmax.int()]
            absmax = _by_blocks(codes, tensors.stored(own["nested_absmax"]), nested) + offset
        data = tensors.stored(weight).contiguous().view(torch.uint8).reshape(-1)
        halves = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[:count]
        codes = tensors.stored(own["quant_map"]).float()[halves.int()]
        result = _by_blocks(codes, absmax, facts.blocksize).reshape(shape)
        if not result.isfinite().all():
            raise refusal(tensors.path, layer, f"{kind} with values that are not finite")
        return result.to(getattr(torch, facts.dtype))

    return QuantizedWeight(
        kind, frozenset({state, *(own[word] for word in expected)}), shape, values
    )


def _read_state(tensors: TensorFiles, layer: str, name: str) -> _State:
    """The description of a 4-bit weight.

    Raises:
        CheckpointError: it is unreadable, or does not fit itself.
    """
    kind = name.rpartition("__")[2]
    try:
        facts = msgspec.json.decode(described_bytes(tensors, name) or b"", type=_State)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise refusal(tensors.path, layer, f"a {kind} state that is unreadable: {error}") from error
    if facts.quant_type != kind or not facts.shape or min(facts.shape) < 1:
        raise refusal(tensors.path, layer, f"{kind} of {facts.quant_type}, {facts.shape}")
    size = facts.nested_blocksize
    if (size is None) != (facts.nested_offset is None) or (size is not None and size < 1):
        raise refusal(
            tensors.path, layer, f"{kind} with nested_blocksize {size} and {facts.nested_offset}"
        )
    return facts


def _by_blocks(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Values times the scale of their block; the last one may be shorter."""
    import torch

    count = values.numel()
    padded = torch.nn.functional.pad(values.reshape(-1), (0, -count % block))
    return (padded.view(-1, block) * scales.float().view(-1, 1)).reshape(-1)[:count]
