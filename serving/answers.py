"""What finished pictures are answered with."""

from __future__ import annotations

import base64
import json
import time
from typing import Any

from fastapi import Response
from pydantic import BaseModel, ConfigDict

from sd35_trt.runtime import Result

from .pictures import encode_png


class Picture(BaseModel):
    """One picture of an answer."""

    b64_json: str
    seed: int


class Answer(BaseModel):
    """OpenAI's ``ImagesResponse``, with ours beside it."""

    model_config = ConfigDict(extra="allow")

    created: int
    background: str
    output_format: str
    size: str
    data: list[Picture]
    model: str
    parameters: dict[str, Any]
    timings: dict[str, float]
    notes: list[str]


class Problem(BaseModel):
    """OpenAI's error."""

    message: str
    type: str
    param: str | None
    code: str


class Failure(BaseModel):
    """What is answered instead of pictures."""

    error: Problem


def wants_png(accept: str) -> bool:
    """Whether a client would rather have a picture's bytes than JSON.

    Args:
        accept: its ``Accept`` header (RFC 9110, 12.5.1); empty takes anything.
    """
    return _weight(accept, "image/png") > _weight(accept, "application/json")


def _weight(accept: str, kind: str) -> float:
    """What the most specific range that holds a media type gives it."""
    ranges = {"*/*": 0, f"{kind.partition('/')[0]}/*": 1, kind: 2}
    found, weight = -1, 0.0
    for part in accept.lower().split(","):
        name, *parameters = (piece.strip() for piece in part.split(";"))
        if ranges.get(name, -1) > found:
            found = ranges[name]
            given = next((p[2:] for p in parameters if p.startswith("q=")), "1")
            weight = float(given) if given.replace(".", "", 1).isdecimal() else 1.0
    return weight


def png_answer(result: Result, model: str) -> Response:
    """The bytes of a result's one picture; its seed, model and time of drawing in the headers."""
    headers = {
        "X-Seed": str(result.seeds[0]),
        "X-Model": model,
        "X-Seconds": f"{result.timings['total']:.3f}",
    }
    data = encode_png(result.images[0], result.parameters, 0)
    return Response(data, headers=headers, media_type="image/png")


def json_answer(result: Result, model: str) -> Response:
    """All pictures as base64."""
    answer = {
        "created": int(time.time()),
        **of_result(result, model),
        "data": [
            {"b64_json": encoded(result, index), "seed": seed}
            for index, seed in enumerate(result.seeds)
        ],
        "parameters": result.parameters,
        "notes": result.notes,
    }
    return Response(json.dumps(answer), media_type="application/json")


def of_result(result: Result, model: str) -> dict[str, Any]:
    """What holds of all its pictures."""
    height, width = result.images.shape[1:3]
    return {
        "background": "opaque",
        "output_format": "png",
        "size": f"{width}x{height}",
        "model": model,
        "timings": {stage: round(seconds, 4) for stage, seconds in result.timings.items()},
    }


def encoded(result: Result, index: int) -> str:
    """One of its pictures as base64."""
    png = encode_png(result.images[index], result.parameters, index)
    return base64.b64encode(png).decode("ascii")
