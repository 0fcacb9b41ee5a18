"""Data to functions: a graph of a program as a module of ``torch.fx``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from sd35_trt.errors import BundleError
from sd35_trt.formats.program import Graph

from . import flash_attention, fused, kernels
from .operators import OPERATORS, SIZE_FUNCTIONS

# Operators that sum FP8 products.
_SUMS = ("aten._scaled_mm.default", *(f"sd35.{name}.default" for name in ("qkv", "gelu", "gated")))

# Their argument that says how.
_FAST = "use_fast_accum"

_ATTENTION = "aten.scaled_dot_product_attention.default"

#: What an error about a damaged program tells the user to do.
REBUILD = "build the bundle again with: sd35-trt build"


def graph_module(
    graph: Graph, device: torch.device, fast_accumulation: bool, flash_4: bool = False
) -> fx.GraphModule:
    """A module whose ``forward`` takes the graph's weights, then its inputs; returns a tuple.

    Args:
        fast_accumulation: FP8 products may be summed with less than FP32's precision inside
            tensor cores.
        flash_4: whether attentions are :func:`sd35_trt.programs.flash_attention.attention`.

    Raises:
        BundleError: an operator that programs do not have.
    """
    result = fx.Graph()
    values: dict[str, fx.Node] = {}

    def decode(data: Any) -> Any:
        if isinstance(data, list):
            return [decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((kind, value),) = data.items()
        if kind == "value":
            return values[value]
        if kind == "dtype":
            return _dtype(value)
        if kind == "float":
            return float(value)
        if kind == "device":
            return device
        if kind == "contiguous":
            return torch.contiguous_format
        raise ValueError(f"an argument of kind {kind!r}")

    try:
        for index, name in enumerate((*graph.weights, *graph.inputs)):
            values[name] = result.placeholder(f"p{index}")
        for node in graph.nodes:
            target, kwargs = _target(node.target, device), dict(node.kwargs)
            if flash_4 and node.target == _ATTENTION and len(node.args) == 3 and not kwargs:
                target = flash_attention.OPERATOR
            args = list(node.args)
            if node.target in _SUMS:
                _set_argument(node.target, args, kwargs, _FAST, fast_accumulation)
            values[node.name] = result.call_function(
                target,
                tuple(decode(argument) for argument in args),
                {key: decode(value) for key, value in kwargs.items()},
            )
        result.output(tuple(values[name] for name in graph.outputs))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise BundleError(f"a graph is damaged: {error}", REBUILD) from error
    return fx.GraphModule(torch.nn.Module(), result)


def _set_argument(
    target: str, args: list[Any], kwargs: dict[str, Any], name: str, value: Any
) -> None:
    """Set an operator's argument where it stands: traced by position if one behind it is given."""
    namespace, packet, overload = target.split(".")
    schema = getattr(getattr(getattr(torch.ops, namespace), packet), overload)._schema
    place = [argument.name for argument in schema.arguments].index(name)
    if place < len(args):
        args[place] = value
    else:
        kwargs[name] = value


def _target(name: str, device: torch.device) -> Callable[..., Any]:
    if name in SIZE_FUNCTIONS:
        return SIZE_FUNCTIONS[name]
    if kernels.is_fused(name):
        return kernels.find(name, device)
    namespace, _, rest = name.partition(".")
    if namespace != "aten" or rest not in OPERATORS:
        raise ValueError(f"the operator {name!r}")
    if rest == "_scaled_mm.default" and device.type == "cpu":
        return fused.reference_scaled_mm
    packet, _, overload = rest.partition(".")
    function: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return function


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the type {name!r}")
    return dtype
