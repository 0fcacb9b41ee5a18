"""What the pipeline asks of an engine, and the table of engine kinds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from sd35_trt.components import COMPILED
from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices.device import Buffer, Device


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


@dataclass(frozen=True)
class _Kind:
    """Where sessions of an engine kind come from.

    Attributes:
        module: has ``open_session(bundle, component, device, options)``.
        package: what it imports.
        extra: of this package, that installs it.
        devices: kinds of device that it runs on, the usual one first.
        streams: whether weights may be streamed: ``never``, ``asked`` (where the bundle was built
            for it) or ``always`` (all but components that are compiled).
    """

    module: str
    package: str
    extra: str
    devices: tuple[str, ...]
    streams: str = "never"


_TENSORRT = "sd35_trt.runtime.sessions.tensorrt"
_KINDS = {
    "onnxruntime": _Kind(
        "sd35_trt.runtime.sessions.onnxruntime", "onnxruntime", "onnxruntime", ("cpu", "cuda")
    ),
    "tensorrt-rtx": _Kind(_TENSORRT, "tensorrt_rtx", "rtx", ("cuda",), streams="asked"),
    "tensorrt": _Kind(_TENSORRT, "tensorrt", "tensorrt", ("cuda",), streams="asked"),
    "inductor": _Kind(
        "sd35_trt.runtime.sessions.inductor", "torch", "inductor", ("cuda", "cpu"), streams="always"
    ),
}


def check_engines(bundle: Bundle) -> None:
    """Refuse a bundle that holds engines of a kind unknown here.

    Raises:
        BundleError: says what the bundle was built for.
    """
    manifest = bundle.manifest
    for component in manifest.components:
        if component.engine not in _KINDS:
            raise BundleError(
                f"{bundle.root} is built for {manifest.target} by {manifest.builder}; this version "
                f"runs no {component.engine} engines, but {', '.join(_KINDS)}",
                "build for this machine with: sd35-trt build --gpu cpu",
            )


def device_of(bundle: Bundle, asked: str | None = None) -> str:
    """Name of the device that a bundle's engines run on.

    Args:
        asked: what the caller wants; None takes the usual one.

    Raises:
        BundleError: the engines do not run there.
    """
    check_engines(bundle)
    manifest = bundle.manifest
    kinds = _KINDS[manifest.builder].devices
    name = kinds[0] if asked is None else asked
    if name.partition(":")[0] not in kinds:
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
        if name in _SCALING:
            share *= min(dims.get(name, low), high) / high
    return int(share * (component.activation_bytes or 0))


def can_stream(bundle: Bundle, component: Component) -> bool:
    """Whether a component's weights may stay in the host's memory while it runs."""
    streams = _KINDS[component.engine].streams
    if streams == "asked":
        return bool(bundle.manifest.engine_options.get("weight_streaming", False))
    return streams == "always" and component.name not in COMPILED


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
    kind = _KINDS[component.engine]
    try:
        importlib.import_module(kind.package)
    except (ImportError, OSError, RuntimeError) as error:
        raise Sd35Error(
            f"{kind.package} is not installed ({error})", f"pip install 'sd35-trt[{kind.extra}]'"
        ) from error
    module = importlib.import_module(kind.module)
    session: Session = module.open_session(bundle, component, device, options)
    return session
