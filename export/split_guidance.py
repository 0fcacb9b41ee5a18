"""What two GPUs compute of a step: each a branch of guidance, and both what follows from the two.

``denoised = latents - sigma * velocity`` is linear in the velocity, so that guidance of what the
branches denoised is what guidance of their velocities gives, to rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .denoiser_segments import each, update
from .ports import Ports
from .whole import WholeModule


class Combine(WholeModule):
    """Guidance and the sampler's update, of what both branches denoised. It has no weights.

    Args:
        transformer: whose latents they are.
        inpainting: whether it keeps what a mask leaves of a picture.
    """

    def __init__(self, transformer: Any, inpainting: bool) -> None:
        super().__init__()
        self.part = nn.Module()
        channels = transformer.config.in_channels
        latents = (torch.float32, ("batch", channels, "height", "width"))
        per_sample = (torch.float32, ("batch",))
        self.inputs: Ports = {
            "uncond_denoised": latents,
            "cond_denoised": latents,
            "latents": latents,
            "coefficients": (torch.float32, ("batch", 3)),
            "previous_denoised": latents,
            "guidance": per_sample,
        }
        if inpainting:
            self.inputs["mask"] = (torch.float32, ("batch", 1, "height", "width"))
            self.inputs["source"] = self.inputs["source_noise"] = latents
            self.inputs["next_sigma"] = per_sample
        self.outputs = {"next_latents": latents, "denoised": latents}

    def forward(
        self,
        uncond_denoised: torch.Tensor,
        cond_denoised: torch.Tensor,
        latents: torch.Tensor,
        coefficients: torch.Tensor,
        previous_denoised: torch.Tensor,
        guidance: torch.Tensor,
        mask: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        source_noise: torch.Tensor | None = None,
        next_sigma: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        denoised = uncond_denoised + each(guidance) * (cond_denoised - uncond_denoised)
        return update(
            latents, denoised, coefficients, previous_denoised, mask, source, source_noise,
            next_sigma,
        )  # fmt: skip
