"""A graph of ``torch.export`` as data.

It is not ``torch.export``'s own file, which is a pickle beside a schema that changes with the
version: operators of ATen and their arguments are the same in all versions that we support, a size
is an operator's result, and a device is wherever the program runs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from sd35_trt.formats.program import Graph, Node

from .operators import SIZE_FUNCTIONS, is_known

# What torch.export adds about shapes and types: checks, and results that nobody reads.
_CHECKS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")


def graph_data(graph: fx.Graph, weights: Sequence[str], inputs: Sequence[str]) -> Graph:
    """A traced graph, its parameters named anew.

    Args:
        graph: placeholders in the order of ``weights``, then ``inputs``.
        weights: those that nothing reads are left out.

    Raises:
        NotImplementedError: an operator or an argument that has no place in a program.
    """
    names: dict[fx.Node, str] = {}
    nodes: list[Node] = []
    outputs: tuple[str, ...] = ()
    parameters = iter([*weights, *inputs])
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) in _CHECKS:
            continue
        if node.op == "placeholder":
            names[node] = next(parameters)
        elif node.op == "call_function":
            names[node] = f"v{len(names)}"
            target = _target_name(node.target)
            arguments = [_encode(argument, names) for argument in node.args]
            keywords = {key: _encode(value, names) for key, value in node.kwargs.items()}
            nodes.append(Node(names[node], target, arguments, keywords))
        elif node.op == "output":
            outputs = tuple(names[value] for value in node.args[0])
        else:
            raise NotImplementedError(f"a node of kind {node.op}")
    reads = set(outputs)
    live: list[Node] = []
    for item in reversed(nodes):
        # What works in place has readers through its operand.
        if item.name in reads or item.target.split(".")[1:2] == ["add_"]:
            live.append(item)
            reads.update(_values([item.args, item.kwargs]))
    for item in live:
        if not is_known(item.target):
            raise NotImplementedError(f"the operator {item.target}")
    live_weights = tuple(name for name in weights if name in reads)
    return Graph(live_weights, tuple(inputs), tuple(reversed(live)), outputs)


def _target_name(target: Any) -> str:
    for name, function in SIZE_FUNCTIONS.items():
        if target is function:
            return name
    return str(target)


def _encode(argument: Any, names: Mapping[fx.Node, str]) -> Any:
    if isinstance(argument, fx.Node):
        return {"value": names[argument]}
    if isinstance(argument, (list, tuple)):
        return [_encode(item, names) for item in argument]
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if argument is torch.contiguous_format:
        return {"contiguous": None}
    if isinstance(argument, torch.device):
        return {"device": None}
    if argument is None or isinstance(argument, (bool, int, str)):
        return argument
    if isinstance(argument, float):
        # JSON has no infinity.
        return argument if math.isfinite(argument) else {"float": str(argument)}
    raise NotImplementedError(f"the argument {argument!r}")


def _values(data: Any) -> Iterator[str]:
    """Names of the values in encoded arguments."""
    if isinstance(data, dict):
        if "value" in data:
            yield data["value"]
        else:
            for item in data.values():
                yield from _values(item)
    elif isinstance(data, list):
        for item in data:
            yield from _values(item)
