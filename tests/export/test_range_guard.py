"""The range guard: checkpoints made to exceed FP16."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from calibrations import calibrate, load_transformer, transformer_inputs
from components import export, run_program, run_reference, velocity
from conftest import relative_error
from diffusers import AutoencoderKL
from random_checkpoints import CLIP_TOKENS
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from sd35_trt.calibration.ranges import RangeRecorder
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.export.component import MODEL_FILE, apply_policy, build_part, fake_tensors
from sd35_trt.export.scales import HALF_LIMIT, HALF_MAX, Scales
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.policies import Policy, Rule, load_policy

HALF = load_policy("half")
T5_FP8 = Policy("T5's output layers in FP8", "", (*HALF.rules, Rule("t5", "*.wo", "fp8", "")))

#: What FP16 rounding alone does to these models is below it.
TOLERANCE = 5e-3


def scaled(
    checkpoint: Path, out: Path, part: str, change: Callable[[str, torch.Tensor], torch.Tensor]
) -> Path:
    """A copy of a checkpoint with some weights of one part changed."""
    shutil.copytree(checkpoint, out)
    (file,) = (out / part).glob("*.safetensors")
    tensors = load_file(file)
    save_file({name: change(name, tensor).contiguous() for name, tensor in tensors.items()}, file)
    return out


def places(folder: Path) -> dict[str, float]:
    actual: dict[str, float] = json.loads((folder / "component.json").read_text())["fp32_places"]
    return actual


def scale_transformer(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.startswith("transformer_blocks.0.attn.to_v."):
        return tensor * 1e5
    if name == "transformer_blocks.0.attn.to_out.0.weight":
        return tensor * 1e-4
    if name.startswith("transformer_blocks.0.ff_context.net.0.proj."):
        return tensor * 3e4
    if name == "transformer_blocks.0.ff_context.net.2.weight":
        return tensor * 1e-3
    if name.startswith("transformer_blocks.1.ff.net.2."):
        return tensor * 1e5
    if name == "transformer_blocks.1.norm1.linear.bias":
        # The gate of the feed-forward: opened, so that the residual stream overflows too.
        tensor = tensor.clone()
        tensor[-len(tensor) // 6 :] += 2
    return tensor


@pytest.mark.nightly
@pytest.mark.parametrize("dialect", ["opset23", "program"])
def test_a_transformer_that_exceeds_fp16(
    dialect: str, large_checkpoint: Path, tmp_path: Path
) -> None:
    checkpoint = scaled(large_checkpoint, tmp_path / "model", "transformer", scale_transformer)
    model = load_transformer(checkpoint)
    arguments = transformer_inputs(model)
    with torch.no_grad():
        expected = model(**arguments).sample.numpy()
        halves = {k: v if k == "timestep" else v.half() for k, v in arguments.items()}
        assert not model.half()(**halves).sample.isfinite().all(), "FP16 is too narrow for it"
    calibration = calibrate(checkpoint, HALF)
    names = ["conditioner", "denoiser"]
    guarded = export(tmp_path / "guarded", checkpoint, names, HALF, calibration, dialect)
    output = velocity(guarded, arguments, run_reference if dialect == "opset23" else run_program)
    assert relative_error(output, expected) <= TOLERANCE
    actual = places(guarded / "denoiser")
    assert set(actual) >= {
        "denoiser/transformer_blocks.0.attn.to_v",
        "denoiser/transformer_blocks.0.ff_context.net.0.proj",
        "denoiser/transformer_blocks.1.ff.net.2",
        "denoiser/transformer_blocks.1",
        "denoiser/transformer_blocks.2",
    }
    assert "denoiser/transformer_blocks.0" not in actual
    assert all(amax > HALF_LIMIT for amax in actual.values())
    assert not places(guarded / "conditioner")


def scale_t5(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.endswith("block.0.layer.1.DenseReluDense.wo.weight"):
        return tensor * 1e4
    if name.endswith(
        ("block.1.layer.1.DenseReluDense.wi_0.weight", "1.DenseReluDense.wi_1.weight")
    ):
        return tensor * 1e2
    return tensor


def t5_state(checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Token ids, and the encoder's hidden state in FP32."""
    model = T5EncoderModel.from_pretrained(checkpoint, subfolder="text_encoder_3").float().eval()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, 24), generator=generator)
    with torch.no_grad():
        return ids.numpy(), model(ids).last_hidden_state.numpy()


@pytest.mark.parametrize("policy", ["half", "int8-weight"])
def test_t5_in_half_needs_no_range(policy: str, large_checkpoint: Path, tmp_path: Path) -> None:
    """Its residual stream and feed-forward product are of any size, calibrated or not."""
    checkpoint = scaled(large_checkpoint, tmp_path / "model", "text_encoder_3", scale_t5)
    ids, expected = t5_state(checkpoint)
    folder = export(tmp_path, checkpoint, ["t5"], load_policy(policy)) / "t5"
    hidden = run_reference(folder, {"input_ids": ids})["hidden"]
    assert relative_error(hidden, expected) <= (TOLERANCE if policy == "half" else 0.02)
    assert not places(folder)
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    weights = graph.initializer
    # TensorRT would copy the weights of products that read the same tensor.
    computed = {n for node in graph.node if node.op_type != "DequantizeLinear" for n in node.output}
    read = [n.input[0] for n in graph.node if n.op_type == "MatMul" and n.input[1] not in computed]
    assert len(read) == len(set(read)) == 14, "seven in each of two blocks"
    assert not [
        w.name for w in weights if w.data_type == onnx.TensorProto.FLOAT and len(w.dims) > 1
    ]


def test_a_t5_in_fp8_that_exceeds_fp16(large_checkpoint: Path, tmp_path: Path) -> None:
    """Its residual stream, and the product of two feed-forward halves that are in range."""
    checkpoint = scaled(large_checkpoint, tmp_path / "model", "text_encoder_3", scale_t5)
    ids, expected = t5_state(checkpoint)
    ranges = calibrate(checkpoint, T5_FP8)
    errors = {}
    for name, record in (("bare", replace(ranges, activations={})), ("guarded", ranges)):
        folder = export(tmp_path / name, checkpoint, ["t5"], T5_FP8, record) / "t5"
        hidden = run_reference(folder, {"input_ids": ids})["hidden"]
        errors[name] = relative_error(hidden, expected)
    assert not errors["bare"] <= 0.3, "NaN or saturated"
    assert errors["guarded"] <= 0.1
    actual = places(tmp_path / "guarded" / "t5")
    block = "t5/encoder.block.{}"
    feed_forward = block + ".layer.1.DenseReluDense.{}"
    assert actual[block.format(0)] > HALF_MAX
    assert actual[feed_forward.format(0, "wo")] > HALF_MAX
    assert actual[feed_forward.format(1, "dropout")] > HALF_LIMIT
    assert feed_forward.format(1, "wi_0") not in actual


def scale_clip(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.startswith("text_model.encoder.layers.0.mlp.fc2."):
        return tensor * 2e5
    if name.startswith("text_model.encoder.layers.1.self_attn.v_proj."):
        return tensor * 1e5
    if name == "text_model.encoder.layers.1.self_attn.out_proj.weight":
        return tensor * 1e-4
    return tensor


def test_a_clip_that_exceeds_fp16(large_checkpoint: Path, tmp_path: Path) -> None:
    """Its penultimate state is the residual stream, which the component returns."""
    checkpoint = scaled(large_checkpoint, tmp_path / "model", "text_encoder", scale_clip)
    model = CLIPTextModelWithProjection.from_pretrained(checkpoint, subfolder="text_encoder")
    model.float().eval()
    recorder = RangeRecorder("text_encoder", model)
    ids = torch.arange(2 * CLIP_TOKENS).reshape(2, -1)
    with torch.no_grad():
        expected = model(ids, output_hidden_states=True)
    ranges = Calibration({}, recorder.amax, {}, Provenance())
    folder = export(tmp_path, checkpoint, ["clip_l"], HALF, ranges) / "clip_l"
    output = run_reference(folder, {"input_ids": ids.numpy()})
    assert np.abs(output["hidden"]).max() > HALF_MAX
    assert relative_error(output["hidden"], expected.hidden_states[-2].numpy()) <= TOLERANCE
    assert relative_error(output["pooled"], expected.text_embeds.numpy()) <= TOLERANCE
    # What reads text features takes them in FP32.
    assert Scales.of(ranges, "transformer").wide_text


def scale_vae(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if name.startswith(
        ("decoder.mid_block.resnets.0.conv2.", "decoder.up_blocks.1.resnets.0.conv1.")
    ):
        return tensor * 1e5
    if name.startswith("decoder.mid_block.attentions.0.to_v."):
        return tensor * 3e4
    return tensor


@pytest.mark.nightly
def test_an_autoencoder_that_exceeds_fp16(large_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = scaled(large_checkpoint, tmp_path / "model", "vae", scale_vae)
    vae = AutoencoderKL.from_pretrained(checkpoint, subfolder="vae").float().eval()
    recorder = RangeRecorder("vae", vae)
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        image = vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor).sample
    expected = ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().numpy()
    ranges = Calibration({}, recorder.amax, {}, Provenance())
    folder = export(tmp_path, checkpoint, ["vae_decoder"], HALF, ranges) / "vae_decoder"
    output = run_reference(folder, {"latents": latents.numpy()})["image"]
    assert expected.std() > 10, "a picture"
    assert np.abs(output - expected).max() <= 1
    assert "vae_decoder/decoder.mid_block.resnets.1" in places(folder)


def test_places_that_are_safe_are_left_alone(large_checkpoint: Path) -> None:
    """T5's residual stream, by its output layers in FP32 or in half precision."""
    block = "t5/encoder.block.0"
    wi = f"{block}.layer.1.DenseReluDense.wi_0"
    wide = {block: 1e5, wi: 2e4, f"{block}.layer.1.DenseReluDense.wo": 1e5}
    fp32 = Policy("wo in FP32", "", (*HALF.rules, Rule("t5", "*.wo", "fp32", "")))
    for policy, expected in ((HALF, {wi: 2e4}), (fp32, {wi: 2e4}), (T5_FP8, wide)):
        scales = Scales(
            wide=wide,
            inputs={
                f"{block}.layer.1.DenseReluDense.wo": 10.0,
                "t5/encoder.block.1.layer.1.DenseReluDense.wo": 10.0,
            },
        )
        with fake_tensors():
            part = build_part("text_encoder_3", Checkpoint(large_checkpoint))
            assert apply_policy(part, "t5", policy, scales) == expected


def test_what_counts_as_wide() -> None:
    values = {
        "denoiser/proj_out": HALF_LIMIT,
        "denoiser/transformer_blocks.0": 2e4,
        "conditioner/transformer_blocks.0.norm1.linear": 1000.0,
        "conditioner/transformer_blocks.1.norm1_context.linear": 2000.0,
        "t5/encoder.final_layer_norm": 1e5,
    }
    ranges = Calibration({}, values, {}, Provenance())
    scales = Scales.of(ranges, "transformer")
    # The bound of what a modulation of 2000 does to a normalized vector exceeds FP16.
    assert scales.wide == {
        "denoiser/transformer_blocks.0": 2e4,
        "denoiser/transformer_blocks.1.norm1_context": pytest.approx(102050),
    }
    assert scales.wide_text
    assert Scales.of(ranges, "text_encoder_3").wide == {"t5/encoder.final_layer_norm": 1e5}
    assert Scales.of(ranges, "vae").describe("vae_decoder") == {}, (
        "stages without places are those of half"
    )
