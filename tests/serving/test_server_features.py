"""A bundle's features over HTTP: masks, adapters, texts for each encoder, skipped layers."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import diffusers_names, random_layers, write
from openai import OpenAI
from originals import part_tensors
from PIL import Image
from servers import TOKEN, Running, running
from test_server_images import EDITS, GENERATIONS, decoded, error

from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.errors import UsageError
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Pipeline
from sd35_trt.serving.names import named_files
from sd35_trt.serving.settings import Settings

QUICK: dict[str, Any] = {"prompt": "a red star", "steps": 2, "size": "64x64", "seed": 3}
ALONE: dict[str, Any] = {"steps": 2, "size": (64, 64), "seed": 3}


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """Mini in FP32, with all features."""
    return make_bundle(skip_layer_guidance=True, inpainting=True, adapters=16)


@pytest.fixture(scope="module")
def adapter(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    base = part_tensors(checkpoint_path(), "transformer")
    names = [f"transformer_blocks.{k}.attn.to_q" for k in range(6)]
    lora = write(
        folder / "lora.safetensors",
        diffusers_names("transformer", random_layers(base, names, 4, None, 1)),
    )
    write_adapter(folder / "adapter.safetensors", convert_adapter(lora, Bundle.open(bundle)))
    return folder / "adapter.safetensors"


@pytest.fixture(scope="module")
def alone(bundle: Path, adapter: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1) as pipe:
        pipe.load_adapter("style", adapter)
        yield pipe


@pytest.fixture(scope="module")
def server(bundle: Path, adapter: Path, mini_bundle: Path) -> Iterator[Running]:
    pipe = Pipeline.load(bundle, threads=1)
    pipe.load_adapter("style", adapter)
    plain = Pipeline.load(mini_bundle, threads=1)
    settings = Settings(token=TOKEN, adapters=frozenset(["style"]))
    with running({"mini": pipe, "plain": plain}, settings, warm=False) as server:
        yield server


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    image = Image.new("RGB", size, "navy")
    image.paste("orange", (8, 8, 40, 40))
    return image


def clear(size: tuple[int, int] = (64, 64), image: Image.Image | None = None) -> Image.Image:
    """Transparent in the middle, as a mask of OpenAI's."""
    own = (image or Image.new("RGB", size, "black")).convert("RGBA")
    alpha = Image.new("L", size, 255)
    alpha.paste(0, (16, 16, 48, 48))
    own.putalpha(alpha)
    return own


def drawn() -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    return mask


def test_fields_of_a_generation(server: Running, alone: Pipeline) -> None:
    body = {
        "prompt_2": "a (blue:1.2) star", "prompt_3": "a ring", "negative_prompt": "dark",
        "negative_prompt_2": "grey", "negative_prompt_3": "small", "weighting": True,
        "t5_tokens": 48, "adapters": {"style": 0.5}, "skip_guidance_layers": [1, 2],
        "skip_layer_guidance_scale": 1.5, "skip_layer_guidance_start": 0.1,
        "skip_layer_guidance_stop": 1.0,
    }  # fmt: skip
    expected = alone.generate(
        "a red star", prompt_2="a (blue:1.2) star", prompt_3="a ring", negative="dark",
        negative_2="grey", negative_3="small", weighting=True, t5_tokens=48,
        adapters={"style": 0.5}, skip_guidance_layers=[1, 2], skip_layer_guidance_scale=1.5,
        skip_layer_guidance_start=0.1, skip_layer_guidance_stop=1.0, **ALONE,
    )  # fmt: skip
    answer = server.client.post(GENERATIONS, json={**QUICK, **body}).json()
    np.testing.assert_array_equal(decoded(answer), expected.images)
    assert answer["parameters"]["adapters"] == [{"style": 0.5}]
    plain = server.client.post(GENERATIONS, json=QUICK).json()
    assert (decoded(plain)[0] != expected.images[0]).any()


# Masks.


@pytest.mark.parametrize("form", ["transparent", "light", "own alpha"])
def test_masks(form: str, server: Running, alone: Pipeline) -> None:
    files = {"image": png(picture())}
    if form == "transparent":
        files["mask"] = png(clear())
    elif form == "light":
        files["mask"] = png(Image.fromarray(drawn().astype(np.uint8) * 255))
    else:
        files["image"] = png(clear(image=picture()))
    fields = {**{k: str(v) for k, v in QUICK.items()}, "paste": "true", "model": "mini"}
    answer = server.client.post(EDITS, data=fields, files=files).json()
    # What is transparent is white to the encoder, and drawn anew from noise alone.
    image = Image.open(io.BytesIO(files["image"]))
    expected = alone.generate(
        "a red star", image=image, mask=drawn(), strength=1.0, paste=True, **ALONE
    )
    np.testing.assert_array_equal(decoded(answer), expected.images)
    np.testing.assert_array_equal(decoded(answer)[0][~drawn()], np.asarray(picture())[~drawn()])


def test_the_openai_client_edits_with_a_mask(server: Running, alone: Pipeline) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN) as client:
        answer = client.images.edit(
            image=("a.png", png(picture())), mask=("b.png", png(clear())), prompt="a red star",
            size="64x64",  # type: ignore[arg-type]
            extra_body={"steps": 2, "seed": 3, "adapters": {"style": 0.5},
                        "skip_guidance_layers": [1, 2], "skip_layer_guidance_stop": 1.0},
        )  # fmt: skip
    expected = alone.generate(
        "a red star", image=picture(), mask=drawn(), strength=1.0, adapters={"style": 0.5},
        skip_guidance_layers=[1, 2], skip_layer_guidance_stop=1.0, **ALONE,
    )  # fmt: skip
    np.testing.assert_array_equal(decoded(answer.model_dump()), expected.images)


def test_a_clear_picture_where_the_bundle_has_no_inpainting(server: Running) -> None:
    """It is on white, as ever; a mask is refused."""
    fields = {**{k: str(v) for k, v in QUICK.items()}, "model": "plain"}
    files = {"image": png(clear(image=picture()))}
    assert server.client.post(EDITS, data=fields, files=files).status_code == 200
    refused = server.client.post(EDITS, data=fields, files={**files, "mask": png(clear())})
    found = error(refused, 422)
    assert (found["param"], "--inpainting" in found["message"]) == ("mask", True)


# What is refused.


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"adapters": {"/etc/passwd": 1.0}}, "adapters", "use one of: style"),
        ({"adapters": {"style": 1000}}, "adapters", "must be -100 to 100"),
        ({"adapters": {"style": "much"}}, "adapters", "valid number"),
        ({"adapters": ["style"]}, "adapters", "valid dictionary"),
        ({"adapters": {"style": 1.0}, "model": "plain"}, "adapters", "takes no adapters"),
        ({"skip_guidance_layers": [99]}, "skip_guidance_layers", "must be 0 to 5"),
        ({"skip_guidance_layers": [1], "model": "plain"}, "skip_guidance_layers", "--skip-layer"),
        ({"skip_guidance_layers": list(range(100))}, "skip_guidance_layers", "at most 64"),
        ({"skip_layer_guidance_stop": 2}, "skip_layer_guidance_stop", "less than or equal to 1"),
        ({"prompt_2": "x" * 10_001}, "prompt_2", "10,001 characters"),
        ({"negative_prompt_3": "(a:1e9)", "weighting": True}, "negative_prompt_3", "weight 1e"),
        ({"step_cache": "fast"}, "step_cache", "build with: --short-steps"),
        ({"step_cache": "slow"}, "step_cache", "'exact' or 'fast'"),
        ({"t5_tokens": 100_000}, "t5_tokens", "t5_tokens must be"),
        ({"mask": "/etc/passwd"}, "mask", "is no field of this request"),
    ],
)
def test_refused(server: Running, change: dict[str, Any], field: str, words: str) -> None:
    found = error(server.client.post(GENERATIONS, json={**QUICK, **change}), 422)
    assert found["param"] == field
    assert words in found["message"]


@pytest.mark.parametrize(
    ("fields", "files", "field", "words"),
    [
        ({"mask": "/etc/passwd"}, {}, "mask", "must be a file"),
        ({}, {"mask": b"no picture"}, "mask", "must be a PNG"),
        ({}, {"mask": png(Image.new("L", (64, 64), 0))}, "mask", "nothing to be drawn"),
        ({"paste": "true"}, {}, "paste", "give a mask"),
        ({"adapters": "{"}, {}, "adapters", "valid dictionary"),
        ({"adapters": "[" * 10_000}, {}, "adapters", "valid dictionary"),
        ({"adapters[x]": "1"}, {}, "adapters", "use one of: style"),
        ({"adapters[style]": "a"}, {}, "adapters", "valid number"),
        ({"adapters": '{"style": 1}', "adapters[style]": "1"}, {}, "adapters", "given twice"),
        ({"skip_guidance_layers[1]": "1"}, {}, "skip_guidance_layers", "a form of its own"),
        ({"skip_guidance_layers[]": "x"}, {}, "skip_guidance_layers", "valid integer"),
    ],
)
def test_refused_forms(
    server: Running, fields: dict[str, str], files: dict[str, bytes], field: str, words: str
) -> None:
    whole = {**{k: str(v) for k, v in QUICK.items()}, **fields}
    found = error(
        server.client.post(EDITS, data=whole, files={"image": png(picture()), **files}), 422
    )
    assert (found["param"] or "").startswith(field)
    assert words in found["message"]


def test_names_of_files() -> None:
    assert named_files(["a=x.safetensors", "b=/y/z"], "--adapter") == {
        "a": Path("x.safetensors"), "b": Path("/y/z"),
    }  # fmt: skip
    for given, words in ((["x.safetensors"], "has no name"), (["a=x", "a=y"], "called a")):
        with pytest.raises(UsageError, match=words):
            named_files(given, "--adapter")


def test_without_adapters_no_name_is_known(mini_bundle: Path) -> None:
    settings = replace(Settings(token=TOKEN))
    with running({"mini": Pipeline.load(mini_bundle, threads=1)}, settings, warm=False) as server:
        found = error(server.client.post(GENERATIONS, json={**QUICK, "adapters": {"a": 1}}), 422)
    assert "leave it out" in found["message"]
