"""Single-file checkpoints: tensors, configurations and pictures as from a diffusers directory."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from against_diffusers import check, load_diffusers
from calibrations import load_transformer, transformer_inputs
from components import export, velocity
from conftest import relative_error
from originals import (
    BESIDE,
    PARTS,
    PREFIXES,
    original,
    part_tensors,
    quantized_layers,
    save,
    write_single,
)
from random_checkpoints import Layout, kept_checkpoint
from safetensors.torch import load_file

from sd35_trt.build import BuildOptions, build
from sd35_trt.calibration.calibrate import CalibrateOptions, calibrate
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.checkpoints.input_scales import stored_magnitudes
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.original import LAYOUTS
from sd35_trt.checkpoints.single_file import SingleFileCheckpoint, open_checkpoint
from sd35_trt.checkpoints.structure import PUBLISHED, Structure
from sd35_trt.components import COMPONENTS
from sd35_trt.errors import BundleError, CheckpointError, Sd35Error, UsageError
from sd35_trt.export.component import apply_policy, build_part, fake_tensors, fp8_layers
from sd35_trt.export.inventory import inventory
from sd35_trt.export.scales import Scales
from sd35_trt.export.weights import read_parameter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.mini import checkpoint_path
from sd35_trt.planning.options import PlanOptions
from sd35_trt.planning.run import plan
from sd35_trt.policies import Policy, Rule, load_policy
from sd35_trt.quality.reference import open_reference
from sd35_trt.runtime import Pipeline
from sd35_trt.store.cache import StageCache
from sd35_trt.variants import recognise

SPELLINGS = ("scaled_fp8", "comfy_quant", "metadata")
STEM = "sd3.5_thing"


@pytest.fixture(scope="session")
def sources(stage_cache: Path) -> dict[str, Path]:
    """Random checkpoints in the diffusers layout; what shapes do not show is as published."""
    cache = StageCache(stage_cache)
    return {
        name: kept_checkpoint(cache, name, Layout(published=True)) for name in ("large", "medium")
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "models" / f"{STEM}.safetensors"


# What is in the file.

LAYOUT_CASES = {
    "all in one": {"parts": PARTS},
    "all in one, BF16": {"parts": PARTS, "dtype": torch.bfloat16},
    "as Stability's": {"parts": ("transformer", "vae"), "dtype": torch.float16},
    "the transformer alone": {"parts": ("transformer",)},
}


@pytest.mark.parametrize("case", LAYOUT_CASES)
@pytest.mark.parametrize("structure", ["large", pytest.param("medium", marks=pytest.mark.nightly)])
def test_every_tensor(structure: str, case: str, sources: dict[str, Path], file: Path) -> None:
    options = LAYOUT_CASES[case]
    write_single(sources[structure], file, **options)
    checkpoint, reference = open_checkpoint(file), Checkpoint(sources[structure])
    for part in PARTS:
        expected = part_tensors(sources[structure], part)
        weights = checkpoint.weights(part)
        for name, tensor in expected.items():
            actual = weights.read(name)
            source = tensor.to(options.get("dtype", tensor.dtype))
            assert actual.dtype == source.dtype or name == "text_projection.weight"
            assert torch.equal(actual, source.to(actual.dtype)), (part, name)
            assert weights.shape(name) == tuple(tensor.shape)
        config, published = checkpoint.config(part), reference.config(part)
        keys = {key for key in config if key in published and key != "sample_size"}
        assert len(keys) > 5
        for key in keys:
            both = (config[key], published[key])
            assert tuple(np.atleast_1d(both[0])) == tuple(np.atleast_1d(both[1])), (part, key)
        with fake_tensors():
            build_part(part, checkpoint)
        inside = file if part in options["parts"] else file.parent / BESIDE[part]
        assert checkpoint.files(part) == [inside]


def test_diffusers_reads_the_files_alike(sources: dict[str, Path]) -> None:
    """The files that these tests write are what diffusers' own converters take."""
    from diffusers.loaders.single_file_utils import (
        convert_ldm_vae_checkpoint,
        convert_sd3_transformer_checkpoint_to_diffusers,
    )

    for source in sources.values():
        for part, convert in (
            ("transformer", convert_sd3_transformer_checkpoint_to_diffusers),
            ("vae", lambda t: convert_ldm_vae_checkpoint(t, Checkpoint(source).config("vae"))),  # noqa: B023
        ):
            originals = {PREFIXES[part] + k: v for k, v in original(source, part).items()}
            actual, expected = convert(originals), part_tensors(source, part)
            assert set(actual) == set(expected)
            for name, tensor in expected.items():
                assert torch.equal(actual[name].reshape(tensor.shape), tensor), name


def test_a_tensor_is_a_view(sources: dict[str, Path], file: Path) -> None:
    """Nothing is held in memory: rows of a fused projection are the file's own."""
    weights = open_checkpoint(write_single(sources["large"], file)).weights("transformer")
    q, k = (weights.read(f"transformer_blocks.0.attn.to_{x}.weight") for x in "qk")
    assert k.storage_offset() - q.storage_offset() == q.numel()
    assert q.untyped_storage().nbytes() == 3 * q.numel() * q.element_size()


class _Shapes:
    """Weights of which the shapes alone are known."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]


@pytest.mark.parametrize("model", [name for name in PUBLISHED if name != "large-turbo"])
def test_the_published_models_are_recognised_by_their_shapes(model: str) -> None:
    from diffusers import AutoencoderKL, SD3Transformer2DModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        T5Config,
        T5EncoderModel,
    )

    published = Structure(model)
    classes: dict[str, Callable[[dict[str, Any]], torch.nn.Module]] = {
        "transformer": lambda c: SD3Transformer2DModel(**c),
        "text_encoder": lambda c: CLIPTextModelWithProjection(CLIPTextConfig(**c)),
        "text_encoder_2": lambda c: CLIPTextModelWithProjection(CLIPTextConfig(**c)),
        "text_encoder_3": lambda c: T5EncoderModel(T5Config(**c)),
        "vae": lambda c: AutoencoderKL(**c),
    }
    for part, make in classes.items():
        with torch.device("meta"):
            shapes = _Shapes(make(published.config(part)))
        assert LAYOUTS[part].configure(shapes) == published.config(part)  # type: ignore[arg-type]
    transformer = published.config("transformer")
    assert recognise(transformer, "sd3.5_thing.safetensors").name == model
    if model == "large":
        assert recognise(transformer, "sd3.5_large_turbo.safetensors").name == "large-turbo"


def test_the_file_name_says_turbo(sources: dict[str, Path], tmp_path: Path) -> None:
    """Only its own name: a folder named turbo says nothing."""
    folder = tmp_path / "turbo"
    plain = write_single(sources["large"], folder / "sd3.5_large.safetensors")
    turbo = plain.rename(plain.with_name("sd3.5_Large_Turbo.safetensors"))
    for path, steps in ((plain, 28), (turbo, 4)):
        if not path.exists():
            shutil.copy(turbo, path)
        checkpoint = open_checkpoint(path)
        assert recognise(checkpoint.config("transformer"), checkpoint.hint).steps == steps


def test_without_t5(sources: dict[str, Path], file: Path) -> None:
    write_single(sources["large"], file, parts=("transformer", "vae"))
    (file.parent / BESIDE["text_encoder_3"]).unlink()
    checkpoint = open_checkpoint(file)
    assert not checkpoint.has("text_encoder_3")
    assert checkpoint.has("text_encoder_2")


def test_text_encoders_as_users_have_them(sources: dict[str, Path], file: Path) -> None:
    """In ComfyUI's folders, T5 in FP8 under its file name, a diffusers autoencoder."""
    write_single(sources["large"], file, parts=("transformer",))
    models = file.parent.parent
    shutil.move(file.parent / "text_encoders", models / "text_encoders")
    shutil.rmtree(file.parent / "clip")
    t5 = original(sources["large"], "text_encoder_3", torch.float8_e4m3fn)
    t5["encoder.embed_tokens.weight"] = t5.pop("shared.weight")
    save(t5, models / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors")
    vae = part_tensors(sources["large"], "vae")
    (file.parent / BESIDE["vae"]).unlink()
    save(vae, file.parent / "vae" / "diffusion_pytorch_model.safetensors")
    checkpoint = open_checkpoint(file)
    for name, tensor in vae.items():
        assert torch.equal(checkpoint.weights("vae").read(name), tensor)
    for name, tensor in part_tensors(sources["large"], "text_encoder_3").items():
        actual = checkpoint.weights("text_encoder_3").read(name)
        assert torch.equal(actual.float(), tensor.to(torch.float8_e4m3fn).float()), name
    with fake_tensors():
        build_part("text_encoder_3", checkpoint)


# What it computes.


@pytest.mark.nightly
def test_the_transformer(sources: dict[str, Path], file: Path, tmp_path: Path) -> None:
    """Medium's, with two attentions and a modulation of nine rows."""
    write_single(sources["medium"], file)
    root = export(tmp_path / "out", file, ["conditioner", "denoiser"], "fp32")
    model = load_transformer(sources["medium"])
    arguments = transformer_inputs(model)
    with torch.no_grad():
        exact = model(**arguments, return_dict=False)[0].numpy()
    assert relative_error(velocity(root, arguments), exact) < 1e-5


@pytest.fixture(scope="module")
def single(
    sources: dict[str, Path],
    make_bundle: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path]:
    """A model in one file and others beside it, and its bundle."""
    folder = tmp_path_factory.mktemp("models")
    file = write_single(
        sources["large"], folder / f"{STEM}.safetensors", ("transformer",), tokenizers=False
    )
    return file, make_bundle(model=str(file), tokenizers=sources["large"], size=(64, 128))


@pytest.mark.nightly
def test_the_picture(single: tuple[Path, Path], sources: dict[str, Path]) -> None:
    """As diffusers draws it from the directory."""
    bundle = Bundle.open(single[1])
    with Pipeline(bundle) as pipe:
        peer = load_diffusers(sources["large"])
        check(pipe, peer, guidance=3.0, size=(64, 64), t5_tokens=77, steps=2)
    manifest = bundle.manifest
    assert manifest.model.name == STEM
    name = f"{STEM}.safetensors"
    assert set(manifest.model.files) == {
        f"transformer/{name}",
        *(f"{part}/{Path(beside).name}" for part, beside in BESIDE.items()),
    }
    assert manifest.scheduler.shift == 3.0


@pytest.mark.nightly
def test_half_is_built_of_the_same_file(
    single: tuple[Path, Path],
    stage_cache: Path,
    sources: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle, model = Bundle.open(single[1]), str(single[0])
    requests: list[BuildOptions] = []

    def build(options: BuildOptions, progress: object) -> Path:
        requests.append(options)
        return bundle.root

    monkeypatch.setattr("sd35_trt.build.build", build)
    folder = sources["large"]
    source = ModelOptions(model, tokenizers=folder)
    with open_reference(bundle, "half", source, stage_cache, lambda *_: None):
        pass
    assert [(o.model, o.tokenizers, o.policy) for o in requests] == [(model, folder, "half")]
    path = tmp_path / f"{STEM}.safetensors"
    for parts, words in (
        (("transformer",), r"clip_l\.safetensors differs"),
        (PARTS, r"clip_l\.safetensors is missing"),
    ):
        write_single(sources["medium"], path, parts)
        with (
            pytest.raises(BundleError, match=rf"was not made from .*{words}"),
            open_reference(bundle, "half", ModelOptions(str(path)), stage_cache, lambda *_: None),
        ):
            pass
    assert len(requests) == 1


def test_planning_and_policies(run, sources: dict[str, Path], file: Path) -> None:  # type: ignore[no-untyped-def]
    """Without tokenizers, which neither reads."""
    write_single(sources["medium"], file, tokenizers=False)
    options = {"target": "rtx4060", "size": (128, 128)}
    ours = plan(PlanOptions(model=str(file), **options))  # type: ignore[arg-type]
    expected = plan(PlanOptions(model=str(sources["medium"]), **options))  # type: ignore[arg-type]
    assert ours.model == STEM
    assert ours.components == expected.components
    status, out, _ = run("policy", "show", "--model", file, "--json")
    assert status == 0
    listed = inventory(Checkpoint(sources["medium"]), load_policy("half"))
    assert json.loads(out) == json.loads(json.dumps([dataclasses.asdict(e) for e in listed]))


def test_calibrating(sources: dict[str, Path], file: Path, tmp_path: Path) -> None:
    """diffusers' pipeline has the same activations, put together here."""
    write_single(sources["large"], file, parts=("transformer", "vae"))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red kite\n")
    actual = {}
    for name, model in (("file", file), ("folder", sources["large"])):
        actual[name] = calibrate(
            CalibrateOptions(
                model=str(model), policy="fp8", prompts=prompts, steps=1, guidance=3.0,
                sizes=((64, 64),), out=tmp_path / name,
            )
        )  # fmt: skip
    assert actual["file"].tensors() == actual["folder"].tensors()
    assert f"vae/{STEM}.safetensors" in (actual["file"].provenance.files or {})


# FP8.


def initializers(folder: Path) -> dict[str, Any]:
    model = onnx.load(folder / "model.onnx")
    return {tensor.name: tensor for tensor in model.graph.initializer}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scaled_fp8_has_its_values(spelling: str, sources: dict[str, Path], file: Path) -> None:
    """Read as numbers, a layer is weight times scale; the others are as they were."""
    write_single(sources["medium"], file, spelling=spelling, dtype=torch.bfloat16)
    tensors, weights = load_file(file), open_checkpoint(file).weights("transformer")
    layer = PREFIXES["transformer"] + "joint_blocks.1.x_block.attn2.qkv"
    scale = tensors[layer + (".scale_weight" if spelling == "scaled_fp8" else ".weight_scale")]
    fused = tensors[f"{layer}.weight"].float() * scale
    for index, letter in enumerate("qkv"):
        actual = weights.read(f"transformer_blocks.1.attn2.to_{letter}.weight")
        assert actual.dtype == torch.float32
        assert torch.equal(actual, fused.chunk(3)[index])
    expected = part_tensors(sources["medium"], "transformer")
    for name in expected:
        error = relative_error(weights.read(name).float().numpy(), expected[name].numpy())
        assert error < 0.05, name
        assert (error < 0.004) == (weights.read(name).dtype == torch.bfloat16), name


def fp8_parameters(
    file: Path, component: str, policy: Policy, amax: float | None = None
) -> tuple[list[str], Callable[[str], torch.Tensor]]:
    """The layers that a policy computes in FP8, and what is written for a parameter of them.

    Args:
        amax: of every input; None takes the file's input scales.
    """
    checkpoint, folder = open_checkpoint(file), COMPONENTS[component].part
    names, _ = fp8_layers(checkpoint, [component], policy)
    inputs = stored_magnitudes(checkpoint, names) if amax is None else dict.fromkeys(names, amax)
    assert set(inputs) == set(names)
    scales = Scales.of(Calibration(inputs, {}, {}, Provenance()), folder)
    with fake_tensors():
        part = build_part(folder, checkpoint)
        apply_policy(part, component, policy, scales)
    weights = checkpoint.weights(folder)
    layers = [name.removeprefix(f"{component}/") for name in names]
    return layers, lambda name: read_parameter(part, name, weights)


def stored_layer(file: Path, layer: str) -> tuple[str, torch.Tensor]:
    """A layer's name in the file, and the bytes of its rows there, [out, in]."""
    weights = open_checkpoint(file).weights("transformer")
    source = weights.source(f"{layer}.weight").removesuffix(".weight")
    rows = load_file(file)[f"{source}.weight"].view(torch.uint8)
    if source.endswith("qkv"):
        (letter,) = re.findall(r"(?:to|add)_([qkv])(?:_proj)?$", layer)
        rows = rows.chunk(3)["qkv".index(letter)]
    return source, rows


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_fp8_weights_are_taken_over(spelling: str, sources: dict[str, Path], file: Path) -> None:
    """Byte for byte with the file's scales, in every layer where policy and file agree."""
    write_single(sources["medium"], file, spelling=spelling)
    layers, read = fp8_parameters(file, "denoiser", load_policy("fp8"))
    assert len(layers) > 40
    tensors, old = load_file(file), spelling == "scaled_fp8"
    theirs = ("scale_weight", "scale_input") if old else ("weight_scale", "input_scale")
    for layer in layers:
        source, rows = stored_layer(file, layer)
        assert torch.equal(read(f"{layer}.weight").view(torch.uint8), rows.t()), layer
        for kind, name in zip(("weight_scale", "input_scale"), theirs, strict=True):
            value = read(f"{layer}.{kind}")
            assert value.dtype == torch.float16
            exact = float(tensors[f"{source}.{name}"])
            assert float(value) == pytest.approx(exact, rel=2**-11), layer


def test_plain_fp8_is_taken_over(sources: dict[str, Path], file: Path) -> None:
    """Without a scale, values are what the bytes say."""
    write_single(sources["large"], file, parts=("transformer",))
    t5 = original(sources["large"], "text_encoder_3", torch.float8_e4m3fn)
    (file.parent / BESIDE["text_encoder_3"]).unlink()
    save(t5, file.parent / "t5xxl_fp8_e4m3fn.safetensors")
    rules = (Rule("*", "*", "half", ""), Rule("t5", "encoder.block.*", "fp8", ""))
    layers, read = fp8_parameters(file, "t5", Policy("t5", "", rules), amax=3.0)
    assert len(layers) > 10
    for layer in layers:
        rows = t5[f"{layer}.weight"].view(torch.uint8)
        assert torch.equal(read(f"{layer}.weight").view(torch.uint8), rows.t())
        assert float(read(f"{layer}.weight_scale")) == 1.0


def test_a_scale_that_fp16_cannot_hold(sources: dict[str, Path], file: Path) -> None:
    """Such a weight is quantized again, against the smallest scale there is."""
    write_single(sources["large"], file, spelling="comfy_quant")
    tensors, layer = load_file(file), "transformer_blocks.0.ff.net.0.proj"
    source, _ = stored_layer(file, layer)
    tensors[f"{source}.weight_scale"] = torch.tensor(2.0**-20)
    save(tensors, file)
    _, read = fp8_parameters(file, "denoiser", load_policy("fp8"))
    scale = float(read(f"{layer}.weight_scale"))
    assert scale == torch.finfo(torch.float16).tiny
    exact = tensors[f"{source}.weight"].float().t() * 2.0**-20
    error = (read(f"{layer}.weight").float() * scale - exact).abs().max()
    assert 0 < error <= scale * 2**-5


_FP8_IN_FP32 = """
name = "mixed"
[[rule]]
component = "*"
match = "*"
precision = "fp32"
reason = "as in the other builds of these tests"
[[rule]]
component = "denoiser"
match = "transformer_blocks.*.ff*"
precision = "fp8"
reason = "some of the layers with scales"
"""


@pytest.mark.nightly
def test_a_build_with_the_files_scales(
    sources: dict[str, Path], file: Path, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """No calibration is asked for; the bundle says where the scales are from."""
    write_single(sources["large"], file, ("transformer",), spelling="scaled_fp8")
    policy = tmp_path / "mixed.toml"
    policy.write_text(_FP8_IN_FP32)
    bundle = make_bundle(model=str(file), policy=str(policy), size=(64, 128))
    extract = json.loads((bundle / "calibration.json").read_text())
    assert "input scales" in extract["method"]
    name = f"transformer/{STEM}.safetensors"
    manifest = Bundle.open(bundle).manifest
    assert extract["files"][name] == manifest.model.files[name]
    (component,) = (c for c in manifest.components if c.name == "denoiser")
    # The last block's text stream ends in its attention.
    assert component.precisions["fp8"] == len(extract["amax"]) == 3 * 2 + 2 * 2
    tensors = initializers(bundle / "denoiser")
    for name in extract["amax"]:
        layer = name.removeprefix("denoiser/").removesuffix(".input_amax")
        _, rows = stored_layer(file, layer)
        weight = tensors[f"part.{layer}.weight"]
        assert weight.data_type == onnx.TensorProto.FLOAT8E4M3FN
        assert weight.raw_data == rows.t().contiguous().numpy().tobytes()
    with Pipeline.load(bundle) as pipe:
        assert pipe.generate("a red star", steps=2, size=(64, 64)).images.std() > 1


@pytest.fixture
def refused(tmp_path: Path, stage_cache: Path) -> Callable[..., None]:
    """Asserts that a build is refused in one line with these words and leaves nothing."""

    def check(model: Path, *words: str, **options: Any) -> None:
        out = tmp_path / "work" / "bundle"
        with pytest.raises(Sd35Error) as caught:
            build(BuildOptions(model=str(model), out=out, cache_dir=stage_cache, **options))
        message = str(caught.value)
        assert all(" — " in line for line in message.splitlines())
        for word in words:
            assert word in message, message
        assert not out.exists()

    return check


def test_scales_for_some_layers(
    sources: dict[str, Path], file: Path, refused: Callable[..., None]
) -> None:
    write_single(sources["large"], file, spelling="scaled_fp8")
    tensors = load_file(file)
    input_scale = PREFIXES["transformer"] + "joint_blocks.1.context_block.mlp.fc2.scale_input"
    # The older spelling's 1 is no measurement.
    tensors[input_scale] = torch.tensor(1.0)
    save(tensors, file)
    layer = "denoiser/transformer_blocks.1.ff_context.net.2"
    refused(file, "none for " + layer, "sd35-trt calibrate", policy="fp8")
    for name in list(tensors):
        if name.endswith(".scale_input"):
            tensors[name] = torch.tensor(1.0)
    save(tensors, file)
    refused(file, "needs a calibration", "sd35-trt calibrate", policy="fp8")


def test_unknown_quantization(
    sources: dict[str, Path], file: Path, refused: Callable[..., None]
) -> None:
    write_single(sources["large"], file, spelling="comfy_quant")
    tensors = load_file(file)
    layer = quantized_layers(tensors, PREFIXES["transformer"])[2]

    def changed(**values: torch.Tensor) -> Path:
        save({**tensors, **{f"{layer}.{k}": v for k, v in values.items()}}, file)
        return file

    described = torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)
    packed = torch.zeros(tensors[f"{layer}.weight"].shape, dtype=torch.uint8)
    thirds = torch.ones(3)
    refused(changed(comfy_quant=described), layer, "nvfp4")
    refused(changed(comfy_quant=described[:5]), layer, "unreadable")
    refused(changed(weight=packed), layer, "U8")
    refused(changed(weight_scale=thirds), layer, "weight_scale of shape")
    save(tensors, file, _quantization_metadata=json.dumps({"layers": {layer: {"format": "mxfp8"}}}))
    refused(file, layer, "mxfp8")
    save(tensors, file, _quantization_metadata="{")
    refused(file, "_quantization_metadata")


# Refusals.


@pytest.mark.parametrize("name", ["model.gguf", "model.safetensors"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (bytes(100), ("zeros", "did not finish")),
        (b"GGUF" + bytes(96), ("GGUF",)),
        (b"oid sha256", ("text", "download")),
    ],
)
def test_no_weights(
    name: str,
    content: bytes,
    words: tuple[str, ...],
    tmp_path: Path,
    refused: Callable[..., None],
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    refused(path, name, *words)


def test_no_file(
    tmp_path: Path, refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(Path("models/sd3.5.safetensors"), "models/sd3.5.safetensors is missing")


def test_truncated(sources: dict[str, Path], file: Path, refused: Callable[..., None]) -> None:
    write_single(sources["large"], file)
    file.write_bytes(file.read_bytes()[:100_000])
    refused(file, str(file), "truncated or damaged")


@pytest.mark.parametrize(
    ("key", "title"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "FLUX"),
        ("model.diffusion_model.input_blocks.0.0.weight", "Stable Diffusion 1, 2 or XL"),
        ("transformer_blocks.0.attn.to_q.weight", "one part of a diffusers model"),
        ("lora_unet_joint_blocks_0.lora_down.weight", "a LoRA"),
        ("something", "something else (its first tensor is 'something')"),
    ],
)
def test_another_model(key: str, title: str, file: Path, refused: Callable[..., None]) -> None:
    refused(save({key: torch.zeros(4, 4)}, file), str(file), "not Stable Diffusion 3.5", title)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae"])
def test_a_missing_part(
    part: str, sources: dict[str, Path], file: Path, refused: Callable[..., None]
) -> None:
    write_single(sources["large"], file, parts=("transformer",))
    beside = file.parent / BESIDE[part]
    beside.unlink()
    refused(file, f"no {LAYOUTS[part].title}", beside.name, str(file.parent), beside.parent.name)
    save({"something": torch.zeros(2)}, beside)
    refused(file, str(beside), f"not the model's {LAYOUTS[part].title}")


def test_wrong_shapes(sources: dict[str, Path], file: Path, refused: Callable[..., None]) -> None:
    write_single(sources["large"], file)
    tensors, prefix = load_file(file), PREFIXES["transformer"]
    name = prefix + "joint_blocks.2.x_block.attn.qkv.weight"
    bias = name.removesuffix("weight") + "bias"
    rows = "transformer_blocks.2.attn.to_q.weight' has shape [191, 192]"
    for changed, words in (
        ({**tensors, name: tensors[name][:-3]}, (rows, "[192, 192]")),
        ({k: v for k, v in tensors.items() if k != bias}, (f"no tensor '{bias}' and 2 more",)),
    ):
        save(changed, file)
        with pytest.raises(CheckpointError) as caught, fake_tensors():
            build_part("transformer", open_checkpoint(file))
        for word in (str(file), " again", *words):
            assert word in str(caught.value)
    save({**tensors, f"{prefix}pos_embed": tensors[f"{prefix}pos_embed"][0]}, file)
    refused(file, "shapes of its transformer")
    first = PREFIXES["vae"] + "decoder.conv_in.weight"
    save({**tensors, first: tensors[first][:, :4]}, file)
    refused(file, "the autoencoder put out 4 channels", "takes 16")


def test_tokenizers(
    sources: dict[str, Path],
    file: Path,
    tmp_path: Path,
    refused: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_single(sources["large"], file, tokenizers=False)
    refused(file, "cannot be fetched from the hub", "--tokenizers DIR")
    folder = tmp_path / "tokenizers"
    shutil.copytree(sources["large"] / "tokenizer", folder / "tokenizer")
    refused(file, f"{folder / 'tokenizer_2'} is missing", "--tokenizers DIR", tokenizers=folder)
    refused(checkpoint_path(), "leave out --tokenizers", tokenizers=folder)
    shutil.copytree(sources["large"] / "tokenizer_2", file.parent / "tokenizer_2")
    checkpoint = SingleFileCheckpoint(file)
    assert checkpoint.tokenizer("tokenizer_2") == file.parent / "tokenizer_2"
    with pytest.raises(CheckpointError, match="--tokenizers DIR"):
        checkpoint.tokenizer("tokenizer")
    with pytest.raises(UsageError, match="leave out"):
        open_checkpoint(sources["large"], folder)
