"""The form of ``POST /v1/images/edits``: a picture's file, and the fields of its body."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

# Starlette misses it when the first form comes.
import python_multipart  # noqa: F401
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from .bodies import EditBody
from .failures import Refusal, refusal_of_fields

# OpenAI's clients send the first for one picture, the second for a list.
_PICTURES = ("image", "image[]")

_MOST_FILES = 4
_MOST_FIELDS = 64


def _edit_form() -> dict[str, Any]:
    schema = EditBody.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."}
    schema["properties"] = {"image": picture, **schema["properties"]}
    schema["required"] = ["image", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


#: As OpenAPI describes it.
EDIT_FORM = _edit_form()


async def read_edit(request: Request) -> AsyncIterator[tuple[EditBody, UploadFile]]:
    """A dependency: the fields and the picture of a form, whose files are closed afterwards.

    Raises:
        Refusal: a field that is none, given twice, or of the wrong kind.
    """
    async with request.form(max_files=_MOST_FILES, max_fields=_MOST_FIELDS) as form:
        fields: dict[str, str] = {}
        pictures: list[UploadFile] = []
        for name, value in form.multi_items():
            if name == "mask":
                raise _refused("mask is not supported — leave it out", name)
            if name in _PICTURES:
                if not isinstance(value, UploadFile):
                    raise _refused("image must be a file", "image")
                pictures.append(value)
            elif name in fields:
                raise _refused(f"{_short(name)} is given twice", name)
            elif isinstance(value, UploadFile) and name in EditBody.model_fields:
                raise _refused(f"{name} must be text", name)
            else:
                fields[name] = str(value)
        if len(pictures) != 1:
            what = "is missing" if not pictures else f"is one picture, not {len(pictures)}"
            raise _refused(f"image {what}", "image")
        yield _validated(fields), pictures[0]


def _validated(fields: dict[str, str]) -> EditBody:
    try:
        return EditBody.model_validate(fields)
    except ValidationError as error:
        raise refusal_of_fields(error.errors()) from error


def _refused(message: str, field: str) -> Refusal:
    return Refusal(422, message, "invalid_value", param=field)


def _short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:40]}…"
