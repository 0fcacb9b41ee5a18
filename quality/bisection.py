"""The first node of a graph whose value differs between two ways to run the graph.

Values are marked as outputs a handful at a time: a compiler fuses less around each. Those at the
ends of blocks come first, then those inside the block where the difference begins.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto, TensorProto

from .metrics import RelativeError
from .onnx_graph import Arrays, OnnxGraph

#: Runs a graph with these values as its outputs, and returns them by name.
Run = Callable[[Sequence[str]], Arrays]

# Values that are marked at a time.
_MARKS = 8

_FLOATING = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}

# Marked, the value between DequantizeLinear and a product would part the two.
_PARTS_OF_PRODUCTS = {"DequantizeLinear"}

# Before the name of a weight in the checkpoint.
_PREFIX = "part."

# A layer's weights, up to the first number: part.transformer_blocks.0.attn.to_q.weight
_BLOCK = re.compile(rf"{re.escape(_PREFIX)}(.*?\.\d+)\.")


@dataclass(frozen=True)
class Difference:
    """Where two runs of a graph part.

    Attributes:
        node: the first node with a wrong result from right inputs.
        operator: its type.
        value: the result.
        error: ‖a − b‖ / ‖b‖ of the result; None where it is not finite.
        input_error: the largest error among its inputs.
        layer: whose weights it takes, else the block that it is in; empty where there is none.
    """

    node: str
    operator: str
    value: str
    error: float | None
    input_error: float
    layer: str


def relative_error(value: np.ndarray, reference: np.ndarray) -> float | None:
    """‖value − reference‖ / ‖reference‖; None where it is not finite or the shapes differ."""
    if value.shape != reference.shape:
        return None
    # What masks is infinite in both.
    counted = ~(np.isinf(reference) & (value == reference))
    error = RelativeError()
    error.add(value[counted], reference[counted])
    return error.ratio


def first_difference(
    graph: OnnxGraph,
    engine: Run,
    reference: Run,
    bound: float,
    progress: Callable[[int], None] = lambda runs: None,
) -> Difference | None:
    """The first node whose result differs by more than a bound while its inputs do not.

    Args:
        graph: that both run.
        progress: called with the number of runs so far.

    Returns:
        The node; None where no output of the graph differs.
    """
    return _Search(graph, engine, reference, bound, progress).run()


class _Search:
    """Narrows the ancestors of a value that differs, until its inputs are known to agree."""

    def __init__(
        self,
        graph: OnnxGraph,
        engine: Run,
        reference: Run,
        bound: float,
        progress: Callable[[int], None],
    ) -> None:
        self._graph = graph
        self._engine, self._reference = engine, reference
        self._bound = bound
        self._progress = progress
        self._runs = 0
        self._errors: dict[str, float | None] = {}
        self._nodes = list(graph.model.graph.node)
        self._blocks = _blocks(self._nodes)
        self._sources = _sources(graph, self._nodes)
        # In the order of the nodes, which is one of computing.
        self._order = {value: i for i, value in enumerate(self._sources)}

    def run(self) -> Difference | None:
        """See :func:`first_difference`."""
        outputs = self._graph.outputs
        self._measure(outputs)
        different = [name for name in outputs if self._differs(name)]
        if not different:
            return None
        value = min(different, key=self._graph.producers.__getitem__)
        agreeing = self._agreeing(outputs)
        while True:
            inputs = self._inputs(value)
            unseen = [name for name in inputs if name not in self._errors]
            if not unseen and not any(map(self._differs, inputs)):
                return self._describe(value)
            if earlier := self._ancestors(value) - agreeing:
                marks = self._marks(earlier)
                self._measure(marks)
                agreeing |= self._agreeing(marks)
            else:
                # They were taken to agree, since something that is computed from them does.
                marks = unseen
                self._measure(marks)
                agreeing = {name for name in self._errors if not self._differs(name)}
            if wrong := [name for name in marks if self._differs(name)]:
                value = min(wrong, key=self._graph.producers.__getitem__)

    def _agreeing(self, names: Iterable[str]) -> set[str]:
        """Those that do not differ, and all before them."""
        same = [name for name in names if not self._differs(name)]
        return set(same).union(*map(self._ancestors, same))

    def _measure(self, names: Sequence[str]) -> None:
        """Run both with these values marked, and note their errors."""
        actual, expected = self._engine(names), self._reference(names)
        for name in names:
            self._errors[name] = relative_error(actual[name], expected[name])
        self._runs += 1
        self._progress(self._runs)

    def _differs(self, name: str) -> bool:
        error = self._errors[name]
        return error is None or error > self._bound

    def _inputs(self, value: str) -> set[str]:
        """The nearest values before one that can be marked."""
        if value in self._sources:
            return self._sources[value]
        return _nearest(self._graph, self._nodes, value, self._sources)

    def _ancestors(self, value: str) -> set[str]:
        """All values before one that can be marked."""
        ancestors: set[str] = set()
        waiting = list(self._inputs(value))
        while waiting:
            name = waiting.pop()
            if name not in ancestors:
                ancestors.add(name)
                waiting += self._sources[name]
        return ancestors

    def _marks(self, candidates: Iterable[str]) -> list[str]:
        """Some of the candidates, evenly spread; those at the ends of blocks, while there are."""
        ordered = sorted(candidates, key=self._order.__getitem__)
        ends = [name for name in ordered if self._ends_block(name)]
        choice = ends or ordered
        indices = np.linspace(0, len(choice) - 1, min(_MARKS, len(choice))).round().astype(int)
        return [choice[i] for i in dict.fromkeys(indices.tolist())]

    def _ends_block(self, value: str) -> bool:
        """Whether a node of another block takes it."""
        producers, block = self._graph.producers, self._blocks[self._graph.producers[value]]
        return any(
            self._blocks[producers[node.output[0]]] != block
            for node in self._graph.consumers.get(value, [])
        )

    def _layer(self, node: NodeProto) -> str:
        """The layer whose weights a node takes, converted or not; empty where it takes none."""
        waiting = list(node.input)
        while waiting:
            name = waiting.pop()
            if name in self._graph.weights and name.startswith(_PREFIX):
                return name.removeprefix(_PREFIX).rpartition(".")[0]
            if name in self._graph.producers and name not in self._sources:
                waiting += self._nodes[self._graph.producers[name]].input
        return ""

    def _describe(self, value: str) -> Difference:
        index = self._graph.producers[value]
        node = self._nodes[index]
        errors = [self._errors[name] or 0.0 for name in self._inputs(value)]
        return Difference(
            node=node.name or value,
            operator=node.op_type,
            value=value,
            error=self._errors[value],
            input_error=max(errors, default=0.0),
            layer=self._layer(node) or self._blocks[index],
        )


def _blocks(nodes: Sequence[NodeProto]) -> list[str]:
    """The block of each node, by the weights that it takes; of one without, that before it."""
    blocks, block = [], ""
    for node in nodes:
        for name in node.input:
            if match := _BLOCK.match(name):
                block = match[1]
        blocks.append(block)
    return blocks


def _sources(graph: OnnxGraph, nodes: Sequence[NodeProto]) -> dict[str, set[str]]:
    """The values that can be marked, in order, each with the nearest such values before it.

    These are of floating point and depend on the inputs.
    """
    live = set(graph.inputs)
    sources: dict[str, set[str]] = {}
    for node in nodes:
        if not live & set(node.input):
            continue
        live |= set(node.output)
        if node.op_type in _PARTS_OF_PRODUCTS:
            continue
        for value in node.output:
            kind = graph.types[value].type.tensor_type.elem_type if value in graph.types else None
            if kind in _FLOATING:
                sources[value] = _nearest(graph, nodes, value, sources)
    return sources


def _nearest(
    graph: OnnxGraph, nodes: Sequence[NodeProto], value: str, marked: Mapping[str, set[str]]
) -> set[str]:
    """The nearest of some values on the ways that lead to a value."""
    nearest: set[str] = set()
    visited: set[str] = set()
    waiting = list(nodes[graph.producers[value]].input)
    while waiting:
        name = waiting.pop()
        if name in visited or name not in graph.producers:
            continue
        visited.add(name)
        if name in marked:
            nearest.add(name)
        else:
            waiting += nodes[graph.producers[name]].input
    return nearest
