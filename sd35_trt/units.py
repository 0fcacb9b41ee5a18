"""Byte counts and durations in words."""

from __future__ import annotations

import re

from .errors import UsageError

_LEAST, _MOST = 1 << 20, 1 << 60

# Seconds of a unit.
_SECONDS = {"m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_bytes(text: str) -> int:
    """A number of bytes: ``6000000``, ``5.5GB``, ``800 MB``, ``8GiB``, ``1TB``.

    Raises:
        UsageError: anything else, or less than 1 MiB: a unit was forgotten.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kMGT]i?)?B?", text)
    if match is None:
        raise UsageError(f"{text!r} is not a number of bytes such as 5.5GB")
    unit = match[2] or ""
    base = 1024 if unit.endswith("i") else 1000
    count = float(match[1]) * base ** " kMGT".index(unit[:1] or " ")
    return check_bytes(text, count)


def check_bytes(given: object, count: float) -> int:
    """``count`` as a whole number of bytes of memory.

    Args:
        given: as the user wrote it.

    Raises:
        UsageError: it is less than 1 MiB, or more than any machine has.
    """
    if not _LEAST <= count <= _MOST:
        size = "less than 1 MiB" if count < _LEAST else "more than any memory"
        raise UsageError(f"{given} is {size}", "say it with a unit, such as 8GiB")
    return round(count)


def parse_duration(text: str) -> int:
    """Seconds of a number of minutes, hours, days or weeks: ``90m``, ``12h``, ``30d``, ``2w``.

    Raises:
        UsageError: anything else.
    """
    match = re.fullmatch(r"(\d{1,6}) ?([mhdw])", text)
    if match is None:
        raise UsageError(
            f"{text!r} is not a duration",
            "say it in minutes, hours, days or weeks: 90m, 12h, 30d, 2w",
        )
    return int(match[1]) * _SECONDS[match[2]]


def format_bytes(count: float) -> str:
    """Decimal units, three digits: ``23.6 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def format_memory(count: int) -> str:
    """Binary units where they come out whole, as memory is sold: ``8 GiB``; else decimal."""
    gib = count / 2**30
    return f"{gib:.0f} GiB" if count and gib == round(gib) else format_bytes(count)


def format_seconds(seconds: float) -> str:
    """Three digits or more: ``47.3 ms``, ``1.25 s``, ``128.4 s``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.1f} s"
