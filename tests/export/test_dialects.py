"""The dialects of ONNX: the same arithmetic, in the operators that each has."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from components import Arrays, export, run_ort, taken_from
from conftest import relative_error

from sd35_trt.components import COMPONENTS
from sd35_trt.formats.calibration import Calibration
from sd35_trt.mini import calibration_path, checkpoint_path

_DIMENSIONS = {
    "batch": 2, "samples": 3, "steps": 2, "tokens": 13, "height": 8, "width": 12,
    "image_height": 64, "image_width": 96,
}  # fmt: skip

# Over four seeds, one and two threads, the dialects were apart by 6e-6 in FP32 (a rounding of bytes
# made 8e-5 of pictures), by 8e-4 in half and with integer weights, and by 0.044 in FP8, where one
# ulp of the input alone makes 0.041.
_LIMITS = {"fp32": 1e-5, "half": 2e-3, "int8-weight": 2e-3, "int4-weight": 2e-3, "fp8": 0.1}
_OF_PICTURES = 3e-4

_NEWER = {"Attention", "RMSNormalization", "GroupNormalization", "RotaryEmbedding", "Swish"}

_DAILY = {("denoiser", "fp8"), ("vae_decoder", "half")}
_PAIRS = [
    pytest.param(c, p, marks=() if (c, p) in _DAILY else pytest.mark.nightly)
    for c in COMPONENTS
    for p in _LIMITS
]


def _inputs(folder: Path, seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    arrays = {}
    for port in json.loads((folder / "component.json").read_text())["inputs"]:
        shape = [_DIMENSIONS[d] if isinstance(d, str) else d for d in port["shape"]]
        arrays[port["name"]] = {
            "int64": lambda shape: rng.integers(0, 200, shape),
            "uint8": lambda shape: rng.integers(0, 256, shape),
        }.get(port["dtype"], rng.standard_normal)(shape)
        if port["name"] == "timesteps":
            arrays[port["name"]] = rng.uniform(1, 1000, shape)
    return arrays


@pytest.mark.parametrize(("component", "policy"), _PAIRS)
def test_both_compute_the_same(
    component: str, policy: str, tmp_path: Path, make_bundle: Callable[..., Path]
) -> None:
    calibration = Calibration.load(calibration_path()) if policy == "fp8" else None
    older = export(
        tmp_path / "opset21", checkpoint_path(), [component], policy, calibration, "opset21",
        guided=True,
    )  # fmt: skip
    folders = {
        "opset23": taken_from(make_bundle(policy=policy), component, tmp_path / "opset23"),
        "opset21": older / component,
    }
    for name, folder in folders.items():
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        assert [entry.version for entry in model.opset_import] == [int(name.removeprefix("opset"))]
        onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    operators = Counter(node.op_type for node in model.graph.node)
    assert not _NEWER & operators.keys()
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert all(
        not node.attribute and types[node.input[2]] == onnx.TensorProto.FLOAT8E4M3FN
        for node in quantizers
    )
    assert bool(quantizers) == (policy == "fp8" and component == "denoiser")
    arrays = _inputs(folder, 0)
    expected, actual = run_ort(folders["opset23"], arrays), run_ort(folder, arrays)
    for port, value in expected.items():
        limit = max(_LIMITS[policy], _OF_PICTURES if value.dtype == np.uint8 else 0)
        assert relative_error(actual[port], value) <= limit, port
