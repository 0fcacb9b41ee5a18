"""FP8 graphs: what is quantized, with which scales, and what comes out."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from calibrations import calibrate, load_transformer, save, transformer_inputs
from components import export, run_ort, taken_from, velocity
from conftest import psnr, relative_error
from onnx import numpy_helper
from safetensors.torch import load_file

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.components import COMPONENTS
from sd35_trt.dialects import DIALECTS
from sd35_trt.errors import UsageError
from sd35_trt.export import fp8
from sd35_trt.export.component import apply_policy, build_part, fake_tensors, fp8_layers
from sd35_trt.export.denoiser import Denoiser
from sd35_trt.export.fp8 import fp8_scale, fp8_weight
from sd35_trt.formats.calibration import E4M3_MAX, Calibration
from sd35_trt.mini import calibration_path, checkpoint_path
from sd35_trt.policies import Policy, Rule, load_policy
from sd35_trt.runtime import Pipeline


@dataclasses.dataclass(frozen=True)
class Case:
    """One structure, exported with FP32 arithmetic for exact comparisons."""

    checkpoint: Path
    calibration: Calibration
    root: Path


@pytest.fixture(scope="module", params=[pytest.param("large", marks=pytest.mark.nightly), "medium"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    checkpoint = request.getfixturevalue(f"{request.param}_checkpoint")
    calibration = calibrate(checkpoint)
    # The same scales, with ranges that make the guard compute every FP8 layer in FP32; and FP32
    # where the policy says half.
    ranges = dict.fromkeys(calibration.activations, 1e5)
    rules = [
        dataclasses.replace(r, precision="fp32") if r.precision == "half" else r
        for r in load_policy("fp8").rules
    ]
    policy = Policy("exact", "", tuple(rules))
    wide = dataclasses.replace(calibration, activations=ranges)
    root = tmp_path_factory.mktemp(request.param)
    # The conditioner has no FP8 layers.
    taken_from(request.getfixturevalue(f"{request.param}_bundle"), "conditioner", root)
    return Case(checkpoint, calibration, export(root, checkpoint, ["denoiser"], policy, wide))


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "transformer/diffusion_pytorch_model.safetensors")


def fake_quantized(x: torch.Tensor, amax: float | torch.Tensor) -> torch.Tensor:
    """Rounded to E4M3 against amax / 448, in FP32."""
    scale = torch.as_tensor(amax, dtype=torch.float32) / E4M3_MAX
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale


def quantized_linears(model: onnx.ModelProto) -> dict[str, tuple[onnx.NodeProto, ...]]:
    """Layer name → its nodes: QuantizeLinear of the input, MatMul, Add."""
    producer = {name: node for node in model.graph.node for name in node.output}
    user = {node.input[0]: node for node in model.graph.node if node.op_type == "Add"}
    actual = {}
    for matmul in model.graph.node:
        if matmul.op_type != "MatMul":
            continue
        operands = [producer.get(name) for name in matmul.input]
        if all(node is not None and node.op_type == "DequantizeLinear" for node in operands):
            x, weight = operands
            quantize = producer[x.input[0]]
            assert quantize.op_type == "QuantizeLinear"
            name = weight.input[0].removeprefix("part.").removesuffix(".weight")
            actual[name] = (quantize, weight, matmul, user[matmul.output[0]])
    return actual


def check_file(
    path: Path, stored: dict[str, torch.Tensor], inputs: dict[str, float], dtype: type
) -> None:
    """Compare a denoiser's quantized linears and their scales with the policy and the amax."""
    policy = load_policy("fp8")
    expected = {
        layer
        for name, tensor in stored.items()
        if tensor.ndim == 2
        and COMPONENTS["denoiser"].owns(layer := name.removesuffix(".weight"))
        and policy.rule("denoiser", layer, linear=True).precision == "fp8"
    }
    assert not any(layer.endswith(("to_out.0", "to_add_out", "proj_out")) for layer in expected)
    assert {f"denoiser/{layer}" for layer in expected} == set(inputs)
    onnx.checker.check_model(str(path), full_check=True)
    model = onnx.load(path)
    actual = quantized_linears(model)
    assert set(actual) == expected
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("QuantizeLinear") == len(expected)
    assert kinds.count("DequantizeLinear") == 2 * len(expected)
    tensors = {t.name: t for t in model.graph.initializer}
    for layer, (quantize, weight, _, _) in actual.items():
        assert tensors[weight.input[0]].data_type == onnx.TensorProto.FLOAT8E4M3FN
        amax = float(stored[f"{layer}.weight"].abs().max())
        for name, value in (
            (weight.input[1], amax),
            (quantize.input[1], inputs[f"denoiser/{layer}"]),
        ):
            scale = numpy_helper.to_array(tensors[name])
            assert scale.dtype == dtype
            assert scale == pytest.approx(value / E4M3_MAX, rel=1e-3)


def test_the_file_holds_what_the_policy_says(case: Case) -> None:
    path = case.root / "denoiser/model.onnx"
    check_file(path, weights(case.checkpoint), dict(case.calibration.inputs), np.float32)


def quantized_fraction(path: Path, stored: dict[str, torch.Tensor]) -> float:
    """Bytes of a file's quantized linears, against those of FP16."""
    model = onnx.load(path, load_external_data=False)
    layers = quantized_linears(model)
    own = [t for t in model.graph.initializer if t.name[5:].rpartition(".")[0] in layers]
    weight_bytes = sum(int(e.value) for t in own for e in t.external_data if e.key == "length")
    half = sum(2 * t.numel() for n, t in stored.items() if n.rpartition(".")[0] in layers)
    return weight_bytes / half


def test_every_linear_equals_the_fake_quantized_one(case: Case) -> None:
    """In FP32: from its own input in the graph, to 1e-5."""
    model = onnx.load(case.root / "denoiser/model.onnx", load_external_data=False)
    linears = quantized_linears(model)
    watched = [name for q, _, _, add in linears.values() for name in (q.input[0], add.output[0])]
    config = load_transformer(case.checkpoint).config
    rng = np.random.default_rng(0)
    shapes = {
        value.name: [d.dim_value or {"tokens": 40, "height": 12, "width": 8}.get(d.dim_param, 3)
                     for d in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }  # fmt: skip
    assert shapes["latents"] == [3, config.in_channels, 12, 8]
    feeds = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    values = run_ort(case.root / "denoiser", feeds, watched)
    reference = weights(case.checkpoint)
    for layer, (quantize, _, _, add) in linears.items():
        weight, bias = (reference[f"{layer}.{kind}"] for kind in ("weight", "bias"))
        x = torch.from_numpy(values[quantize.input[0]])
        amax = case.calibration.inputs[f"denoiser/{layer}"]
        expected = fake_quantized(x, amax) @ fake_quantized(weight, weight.abs().max()).t() + bias
        assert relative_error(values[add.output[0]], expected.numpy()) <= 1e-5, layer


def test_the_transformer_errs_no_more_than_modelopts(case: Case) -> None:
    import modelopt.torch.quantization as mtq

    model = load_transformer(case.checkpoint)
    calibrating = transformer_inputs(model)
    arguments = [transformer_inputs(model, seed) for seed in range(8)]
    with torch.no_grad():
        exact = [model(**a).sample.numpy() for a in arguments]
        names = [name.partition("/")[2] for name in case.calibration.inputs]
        e4m3 = {"num_bits": (4, 3), "axis": None}
        config = [{"quantizer_name": "*", "enable": False}] + [
            {"quantizer_name": f"{name}.{kind}_quantizer", "cfg": e4m3, "enable": True}
            for name in names
            for kind in ("input", "weight")
        ]
        mtq.quantize(model, {"quant_cfg": config, "algorithm": "max"}, lambda m: m(**calibrating))
        theirs = [model(**a).sample.numpy() for a in arguments]
    ours = [velocity(case.root, a) for a in arguments]

    def mean(values: list[np.ndarray], references: list[np.ndarray]) -> float:
        return float(np.mean([*map(relative_error, values, references)]))

    # Of the same scales: only the order of sums differs. Over 48 seeds with one and two threads
    # the two lie at most 2.5e-4 apart, and mean errors of eight seeds differ by 2e-4 of themselves.
    assert max(map(relative_error, ours, theirs)) <= 1e-3
    assert 1e-3 < mean(ours, exact) <= mean(theirs, exact) * 1.002


@pytest.mark.parametrize("amax", [1e-6, 0.01, 3.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_hold_for_every_amax(amax: float, dtype: torch.dtype) -> None:
    weight = torch.linspace(-1, 1, 64).reshape(8, 8) * amax
    scale = fp8_scale(weight.abs().max(), dtype)
    assert scale.dtype == dtype
    assert scale >= torch.finfo(dtype).tiny
    error = (fp8_weight(weight, dtype).t().float() * scale.float() - weight).abs()
    # Half a step: 1/16 of the value, or of the smallest normal number; FP16 rounds the scale.
    assert (error <= weight.abs() / 15.9 + scale.float() * 2**-10 * 1.01).all()


def test_attention_matmuls(large_checkpoint: Path) -> None:
    """Q/DQ on the four operands, where a rule names the attention; elsewhere one operator."""
    checkpoint = Checkpoint(large_checkpoint)
    rule = Rule("denoiser", "transformer_blocks.2.attn", "fp8", "the matmuls too")
    policy = Policy("mine", "", (*load_policy("fp8").rules, rule))
    with fake_tensors():
        part = build_part("transformer", checkpoint)
        apply_policy(part, "denoiser", policy)
        *_, quantized = Denoiser(part, guided=False).blocks
        model = quantized.trace(DIALECTS["opset23"])
    assert not [node for node in model.graph if node.op_type == "Attention"]
    scales = {str(node.inputs[1].name) for node in model.graph if node.op_type == "QuantizeLinear"}
    operands = [f"block.attn.{x}_scale" for x in "qkvp"]
    assert sorted(s for s in scales if not s.endswith("input_scale")) == sorted(operands)
    expected = fp8_layers(checkpoint, ["denoiser"], policy)
    assert expected[1] == ["denoiser/transformer_blocks.2.attn"]


def test_attention_matmuls_are_those_of_diffusers(large_checkpoint: Path) -> None:
    """With operands that E4M3 holds exactly, nothing is rounded but the softmax."""
    model = load_transformer(large_checkpoint)
    attention = model.transformer_blocks[0].attn
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2, n, 192, generator=generator) for n in (24, 40))
    with torch.no_grad():
        expected = attention(image, text)
        fp8.quantize_attention(attention, None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fp8, "fake_quantize", lambda x, scale, zero: x)
            actual = attention(image, text)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_without_a_calibration(large_checkpoint: Path, tmp_path: Path) -> None:
    options = BuildOptions(model=str(large_checkpoint), policy="fp8", out=tmp_path / "bundle")
    with pytest.raises(UsageError) as caught:
        build(options)
    message = str(caught.value)
    assert message.startswith("policy 'fp8' needs a calibration — make one with: sd35-trt ")
    assert f"calibrate --model {large_checkpoint} --policy fp8 --out DIR" in message
    assert "\n" not in message
    assert not list(tmp_path.iterdir())


def test_another_checkpoints_calibration(
    large_checkpoint: Path, medium_checkpoint: Path, tmp_path: Path, stage_cache: Path
) -> None:
    save(calibrate(medium_checkpoint), tmp_path / "calibration")
    options = BuildOptions(
        model=str(large_checkpoint),
        policy="fp8",
        calibration=tmp_path / "calibration",
        out=tmp_path / "bundle",
        cache_dir=stage_cache,
    )
    with pytest.raises(UsageError, match="of another checkpoint"):
        build(options)
    assert not (tmp_path / "bundle").exists()


def test_a_bundle_of_mini(make_bundle: Callable[..., Path], mini_bundle: Path) -> None:
    """FP16 arithmetic; the packaged calibration is the default, and a picture comes out."""
    bundle = make_bundle(policy="fp8")
    amax = json.loads((bundle / "calibration.json").read_text())["amax"]
    suffix = ".input_amax"
    inputs = {
        k.removesuffix(suffix): v
        for k, v in amax.items()
        if k.endswith(suffix) and not k.startswith("control_")
    }
    path, stored = bundle / "denoiser/model.onnx", weights(checkpoint_path())
    check_file(path, stored, inputs, np.float16)
    assert quantized_fraction(path, stored) <= 0.53
    with Pipeline.load(bundle) as pipe, Pipeline.load(mini_bundle) as single:
        actual = pipe.generate("a large blue square", seed=3)
        expected = single.generate("a large blue square", seed=3)
    assert psnr(actual.images, expected.images) >= 15
    assert pipe.manifest.calibration == Calibration.load(calibration_path()).digest()
    denoiser = pipe.manifest.component("denoiser")
    assert denoiser is not None
    assert denoiser.precisions["fp8"] == len(inputs)
