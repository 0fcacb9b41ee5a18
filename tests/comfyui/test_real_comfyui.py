"""The nodes in a real ComfyUI, driven as its clients do: ``make comfyui COMFYUI=<checkout>``."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import random_adapter
from chromium import PROGRAM, Chromium
from comfy_server import (
    CHECKOUT,
    NODES,
    ComfyServer,
    Outcome,
    Workflow,
    changed,
    load_workflow,
)
from conftest import relative_error
from control_nets import every_feature
from diffusers import AutoencoderKL
from node_bundles import picture
from PIL import Image
from safetensors.numpy import load_file

from sd35_trt.runtime import Control, Pipeline

SIZE = (128, 64)
PROMPT = "a small red circle"
#: Of a request, and of nodes.
QUICK: dict[str, Any] = {"seed": 7, "steps": 4, "guidance": 3.0, "sampler": "euler"}
INPUTS: dict[str, Any] = {
    "bundle": "mini", "prompt": PROMPT, "negative": "", "width": SIZE[0], "height": SIZE[1],
    "steps": 4, "cfg": 3.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(**every_feature(tmp_path_factory.mktemp("nets")))


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def server(
    bundle: Path, mini_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ComfyServer]:
    base = tmp_path_factory.mktemp("comfyui")
    running = ComfyServer(CHECKOUT, base)
    (base / "models" / "sd35_bundles" / "mini").symlink_to(bundle)
    (base / "models" / "sd35_bundles" / "plain").symlink_to(mini_bundle)
    for seed, name in enumerate(("style", "detail"), 1):
        random_adapter(bundle, base / "models" / "sd35_adapters" / f"{name}.safetensors", seed)
    source = Image.fromarray(picture(*SIZE)).convert("RGBA")
    # What is transparent is the mask.
    source.putalpha(Image.fromarray(255 - 255 * mask().astype(np.uint8)))
    source.save(base / "input" / "example.png")
    with running:
        yield running


def mask() -> np.ndarray:
    """bool [H, W], True in the middle."""
    drawn = np.zeros(SIZE[::-1], bool)
    drawn[16:48, 32:96] = True
    return drawn


def finished(outcome: Outcome) -> np.ndarray:
    """The picture that a workflow saved, uint8 [H, W, 3]."""
    assert outcome.end == "execution_success", outcome.detail.get("exception_message")
    (file,) = outcome.files
    return np.asarray(Image.open(file).convert("RGB"))


def message(outcome: Outcome) -> str:
    """What ComfyUI shows of a node that failed."""
    assert outcome.end == "execution_error", outcome
    text = outcome.detail["exception_message"].strip()
    assert "\n" not in text
    return text


def find(workflow: Workflow, kind: str) -> str:
    """The number of a workflow's node."""
    (number,) = (n for n, node in workflow.items() if node["class_type"] == kind)
    return number


def test_a_whole_picture_is_ours_bit_by_bit(server: ComfyServer, pipe: Pipeline) -> None:
    outcome = server.run(changed(load_workflow("whole_picture"), **INPUTS))
    own = pipe.generate(PROMPT, size=SIZE, **QUICK)
    np.testing.assert_array_equal(finished(outcome), own.images[0])


def test_a_sampled_picture_is_ours(server: ComfyServer, pipe: Pipeline) -> None:
    """Through LATENT, whose rounding may change a shade by one."""
    workflow = changed(load_workflow("text_to_image"), **INPUTS)
    source = [find(workflow, "Sd35TrtSample"), 0]
    workflow["kept"] = {
        "class_type": "SaveLatent", "inputs": {"samples": source, "filename_prefix": "own"},
    }  # fmt: skip
    image = finished(server.run(workflow))
    own = pipe.generate(PROMPT, size=SIZE, **QUICK)
    difference = np.abs(image.astype(int) - own.images[0])
    print("values that differ by one:", np.count_nonzero(difference), "of", difference.size)
    assert difference.max() <= 1
    (kept,) = (server.base / "output").glob("own*.latent")
    latent = load_file(kept)["latent_tensor"]
    np.testing.assert_allclose(latent, own.latents / 1.5305 + 0.0609, rtol=1e-5, atol=1e-6)


def test_progress_and_previews(server: ComfyServer) -> None:
    outcome = server.run(changed(load_workflow("whole_picture"), **INPUTS, seed=101))
    finished(outcome)
    assert outcome.progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert 1 <= len(outcome.previews) <= 4
    for preview in outcome.previews:
        with Image.open(io.BytesIO(preview)) as shown:
            assert shown.format == "JPEG"
            assert shown.size[0] / shown.size[1] == 2


def test_a_picture_is_drawn_on(server: ComfyServer, pipe: Pipeline) -> None:
    workflow = changed(load_workflow("image_to_image"), **INPUTS, denoise=0.5)
    image = finished(server.run(workflow))
    source = picture(*SIZE)
    # KSampler's 4 steps are the last of 8.
    own = pipe.generate(PROMPT, image=source, strength=0.5, **{**QUICK, "steps": 8})
    transparent = np.asarray(Image.open(server.base / "input" / "example.png").convert("RGB"))
    np.testing.assert_array_equal(transparent, source)
    assert np.abs(image.astype(int) - own.images[0]).max() <= 1


def test_inpainting(server: ComfyServer, pipe: Pipeline) -> None:
    image = finished(server.run(changed(load_workflow("inpainting"), **INPUTS, denoise=1.0)))
    own = pipe.generate(PROMPT, image=picture(*SIZE), mask=mask(), strength=1.0, **QUICK)
    assert np.abs(image.astype(int) - own.images[0]).max() <= 1


def test_adapters(server: ComfyServer, pipe: Pipeline) -> None:
    image = finished(server.run(changed(load_workflow("adapters"), **INPUTS)))
    folder = server.base / "models" / "sd35_adapters"
    mix = {str(folder / "style.safetensors"): 0.8, str(folder / "detail.safetensors"): 0.5}
    own = pipe.generate(PROMPT, size=SIZE, adapters=mix, **QUICK)
    assert np.abs(image.astype(int) - own.images[0]).max() <= 1


def test_skip_layers(server: ComfyServer, pipe: Pipeline) -> None:
    workflow = changed(load_workflow("skip_layers"), **INPUTS, layers="1", start=0.0, stop=1.0)
    image = finished(server.run(workflow))
    own = pipe.generate(
        PROMPT, size=SIZE, skip_guidance_layers=[1], skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0, **QUICK,
    )  # fmt: skip
    assert np.abs(image.astype(int) - own.images[0]).max() <= 1


def test_control(server: ComfyServer, pipe: Pipeline) -> None:
    """A net follows the edges that ComfyUI's own node finds."""
    workflow = changed(load_workflow("control"), **INPUTS)
    workflow["edges"] = {
        "class_type": "SaveImage",
        "inputs": {"images": [find(workflow, "Canny"), 0], "filename_prefix": "edges"},
    }
    outcome = server.run(workflow)
    assert outcome.end == "execution_success", outcome.detail.get("exception_message")
    edges, image = sorted(outcome.files, key=lambda file: not file.name.startswith("edges"))
    followed = np.asarray(Image.open(edges).convert("RGB"))
    net = Control(followed, scale=0.7, end=0.8)
    own = pipe.generate(PROMPT, size=SIZE, controls={"canny": net}, **QUICK)
    drawn = np.asarray(Image.open(image).convert("RGB")).astype(int)
    assert np.abs(drawn - own.images[0]).max() <= 1


def test_latents_pass_through_comfyuis_nodes(server: ComfyServer) -> None:
    """Drawn small, enlarged by ComfyUI, drawn on and decoded."""
    workflow = changed(load_workflow("text_to_image"), **{**INPUTS, "width": 64})
    sample, decode = find(workflow, "Sd35TrtSample"), find(workflow, "Sd35TrtDecode")
    workflow["larger"] = {
        "class_type": "LatentUpscaleBy",
        "inputs": {"samples": [sample, 0], "upscale_method": "bislerp", "scale_by": 2.0},
    }
    workflow["again"] = {
        "class_type": "Sd35TrtSample",
        "inputs": {**workflow[sample]["inputs"], "latent": ["larger", 0], "denoise": 0.5},
    }
    workflow[decode]["inputs"]["latent"] = ["again", 0]
    assert finished(server.run(workflow)).shape == (128, 128, 3)


@pytest.fixture(scope="module")
def published_vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder of the published structure and factors, with random weights."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
        sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    vae.save_pretrained(folder)
    return folder


def test_comfyuis_own_vae_nodes(
    server: ComfyServer, published_vae: Path, make_bundle: Callable[..., Path]
) -> None:
    """They decode what ours decode, and encode what ours encode."""
    models = server.base / "models"
    (models / "sd35_bundles" / "published").symlink_to(make_bundle(vae=published_vae))
    (models / "vae").mkdir()
    weights = published_vae / "diffusion_pytorch_model.safetensors"
    (models / "vae" / "sd3.safetensors").symlink_to(weights)
    workflow = changed(load_workflow("text_to_image"), **{**INPUTS, "bundle": "published"})
    model, decode = find(workflow, "Sd35TrtLoadBundle"), find(workflow, "Sd35TrtDecode")
    sample = find(workflow, "Sd35TrtSample")
    for name, kind, inputs in (
        ("vae", "VAELoader", {"vae_name": "sd3.safetensors"}),
        ("pixels", "VAEDecode", {"samples": [sample, 0], "vae": ["vae", 0]}),
        ("picture", "SaveImage", {"images": ["pixels", 0], "filename_prefix": "theirs"}),
        ("latent", "VAEEncode", {"pixels": [decode, 0], "vae": ["vae", 0]}),
        ("kept", "SaveLatent", {"samples": ["latent", 0], "filename_prefix": "theirs"}),
        ("own_latent", "Sd35TrtEncode", {"model": [model, 0], "image": [decode, 0]}),
        ("own_kept", "SaveLatent", {"samples": ["own_latent", 0], "filename_prefix": "ours"}),
    ):
        workflow[name] = {"class_type": kind, "inputs": inputs}
    workflow[find_saved(workflow, decode)]["inputs"]["filename_prefix"] = "ours"
    outcome = server.run(workflow)
    assert outcome.end == "execution_success", outcome.detail.get("exception_message")
    names = ("ours", "theirs")
    files = [next((server.base / "output").glob(f"{name}*.png")) for name in names]
    ours, theirs = (np.asarray(Image.open(file).convert("RGB")).astype(int) for file in files)
    assert ours.std() > 10
    # SaveImage cuts off what our decoder rounds.
    assert np.abs(ours - theirs).max() <= 1
    kept = [next((server.base / "output").glob(f"{name}*.latent")) for name in names]
    encoded = [load_file(file)["latent_tensor"] for file in kept]
    assert relative_error(*encoded) <= 1e-4


def find_saved(workflow: Workflow, source: str) -> str:
    """The number of the node that saves what another gives."""
    (number,) = (n for n, node in workflow.items() if node["inputs"].get("images") == [source, 0])
    return number


def test_an_interrupt(server: ComfyServer, pipe: Pipeline) -> None:
    long = changed(load_workflow("text_to_image"), **{**INPUTS, "steps": 1000})
    outcome = server.run(long, interrupt_at=3)
    assert outcome.end == "execution_interrupted"
    assert outcome.progress[-1][0] < 500
    assert outcome.detail["node_type"] == "Sd35TrtSample"
    outcome = server.run(changed(load_workflow("whole_picture"), **INPUTS, seed=8))
    own = pipe.generate(PROMPT, size=SIZE, **{**QUICK, "seed": 8})
    np.testing.assert_array_equal(finished(outcome), own.images[0])


def test_bundles_that_are_not(server: ComfyServer, tmp_path: Path) -> None:
    workflow = load_workflow("text_to_image")
    outcome = server.run(changed(workflow, **INPUTS, path=str(tmp_path)))
    assert message(outcome).startswith(f"{tmp_path} ")
    assert outcome.detail["node_type"] == "Sd35TrtLoadBundle"
    assert outcome.detail["exception_type"].endswith("BundleError")
    outcome = server.run(changed(workflow, **INPUTS, path="/nowhere"))
    assert "/nowhere" in message(outcome)
    outcome = server.run(changed(workflow, **{**INPUTS, "bundle": "other"}))
    assert message(outcome).startswith("there is no other")


@pytest.mark.parametrize(
    ("name", "inputs", "node", "words"),
    [
        ("inpainting", {"bundle": "plain"}, "Sample", "build with: --inpainting"),
        ("adapters", {"bundle": "plain"}, "Adapter", "--adapters"),
        ("control", {"bundle": "plain"}, "Control", "--controlnet NAME=DIR"),
        ("control", {"net": "pose"}, "Control", "there is no ControlNet 'pose'"),
        ("skip_layers", {"bundle": "plain"}, "SkipLayers", "build with: --skip-layer-guidance"),
        ("skip_layers", {"layers": "99"}, "SkipLayers", "99"),
        ("text_to_image", {"width": 4096}, "Sample", "size 4096x64 is not in"),
        ("whole_picture", {"height": 8192}, "Picture", "size 128x8192 is not in"),
    ],
)
def test_what_is_refused(
    name: str, inputs: dict[str, Any], node: str, words: str, server: ComfyServer
) -> None:
    outcome = server.run(changed(load_workflow(name), **INPUTS | inputs))
    assert words in message(outcome)
    assert outcome.detail["node_type"] == f"Sd35Trt{node}"
    assert outcome.progress == []


def test_a_bundle_closes_when_no_graph_needs_it(server: ComfyServer, mini_bundle: Path) -> None:
    # Of a name that no failed graph used: ComfyUI keeps what failed until it collects garbage.
    (server.base / "models" / "sd35_bundles" / "closing").symlink_to(mini_bundle)
    workflow = load_workflow("whole_picture")
    finished(server.run(changed(workflow, **{**INPUTS, "bundle": "closing"})))
    before = server.log.count("closing is closed")
    finished(server.run(changed(workflow, **INPUTS, seed=55)))
    assert server.log.count("closing is closed") == before + 1


@pytest.mark.skipif(PROGRAM is None, reason="there is no Chromium")
def test_the_page_shows_the_workflows(server: ComfyServer, tmp_path: Path) -> None:
    """What the page would post of a workflow in its own form is the workflow of the API."""
    templates = server.get("/workflow_templates")["sd35-trt"]
    names = sorted(path.stem for path in (NODES / "workflows" / "api").glob("*.json"))
    assert sorted(templates) == names
    with Chromium(tmp_path) as page:
        page.open(f"http://{server.address}/")
        page.wait("Boolean(window.app?.graph && window.app.extensionManager)")
        page.wait("'Sd35TrtSample' in LiteGraph.registered_node_types")
        for name in names:
            shown = json.loads((NODES / "workflows" / f"{name}.json").read_text())
            posted = page.evaluate(
                f"app.loadGraphData({json.dumps(shown)}).then(() => app.graphToPrompt())"
                ".then(made => JSON.stringify(made.output))"
            )
            assert plain(json.loads(posted)) == plain(load_workflow(name))
        assert page.evaluate("document.querySelector('.p-toast-message')?.innerText") is None


def plain(workflow: Workflow) -> Workflow:
    """Without titles."""
    return {
        number: {key: node[key] for key in ("class_type", "inputs")}
        for number, node in workflow.items()
    }
