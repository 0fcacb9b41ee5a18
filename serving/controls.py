"""The pictures that ControlNets follow: as a request says them, and as the runtime takes them."""

from __future__ import annotations

import base64
import binascii
import importlib.util
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sd35_trt.runtime import Control

from .failures import Refusal
from .pictures import decode_picture
from .texts import Text

#: The body's field.
FIELD = "control"

# What comes before the base64 of a data URL (RFC 2397).
_DATA_URL = re.compile(r"data:[\w./+;=-]*;base64,")

_LARGEST_SCALE = 100.0


def _file(value: Any) -> Any:
    """The bytes of a file in base64, by itself or in a data URL; an uploaded file's as they are."""
    if not isinstance(value, str):
        return value
    start = _DATA_URL.match(value)
    try:
        return base64.b64decode(value[start.end() if start else 0 :], validate=True)
    except (binascii.Error, ValueError):
        raise PydanticCustomError("base64", "must be a picture's file in base64") from None


_PICTURE = {
    "type": "string",
    "contentEncoding": "base64",
    "description": "PNG, JPEG or WebP in base64, or as data: URL.",
}


class ControlBody(BaseModel):
    """What a ControlNet of the bundle is asked for."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    image: Annotated[bytes, BeforeValidator(_file), WithJsonSchema(_PICTURE)] | None = None
    picture: Text | None = Field(
        None, description="Name of a picture of the server, in place of image."
    )
    scale: float = Field(
        1.0, ge=-_LARGEST_SCALE, le=_LARGEST_SCALE, description="How much it is followed."
    )
    start: float = Field(0.0, ge=0, le=1, description="Share of the steps after which it begins.")
    end: float = Field(1.0, ge=0, le=1, description="Share of the steps at which it ends.")
    edges: bool = Field(False, description="Find the edges of the picture, and follow these.")

    @model_validator(mode="after")
    def _one_picture(self) -> ControlBody:
        if (self.image is None) == (self.picture is None):
            raise PydanticCustomError("one_picture", "give image, or else picture")
        return self


class FormControl(ControlBody):
    """The same in a form, where every value is text."""

    model_config = ConfigDict(strict=False)


def controls_of(
    asked: Mapping[str, ControlBody], known: set[str], pictures: Mapping[str, np.ndarray]
) -> dict[str, Control | None]:
    """The runtime's argument ``controls``; takes as long as pictures take to be decoded.

    Args:
        asked: by name of the net.
        known: nets of the bundle. Of others no picture is decoded: the runtime refuses them.
        pictures: of the server, uint8 [H, W, 3] by name.

    Raises:
        Refusal: a picture that is none, or a name that is not the server's.
    """
    return {
        name: _control(f"{FIELD}.{name}", body, pictures) if name in known else None
        for name, body in asked.items()
    }


def _control(where: str, body: ControlBody, pictures: Mapping[str, np.ndarray]) -> Control:
    if body.edges and importlib.util.find_spec("cv2") is None:
        raise _refused(f"{where}.edges: this server finds no edges — send them as the picture")
    if body.image is not None:
        pixels = decode_picture(body.image, f"{where}.image").pixels
    elif body.picture is not None and body.picture in pictures:
        pixels = pictures[body.picture]
    else:
        listed = f"use one of: {', '.join(sorted(pictures))}" if pictures else "send it as image"
        raise _refused(f"{where}: there is no picture {reprlib.repr(body.picture)} — {listed}")
    return Control(pixels, body.scale, body.start, body.end, body.edges)


def _refused(message: str) -> Refusal:
    return Refusal(422, message, "invalid_value", param=FIELD)
