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

from sd35_trt.bundle import Port
from sd35_trt.components import LATENT_SCALE

from .modules import ComponentModule

#: LayerNormalization, RMSNormalization, Attention and Gelu are single operators from here on.
OPSET = 23

# Example sizes: no two equal, none 0 or 1, so that nothing is specialised or unified by accident.
# Latent sizes are even because patches are 2×2.
_EXAMPLES = {"batch": 2, "samples": 3, "steps": 5, "tokens": 11, "height": 16, "width": 24}
_DERIVED = {"image_height": ("height", LATENT_SCALE), "image_width": ("width", LATENT_SCALE)}
_EVEN = ("height", "width")


def _example(dim: int | str) -> int:
    if isinstance(dim, int):
        return dim
    if dim in _DERIVED:
        base, factor = _DERIVED[dim]
        return _EXAMPLES[base] * factor
    return _EXAMPLES[dim]


def _dims(module: ComponentModule) -> dict[str, Any]:
    """A torch.export dimension for every dynamic dimension of the inputs."""
    names = {d for _, shape in module.inputs.values() for d in shape if isinstance(d, str)}
    dims: dict[str, Any] = {}
    for name in sorted(names):
        if name in _DERIVED:
            base, factor = _DERIVED[name]
            dims[name] = 2 * factor * torch.export.Dim(f"half_{base}", min=1, max=1 << 12)
        elif name in _EVEN:
            dims[name] = 2 * torch.export.Dim(f"half_{name}", min=1, max=1 << 12)
        else:
            # Below 64: diffusers' Upsample2D takes another path from 64 samples on.
            dims[name] = torch.export.Dim(name, min=1, max=63 if name == "batch" else 1 << 16)
    return dims


def trace(module: ComponentModule) -> tuple[ir.Model, list[Port]]:
    """Trace a module on fake tensors.

    Call it inside the ``FakeTensorMode`` that the module was built in.

    Returns:
        The graph, its weights being inputs behind the module's own, named as in the module's
        ``state_dict``; and the ports.

    Raises:
        AssertionError: the traced graph does not have the ports that the module declares.
    """
    example = {
        name: torch.zeros([_example(d) for d in shape], dtype=dtype)
        for name, (dtype, shape) in module.inputs.items()
    }
    dims = _dims(module)
    dynamic = {
        name: {i: dims[d] for i, d in enumerate(shape) if isinstance(d, str)}
        for name, (_, shape) in module.inputs.items()
    }
    with _quiet():
        program = torch.export.export(
            module,
            tuple(example.values()),
            dynamic_shapes=dynamic,
            strict=False,
        )
        onnx_program = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
    assert onnx_program is not None
    model = onnx_program.model
    _weights_to_inputs(model)
    with _quiet():
        onnxscript.optimizer.optimize_ir(model)
    _drop_unused_weights(model, len(module.inputs))
    _strip(model)
    return model, _name_ports(model, module)


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


def _name_ports(model: ir.Model, module: ComponentModule) -> list[Port]:
    graph = model.graph
    assert [v.name for v in graph.inputs[: len(module.inputs)]] == list(module.inputs)
    assert len(graph.outputs) == len(module.outputs)
    declared = list(module.inputs.items()) + list(module.outputs.items())
    values = [*graph.inputs[: len(module.inputs)], *graph.outputs]
    ports = []
    for value, (name, (dtype, shape)) in zip(values, declared, strict=True):
        traced = value.shape
        assert traced is not None
        assert value.dtype is not None
        for got, want in zip(traced, shape, strict=True):
            # A dimension that should vary but was traced as a number would fail at run time.
            assert isinstance(got, int) == isinstance(want, int), (name, traced, shape)
            assert not isinstance(want, int) or got == want, (name, traced, shape)
        numpy_name = str(dtype).removeprefix("torch.")
        assert value.dtype.numpy().name == numpy_name, (name, value.dtype, dtype)
        value.shape = ir.Shape(shape)
        value.name = name
        ports.append(Port(name, numpy_name, shape))
    return ports


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
