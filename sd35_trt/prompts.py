"""Prompt files: UTF-8 text with one prompt per line."""

from __future__ import annotations

from pathlib import Path

from .errors import UsageError


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; blank lines and lines that begin with ``#`` do not count.

    Raises:
        UsageError: missing, not UTF-8, or without a prompt.
    """
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 (byte {error.start})", "save it as UTF-8 text"
        ) from error
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read: {error.strerror or error}", "name a text file"
        ) from error
    lines = [line.strip() for line in text.splitlines()]
    prompts = [line for line in lines if line and not line.startswith("#")]
    if not prompts:
        raise UsageError(f"{path} holds no prompt", "write one prompt per line")
    return prompts
