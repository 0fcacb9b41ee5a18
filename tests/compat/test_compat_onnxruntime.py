"""ONNX Runtime still says in the same words that there is no memory."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from sd35_trt.compat.onnxruntime import is_out_of_memory


def test_its_words_for_no_memory() -> None:
    """A constant of 2^46 elements."""
    size = helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1])
    result = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n"])
    node = helper.make_node("ConstantOfShape", ["size"], ["y"])
    graph = helper.make_graph([node], "large", [size], [result])
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    assert session.run(None, {"size": np.array([4], np.int64)})[0].shape == (4,)
    with pytest.raises(Exception, match=r".") as caught:
        session.run(None, {"size": np.array([1 << 46], np.int64)})
    assert is_out_of_memory(caught.value), f"onnxruntime {ort.__version__}: {caught.value}"


def test_other_errors_are_others() -> None:
    with pytest.raises(Exception, match=r".") as caught:
        ort.InferenceSession(b"no model", providers=["CPUExecutionProvider"])
    assert not is_out_of_memory(caught.value)
