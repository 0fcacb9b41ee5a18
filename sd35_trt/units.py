"""Byte counts in words."""

from __future__ import annotations


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
