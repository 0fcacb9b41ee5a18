"""The form of ``POST /v1/images/edits``: a picture's file, a mask's, and the fields of its body."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

# Starlette misses it when the first form comes.
import python_multipart  # noqa: F401
from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from .bodies import EditBody
from .controls import FIELD as CONTROL
from .controls import FormControl
from .failures import Refusal, refusal_of_fields, short

# OpenAI's clients send the first for one picture, the second for a list.
_PICTURES = ("image", "image[]")
_MASK = "mask"

# Fields that are lists or mappings: JSON's text, or as OpenAI's clients write them in a form,
# ``name[]`` for each entry of a list and ``name[key]`` for each of a mapping.
_LISTS = ("skip_guidance_layers",)
_MAPPINGS = ("adapters", CONTROL)
_ENTRY = re.compile(r"(\w+)\[([^\]]*)\](?:\[([^\]]*)\])?", re.DOTALL)

# Of a net without the name of a part, an uploaded file is this part.
_FILE = "image"

# A picture, a mask, and pictures for nets.
_MOST_FILES = 16
_MOST_FIELDS = 256


def _edit_form() -> dict[str, Any]:
    schema = EditBody.model_json_schema()
    net = schema.pop("$defs")[FormControl.__name__]
    schema["properties"][CONTROL]["anyOf"][0]["additionalProperties"] = net
    picture = {"type": "string", "format": "binary", "description": "PNG, JPEG or WebP."}
    mask = {**picture, "description": "Drawn anew where it is transparent, or else light."}
    schema["properties"] = {"image": picture, "mask": mask, **schema["properties"]}
    schema["required"] = ["image", *schema["required"]]
    return {"required": True, "content": {"multipart/form-data": {"schema": schema}}}


#: As OpenAPI describes it.
EDIT_FORM = _edit_form()


@dataclass(frozen=True)
class Edit:
    """What a form holds.

    Attributes:
        body: its fields.
        image: the picture's file.
        mask: the mask's; None where there is none.
    """

    body: EditBody
    image: UploadFile
    mask: UploadFile | None


@dataclass
class _Parts:
    """Parts of a form, sorted as they come."""

    fields: dict[str, Any] = field(default_factory=dict)
    images: list[UploadFile] = field(default_factory=list)
    masks: list[UploadFile] = field(default_factory=list)

    def take(self, name: str, value: UploadFile | str) -> None:
        """Sort one in.

        Raises:
            Refusal: it is of the wrong kind, or given twice.
        """
        if name in _PICTURES or name == _MASK:
            if not isinstance(value, UploadFile):
                raise _refused(f"{name.removesuffix('[]')} must be a file", name.removesuffix("[]"))
            (self.masks if name == _MASK else self.images).append(value)
        elif isinstance(value, UploadFile):
            if name in EditBody.model_fields:
                raise _refused(f"{name} must be text", name)
            self.fields[name] = ""  # refused with the other fields that are none
        elif entry := _entry_of(name):
            self.take_entry(*entry, value)
        elif name in self.fields:
            raise _refused(f"{short(name)} is given twice", name)
        else:
            self.fields[name] = _parsed(value) if name in (*_LISTS, *_MAPPINGS) else value

    def take_entry(self, name: str, keys: tuple[str, ...], value: str | bytes) -> None:
        """Sort in what is of a list or a mapping.

        Args:
            keys: see :func:`_entry_of`.
            value: bytes are those of a file for a net.

        Raises:
            Refusal: it is given twice.
        """
        if name in _LISTS:
            entries = self.fields.setdefault(name, [])
            if isinstance(entries, list) and keys == ("",):
                entries.append(value)
                return
        elif all(keys):
            if isinstance(value, bytes) and len(keys) == 1:
                keys = *keys, _FILE
            within = self.fields.setdefault(name, {})
            for key in keys[:-1]:
                within = within.setdefault(key, {}) if isinstance(within, dict) else None
            if isinstance(within, dict) and keys[-1] not in within:
                within[keys[-1]] = value
                return
        raise _refused(f"{name} is given twice, or in a form of its own", name)


def _entry_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The field and the keys of ``field[key]`` or ``field[key][key]``; None of other names."""
    match = _ENTRY.fullmatch(name)
    if match is None or match[1] not in (*_LISTS, *_MAPPINGS):
        return None
    field, *keys = match.groups()
    return field, tuple(key for key in keys if key is not None)


async def read_edit(request: Request) -> AsyncIterator[Edit]:
    """A dependency: the fields and the pictures of a form, whose files are closed afterwards.

    Raises:
        Refusal: a field that is none, given twice, or of the wrong kind.
    """
    # The gate limits the whole: of a part, base64 may be as long.
    limits = {"max_files": _MOST_FILES, "max_fields": _MOST_FIELDS, "max_part_size": sys.maxsize}
    async with request.form(**limits) as form:
        parts = _Parts()
        for name, value in form.multi_items():
            net = _entry_of(name)
            if isinstance(value, UploadFile) and net is not None and net[0] == CONTROL:
                parts.take_entry(*net, await value.read())
            else:
                parts.take(name, value)
        if len(parts.images) != 1:
            found = len(parts.images)
            what = "is missing" if not found else f"is one picture, not {found}"
            raise _refused(f"image {what}", "image")
        if len(parts.masks) > 1:
            raise _refused(f"mask is one picture, not {len(parts.masks)}", _MASK)
        yield Edit(_validated(parts.fields), parts.images[0], next(iter(parts.masks), None))


def _parsed(text: str) -> Any:
    """What JSON's text says; another text stays one, and is refused as such."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _validated(fields: dict[str, Any]) -> EditBody:
    try:
        return EditBody.model_validate(fields)
    except ValidationError as error:
        raise refusal_of_fields(error.errors()) from error


def _refused(message: str, field: str) -> Refusal:
    return Refusal(422, message, "invalid_value", param=field)
