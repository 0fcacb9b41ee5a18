"""Finding the first node that differs, on graphs of which one constant is changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from sd35_trt.quality.bisection import first_difference, relative_error
from sd35_trt.quality.marked_graphs import run_as_written
from sd35_trt.quality.onnx_graph import Arrays, OnnxGraph

WIDTH, BLOCKS = 8, 6
BOUND = 1e-3
FEED = {"x": np.random.default_rng(0).standard_normal((4, WIDTH)).astype(np.float32)}


def _weight(block: int, layer: str) -> str:
    return f"part.blocks.{block}.{layer}.weight"


def _save(folder: Path, wrong: str | None = None, round_off: bool = False) -> OnnxGraph:
    """Residual blocks of two branches each, whose sum is the next block's input.

    Args:
        wrong: name of a weight that is another.
        round_off: whether the output is of whole numbers.
    """
    random = np.random.default_rng(1)
    nodes, weights, values = [], [], {"x": TensorProto.FLOAT}

    def add(operator: str, inputs: list[str], output: str, kind: int = TensorProto.FLOAT) -> str:
        nodes.append(helper.make_node(operator, inputs, [output], f"node_{output}"))
        values[output] = kind
        return output

    def weight(name: str) -> str:
        array = random.standard_normal((WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        if name == wrong:
            array[0] += 0.5
        weights.append(numpy_helper.from_array(array, name))
        return name

    state = "x"
    for block in range(BLOCKS):
        scope = f"block{block}"
        left = add("MatMul", [state, weight(_weight(block, "left"))], f"{scope}/left")
        left = add("Tanh", [left], f"{scope}/left_tanh")
        right = add("MatMul", [state, weight(_weight(block, "right"))], f"{scope}/right")
        right = add("Relu", [right], f"{scope}/right_relu")
        branches = add("Add", [left, right], f"{scope}/branches")
        state = add("Add", [state, branches], f"{scope}/sum")
    if round_off:
        state = add("Cast", [state], "y", TensorProto.INT32)
        nodes[-1].attribute.append(helper.make_attribute("to", TensorProto.INT32))
    else:
        state = add("Identity", [state], "y")
    shape = [4, WIDTH]
    infos = {name: helper.make_tensor_value_info(name, t, shape) for name, t in values.items()}
    graph = helper.make_graph(
        nodes, "blocks", [infos.pop("x")], [infos.pop("y")], weights,
        value_info=list(infos.values()),
    )  # fmt: skip
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=10)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return OnnxGraph(folder / "model.onnx")


class _Counted:
    """Runs of a graph, which notes what was marked."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._run = run_as_written(graph)
        self.marks: list[Sequence[str]] = []

    def __call__(self, names: Sequence[str]) -> Arrays:
        self.marks.append(names)
        return self._run(FEED, names)


@pytest.mark.parametrize("round_off", [False, True])
@pytest.mark.parametrize(("block", "layer"), [(0, "left"), (0, "right"), (3, "left"), (5, "right")])
def test_the_changed_layer_is_named(
    block: int, layer: str, round_off: bool, tmp_path: Path
) -> None:
    graph = _save(tmp_path / "right", round_off=round_off)
    wrong = _Counted(_save(tmp_path / "wrong", _weight(block, layer), round_off))
    difference = first_difference(graph, wrong, _Counted(graph), BOUND)
    assert difference is not None
    assert (difference.node, difference.operator) == (f"node_block{block}/{layer}", "MatMul")
    assert difference.layer == f"blocks.{block}.{layer}"
    assert difference.error is not None
    assert difference.error > 0.05
    assert difference.input_error == 0.0
    assert max(map(len, wrong.marks)) <= 8


def test_ends_of_blocks_come_first(tmp_path: Path) -> None:
    graph = _save(tmp_path / "right")
    wrong = _Counted(_save(tmp_path / "wrong", _weight(3, "left")))
    first_difference(graph, wrong, _Counted(graph), BOUND)
    assert wrong.marks[0] == ["y"]
    assert set(wrong.marks[1]) == {f"block{block}/sum" for block in range(BLOCKS - 1)}
    assert all(name.startswith("block3/") for names in wrong.marks[2:] for name in names)
    assert len(wrong.marks) <= 4


def test_equal_graphs_have_no_first_difference(tmp_path: Path) -> None:
    graph, runs = _save(tmp_path / "right"), []
    other = _Counted(_save(tmp_path / "same"))
    assert first_difference(graph, other, _Counted(graph), BOUND, runs.append) is None
    assert other.marks == [["y"]]
    assert runs == [1]


def test_a_result_that_is_not_finite_differs(tmp_path: Path) -> None:
    graph = _save(tmp_path / "right")
    inner = _Counted(graph)

    def overflow(names: Sequence[str]) -> Arrays:
        after = [f"block{block}/" for block in (4, 5)] + ["y"]
        return {
            name: np.full_like(value, np.nan) if name.startswith(tuple(after)) else value
            for name, value in inner(names).items()
        }

    difference = first_difference(graph, overflow, _Counted(graph), BOUND)
    assert difference is not None
    assert difference.node in {"node_block4/left", "node_block4/right"}
    assert difference.error is None


def test_an_error_that_a_later_layer_hides_is_not_taken_for_right(tmp_path: Path) -> None:
    """Two ends of blocks look right, one of them that of the changed layer's block."""
    graph = _save(tmp_path / "right")
    right, wrong = _Counted(graph), _Counted(_save(tmp_path / "wrong", _weight(1, "left")))

    def masked(names: Sequence[str]) -> Arrays:
        expected, actual = right(names), wrong(names)
        hidden = {"block1/sum", "block3/sum"}
        return {name: (expected if name in hidden else actual)[name] for name in names}

    difference = first_difference(graph, masked, _Counted(graph), BOUND)
    assert difference is not None
    assert difference.node == "node_block1/left"


def test_what_masks_is_no_difference() -> None:
    mask = np.array([0.0, -np.inf, 3.0])
    assert relative_error(mask, mask) == 0.0
    assert relative_error(np.array([0.0, -np.inf, 4.0]), mask) == pytest.approx(1 / 3)
    assert relative_error(np.array([0.0, 1.0, 3.0]), mask) is None
    assert relative_error(np.zeros(2), mask) is None
