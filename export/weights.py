"""Streaming a checkpoint's tensors into a traced graph's external data, one at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import onnx_ir as ir
import torch
from torch import nn

from sd35_trt.checkpoints.weights import Weights
from sd35_trt.errors import CheckpointError

from .ir_values import value_dtype, value_name, value_shape
from .ports import ComponentModule
from .quantized import pack_int4

# ONNX Runtime maps external data; pages and cache lines start on this boundary.
_ALIGNMENT = 4096

_PREFIX = "part."
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}


def read_parameter(module: nn.Module, name: str, weights: Weights) -> torch.Tensor:
    """The value of one parameter, made from the checkpoint in the parameter's dtype.

    Raises:
        CheckpointError: names the tensor that is missing, or not finite in that dtype.
    """
    owner_name, _, parameter_name = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    expected = module.get_parameter(name)
    source, convert = getattr(owner, "SOURCES", {}).get(
        parameter_name, (parameter_name, lambda tensor: tensor)
    )
    path = f"{owner_name}.{source}".removeprefix(_PREFIX).rstrip(".")
    if path not in weights:
        path = _TIED.get(path, path)
    value = None
    take_over = getattr(owner, "FP8_SOURCES", {}).get(parameter_name)
    if take_over is not None and (own := weights.fp8(path)) is not None:
        value = take_over(*own)
    if value is None:
        value = convert(weights.read(path))
    value = value.to(expected.dtype).contiguous()
    if value.shape != expected.shape:
        raise ValueError(f"{name} has {list(value.shape)}, not {list(expected.shape)}")
    # PyTorch has no aminmax of FP8.
    low, high = torch.aminmax(value.float() if value.dtype == torch.float8_e4m3fn else value)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        was_finite = bool(torch.isfinite(weights.read(path)).all())
        raise CheckpointError(
            f"{weights.folder}: {path!r} "
            + ("exceeds FP16's range" if was_finite else "holds NaN or infinite values"),
            "keep this layer in fp32 by a policy file" if was_finite else "repair the checkpoint",
        )
    return value


def onnx_type(module: nn.Module, name: str, traced: ir.DataType) -> ir.DataType:
    """The type a parameter has in the file, where it is not that of the traced tensor."""
    owner, _, parameter = name.rpartition(".")
    types: dict[str, ir.DataType] = getattr(module.get_submodule(owner), "ONNX_TYPES", {})
    return types.get(parameter, traced)


def _write(stream: BinaryIO, tensor: torch.Tensor) -> tuple[int, int]:
    stream.seek(-stream.tell() % _ALIGNMENT, 1)
    offset = stream.tell()
    # reshape(-1): a 0-d tensor has no byte view.
    stream.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return offset, stream.tell() - offset


def stream_weights(
    model: ir.Model,
    module: ComponentModule,
    weights: Weights,
    model_file: Path,
    data_name: str,
    progress: Callable[[float], None],
) -> int:
    """Turn the graph's weight inputs into initializers stored beside it, and save it.

    Args:
        model: from :func:`sd35_trt.export.trace.trace`; changed in place.
        module: the traced module: dtypes, shapes and sources of the weights.
        model_file: the ONNX file to write; the data goes beside it under ``data_name``.
        progress: called with the fraction of tensors written.

    Returns:
        Bytes of weights.

    Raises:
        CheckpointError: see :func:`read_parameter`.
        OSError: the disk is full or not writable.
    """
    graph = model.graph
    values = list(graph.inputs[len(module.inputs) :])
    total = 0
    with (model_file.parent / data_name).open("wb") as stream:
        for done, value in enumerate(values, 1):
            name = value_name(value)
            tensor = read_parameter(module, name, weights)
            value.dtype = dtype = onnx_type(module, name, value_dtype(value))
            if dtype == ir.DataType.INT4:
                tensor = pack_int4(tensor)
            offset, length = _write(stream, tensor)
            total += length
            graph.inputs.remove(value)
            value.const_value = ir.ExternalTensor(
                data_name,
                offset,
                length,
                dtype,
                shape=value_shape(value),
                name=name,
                base_dir=model_file.parent,
            )
            graph.register_initializer(value)
            progress(done / len(values))
    model.producer_name = "sd35-trt"
    ir.save(model, model_file)
    return total
