"""What an engine consists of: its layers by type and precision.

A row of :data:`sd35_trt.backends.BACKENDS` names the function that looks into the engines of its
kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sd35_trt.backends import BACKENDS, resolve
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component


@dataclass(frozen=True)
class Contents:
    """What is in an engine.

    Attributes:
        form: what the engine is: ``ONNX, opset 23``.
        layers: layers, or operators, by type → how many.
        precisions: precision → how many: of the linears of a graph, of all layers of a plan; empty
            where it is not known.
        note: what could not be seen, and why.
    """

    form: str
    layers: Mapping[str, int] = field(default_factory=dict)
    precisions: Mapping[str, int] = field(default_factory=dict)
    note: str = ""


def look_inside(bundle: Bundle) -> dict[str, Contents]:
    """The contents of every engine of a bundle, by component."""
    return {c.name: _look(bundle, c) for c in bundle.manifest.components}


def _look(bundle: Bundle, component: Component) -> Contents:
    backend = BACKENDS.get(component.engine)
    if backend is None or backend.contents is None:
        return Contents(component.engine, note=f"engines of {component.engine} cannot be read")
    try:
        contents: Contents = resolve(backend.contents)(bundle, component)
    except Sd35Error as error:
        return Contents(backend.title, note=str(error))
    return contents
