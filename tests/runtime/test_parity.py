"""The same prompt and seed give what diffusers' StableDiffusion3Pipeline gives, in FP32."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_diffusers import PROMPT, SEED, check, encoder_mean, load_diffusers
from conftest import psnr, relative_error
from diffusers import StableDiffusion3Img2ImgPipeline, StableDiffusion3Pipeline

from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Pipeline
from sd35_trt.store.cache import StageCache

NEGATIVE = "a green star"


MATRIX = [
    {"guidance": 4.5, "negative": NEGATIVE, "batch": 1, "size": (128, 128)},
    {"guidance": 4.5, "negative": NEGATIVE, "batch": 3, "size": (192, 128)},
    {"guidance": 4.5, "batch": 1, "size": (64, 192)},
    {"guidance": 1.0, "batch": 3, "size": (128, 128)},
    {"guidance": 1.0, "batch": 1, "size": (192, 128)},
]


# Of the matrix of structures, lengths of text and cases: these are drawn every day. Medium's
# blocks are Large's, some with a second attention.
_DAILY = {
    ("large", 77): (0, 0, 0, 0, 0),
    ("large", 256): (0, 0, 0, 0, 0),
    ("medium", 77): (1, 0, 1, 0, 0),
    ("medium", 256): (0, 1, 0, 1, 0),
}


@pytest.fixture(scope="module")
def mini_peer() -> StableDiffusion3Pipeline:
    return load_diffusers(checkpoint_path())


@pytest.mark.parametrize("case", MATRIX)
def test_mini(case: dict[str, Any], mini_bundle: Path, mini_peer: StableDiffusion3Pipeline) -> None:
    with Pipeline.load(mini_bundle) as pipe:
        tokens = pipe.manifest.defaults.t5_tokens
        assert tokens == mini_peer.tokenizer_3.model_max_length
        check(pipe, mini_peer, t5_tokens=tokens, **case)


def test_mini_over_all_default_steps(
    mini_bundle: Path, mini_peer: StableDiffusion3Pipeline
) -> None:
    with Pipeline.load(mini_bundle) as pipe:
        d = pipe.manifest.defaults
        check(pipe, mini_peer, guidance=d.guidance, t5_tokens=d.t5_tokens, steps=d.steps)


@pytest.mark.parametrize(
    ("structure", "case", "t5_tokens"),
    [
        pytest.param(structure, case, tokens, marks=() if daily else pytest.mark.nightly)
        for structure in ("large", "medium")
        for tokens in (77, 256)
        for case, daily in zip(MATRIX, _DAILY[structure, tokens], strict=True)
    ],
)
def test_random_structures(
    structure: str, case: dict[str, Any], t5_tokens: int, request: pytest.FixtureRequest
) -> None:
    bundle = request.getfixturevalue(f"{structure}_bundle")
    peer = load_diffusers(request.getfixturevalue(f"{structure}_checkpoint"))
    with Pipeline.load(bundle) as pipe:
        check(pipe, peer, t5_tokens=t5_tokens, **case)


@pytest.mark.nightly
@pytest.mark.parametrize("structure", ["large", "medium"])
def test_without_t5(structure: str, stage_cache: Path, make_bundle: Callable[..., Path]) -> None:
    from random_checkpoints import Layout, kept_checkpoint

    checkpoint = kept_checkpoint(StageCache(stage_cache), structure, Layout(t5=False))
    with Pipeline.load(make_bundle(model=str(checkpoint))) as pipe:
        assert pipe.manifest.component("t5") is None
        peer = load_diffusers(checkpoint, t5=False)
        for tokens in (77, 256):
            check(pipe, peer, guidance=4.5, negative=NEGATIVE, t5_tokens=tokens)


@pytest.mark.nightly
def test_bf16_in_shards(
    tmp_path: Path, large_checkpoint: Path, make_bundle: Callable[..., Path]
) -> None:
    """The transformer; the other parts, which are read alike, are as built for other tests."""
    from random_checkpoints import Layout, write_checkpoint

    layout = Layout(dtype=torch.bfloat16, shard="2MB")
    checkpoint = write_checkpoint(tmp_path / "model", "large", layout)
    assert len(list((checkpoint / "transformer").glob("*.safetensors"))) > 1
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        shutil.rmtree(checkpoint / part)
        shutil.copytree(large_checkpoint / part, checkpoint / part)
    with Pipeline.load(make_bundle(model=str(checkpoint))) as pipe:
        check(pipe, load_diffusers(checkpoint), guidance=4.5, t5_tokens=77)


def test_half_is_close_to_fp32(mini_bundle: Path, make_bundle: Callable[..., Path]) -> None:
    arguments: dict[str, Any] = {"seed": SEED, "negative": NEGATIVE}
    with Pipeline.load(mini_bundle) as single, Pipeline.load(make_bundle(policy="half")) as half:
        expected = single.generate(PROMPT, **arguments)
        actual = half.generate(PROMPT, **arguments)
        weights = [sum(c.weight_bytes for c in p.manifest.components) for p in (half, single)]
    assert relative_error(actual.latents, expected.latents) <= 0.05
    assert psnr(actual.images, expected.images) >= 30
    assert 0.5 <= weights[0] / weights[1] <= 0.6


@pytest.mark.nightly
def test_built_without_guidance(large_checkpoint: Path, make_bundle: Callable[..., Path]) -> None:
    bundle = make_bundle(model=str(large_checkpoint), guidance=False)
    peer = load_diffusers(large_checkpoint)
    with Pipeline.load(bundle) as pipe:
        denoiser = pipe.manifest.component("denoiser")
        assert denoiser is not None
        assert "guidance" not in [port.name for port in denoiser.inputs]
        check(pipe, peer, guidance=1.0, batch=3, t5_tokens=77)


def test_image_to_image(mini_bundle: Path, mini_peer: StableDiffusion3Pipeline) -> None:
    """As diffusers' own, except that we start from the mean of the latent distribution."""
    source = mini_peer(PROMPT, num_inference_steps=2, max_sequence_length=32).images[0]
    peer = StableDiffusion3Img2ImgPipeline(**mini_peer.components)
    peer.set_progress_bar_config(disable=True)
    with encoder_mean(peer):
        images = peer(
            PROMPT,
            image=source,
            strength=0.6,
            num_inference_steps=10,
            guidance_scale=4.5,
            max_sequence_length=32,
            generator=torch.Generator("cpu").manual_seed(SEED),
            output_type="np",
        ).images
    with Pipeline.load(mini_bundle) as pipe:
        result = pipe.generate(
            PROMPT, image=source, strength=0.6, steps=10, guidance=4.5, seed=SEED, t5_tokens=32
        )
    assert psnr(result.images[0], np.round(images[0] * 255).astype(np.uint8)) >= 50
