"""Output that degrades where a terminal's or a pipe's encoding lacks a character."""

from __future__ import annotations

import codecs
import io
import sys

# What messages and tables have beyond ASCII; anything else is a question mark.
_PLAIN = str.maketrans(
    {"×": "x", "–": "-", "—": "-", "…": "...", "→": "->", "²": "2", "³": "3", "µ": "u", "≥": ">="}
)
_HANDLER = "sd35_trt.plain"


def degrade_output() -> None:
    """Never fail for a character that cannot be encoded, as under ``LANG=C``: work would be lost.

    That is also a byte of a file's name that is no UTF-8, which no encoding has.
    """
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(c if c.isascii() else "?" for c in text), error.end
