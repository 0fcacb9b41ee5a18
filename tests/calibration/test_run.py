"""Calibrating random checkpoints: what is recorded, stopping and going on, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import asdict
from random_checkpoints import damaged

from sd35_trt.calibration import quantizers, ranges, run
from sd35_trt.calibration.calibrate import CalibrateOptions, calibrate, prepare
from sd35_trt.calibration.prompts import digest, read_prompts
from sd35_trt.calibration.state import Identity
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ControlNet, ModelOptions
from sd35_trt.checkpoints.scheduler import write_scheduler
from sd35_trt.errors import CheckpointError, Sd35Error, UsageError
from sd35_trt.export.component import fp8_layers as layers_in_fp8
from sd35_trt.formats.bundle import Scheduler
from sd35_trt.formats.calibration import DESCRIPTION, TENSORS, Calibration, PromptsIdentity
from sd35_trt.mini import (
    calibration_path,
    calibration_prompts_path,
    checkpoint_path,
    controlnet_paths,
)
from sd35_trt.policies import load_policy

PROMPTS = ["a red kite", "three tabby cats", "no rain today", "left of it", "a small blue star"]

_FP8_EVERYWHERE = """
name = "wide"
[[rule]]
component = "*"
match = "*"
precision = "half"
reason = "the rest"
[[rule]]
component = "denoiser"
match = "transformer_blocks.*.attn"
precision = "fp8"
reason = "attention matmuls"
[[rule]]
component = "conditioner"
match = "*norm1.linear"
precision = "fp8"
reason = "some of the other component of the same part"
[[rule]]
component = "t5"
match = "*.wi_0"
precision = "fp8"
reason = "some of T5"
[[rule]]
component = "vae_decoder"
match = "decoder.mid_block.attentions.*.to_q"
precision = "fp8"
reason = "some of the mid-block"
"""


@pytest.fixture
def options(tmp_path: Path, large_checkpoint: Path) -> CalibrateOptions:
    """Two steps of a random model like Large, at two sizes."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    return CalibrateOptions(
        model=str(large_checkpoint), policy="half", prompts=prompts, steps=2, guidance=3.0,
        sizes=((64, 64), (96, 64)), seed=3, batch=2, out=tmp_path / "out",
    )  # fmt: skip


def kept(options: CalibrateOptions) -> Path:
    """Where an unfinished run keeps its state."""
    return options.out.parent / f".{options.out.name}.calibrating"


def fp8_layers(root: Path, policy: str) -> set[str]:
    """By the exporter's own reading of checkpoint and policy."""
    from sd35_trt.checkpoints.diffusers import Checkpoint
    from sd35_trt.export.component import build_part, fake_tensors
    from sd35_trt.export.layers import ExportLinear
    from sd35_trt.export.part_layers import component_layers

    rules, names = load_policy(policy), set()
    for component, part in (("conditioner", "transformer"), ("denoiser", "transformer"),
                            ("t5", "text_encoder_3"), ("vae_decoder", "vae")):  # fmt: skip
        with fake_tensors():
            layers = component_layers(build_part(part, Checkpoint(root)), component)
        for name, layer in layers.items():
            linear = isinstance(layer, ExportLinear)
            if linear and rules.rule(component, name, linear).precision == "fp8":
                names.add(f"{component}/{name}")
    return names


@pytest.mark.parametrize("structure", [pytest.param("large", marks=pytest.mark.nightly), "medium"])
def test_scales_are_those_of_the_policy(
    structure: str, options: CalibrateOptions, request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(f"{structure}_checkpoint")
    options = replace(options, model=str(root), policy="fp8", sizes=((64, 64),), steps=1, limit=2)
    result = calibrate(options)
    assert set(result.inputs) == fp8_layers(root, "fp8")
    assert len(result.inputs) > 20
    assert result.bmm == {}
    assert Calibration.load(options.out) == result
    result.check(result.provenance.files or {}, fp8_layers(root, "fp8"))


def test_a_policy_with_fp8_in_every_part(options: CalibrateOptions, tmp_path: Path) -> None:
    (tmp_path / "wide.toml").write_text(_FP8_EVERYWHERE)
    options = replace(options, policy=str(tmp_path / "wide.toml"), limit=2)
    result = calibrate(options)
    assert set(result.inputs) == fp8_layers(Path(options.model), options.policy)
    assert {name.partition("/")[0] for name in result.inputs} == {
        "conditioner",
        "t5",
        "vae_decoder",
    }
    attentions = [f"denoiser/transformer_blocks.{k}.attn" for k in range(3)]
    assert set(result.bmm) == {f"{name}.{x}" for name in attentions for x in "qkvp"}
    assert result.bmm[f"{attentions[0]}.v"] == max(
        result.activations[f"{attentions[0]}.{layer}"] for layer in ("to_v", "add_v_proj")
    )
    assert result.bmm[f"{attentions[0]}.p"] == 1.0
    result.check(result.provenance.files or {}, result.inputs, attentions)


def test_amax_is_what_the_pipeline_computes(options: CalibrateOptions) -> None:
    """Against diffusers drawing the same prompts by itself, one at a time."""
    result = calibrate(options)
    settings, _ = prepare(options)
    pipe = run.load(settings, settings.parts)
    names = {
        "transformer": ["transformer_blocks.1", "proj_out", "transformer_blocks.2.ff.net.0.proj"],
        "text_encoder_3": ["encoder.block.1", "encoder.block.1.layer.1.DenseReluDense.wo"],
        "text_encoder_2": ["text_model.encoder.layers.0"],
        "vae": ["decoder.mid_block", "decoder.up_blocks.3.resnets.0.conv1"],
    }
    component = {"transformer": "denoiser", "text_encoder_3": "t5", "text_encoder_2": "clip_g",
                 "vae": "vae_decoder"}  # fmt: skip
    values: dict[str, float] = {}

    def hook(name: str) -> Callable[..., None]:
        def look(module: Any, inputs: Any, output: Any) -> None:
            first = [output[0]] if "encoder.block" in name else output
            for tensor in [output] if isinstance(output, torch.Tensor) else first:
                values[name] = max(values.get(name, 0.0), float(tensor.abs().max()))

        return look

    for part, modules in names.items():
        for name in modules:
            module = getattr(pipe, part).get_submodule(name)
            module.register_forward_hook(hook(f"{component[part]}/{name}"))
    for i, prompt in enumerate(PROMPTS):
        width, height = options.sizes[i % 2]
        pipe(
            prompt, width=width, height=height, num_inference_steps=2, guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(3 + i), output_type="np",
        )  # fmt: skip
    assert len(values) == 8
    for name, value in values.items():
        assert result.activations[name] == pytest.approx(value, rel=1e-4), name


def test_another_scheduler(options: CalibrateOptions, tmp_path: Path) -> None:
    """Draws with it, even where the model's own cannot be loaded; a run is not gone on with."""
    other = write_scheduler(tmp_path, Scheduler(1.5, 500.0))
    root = shutil.copytree(options.model, tmp_path / "model")
    shutil.rmtree(root / "scheduler")
    settings, provenance = prepare(replace(options, model=str(root), scheduler=other))
    pipe = run.load(settings, ["transformer"])
    assert (pipe.scheduler.config.shift, pipe.scheduler.config.num_train_timesteps) == (1.5, 500)
    assert Identity(**asdict(provenance), batch=1) != Identity(
        **asdict(prepare(options)[1]), batch=1
    )
    with pytest.raises(UsageError, match="--model-variant medium has 24 blocks"):
        prepare(replace(options, variant="medium"))


def test_the_band_is_what_the_latents_do(options: CalibrateOptions) -> None:
    """Against diffusers drawing the same prompts by itself, one at a time."""
    band = calibrate(options).provenance.latents
    assert band is not None
    settings, _ = prepare(options)
    pipe = run.load(settings, settings.parts)
    values: list[list[torch.Tensor]] = [[], []]

    def look(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        values[step].append(tensors["latents"])
        return {}

    for i, prompt in enumerate(PROMPTS):
        width, height = options.sizes[i % 2]
        pipe(
            prompt, width=width, height=height, num_inference_steps=2, guidance_scale=3.0,
            generator=torch.Generator("cpu").manual_seed(3 + i), output_type="latent",
            callback_on_step_end=look,
        )  # fmt: skip
    assert list(band.sigma) == [pytest.approx(float(pipe.scheduler.sigmas[1])), 0.0]
    for step, latents in enumerate(values):
        means = [float(one.mean()) for one in latents]
        deviations = [float(one.std()) for one in latents]
        assert list(band.mean[step]) == pytest.approx([min(means), max(means)], abs=1e-4)
        assert list(band.deviation[step]) == pytest.approx(
            [min(deviations), max(deviations)], rel=1e-3
        )


def test_ranges_cover_every_layer_and_block(options: CalibrateOptions) -> None:
    from sd35_trt.checkpoints.diffusers import Checkpoint
    from sd35_trt.export.inventory import inventory

    result = calibrate(replace(options, steps=1, limit=2, guidance=1.0))
    assert result.inputs == result.bmm == {}
    layers = inventory(Checkpoint(Path(options.model)), load_policy("half"))
    missing = {f"{e.component}/{e.layer}" for e in layers} - set(result.activations)
    # The position table is the exporter's own layer; its sum with the patches is recorded.
    assert missing == {"denoiser/pos_embed.pos_embed"}
    assert "denoiser/pos_embed" in result.activations
    assert {"denoiser/transformer_blocks.0", "t5/encoder.block.1.layer.1",
            "t5/encoder.block.1.layer.1.DenseReluDense.dropout",
            "clip_l/text_model.encoder.layers.1"} <= set(result.activations)  # fmt: skip


def test_provenance(options: CalibrateOptions) -> None:
    from sd35_trt.formats.bundle import sha256_file

    calibrate(replace(options, steps=1, limit=2, command="sd35-trt calibrate …"))
    description = json.loads((options.out / DESCRIPTION).read_text("utf-8"))
    root = Path(options.model)
    for file, sha256 in description["files"].items():
        assert sha256_file(root / file) == sha256
    assert {file.split("/")[0] for file in description["files"]} == {
        "scheduler", "transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3",
    }  # fmt: skip
    assert description["policy"] == {"name": "half", "sha256": load_policy("half").digest()}
    assert description["prompts"]["count"] == 2
    assert (description["steps"], description["guidance"], description["seed"]) == (1, 3.0, 3)
    assert description["sizes"] == [[64, 64], [96, 64]]
    assert (description["method"], description["dtype"]) == ("max", "fp32")
    assert description["command"] == "sd35-trt calibrate …"
    assert {"torch", "diffusers", "nvidia-modelopt", "sd35-trt"} <= set(description["versions"])


class _Stopped(BaseException):
    """As a signal would."""


def stop_at(call: int) -> Callable[[str, int, int], None]:
    """A progress callback that stops the run at the given call."""
    calls = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls > call:
            raise _Stopped(stage)

    return progress


def test_stopped_and_resumed_equals_uninterrupted(options: CalibrateOptions) -> None:
    options = replace(options, policy="fp8")
    whole = calibrate(options)
    calls: list[tuple[str, int, int]] = []
    stopped = replace(options, out=options.out.with_name("stopped"))
    attempts = 0
    drawn = 0
    while drawn < 2:
        with pytest.raises(_Stopped):
            calibrate(stopped, stop_at(4))
        assert not stopped.out.exists()
        drawn = json.loads((kept(stopped) / "progress.json").read_text())["done"].get("drawing", 0)
        attempts += 1
    assert attempts > 2
    again = calibrate(stopped, lambda *report: calls.append(report))
    assert (again.inputs, again.activations) == (whole.inputs, whole.activations)
    assert again.provenance.latents == whole.provenance.latents
    assert again.digest() == whole.digest()
    # The attempts finished two of three batches, which the last did not draw again.
    assert calls[:2] == [("encoding", 4, 4), ("drawing", 6, 10)]
    assert not kept(stopped).exists()


@pytest.mark.nightly
def test_killed_at_any_moment(options: CalibrateOptions, tmp_path: Path) -> None:
    """What is on disk at some moment is what a kill leaves."""
    moments: list[Path] = []

    def progress(*report: Any) -> None:
        moments.append(tmp_path / f"moment-{len(moments)}")
        shutil.copytree(kept(options), moments[-1])

    whole = calibrate(options, progress)
    shutil.rmtree(options.out)
    for moment in (moments[3], moments[-2]):
        (moment / "progress.json.partial").write_text('{"half a file')
        shutil.copytree(moment, kept(options))
        assert calibrate(options) == whole
        shutil.rmtree(options.out)
    shutil.copytree(moments[-2], kept(options))
    state = kept(options) / "progress.json"
    state.write_text(state.read_text()[:-9])
    assert calibrate(options) == whole, "a damaged state is not used"


@pytest.mark.parametrize(
    "change", [{"seed": 4}, {"steps": 1}, {"guidance": 2.0}, {"batch": 1}, {"policy": "fp32"}]
)
def test_another_run_does_not_go_on_from_the_state(
    change: dict[str, Any], options: CalibrateOptions
) -> None:
    with pytest.raises(_Stopped):
        calibrate(options, stop_at(3))
    calls: list[tuple[str, int, int]] = []

    def first_call(*report: Any) -> None:
        calls.append(report)
        raise _Stopped

    with pytest.raises(_Stopped):
        calibrate(replace(options, command="another way to say it"), first_call)
    assert calls.pop()[1] > 0
    with pytest.raises(_Stopped):
        calibrate(replace(options, **change), first_call)
    assert calls.pop()[1] == 0


def test_two_at_once_are_refused(options: CalibrateOptions) -> None:
    def again(*report: Any) -> None:
        calibrate(options)

    with pytest.raises(Sd35Error, match=r"another process is calibrating to .*out"):
        calibrate(options, again)


@pytest.mark.parametrize("policy", ["half", "fp8"])
def test_nan_names_the_module(policy: str, options: CalibrateOptions, tmp_path: Path) -> None:
    tensor = "transformer_blocks.1.ff.net.0.proj.weight"
    root = damaged(Path(options.model), tmp_path / "nan", "transformer", tensor, float("nan"))
    with pytest.raises(Sd35Error) as caught:
        calibrate(replace(options, model=str(root), policy=policy))
    name = "denoiser/transformer_blocks.1.ff.net.0.proj"
    assert str(caught.value).startswith(f"the output of {name} has nan during calibration — ")
    assert not options.out.exists()


def test_infinity_names_the_module(options: CalibrateOptions, tmp_path: Path) -> None:
    tensor = "encoder.block.0.layer.1.DenseReluDense.wi_1.weight"
    root = damaged(Path(options.model), tmp_path / "inf", "text_encoder_3", tensor, float("inf"))
    with pytest.raises(Sd35Error, match=r"t5/encoder.block.0.layer.1.DenseReluDense.wi_1 has"):
        calibrate(replace(options, model=str(root)))


def test_nan_between_modules_names_the_one_before() -> None:
    """modelopt sees the inputs of linears, which need not be the output of a module."""
    models = {part: torch.nn.Sequential(torch.nn.Identity()) for part in ("transformer", "vae")}
    recorders = {part: ranges.RangeRecorder(part, model) for part, model in models.items()}
    for part in ("vae", "transformer"):
        models[part].add_module("1", torch.nn.Linear(2, 2))
        quantizers.insert_quantizers(models[part], ["1.input_quantizer"])
        models[part][0](torch.zeros(1))
        nan = torch.full((2,), torch.nan)
        collect = models[part][1].input_quantizer._calibrator.collect
        component = {"vae": "vae_encoder", "transformer": "denoiser"}[part]
        message = f"^what follows {component}/0 has nan during calibration"
        with pytest.raises(Sd35Error, match=message), run.diagnosed(recorders):
            collect(nan)


def test_another_set_of_quantizers_is_refused() -> None:
    from modelopt.torch.quantization import enable_quantizer

    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    names = {"0.input_quantizer"}
    quantizers.insert_quantizers(model, names)
    enable_quantizer(model, "1.weight_quantizer")
    with pytest.raises(Sd35Error, match=r"2 quantizers .* asks for 1: 1.weight_quantizer is on"):
        quantizers.check_enabled(model, names)
    with pytest.raises(Sd35Error, match=r"7.input_quantizer is not on"):
        quantizers.insert_quantizers(model, ["0.input_quantizer", "7.input_quantizer"])


def test_without_t5(options: CalibrateOptions, tmp_path: Path) -> None:
    from random_checkpoints import Layout, write_checkpoint

    root = write_checkpoint(tmp_path / "model", "medium", Layout(torch.float16, t5=False))
    result = calibrate(replace(options, model=str(root), steps=1, limit=2))
    assert "denoiser/transformer_blocks.3" in result.activations
    assert not [name for name in result.activations if name.startswith("t5/")]


def test_an_older_calibration_is_replaced_and_nothing_else(options: CalibrateOptions) -> None:
    options = replace(options, steps=1, limit=2)
    first = calibrate(options)
    second = calibrate(replace(options, seed=9))
    assert Calibration.load(options.out) == second
    assert second.digest() != first.digest()
    assert {p.name for p in options.out.iterdir()} == {DESCRIPTION, TENSORS}
    other = options.out.with_name("other")
    other.mkdir()
    (other / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="other is not empty and holds no calibration"):
        calibrate(replace(options, out=other))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"policy": "fp9"}, UsageError, "unknown policy 'fp9'"),
        ({"model": "/nowhere"}, CheckpointError, "/nowhere is missing"),
        ({"prompts": Path("/nowhere.txt")}, UsageError, "cannot read prompt file"),
        ({"device": "cuda:99"}, UsageError, "device 'cuda:99' cannot be used: .* --device cpu"),
        ({"device": "abacus"}, UsageError, "device 'abacus' cannot be used"),
        ({"sizes": ((64, 72),)}, UsageError, "--size 64x72 is not within 16:384 in steps of 16"),
        ({"sizes": ((64, 64),) * 9}, UsageError, "9 sizes but 5 prompts"),
    ],
)
def test_refused(
    change: dict[str, Any], error: type[Sd35Error], words: str, options: CalibrateOptions
) -> None:
    with pytest.raises(error, match=words) as caught:
        calibrate(replace(options, **change))
    assert " — " in str(caught.value)
    assert not options.out.exists()
    assert not kept(options).exists()


def test_sizes_take_turns(options: CalibrateOptions) -> None:
    settings, _ = prepare(options)
    assert [(b.size, b.indices) for b in settings.batches()] == [
        ((64, 64), (0, 2)), ((64, 64), (4,)), ((96, 64), (1, 3)),
    ]  # fmt: skip
    settings, provenance = prepare(replace(options, limit=3))
    assert settings.prompts == (PROMPTS[0], PROMPTS[1], PROMPTS[3])
    assert provenance.prompts is not None
    assert provenance.prompts.count == 3


def test_the_packaged_calibration_belongs_to_the_packaged_checkpoint() -> None:
    """And to the packaged ControlNet. After another one is packaged: make calibration."""
    from sd35_trt.formats.bundle import sha256_file

    root, packaged = checkpoint_path(), Calibration.load(calibration_path())
    files = {
        file: sha256_file(root / file)
        for file in packaged.provenance.files or {}
        if not file.startswith("control_canny/")
    }
    net = controlnet_paths()["canny"]
    files |= {f"control_canny/{path.name}": sha256_file(path) for path in net.iterdir()}
    nets = (ControlNet("canny", "mini:canny"),)
    model = look(ModelOptions(controlnets=nets))
    linears, _ = layers_in_fp8(model.checkpoint, model.components, load_policy("fp8"))
    assert fp8_layers(root, "fp8") < set(linears)
    packaged.check(files, linears)
    provenance = packaged.provenance
    assert provenance.policy is not None
    assert provenance.policy.name == "fp8"
    assert provenance.latents is not None
    assert len(provenance.latents.sigma) == provenance.steps
    prompts = digest(read_prompts(calibration_prompts_path()))
    assert packaged.provenance.prompts == PromptsIdentity(prompts, 128)
