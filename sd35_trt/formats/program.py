"""A component as PyTorch operators: the exported graphs as data, and how they are called.

What ``program.json`` holds. Weights are not in it, they are beside it as safetensors; neither file
holds code. A graph that repeats with other weights, as the blocks of a transformer do, is there
once. :mod:`sd35_trt.programs.decoding` makes functions of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from sd35_trt.errors import BundleError

from .reading import Count, Name, check_format, decode, read_file, reason_of

#: Version of the file that is written.
FORMAT = 2

#: Versions that are read. The first has no conditions.
FORMATS = (1, FORMAT)

PROGRAM_FILE = "program.json"
TENSORS_FILE = "weights.safetensors"

#: Compiler artifacts of the GPU that the bundle was built on, where there was one.
KERNELS_FILE = "kernels.bin"


# The step of SD3.5 Large has about 2 MB.
_LARGEST = 256 << 20

#: An argument of an operator: a tree of JSON.
Operand = str | int | float | bool | None | list[Any] | dict[str, Any]

_Names = Annotated[tuple[Name, ...], Meta(max_length=1 << 20)]


class Node(Struct, frozen=True):
    """One operator.

    Attributes:
        name: of its result.
        target: ``aten.<operator>.<overload>``, or the name of a function on sizes.
        args, kwargs: numbers, strings, lists; ``{"value": name}`` for a result or an input,
            ``{"dtype": name}`` for a type, ``{"device": null}`` for the device it runs on.
    """

    name: Name
    target: Name
    args: list[Operand]
    kwargs: dict[Name, Operand]


class Graph(Struct, frozen=True):
    """A function of weights and inputs.

    Attributes:
        weights: names of its first parameters.
        inputs: names of the others.
        outputs: names of what it returns.
    """

    weights: _Names
    inputs: _Names
    nodes: Annotated[tuple[Node, ...], Meta(max_length=1 << 20)]
    outputs: _Names


class Condition(Struct, frozen=True):
    """What has to be so of a value's shape for a step to be done: what is not asked for costs
    nothing.

    Attributes:
        value: an input of the program.
        axis: of its shape.
        above: the length along the axis is greater.
        holds: whether that is so, or is not.
    """

    value: Name
    axis: Count
    above: Count
    holds: bool = True


_Conditions = Annotated[tuple[Condition, ...], Meta(max_length=16)]


class Call(Struct, frozen=True):
    """One use of a graph.

    Attributes:
        graph: its name.
        weights: names in the safetensors file, in the order of the graph's weights.
        inputs: values of the program.
        outputs: names that its results get; older values of the same names are gone.
        conditions: all hold where the graph is called.
    """

    graph: Name
    weights: _Names
    inputs: _Names
    outputs: _Names
    conditions: _Conditions = ()


class View(Struct, frozen=True):
    """A value in another form; nothing is computed.

    Attributes:
        kind: ``rows`` takes ``[:, first : first + count]``; ``stack`` takes
            ``[first : first + count]``; ``tokens`` makes [S, r, c, D] into [S, r * c, D]; ``grid``
            makes [S, r * c, D] into [S, r, c, D] as ``like`` is.
        value: what is viewed.
        output: name of the result.
        conditions: as of a call.
    """

    kind: Literal["rows", "stack", "tokens", "grid"]
    value: Name
    output: Name
    first: Count = 0
    count: Count = 0
    like: str = ""
    conditions: _Conditions = ()


class Program(Struct, frozen=True):
    """A component: its ports' names are the first values and the last ones.

    Attributes:
        torch: version of PyTorch that wrote it.
        steps: done in order.
    """

    torch: Name
    graphs: Mapping[Name, Graph]
    steps: tuple[Call | View, ...]

    def weights(self) -> list[str]:
        """Names of all weights, each once."""
        calls = (step for step in self.steps if isinstance(step, Call))
        return list(dict.fromkeys(name for call in calls for name in call.weights))

    def to_json(self) -> str:
        """What :func:`read_program` reads.

        Raises:
            ValueError: an operand is NaN or infinite.
        """
        # PyTorch's own version is of a subclass of str, which msgspec does not encode.
        plain = replace(self, torch=str(self.torch))
        data = {"format": FORMAT, **msgspec.to_builtins(plain)}
        return json.dumps(data, separators=(",", ":"), allow_nan=False) + "\n"


class _Head(Struct, frozen=True):
    format: int


class _Body(Struct, frozen=True):
    """A program as it lies in the file, whose steps tell by their fields what they are."""

    torch: Name
    graphs: Annotated[dict[Name, Graph], Meta(max_length=4096)]
    steps: Annotated[tuple[dict[str, msgspec.Raw], ...], Meta(max_length=1 << 16)]


def read_program(path: Path) -> Program:
    """Read ``program.json``.

    Raises:
        BundleError: it is damaged, or of another version.
    """
    again = "build the bundle again with: sd35-trt build"
    try:
        data = read_file(path, _LARGEST)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}", again) from error
    head = decode(data, _Head, path, BundleError, again)
    check_format(head.format, FORMATS, path, BundleError, again)
    body = decode(data, _Body, path, BundleError, again)

    def read(step: dict[str, msgspec.Raw]) -> Call | View:
        kind: type[Call | View] = View if "kind" in step else Call
        return decode(msgspec.json.encode(step), kind, path, BundleError, again)

    return Program(body.torch, body.graphs, tuple(map(read, body.steps)))
