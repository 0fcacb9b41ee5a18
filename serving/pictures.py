"""Pictures to and from the bytes that clients send and get."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from PIL import Image

from sd35_trt.runtime.picture import UNREADABLE, as_rgb, picture_info

from .failures import Refusal

#: Of an uploaded picture: what decoding takes at most.
MOST_PIXELS = 40_000_000

# None of them runs another program or reads another file.
_FORMATS = ("PNG", "JPEG", "WEBP")


def decode_picture(data: bytes) -> np.ndarray:
    """An uploaded picture, uint8 [H, W, 3], upright and on white.

    Raises:
        Refusal: it is none, of another format, or too large.
    """
    try:
        with warnings.catch_warnings():
            # MOST_PIXELS says what is too large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > MOST_PIXELS:
            raise _refused(f"has {image.width} x {image.height} pixels, more than 40 million")
        return np.asarray(as_rgb(image))
    except UNREADABLE as error:
        raise _refused(f"must be a PNG, JPEG or WebP file ({type(error).__name__})") from error


def _refused(what: str) -> Refusal:
    return Refusal(422, f"image {what}", "invalid_image", param="image")


def encode_png(image: np.ndarray, parameters: dict[str, Any], index: int) -> bytes:
    """A picture as PNG, with its parameters as ``sd35-trt generate`` writes them.

    Args:
        image: uint8 [H, W, 3].
        parameters, index: see :func:`sd35_trt.runtime.picture.picture_info`.
    """
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG", pnginfo=picture_info(parameters, index))
    return out.getvalue()
