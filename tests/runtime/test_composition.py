"""Features together: adapters, skip-layer guidance, inpainting, weights, in FP32 and in FP8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import diffusers_names, random_layers, write
from against_diffusers import PROMPT, SEED, draw_with_diffusers, encoder_mean, load_diffusers
from conftest import psnr, relative_error
from diffusers import StableDiffusion3InpaintPipeline
from originals import part_tensors
from PIL import Image

from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.job import Job, Result

FEATURES: dict[str, Any] = {"skip_layer_guidance": True, "inpainting": True, "adapters": 16}
SKIP: dict[str, Any] = {
    "skip_guidance_layers": [1, 3],
    "skip_layer_guidance_scale": 2.0,
    "skip_layer_guidance_start": 0.1,
    "skip_layer_guidance_stop": 0.7,
}
OWN: dict[str, Any] = {"steps": 5, "guidance": 3.0, "t5_tokens": 32}
PEER: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 3.0}
MIX = {"style": 0.7}


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = part_tensors(checkpoint_path(), "transformer")
    names = [f"transformer_blocks.{k}.{own}" for k in range(6)
             for own in ("attn.to_q", "attn.to_v", "attn.to_out.0", "ff.net.2")]  # fmt: skip
    layers = random_layers(base, names, 4, None, 1)
    path = tmp_path_factory.mktemp("lora") / "style.safetensors"
    return write(path, diffusers_names("transformer", layers))


@pytest.fixture(scope="module")
def adapter(lora: Path, make_bundle: Callable[..., Path]) -> Path:
    path = lora.with_name("adapter.safetensors")
    write_adapter(path, convert_adapter(lora, Bundle.open(make_bundle(**FEATURES))))
    return path


def load(bundle: Path, adapter: Path) -> Pipeline:
    pipe = Pipeline.load(bundle)
    pipe.load_adapter("style", adapter)
    return pipe


@pytest.fixture(scope="module")
def pipe(make_bundle: Callable[..., Path], adapter: Path) -> Iterator[Pipeline]:
    """Mini in FP32, with all features."""
    with load(make_bundle(**FEATURES), adapter) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def peer(lora: Path) -> Any:
    peer = load_diffusers(checkpoint_path())
    peer.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name="style")
    peer.set_adapters(["style"], [MIX["style"]])
    return peer


def picture() -> Image.Image:
    values = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3) % 251
    return Image.fromarray(values.astype(np.uint8))


def half_mask() -> np.ndarray:
    mask = np.zeros((64, 64), bool)
    mask[:, 24:] = True
    return mask


def test_adapters_and_skipped_layers(pipe: Pipeline, peer: Any) -> None:
    result = pipe.generate(PROMPT, seed=SEED, size=(64, 64), adapters=MIX, **OWN, **SKIP)
    latents, images = draw_with_diffusers(peer, 1, (64, 64), 32, **PEER, **SKIP)
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50


def test_adapters_and_inpainting(pipe: Pipeline, peer: Any) -> None:
    painter = StableDiffusion3InpaintPipeline(**peer.components)
    painter.set_progress_bar_config(disable=True)
    with encoder_mean(painter):
        latents = painter(
            PROMPT, image=picture(), mask_image=Image.fromarray(half_mask()), strength=0.8,
            width=64, height=64, max_sequence_length=32, output_type="latent",
            generator=torch.Generator("cpu").manual_seed(SEED), **PEER,
        ).images.numpy()  # fmt: skip
    result = pipe.generate(
        PROMPT, seed=SEED, image=picture(), mask=half_mask(), strength=0.8, adapters=MIX, **OWN
    )
    assert relative_error(result.latents, latents) <= 1e-3


# Every kind of request that can be joined, and none.
KINDS: list[dict[str, Any]] = [
    {}, {"adapters": MIX}, SKIP, {"adapters": MIX, **SKIP}, {"weighting": True, "adapters": MIX},
]  # fmt: skip


def test_joined_in_any_order(pipe: Pipeline) -> None:
    """Each image is what it is alone, whatever is beside it."""
    prompt, quick = "a (red:1.3) star", {"steps": 3, "size": (64, 64)}
    alone = [pipe.generate(prompt, seed=i, **quick, **own).latents for i, own in enumerate(KINDS)]
    for order in ([0, 1, 2, 3], [3, 2, 1, 4], [4, 0, 3]):
        jobs = [Job(pipe.request(prompt, seed=i, **quick, **KINDS[i])) for i in order]
        pipe.draw(jobs)
        for i, job in zip(order, jobs, strict=True):
            assert isinstance(job.outcome, Result), job.outcome
            assert relative_error(job.outcome.latents, alone[i]) <= 1e-5, (order, i)
    again = pipe.generate(prompt, seed=0, **quick).latents
    assert np.array_equal(again, alone[0])


@pytest.mark.nightly
@pytest.mark.parametrize("policy", ["half", "fp8", "int8-weight"])
def test_in_every_precision(
    policy: str, make_bundle: Callable[..., Path], pipe: Pipeline, adapter: Path
) -> None:
    """A step with all features is nearly as near to FP32's as one without any: guidance by skipped
    blocks multiplies what differs, as guidance does."""
    quick: dict[str, Any] = {"steps": 1, "size": (64, 64), "guidance": 3.0}
    together = {"adapters": MIX, **SKIP, "image": picture(), "mask": half_mask(), "strength": 1.0,
                "weighting": True}  # fmt: skip
    with load(make_bundle(policy=policy, **FEATURES), adapter) as narrow:
        errors = [
            np.mean([
                relative_error(*(p.generate(PROMPT, seed=seed, **quick, **own).latents
                                 for p in (narrow, pipe)))
                for seed in range(8)
            ])
            for own in ({}, together)
        ]  # fmt: skip
    assert errors[1] <= 2 * errors[0] + 1e-3, errors
