"""Calibrating ControlNets: on edges and blurred copies of the model's own pictures.

A net does not need the transformer: it is given the latents of a drawn picture with as much noise
as each step has, and the picture's hint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from sd35_trt.checkpoints.controlnets import Net
from sd35_trt.compat.requirement import requirement
from sd35_trt.components import control_part

if TYPE_CHECKING:
    from .run import Batch, DrawingSettings

# Of a blurred picture, in pixels: 1/20 of 1024.
_BLUR = 1 / 20

# As the runtime finds them.
_LOW, _HIGH = 100, 200


def hints(vae: Any, latents: torch.Tensor, nets: Sequence[Net]) -> dict[str, torch.Tensor]:
    """Of each net, the latents of what it is given for drawn pictures, on the CPU.

    Nets for edges get edges, those for blur blurred pictures, all others both in turn.

    Args:
        vae: diffusers'.
        latents: of the pictures [n, C, h, w].
    """
    found: dict[str, list[torch.Tensor]] = {net.name: [] for net in nets}
    for number, one in enumerate(latents.split(1)):
        scaled = one / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        drawn = vae.decode(scaled.to(vae.dtype)).sample[0].float().clamp(-1, 1)
        pixels = ((drawn / 2 + 0.5) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        for net in nets:
            kind = {"canny": 0, "blur": 1}.get(net.kind, number % 2)
            picture = _blurred(pixels) if kind else _edges(pixels)
            found[net.name].append(_encoded(vae, picture, net.encoding))
    return {control_part(name): torch.cat(own).contiguous() for name, own in found.items()}


def _encoded(vae: Any, pixels: np.ndarray, encoding: tuple[float, float, float]) -> torch.Tensor:
    factor, offset, share = encoding
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(vae.device).float()
    mean = vae.encode((image * factor + offset).to(vae.dtype)).latent_dist.mean.float()
    shift = share * (vae.config.shift_factor or 0.0)
    return ((mean - shift) * vae.config.scaling_factor).cpu()


def _edges(pixels: np.ndarray) -> np.ndarray:
    with requirement("calibrating ControlNets", "control"):
        import cv2
    return np.repeat(cv2.Canny(pixels, _LOW, _HIGH)[:, :, None], 3, axis=2)


def _blurred(pixels: np.ndarray) -> np.ndarray:
    radius = max(pixels.shape) * _BLUR
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def run_net(
    net: Any,
    settings: DrawingSettings,
    sigmas: Sequence[float],
    batch: Batch,
    text: Mapping[str, torch.Tensor],
    negative: Mapping[str, torch.Tensor],
    latents: torch.Tensor,
    hint: torch.Tensor,
) -> None:
    """Let a net see all steps of a batch.

    Args:
        net: diffusers'.
        sigmas: noise before each step.
        text, negative: see :func:`sd35_trt.calibration.run.draw`.
        latents: of the drawn pictures.
        hint: of :func:`hints`.
    """
    move = {"device": net.device, "dtype": net.dtype}
    guided = settings.guidance > 1.0
    texts = {k: v.expand(len(latents), *v.shape[1:]) for k, v in negative.items()}
    both = {k: torch.cat([texts[k], v] if guided else [v]).to(**move) for k, v in text.items()}
    branches, seed = (2 if guided else 1), settings.seed
    noise = torch.cat(
        [
            torch.randn(latents[:1].shape, generator=torch.Generator("cpu").manual_seed(seed + i))
            for i in batch.indices
        ]
    )
    pooled, joint = both["pooled"], net.config.joint_attention_dim is not None
    if net.config.force_zeros_for_pooled_projection:
        pooled = torch.zeros_like(pooled)
    for sigma in sigmas:
        noisy = (1 - sigma) * latents.float() + sigma * noise
        time = sigma * settings.scheduler.num_train_timesteps
        net(
            hidden_states=noisy.repeat(branches, 1, 1, 1).to(**move),
            controlnet_cond=hint.repeat(branches, 1, 1, 1).to(**move),
            encoder_hidden_states=both["embeds"] if joint else None,
            pooled_projections=pooled,
            timestep=torch.full((branches * len(latents),), time, device=net.device),
        )
