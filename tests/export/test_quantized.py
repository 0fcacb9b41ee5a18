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
from torch import nn

from sd35_trt.components import COMPONENTS
from sd35_trt.export.layers import ExportLinear
from sd35_trt.export.quantized import IntegerFormat, WeightOnlyLinear, weight_only_linear
from sd35_trt.export.torch_layers import IntegerLinear
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


INT8 = IntegerFormat(127)
INT4 = IntegerFormat(7, 128)


def stored(weight: torch.Tensor, form: IntegerFormat) -> tuple[torch.Tensor, torch.Tensor]:
    """What a weight [out, in] is after it was stored, and the step of each value."""
    dtype = form.scale_dtype(weight)
    step = form.scale(weight, dtype).float()
    if form.block is not None:
        step = step.repeat_interleave(form.block, dim=0)
    integers = form.integers(weight, dtype)
    assert integers.abs().max() <= form.levels
    return (integers * step).t(), step.t() if step.ndim > 1 else step[:, None]


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
@pytest.mark.parametrize("scale", [2.0**-30, 2.0**-10, 0.02, 30.0])
def test_rounding_is_to_nearest_against_the_stored_scale(form: IntegerFormat, scale: float) -> None:
    weight = torch.randn(24, 256, generator=torch.Generator().manual_seed(0)) * scale
    actual, step = stored(weight, form)
    # FP16 rounds the scale, so the largest value may clip by a part in 2048.
    assert ((actual - weight).abs() <= step * 0.51).all()
    assert (step <= 1.001 * weight.abs().max() / form.levels).all(), "none is floored"


@pytest.mark.parametrize("form", [INT8, INT4], ids=["int8", "int4"])
def test_one_small_channel_among_large_ones(form: IntegerFormat) -> None:
    """A layer with a channel of 2⁻¹⁰, whose scales FP16 would floor, and one of zeros."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    weight[3] *= 2.0**-14 / weight[3].abs().max()
    weight[5] = 0
    assert form.scale_dtype(weight) == torch.float32
    actual, _ = stored(weight, form)
    rows = [i for i in range(8) if i != 5]
    errors = (actual - weight).norm(dim=1)[rows] / weight.norm(dim=1)[rows]
    assert errors.max() <= 1.5 * errors.min(), "the small one is as precise as the others"
    assert (actual[5] == 0).all()


def test_scales_are_in_fp16_where_it_has_them() -> None:
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    weight[5] = 0
    for form in (INT8, INT4):
        assert form.scale_dtype(weight) == torch.float16
        assert torch.isfinite(form.scale(torch.zeros(4, 128))).all()
        assert (form.integers(torch.zeros(4, 128)) == 0).all()


class _OneLinear:
    """Weights of a checkpoint with one layer."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight = weight

    def read(self, name: str) -> torch.Tensor:
        return {"layer.weight": self._weight, "layer.bias": torch.zeros(len(self._weight))}[name]


@pytest.mark.parametrize("precision", ["int8-weight", "int4-weight"])
@pytest.mark.parametrize("smallest", [2.0**-10, 0.0, 1.0])
def test_a_layer_with_small_channels_is_as_precise_as_another(
    precision: str, smallest: float
) -> None:
    """As it is traced, and as a program of PyTorch's computes it."""
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2))
    weight[::2] *= smallest / weight[::2].abs().amax(dim=1, keepdim=True)
    linear = ExportLinear(nn.Linear(128, 64, bias=False))
    layer = weight_only_linear(linear, precision, lambda: weight)
    program = IntegerLinear(layer)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(3)).half()
    expected = x.double() @ weight.double().t()
    for module in (layer, program):
        for name in ("weight", "scale"):
            source, convert = module.SOURCES[name]
            assert source == "weight"
            parameter = getattr(module, name)
            parameter.data = convert(weight).to(parameter.dtype).reshape(parameter.shape)
        actual = (_dequantized(layer, x) if module is layer else module(x)).double()
        for channels in (slice(0, None, 2), slice(1, None, 2)):
            error = (actual - expected)[:, channels].norm()
            bound = 0.012 if precision == "int8-weight" else 0.15
            assert error <= bound * expected[:, channels].norm()


def _dequantized(layer: WeightOnlyLinear, x: torch.Tensor) -> torch.Tensor:
    """What DequantizeLinear and the product compute: the symbolic operator does not."""
    scale = layer.scale
    if "block_size" in layer.attributes:
        scale = scale.repeat_interleave(layer.attributes["block_size"], dim=0)
    return x @ (layer.weight.to(scale.dtype) * scale).half()


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
