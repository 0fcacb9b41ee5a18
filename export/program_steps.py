"""A program of several graphs that grows step by step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from msgspec.structs import replace

from sd35_trt.formats.bundle import ADAPTER_SCALES, RESIDUALS
from sd35_trt.formats.program import Call, Condition, Graph, Node, Operand, Program, View

from .ports import ComponentModule
from .program_writer import traced_graph

#: Adapters are there: without any, they are given with no rank.
ADAPTING = Condition(ADAPTER_SCALES, axis=1, above=0)

#: Some images have a third branch.
SKIPPING = Condition("layer_mask", axis=0, above=0)

#: There is more than the one token of zeros that stands for nothing.
CONTROLLED = Condition(RESIDUALS, axis=2, above=1)

#: ControlNets made nothing.
NOT_CONTROLLED = replace(CONTROLLED, holds=False)

#: Without any adapters.
NOT_ADAPTING = replace(ADAPTING, holds=False)

#: No image has a third branch.
NOT_SKIPPING = replace(SKIPPING, holds=False)

Conditions = tuple[Condition, ...]


class ProgramSteps:
    """The graphs and the steps so far. Use it inside ``FakeTensorMode``."""

    def __init__(self) -> None:
        self._graphs: dict[str, Graph] = {}
        self._steps: list[Call | View] = []

    def call(
        self,
        name: str,
        module: ComponentModule,
        weights: str = "",
        local: str = "",
        conditions: Conditions = (),
        inputs: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
    ) -> None:
        """Call a graph, which is traced where there is none of its name yet.

        Args:
            weights: prefix of the weights' names in the component, in place of ``local``.
            inputs, outputs: ports of the module that are values of other names.
        """
        if name not in self._graphs:
            self._graphs[name] = traced_graph(module)
        graph = self._graphs[name]
        read, made = inputs or {}, outputs or {}
        self._steps.append(
            Call(
                name,
                tuple(weights + weight.removeprefix(local) for weight in graph.weights),
                tuple(read.get(port, port) for port in graph.inputs),
                tuple(made.get(port, port) for port in module.outputs),
                conditions,
            )
        )

    def stack(self, values: Sequence[str], output: str) -> None:
        """Stack values of one shape along a new first axis."""
        operands: list[Operand] = [[{"value": value} for value in values]]
        node = Node(output, "aten.stack.default", operands, {})
        self._graphs[output] = Graph((), tuple(values), (node,), (output,))
        self._steps.append(Call(output, (), tuple(values), (output,)))

    def view(self, view: View) -> None:
        """View a value in another form."""
        self._steps.append(view)

    def program(self) -> Program:
        """What came together."""
        return Program(str(torch.__version__), self._graphs, tuple(self._steps))
