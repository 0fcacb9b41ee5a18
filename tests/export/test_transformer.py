"""conditioner and denoiser together are the transformer, to rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import relative_error
from diffusers import SD3Transformer2DModel

from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime.devices.cpu import CpuDevice
from sd35_trt.runtime.sessions.session import open_session


def load(checkpoint: Path) -> SD3Transformer2DModel:
    model = SD3Transformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
    return model.float().eval()


def run(bundle: Bundle, name: str, inputs: dict[str, np.ndarray], **dims: int) -> dict:
    component = bundle.manifest.component(name)
    assert component is not None
    outputs = {p.name: np.empty(p.resolve(**dims), p.dtype) for p in component.outputs}
    session = open_session(bundle, component, CpuDevice())
    session.run(inputs, outputs)
    session.close()
    return outputs


CORNERS = [(batch, h, w) for batch in (1, 4) for h, w in ((64, 64), (64, 192), (192, 192))]


@pytest.mark.parametrize(("batch", "height", "width"), [*CORNERS, (3, 192, 64), (2, 128, 192)])
@pytest.mark.parametrize(
    "structure", ["mini", pytest.param("large", marks=pytest.mark.nightly), "medium"]
)
def test_one_step_equals_the_transformer(
    structure: str, batch: int, height: int, width: int, request: pytest.FixtureRequest
) -> None:
    bundle = Bundle.open(request.getfixturevalue(f"{structure}_bundle"))
    checkpoint = (
        checkpoint_path()
        if structure == "mini"
        else request.getfixturevalue(f"{structure}_checkpoint")
    )
    ranges = bundle.manifest.ranges
    assert ranges.batch == (1, 4)
    assert ranges.size == (64, 192), "the corners below are those of the range"
    model = load(checkpoint)
    rng = np.random.default_rng(batch * 1000 + height + width)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    # Trained weights make more of rounding in FP32 than random ones: on mini the two libraries'
    # modulation already differs by 1.7e-6.
    limit = 2e-5 if structure == "mini" else 1e-5
    tokens, h, w = 40, height // 8, width // 8
    config = model.config
    embeds = normal(2 * batch, tokens, config.joint_attention_dim)
    pooled = normal(2 * batch, config.pooled_projection_dim)
    sigmas = np.array([0.9, 0.25], np.float32)
    latents, previous = normal(batch, 16, h, w), normal(batch, 16, h, w)
    guidance = rng.uniform(1, 6, batch).astype(np.float32)
    coefficients = normal(batch, 3)
    conditioned = run(
        bundle,
        "conditioner",
        {"prompt_embeds": embeds, "pooled": pooled, "timesteps": sigmas * 1000},
        samples=2 * batch,
        tokens=tokens,
        steps=2,
    )
    for step, sigma in enumerate(sigmas):
        modulation = conditioned["modulation"][step]
        actual = run(
            bundle,
            "denoiser",
            {
                "latents": latents,
                "sigma": np.full(batch, sigma),
                "coefficients": coefficients,
                "previous_denoised": previous,
                "context": conditioned["context"][batch:],
                "modulation": modulation[batch:],
                "uncond_context": conditioned["context"][:batch],
                "uncond_modulation": modulation[:batch],
                "guidance": guidance,
            },
            batch=batch,
            height=h,
            width=w,
        )
        with torch.no_grad():
            velocity = model(
                torch.from_numpy(np.concatenate([latents, latents])),
                torch.from_numpy(embeds),
                torch.from_numpy(pooled),
                torch.full((2 * batch,), float(sigma) * 1000),
            ).sample.numpy()
        uncond, cond = velocity[:batch], velocity[batch:]
        expected = latents - sigma * (uncond + guidance[:, None, None, None] * (cond - uncond))
        assert relative_error(actual["denoised"], expected) <= limit
        a, b, c = (coefficients[:, i, None, None, None] for i in range(3))
        following = a * latents + b * expected + c * previous
        assert relative_error(actual["next_latents"], following) <= limit
        # The update alone could hide a velocity that is off where sigma is small.
        velocity_actual = (latents - actual["denoised"]) / sigma
        velocity_expected = (latents - expected) / sigma
        assert relative_error(velocity_actual, velocity_expected) <= limit
