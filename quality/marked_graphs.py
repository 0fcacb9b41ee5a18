"""Running a component's graph with more of its values as outputs.

A row of :data:`sd35_trt.backends.BACKENDS` names the function that does it with the backend's own
compiler, where that reads ONNX.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sd35_trt.backends import BACKENDS, resolve
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.sessions.onnxruntime import session_options

from .graph_sessions import open_graph
from .onnx_graph import Arrays, OnnxGraph

#: Outputs by name, for inputs and the names of values.
MarkedRun = Callable[[Arrays, Sequence[str]], Arrays]


def run_as_written(graph: OnnxGraph) -> MarkedRun:
    """Runs in ONNX Runtime on the CPU, operator by operator."""

    def run(feed: Arrays, names: Sequence[str]) -> Arrays:
        session = open_graph(graph.with_outputs(names), graph.folder)
        return dict(zip(names, session.run(list(names), graph.feed(feed)), strict=True))

    return run


def onnxruntime_runs(
    bundle: Bundle, component: Component, graph: OnnxGraph, device: Device
) -> MarkedRun | None:
    """Runs of a bundle's own graph, as its sessions open it; None on a GPU."""
    if device.kind != "cpu":
        return None
    own = OnnxGraph(bundle.path(component.files[0].path))
    fp8 = bool(component.precisions.get("fp8"))

    def run(feed: Arrays, names: Sequence[str]) -> Arrays:
        if other := [name for name in names if name not in own.types]:
            raise Sd35Error(
                f"{component.name} of {bundle.root} has no value {other[0]}: its graph is another",
                "build it again with this version",
            )
        session = open_graph(own.with_outputs(names), own.folder, session_options(fp8=fp8))
        return dict(zip(names, session.run(list(names), own.feed(feed)), strict=True))

    return run


def engine_runs(
    bundle: Bundle, component: Component, graph: OnnxGraph, device: Device
) -> MarkedRun | None:
    """Runs by what compiled a component's engine; None where that reads no ONNX.

    Args:
        graph: that the engine was made from.
    """
    name = BACKENDS[component.engine].marked_runs
    if name is None:
        return None
    runs: MarkedRun | None = resolve(name)(bundle, component, graph, device)
    return runs
