"""Reading and writing picture files."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from sd35_trt import __version__
from sd35_trt.errors import Sd35Error, UsageError

_MOST_OF_16_BITS = 65535

#: What Pillow raises of files, when they are opened or first looked at.
UNREADABLE = (
    OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError
)  # fmt: skip


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before anything is drawn.

    Raises:
        UsageError: names the fix.
    """
    if path.suffix.lower() != ".png":
        raise UsageError(f"--out {path} does not end in .png", "pictures are written as PNG")
    if path.is_dir():
        raise UsageError(f"--out {path} is a directory", "name a file in it")
    folder = path.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"{folder} is not a writable directory", "make it, or choose another --out"
        )


def load_picture(path: Path) -> Image.Image:
    """An RGB picture; see :func:`as_rgb`.

    Raises:
        UsageError: missing or no picture.
    """
    try:
        # A FIFO waits for ever, and a device may never end.
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a file", "name an existing picture")
        with Image.open(path) as image:
            return as_rgb(image)
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", "name an existing picture") from None
    except UNREADABLE as error:
        raise UsageError(f"{path} is not a readable picture: {error}") from error


def as_rgb(image: Image.Image) -> Image.Image:
    """A picture as it is looked at: upright, on white where it is transparent, 16 bits as 8.

    Raises:
        UsageError: its pixels have no known range.
    """
    # What a camera wrote as it was held.
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UsageError("image has floating-point pixels", "give it as RGB")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if grey.size and not 0 <= grey.min() <= grey.max() <= _MOST_OF_16_BITS:
            raise UsageError("image has pixels of more than 16 bits", "give it as RGB")
        image = Image.fromarray((grey * 255 / _MOST_OF_16_BITS).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def picture_info(parameters: dict[str, Any], index: int) -> PngInfo:
    """An image's parameters as JSON in the text chunk ``sd35-trt`` of a PNG.

    Args:
        parameters: of the run; lists in it hold one entry per image.
        index: which image of the run this is.
    """
    own = {
        key: value[index] if key in ("prompt", "negative", "seed", "adapters") else value
        for key, value in parameters.items()
    }
    info = PngInfo()
    info.add_text("sd35-trt", json.dumps({"version": __version__, **own}))
    return info


def save_picture(image: Image.Image, path: Path, parameters: dict[str, Any], index: int) -> None:
    """Write a PNG with its parameters; see :func:`picture_info`.

    Raises:
        Sd35Error: the file cannot be written; nothing of it stays.
    """
    info = picture_info(parameters, index)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Sd35Error(
            f"cannot write {path}: {error.strerror or error}", "free space or choose another --out"
        ) from error
