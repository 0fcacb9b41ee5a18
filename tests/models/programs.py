"""The networks of ``make.py`` as programs: an operator of ATen, or a few, for each of ONNX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from sd35_trt.formats.program import Call, Graph, Node, Operand, Program

_TYPES = {TensorProto.FLOAT: "float32", TensorProto.UINT8: "uint8"}


@dataclass
class _Translation:
    """A graph that grows.

    Attributes:
        constants: what ONNX has as operands and ATen as arguments, by name.
    """

    constants: Mapping[str, np.ndarray]
    nodes: list[Node] = field(default_factory=list)

    def integers(self, name: str) -> list[int]:
        """A constant of ONNX's as sizes or axes."""
        return [int(value) for value in self.constants[name].reshape(-1)]

    def __call__(self, target: str, *arguments: Any, out: str = "") -> str:
        """Append an operator; returns its result's name. Names among arguments are values."""
        out = out or f"p{len(self.nodes)}"
        operands: list[Operand] = [self._operand(argument) for argument in arguments]
        self.nodes.append(Node(out, f"aten.{target}", operands, {}))
        return out

    def _operand(self, argument: Any) -> Operand:
        if isinstance(argument, list):
            return [self._operand(item) for item in argument]
        return {"value": argument} if isinstance(argument, str) else argument


_Rule = Callable[[_Translation, onnx.NodeProto, dict[str, Any]], None]


def _plain(target: str) -> _Rule:
    """An operator that takes the same operands in the same order."""

    def rule(to: _Translation, node: onnx.NodeProto, _: dict[str, Any]) -> None:
        to(target, *node.input, out=node.output[0])

    return rule


def _gather(to: _Translation, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    table, index = node.input
    if "axis" in attributes:
        to("select.int", table, attributes["axis"], *to.integers(index), out=node.output[0])
    else:
        to("embedding.default", table, index, out=node.output[0])


def _reshape(to: _Translation, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    value, shape = node.input
    # ONNX's 0 is the value's own size.
    sizes = [
        size or to("sym_size.int", value, axis) for axis, size in enumerate(to.integers(shape))
    ]
    to("reshape.default", value, sizes, out=node.output[0])


def _unsqueeze(to: _Translation, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    value, axes = node.input
    *others, last = to.integers(axes)
    for axis in others:
        value = to("unsqueeze.default", value, axis)
    to("unsqueeze.default", value, last, out=node.output[0])


def _slice(to: _Translation, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    value, *ends, axis = node.input
    bounds = [to.integers(end)[0] if end in to.constants else end for end in ends]
    to("slice.Tensor", value, *to.integers(axis), *bounds, out=node.output[0])


def _convolution(to: _Translation, node: onnx.NodeProto, attributes: dict[str, Any]) -> None:
    strides = attributes.get("strides", [1, 1])
    pads = attributes.get("pads", [0, 0, 0, 0])[:2]
    to("conv2d.default", *node.input, None, strides, pads, out=node.output[0])


def _resize(to: _Translation, node: onnx.NodeProto, _: dict[str, Any]) -> None:
    value, _, scales = node.input
    factors = [float(factor) for factor in to.constants[scales][2:]]
    to("upsample_nearest2d.vec", value, None, factors, out=node.output[0])


_RULES: dict[str, _Rule] = {
    "Add": _plain("add.Tensor"),
    "Cast": lambda to, n, a: _set(to, n, "to.dtype", {"dtype": _TYPES[a["to"]]}),
    "Concat": lambda to, n, a: _set(to, n, "cat.default", a["axis"], joined=True),
    "Conv": _convolution,
    "Div": _plain("div.Tensor"),
    "Gather": _gather,
    "MatMul": _plain("matmul.default"),
    "Mul": _plain("mul.Tensor"),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _plain("round.default"),
    "Shape": lambda to, n, a: _set(to, n, "sym_size.int", a["start"]),
    "Slice": _slice,
    "Softmax": lambda to, n, a: _set(to, n, "softmax.int", a["axis"]),
    "Sub": _plain("sub.Tensor"),
    "Tanh": _plain("tanh.default"),
    "Transpose": lambda to, n, a: _set(to, n, "permute.default", a["perm"]),
    "Unsqueeze": _unsqueeze,
}


def _set(
    to: _Translation, node: onnx.NodeProto, target: str, argument: Any, joined: bool = False
) -> None:
    """An operator whose attribute is an argument after its operands."""
    operands: list[Any] = [list(node.input)] if joined else list(node.input)
    to(target, *operands, argument, out=node.output[0])


def program(
    nodes: list[onnx.NodeProto],
    constants: Mapping[str, np.ndarray],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
) -> tuple[Program, dict[str, np.ndarray]]:
    """A network as one graph, called once; and its weights by name."""
    to = _Translation(constants)
    for node in nodes:
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        _RULES[node.op_type](to, node, attributes)
    operands = {name for node in to.nodes for name in _values(node.args)}
    weights = {name: value for name, value in constants.items() if name in operands}
    graph = Graph(tuple(weights), inputs, tuple(to.nodes), outputs)
    call = Call("whole", tuple(weights), inputs, outputs)
    return Program(version("torch"), {"whole": graph}, (call,)), weights


def _values(operand: Operand) -> list[str]:
    if isinstance(operand, list):
        return [name for item in operand for name in _values(item)]
    return [operand["value"]] if isinstance(operand, dict) and "value" in operand else []
