"""How ComfyUI describes the layers that it quantizes.

A quantized layer has a ``weight`` and its scale. There are three spellings, told apart layer by
layer:

- a tensor ``scaled_fp8`` in front of the part, and ``<layer>.scale_weight``, ``scale_input``;
- ``<layer>.comfy_quant``, JSON in bytes with the ``format``, and ``weight_scale``, ``input_scale``;
- the same without ``comfy_quant``, the JSON of all layers being in the file's metadata.

An input scale is what the layer's input is divided by before it is rounded to E4M3.

Sources: ComfyUI's ``quant_ops.QUANT_ALGOS``, ``ops.mixed_precision_ops`` and
``utils.convert_old_quants``; transformers' ``finegrained_fp8.FP8Linear``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sd35_trt.errors import CheckpointError
from sd35_trt.formats.calibration import E4M3_MAX

from .quantized_weight import PLAIN, QuantizedWeight, check_scales, described_bytes, refusal
from .tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch

#: Last words of tensors that describe, and have no part in a weight's value.
MARKS = ("comfy_quant", "scaled_fp8")

#: Last words of input scales, and what each is where nothing was measured. The last one is of
#: transformers' FP8.
INPUT_SCALES = {"scale_input": 1.0, "input_scale": None, "activation_scale": 1.0}

# Format → type of its weights.
_FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}

# Of a description, besides its format: what changes no value.
_IDLE = ("full_precision_matrix_mult", "orig_dtype", "orig_shape", "per_row")

# Beside a described weight.
_SCALE = "weight_scale"

_METADATA = "_quantization_metadata"

_OTHER = "take the model's BF16, FP16, FP8 or fp8_scaled file"


def check_descriptions(
    tensors: TensorFiles, prefix: str, weights: Mapping[str, QuantizedWeight]
) -> None:
    """Refuse layers, of those with a prefix, whose description is not of what is read, and input
    scales that are none.

    Args:
        weights: the files' quantized ones.

    Raises:
        CheckpointError: names the layer and the format, or what else the description has.
    """
    for layer, description in _descriptions(tensors, prefix):
        if not isinstance(description, dict):
            raise refusal(tensors.path, layer, "comfy_quant that is unreadable")
        kind = description.get("format")
        stored = _FORMATS.get(str(kind))
        others = [k for k, v in description.items() if v and k not in ("format", *_IDLE)]
        weight = f"{layer}.weight"
        if stored is None:
            raise refusal(tensors.path, layer, " ".join(str(kind).split()))
        if others:
            raise refusal(tensors.path, layer, f"{kind} with {', '.join(others)}")
        if weight in tensors.names and tensors.dtype(weight) != stored:
            raise refusal(tensors.path, layer, f"{kind} in {tensors.dtype(weight)}")
        if weight not in weights or weights[weight].spelling != _SCALE:
            raise refusal(tensors.path, layer, f"{kind} without {_SCALE}")
    for name in tensors.names:
        layer, _, last = name.rpartition(".")
        if name.startswith(prefix) and last in INPUT_SCALES:
            _scalar(tensors, name)
            others = [w for w in INPUT_SCALES if w != last and f"{layer}.{w}" in tensors.names]
            if others:
                raise refusal(tensors.path, layer, f"{last} and {others[0]}")


def input_amax(tensors: TensorFiles, weight: str) -> float | None:
    """The largest input magnitude of a weight's layer by its input scale; None without one.

    Inputs of a weight in another type than E4M3 are divided by something else. Where nothing
    was measured, most spellings have a 1.
    """
    if weight not in tensors.names or tensors.dtype(weight) not in (*PLAIN, "F8_E4M3"):
        return None
    layer = weight.removesuffix(".weight")
    for word, unmeasured in INPUT_SCALES.items():
        if f"{layer}.{word}" in tensors.names:
            scale = float(_scalar(tensors, f"{layer}.{word}"))
            return None if scale == unmeasured else scale * E4M3_MAX
    return None


def _descriptions(tensors: TensorFiles, prefix: str) -> Iterator[tuple[str, Any]]:
    """Layers, and what is said of them."""
    for name in tensors.names:
        layer, _, last = name.rpartition(".")
        if last == MARKS[0] and name.startswith(prefix):
            try:
                yield layer, json.loads(described_bytes(tensors, name) or b"")
            except ValueError:
                yield layer, None
    for metadata in tensors.metadata:
        if _METADATA not in metadata:
            continue
        try:
            layers: dict[str, Any] = dict(json.loads(metadata[_METADATA])["layers"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{tensors.path}: {_METADATA} is unreadable", _OTHER) from error
        for name, description in layers.items():
            # Whoever quantizes a transformer by itself leaves out its prefix.
            for layer in {tensors.own_name(name), prefix + tensors.own_name(name)}:
                if layer.startswith(prefix) and f"{layer}.weight" in tensors.names:
                    yield layer, description


def _scalar(tensors: TensorFiles, name: str) -> torch.Tensor:
    form, layer, last = tensors.shape(name), *name.rpartition(".")[::2]
    if any(length != 1 for length in form):
        raise refusal(tensors.path, layer, f"{last} of shape {list(form)}")
    if tensors.dtype(name) not in PLAIN:
        raise refusal(tensors.path, layer, f"{last} in {tensors.dtype(name)}")
    scale = tensors.stored(name).float().reshape(())
    check_scales(tensors.path, layer, last, scale)
    return scale
