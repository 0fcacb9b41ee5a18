"""The ComfyUI nodes by themselves, with what they use of ComfyUI in its place."""

from __future__ import annotations

import ast
import asyncio
import gc
import inspect
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import random_adapter
from comfy_stand_in import ComfyUI, Declared, Interrupted, stand_in
from conftest import relative_error
from control_nets import every_feature
from node_bundles import picture

from sd35_trt.errors import BundleError, Sd35Error, UsageError
from sd35_trt.runtime import Control, Pipeline
from sd35_trt.runtime.schedule import SAMPLERS

WORKFLOWS = Path(__file__).parents[2] / "comfyui" / "workflows" / "api"
PROMPT = "a small red circle"
SIZE = (128, 64)
SAMPLING: dict[str, Any] = {"seed": 5, "steps": 3, "cfg": 3.0, "sampler": "euler", "shift": 0.0}
QUICK: dict[str, Any] = {"seed": 5, "steps": 3, "guidance": 3.0, "sampler": "euler"}


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini in FP32, with every feature."""
    return make_bundle(**every_feature(tmp_path_factory.mktemp("nets")))


@pytest.fixture(scope="module")
def models(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of ComfyUI's with a bundle and two adapters."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("sd35_bundles", "sd35_adapters"):
        (folder / name).mkdir()
    (folder / "sd35_bundles" / "mini").symlink_to(bundle)
    for seed, name in enumerate(("style", "detail"), 1):
        random_adapter(bundle, folder / "sd35_adapters" / f"{name}.safetensors", seed)
    return folder


@pytest.fixture(scope="module")
def own_comfy(models: Path) -> Iterator[ComfyUI]:
    with stand_in(models) as comfy:
        yield comfy


@pytest.fixture
def comfy(own_comfy: ComfyUI) -> ComfyUI:
    own_comfy.interrupt_at = None
    own_comfy.progress, own_comfy.previewed = [], []
    return own_comfy


@pytest.fixture(scope="module")
def model(own_comfy: ComfyUI) -> Any:
    return own_comfy.run(own_comfy.nodes.LoadBundle, bundle="mini")


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as pipeline:
        yield pipeline


def empty(count: int = 1, channels: int = 16) -> dict[str, Any]:
    return {"samples": torch.zeros(count, channels, SIZE[1] // 8, SIZE[0] // 8)}


def sample(comfy: ComfyUI, model: Any, latent: dict[str, Any], **options: Any) -> Any:
    prompt = comfy.run(comfy.nodes.WritePrompt, prompt=PROMPT, negative="")
    inputs = {**SAMPLING, "denoise": 1.0, **options}
    return comfy.run(comfy.nodes.Sample, model=model, prompt=prompt, latent=latent, **inputs)


def draw(comfy: ComfyUI, model: Any, **options: Any) -> np.ndarray:
    """uint8 [B, H, W, 3]."""
    inputs = {"width": SIZE[0], "height": SIZE[1], "batch_size": 1, "negative": "", **SAMPLING}
    inputs |= {"prompt": PROMPT, **options}
    return pixels(comfy.run(comfy.nodes.DrawPicture, model=model, **inputs))


def pixels(image: torch.Tensor) -> np.ndarray:
    """As ComfyUI's SaveImage writes them."""
    assert image.dtype == torch.float32
    return np.clip(255.0 * image.numpy(), 0, 255).astype(np.uint8)


def test_nodes_say_what_they_take(comfy: ComfyUI) -> None:
    nodes = asyncio.run(asyncio.run(comfy.nodes.comfy_entrypoint()).get_node_list())
    schemas = [node.define_schema() for node in nodes]
    assert len({schema.node_id for schema in schemas}) == len(nodes)
    for node, schema in zip(nodes, schemas, strict=True):
        takes = inspect.signature(node.execute).parameters
        others = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        for declared in schema.inputs:
            assert declared.id in takes or others, (schema.node_id, declared.id)
            if declared.id in takes and declared.options.get("optional"):
                assert takes[declared.id].default == declared.options.get("default")


def test_workflows_give_what_nodes_take(comfy: ComfyUI) -> None:
    nodes = asyncio.run(asyncio.run(comfy.nodes.comfy_entrypoint()).get_node_list())
    schemas = {schema.node_id: schema for schema in (node.define_schema() for node in nodes)}
    used = set()
    for file in sorted(WORKFLOWS.glob("*.json")):
        workflow = json.loads(file.read_text())
        for kind, given in ((n["class_type"], n["inputs"]) for n in workflow.values()):
            if kind not in schemas:
                assert not kind.startswith("Sd35")  # ComfyUI's own
                continue
            used.add(kind)
            declared = {own.id: own for own in schemas[kind].inputs}
            assert given.keys() <= declared.keys()
            assert {n for n, d in declared.items() if not d.options.get("optional")} <= given.keys()
            for name, value in given.items():
                check_input(declared[name], value, workflow, schemas)
    assert used == schemas.keys()


def check_input(declared: Declared, value: Any, workflow: Any, schemas: Any) -> None:
    """A link brings what the input takes, and a number is within its bounds."""
    options = declared.options
    if isinstance(value, list):
        source = schemas.get(workflow[value[0]]["class_type"])
        assert source is None or source.outputs[value[1]].kind == declared.kind
    elif declared.kind in ("INT", "FLOAT"):
        assert options.get("min", value) <= value <= options.get("max", value)
    elif declared.kind == "COMBO" and declared.id in ("device", "sampler", "step_cache"):
        assert value in options["options"]


def test_nodes_use_what_is_public() -> None:
    own = {"sd35_trt.runtime", "sd35_trt.errors"}
    files = sorted((Path(__file__).parents[2] / "comfyui").glob("*.py"))
    assert len(files) > 10
    for file in files:
        for statement in ast.walk(ast.parse(file.read_text())):
            if isinstance(statement, ast.Import):
                assert not any(name.name.startswith("sd35_trt") for name in statement.names)
            elif isinstance(statement, ast.ImportFrom):
                module = statement.module or ""
                assert statement.level or module in own or not module.startswith("sd35_trt")


def test_samplers_are_the_runtimes(comfy: ComfyUI) -> None:
    (own,) = (i for i in comfy.nodes.Sample.define_schema().inputs if i.id == "sampler")
    assert own.options["options"] == list(SAMPLERS)


def test_a_picture_is_the_runtimes_bit_by_bit(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    result = pipe.generate(PROMPT, size=SIZE, batch=2, **QUICK)
    np.testing.assert_array_equal(draw(comfy, model, batch_size=2), result.images)


def test_latents_are_the_vaes(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    result = pipe.generate(PROMPT, size=SIZE, **QUICK)
    latent = sample(comfy, model, empty())
    expected = result.latents / np.float32(1.5305) + np.float32(0.0609)
    np.testing.assert_allclose(latent["samples"].numpy(), expected, rtol=1e-6)
    image = pixels(comfy.run(comfy.nodes.Decode, model=model, latent=latent))
    assert np.abs(image.astype(int) - result.images).max() <= 1


def test_an_empty_latent_of_any_channels(comfy: ComfyUI, model: Any) -> None:
    few, many = (sample(comfy, model, empty(1, channels)) for channels in (4, 16))
    assert torch.equal(few["samples"], many["samples"])


def test_every_part_of_a_schedule(comfy: ComfyUI, model: Any) -> None:
    """The steps are those that are drawn, of as many as KSampler computes."""
    for steps in (1, 2, 3, 7, 20, 28, 33, 50):
        for denoise in np.arange(0.05, 1.001, 0.05).tolist():
            part = comfy.nodes.sample.part_of_schedule(steps, denoise)
            request = model.pipe.request("", latents=np.zeros((16, 8, 8), np.float32), **part)
            assert request.drawn_steps == steps
            assert request.steps == (steps if denoise > 0.9999 else int(steps / denoise))


def test_denoise_draws_on(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    source = picture(*SIZE)
    image = torch.from_numpy(source)[None] / 255
    latent = comfy.run(comfy.nodes.Encode, model=model, image=image)
    drawn = sample(comfy, model, latent, steps=3, denoise=0.6)
    own = pipe.generate(PROMPT, **{**QUICK, "steps": 5}, image=source, strength=0.6)
    expected = comfy.nodes.arrays.latent_of(own.latents)
    assert relative_error(drawn["samples"].numpy(), expected.numpy()) <= 1e-4
    assert sample(comfy, model, latent, denoise=0.0) is latent
    with pytest.raises(UsageError, match=r"the last of 1500.*take fewer steps, or more denoise"):
        sample(comfy, model, latent, steps=15, denoise=0.01)


def test_an_image_of_a_batch_has_its_own_seed(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    count = pipe.manifest.ranges.batch[1] + 1
    latent = sample(comfy, model, empty(count))
    assert [value for value, _, _ in comfy.progress] == [1, 2, 3, 4, 5, 6]
    assert {most for _, most, _ in comfy.progress} == {6}
    for place in (1, count - 1):
        alone = sample(comfy, model, {**empty(), "batch_index": [place]})
        assert relative_error(alone["samples"][0], latent["samples"][place]) <= 1e-4


def test_a_mask_for_each_image(comfy: ComfyUI, model: Any) -> None:
    latent = comfy.run(
        comfy.nodes.Encode, model=model, image=torch.from_numpy(picture(*SIZE))[None] / 255
    )
    latent = {"samples": latent["samples"].repeat(2, 1, 1, 1)}
    masks = torch.zeros(2, 1, SIZE[1], SIZE[0])
    masks[0, 0, :, :64], masks[1, 0, :, 64:] = 1, 1
    drawn = sample(comfy, model, {**latent, "noise_mask": masks}, denoise=0.8)
    change = (drawn["samples"] - latent["samples"]).abs().amax(dim=(1, 2))
    left, right = change[:, :8], change[:, 8:]
    assert max(right[0].max(), left[1].max()) <= 1e-5
    assert min(left[0].min(), right[1].min()) > 1e-3
    assert torch.equal(drawn["noise_mask"], masks)


def test_inpainting_keeps_the_pixels_outside(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    source, mask = picture(*SIZE), torch.zeros(SIZE[1], SIZE[0])
    mask[16:48, 32:96] = 1
    image = torch.from_numpy(source)[None] / 255
    drawn = draw(comfy, model, image=image, mask=mask, strength=0.9)
    own = pipe.generate(
        PROMPT, image=source, mask=mask.numpy() > 0, paste=True, strength=0.9, **QUICK
    )
    np.testing.assert_array_equal(drawn, own.images)
    np.testing.assert_array_equal(drawn[0][mask.numpy() == 0], source[mask.numpy() == 0])


def test_adapters_follow_each_other(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    def add(to: Any, name: str, strength: float) -> Any:
        own = {"adapter": f"{name}.safetensors", "strength": strength}
        return comfy.run(comfy.nodes.ApplyAdapter, model=to, **own)

    folder = comfy.models / "sd35_adapters"
    paths = [str(folder / f"{name}.safetensors") for name in ("style", "detail")]
    chained = add(add(add(model, "style", 0.5), "detail", 0.25), "style", 0.5)
    mix = dict(zip(paths, (1.0, 0.25), strict=True))
    own = pipe.generate(PROMPT, size=SIZE, adapters=mix, **QUICK).images
    np.testing.assert_array_equal(draw(comfy, chained), own)
    assert (draw(comfy, model) != own).any()


def test_layers_are_skipped(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    options = {"scale": 3.0, "start": 0.0, "stop": 1.0}
    skipping = comfy.run(comfy.nodes.SkipLayers, model=model, layers="0,1", **options)
    own = pipe.generate(
        PROMPT, size=SIZE, **QUICK, skip_guidance_layers=[0, 1], skip_layer_guidance_scale=3.0,
        skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
    )  # fmt: skip
    np.testing.assert_array_equal(draw(comfy, skipping), own.images)
    for layers in ("seven", "99"):
        with pytest.raises(UsageError):
            comfy.run(comfy.nodes.SkipLayers, model=model, layers=layers, **options)


def follow(comfy: ComfyUI, model: Any, image: torch.Tensor, **options: Any) -> Any:
    inputs = {"net": "canny", "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0, **options}
    return comfy.run(comfy.nodes.ApplyControl, model=model, image=image, **inputs)


def test_nets_follow_pictures(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    """In both nodes that draw; a picture is resized, and several nets follow each other."""
    own, other = picture(64, 64), picture(*SIZE)[::-1].copy()
    first = follow(comfy, model, torch.from_numpy(own)[None] / 255, strength=0.7, end_percent=0.7)
    both = follow(comfy, first, torch.from_numpy(other)[None] / 255, net="depth", strength=0.5)
    nets = {"canny": Control(own, 0.7, end=0.7), "depth": Control(other, 0.5)}
    drawn = pipe.generate(PROMPT, size=SIZE, controls=nets, **QUICK)
    np.testing.assert_array_equal(draw(comfy, both), drawn.images)
    latent = sample(comfy, both, empty())
    assert torch.equal(latent["samples"], comfy.nodes.arrays.latent_of(drawn.latents))
    one = pipe.generate(PROMPT, size=SIZE, controls={"canny": nets["canny"]}, **QUICK)
    np.testing.assert_array_equal(draw(comfy, first), one.images)
    assert (one.images != drawn.images).any()


def test_a_net_draws_on(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    source = picture(*SIZE)
    image = torch.from_numpy(source)[None] / 255
    latent = comfy.run(comfy.nodes.Encode, model=model, image=image)
    drawn = sample(comfy, follow(comfy, model, image), latent, steps=3, denoise=0.6)
    own = pipe.generate(
        PROMPT, **{**QUICK, "steps": 5}, image=source, strength=0.6, controls={"canny": source}
    )
    expected = comfy.nodes.arrays.latent_of(own.latents)
    assert relative_error(drawn["samples"].numpy(), expected.numpy()) <= 1e-4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"net": "cany"}, "there is no ControlNet 'cany' — this bundle has: canny, depth"),
        ({"start_percent": 0.5, "end_percent": 0.5}, "let it start before it ends"),
        ({"net": "depth", "edges": True}, "depth takes no edges"),
        ({"image": torch.zeros(2, 64, 128, 3)}, "2 pictures for one net — give one"),
    ],
)
def test_nets_that_cannot_follow(
    options: dict[str, Any], words: str, comfy: ComfyUI, model: Any
) -> None:
    given = {"image": torch.zeros(1, 64, 128, 3), **options}
    with pytest.raises(UsageError, match=words):
        follow(comfy, model, **given)
    once = follow(comfy, model, torch.zeros(1, 64, 128, 3))
    with pytest.raises(UsageError, match="canny follows a picture already"):
        follow(comfy, once, torch.zeros(1, 64, 128, 3))


def test_each_encoder_reads_its_own_text(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    prompt = comfy.run(
        comfy.nodes.WritePrompt, prompt="a (red:1.4) circle", negative="blue", prompt_3="a star",
        negative_2="", t5_tokens=64,
    )  # fmt: skip
    own = pipe.generate(
        "a (red:1.4) circle", negative="blue", prompt_3="a star", weighting=True, t5_tokens=64,
        size=SIZE, **QUICK,
    )  # fmt: skip
    latent = comfy.run(
        comfy.nodes.Sample, model=model, prompt=prompt, latent=empty(), denoise=1.0, **SAMPLING
    )
    assert torch.equal(latent["samples"], comfy.nodes.arrays.latent_of(own.latents))


def test_previews_show_the_estimate(comfy: ComfyUI, model: Any, pipe: Pipeline) -> None:
    seen: list[np.ndarray] = []
    pipe.generate(
        PROMPT, size=SIZE, callback=lambda step: seen.append(step.denoised.copy()), **QUICK
    )
    draw(comfy, model)
    assert comfy.progress == [(n, 3, ("JPEG", n)) for n in (1, 2, 3)]
    np.testing.assert_array_equal(np.stack(comfy.previewed or []), np.stack(seen))
    comfy.progress, comfy.previewed = [], None
    draw(comfy, model)
    assert comfy.progress == [(n, 3, None) for n in (1, 2, 3)]


def test_an_interrupt_ends_the_run(comfy: ComfyUI, model: Any) -> None:
    before, comfy.progress, comfy.interrupt_at = draw(comfy, model), [], 2
    with pytest.raises(Interrupted):
        draw(comfy, model)
    assert [value for value, _, _ in comfy.progress] == [1, 2]
    comfy.interrupt_at = None
    np.testing.assert_array_equal(draw(comfy, model), before)


def test_one_pipeline_for_the_same_bundle(comfy: ComfyUI, bundle: Path, tmp_path: Path) -> None:
    path = shutil.copytree(bundle, tmp_path / "copy")
    load = comfy.nodes.LoadBundle
    first, second = (comfy.run(load, path=str(path), device="cpu") for _ in range(2))
    assert first.pipe is second.pipe
    other = comfy.run(load, path=str(path), vram_budget="8GiB")
    assert other.pipe is not first.pipe
    before = load.fingerprint_inputs(path=str(path))
    (path / "bundle.json").touch()
    assert load.fingerprint_inputs(path=str(path)) != before
    assert comfy.run(load, path=str(path), device="cpu").pipe is not first.pipe
    assert comfy.unloaded == 0  # it draws on the CPU


def test_a_forgotten_pipeline_closes(comfy: ComfyUI, bundle: Path, tmp_path: Path) -> None:
    path = shutil.copytree(bundle, tmp_path / "copy")
    model = comfy.run(comfy.nodes.LoadBundle, path=str(path))
    pipe = model.pipe
    pipe.memory()
    del model
    gc.collect()
    with pytest.raises(Sd35Error, match="the pipeline is closed"):
        pipe.memory()


def test_bundles_that_are_not(comfy: ComfyUI, tmp_path: Path) -> None:
    load = comfy.nodes.LoadBundle
    with pytest.raises(BundleError, match=str(tmp_path)):
        comfy.run(load, path=str(tmp_path))
    with pytest.raises(BundleError, match="missing"):
        comfy.run(load, path=str(tmp_path / "missing"))
    with pytest.raises(UsageError, match=r"nothing is chosen — choose .*sd35_bundles"):
        comfy.run(load, bundle="by path")
    with pytest.raises(UsageError, match="there is no gone"):
        comfy.run(load, bundle="gone")
    assert load.fingerprint_inputs(bundle="gone") is None


def test_what_a_bundle_does_not_have(comfy: ComfyUI, mini_bundle: Path, model: Any) -> None:
    plain = comfy.run(comfy.nodes.LoadBundle, path=str(mini_bundle))
    with pytest.raises(UsageError, match="takes no adapters"):
        comfy.run(comfy.nodes.ApplyAdapter, model=plain, adapter="style.safetensors")
    with pytest.raises(UsageError, match="build the bundle with: --controlnet NAME=DIR"):
        follow(comfy, plain, torch.zeros(1, 64, 128, 3))
    with pytest.raises(UsageError, match="build with: --skip-layer-guidance"):
        plain.with_skips(skip_guidance_layers=[1])
    masked = {**empty(), "noise_mask": torch.ones(1, 1, SIZE[1], SIZE[0])}
    with pytest.raises(UsageError, match="build with: --inpainting"):
        sample(comfy, plain, masked)
    with pytest.raises(UsageError, match="build with: --short-steps"):
        sample(comfy, plain, empty(), step_cache="fast")
    assert comfy.progress == []


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"width": 8192}, "the nearest is 128x64|size 8192x64 is not in"),
        ({"sampler": "ddim"}, "use one of: euler"),
        ({"mask": torch.ones(64, 128)}, "connect image, too"),
        ({"image": torch.zeros(2, 64, 128, 3)}, "2 pictures to start from"),
        ({"batch_size": 64}, "64 images at once"),
        ({"step_cache": "fast"}, "build with: --short-steps"),
    ],
)
def test_what_is_refused(inputs: dict[str, Any], words: str, comfy: ComfyUI, model: Any) -> None:
    with pytest.raises(UsageError, match=words):
        draw(comfy, model, **inputs)
    assert comfy.progress == []


def test_latents_of_another_model(comfy: ComfyUI, model: Any) -> None:
    with pytest.raises(UsageError, match=r"\[1, 4, 8, 16\], SD3.5's have 16 channels"):
        comfy.run(comfy.nodes.Decode, model=model, latent={"samples": torch.ones(1, 4, 8, 16)})


def test_alpha_is_left_out(comfy: ComfyUI, model: Any) -> None:
    image = torch.rand(1, SIZE[1], SIZE[0], 4)
    with_alpha, without = (
        comfy.run(comfy.nodes.Encode, model=model, image=own) for own in (image, image[..., :3])
    )
    assert torch.equal(with_alpha["samples"], without["samples"])


def test_every_shade_comes_back(comfy: ComfyUI) -> None:
    shades = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    image = comfy.nodes.arrays.image_of(shades)
    np.testing.assert_array_equal(pixels(image), shades)
    np.testing.assert_array_equal(comfy.nodes.arrays.pixels_of(image), shades)
