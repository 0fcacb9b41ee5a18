"""Running a graph on TensorRT with more of its values as outputs, through Polygraphy.

Source: docs.nvidia.com/deeplearning/tensorrt, Polygraphy's ``backend.trt``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from textwrap import shorten
from typing import Any

from sd35_trt.backends import BACKENDS, Backend
from sd35_trt.compat.library import load_library
from sd35_trt.compat.requirement import requirement
from sd35_trt.compat.tensorrt import attentions
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.formats.component import MODEL_FILE
from sd35_trt.runtime.devices.device import Device

from .onnx_graph import Arrays, OnnxGraph


def load_polygraphy(backend: Backend) -> Any:
    """Polygraphy's module for a library: ``polygraphy.backend.trt``.

    Raises:
        Sd35Error: it is not installed.
    """
    with requirement("finding the layer", "compare"):
        from polygraphy import config
        from polygraphy.logger import G_LOGGER

        # Read where the module is imported: a process has one of the two libraries.
        config.USE_TENSORRT_RTX = backend.compiles_late
        # What it says goes to standard output; what ends a run is in its exception too.
        G_LOGGER.module_severity = G_LOGGER.CRITICAL + 1
        from polygraphy.backend import trt

        return trt


def marked_network(
    polygraphy: Any, library: Any, component: Component, graph: OnnxGraph, names: Sequence[str]
) -> tuple[Any, Any, Any]:
    """Builder, network and parser of a graph with more outputs, strongly typed.

    Args:
        polygraphy: of :func:`load_polygraphy`.
        library: the imported library.
        names: of the values.
    """
    strongly_typed = hasattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    path = str(graph.folder / MODEL_FILE)
    parsed = polygraphy.network_from_onnx_path(path, strongly_typed=strongly_typed)
    for attention in attentions(library, parsed[1]):
        attention.decomposable = True
    # The graph's own stay: without them, the compiler would drop what leads to them.
    outputs = list(dict.fromkeys([*graph.outputs, *names]))
    polygraphy.modify_network_outputs(parsed, outputs=outputs)
    builder, network, parser = parsed
    return builder, network, parser


def marked_profile(polygraphy: Any, component: Component, feed: Arrays) -> Any:
    """An optimization profile with the bounds of an engine, and an input's shape as the usual."""
    profile = polygraphy.Profile()
    for port in component.inputs:
        if port.dynamic:
            low = port.resolve(**{d: b[0] for d, b in component.bounds.items()})
            high = port.resolve(**{d: b[1] for d, b in component.bounds.items()})
            profile.add(port.name, min=low, opt=feed[port.name].shape, max=high)
    return profile


def tensorrt_runs(
    bundle: Bundle, component: Component, graph: OnnxGraph, device: Device
) -> Callable[[Arrays, Sequence[str]], Arrays]:
    """Runs of the graph, compiled anew for the GPU at hand.

    Raises:
        Sd35Error: Polygraphy is not installed; in a run, the library does not compile the graph.
    """
    backend = BACKENDS[component.engine]
    library = load_library(backend)
    polygraphy = load_polygraphy(backend)
    from polygraphy.exception import PolygraphyException

    def run(feed: Arrays, names: Sequence[str]) -> Arrays:
        device.synchronize()
        inputs = graph.feed(feed)
        profile = marked_profile(polygraphy, component, inputs)
        try:
            parsed = marked_network(polygraphy, library, component, graph, names)
            config = polygraphy.CreateConfig(profiles=[profile])
            engine = polygraphy.engine_from_network(parsed, config)
            with polygraphy.TrtRunner(engine) as runner:
                outputs = runner.infer(inputs)
                return {name: outputs[name].copy() for name in names}
        except (PolygraphyException, OSError) as error:
            raise Sd35Error(
                f"{backend.title} {library.__version__} does not run {component.name} with more "
                f"outputs: {shorten(str(error), 300)}",
                "look without finding the layer: --no-bisect",
            ) from error

    return run
