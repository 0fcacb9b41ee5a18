"""ComfyUI's IMAGE, MASK and LATENT as the runtime takes them, and back.

A LATENT is in the space of the VAE's own output; the runtime's latents are the denoiser's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from comfy import model_management
from comfy.latent_formats import SD3

from sd35_trt.errors import UsageError

FORMAT = SD3()


def image_of(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] → IMAGE, float32 from 0 to 1."""
    return _placed(torch.from_numpy(pixels).to(torch.float32) / 255)


def pixels_of(image: torch.Tensor) -> np.ndarray:
    """IMAGE [B, H, W, 3 or more channels] → uint8 [B, H, W, 3]; alpha is left out."""
    scaled = image[..., :3].detach().to("cpu", torch.float32).clamp(0, 1) * 255
    return scaled.round().to(torch.uint8).contiguous().numpy()


def masks_of(mask: torch.Tensor) -> np.ndarray:
    """MASK [H, W], [B, H, W] or [B, 1, H, W] → uint8 [B, H, W]; 255 is what is drawn anew."""
    flat = mask.reshape(-1, *mask.shape[-2:]).detach().to("cpu", torch.float32)
    return (flat.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy()


def latent_of(latents: np.ndarray) -> torch.Tensor:
    """Latents float32 [B, 16, h, w] → samples of a LATENT."""
    return _placed(FORMAT.process_out(torch.from_numpy(latents)))


def latents_of(latent: Mapping[str, Any]) -> np.ndarray:
    """LATENT → latents float32 [B, 16, h, w].

    Zeros are what an empty latent has, whatever its channels: they stay zeros, as in ComfyUI.

    Raises:
        UsageError: it is of another kind of model.
    """
    samples = latent["samples"].detach().to("cpu", torch.float32)
    channels = FORMAT.latent_channels
    if samples.ndim == 4 and not samples.any():
        return np.zeros((len(samples), channels, *samples.shape[2:]), np.float32)
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise UsageError(
            f"the latent has the shape {list(samples.shape)}, SD3.5's have {channels} channels",
            "use an empty latent, or one that this or another SD3 model made",
        )
    return FORMAT.process_in(samples).contiguous().numpy()


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """Where ComfyUI keeps what goes from node to node."""
    return tensor.to(model_management.intermediate_device())
