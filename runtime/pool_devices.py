"""Opening a pool's pipelines: one of every bundle on each device."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import MappingProxyType

from sd35_trt.errors import UsageError

from .arguments import several, text
from .pipeline import Pipeline
from .pool_device import PoolDevice

#: A bundle's directory, a pipeline, or one pipeline for each device.
Source = str | os.PathLike[str] | Pipeline | Sequence[Pipeline]

#: Opens a directory on a device; None is the bundle's usual one.
Open = Callable[[str | os.PathLike[str], str | None], Pipeline]

_LONGEST_DEVICE = 100


def open_devices(
    bundles: Mapping[str, Source], devices: Sequence[str] | None, open_pipeline: Open,
    preload: bool, opened: ExitStack,
) -> tuple[PoolDevice, ...]:  # fmt: skip
    """A pool's devices, each with a pipeline of every bundle.

    Args:
        bundles: by name.
        devices: None takes those of the pipelines that are given.
        preload: load every engine now.
        opened: closes the pipelines, those that were given included, also when this fails.

    Raises:
        UsageError: no device, or bundles with another number of pipelines than devices.
        BundleError, OutOfMemory, Sd35Error: see :meth:`Pipeline.load`.
    """
    for pipe in (pipe for source in bundles.values() for pipe in _given(source)):
        opened.enter_context(pipe)
    wanted = _wanted(devices, max(map(_given, bundles.values()), key=len))
    rows = {}
    for name, source in bundles.items():
        if isinstance(source, str | os.PathLike):
            rows[name] = [opened.enter_context(open_pipeline(source, one)) for one in wanted]
        else:
            rows[name] = _given(source)
            if len(rows[name]) != len(wanted):
                raise UsageError(
                    f"bundle {name} has {len(rows[name])} pipelines for {len(wanted)} devices",
                    "give its directory, or one pipeline for each device",
                )
    columns = [dict(zip(rows, pipes, strict=True)) for pipes in zip(*rows.values(), strict=True)]
    if preload:
        _preload(columns)
    names = names_of([next(iter(column.values())).device for column in columns])
    return tuple(
        PoolDevice(name, MappingProxyType(column))
        for name, column in zip(names, columns, strict=True)
    )


def _given(source: Source) -> list[Pipeline]:
    if isinstance(source, str | os.PathLike):
        return []
    return [source] if isinstance(source, Pipeline) else list(source)


def _wanted(devices: Sequence[str] | None, given: Sequence[Pipeline]) -> list[str | None]:
    if devices is None:
        return [pipe.device for pipe in given] if len(given) > 1 else [None]
    checked = several(
        "devices", devices, lambda n, v: text(n, v, _LONGEST_DEVICE), "a list of devices"
    )
    if not checked:
        raise UsageError("devices names no device", 'give some: devices=["cuda:0", "cuda:1"]')
    return [*checked]


def _preload(columns: Sequence[Mapping[str, Pipeline]]) -> None:
    """Load what each device keeps, all devices at a time."""

    def load(column: Mapping[str, Pipeline]) -> None:
        for pipe in column.values():
            pipe.preload()

    if len(columns) == 1:
        load(columns[0])
        return
    with ThreadPoolExecutor(len(columns), "sd35-trt-load") as loading:
        list(loading.map(load, columns))


def names_of(devices: list[str]) -> list[str]:
    """Names for a pool's devices by theirs, none of them twice."""
    return [
        device if devices.count(device) == 1 else f"{device}#{devices[:i].count(device) + 1}"
        for i, device in enumerate(devices)
    ]
