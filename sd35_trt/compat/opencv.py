"""Edges of pictures, as ControlNets for edges were trained on."""

from __future__ import annotations

import numpy as np

from .requirement import requirement

# The hysteresis of diffusers' examples, and of the card of Stability's net.
_LOW, _HIGH = 100, 200


def canny_edges(pixels: np.ndarray) -> np.ndarray:
    """White edges on black, by OpenCV's Canny: uint8 [H, W, 3].

    Args:
        pixels: uint8 [H, W, 3].

    Raises:
        Sd35Error: OpenCV is not installed.
    """
    with requirement("finding edges", "control"):
        import cv2
    edges = cv2.Canny(pixels, _LOW, _HIGH)
    return np.repeat(edges[:, :, None], 3, axis=2)
