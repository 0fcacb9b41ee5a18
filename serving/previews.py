"""Previews: latents as colours, by a linear map that is learnt from finished pictures."""

from __future__ import annotations

import io
import threading

import numpy as np
from PIL import Image

# Pictures that a map is learnt from; by then it has settled.
_ENOUGH = 32

# Of the mean square of a latent; keeps channels that never varied at zero.
_RIDGE = 1e-3


class Preview:
    """Shows unfinished latents of one bundle without its decoder.

    Of the VAE of Stable Diffusion 3, colours are nearly a linear function of a latent pixel's
    channels. Every finished picture is a sample of that function: its latents beside its pixels,
    averaged to as many. Methods may be called from any thread.

    Args:
        channels: of the latents.
    """

    def __init__(self, channels: int) -> None:
        self._lock = threading.Lock()
        # Normal equations of least squares, with a constant beside the channels.
        self._squares = np.zeros((channels + 1, channels + 1))
        self._products = np.zeros((channels + 1, 3))
        self._pictures = 0
        self._weights: np.ndarray | None = None

    def learn(self, latents: np.ndarray, images: np.ndarray) -> None:
        """Learn from finished pictures, until there were enough.

        Args:
            latents: float32 [B, C, h, w].
            images: uint8 [B, H, W, 3].
        """
        if self._pictures >= _ENOUGH:
            return
        count, _, height, width = latents.shape
        scale = images.shape[1] // height
        tiles = images.reshape(count, height, scale, width, scale, 3)
        colours = tiles.mean((2, 4), dtype=np.float64).reshape(-1, 3)
        features = _with_constant(latents.transpose(0, 2, 3, 1).astype(np.float64))
        features = features.reshape(len(colours), -1)
        with self._lock:
            self._pictures += count
            self._squares += features.T @ features
            self._products += features.T @ colours
            ridge = _RIDGE * np.trace(self._squares) / len(self._squares)
            self._weights = np.linalg.solve(
                self._squares + ridge * np.eye(len(self._squares)), self._products
            )

    def show(self, denoised: np.ndarray) -> bytes:
        """A preview as PNG, one pixel for each of the latents'.

        Args:
            denoised: a step's estimate of one picture's latents, float32 [C, h, w].

        Raises:
            ValueError: it has not learnt from any picture.
        """
        if self._weights is None:
            raise ValueError("a preview is learnt from a picture first")
        colours = _with_constant(denoised.transpose(1, 2, 0)) @ self._weights
        pixels = np.nan_to_num(colours).clip(0, 255).round().astype(np.uint8)
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, format="PNG")
        return out.getvalue()


def _with_constant(channels: np.ndarray) -> np.ndarray:
    """[…, C] with a one beside the channels."""
    return np.concatenate([channels, np.ones_like(channels[..., :1])], axis=-1)
