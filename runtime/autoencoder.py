"""Pictures to latents and back, by a bundle's VAE."""

from __future__ import annotations

import numpy as np

from sd35_trt.formats.bundle import Manifest

from .devices.device import Buffer, Device
from .runner import ComponentRunner

# How a picture that is drawn from is taken, in a bundle whose ControlNets may take others.
_USUAL_ENCODING = (1 / 127.5, -1.0, 1.0)


class Autoencoder:
    """The VAE of a bundle.

    Args:
        device: that its engines run on.
        runner: of the bundle's components.
        manifest: the bundle's.
    """

    def __init__(self, device: Device, runner: ComponentRunner, manifest: Manifest) -> None:
        self._device = device
        self._runner = runner
        self._manifest = manifest
        self._scale = manifest.latent_scale

    def encode(self, images: np.ndarray, net: str | None = None) -> np.ndarray:
        """Latents of pictures, float32 [B, C, h, w].

        Args:
            images: uint8 [B, H, W, 3].
            net: the ControlNet that they are for, which may take them in its own way.

        Raises:
            Sd35Error: the engine failed.
        """
        count, height, width, _ = images.shape
        dims = self.dims(count, height // self._scale, width // self._scale)
        inputs = {"image": images, **self._encoding(net, count)}
        out = self._runner.run("vae_encoder", inputs, **dims)
        return self._device.download(out["latents"]).astype(np.float32)

    def _encoding(self, net: str | None, count: int) -> dict[str, np.ndarray]:
        """The input that says how pictures are taken; none where there is none."""
        if not self._manifest.controls:
            return {}
        record = None if net is None else self._manifest.control(net)
        values = _USUAL_ENCODING if record is None else record.encoding
        return {"encoding": np.tile(np.array(values, np.float32), (count, 1))}

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
