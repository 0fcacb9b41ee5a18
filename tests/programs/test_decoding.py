"""Data to functions: what a graph may hold."""

from __future__ import annotations

from typing import Any

import pytest
from example_program import CPU

from sd35_trt.errors import BundleError
from sd35_trt.formats.program import Graph, Node
from sd35_trt.programs.decoding import graph_module


@pytest.mark.parametrize("target", ["aten.from_file.default", "os.system", "aten.nonsense.default",
                                    "prims.device_put.default", "eval"])  # fmt: skip
def test_operators_that_programs_do_not_have(target: str) -> None:
    graph = Graph((), ("x",), (Node("v", target, [{"value": "x"}], {}),), ("v",))
    with pytest.raises(BundleError, match=f"damaged: the operator '{target}'"):
        graph_module(graph, CPU, False)


@pytest.mark.parametrize(
    "argument", [{"value": "y"}, {"dtype": "Tensor"}, {"module": "os"}, {"a": 1, "b": 2}]
)
def test_arguments_that_programs_do_not_have(argument: Any) -> None:
    graph = Graph((), ("x",), (Node("v", "aten.to.dtype", [{"value": "x"}, argument], {}),), ("v",))
    with pytest.raises(BundleError, match="a graph is damaged"):
        graph_module(graph, CPU, False)
