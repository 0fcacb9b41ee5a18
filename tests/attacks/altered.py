"""Documents in which a field has a value of another kind."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

_ABSENT = object()
_VALUES = (
    _ABSENT, None, 0, 1, -1, 7, 2**31, 2**62, 0.5, "", "x", "../x", [], {}, True, [1, 2], ["a"],
    {"a": 1}, [5, 5], [1, 4096],
)  # fmt: skip


def altered(document: Any) -> Iterator[Any]:
    """Copies of a document, each with another value at one place; of lists, at the first two."""
    for *parents, last in _places(document):
        for value in _VALUES:
            data = copy.deepcopy(document)
            field = data
            for key in parents:
                field = field[key]
            if value is _ABSENT:
                del field[last]
            else:
                field[last] = value
            if data != document:
                yield data


def _places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if place:
        yield place
    if isinstance(value, dict):
        for key in value:
            yield from _places(value[key], (*place, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 2)):
            yield from _places(value[i], (*place, i))
