"""Reading and writing picture files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from sd35_trt import __version__
from sd35_trt.errors import Sd35Error, UsageError


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
    """An RGB picture.

    Raises:
        UsageError: missing or no picture.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise UsageError(f"{path} is missing", "name an existing picture") from None
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path} is not a readable picture: {error}") from error


def save_picture(image: Image.Image, path: Path, parameters: dict[str, Any], index: int) -> None:
    """Write a PNG with its parameters as JSON in the text chunk ``sd35-trt``.

    Args:
        parameters: of the run; lists in it hold one entry per image.
        index: which image of the run this is.

    Raises:
        Sd35Error: the file cannot be written; nothing of it stays.
    """
    own = {
        key: value[index] if key in ("prompt", "negative", "seed") else value
        for key, value in parameters.items()
    }
    info = PngInfo()
    info.add_text("sd35-trt", json.dumps({"version": __version__, **own}))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        image.save(partial, format="PNG", pnginfo=info)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise Sd35Error(
            f"cannot write {path}: {error.strerror or error}", "free space or choose another --out"
        ) from error
