"""Checks of a request's arguments: each is of one kind, and what is not is refused by its name.

Whole floats and numpy's numbers are what they say; booleans are no numbers. Nothing is taken that
would fail later, where other requests are drawn in the same run.
"""

from __future__ import annotations

import math
import re
import reprlib
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.units import check_bytes, parse_bytes

_T = TypeVar("_T")

# Halves of pairs, as a text has that was cut within a character; no encoding has them.
_SURROGATES = re.compile("[\ud800-\udfff]")
_REPLACEMENT = "\ufffd"

_LONGEST_KEY = 10_000
_SHOWN_BITS = 128

# Their type is seen.
_PLAIN = (str, int, float, bool)


def whole(name: str, value: Any, low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``.

    Raises:
        UsageError: it is none, or another.
    """
    if isinstance(value, float | np.floating) and value == np.floor(value) and math.isfinite(value):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UsageError(f"{name} must be a whole number, not {shown(value)}")
    if not low <= value <= high:
        raise UsageError(f"{name} must be {low} to {high}, not {_short(value)}")
    return int(value)


def number(name: str, value: Any, low: float, high: float) -> float:
    """A number from ``low`` to ``high``.

    Raises:
        UsageError: it is none, or another.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise UsageError(f"{name} must be a number, not {shown(value)}")
    # NaN is between no two numbers.
    if not low <= value <= high:
        raise UsageError(f"{name} must be {low:g} to {high:g}, not {_short(value)}")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """True or False.

    Raises:
        UsageError: it is neither.
    """
    if not isinstance(value, bool | np.bool_):
        raise UsageError(f"{name} must be true or false, not {shown(value)}")
    return bool(value)


def text(name: str, value: Any, limit: int) -> str:
    """A text of at most ``limit`` characters, without halves of surrogate pairs.

    Raises:
        UsageError: it is no text, or a longer one.
    """
    if not isinstance(value, str):
        raise UsageError(f"{name} must be text, not {shown(value)}")
    if len(value) > limit:
        raise UsageError(
            f"{name} has {len(value):,} characters, {limit:,} are allowed",
            "shorten it",
        )
    return _SURROGATES.sub(_REPLACEMENT, str(value))


def several(name: str, value: Any, check: Callable[[str, Any], _T], what: str) -> list[_T]:
    """The entries of a list, a tuple or an array of one dimension, each checked.

    Args:
        what: the argument may be, for the message.

    Raises:
        UsageError: it is none, or an entry is refused.
    """
    if not isinstance(value, list | tuple) and not (
        isinstance(value, np.ndarray) and value.ndim == 1
    ):
        raise UsageError(f"{name} must be {what}, not {shown(value)}")
    return [check(f"{name}[{i}]", entry) for i, entry in enumerate(value)]


def key_of_traffic(value: Any) -> str | None:
    """``key`` of a pool's request."""
    return None if value is None else text("key", value, _LONGEST_KEY)


def seconds(value: Any) -> float | None:
    """``timeout`` of a pool's request; what is past already is below 0."""
    most = threading.TIMEOUT_MAX
    return None if value is None else number("timeout", value, -most, most)


def memory_bytes(name: str, value: Any) -> int:
    """A number of bytes of memory, or a text such as ``"8GiB"``.

    Raises:
        UsageError: it is neither, or less than 1 MiB.
    """
    if isinstance(value, str):
        return parse_bytes(value)
    return check_bytes(value, whole(name, value, 0, 1 << 63))


def cache_bytes(value: Any) -> int:
    """``prompt_cache`` of a pipeline: as :func:`memory_bytes`, or 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return 0 if is_number and value == 0 else memory_bytes("prompt_cache", value)


def check_watchers(cancel: Any, callback: Any) -> None:
    """Refuse a ``cancel`` that is no event, and a ``callback`` that cannot be called.

    Raises:
        UsageError: which of them.
    """
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise UsageError(f"cancel must be a threading.Event, not {shown(cancel)}")
    if callback is not None and not callable(callback):
        raise UsageError(f"callback must be a function, not {shown(callback)}")


def _short(value: Any) -> str:
    """A number in a message; the digits of a huge one would take long."""
    if isinstance(value, float | np.floating):
        return f"{value:.6g}"
    bits = int(value).bit_length()
    return str(int(value)) if bits <= _SHOWN_BITS else f"a number of {bits} bits"


def shown(value: Any) -> str:
    """A value in a message: short, on one line, whatever it is."""
    try:
        short = reprlib.repr(value)
    except Exception:  # noqa: BLE001 - an object whose repr() fails is still to be refused
        short = "it"
    short = short.encode("ascii", "backslashreplace").decode()
    return short if value is None or type(value) in _PLAIN else f"{short} ({type(value).__name__})"
