"""Pictures to and from the bytes that clients send and get."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from sd35_trt.runtime.picture import UNREADABLE, as_rgb, picture_info

from .failures import Refusal

#: Of an uploaded picture: what decoding takes at most.
MOST_PIXELS = 40_000_000

# Of an alpha, below which there is more of what is behind.
_HALF = 128

# None of them runs another program or reads another file.
_FORMATS = ("PNG", "JPEG", "WEBP")

# Of zlib. Its usual 6 takes nearly three times as long, for files a seventh smaller.
_COMPRESSION = 1


@dataclass(frozen=True)
class Picture:
    """An uploaded picture, upright.

    Attributes:
        pixels: on white, uint8 [H, W, 3].
        clear: bool [H, W], what is rather transparent than not; None where there is no alpha.
    """

    pixels: np.ndarray
    clear: np.ndarray | None

    @property
    def mask(self) -> np.ndarray | None:
        """What is to be drawn anew by its own alpha, bool [H, W]; None where all is opaque."""
        return self.clear if self.clear is not None and self.clear.any() else None


def decode_mask(data: bytes) -> np.ndarray:
    """An uploaded mask: what is drawn anew, bool [H, W] or uint8 [H, W, 3].

    As OpenAI's, it is where the mask is transparent; where it has no alpha, where it is light.

    Raises:
        Refusal: see :func:`decode_picture`.
    """
    mask = decode_picture(data, "mask")
    return mask.pixels if mask.clear is None else mask.clear


def decode_picture(data: bytes, field: str = "image") -> Picture:
    """An uploaded picture.

    Args:
        field: that it is of, for the message; dots lead into it.

    Raises:
        Refusal: it is none, of another format, or too large.
    """
    try:
        with warnings.catch_warnings():
            # MOST_PIXELS says what is too large.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            file = Image.open(io.BytesIO(data), formats=_FORMATS)
        if file.width * file.height > MOST_PIXELS:
            size = f"{file.width} x {file.height}"
            raise _refused(field, f"has {size} pixels, more than 40 million")
        image = ImageOps.exif_transpose(file)
        clear = None
        if image.has_transparency_data:
            clear = np.asarray(image.convert("RGBA").getchannel("A")) < _HALF
        return Picture(np.asarray(as_rgb(image)), clear)
    except UNREADABLE as error:
        kind = type(error).__name__
        raise _refused(field, f"must be a PNG, JPEG or WebP file ({kind})") from error


def _refused(field: str, what: str) -> Refusal:
    return Refusal(422, f"{field} {what}", "invalid_image", param=field.partition(".")[0])


def encode_png(image: np.ndarray, parameters: dict[str, Any], index: int) -> bytes:
    """A picture as PNG, with its parameters as ``sd35-trt generate`` writes them.

    Args:
        image: uint8 [H, W, 3].
        parameters, index: see :func:`sd35_trt.runtime.picture.picture_info`.
    """
    out = io.BytesIO()
    info = picture_info(parameters, index)
    Image.fromarray(image).save(out, format="PNG", pnginfo=info, compress_level=_COMPRESSION)
    return out.getvalue()
