"""ControlNets: as diffusers draws with them, each image its own scale, off without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from against_diffusers import SEED
from conftest import psnr, relative_error
from control_nets import write_net
from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image

from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime import Control, Pipeline

PROMPT = "a small red circle to the left of a large blue square"
T5_TOKENS = 32
STEPS = 5
SIZE = (128, 64)
QUICK: dict[str, Any] = {"steps": STEPS, "size": SIZE, "guidance": 3.0, "t5_tokens": T5_TOKENS}


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As Medium's, two of them, and as Large's."""
    folder, root = tmp_path_factory.mktemp("nets"), checkpoint_path()
    return {
        "canny": write_net(folder / "canny", root, True, 1),
        "depth": write_net(folder / "depth", root, True, 2),
        "edges": write_net(folder / "large-canny", root, False, 3),
    }


def net_options(nets: dict[str, Path]) -> dict[str, Any]:
    return {"controlnets": tuple(ControlNet(name, str(path)) for name, path in nets.items())}


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], nets: dict[str, Path]) -> Path:
    """Mini in FP32, with three nets."""
    return make_bundle(**net_options(nets))


@pytest.fixture(scope="module")
def pipe(bundle: Path) -> Any:
    with Pipeline.load(bundle) as loaded:
        yield loaded


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


# As diffusers draws.


def as_edges_are_taken(pipe: StableDiffusion3ControlNetPipeline) -> None:
    """What Stability's card says of its net for edges."""
    own = pipe.image_processor.preprocess

    def preprocess(image: Any, **options: Any) -> torch.Tensor:
        return (own(image, **options) / 2 + 0.5) * 255 * 0.5 + 0.5

    pipe.image_processor.preprocess = preprocess


def draw_with_diffusers(
    root: Path,
    paths: Sequence[Path],
    pictures: Sequence[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    edges: bool = False,
    t5_tokens: int = T5_TOKENS,
    **options: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """Latents and the image; the autoencoder gives the mean, as here."""
    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean
    )
    models = [SD3ControlNetModel.from_pretrained(path) for path in paths]
    pipe = StableDiffusion3ControlNetPipeline.from_pretrained(
        root, controlnet=models if len(models) > 1 else models[0], dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    if edges:
        as_edges_are_taken(pipe)
    images = [Image.fromarray(own) for own in pictures]
    latents = pipe(
        PROMPT,
        negative_prompt="",
        control_image=images if len(images) > 1 else images[0],
        generator=torch.Generator("cpu").manual_seed(SEED),
        num_inference_steps=STEPS,
        guidance_scale=3.0,
        width=SIZE[0],
        height=SIZE[1],
        max_sequence_length=t5_tokens,
        output_type="latent",
        **options,
    ).images
    with torch.no_grad():
        scaled = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        decoded = pipe.vae.decode(scaled).sample
    (image,) = pipe.image_processor.postprocess(decoded, output_type="pil")
    return latents.numpy(), np.asarray(image)[None]


def check(
    pipe: Pipeline, controls: dict[str, Control], latents: np.ndarray, images: np.ndarray, **kw: Any
) -> None:
    options = {**QUICK, **kw}
    result = pipe.generate(PROMPT, seed=SEED, controls=controls, **options)
    without = pipe.generate(PROMPT, seed=SEED, **options)
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50
    assert relative_error(without.latents, latents) > 0.05


@pytest.mark.parametrize("name", ["canny", "edges"])
def test_one_net(
    name: str, pipe: Pipeline, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = draw_with_diffusers(
        checkpoint_path(), [nets[name]], [picture(1)], monkeypatch, name == "edges",
        controlnet_conditioning_scale=0.7,
    )  # fmt: skip
    check(pipe, {name: Control(picture(1), scale=0.7)}, *drawn)


def test_two_nets_with_scales_and_intervals(
    pipe: Pipeline, nets: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They overlap in some steps; in one, none runs."""
    drawn = draw_with_diffusers(
        checkpoint_path(), [nets["canny"], nets["depth"]], [picture(1), picture(2)], monkeypatch,
        controlnet_conditioning_scale=[0.7, 0.4],
        control_guidance_start=[0.0, 0.2], control_guidance_end=[0.6, 0.8],
    )  # fmt: skip
    controls = {
        "depth": Control(picture(2), scale=0.4, start=0.2, end=0.8),
        "canny": Control(picture(1), scale=0.7, end=0.6),
    }
    check(pipe, controls, *drawn)
