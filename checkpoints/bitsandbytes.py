"""Weights that bitsandbytes quantized: LLM.int8, NF4 and FP4.

Sources: ``bitsandbytes.functional.QuantState.as_dict`` and ``backends/default/ops.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .quantized_weight import QuantizedWeight, refusal
from .tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

#: Beside a weight of LLM.int8: the largest magnitude of each row.
BITS8 = "SCB"

# By which the largest magnitude of a row is multiplied, not by 1/127.
_INT8 = 7.874015718698502e-3

_STATE = "quant_state.bitsandbytes__"
_NESTED = ("nested_absmax", "nested_quant_map")

# Bytes of the types that 4-bit numbers may be packed in.
_CONTAINERS = {"U8": 1, "F16": 2, "BF16": 2, "F32": 4}

_VALUE_TYPES = ("bfloat16", "float16", "float32")


def int8(tensors: TensorFiles, names: Collection[str], layer: str) -> QuantizedWeight:
    """A weight of LLM.int8.

    Raises:
        CheckpointError: in a layout of a GPU, or of other types.
    """
    weight, rows, form = (f"{layer}.{x}" for x in ("weight", BITS8, "weight_format"))
    shape = tensors.shape(weight)
    if tensors.dtype(weight) != "I8" or tensors.shape(rows) != shape[:1]:
        raise refusal(tensors.path, layer, f"SCB with a weight in {tensors.dtype(weight)}")
    beside = {rows}
    if form in names:
        beside.add(form)
        if int(tensors.stored(form).reshape(())) != 0:
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
    try:
        facts: dict[str, Any] = json.loads(bytes(tensors.stored(state).numpy()))
        shape = tuple(int(length) for length in facts["shape"])
        block, dtype = int(facts["blocksize"]), str(facts["dtype"])
        nested = int(facts["nested_blocksize"]) if "nested_blocksize" in facts else None
        offset = float(facts.get("nested_offset", 0.0))
    except (ValueError, KeyError, TypeError) as error:
        raise refusal(tensors.path, layer, f"a {kind} state that is unreadable") from error
    own = {word: f"{weight}.{word}" for word in ("absmax", "quant_map", *_NESTED)}
    needed = list(own.values()) if nested else [own["absmax"], own["quant_map"]]
    lacking = [name for name in needed if name not in names]
    if lacking or dtype not in _VALUE_TYPES or block < 1:
        raise refusal(
            tensors.path, layer, f"{kind} without {lacking[0]}" if lacking else f"{kind} {dtype}"
        )
    count = math.prod(shape)
    stored = tensors.dtype(weight)
    packed = math.prod(tensors.shape(weight)) * _CONTAINERS.get(stored, 0)
    if packed != -(-count // 2):
        raise refusal(tensors.path, layer, f"{kind} in {stored}, {packed} bytes for {list(shape)}")
    largest = tensors.dtype(own["absmax"])
    if largest != ("U8" if nested else "F32") or math.prod(tensors.shape(own["absmax"])) != -(
        -count // block
    ):
        raise refusal(tensors.path, layer, f"{kind} with absmax in {largest}")

    def values() -> torch.Tensor:
        import torch

        absmax = tensors.stored(own["absmax"])
        if nested:
            codes = tensors.stored(own["nested_quant_map"])[absmax.long()]
            absmax = _by_blocks(codes, tensors.stored(own["nested_absmax"]), nested) + offset
        data = tensors.stored(weight).contiguous().view(torch.uint8).reshape(-1)
        halves = torch.stack([data >> 4, data & 15], dim=1).reshape(-1)[:count]
        codes = tensors.stored(own["quant_map"])[halves.int()]
        result = _by_blocks(codes, absmax, block).reshape(shape)
        return result.to(getattr(torch, dtype))

    beside = {state, *(name for name in own.values() if name in names)}
    return QuantizedWeight(kind, frozenset(beside), shape, values)


def _by_blocks(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Values times the scale of their block; the last one may be shorter."""
    import torch

    count = values.numel()
    padded = torch.nn.functional.pad(values.reshape(-1), (0, -count % block))
    return (padded.view(-1, block) * scales.float().view(-1, 1)).reshape(-1)[:count]
