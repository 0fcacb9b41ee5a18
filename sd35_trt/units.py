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


def format_seconds(seconds: float) -> str:
    """Three digits or more: ``47.3 ms``, ``1.25 s``, ``128.4 s``."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms" if seconds < 0.1 else f"{1000 * seconds:.0f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.1f} s"
