"""Weights of a prompt's parts, as ComfyUI writes and reads them.

``(text:1.3)`` gives a part a weight, ``(text)`` 1.1 times that around it; ``\\(`` and ``\\)`` are
parentheses. Features z of a token with a weight w become (z - z_empty) * w + z_empty, where
z_empty are those of an empty prompt at the same place.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from sd35_trt.errors import UsageError

_EMPHASIS = 1.1
_LARGEST = 100.0
_DEEPEST = 100

# What is written, and what stands for it until the parts are found.
_STAND_INS = {r"\(": "\0<", r"\)": "\0>", "\0": "\0\0"}
_WRITTEN = {"\0<": "(", "\0>": ")", "\0\0": "\0"}

# A number in ASCII, so that readers in other languages can agree on what is one.
_NUMBER = re.compile(
    r"\s*[+-]?((\d+(\.\d*)?|\.\d+)(e[+-]?\d+)?|inf(inity)?|nan)\s*", re.ASCII | re.IGNORECASE
)


def weighted_parts(text: str) -> list[tuple[str, float]]:
    """Parts of a text in order, without the marks, and their weights.

    Raises:
        UsageError: a weight beyond 100, or parentheses nested too deep.
    """
    text = re.sub(r"\\[()]|\0", lambda found: _STAND_INS[found[0]], text)
    return [(_unescaped(part), weight) for part, weight in _parts(text, 1.0, 0)]


def weigh(hidden: np.ndarray, empty: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Features with their tokens' weights.

    Args:
        hidden, empty: of the text and of an empty one [tokens, width].
        weights: float32 [tokens]; what has 1 stays as it is, to the bit.

    Returns:
        As ``hidden``.
    """
    z, z_empty = hidden.astype(np.float32), empty.astype(np.float32)
    weighted = ((z - z_empty) * weights[:, None] + z_empty).astype(hidden.dtype)
    return np.where(weights[:, None] == 1.0, hidden, weighted)


def _parts(text: str, weight: float, depth: int) -> Iterator[tuple[str, float]]:
    if depth > _DEEPEST:
        raise UsageError(f"a prompt nests parentheses more than {_DEEPEST} deep", "write fewer")
    for piece in _pieces(text):
        if len(piece) < 2 or piece[0] != "(" or piece[-1] != ")":
            yield piece, weight
            continue
        inside, own = _weight(piece[1:-1], weight * _EMPHASIS)
        yield from _parts(inside, own, depth + 1)


def _pieces(text: str) -> Iterator[str]:
    """What is in parentheses, with them, and what is between."""
    start = depth = 0
    for i, character in enumerate(text):
        if character == "(":
            if depth == 0 and start < i:
                yield text[start:i]
                start = i
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start : i + 1]
                start = i + 1
    if start < len(text):
        yield text[start:]


def _weight(inside: str, usual: float) -> tuple[str, float]:
    """What is in a pair of parentheses without its weight, and this."""
    text, _, number = inside.rpartition(":")
    if not text or _NUMBER.fullmatch(number) is None:
        return inside, usual
    weight = float(number)
    if not abs(weight) <= _LARGEST:  # nor is NaN
        raise UsageError(
            f"a part of a prompt has the weight {weight:g}", f"use -{_LARGEST:g} to {_LARGEST:g}"
        )
    return text, weight


def _unescaped(text: str) -> str:
    return re.sub("\0[\0<>]", lambda found: _WRITTEN[found[0]], text)
