"""What is in an ONNX graph."""

from __future__ import annotations

from collections import Counter

from sd35_trt.compat.requirement import requirement
from sd35_trt.formats.bundle import Bundle, Component

from .contents import Contents


def look_inside(bundle: Bundle, component: Component) -> Contents:
    """Operators by type, and linears by the precision of their weights.

    Raises:
        Sd35Error: onnx is not installed.
    """
    with requirement("reading ONNX graphs", "compare"):
        from .linear_graph import LinearGraph
    graph = LinearGraph(bundle.path(component.files[0].path))
    opsets = (entry.version for entry in graph.model.opset_import if not entry.domain)
    return Contents(
        f"ONNX, opset {next(opsets, 0)}",
        dict(Counter(node.op_type for node in graph.model.graph.node)),
        dict(Counter(linear.precision for linear in graph.linears.values())),
    )
