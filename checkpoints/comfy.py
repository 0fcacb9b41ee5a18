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

from .diffusers import open_safetensors
from .tensor_names import MODEL
from .wrappers import plain_name, plain_names

if TYPE_CHECKING:
    import torch

_E4M3 = "F8_E4M3"

# What a tensor that is not quantized may be stored in; the 8-bit types are a cast alone.
_PLAIN = ("F64", "F32", "F16", "BF16", _E4M3, "F8_E5M2")

_FORMAT = "float8_e4m3fn"
_METADATA = "_quantization_metadata"

_OTHER = "take the model's BF16, FP16, FP8 or fp8_scaled file"


class TensorFile:
    """A safetensors file; names are without wrappers, see :mod:`sd35_trt.checkpoints.wrappers`.

    Args:
        path: the file; it is mapped, and tensors are views of it.
        wanted, instead: see :func:`sd35_trt.checkpoints.contents.refusal`.

    Attributes:
        quantization: see :class:`~sd35_trt.checkpoints.diffusers.Weights`.

    Raises:
        CheckpointError: missing, something else, truncated or damaged.
    """

    quantization: str | None = None

    def __init__(self, path: Path, wanted: str = MODEL, instead: str | None = None) -> None:
        self.path = path
        self._handle = open_safetensors(path, wanted=wanted, instead=instead)
        self._stored = plain_names(path, self._handle.keys())
        self.names = frozenset(self._stored)

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._handle.get_slice(self._stored[name]).get_shape())

    def dtype(self, name: str) -> str:
        """Type of a tensor as the header spells it, e.g. ``BF16`` or ``F8_E4M3``."""
        return str(self._handle.get_slice(self._stored[name]).get_dtype())

    def stored(self, name: str) -> torch.Tensor:
        """A tensor as stored."""
        return self._handle.get_tensor(self._stored[name])

    def values(self, name: str) -> torch.Tensor:
        """A tensor's values: a scaled one in FP32, 8-bit ones without a scale in FP16."""
        tensor, scale = self.stored(name), self._scale(name)
        if scale is not None:
            return tensor.float() * scale
        return tensor.half() if self.dtype(name).startswith("F8_") else tensor

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An E4M3 tensor as stored and its scale in FP32 []; None where it is of another type."""
        import torch

        if self.dtype(name) != _E4M3:
            return None
        scale = self._scale(name)
        return self.stored(name), torch.ones(()) if scale is None else scale

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
        """Refuse quantization of other kinds than the above among the tensors with a prefix.

        Raises:
            CheckpointError: names the layer and the format.
        """
        for name in sorted(self.names):
            if not name.startswith(prefix):
                continue
            layer, _, last = name.rpartition(".")
            if last == "comfy_quant":
                self._check_format(layer, bytes(self.stored(name).numpy()))
            elif last in ("scale_weight", "weight_scale", "scale_input", "input_scale"):
                self._scalar(name)
            elif last == "weight" and self.dtype(name) not in _PLAIN:
                self._refuse(layer, self._formats.get(layer, self.dtype(name)))
            if last == "weight" and self._formats.get(layer, _FORMAT) != _FORMAT:
                self._refuse(layer, self._formats[layer])

    def _check_format(self, layer: str, described: bytes) -> None:
        try:
            kind = json.loads(described)["format"]
        except (ValueError, KeyError, TypeError):
            kind = "unreadable"
        if kind != _FORMAT:
            self._refuse(layer, str(kind))

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

    def _scale(self, name: str) -> torch.Tensor | None:
        layer = name.removesuffix(".weight")
        if layer == name:
            return None
        for suffix in (".scale_weight", ".weight_scale"):
            if layer + suffix in self:
                return self._scalar(layer + suffix)
        return None

    def _scalar(self, name: str) -> torch.Tensor:
        if any(length != 1 for length in self.shape(name)) or self.dtype(name) not in _PLAIN:
            layer, _, last = name.rpartition(".")
            self._refuse(layer, f"{last} of shape {list(self.shape(name))}")
        return self.stored(name).float().reshape(())

    def _refuse(self, layer: str, kind: str) -> None:
        raise CheckpointError(
            f"{self.path}: {layer!r} is quantized in a way that is not read here ({kind})", _OTHER
        )
