"""Errors of single layers against arithmetic done by hand, on graphs made here."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from conftest import relative_error
from onnx import TensorProto, helper, numpy_helper

from sd35_trt.errors import Sd35Error
from sd35_trt.formats.report import LinearError
from sd35_trt.quality import linears
from sd35_trt.quality.linears import equal_linears, linear_errors

RNG = np.random.default_rng(0)
W1 = RNG.normal(size=(16, 24)).astype(np.float32)
W2 = RNG.normal(size=(24, 8)).astype(np.float32)
B1 = RNG.normal(size=24).astype(np.float32)
X = RNG.normal(size=(5, 16)).astype(np.float32)

INT8_SCALE = np.abs(W1).max(axis=0) / np.float32(127)
INT8 = np.rint(W1 / INT8_SCALE).astype(np.int8)

FP8 = ml_dtypes.float8_e4m3fn
W2_SCALE = np.float32(np.abs(W2).max() / 448)
W2_FP8 = (W2 / W2_SCALE).astype(FP8)
X2_SCALE = np.float32(0.02)


def fp8(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """Rounded to E4M3 and back."""
    quantized = np.clip(values / scale, -448, 448).astype(FP8)
    return quantized.astype(np.float32) * scale


def write(folder: Path, quantized: bool, **weights: np.ndarray) -> Path:
    """Two linears with a ReLU between; quantized, the first has INT8 weights and the second FP8
    weights and activations. Weights are external, as the exporter writes them."""
    tensors = {"part.a.bias": B1, "part.b.weight": W2, "part.a.weight": W1, **weights}
    nodes = []
    one, two, into_two = "part.a.weight", "part.b.weight", "hidden"
    if quantized:
        tensors |= {
            "part.a.weight": INT8, "part.a.scale": INT8_SCALE,
            "part.b.weight": W2_FP8, "part.b.scale": W2_SCALE, "part.b.input_scale": X2_SCALE,
            "zero": np.zeros((), FP8),
        }  # fmt: skip
        nodes = [
            helper.make_node("DequantizeLinear", [one, "part.a.scale"], ["w1"], axis=1),
            helper.make_node("DequantizeLinear", [two, "part.b.scale"], ["w2"]),
        ]
        one, two, into_two = "w1", "w2", "x2"
    nodes += [
        helper.make_node("MatMul", ["x", one], ["product"]),
        helper.make_node("Add", ["product", "part.a.bias"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["hidden"]),
    ]
    if quantized:
        nodes += [
            helper.make_node("QuantizeLinear", ["hidden", "part.b.input_scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "part.b.input_scale"], ["x2"]),
        ]
    nodes.append(helper.make_node("MatMul", [into_two, two], ["y"]))
    graph = helper.make_graph(
        nodes,
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model = onnx.shape_inference.infer_shapes(model)
    folder.mkdir()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.data",
              size_threshold=64)  # fmt: skip
    return folder / "model.onnx"


@pytest.fixture
def errors(tmp_path: Path) -> dict[str, LinearError]:
    result = linear_errors(
        "toy", write(tmp_path / "a", False), write(tmp_path / "b", True), [{"x": X}]
    )
    return {error.layer: error for error in result}


def test_errors_are_those_of_the_arithmetic(errors: dict[str, LinearError]) -> None:
    assert {k: (e.reference_precision, e.precision) for k, e in errors.items()} == {
        "a": ("fp32", "int8-weight"),
        "b": ("fp32", "fp8"),
    }
    first = X @ W1 + B1
    first_int8 = X @ (INT8 * INT8_SCALE) + B1
    expected = relative_error(first_int8, first)
    assert errors["a"].own_error == pytest.approx(expected, rel=1e-4)
    assert errors["a"].in_place_error == pytest.approx(expected, rel=1e-4)

    hidden, hidden_int8 = np.maximum(first, 0), np.maximum(first_int8, 0)
    weight = fp8(W2, W2_SCALE)
    own = relative_error(fp8(hidden, X2_SCALE) @ weight, hidden @ W2)
    in_place = relative_error(fp8(hidden_int8, X2_SCALE) @ weight, hidden @ W2)
    assert own != pytest.approx(in_place, rel=1e-3)
    assert errors["b"].own_error == pytest.approx(own, rel=1e-4)
    assert errors["b"].in_place_error == pytest.approx(in_place, rel=1e-4)


def test_a_graph_against_itself_is_exact(tmp_path: Path) -> None:
    path = write(tmp_path / "a", True)
    for error in linear_errors("toy", path, path, [{"x": X}, {"x": 3 * X}]):
        assert (error.own_error, error.in_place_error) == (0.0, 0.0)
    # So that a component which two bundles share need not be run.
    assert equal_linears("toy", path) == linear_errors("toy", path, path, [{"x": X}])


def test_layers_can_be_measured_in_groups(
    tmp_path: Path, errors: dict[str, LinearError], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when their activations do not fit in memory at once."""
    monkeypatch.setattr(linears, "_BUDGET", 1)
    parts: list[float] = []
    paths = tmp_path / "a" / "model.onnx", tmp_path / "b" / "model.onnx"
    result = linear_errors("toy", *paths, [{"x": X}], parts.append)
    assert {error.layer: error for error in result} == errors
    assert parts == [0.5, 1.0]


def test_what_overflows_is_not_finite(tmp_path: Path) -> None:
    reference = write(tmp_path / "a", False)
    broken = write(tmp_path / "b", False, **{"part.b.weight": np.full_like(W2, 3e38)})
    first, second = linear_errors("toy", reference, broken, [{"x": X}])
    assert first.own_error == 0.0
    assert second.own_error is None
    assert second.in_place_error is None


def test_graphs_with_other_layers_are_refused(tmp_path: Path) -> None:
    reference, other = write(tmp_path / "a", False), write(tmp_path / "b", False)
    model = onnx.load(other)
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("part.b.", "part.c.")
    for node in model.graph.node:
        node.input[:] = [name.replace("part.b.", "part.c.") for name in node.input]
    onnx.save(model, other)
    with pytest.raises(Sd35Error, match="do not both have the linear b"):
        linear_errors("toy", reference, other, [{"x": X}])
