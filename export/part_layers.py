"""The layers and attentions of a part's module, those of each component, and their bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir
from torch import nn

from sd35_trt.components import component_row, layer_owner

from .arena import allocated_bytes


def part_layers(part: nn.Module, folder: str) -> dict[str, tuple[str, nn.Module]]:
    """The layers with parameters of their own, by name: their component, and they themselves.

    Args:
        folder: the part's in the checkpoint.
    """
    return {
        name: (owner, module)
        for name, module in part.named_modules()
        if (owner := layer_owner(folder, name))
        and next(module.parameters(recurse=False), None) is not None
    }


def component_layers(part: nn.Module, component: str) -> dict[str, nn.Module]:
    """The component's layers that have parameters of their own, by name in the part."""
    layers = part_layers(part, component_row(component).part)
    return {name: module for name, (owner, module) in layers.items() if owner == component}


def component_attentions(part: nn.Module, component: str) -> dict[str, nn.Module]:
    """The component's attentions whose matmuls can be quantized: the MMDiT's, by name."""
    from sd35_trt.compat.diffusers import Attention

    folder = component_row(component).part
    return {
        name: module
        for name, module in part.named_modules()
        if folder == "transformer"
        and isinstance(module, Attention)
        and layer_owner(folder, f"{name}.to_q") == component
    }


def stored_bytes(layer: nn.Module) -> list[int]:
    """Bytes of each of a layer's own parameters as the weight streamer writes them."""
    types: dict[str, ir.DataType] = getattr(layer, "ONNX_TYPES", {})
    return [
        parameter.nbytes // (2 if types.get(name) == ir.DataType.INT4 else 1)
        for name, parameter in layer.named_parameters(recurse=False)
    ]


@dataclass(frozen=True)
class StoredSize:
    """Bytes of a component's weights, which do not depend on the shapes that it runs at.

    Attributes:
        weights: as stored.
        largest_layer: weights of its largest layer.
        allocated: what ONNX Runtime takes on a GPU for the weights.
    """

    weights: int
    largest_layer: int
    allocated: int

    @classmethod
    def of(cls, part: nn.Module, component: str) -> StoredSize:
        """Of a part whose policy is applied."""
        layers = [stored_bytes(layer) for layer in component_layers(part, component).values()]
        totals = [sum(tensors) for tensors in layers]
        return cls(sum(totals), max(totals), allocated_bytes(chain.from_iterable(layers)))
