"""A component as PyTorch operators: the exported graphs as data, and how they are called.

What ``program.json`` holds. Weights are not in it, they are beside it as safetensors; neither file
holds code. A graph that repeats with other weights, as the blocks of a transformer do, is there
once. :mod:`sd35_trt.programs.decoding` makes functions of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sd35_trt.errors import BundleError

#: Version of the file; a reader accepts exactly its own.
FORMAT = 1

PROGRAM_FILE = "program.json"
TENSORS_FILE = "weights.safetensors"

#: Compiler artifacts of the GPU that the bundle was built on, where there was one.
KERNELS_FILE = "kernels.bin"


#: Kinds of :class:`View`.
VIEWS = ("rows", "tokens", "grid")


@dataclass(frozen=True)
class Node:
    """One operator.

    Attributes:
        name: of its result.
        target: ``aten.<operator>.<overload>``, or the name of a function on sizes.
        args, kwargs: numbers, strings, lists; ``{"value": name}`` for a result or an input,
            ``{"dtype": name}`` for a type, ``{"device": null}`` for the device it runs on.
    """

    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Graph:
    """A function of weights and inputs.

    Attributes:
        weights: names of its first parameters.
        inputs: names of the others.
        outputs: names of what it returns.
    """

    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Call:
    """One use of a graph.

    Attributes:
        graph: its name.
        weights: names in the safetensors file, in the order of the graph's weights.
        inputs: values of the program.
        outputs: names that its results get; older values of the same names are gone.
    """

    graph: str
    weights: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """A value in another form; nothing is computed.

    Attributes:
        kind: ``rows`` takes ``[:, first : first + count]``; ``tokens`` makes [S, r, c, D] into
            [S, r * c, D]; ``grid`` makes [S, r * c, D] into [S, r, c, D] as ``like`` is.
        value: what is viewed.
        output: name of the result.
    """

    kind: str
    value: str
    output: str
    first: int = 0
    count: int = 0
    like: str = ""


@dataclass(frozen=True)
class Program:
    """A component: its ports' names are the first values and the last ones.

    Attributes:
        torch: version of PyTorch that wrote it.
        steps: done in order.
    """

    torch: str
    graphs: Mapping[str, Graph]
    steps: tuple[Call | View, ...]

    def weights(self) -> list[str]:
        """Names of all weights, each once."""
        calls = (step for step in self.steps if isinstance(step, Call))
        return list(dict.fromkeys(name for call in calls for name in call.weights))

    def to_json(self) -> str:
        data = {"format": FORMAT, **asdict(self)}
        return json.dumps(data, separators=(",", ":")) + "\n"


def read_program(path: Path) -> Program:
    """Read ``program.json``.

    Raises:
        BundleError: it is damaged, or of another version.
    """
    again = "build the bundle again with: sd35-trt build"
    try:
        data = json.loads(path.read_text("utf-8"))
        version = data.pop("format")
        if version != FORMAT:
            raise BundleError(f"{path} has format {version}, this version reads {FORMAT}", again)
        return Program(
            data["torch"],
            {name: _graph(graph) for name, graph in data["graphs"].items()},
            tuple(_step(step) for step in data["steps"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", again) from error


def _graph(data: dict[str, Any]) -> Graph:
    return Graph(
        tuple(data["weights"]),
        tuple(data["inputs"]),
        tuple(Node(**node) for node in data["nodes"]),
        tuple(data["outputs"]),
    )


def _step(data: dict[str, Any]) -> Call | View:
    if "kind" in data:
        view = View(**data)
        if view.kind not in VIEWS:
            raise ValueError(f"unknown view {view.kind!r}")
        return view
    return Call(
        data["graph"], tuple(data["weights"]), tuple(data["inputs"]), tuple(data["outputs"])
    )
