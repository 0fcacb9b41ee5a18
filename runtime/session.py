"""What the pipeline asks of an engine, and the table of engine kinds."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sd35_trt.bundle import Bundle, Component
from sd35_trt.errors import BundleError, Sd35Error


class Session(Protocol):
    """An engine ready to run on buffers that it does not own."""

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """Compute all outputs into the given C-contiguous arrays.

        Args:
            inputs: an array for every input port, with the port's dtype and a shape in range.
            outputs: an array for every output port; overwritten.

        Raises:
            Sd35Error: the engine refused or ran out of memory.
        """

    def close(self) -> None:
        """Release the engine's memory; the session is not used afterwards."""


#: Engine kind → module with ``open_session(bundle, component, threads)``, its package, its extra.
_KINDS = {
    "onnxruntime": ("sd35_trt.runtime.onnxruntime_session", "onnxruntime", "onnxruntime"),
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


def open_session(bundle: Bundle, component: Component, threads: int | None) -> Session:
    """Load one component's engine.

    Raises:
        BundleError: an engine kind unknown here, or a file that the engine refuses.
        Sd35Error: the backend's package is not installed.
    """
    check_engines(bundle)
    module, package, extra = _KINDS[component.engine]
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise Sd35Error(
            f"{package} is not installed ({error})", f"pip install 'sd35-trt[{extra}]'"
        ) from error
    session: Session = importlib.import_module(module).open_session(bundle, component, threads)
    return session
