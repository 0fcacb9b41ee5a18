"""Adapters of a pipeline: loaded once, mixed for every image, handed to the engines as inputs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt.errors import UsageError
from sd35_trt.formats.adapter import (
    Adapter,
    adapter_slots,
    check_fits,
    check_takes_adapters,
    lora_advice,
    read_adapter,
)
from sd35_trt.formats.bundle import ADAPTER_SCALES, Bundle, Manifest

from .arguments import number, several, shown, text
from .byte_cache import ByteCache
from .devices.device import Buffer, Device

#: Bytes of the matrices that are kept on the device, and of files that were given by their path,
#: unless the user says otherwise.
ADAPTER_CACHE_BYTES = 1 << 30

_LONGEST_NAME = 4096
_LARGEST_SCALE = 100.0


@dataclass(frozen=True)
class Use:
    """How much an image has of an adapter.

    Attributes:
        name: that it was asked for by.
        scale: not 0.
    """

    adapter: Adapter
    name: str
    scale: float


#: What an image has of adapters.
Mix = tuple[Use, ...]


def distinct(mixes: Iterable[Mix]) -> list[Adapter]:
    """The adapters of some images, each once, in an order that does not depend on theirs."""
    found = {id(use.adapter): use.adapter for mix in mixes for use in mix}
    return sorted(found.values(), key=lambda adapter: (adapter.source, id(adapter)))


def total_rank(mixes: Iterable[Mix]) -> int:
    """Of the adapters of some images, side by side."""
    return sum(adapter.rank for adapter in distinct(mixes))


class AdapterShelf:
    """The adapters that a pipeline knows by name, and the latest that were given by path. Any
    thread.

    Args:
        bundle: that they are for.
        cache_bytes: of those that were given by path.
    """

    def __init__(self, bundle: Bundle, cache_bytes: int = ADAPTER_CACHE_BYTES) -> None:
        self._bundle = bundle
        self._named: dict[str, Adapter] = {}
        self._paths: ByteCache[tuple[str, int, int], Adapter] = ByteCache(cache_bytes)
        self._lock = threading.Lock()

    def load(self, name: str, path: str | os.PathLike[str]) -> None:
        """Know an adapter by a name, in place of another of that name.

        Raises:
            UsageError: see :func:`read_adapter`, :func:`check_fits`; a bundle without adapters.
        """
        name = text("the adapter's name", name, _LONGEST_NAME)
        if not isinstance(path, str | os.PathLike):
            raise UsageError(f"path must be a path, not {shown(path)}")
        adapter = self._read(Path(path), name)
        with self._lock:
            self._named[name] = adapter

    def unload(self, name: str) -> None:
        """Forget a name; requests that were made before still have its adapter.

        Raises:
            UsageError: it is unknown.
        """
        with self._lock:
            if self._named.pop(name, None) is None:
                raise UsageError(f"there is no adapter {shown(name)}", self._known())

    def mixes(self, value: Any, count: int) -> tuple[Mix, ...]:
        """What each image of a request has, from the argument ``adapters``.

        Args:
            value: None; name or path → scale; or one such for each image.

        Raises:
            UsageError: an argument of another kind, an unknown adapter, or ranks that are together
                more than the bundle takes.
        """
        if value is None:
            return ((),) * count
        if isinstance(value, Mapping):
            mixes = [self._mix("adapters", value)] * count
        else:
            what = "a mapping from names to scales, or one for each image"
            mixes = several("adapters", value, self._mix, what)
            if len(mixes) != count:
                raise UsageError(
                    f"{len(mixes)} mixes of adapters for {count} images",
                    "give a mapping, which is for all images, or a list of one for each",
                )
        if any(mixes):
            rank, most = total_rank(mixes), self._bundle.manifest.adapter_ranks[-1]
            if rank > most:
                raise UsageError(
                    f"the adapters are of rank {rank} together, {self._bundle.root} takes {most}",
                    f"use fewer, or build it with: --adapters {rank}",
                )
        return tuple(mixes)

    def _mix(self, name: str, value: Any) -> Mix:
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} must be a mapping from names to scales, not {shown(value)}")
        scales: dict[Adapter, Use] = {}
        for key, scale in value.items():
            own = os.fspath(key) if isinstance(key, os.PathLike) else key
            own = text(f"a name in {name}", own, _LONGEST_NAME)
            limit = _LARGEST_SCALE
            factor = number(f"the scale of the adapter {own}", scale, -limit, limit)
            adapter = self._find(own)
            before = scales[adapter].scale if adapter in scales else 0.0
            scales[adapter] = Use(adapter, own, before + factor)
        uses = (use for use in scales.values() if use.scale != 0)
        return tuple(sorted(uses, key=lambda use: (use.adapter.source, use.name)))

    def _find(self, name: str) -> Adapter:
        check_takes_adapters(self._bundle)
        with self._lock:
            adapter = self._named.get(name)
        if adapter is not None:
            return adapter
        path = Path(name)
        try:
            status = path.stat()
        except (OSError, ValueError) as error:
            fix = lora_advice(name) or self._known()
            raise UsageError(f"there is no adapter {shown(name)}", fix) from error
        key = str(path.absolute()), status.st_mtime_ns, status.st_size
        with self._lock:
            adapter = self._paths.get(key)
        if adapter is None:
            adapter = self._read(path, name)
            with self._lock:
                self._paths.put(key, adapter)
        return adapter

    def _read(self, path: Path, name: str) -> Adapter:
        check_takes_adapters(self._bundle)
        adapter = read_adapter(path)
        check_fits(adapter, self._bundle.manifest, name)
        return adapter

    def _known(self) -> str:
        names = ", ".join(sorted(self._named)) or "none is loaded"
        return f"load it with load_adapter(name, path), or give the path of a file; known: {names}"


@dataclass(frozen=True, eq=False)
class _Stacks:
    """The matrices of some adapters, side by side, as a component takes them.

    Attributes:
        ports: input → buffer.
        nbytes: of all of them.
    """

    ports: Mapping[str, Buffer]
    nbytes: int


@dataclass(frozen=True)
class AdapterInputs:
    """What a run's components take of adapters.

    Attributes:
        adapters: of the run, in the order of their columns.
        rank: columns.
    """

    adapters: tuple[Adapter, ...]
    rank: int

    @classmethod
    def of(cls, manifest: Manifest, mixes: Sequence[Mix]) -> AdapterInputs:
        """What the components of a bundle take in a run whose images have these mixes."""
        adapters = distinct(mixes)
        rank = sum(adapter.rank for adapter in adapters)
        padded = next((own for own in manifest.adapter_ranks if rank <= own), rank)
        return cls(tuple(adapters), padded if rank else _least_rank(manifest))

    def scales(self, mixes: Sequence[Mix]) -> np.ndarray:
        """FP32 [len(mixes), rank]: a column is an adapter's rank; 0 where a mix has none of it."""
        values = np.zeros((len(mixes), self.rank), np.float32)
        first = 0
        for adapter in self.adapters:
            for row, mix in enumerate(mixes):
                for use in mix:
                    if use.adapter is adapter:
                        values[row, first : first + adapter.rank] = use.scale
            first += adapter.rank
        return values


def _least_rank(manifest: Manifest) -> int:
    """Columns of a run without adapters: none, or one that no image has anything of."""
    ranks = [c.bounds["rank"][0] for c in manifest.components if "rank" in c.bounds]
    return max(ranks, default=1)


class AdapterFeeder:
    """Hands adapters to components; their matrices stay on the device while there is room. One
    thread at a time.

    Args:
        bundle: that takes them, or none.
        device: of its engines.
        before_change: within a budget, called before the matrices of the last run make room for
            others': what still reads them is to forget them. None keeps those of the latest runs.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        before_change: Callable[[], None] | None = None,
        cache_bytes: int = ADAPTER_CACHE_BYTES,
    ) -> None:
        self._before_change = before_change
        self._latest: AdapterInputs | None = None
        self._manifest = bundle.manifest
        self._device = device
        self._slots = adapter_slots(bundle.manifest)
        self._stacks: ByteCache[tuple[Any, ...], _Stacks] = ByteCache(cache_bytes)

    def ports(
        self, component: str, inputs: AdapterInputs, mixes: Sequence[Mix]
    ) -> dict[str, Buffer]:
        """Inputs of a component by port; none where it takes no adapters.

        Args:
            mixes: of each of its samples.

        Raises:
            OutOfMemory: the device has no room.
        """
        own = self._manifest.component(component)
        if own is None or not own.adapters:
            return {}
        if self._before_change is not None and inputs != self._latest:
            self._before_change()
            self._stacks.clear()
            self._latest = inputs
        key = (component, inputs.rank, inputs.adapters)
        stacks = self._stacks.get(key)
        if stacks is None:
            stacks = self._stack(component, inputs)
            self._stacks.put(key, stacks)
        scales = inputs.scales(mixes).astype(own.input(ADAPTER_SCALES).dtype)
        return {**stacks.ports, ADAPTER_SCALES: self._device.upload(scales)}

    def clear(self) -> None:
        """Release all matrices."""
        self._stacks.clear()

    def _stack(self, component: str, inputs: AdapterInputs) -> _Stacks:
        own = self._manifest.component(component)
        ports = () if own is None else own.inputs
        names = {name for group in (own.adapters if own else ()) for name in (group.down, group.up)}
        arrays = {
            port.name: np.zeros(port.resolve(rank=inputs.rank), port.dtype)
            for port in ports
            if port.name in names
        }
        first = 0
        for adapter in inputs.adapters:
            for layer, matrices in adapter.layers.items():
                slot = self._slots[layer]
                if slot.component != component:
                    continue
                columns = slice(first, first + matrices.rank)
                down, up = arrays[slot.group.down], arrays[slot.group.up]
                down[slot.block, :, slot.linear, columns] = matrices.down.T
                up[slot.block, slot.linear, columns] = matrices.up.T
            first += adapter.rank
        nbytes = sum(array.nbytes for array in arrays.values())
        return _Stacks({n: self._device.upload(a) for n, a in arrays.items()}, nbytes)


def parameters_of(mixes: Sequence[Mix]) -> list[dict[str, float]]:
    """Of each image, name → scale."""
    return [{use.name: use.scale for use in mix} for mix in mixes]
