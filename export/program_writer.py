"""Writing a component as a program of PyTorch operators: traced graphs, and safetensors beside."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch.export.graph_signature import InputKind

from sd35_trt.checkpoints.weights import Weights
from sd35_trt.formats.program import PROGRAM_FILE, TENSORS_FILE, Call, Graph, Program
from sd35_trt.programs.encoding import graph_data

from .ports import ComponentModule
from .torch_layers import JoinedLinear
from .trace import trace_program
from .weights import read_parameter

# Names of the types in a safetensors file (huggingface.co/docs/safetensors, "Format").
_TYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def traced_graph(module: ComponentModule) -> Graph:
    """A module as data, its weights named as in its ``state_dict``.

    Call it inside the ``FakeTensorMode`` that the module was built in.
    """
    traced = trace_program(module)
    specs = traced.graph_signature.input_specs
    weights = [str(spec.target) for spec in specs if spec.kind != InputKind.USER_INPUT]
    return graph_data(traced.graph, weights, list(module.inputs))


def single_graph(module: ComponentModule) -> Program:
    """A program that calls the whole module."""
    graph = traced_graph(module)
    call = Call("component", graph.weights, graph.inputs, tuple(module.outputs))
    return Program(str(torch.__version__), {"component": graph}, (call,))


def write_program(
    program: Program,
    module: ComponentModule,
    weights: Weights,
    out: Path,
    progress: Callable[[float], None],
) -> int:
    """Write ``program.json``, and ``weights.safetensors`` one tensor at a time.

    (The safetensors library writes from tensors that are all in memory.)

    Args:
        module: that the program was made of: dtypes, shapes and sources of the weights.
        progress: called with the fraction of tensors written.

    Returns:
        Bytes of weights.

    Raises:
        CheckpointError: see :func:`sd35_trt.export.weights.read_parameter`.
        OSError: the disk is full or not writable.
    """
    parameters = {name: module.get_parameter(name) for name in program.weights()}
    # The largest types first, as the format wants every tensor aligned to its type.
    names = sorted(parameters, key=lambda name: -parameters[name].element_size())
    header: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = parameters[name]
        first, end = end, end + math.prod(tensor.shape) * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with (out / TENSORS_FILE).open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for done, name in enumerate(names, 1):
            value = parameter_value(module, name, weights)
            if value.shape != parameters[name].shape:
                raise ValueError(
                    f"{name} has {list(value.shape)}, not {list(parameters[name].shape)}"
                )
            stream.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
            progress(done / len(names))
    (out / PROGRAM_FILE).write_text(program.to_json(), "utf-8")
    return end


def parameter_value(module: ComponentModule, name: str, weights: Weights) -> torch.Tensor:
    """The value of a parameter, of a checkpoint's tensor or joined from several parameters."""
    path, _, parameter = name.rpartition(".")
    owner = module.get_submodule(path)
    if not isinstance(owner, JoinedLinear):
        return read_parameter(module, name, weights)
    beside = path.rpartition(".")[0]
    value = owner.compose(
        parameter, lambda other: read_parameter(module, f"{beside}.{other}", weights)
    )
    return value.to(module.get_parameter(name).dtype)
