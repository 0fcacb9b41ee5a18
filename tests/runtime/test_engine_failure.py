"""What is said of an engine that fails: of memory where that was the cause, else not."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from sd35_trt.errors import OutOfMemory
from sd35_trt.runtime.sessions.failure import engine_failure, lacks_memory


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
    assert lacks_memory(caught.value), f"onnxruntime {ort.__version__}: {caught.value}"


def test_other_errors_are_others() -> None:
    with pytest.raises(Exception, match=r".") as caught:
        ort.InferenceSession(b"no model", providers=["CPUExecutionProvider"])
    assert not lacks_memory(caught.value)


@pytest.mark.parametrize(
    ("reason", "memory"),
    [
        ("CUDA error: out of memory", True),
        ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("1: [defaultAllocator.cpp] Cuda Runtime (out of memory)", True),
        ("Non-zero status code returned while running Conv node", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_advice_is_of_the_cause(reason: str, memory: bool) -> None:
    error = engine_failure("denoiser", "ONNX Runtime", reason)
    assert isinstance(error, OutOfMemory) == memory
    assert ("smaller size" in str(error)) == memory
    assert ("sd35-trt verify" in str(error)) != memory
