"""What the pipeline asks of an engine, and opening one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sd35_trt.backends import BACKENDS, resolve
from sd35_trt.compat.library import load_library
from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices.device import Buffer, Device
from sd35_trt.runtime.devices.opening import split_names


class Session(Protocol):
    """An engine ready to run on buffers that it does not own.

    Attributes:
        recordable: whether :meth:`run` only queues work of fixed shapes and addresses, so that
            :meth:`Device.capture` can record it.
    """

    recordable: bool

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """Compute all outputs into the given buffers, in the order of the device's queue.

        Args:
            inputs: a buffer for every input port, with the port's dtype and a shape in range.
            outputs: a buffer for every output port; overwritten.

        Raises:
            Sd35Error: the engine refused or ran out of memory.
        """

    def close(self) -> None:
        """Release the engine's memory, when its work is done; the session is not used again."""


@dataclass(frozen=True)
class SessionOptions:
    """How an engine is opened.

    Attributes:
        threads: CPU threads of the engine; None takes all cores.
        held_bytes: of its weights on the device, the others being streamed in each run; None
            holds all.
    """

    threads: int | None = None
    held_bytes: int | None = None


def check_engines(bundle: Bundle) -> None:
    """Refuse a bundle that holds engines of a kind unknown here.

    Raises:
        BundleError: says what the bundle was built for.
    """
    manifest = bundle.manifest
    for engine in (manifest.builder, *(component.engine for component in manifest.components)):
        if engine not in BACKENDS:
            raise BundleError(
                f"{bundle.root} is built for {manifest.target} by {manifest.builder}; this version "
                f"runs no {engine} engines, but {', '.join(BACKENDS)}",
                "build for this machine with: sd35-trt build --gpu cpu",
            )


def device_of(bundle: Bundle, device_name: str | None = None) -> str:
    """Name of the device that a bundle's engines run on, or of two with a comma between.

    Args:
        device_name: what the caller wants; None takes the usual one.

    Raises:
        UsageError: see :func:`~sd35_trt.runtime.devices.opening.split_names`.
        BundleError: the engines do not run there.
    """
    check_engines(bundle)
    manifest = bundle.manifest
    kinds = BACKENDS[manifest.builder].devices
    name = kinds[0] if device_name is None else device_name
    if split_names(name)[1] is not None:
        name = ",".join(device_of(bundle, one) for one in split_names(name))
    elif name.partition(":")[0] not in kinds:
        raise BundleError(
            f"{bundle.root} is built for {manifest.target} by {manifest.builder}, whose engines "
            f"do not run on {name}",
            f"use {' or '.join(kinds)}, or build with: sd35-trt build --gpu "
            f"{'cpu' if name == 'cpu' else 'auto'}",
        )
    return name


# Dimensions that every tensor of a component grows with, texts and steps excepted.
_SCALING = ("batch", "samples", "height", "width", "image_height", "image_width")


def working_bytes(component: Component, dims: Mapping[str, int]) -> int:
    """Memory that an engine takes beside its weights while it runs; 0 where nothing is known.

    Args:
        dims: sizes of its dynamic dimensions; those left out count as least.
    """
    share = 1.0
    for name, (low, high) in component.bounds.items():
        # A ControlNet's samples are those of its batch.
        if name in _SCALING and not (name == "samples" and "batch" in component.bounds):
            share *= min(dims.get(name, low), high) / high
    return int(share * (component.activation_bytes or 0))


def can_stream(bundle: Bundle, component: Component) -> bool:
    """Whether a component's weights may stay in the host's memory while it runs."""
    backend = BACKENDS[component.engine]
    if backend.streams == "asked":
        return bool(bundle.manifest.engine_options.get("weight_streaming", False))
    return backend.can_stream(component.name)


def open_session(
    bundle: Bundle,
    component: Component,
    device: Device,
    options: SessionOptions = SessionOptions(),
) -> Session:
    """Load one component's engine.

    Raises:
        BundleError: an engine kind unknown here, or a file that the engine refuses.
        Sd35Error: the backend's package is not installed.
    """
    check_engines(bundle)
    backend = BACKENDS[component.engine]
    load_library(backend)
    session: Session = resolve(backend.session)(bundle, component, device, options)
    return session
