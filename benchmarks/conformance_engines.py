"""The section ``engines`` of :mod:`conformance`: each engine beside the graph behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from conformance_bench import Bench, Check, holds

from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.formats.bundle import Bundle
from sd35_trt.progress import silent
from sd35_trt.quality.engines import LayerSearch, compare_engines
from sd35_trt.quality.graph_source import find_graphs
from sd35_trt.store.cache import StageCache


def engines(bench: Bench, policies: Sequence[str]) -> Iterator[Check]:
    """Every output of every component, on the inputs that ONNX Runtime gives it."""
    for policy in policies:
        if not bench.has(policy):
            continue
        bundle = Bundle.open(bench.bundle(policy))
        graphs = find_graphs(bundle, ModelOptions(), StageCache(bench.work / "cache"), silent)
        comparison = compare_engines(bundle, graphs)
        notes = {search.component: _layer(search) for search in comparison.searches}
        for port in comparison.ports:
            what = f"{policy}: {port.component}, {port.port}"
            note = notes.get(port.component, "")
            if port.error is None:
                yield holds(f"{what} is finite", False, note)
            else:
                yield Check(what, port.error, most=port.bound, note=note)


def _layer(search: LayerSearch) -> str:
    layer = search.difference
    return search.note if layer is None else f"from {layer.operator} {layer.node} {layer.layer} on"
