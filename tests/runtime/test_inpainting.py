"""Inpainting: as diffusers draws it, what the mask leaves, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_diffusers import PROMPT, SEED, encoder_mean, load_diffusers
from conftest import one_error_line, psnr, relative_error
from diffusers import StableDiffusion3InpaintPipeline
from PIL import Image, ImageDraw

from sd35_trt.errors import UsageError
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Pipeline, PipelinePool
from sd35_trt.runtime.source_pictures import mask_of

SIZE = (128, 64)
QUICK: dict[str, Any] = {"steps": 3, "size": (64, 64), "guidance": 3.0}


def square(size: tuple[int, int] = SIZE) -> Image.Image:
    """White in the middle, with edges that are on no latent pixel's, and a grey border."""
    width, height = size
    mask = Image.new("L", size, 0)
    draw = ImageDraw.Draw(mask)
    draw.rectangle([width // 4, height // 4, 3 * width // 4 + 3, 3 * height // 4 + 3], fill=120)
    draw.rectangle([width // 4 + 5, height // 4 + 5, 3 * width // 4, 3 * height // 4], fill=255)
    return mask


def picture(size: tuple[int, int] = SIZE) -> Image.Image:
    rows, columns = np.mgrid[: size[1], : size[0]]
    values = np.stack([rows * 2 % 256, columns * 2 % 256, (rows + columns) % 256], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """Mini in FP32, with inpainting."""
    return make_bundle(inpainting=True)


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle) as pipe:
        yield pipe


def draw_with_diffusers(
    checkpoint: Path, strength: float, guidance: float, t5_tokens: int
) -> tuple[np.ndarray, list[Image.Image]]:
    """Latents and images of two, one after the other: its noise is of one generator."""
    peer = StableDiffusion3InpaintPipeline(**load_diffusers(checkpoint).components)
    peer.set_progress_bar_config(disable=True)
    latents = []
    for seed in (SEED, SEED + 1):
        with encoder_mean(peer):
            own = peer(
                PROMPT,
                image=picture(),
                mask_image=square(),
                width=SIZE[0],
                height=SIZE[1],
                strength=strength,
                generator=torch.Generator("cpu").manual_seed(seed),
                max_sequence_length=t5_tokens,
                guidance_scale=guidance,
                negative_prompt="",
                num_inference_steps=5,
                output_type="latent",
            )
        latents.append(own.images)
    with torch.no_grad():
        config = peer.vae.config
        scaled = torch.cat(latents) / config.scaling_factor + config.shift_factor
        decoded = peer.vae.decode(scaled).sample
    return torch.cat(latents).numpy(), peer.image_processor.postprocess(decoded, output_type="pil")


def compare(
    pipe: Pipeline, checkpoint: Path, strength: float, guidance: float, t5_tokens: int
) -> None:
    latents, images = draw_with_diffusers(checkpoint, strength, guidance, t5_tokens)
    result = pipe.generate(
        PROMPT, image=picture(), mask=square(), strength=strength, batch=2, seed=SEED, steps=5,
        guidance=guidance, t5_tokens=t5_tokens,
    )  # fmt: skip
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, np.stack([np.asarray(image) for image in images])) >= 50


@pytest.mark.parametrize(("strength", "guidance"), [(1.0, 3.0), (0.6, 3.0), (1.0, 1.0)])
def test_as_diffusers_draws(strength: float, guidance: float, pipe: Pipeline) -> None:
    compare(pipe, checkpoint_path(), strength, guidance, 32)


@pytest.mark.nightly
@pytest.mark.parametrize("structure", ["large_checkpoint", "medium_checkpoint"])
def test_random_checkpoints(
    structure: str, make_bundle: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    root = request.getfixturevalue(structure)
    with Pipeline.load(make_bundle(model=str(root), inpainting=True)) as pipe:
        compare(pipe, root, 0.8, 3.0, 77)


# What a mask leaves.


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_outside_the_mask_nothing_changes(sampler: str, pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"image": picture(), "seed": 3, "steps": 4, "sampler": sampler}
    seen = []
    source = pipe.generate(PROMPT, mask=np.eye(*SIZE[::-1], dtype=bool), **arguments).latents[0]
    result = pipe.generate(
        PROMPT, mask=square(), callback=lambda step: seen.append(step.denoised), **arguments
    )
    drawn = (mask_of(square(), SIZE)[::8, ::8]) | np.eye(*SIZE[::-1], dtype=bool)[::8, ::8]
    assert 0 < drawn.sum() < drawn.size
    assert np.array_equal(result.latents[0][:, ~drawn], source[:, ~drawn])
    assert not np.isclose(result.latents[0][:, drawn], source[:, drawn]).any()
    # A preview has the picture there, too.
    for denoised in seen:
        assert np.array_equal(denoised[0][:, ~drawn], source[:, ~drawn])


def test_paste_keeps_the_pixels(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {"image": picture(), "mask": square(), "steps": 3, "batch": 2}
    plain, pasted = (pipe.generate(PROMPT, paste=p, **arguments) for p in (False, True))
    kept = ~mask_of(square(), SIZE)
    assert (pasted.images[:, kept] == np.asarray(picture())[kept]).all()
    assert (plain.images[:, kept] != np.asarray(picture())[kept]).any()
    assert np.array_equal(pasted.images[:, ~kept], plain.images[:, ~kept])
    assert pasted.parameters["paste"] is True


def test_without_a_mask_it_draws_as_any_bundle(pipe: Pipeline, mini_bundle: Path) -> None:
    with Pipeline.load(mini_bundle) as plain:
        for more in ({}, {"image": picture((64, 64)), "strength": 0.5}):
            arguments = {**QUICK, **more}
            both = [p.generate(PROMPT, **arguments).latents for p in (pipe, plain)]
            assert relative_error(*both) <= 1e-5


def test_a_white_mask_is_image_to_image(pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {**QUICK, "image": picture((64, 64)), "strength": 0.7}
    white = pipe.generate(PROMPT, mask=np.ones((64, 64), bool), **arguments)
    assert np.array_equal(white.latents, pipe.generate(PROMPT, **arguments).latents)


def test_forms_of_a_mask(tmp_path: Path) -> None:
    mask = square()
    mask.save(tmp_path / "mask.png")
    expected = np.asarray(mask) >= 128
    forms = [
        mask, tmp_path / "mask.png", str(tmp_path / "mask.png"), np.asarray(mask),
        np.asarray(mask.convert("RGB")), expected, mask.convert("1", dither=Image.Dither.NONE),
    ]  # fmt: skip
    for form in forms:
        assert np.array_equal(mask_of(form, SIZE), expected)
    assert mask_of(np.ones((8, 8), bool), SIZE).shape == SIZE[::-1]


def test_in_a_pool(bundle: Path, pipe: Pipeline) -> None:
    arguments: dict[str, Any] = {**QUICK, "image": picture((64, 64)), "mask": square((64, 64))}
    single = [pipe.generate(PROMPT, seed=seed, **arguments).images for seed in range(3)]
    plain = pipe.generate(PROMPT, seed=9, **QUICK).images
    with PipelinePool({"own": Pipeline.load(bundle)}) as pool:
        tickets = [pool.submit(PROMPT, seed=seed, **arguments) for seed in range(3)]
        other = pool.submit(PROMPT, seed=9, **QUICK)
        for ticket, expected in zip(tickets, single, strict=True):
            assert np.array_equal(ticket.result().images, expected)
        assert np.array_equal(other.result().images, plain)


# What is refused.


def test_refused(pipe: Pipeline, mini_bundle: Path, tmp_path: Path) -> None:
    image, mask = picture((64, 64)), square((64, 64))
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"mask": mask}, "needs the picture"),
        ({"image": image, "paste": True}, "paste keeps what a mask leaves"),
        ({"image": image, "mask": mask, "paste": 1}, "paste must be true or false"),
        ({"image": image, "mask": np.zeros((64, 64), bool)}, "leaves nothing to be drawn"),
        ({"image": image, "mask": np.zeros((64, 64), np.float32)}, "mask is float32"),
        ({"image": image, "mask": np.zeros((0, 64), np.uint8)}, "mask is uint8"),
        ({"image": image, "mask": 7}, "mask must be a picture"),
        ({"image": image, "mask": tmp_path / "none.png"}, "is missing"),
        ({"image": image, "mask": tmp_path}, "is not a file"),
    ]
    for arguments, message in wrong:
        with pytest.raises(UsageError, match=message):
            pipe.request(PROMPT, **arguments)
    with Pipeline.load(mini_bundle) as plain, pytest.raises(UsageError, match="--inpainting"):
        plain.request(PROMPT, image=image, mask=mask)


def test_command_line(run, bundle: Path, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    picture().save("picture.png")
    square().save("mask.png")
    masked = ["--image", "picture.png", "--mask", "mask.png", "--steps", 2]
    status, _, _ = run("generate", bundle, PROMPT, *masked, "--paste", "--strength", 1)
    assert status == 0
    kept = ~mask_of(square(), SIZE)
    assert (np.asarray(Image.open("out.png"))[kept] == np.asarray(picture())[kept]).all()
    cases: list[tuple[list[object], str]] = [
        ([bundle, PROMPT, "--mask", "mask.png"], "give it with --image"),
        ([bundle, PROMPT, "--image", "picture.png", "--mask", "none.png"], "none.png is missing"),
        ([bundle, PROMPT, "--paste"], "give a mask"),
        ([mini_bundle, PROMPT, *masked], "build with: --inpainting"),
        ([mini_bundle, PROMPT, "--skip-guidance-layers", "1,2"], "--skip-layer-guidance"),
        ([mini_bundle, PROMPT, "--skip-guidance-layers", "1;2"], "is not numbers with commas"),
    ]
    for arguments, message in cases:
        status, _, error = run("generate", *arguments)
        assert status == 2
        assert message in one_error_line(error)


@pytest.mark.nightly
def test_by_pytorchs_compiler(make_bundle: Callable[..., Path], pipe: Pipeline) -> None:
    path = make_bundle(inpainting=True, builder="inductor", target="hopper", policy="half")
    arguments: dict[str, Any] = {**QUICK, "image": picture((64, 64)), "mask": square((64, 64))}
    with Pipeline.load(path, device="cpu") as programs:
        both = [p.generate(PROMPT, seed=3, **arguments).latents for p in (programs, pipe)]
    assert relative_error(*both) <= 0.05
    kept = ~mask_of(square((64, 64)), (64, 64))[::8, ::8]
    assert relative_error(both[0][..., kept], both[1][..., kept]) <= 0.01
