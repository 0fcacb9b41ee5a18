"""The nodes of the bundle's VAE, in place of ComfyUI's VAE Decode and VAE Encode."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from .arrays import image_of, latent_of, latents_of, pixels_of
from .wires import CATEGORY, Model, ModelWire


class Decode(io.ComfyNode):
    """LATENT → IMAGE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtDecode",
            display_name="VAE Decode (SD3.5 TRT)",
            category=CATEGORY,
            description="Pictures of latents, by the VAE in the bundle.",
            inputs=[ModelWire.Input("model"), io.Latent.Input("latent")],
            outputs=[io.Image.Output(display_name="image")],
        )

    @classmethod
    def execute(cls, model: Model, latent: Mapping[str, Any]) -> io.NodeOutput:
        latents = latents_of(latent)
        parts = [model.pipe.decode(part) for part in _parts(latents, model.most)]
        return io.NodeOutput(image_of(np.concatenate(parts)))


class Encode(io.ComfyNode):
    """IMAGE → LATENT."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtEncode",
            display_name="VAE Encode (SD3.5 TRT)",
            category=CATEGORY,
            description="Latents of pictures, by the VAE in the bundle.",
            inputs=[ModelWire.Input("model"), io.Image.Input("image")],
            outputs=[io.Latent.Output(display_name="latent")],
        )

    @classmethod
    def execute(cls, model: Model, image: torch.Tensor) -> io.NodeOutput:
        pixels = pixels_of(image)
        parts = [model.pipe.encode(list(part)) for part in _parts(pixels, model.most)]
        return io.NodeOutput({"samples": latent_of(np.concatenate(parts))})


def _parts(batch: np.ndarray, most: int) -> list[np.ndarray]:
    return [batch[first : first + most] for first in range(0, len(batch), most)]
