"""The layers and attentions of a part's module, those of each component, and their bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir
from torch import nn

from sd35_trt.components import component_row, layer_holder, layer_owner

from .arena import allocated_bytes

_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.")


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


def component_layers(
    part: nn.Module, component: str, first_blocks: int = 0
) -> dict[str, nn.Module]:
    """The component's layers that have parameters of their own, by name in the part.

    Args:
        first_blocks: of a transformer's, those that it computes; 0 is all.
    """
    layers, holder = part_layers(part, component_row(component).part), layer_holder(component)
    return {
        name: module
        for name, (owner, module) in layers.items()
        if owner == holder and is_within(name, first_blocks)
    }


def is_within(layer: str, first_blocks: int) -> bool:
    """Whether a layer is in one of a transformer's first blocks, or in none.

    Args:
        first_blocks: how many; 0 is all.
    """
    block = _BLOCK.match(layer)
    return not first_blocks or block is None or int(block[1]) < first_blocks


def component_attentions(part: nn.Module, component: str) -> dict[str, nn.Module]:
    """The component's attentions whose matmuls can be quantized: the MMDiT's, by name."""
    from sd35_trt.compat.diffusers import Attention

    folder = component_row(component).part
    return {
        name: module
        for name, module in part.named_modules()
        if folder == "transformer"
        and isinstance(module, Attention)
        and layer_owner(folder, f"{name}.to_q") == layer_holder(component)
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
    def of(cls, part: nn.Module, component: str, first_blocks: int = 0) -> StoredSize:
        """Of a part whose policy is applied; see :func:`component_layers`."""
        own = component_layers(part, component, first_blocks)
        layers = [stored_bytes(layer) for layer in own.values()]
        totals = [sum(tensors) for tensors in layers]
        return cls(
            sum(totals), max(totals, default=0), allocated_bytes(chain.from_iterable(layers))
        )
