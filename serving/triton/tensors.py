"""Tensors of a request as arguments of the runtime."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Request

from .configuration import INPUTS

# Of a seed that nobody gave: any client's numbers hold it.
_RANDOM_SEEDS = 2**32

# The runtime's name of an input, where it is another.
_ARGUMENTS = {"negative_prompt": "negative"}

_TEXTS = {tensor.name for tensor in INPUTS if tensor.kind == "STRING"}

# One for each image.
_LISTS = ("prompt", "negative_prompt", "seed")


def arguments(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Arguments of :meth:`sd35_trt.runtime.Pipeline.request`, with a seed.

    Args:
        tensors: by name; the first dimension of each counts the images.

    Raises:
        UsageError: a text that is not UTF-8, or images that differ where they may not.
    """
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        values = [_value(name, row) for row in tensor]
        key = _ARGUMENTS.get(name, name)
        found[key] = values if name in _LISTS else _common(name, values)
    count = len(found["prompt"])
    found.setdefault("seed", [secrets.randbelow(_RANDOM_SEEDS) for _ in range(count)])
    return found


def _value(name: str, row: np.ndarray) -> Any:
    """Of one image."""
    if name == "image":
        return row
    if name == "size":
        return tuple(row.tolist())
    value = row.reshape(-1)[0]
    if name not in _TEXTS:
        return value.item()
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8") from None


def _common(name: str, values: Sequence[Any]) -> Any:
    if any(not np.array_equal(value, values[0]) for value in values):
        raise UsageError(f"{name} differs among the images of a request", "send a request for each")
    return values[0]


def runs(requests: Sequence[Request], room: int) -> list[list[int]]:
    """Which requests are drawn in one run, by their indices; in order of arrival.

    Args:
        room: how many images a bundle draws at once.
    """
    left = list(range(len(requests)))
    found = []
    while left:
        kind = requests[left[0]].in_common
        run: list[int] = []
        images = 0
        for index in left:
            request = requests[index]
            joins = kind is not None and request.in_common == kind
            if not run or (joins and images + len(request.seeds) <= room):
                run.append(index)
                images += len(request.seeds)
        left = [index for index in left if index not in run]
        found.append(run)
    return found
