"""Pictures to latents and back, by a bundle's VAE."""

from __future__ import annotations

import numpy as np

from .devices.device import Buffer, Device
from .runner import ComponentRunner


class Autoencoder:
    """The VAE of a bundle.

    Args:
        device: that its engines run on.
        runner: of the bundle's components.
        scale: pixels of a latent pixel in each direction.
    """

    def __init__(self, device: Device, runner: ComponentRunner, scale: int) -> None:
        self._device = device
        self._runner = runner
        self._scale = scale

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Latents of pictures, float32 [B, C, h, w].

        Args:
            images: uint8 [B, H, W, 3].

        Raises:
            Sd35Error: the engine failed.
        """
        count, height, width, _ = images.shape
        dims = self.dims(count, height // self._scale, width // self._scale)
        out = self._runner.run("vae_encoder", {"image": images}, **dims)
        return self._device.download(out["latents"]).astype(np.float32)

    def decode(self, latents: np.ndarray | Buffer) -> np.ndarray:
        """Pictures of latents, uint8 [B, H, W, 3].

        Args:
            latents: float32 [B, C, h, w], on the host or on the device.

        Raises:
            Sd35Error: the engine failed.
        """
        count, _, height, width = latents.shape
        dims = self.dims(count, height, width)
        return self._device.download(
            self._runner.run("vae_decoder", {"latents": latents}, **dims)["image"]
        )

    def dims(self, count: int, height: int, width: int) -> dict[str, int]:
        """Sizes of the VAE's dynamic dimensions.

        Args:
            height, width: in latent pixels.
        """
        return {
            "batch": count,
            "height": height,
            "width": width,
            "image_height": height * self._scale,
            "image_width": width * self._scale,
        }
