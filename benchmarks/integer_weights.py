"""Which spellings of integer weights TensorRT multiplies rightly: errors of one product each.

    python benchmarks/integer_weights.py

A product of FP16 activations and INT8 or INT4 weights, by a graph of a few nodes, compiled and run
on the GPU at hand, beside the same in FP64. PyTorch holds the buffers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.library import load_library
from sd35_trt.compat.tensorrt import make_builder, make_logger
from sd35_trt.errors import Sd35Error

_SHAPES = ((64, 192), (192, 64), (256, 512))
_ROWS = (2, 16)
_BLOCK = 64

Nodes = list[onnx.NodeProto]
Spelling = tuple[str, Nodes, dict[str, np.ndarray], np.ndarray, Sequence[onnx.TensorProto]]


def _dequantize(*inputs: str, output: str = "d", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", inputs, [output], **attributes)


def _product() -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", "d"], ["y"])


def spellings(rng: np.random.Generator, rows: int, columns: int) -> Iterator[Spelling]:
    """Name, nodes, initializers, the weight that they mean in FP64, and INT4 initializers."""
    w = rng.integers(-127, 128, (rows, columns)).astype(np.int8)
    s = rng.uniform(1e-3, 1e-2, columns).astype(np.float16)
    exact = w * s.astype(np.float64)
    yield "scale per column, axis 1", [_dequantize("w", "s", axis=1), _product()], {
        "w": w, "s": s}, exact, ()  # fmt: skip
    yield "the same, with zero points", [_dequantize("w", "s", "z", axis=1), _product()], {
        "w": w, "s": s, "z": np.zeros(columns, np.int8)}, exact, ()  # fmt: skip
    turn = helper.make_node("Transpose", ["e"], ["d"], perm=[1, 0])
    yield "transposed behind, axis 0", [_dequantize("w", "s", output="e", axis=0), turn,
        _product()], {"w": np.ascontiguousarray(w.T), "s": s}, exact, ()  # fmt: skip
    narrow = helper.make_node("Cast", ["e"], ["d"], to=TensorProto.FLOAT16)
    yield "scales in FP32, cast behind", [_dequantize("w", "s", output="e", axis=1), narrow,
        _product()], {"w": w, "s": s.astype(np.float32)}, exact, ()  # fmt: skip
    widen = helper.make_node("Cast", ["w"], ["c"], to=TensorProto.FLOAT16)
    times = helper.make_node("Mul", ["c", "s"], ["d"])
    yield "cast and multiplied", [widen, times, _product()], {"w": w, "s": s}, exact, ()
    yield "one scale", [_dequantize("w", "s"), _product()], {
        "w": w, "s": np.array(s[0])}, w * float(s[0]), ()  # fmt: skip
    blocks = rng.uniform(1e-3, 1e-2, (rows // _BLOCK, columns)).astype(np.float16)
    wide = np.repeat(blocks.astype(np.float64), _BLOCK, 0)
    blocked = [_dequantize("w", "s", axis=0, block_size=_BLOCK), _product()]
    yield "scale per block", blocked, {"w": w, "s": blocks}, w * wide, ()
    w4 = rng.integers(-7, 8, (rows, columns)).astype(np.int8)
    low, high = w4.reshape(-1)[0::2] & 15, w4.reshape(-1)[1::2] & 15
    packed = (low | high << 4).astype(np.uint8).tobytes()
    tensor = helper.make_tensor("w", TensorProto.INT4, (rows, columns), packed, raw=True)
    yield "INT4, scale per block", blocked, {"s": blocks}, w4 * wide, (tensor,)


def product(trt: Any, spelling: Spelling, x: np.ndarray) -> np.ndarray:
    """What TensorRT makes of it.

    Args:
        trt: the library.

    Raises:
        Sd35Error: it does not take the graph, or makes no plan.
    """
    _, nodes, arrays, _, tensors = spelling
    shape = ["batch", "tokens", x.shape[-1]]
    ports = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, s)
        for name, s in (("x", shape), ("y", None))
    ]
    initializers = [numpy_helper.from_array(a, name) for name, a in arrays.items()]
    graph = helper.make_graph(nodes, "graph", ports[:1], ports[1:], [*initializers, *tensors])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    log = make_logger(trt)
    builder = make_builder(trt, f"TensorRT {trt.__version__}", log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        raise Sd35Error(f"not taken: {parser.get_error(0).desc()}")
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", *[x.shape] * 3)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Sd35Error(f"no plan: {log.reasons()}")
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    context = engine.create_execution_context()
    operand = torch.from_numpy(x).cuda()
    context.set_input_shape("x", x.shape)
    result = torch.empty(tuple(context.get_tensor_shape("y")), dtype=torch.float16, device="cuda")
    context.set_tensor_address("x", operand.data_ptr())
    context.set_tensor_address("y", result.data_ptr())
    stream: Any = torch.cuda.Stream()
    context.execute_async_v3(stream.cuda_stream)
    stream.synchronize()
    return result.cpu().numpy()


def main() -> None:
    """Print a line for each shape and spelling."""
    trt = load_library(BACKENDS["tensorrt"])
    rng = np.random.default_rng(0)
    print(f"TensorRT {trt.__version__}, {torch.cuda.get_device_name()}", flush=True)
    for rows, columns in _SHAPES:
        x = rng.standard_normal((*_ROWS, rows)).astype(np.float16)
        for spelling in spellings(rng, rows, columns):
            expected = x.astype(np.float64) @ spelling[3]
            try:
                error = np.linalg.norm(product(trt, spelling, x) - expected) / np.linalg.norm(
                    expected
                )
                outcome = f"{error:.5f}"
            except Sd35Error as failure:
                outcome = str(failure)[:90]
            print(f"{rows:5} × {columns:<5} {spelling[0]:30} {outcome}", flush=True)


if __name__ == "__main__":
    main()
