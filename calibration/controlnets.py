"""Calibrating ControlNets: on edges and blurred copies of the model's own pictures.

A net does not need the transformer: it is given the latents of a drawn picture with as much noise
as each step has, and the picture's hint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter

from sd35_trt.checkpoints.controlnets import Net
from sd35_trt.compat.opencv import canny_edges
from sd35_trt.components import control_part

# Of a blurred picture, in pixels: 1/20 of 1024.
_BLUR = 1 / 20


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
            picture = _blurred(pixels) if kind else canny_edges(pixels)
            found[net.name].append(encode_hints(vae, picture[None], net.encoding))
    return {control_part(name): torch.cat(own).contiguous() for name, own in found.items()}


@torch.no_grad()
def encode_hints(
    vae: Any, pictures: np.ndarray, encoding: tuple[float, float, float]
) -> torch.Tensor:
    """The latents that a net is given of pictures, float32 [n, C, h, w] on the CPU.

    Args:
        vae: diffusers'.
        pictures: uint8 [n, H, W, 3].
        encoding: of :class:`~sd35_trt.checkpoints.controlnets.Net`.
    """
    factor, offset, share = encoding
    image = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(vae.device).float()
    mean = vae.encode((image * factor + offset).to(vae.dtype)).latent_dist.mean.float()
    shift = share * (vae.config.shift_factor or 0.0)
    return ((mean - shift) * vae.config.scaling_factor).cpu()


def _blurred(pixels: np.ndarray) -> np.ndarray:
    radius = max(pixels.shape) * _BLUR
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))


def run_net(
    net: Any,
    steps: Sequence[tuple[float, float]],
    text: Mapping[str, torch.Tensor],
    pictures: torch.Tensor,
    noise: torch.Tensor,
    hint: torch.Tensor,
) -> None:
    """Let a net see all steps of some pictures.

    Args:
        net: diffusers'.
        steps: noise before each, and its timestep.
        text: ``embeds`` and ``pooled`` of each branch and picture.
        pictures: latents of the drawn pictures.
        noise: that they began with.
        hint: of :func:`hints`.
    """
    move = {"device": net.device, "dtype": net.dtype}
    pooled = text["pooled"].to(**move)
    branches, joint = len(pooled) // len(pictures), net.config.joint_attention_dim is not None
    if net.config.force_zeros_for_pooled_projection:
        pooled = torch.zeros_like(pooled)
    for sigma, timestep in steps:
        noisy = (1 - sigma) * pictures.float() + sigma * noise
        net(
            hidden_states=noisy.repeat(branches, 1, 1, 1).to(**move),
            controlnet_cond=hint.repeat(branches, 1, 1, 1).to(**move),
            encoder_hidden_states=text["embeds"].to(**move) if joint else None,
            pooled_projections=pooled,
            timestep=torch.full((len(pooled),), timestep, device=net.device),
        )
