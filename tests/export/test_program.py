"""Components as programs, against the ONNX components of the same policy."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibrations import calibrate, load_transformer, transformer_inputs
from components import Arrays, export, run_ort, run_program, velocity
from conftest import relative_error
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession
from safetensors.torch import load_file

from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.errors import UsageError
from sd35_trt.export.component import build_part, fake_tensors
from sd35_trt.export.fp8 import Fp8Linear
from sd35_trt.export.layers import ExportLinear
from sd35_trt.export.torch_layers import ScaledLinear, quantize, use_torch_layers
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.calibration import E4M3_MAX
from sd35_trt.formats.program import PROGRAM_FILE, TENSORS_FILE, Call, read_program
from sd35_trt.mini import checkpoint_path
from sd35_trt.policies import Policy, Rule, load_policy

DIMS = {
    "batch": 2, "samples": 3, "tokens": 45, "height": 16, "width": 12, "image_height": 64,
    "image_width": 48, "steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def copy(
    make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Bundle]:
    """The bundle of a policy, ``opset23`` or ``program``: a copy, to write descriptions in."""

    @functools.cache
    def make(policy: str, dialect: str) -> Bundle:
        options = {"target": "h200", "builder": "inductor"} if dialect == "program" else {}
        source = make_bundle(policy=policy, **options)
        return Bundle.open(Path(shutil.copytree(source, tmp_path_factory.mktemp(policy) / dialect)))

    return make


def feeds(bundle: Bundle, name: str, seed: int = 0) -> Arrays:
    component = bundle.manifest.component(name)
    assert component is not None
    rng = np.random.default_rng(seed)
    actual = {}
    for port in component.inputs:
        shape = port.resolve(**DIMS)
        value = rng.standard_normal(shape) * (0.1 if "modulation" in port.name else 1)
        if port.dtype.startswith(("int", "uint")):
            value = rng.integers(0, 200, shape)
        elif port.name == "timesteps":
            value = np.linspace(1000, 10, shape[0])
        actual[port.name] = value.astype(port.dtype)
    return actual


def described(bundle: Bundle, name: str) -> Path:
    """A component's folder, with the description that the test helpers read."""
    folder = bundle.root / name
    component = bundle.manifest.component(name)
    assert component is not None
    ports = {
        key: [{"name": p.name, "dtype": p.dtype} for p in getattr(component, key)]
        for key in ("inputs", "outputs")
    }
    (folder / "component.json").write_text(json.dumps(ports))
    return folder


COMPONENTS = ("clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder", "vae_encoder")


_RUN = {"opset23": run_ort, "program": run_program}


def results(copy: Any, policy: str, dialect: str, name: str, seed: int = 0) -> Arrays:
    """What a component computes."""
    bundle = copy(policy, dialect)
    return _RUN[dialect](described(bundle, name), feeds(bundle, name, seed))


def both(copy: Any, policy: str, name: str) -> tuple[Arrays, Arrays]:
    """What a component computes as ONNX and as a program."""
    return results(copy, policy, "opset23", name), results(copy, policy, "program", name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", COMPONENTS)
def test_fp32_is_what_onnx_computes(copy: Any, name: str) -> None:
    expected, actual = both(copy, "fp32", name)
    for key, value in expected.items():
        assert actual[key].dtype == value.dtype
        if value.dtype == np.uint8:
            assert np.abs(actual[key].astype(int) - value).max() <= 1, "rounded the other way"
        else:
            assert relative_error(actual[key], value) <= 1e-5, key


@pytest.mark.parametrize("policy", [pytest.param("half", marks=pytest.mark.nightly), "fp8"])
def test_the_step_is_as_exact_as_onnx_makes_it(copy: Any, policy: str) -> None:
    truth = results(copy, "fp32", "opset23", "denoiser")["denoised"]
    expected, actual = both(copy, policy, "denoiser")
    by_onnx = relative_error(expected["denoised"], truth)
    by_program = relative_error(actual["denoised"], truth)
    if policy == "fp8":
        # Of 12 seeds 0.99 to 1.05 times it, by any number of threads; 1.07 with inputs off by 1e-6.
        assert by_program <= 1.2 * by_onnx
    else:
        # ONNX Runtime's CPU provider computes FP16 graphs in FP32.
        assert relative_error(actual["denoised"], expected["denoised"]) <= 2e-3


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["clip_l", "conditioner", "vae_decoder", "vae_encoder"])
def test_half_is_half(copy: Any, name: str) -> None:
    for key, value in (dialects := both(copy, "half", name))[0].items():
        assert relative_error(dialects[1][key], value) <= 2e-3, key


def test_fp8_weights_and_scales_are_those_of_the_onnx_component(copy: Any) -> None:
    """Bit by bit: joined ones too."""
    onnx_bundle, program = copy("fp8", "opset23"), copy("fp8", "program")
    model = onnx.load(onnx_bundle.root / "denoiser" / "model.onnx")
    stored = {t.name: t for t in model.graph.initializer}
    ours = load_file(program.root / "denoiser" / TENSORS_FILE)
    fp8 = [name for name, t in stored.items() if t.data_type == TensorProto.FLOAT8E4M3FN]
    weights = [name for name in fp8 if name.endswith(".weight")]
    assert weights
    targets = set()
    for name in weights:
        prefix = name.removesuffix(".weight")
        bits = numpy_helper.to_array(stored[name]).view(np.uint8).T
        scales = [
            np.float32(numpy_helper.to_array(stored[f"{prefix}.{kind}_scale"]))
            for kind in ("weight", "input")
        ]
        attention, _, linear = prefix.rpartition(".")
        places = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
        for joined, names in zip(("joined", "joined_added"), places, strict=True):
            if linear in names:
                prefix, width = f"{attention}.{joined}", len(bits)
                part = slice(width * names.index(linear), width * (names.index(linear) + 1))
                factor = ours[f"{prefix}.factor"][part]
                assert factor.min() == factor.max() >= 1
                own = ours[f"{prefix}.weight_scale"].item() * factor[0].item()
                break
        else:
            part, own = slice(None), ours[f"{prefix}.weight_scale"].item()
        actual = ours[f"{prefix}.weight"].view(torch.uint8).numpy()[part]
        np.testing.assert_array_equal(actual, bits, name)
        assert own == pytest.approx(scales[0], rel=1e-6)
        assert ours[f"{prefix}.input_scale"].item() == scales[1]
        targets.add(f"{prefix}.weight")
    narrow = {name for name, t in ours.items() if t.dtype == torch.float8_e4m3fn}
    assert targets == narrow
    for joined in ("joined", "joined_added"):
        assert sum(name.endswith(f".{joined}.weight") for name in targets) == 6, "in every block"


def test_quantization_is_onnxs() -> None:
    """Ties to even, saturating, for FP16 and FP32: every step of E4M3 and what is between."""
    steps = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    between = (steps[1:] + steps[:-1]) / 2
    values = torch.cat([steps, between, between * 1.001, between * 0.999, torch.tensor([9e3])])
    values = torch.cat([values, -values])
    for dtype, kind in ((torch.float32, TensorProto.FLOAT), (torch.float16, TensorProto.FLOAT16)):
        scale = torch.tensor(0.5, dtype=dtype)
        x = values.to(dtype)
        node = helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=17)
        back = helper.make_node("DequantizeLinear", ["q", "s"], ["y"])
        graph = helper.make_graph(
            [node, back],
            "quantize",
            [helper.make_tensor_value_info("x", kind, [len(x)])],
            [helper.make_tensor_value_info("y", kind, [len(x)])],
            [numpy_helper.from_array(scale.numpy(), "s")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
        (expected,) = InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
        actual = quantize(x, scale).float() * scale.float()
        np.testing.assert_array_equal(actual.numpy(), expected.astype(np.float32))
    assert quantize(torch.tensor([1e6, -1e6]), torch.tensor(1.0)).float().abs().max() == E4M3_MAX


def _scaled_linear(inputs: int, outputs: int, amax: float) -> tuple[ScaledLinear, torch.Tensor]:
    """An FP8 layer with random weights, and these in FP32 [out, in]."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    plain = ExportLinear(torch.nn.Linear(inputs, outputs))
    layer = ScaledLinear(Fp8Linear(plain, amax))
    for name, (_, convert) in layer.SOURCES.items():
        parameter = layer.get_parameter(name)
        parameter.data = convert(weight).to(parameter.dtype).contiguous()
    return layer, weight


@pytest.mark.parametrize("wide", [False, True])
def test_a_linear_is_a_product_of_what_was_rounded(wide: bool) -> None:
    layer, _ = _scaled_linear(64, 48, 4.0)
    layer.wide = wide
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1)).half()
    operand = quantize(x, layer.input_scale).double() * layer.input_scale.double()
    weight = layer.weight.double() * layer.weight_scale.double()
    expected = operand @ weight.t() + layer.bias.double()  # type: ignore[union-attr]
    actual = layer(x)
    assert actual.dtype == (torch.float32 if wide else torch.float16)
    assert actual.shape == (2, 5, 48)
    limit = 1e-6 if wide else 5e-4
    assert relative_error(actual.detach().numpy(), expected.detach().numpy()) <= limit


def test_dimensions_that_tensor_cores_do_not_take() -> None:
    with pytest.raises(UsageError, match=r"from 24 to 64 features: .* multiples of 16 — keep it"):
        _scaled_linear(24, 64, 1.0)


@pytest.mark.parametrize("precision", ["int8-weight", "int4-weight"])
def test_integer_weights(precision: str, tmp_path: Path) -> None:
    policy = Policy(
        precision, "", (Rule("*", "*", "half", ""), Rule("conditioner", "*", precision, ""))
    )
    names = ["conditioner"]
    folders = [
        export(tmp_path / dialect, checkpoint_path(), names, policy, dialect=dialect)
        / "conditioner"
        for dialect in ("opset23", "program")
    ]
    rng = np.random.default_rng(0)
    feed = {
        "prompt_embeds": rng.standard_normal((2, 9, 256)),
        "pooled": rng.standard_normal((2, 160)),
        "timesteps": np.array([900.0, 100.0]),
    }
    expected, actual = run_ort(folders[0], feed), run_program(folders[1], feed)
    for key, value in expected.items():
        assert relative_error(actual[key], value) <= 2e-3, key
    stored = load_file(folders[1] / TENSORS_FILE)
    kinds = {t.dtype for name, t in stored.items() if name.endswith("linear.weight")}
    assert kinds == {torch.uint8 if precision == "int4-weight" else torch.int8}


@pytest.mark.nightly
def test_fp8_attention_without_guidance(medium_checkpoint: Path, tmp_path: Path) -> None:
    """Against diffusers; Medium's first blocks have two attentions."""
    model = load_transformer(medium_checkpoint)
    arguments = transformer_inputs(model)
    with torch.no_grad():
        truth = model(**arguments).sample.numpy()
    plain = load_policy("fp8")
    rule = Rule("denoiser", "transformer_blocks.*.attn", "fp8", "")
    policy = replace(plain, rules=(*plain.rules, rule))
    # Normalized queries and keys of 64 channels have no value beyond 8.
    operands = {"q": 8.0, "k": 8.0, "v": 8.0, "p": 1.0}
    calibration = replace(
        calibrate(medium_checkpoint, policy),
        bmm={
            f"denoiser/transformer_blocks.{block}.attn.{operand}": amax
            for block in range(len(model.transformer_blocks))
            for operand, amax in operands.items()
        },
    )
    errors = {}
    for dialect, run in (("opset23", run_ort), ("program", run_program)):
        root = tmp_path / dialect
        export(root, medium_checkpoint, ["conditioner", "denoiser"], policy, calibration, dialect)
        errors[dialect] = relative_error(velocity(root, arguments, run), truth)
    # Of 10 seeds 1.04 to 1.07 times it, which is 0.0028 to 0.0034; by any number of threads.
    assert errors["program"] <= 1.2 * errors["opset23"] <= 0.01


def test_fp8_attention_of_fused_blocks(tmp_path: Path) -> None:
    """Its operands are put out as E4M3 by what makes them; as exact as ONNX makes it."""
    plain = load_policy("fp8")
    rule = Rule("denoiser", "transformer_blocks.*.attn", "fp8", "")
    policy = replace(plain, rules=(*plain.rules, rule))
    model = load_transformer(checkpoint_path())
    operands = {"q": 6.0, "k": 6.0, "v": 6.0, "p": 1.0}
    calibration = replace(
        calibrate(checkpoint_path(), policy),
        bmm={
            f"denoiser/transformer_blocks.{block}.attn.{operand}": amax
            for block in range(len(model.transformer_blocks))
            for operand, amax in operands.items()
        },
    )
    arguments = transformer_inputs(model)
    with torch.no_grad():
        truth = model(**arguments).sample.numpy()
    errors = {}
    for dialect, run in (("opset23", run_ort), ("program", run_program)):
        root, names = tmp_path / dialect, ["conditioner", "denoiser"]
        export(root, checkpoint_path(), names, policy, calibration, dialect)
        errors[dialect] = relative_error(velocity(root, arguments, run), truth)
    assert errors["program"] <= 1.2 * errors["opset23"], errors
    graphs = read_program(root / "denoiser" / PROGRAM_FILE).graphs
    targets = {node.target for node in graphs["block0"].nodes}
    assert "sd35.fp8_attention.default" in targets
    assert "aten.scaled_dot_product_attention.default" not in targets


def test_a_signature_is_there_once(copy: Any) -> None:
    bundle = copy("fp8", "program")
    program = read_program(bundle.root / "denoiser" / PROGRAM_FILE)
    calls = [step.graph for step in program.steps if isinstance(step, Call)]
    assert calls == ["head", *["block0"] * 5, "block1", "tail"]
    assert set(program.graphs) == set(calls)


@pytest.mark.parametrize(
    ("join", "key_amax", "expected"),
    [(True, 1.0, {"joined", "joined_added"}), (True, 2.0, {"joined_added"}), (False, 1.0, set())],
)
def test_what_is_joined(join: bool, key_amax: float, expected: set[str]) -> None:
    """Query, key and value where they read what was rounded in one way, if it is asked for."""
    with fake_tensors():
        part = build_part("transformer", Checkpoint(checkpoint_path()))
        for name, module in list(part.named_modules()):
            if isinstance(module, ExportLinear) and re.search(
                r"attn\.(to_[qkv]|add_._proj)$", name
            ):
                parent, _, child = name.rpartition(".")
                layer = Fp8Linear(module, key_amax if child == "to_k" else 1.0)
                setattr(part.get_submodule(parent), child, layer)
        use_torch_layers(part, join)
    actual = {name.rpartition(".")[2] for name, m in part.named_modules() if hasattr(m, "compose")}
    assert actual == expected
