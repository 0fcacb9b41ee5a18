"""A component without a checkpoint: the graph of a few of its blocks, around made-up weights.

What a compiler reports of a network's working memory does not depend on the values of its weights,
with one exception: layers that read one tensor through equal weights, or equal scales, are merged.
So no two weights are equal, and siblings have scales of their own, as in a trained model. All but
the beginning of a large weight is a hole in the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.components import component_row
from sd35_trt.formats.component import MODEL_FILE, WEIGHTS_FILE, ComponentFacts
from sd35_trt.policies import Policy

from .component import (
    ExportOptions,
    apply_policy,
    build_part,
    component_module,
    fake_tensors,
    use_dialect,
)
from .graphs import GraphCache
from .ir_values import value_dtype, value_name, value_shape
from .modules import modulated_norms, modulation_rows
from .weights import onnx_type

# Part → its list of blocks, and how many of them are kept: with fewer, TensorRT for RTX 1.7 shares
# less memory between them; with more, no more.
_BLOCKS = {
    "text_encoder": ("text_model.encoder.layers", 4),
    "text_encoder_2": ("text_model.encoder.layers", 4),
    "text_encoder_3": ("encoder.block", 8),
    "transformer": ("transformer_blocks", 6),
}

# What the inputs of FP8 layers are divided by; siblings share their input, and so its scale.
_INPUT_SCALE = 1 / 64

# Bytes at the beginning of a weight that tell it from others.
_DISTINCT = 4096

_ALIGNMENT = 4096


def export_weightless(
    name: str,
    source: AnyCheckpoint | Structure,
    policy: Policy,
    options: ExportOptions,
    out: Path,
    graphs: GraphCache | None = None,
) -> int:
    """Write a component as :func:`~.component.export_component` does, with few blocks.

    Args:
        name: one that :func:`sd35_trt.components.component_row` knows.
        out: an existing directory.
        graphs: where to take the traced graph from; None traces it.

    Returns:
        Bytes of modulation, per sample and step, of the blocks that were left out.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
        UsageError: the policy does not fit the component.
    """
    folder = component_row(name).part
    with fake_tensors():
        part = build_part(folder, source)
        apply_policy(part, name, policy)
        rows = _rows(part, folder)
        _leave_out_blocks(part, folder)
        options = _fewer_first_blocks(part, options)
        dialect = use_dialect(part, options)
        rows -= _rows(part, folder)
        module = component_module(name, part, options).eval()
        model = graphs.model(name, module, dialect) if graphs else module.trace(dialect)
    ports = module.declared_ports()
    total = _write_weights(model, module, len(module.inputs), out)
    ComponentFacts(
        name=name,
        weight_bytes=total,
        largest_layer_bytes=0,
        allocated_bytes=0,
        inputs=tuple(port for port in ports if port.name in module.inputs),
        outputs=tuple(port for port in ports if port.name in module.outputs),
        precisions={},
        fp32_places={},
    ).write(out)
    if not rows:
        return 0
    dtype, shape = {**module.inputs, **module.outputs}["modulation"]
    return rows * int(shape[-1]) * dtype.itemsize


def _rows(part: nn.Module, folder: str) -> int:
    """Rows of the modulation; read before the denoiser puts its own layers in."""
    if folder != "transformer":
        return 0
    return sum(map(modulation_rows, modulated_norms(part)))


def _leave_out_blocks(part: nn.Module, folder: str) -> None:
    """Keep the first, the last, and some evenly between them."""
    if folder not in _BLOCKS:
        return
    path, count = _BLOCKS[folder]
    parent, _, attribute = path.rpartition(".")
    blocks: Any = part.get_submodule(path)
    indices = np.linspace(0, len(blocks) - 1, min(count, len(blocks))).round().astype(int)
    setattr(part.get_submodule(parent), attribute, nn.ModuleList(blocks[i] for i in indices))


def _fewer_first_blocks(part: Any, options: ExportOptions) -> ExportOptions:
    """Short steps of the blocks that are left, of which one is behind them."""
    first = options.features.short_steps
    if not first:
        return options
    first = min(first, len(part.transformer_blocks) - 1)
    return replace(options, features=replace(options.features, short_steps=first))


def _write_weights(model: ir.Model, module: nn.Module, ports: int, out: Path) -> int:
    """Give the graph's weight inputs values, and save it; returns their bytes."""
    generator = np.random.default_rng(0)
    end = total = 0
    with (out / WEIGHTS_FILE).open("wb") as stream:
        for value in list(model.graph.inputs[ports:]):
            name = value_name(value)
            parameter = module.get_parameter(name)
            value.dtype = dtype = onnx_type(module, name, value_dtype(value))
            packed = 2 if dtype == ir.DataType.INT4 else 1
            length = -(-parameter.numel() * parameter.element_size() // packed)
            stream.seek(end)
            stream.write(_beginning(name, parameter, length, generator))
            model.graph.inputs.remove(value)
            value.const_value = ir.ExternalTensor(
                WEIGHTS_FILE,
                end,
                length,
                dtype,
                shape=value_shape(value),
                name=name,
                base_dir=out,
            )
            model.graph.register_initializer(value)
            total += length
            end += length + -length % _ALIGNMENT
        stream.truncate(end)
    ir.save(model, out / MODEL_FILE)
    return total


def _beginning(
    name: str, parameter: torch.Tensor, length: int, generator: np.random.Generator
) -> bytes:
    """Random values; of scales, which must be positive, all of them."""
    leaf = name.rpartition(".")[2]
    if not parameter.dtype.is_floating_point or parameter.dtype == torch.float8_e4m3fn:
        # No exponent of all ones: finite in E4M3.
        codes = generator.integers(0, 256, min(length, _DISTINCT), dtype=np.uint8)
        return (codes & 0xB7).tobytes()
    count = parameter.numel()
    if leaf == "input_scale":
        values = np.full(count, _INPUT_SCALE)
    elif leaf.endswith("scale"):
        values = generator.uniform(0.01, 0.02, count)
    else:
        values = generator.uniform(-0.1, 0.1, min(count, _DISTINCT))
    return values.astype(str(parameter.dtype).removeprefix("torch.")).tobytes()
