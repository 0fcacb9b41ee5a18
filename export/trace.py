"""Tracing a component module to an ONNX graph whose weights are still to come."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch

from sd35_trt.compat.torch import onnx_functions_kept
from sd35_trt.components import LATENT_SCALE
from sd35_trt.dialects import Dialect

from .ir_values import value_dtype, value_shape
from .ports import ComponentModule

_DTYPES = {
    torch.float32: ir.DataType.FLOAT,
    torch.float16: ir.DataType.FLOAT16,
    torch.int64: ir.DataType.INT64,
    torch.uint8: ir.DataType.UINT8,
}

# Example sizes of the independent dimensions: no two equal, none 0 or 1, so that nothing is
# specialised or unified by accident. Latent sizes are even because patches are 2×2.
_EXAMPLES = {
    "batch": 2,
    "samples": 3,
    "steps": 5,
    "tokens": 11,
    "pixels": 13,
    "rank": 17,
    "skipped": 7,
    "computed": 9,
    "patch_rows": 8,
    "patch_columns": 12,
}

# The others, as multiples of these.
_MULTIPLES = {
    "branches": ("batch", 2),
    "three_branches": ("batch", 3),
    "height": ("patch_rows", 2),
    "width": ("patch_columns", 2),
    "image_height": ("patch_rows", 2 * LATENT_SCALE),
    "image_width": ("patch_columns", 2 * LATENT_SCALE),
}

# diffusers' Upsample2D takes another path from 64 samples on.
_LARGEST = {"batch": 63}


def _example(dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    base, factor = _MULTIPLES.get(dim, (dim, 1))
    return _EXAMPLES[base] * factor


def _dims(module: ComponentModule) -> dict[str, Any]:
    """A torch.export dimension for every dynamic dimension of the inputs."""
    names = {d for _, shape in module.inputs.values() for d in shape if isinstance(d, str)}
    dims: dict[str, Any] = {}
    for name in sorted(names):
        base, factor = _MULTIPLES.get(name, (name, 1))
        symbol = torch.export.Dim(base, min=1, max=_LARGEST.get(base, 1 << 16))
        dims[name] = symbol if factor == 1 else factor * symbol
    return dims


def empty_model(module: ComponentModule, dialect: Dialect) -> ir.Model:
    """A graph with the module's inputs and nothing else."""
    opset, ir_version = dialect.onnx_versions()
    inputs = [
        ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(_DTYPES[dtype]))
        for name, (dtype, shape) in module.inputs.items()
    ]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports={"": opset}, name="main_graph")
    return ir.Model(graph, ir_version=ir_version)


def trace_program(module: ComponentModule) -> torch.export.ExportedProgram:
    """A module traced on fake tensors, its dynamic dimensions as declared.

    Call it inside the ``FakeTensorMode`` that the module was built in.
    """
    example: dict[str, Any] = {
        name: torch.zeros([_example(d) for d in shape], dtype=dtype)
        for name, (dtype, shape) in module.inputs.items()
    }
    dims = _dims(module)
    dynamic: dict[str, Any] = {
        name: {i: dims[d] for i, d in enumerate(shape) if isinstance(d, str)}
        for name, (_, shape) in module.inputs.items()
    }
    if module.adapter_inputs:
        for values in (example, dynamic):
            values["adapters"] = tuple(values.pop(name) for name in module.adapter_inputs)
    with _quiet():
        return torch.export.export(
            module,
            (),
            example,  # by name: what a graph does not ask for is left out
            dynamic_shapes=dynamic,
            strict=False,
        )


def trace(module: ComponentModule, dialect: Dialect) -> ir.Model:
    """Trace a module on fake tensors.

    Call it inside the ``FakeTensorMode`` that the module was built in.

    Args:
        dialect: the module's layers are those that it takes.

    Returns:
        The graph, its weights being inputs behind the module's own, named as in the module's
        ``state_dict``.

    Raises:
        ValueError: the traced graph does not have the ports that the module declares.
    """
    opset, ir_version = dialect.onnx_versions()
    program = trace_program(module)
    with _quiet(), onnx_functions_kept():
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=opset, optimize=False, verbose=False
        )
    if onnx_program is None:  # as its type allows
        raise ValueError("torch.onnx.export gave no program")
    model = onnx_program.model
    model.ir_version = ir_version
    _weights_to_inputs(model)
    with _quiet():
        onnxscript.optimizer.optimize_ir(model)
    _drop_unused_weights(model, len(module.inputs))
    _strip(model)
    _name_ports(model, module)
    return model


def _weights_to_inputs(model: ir.Model) -> None:
    """While they have no value, weights are inputs: the optimizer folds what it can read."""
    for name, value in list(model.graph.initializers.items()):
        del model.graph.initializers[name]
        value.const_value = None
        model.graph.inputs.append(value)


def _drop_unused_weights(model: ir.Model, ports: int) -> None:
    for value in list(model.graph.inputs[ports:]):
        if not value.uses():
            model.graph.inputs.remove(value)


def _strip(model: ir.Model) -> None:
    """Drop stack traces, which hold paths, and the symbols of intermediate shapes."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if not value.is_graph_output():
                value.shape = None
    for value in model.graph.inputs:
        value.metadata_props.clear()


def _name_ports(model: ir.Model, module: ComponentModule) -> None:
    graph = model.graph
    # What forward takes together has a number each.
    together = graph.inputs[len(module.inputs) - len(module.adapter_inputs) : len(module.inputs)]
    for value, name in zip(together, module.adapter_inputs, strict=True):
        value.name = name
    names = [value.name for value in graph.inputs[: len(module.inputs)]]
    if names != list(module.inputs) or len(graph.outputs) != len(module.outputs):
        raise ValueError(
            f"the traced graph has the inputs {names} and {len(graph.outputs)} outputs, "
            f"declared are {list(module.inputs)} and {list(module.outputs)}"
        )
    values = [*graph.inputs[: len(module.inputs)], *graph.outputs]
    for value, port in zip(values, module.declared_ports(), strict=True):
        shape, dtype = value_shape(value), value_dtype(value)
        # A dimension that should vary but was traced as a number would fail at run time.
        fits = len(shape) == len(port.shape) and all(
            traced == declared if isinstance(declared, int) else not isinstance(traced, int)
            for traced, declared in zip(shape, port.shape, strict=True)
        )
        if not fits or dtype.numpy().name != port.dtype:
            raise ValueError(f"{port} is declared, {shape} of {dtype} was traced")
        value.shape = ir.Shape(port.shape)
        value.name = port.name


@contextlib.contextmanager
def _quiet() -> Any:
    """Keep the exporter's notes about optional packages off the user's terminal."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
