"""An exported component: its files, and what ``component.json`` says of it.

:mod:`sd35_trt.export` writes it, :mod:`sd35_trt.engines` reads it.
"""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from sd35_trt.errors import BundleError

from .bundle import AdapterGroup, Ports
from .reading import Count, Name, encode, read_document

#: A component as ONNX: the graph, and its weights as external data.
MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "weights.data"

DESCRIPTION_FILE = "component.json"

_AGAIN = "delete it: the next build writes it again"


class ComponentFacts(Struct, frozen=True):
    """What ``component.json`` holds.

    Attributes:
        name: one that :func:`sd35_trt.components.component_row` knows.
        weight_bytes: bytes of weights as stored.
        largest_layer_bytes: weights of its largest layer.
        allocated_bytes: what ONNX Runtime takes on a GPU for the weights.
        precisions: how many layers have each precision of the policy.
        fp32_places, adapters: see :class:`sd35_trt.formats.bundle.Component`.
    """

    name: Name
    weight_bytes: Count
    largest_layer_bytes: Count
    allocated_bytes: Count
    inputs: Ports
    outputs: Ports
    precisions: dict[Name, Count]
    fp32_places: dict[Name, float]
    adapters: tuple[AdapterGroup, ...] = ()

    def write(self, folder: Path) -> None:
        """Write ``component.json``."""
        (folder / DESCRIPTION_FILE).write_bytes(encode(self))


def read_component(folder: Path) -> ComponentFacts:
    """Read ``component.json``.

    Raises:
        BundleError: missing, or not as it was written.
    """
    path = folder / DESCRIPTION_FILE
    return read_document(path, ComponentFacts, 16 << 20, BundleError, _AGAIN)
