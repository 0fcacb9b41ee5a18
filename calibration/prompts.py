"""Prompt files: UTF-8 text, one prompt per line; a line ends with \\n, \\r\\n or \\r."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from sd35_trt.errors import UsageError
from sd35_trt.formats.reading import read_file, reason_of

# Bytes: a hundred thousand long prompts.
_LARGEST = 256 << 20

_FIX = "give a UTF-8 text file with one prompt per line"


def packaged_prompts() -> Path:
    """The 128 prompts written for this project; what they cover is tested."""
    return Path(__file__).parent / "prompts.txt"


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; lines that are blank are left out.

    Raises:
        UsageError: missing, not UTF-8, or without a prompt.
    """
    try:
        text = read_file(path, _LARGEST).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"prompt file {path} is not UTF-8 (byte {error.start})", _FIX) from error
    except OSError as error:
        raise UsageError(f"cannot read prompt file {path}: {reason_of(error)}", _FIX) from error
    # Not splitlines(): a prompt may hold a form feed, U+0085 or U+2028.
    lines = re.split("\r\n|\r|\n", text)
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"prompt file {path} is empty", _FIX)
    return prompts


def digest(prompts: Sequence[str]) -> str:
    """SHA-256 of a prompt set in its order, hex."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()
