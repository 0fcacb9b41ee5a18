"""Tensors of a request as arguments of the runtime."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Control, Request
from sd35_trt.runtime.adapters import total_rank

from .configuration import CONTROL, INPUTS, control_input

# Of a seed that nobody gave: any client's numbers hold it.
_RANDOM_SEEDS = 2**32

# The runtime's name of an input, where it is another.
_ARGUMENTS = {
    "negative_prompt": "negative",
    "negative_prompt_2": "negative_2",
    "negative_prompt_3": "negative_3",
}

_PROMPTS = {
    f"{kind}{number}" for kind in ("prompt", "negative_prompt") for number in ("", "_2", "_3")
}

# One for each image.
_LISTS = {*_PROMPTS, "seed"}

_ADAPTERS = ("adapters", "adapter_scales")


def arguments(
    tensors: Mapping[str, np.ndarray], nets: Iterable[str] = (), adapters: Collection[str] = ()
) -> dict[str, Any]:
    """Arguments of :meth:`sd35_trt.runtime.Pipeline.request`, with a seed.

    Args:
        tensors: by name; the first dimension of each counts the images.
        nets: ControlNets of the bundle.
        adapters: names that requests may use.

    Raises:
        UsageError: a text that is not UTF-8, images that differ where they may not, or an unknown
            adapter.
    """
    found: dict[str, Any] = {}
    for tensor in INPUTS:
        name = tensor.name
        if name in _ADAPTERS or name not in tensors:
            continue
        values = [_value(name, row) for row in tensors[name]]
        found[_ARGUMENTS.get(name, name)] = values if name in _LISTS else _common(name, values)
    found["controls"] = {net: own for net in nets if (own := _control(net, tensors))} or None
    found["adapters"] = _mixes(tensors, adapters)
    count = len(found["prompt"])
    found.setdefault("seed", [secrets.randbelow(_RANDOM_SEEDS) for _ in range(count)])
    return found


def _value(name: str, row: np.ndarray) -> Any:
    """Of one image: pixels, several numbers, or one value."""
    if row.dtype == np.uint8:
        return row
    values = [_plain(name, value) for value in row.reshape(-1)]
    if name == "size":
        return tuple(values)
    return values if name == "skip_guidance_layers" or name in _ADAPTERS else values[0]


def _plain(name: str, value: Any) -> Any:
    """As Python has it. Of FP32, the shortest decimal: 0.3 is what was meant, not 0.30000001."""
    if isinstance(value, np.float32):
        return float(str(value))
    if not isinstance(value, bytes):
        return value.item()
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"{name} is not UTF-8") from None


def _common(name: str, values: Sequence[Any]) -> Any:
    if any(not np.array_equal(value, values[0]) for value in values):
        raise UsageError(f"{name} differs among the images of a request", "send a request for each")
    return values[0]


def _control(net: str, tensors: Mapping[str, np.ndarray]) -> Control | None:
    """What is asked of a net; None where nothing is."""
    asked = {}
    for field in CONTROL:
        name = control_input(net, field).name
        if name in tensors:
            asked[field] = _common(name, [_value(name, row) for row in tensors[name]])
    if asked and "image" not in asked:
        picture = control_input(net, "image").name
        raise UsageError(f"the ControlNet {net} has no picture", f"send it as {picture}")
    return Control(**asked) if asked else None


def _mixes(
    tensors: Mapping[str, np.ndarray], known: Collection[str]
) -> list[dict[str, float]] | None:
    """Adapters of each image, by name; a name that is empty is none.

    Raises:
        UsageError: a name that is not known: the runtime would take it for a file's.
    """
    names, scales = (tensors.get(name, np.empty(0)) for name in _ADAPTERS)
    if not names.size and not scales.size:
        return None
    if names.shape != scales.shape:
        raise UsageError("adapters and adapter_scales do not agree", "send a scale for each name")
    mixes = []
    for own, factors in zip(names, scales, strict=True):
        pairs = zip(_value("adapters", own), _value("adapter_scales", factors), strict=True)
        mixes.append({name: scale for name, scale in pairs if name})
    for name in (name for mix in mixes for name in mix if name not in known):
        listed = f"use one of: {', '.join(sorted(known))}" if known else "export it with --adapter"
        raise UsageError(f"there is no adapter {name[:40]!r}", listed)
    return mixes


def runs(requests: Sequence[Request], room: int, rank: int = 0) -> list[list[int]]:
    """Which requests are drawn in one run, by their indices; in order of arrival.

    Args:
        room: how many images a bundle draws at once.
        rank: of all adapters of a run together, at most.
    """
    left = list(range(len(requests)))
    found = []
    while left:
        kind = requests[left[0]].in_common
        run: list[int] = []
        images = 0
        for index in left:
            request = requests[index]
            mixes = [mix for other in (*run, index) for mix in requests[other].adapters]
            joins = kind is not None and request.in_common == kind and total_rank(mixes) <= rank
            if not run or (joins and images + len(request.seeds) <= room):
                run.append(index)
                images += len(request.seeds)
        left = [index for index in left if index not in run]
        found.append(run)
    return found
