"""Tensors of one safetensors file, some of them in ComfyUI's scaled FP8.

A quantized layer has an E4M3 ``weight`` and a scale of one FP32 value; the weight's value is their
product. There are three spellings, told apart layer by layer:

- a tensor ``scaled_fp8`` in front of the part, and ``<layer>.scale_weight``, ``scale_input``;
- ``<layer>.comfy_quant``, JSON in bytes with the ``format``, and ``weight_scale``, ``input_scale``;
- the same without ``comfy_quant``, the JSON of all layers being in the file's metadata.

An input scale is what the layer's input is divided by before it is rounded to E4M3.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.errors import CheckpointError
from sd35_trt.formats.calibration import E4M3_MAX

from .quantized import PLAIN, Quantized, quantized_weights, refusal, stored_fp8
from .tensor_names import MODEL
from .weights import open_safetensors
from .wrappers import plain_name, plain_names

if TYPE_CHECKING:
    import torch

_FORMAT = "float8_e4m3fn"
_METADATA = "_quantization_metadata"

_OTHER = "take the model's BF16, FP16, FP8 or fp8_scaled file"


class TensorFile:
    """A safetensors file; names are without wrappers, see :mod:`sd35_trt.checkpoints.wrappers`.

    Args:
        path: the file; it is mapped, and tensors are views of it.
        wanted, instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Attributes:
        quantization: see :class:`~sd35_trt.checkpoints.weights.Weights`.

    Raises:
        CheckpointError: missing, something else, truncated or damaged.
    """

    quantization: str | None = None

    def __init__(self, path: Path, wanted: str = MODEL, instead: str | None = None) -> None:
        self.path = path
        self._handle = open_safetensors(path, wanted=wanted, instead=instead)
        self._stored = plain_names(path, self._handle.keys())
        self.names = frozenset(self._stored)
        self._quantized: dict[str, Quantized] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor's values, from the header; see :meth:`check`."""
        if name in self._quantized:
            return self._quantized[name].shape
        return tuple(self._handle.get_slice(self._stored[name]).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as the header spells it, e.g. ``BF16`` or ``F8_E4M3``."""
        return str(self._handle.get_slice(self._stored[name]).get_dtype())

    def value_dtype(self, name: str) -> str:
        """Type of a tensor's values; see :meth:`sd35_trt.checkpoints.weights.Weights.dtype`."""
        return "F32" if name in self._quantized else self.dtype(name)

    def stored(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        return self._handle.get_tensor(self._stored[name])

    def values(self, name: str) -> torch.Tensor:
        """A tensor's values: a scaled one in FP32, 8-bit ones without a scale in FP16."""
        if name in self._quantized:
            return self._quantized[name].values()
        tensor = self.stored(name)
        return tensor.half() if self.dtype(name).startswith("F8_") else tensor

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An E4M3 tensor as stored and its scale in FP32 []; None where it is of another type, or
        has several scales.
        """
        return stored_fp8(self, name, self._quantized)

    def input_amax(self, name: str) -> float | None:
        """The largest input magnitude of a weight's layer by its input scale; None without one.

        The older spelling has a 1 where nothing was measured.
        """
        layer = name.removesuffix(".weight")
        for suffix, unmeasured in ((".scale_input", 1.0), (".input_scale", None)):
            if layer + suffix in self:
                scale = float(self._scalar(layer + suffix))
                return None if scale == unmeasured else scale * E4M3_MAX
        return None

    def check(self, prefix: str) -> None:
        """Find the quantized weights among the tensors with a prefix; what belongs to them has no
        name of its own afterwards.

        Raises:
            CheckpointError: names the layer and the format.
        """
        weights = quantized_weights(self, prefix)
        for name in sorted(self.names):
            if not name.startswith(prefix):
                continue
            layer, _, last = name.rpartition(".")
            if last == "comfy_quant":
                self._check_format(layer, bytes(self.stored(name).numpy()))
            elif last in ("scale_input", "input_scale"):
                self._scalar(name)
            if last == "weight" and self._formats.get(layer, _FORMAT) != _FORMAT:
                raise refusal(self, layer, self._formats[layer])
        self._quantized |= weights
        beside = (weight.beside for weight in weights.values())
        self.names = (self.names | weights.keys()).difference(*beside)

    def _check_format(self, layer: str, described: bytes) -> None:
        try:
            kind = json.loads(described)["format"]
        except (ValueError, KeyError, TypeError):
            kind = "unreadable"
        if kind != _FORMAT:
            raise refusal(self, layer, str(kind))

    @cached_property
    def _formats(self) -> dict[str, str]:
        """Layer → format by the file's metadata."""
        text = (self._handle.metadata() or {}).get(_METADATA)
        if text is None:
            return {}
        try:
            layers: dict[str, Any] = json.loads(text)["layers"]
            return {plain_name(layer): str(entry["format"]) for layer, entry in layers.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: {_METADATA} is unreadable", _OTHER) from error

    def _scalar(self, name: str) -> torch.Tensor:
        if any(length != 1 for length in self.shape(name)) or self.dtype(name) not in PLAIN:
            layer, _, last = name.rpartition(".")
            raise refusal(self, layer, f"{last} of shape {list(self.shape(name))}")
        return self.stored(name).float().reshape(())
