"""Weight-only policies: what is stored, what is computed, and which layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import psnr
from onnx import numpy_helper
from safetensors.torch import load_file

from sd35_trt.components import COMPONENTS
from sd35_trt.export.quantized import int4_scale, int4_weight, int8_scale, int8_weight
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import load_policy
from sd35_trt.runtime import Pipeline

PREFIX = "part."


@pytest.fixture(
    scope="module",
    params=["int8-weight", pytest.param("int4-weight", marks=pytest.mark.nightly)],
)
def policy_and_bundle(
    request: pytest.FixtureRequest, make_bundle: Callable[..., Path]
) -> tuple[str, Path]:
    return request.param, make_bundle(policy=request.param)


@pytest.mark.parametrize("scale", [1e-5, 0.02, 30.0])
def test_rounding_is_to_nearest_against_the_stored_scale(scale: float) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * scale
    step = int8_scale(weight).float()[:, None]
    error = (int8_weight(weight).t() * step - weight).abs()
    assert (error <= step * 0.5001).all()
    # FP16 rounds the scale, so the largest value may clip by a part in 2048.
    step = int4_scale(weight, 128).t().float().repeat_interleave(128, dim=1)
    error = (int4_weight(weight, 128).t() * step - weight).abs()
    assert (error <= step * 0.51).all()
    assert int4_weight(weight, 128).abs().max() <= 7


def test_a_row_of_zeros_stays_zero() -> None:
    assert (int8_weight(torch.zeros(4, 128)) == 0).all()
    assert torch.isfinite(int8_scale(torch.zeros(4, 128))).all()


def test_the_file_holds_what_the_policy_says(policy_and_bundle: tuple[str, Path]) -> None:
    """Read back from ONNX: the set of quantized linears, and every dequantized weight."""
    name, bundle = policy_and_bundle
    policy = load_policy(name)
    reference = load_file(checkpoint_path() / "transformer/diffusion_pytorch_model.safetensors")
    for component in ("conditioner", "denoiser"):
        path = bundle / component / "model.onnx"
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(path)
        tensors = {t.name: t for t in model.graph.initializer}
        actual = {}
        for node in model.graph.node:
            if node.op_type == "DequantizeLinear":
                layer = node.input[0].removeprefix(PREFIX).removesuffix(".weight")
                block = {a.name: a.i for a in node.attribute}.get("block_size", 0)
                actual[layer] = (tensors[node.input[0]], tensors[node.input[1]], block)
        expected = {
            layer.removesuffix(".weight")
            for layer, tensor in reference.items()
            if tensor.ndim == 2
            and COMPONENTS[component].owns(layer.removesuffix(".weight"))
            and policy.rule(component, layer.removesuffix(".weight"), True).precision != "half"
        }
        assert set(actual) == expected
        assert expected
        kinds = {weight.data_type for weight, _, _ in actual.values()}
        four_bit = name == "int4-weight" and component == "denoiser"
        assert kinds == {onnx.TensorProto.INT4 if four_bit else onnx.TensorProto.INT8}
        for layer, (weight, scale, block) in actual.items():
            steps = numpy_helper.to_array(scale).astype(np.float32)
            if block:
                steps = steps.repeat(block, axis=0)
            value = numpy_helper.to_array(weight).astype(np.float32) * steps
            stored = reference[f"{layer}.weight"].float().numpy().T
            # Half a step, and what rounding the scale to FP16 moves the largest values by.
            assert (np.abs(value - stored) <= 0.6 * steps).all(), layer


def test_pictures_stay_close(
    policy_and_bundle: tuple[str, Path], mini_bundle: Path, make_bundle: Callable[..., Path]
) -> None:
    name, bundle = policy_and_bundle
    with Pipeline.load(bundle) as pipe, Pipeline.load(mini_bundle) as reference:
        actual = pipe.generate("a large blue square", seed=3)
        expected = reference.generate("a large blue square", seed=3)
        sizes = [
            sum(c.weight_bytes for c in p.manifest.components if c.name == "denoiser")
            for p in (pipe, reference)
        ]
    assert psnr(actual.images, expected.images) >= (25 if name == "int8-weight" else 12)
    # Against FP32: a quarter, an eighth, and the scales.
    assert sizes[0] / sizes[1] <= (0.30 if name == "int8-weight" else 0.20)
