"""Pictures that a request starts from: their pixels, and which of them are drawn anew."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Manifest

from .arguments import shown
from .sizes import check_count, check_size

if TYPE_CHECKING:
    # Loaded where pictures are made of arrays, or arrays of pictures: it takes a fifth of the
    # import.
    from PIL import Image

    #: What a picture may be given as.
    PictureLike = Image.Image | np.ndarray | str | os.PathLike[str]


def pixels_of(name: str, image: PictureLike, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 [H, W, 3], resized to ``size`` (width, height) if one is given.

    Args:
        name: of the argument, for the message.

    Raises:
        UsageError: it is no picture, or cannot be read.
    """
    from PIL import Image

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            raise UsageError(
                f"{name} is {image.dtype} {list(image.shape)}, not uint8 [height, width, 3]"
            )
        picture = Image.fromarray(image)
    else:
        picture = _picture(name, image)
    if size is not None and picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture)


def pictures_of(
    images: PictureLike | list[PictureLike] | tuple[PictureLike, ...], manifest: Manifest
) -> np.ndarray:
    """uint8 [B, H, W, 3] of one picture or several, as a bundle encodes them.

    Raises:
        UsageError: one is no picture, they are of several sizes, or not of one that the bundle
            draws.
    """
    given = images if isinstance(images, list | tuple) else (images,)
    check_count(len(given), manifest)
    pixels = [pixels_of("image", image, None) for image in given]
    sizes = sorted({(one.shape[1], one.shape[0]) for one in pixels})
    if len(sizes) != 1:
        several = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise UsageError(f"the pictures are of several sizes: {several}", "encode each by itself")
    check_size(*sizes[0], manifest)
    return np.stack(pixels)


def mask_of(mask: PictureLike, size: tuple[int, int]) -> np.ndarray:
    """Which pixels are drawn anew: bool [H, W], True where a picture is light.

    As diffusers' ``VaeImageProcessor`` makes it: resized, then grey, then cut at half.

    Args:
        mask: of grey or RGB, or an array of booleans.
        size: (width, height).

    Raises:
        UsageError: it is no picture, cannot be read, or leaves no pixel to be drawn.
    """
    from PIL import Image

    if isinstance(mask, np.ndarray):
        values = mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask
        grey = values.ndim == 2 or (values.ndim == 3 and values.shape[-1] == 3)
        if values.dtype != np.uint8 or not grey or not values.size:
            raise UsageError(
                f"mask is {mask.dtype} {list(mask.shape)}, not bool or uint8 [height, width]"
            )
        picture = Image.fromarray(values)
    else:
        picture = _picture("mask", mask)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(picture.convert("L")) >= 128


def latent_mask(mask: np.ndarray, scale: int) -> np.ndarray:
    """Which latent pixels are drawn anew: those whose first pixel is.

    Args:
        mask: bool [..., H, W].
        scale: pixels of a latent pixel in each direction.

    Returns:
        float32 [..., H / scale, W / scale], 0 or 1.
    """
    return mask[..., ::scale, ::scale].astype(np.float32)


def _picture(name: str, image: Image.Image | str | os.PathLike[str]) -> Image.Image:
    """In RGB, as it is looked at."""
    from PIL import Image

    from .picture import UNREADABLE, as_rgb, load_picture

    if isinstance(image, str | os.PathLike):
        return load_picture(Path(image))
    if not isinstance(image, Image.Image):
        raise UsageError(f"{name} must be a picture, an array or a path, not {shown(image)}")
    try:
        return as_rgb(image)
    except UNREADABLE as error:
        raise UsageError(f"{name} cannot be read: {error}") from error
