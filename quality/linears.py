"""Errors of single linear layers, measured in the bundles' own ONNX graphs.

Every linear of the reference sees real activations: the inputs of a component, recorded while it
drew, are run again with the input and the output of every linear exposed. The compared bundle's
linears are then run on exactly these inputs, each cut out of its graph with whatever casts,
quantizes and dequantizes around its product (``own_error``), and in their places in the network
(``in_place_error``, which also carries what the layers before it add).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sd35_trt.errors import Sd35Error
from sd35_trt.formats.report import LinearError

from .graph_sessions import open_graph
from .linear_graph import LinearGraph, input_name
from .metrics import RelativeError
from .onnx_graph import Arrays

# Exposed activations held at a time.
_BUDGET = 2 << 30


def _groups(graph: LinearGraph, layers: Sequence[str], feeds: Sequence[Arrays]) -> list[list[str]]:
    """The layers in groups whose inputs and outputs fit the memory set aside for them."""
    rows = max(_rows(feed) for feed in feeds)
    groups: list[list[str]] = [[]]
    size = 0
    for layer in layers:
        need = 4 * rows * graph.linears[layer].features
        if groups[-1] and size + need > _BUDGET:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += need
    return groups


def _rows(feed: Arrays) -> int:
    """No linear of the component has more rows of input than this."""
    if "latents" in feed:
        batch, _, height, width = feed["latents"].shape
        tokens = feed["context"].shape[1] if "context" in feed else 0
        return 2 * batch * (height * width + tokens)
    return max(array.size // (array.shape[-1] if array.ndim > 2 else 1) for array in feed.values())


def equal_linears(component: str, path: Path) -> list[LinearError]:
    """The linears of a component that two bundles have in the same file: no error."""
    return [
        LinearError(component, layer, linear.precision, linear.precision, 0.0, 0.0)
        for layer, linear in LinearGraph(path).linears.items()
    ]


def linear_errors(
    component: str,
    reference: Path,
    candidate: Path,
    feeds: Sequence[Arrays],
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[LinearError]:
    """Errors of a component's linears, in the order of the reference's graph.

    Args:
        reference: its ONNX file, and ``candidate`` the one to compare.
        feeds: inputs of the component, as the reference got them.
        progress: called with the fraction done.

    Raises:
        Sd35Error: the graphs do not have the same linears, or the engine fails.
    """
    one, other = LinearGraph(reference), LinearGraph(candidate)
    if one.linears.keys() != other.linears.keys():
        odd = sorted(one.linears.keys() ^ other.linears.keys())
        raise Sd35Error(
            f"{candidate} and {reference} do not both have the linear {odd[0]}",
            "build both bundles with this version",
        )
    own: defaultdict[str, RelativeError] = defaultdict(RelativeError)
    in_place: defaultdict[str, RelativeError] = defaultdict(RelativeError)
    groups = _groups(one, list(one.linears), feeds)
    for number, layers in enumerate(groups):

        def report(fraction: float, number: int = number) -> None:
            progress((number + fraction) / len(groups))

        _measure(one, other, layers, feeds, own, in_place, report)
    return [
        LinearError(
            component,
            layer,
            other.linears[layer].precision,
            linear.precision,
            own[layer].ratio,
            in_place[layer].ratio,
        )
        for layer, linear in one.linears.items()
    ]


class _Measured:
    """A graph's linears twice: in their places, and cut out."""

    def __init__(self, graph: LinearGraph, layers: Sequence[str]) -> None:
        self._graph = graph
        linears = [graph.linears[layer] for layer in layers]
        self.sources = {layer: graph.linears[layer].source for layer in layers}
        self.outputs = {layer: graph.linears[layer].output for layer in layers}
        exposed = {n for linear in linears for n in (linear.source, linear.output)}
        self._exposed = sorted(exposed - graph.inputs.keys())
        self._whole = open_graph(graph.with_outputs(self._exposed), graph.folder)
        self._cut = open_graph(graph.cut_out(layers), graph.folder)

    def in_place(self, feed: Arrays) -> dict[str, np.ndarray]:
        """Inputs and outputs of the linears, by name of the value."""
        ports = self._graph.feed(feed)
        return ports | dict(zip(self._exposed, self._whole.run(self._exposed, ports), strict=True))

    def alone(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Outputs by layer for inputs by layer."""
        sources = {
            source: inputs[layer].astype(self._graph.dtype(source))
            for layer, source in self.sources.items()
        }
        names = sorted(set(self.outputs.values()))
        out = self._cut.run(names, {input_name(k): v for k, v in sources.items()})
        values = dict(zip(names, out, strict=True))
        return {layer: values[name] for layer, name in self.outputs.items()}


def _measure(
    one: LinearGraph,
    other: LinearGraph,
    layers: Sequence[str],
    feeds: Sequence[Arrays],
    own: Mapping[str, RelativeError],
    in_place: Mapping[str, RelativeError],
    progress: Callable[[float], None],
) -> None:
    """Add the errors of some layers over all feeds."""
    try:
        a, b = _Measured(one, layers), _Measured(other, layers)
        for done, feed in enumerate(feeds, 1):
            expected, actual = a.in_place(feed), b.in_place(feed)
            # Both cut out, so that equal layers give equal bits.
            inputs = {layer: expected[source] for layer, source in a.sources.items()}
            expected_alone, got_alone = a.alone(inputs), b.alone(inputs)
            for layer in layers:
                own[layer].add(got_alone[layer], expected_alone[layer])
                in_place[layer].add(actual[b.outputs[layer]], expected[a.outputs[layer]])
            progress(done / len(feeds))
    except RuntimeError as error:
        raise Sd35Error(f"{other.folder} failed in onnxruntime: {error}") from error
