"""Values of the tensors in safetensors files, by the names that they have there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from .comfy import input_amax
from .quantized import quantized_weights, stored_fp8
from .quantized_weight import QuantizedWeight
from .tensor_files import TensorFiles

if TYPE_CHECKING:
    import torch


class TensorValues:
    """Tensors; quantized ones have the names and shapes of their values.

    Args:
        tensors: as stored.

    Attributes:
        quantization: see :class:`~sd35_trt.checkpoints.weights.Weights`.
    """

    quantization: str | None = None

    def __init__(self, tensors: TensorFiles) -> None:
        self.path = tensors.path
        self.names = frozenset(tensors.names)
        self._tensors = tensors
        self._quantized: dict[str, QuantizedWeight] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor's values, from the header; see :meth:`check`."""
        weight = self._quantized.get(name)
        return self._tensors.shape(name) if weight is None else weight.shape

    def dtype(self, name: str) -> str:
        """Type of a tensor's values; see :meth:`sd35_trt.checkpoints.weights.Weights.dtype`."""
        return "F32" if name in self._quantized else self._tensors.dtype(name)

    def values(self, name: str) -> torch.Tensor:
        """A tensor's values: a view of the file; of quantized ones FP32, or what bitsandbytes
        names; of 8-bit ones without a scale FP16.
        """
        if name in self._quantized:
            return self._quantized[name].values()
        tensor = self._tensors.stored(name)
        return tensor.half() if self.dtype(name).startswith("F8_") else tensor

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """An E4M3 tensor as stored and its scale in FP32 []; None where it is of another type, or
        has several scales.
        """
        return stored_fp8(self._tensors, name, self._quantized)

    def input_amax(self, name: str) -> float | None:
        """The largest input magnitude of a weight's layer by its input scale; None without one."""
        return input_amax(self._tensors, name)

    def check(self, prefix: str) -> None:
        """Find the quantized weights among the tensors with a prefix; what belongs to them has no
        name of its own afterwards.

        Raises:
            CheckpointError: names the layer and how it is quantized.
        """
        weights = quantized_weights(self._tensors, prefix)
        self._quantized |= weights
        beside = (weight.beside for weight in weights.values())
        self.names = (self.names | weights.keys()).difference(*beside)

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        stored = name in self._tensors.names
        return self._tensors.file(name if stored else min(self._quantized[name].beside))
