"""Pictures of a pipeline against those of diffusers, of the same prompt and seeds, in FP32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import psnr, relative_error
from diffusers import StableDiffusion3Pipeline

from sd35_trt.runtime import Pipeline

PROMPT = "a small red circle to the left of a large blue square"
SEED = 11


def load_diffusers(checkpoint: Path, t5: bool = True) -> StableDiffusion3Pipeline:
    absent = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    pipe = StableDiffusion3Pipeline.from_pretrained(checkpoint, dtype=torch.float32, **absent)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_with_diffusers(
    pipe: StableDiffusion3Pipeline,
    batch: int,
    size: tuple[int, int],
    t5_tokens: int,
    prompt: str = PROMPT,
    **kw: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents [B, C, h, w] and images uint8 [B, H, W, 3]."""
    generators = [torch.Generator("cpu").manual_seed(SEED + i) for i in range(batch)]
    latents = pipe(
        prompt,
        num_images_per_prompt=batch,
        generator=generators,
        width=size[0],
        height=size[1],
        max_sequence_length=t5_tokens,
        output_type="latent",
        **kw,
    ).images
    with torch.no_grad():
        scaled = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        decoded = pipe.vae.decode(scaled).sample
    images = pipe.image_processor.postprocess(decoded, output_type="pil")
    return latents.numpy(), np.stack([np.asarray(image) for image in images])


class _Mean:
    """A latent distribution whose sample is its mean."""

    def __init__(self, encoded: Any) -> None:
        mean = encoded.latent_dist.mean
        self.latent_dist = type("Mean", (), {"sample": lambda self, generator=None: mean})()


@contextlib.contextmanager
def encoder_mean(peer: Any) -> Iterator[None]:
    """Let a pipeline's VAE give the mean of the latent distribution, as ours does."""
    peer.vae.encode, sampled = (lambda x: _Mean(sampled(x))), peer.vae.encode
    try:
        yield
    finally:
        peer.vae.encode = sampled


def check(
    pipe: Pipeline,
    peer: StableDiffusion3Pipeline,
    *,
    guidance: float,
    negative: str = "",
    batch: int = 1,
    size: tuple[int, int] = (128, 128),
    t5_tokens: int,
    steps: int = 4,
) -> None:
    result = pipe.generate(
        PROMPT,
        negative=negative,
        seed=SEED,
        steps=steps,
        guidance=guidance,
        size=size,
        batch=batch,
        t5_tokens=t5_tokens,
    )
    latents, images = draw_with_diffusers(
        peer,
        batch,
        size,
        t5_tokens,
        guidance_scale=guidance,
        negative_prompt=negative,
        num_inference_steps=steps,
    )
    assert result.images.shape == (batch, size[1], size[0], 3)
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50
