"""Low-rank adapters as inputs of a component's graph: y = W·x + B·(s ∘ (A·x)).

A and B hold all adapters of a run side by side along the rank; s [samples, rank] says how much of
each a sample has, and where it is zero, the product is selected away: 0·∞ is NaN. Linears that
read one tensor are a group, whose products with A are one. The matrices of a group are stacked
over the component's blocks: A [blocks, in, linears, rank] and B [blocks, linears, rank, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from sd35_trt.formats.bundle import ADAPTER_SCALES, AdapterGroup

from .fused_block import FusedBlock
from .layers import cast
from .part_layers import component_layers
from .ports import ComponentModule, Ports, Shape
from .torch_layers import joined_linear

# A linear's name in a block, or outside of all.
_BLOCK = re.compile(r"(?:transformer_blocks|text_model\.encoder\.layers)\.(\d+)\.(.+)")

# Linears of a block that read one tensor.
_SIBLINGS = (
    (r"(attn2?)\.to_([qkv])", "qkv"),
    (r"(attn)\.add_([qkv])_proj", "add_qkv"),
    (r"(self_attn)\.([qkv])_proj", "qkv"),
)

# What published adapters leave alone; an embedder's input has no sample of its own.
_WITHOUT = re.compile(r"(pos_embed|time_text_embed|text_projection|proj_out)(\.|$)")


@dataclass(frozen=True)
class _Place:
    """Where a linear is: its group, its block's number, and its number in the group."""

    group: str
    block: int
    index: int


def _place(name: str) -> _Place:
    match = _BLOCK.fullmatch(name)
    block, own = (int(match[1]), match[2]) if match else (0, name)
    for pattern, suffix in _SIBLINGS:
        if siblings := re.fullmatch(pattern, own):
            return _Place(f"{siblings[1]}_{suffix}", block, "qkv".index(siblings[2]))
    return _Place(own.replace(".", "_"), block, 0)


@dataclass
class Group:
    """Linears of all blocks that are computed alike.

    Attributes:
        name: of the group.
        shape: [in, out] of each linear.
        blocks: number of a block → the names of its linears, in order.
    """

    name: str
    shape: tuple[int, int]
    blocks: dict[int, dict[int, str]] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Linears of a block."""
        return len(next(iter(self.blocks.values())))

    def index(self, block: int) -> int:
        """A block's place in the stack."""
        return list(self.blocks).index(block)

    def record(self) -> AdapterGroup:
        """What the manifest says of it."""
        layers = tuple(tuple(own[i] for i in sorted(own)) for own in self.blocks.values())
        return AdapterGroup(f"{self.name}_down", f"{self.name}_up", layers)

    def ports(self, dtype: torch.dtype, blocks: int | None = None) -> Ports:
        """Its inputs, of all blocks or of some."""
        count = len(self.blocks) if blocks is None else blocks
        down: Shape = (count, self.shape[0], self.size, "rank")
        up: Shape = (count, self.size, "rank", self.shape[1])
        return {f"{self.name}_down": (dtype, down), f"{self.name}_up": (dtype, up)}


def adapter_groups(part: nn.Module, component: str) -> list[Group]:
    """The groups of a component's linears.

    Args:
        part: its layers replaced.
    """
    groups: dict[tuple[str, tuple[int, int]], Group] = {}
    for name, layer in component_layers(part, component).items():
        features: Any = layer
        if not hasattr(layer, "in_features") or _WITHOUT.match(name):
            continue
        place, shape = _place(name), (features.in_features, features.out_features)
        group = groups.get((place.group, shape))
        if group is None:
            # Blocks of two widths of modulation have two groups.
            others = sum(1 for kind, _ in groups if kind == place.group)
            own = f"{place.group}_{others + 1}" if others else place.group
            group = groups[place.group, shape] = Group(own, shape)
        group.blocks.setdefault(place.block, {})[place.index] = name
    return list(groups.values())


def take_adapters(
    module: ComponentModule,
    groups: Iterable[Group],
    dtype: torch.dtype,
    samples: str,
    blocks: int | None = None,
) -> None:
    """Give a component, or a segment of one, inputs for adapters: the scales come first.

    Args:
        samples: the dimension that has a mix of its own.
        blocks: of each stack, as many; None takes all.
    """
    groups = list(groups)
    ports: Ports = {ADAPTER_SCALES: (dtype, (samples, "rank"))}
    for group in groups:
        ports |= group.ports(dtype, blocks)
    module.inputs = {**module.inputs, **ports}
    module.adapter_inputs = tuple(ports)
    module.adapters = tuple(group.record() for group in groups)


class AdaptedLinears:
    """Adds to the outputs of linears what adapters make of their input, while a graph is traced.

    Args:
        part: whose linears they are; hooks are registered. A fused block asks for the matrices.
        groups: of :func:`adapter_groups`.
        blocks: the only block, and where in the part it is: the stacks hold it alone; None takes
            the whole part.
        sample_axes: group → the axis of a linear's input that has a mix of its own, where it is not
            the first.
    """

    def __init__(
        self,
        part: nn.Module,
        groups: Iterable[Group],
        blocks: tuple[int, str] | None = None,
        sample_axes: Mapping[str, int] | None = None,
    ) -> None:
        self.groups = [group for group in groups if blocks is None or blocks[0] in group.blocks]
        # Tensors of a run, which ``torch.export`` refuses in an attribute of a module.
        self._values: dict[str, torch.Tensor] = {}
        self._hidden: dict[tuple[str, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self._axes = dict(sample_axes or {})
        self._group_of: dict[str, Group] = {}
        for group in self.groups:
            for block, names in group.blocks.items():
                if blocks is not None and block != blocks[0]:
                    continue
                place = 0 if blocks is not None else group.index(block)
                prefix = "" if blocks is None else blocks[1]
                own = [names[index].removeprefix(prefix) for index in sorted(names)]
                self._group_of |= dict.fromkeys(own, group)
                if not isinstance(part, FusedBlock):
                    self._hook(part, group, place, own)
        if isinstance(part, FusedBlock):
            part.adapted = self

    def _hook(self, part: nn.Module, group: Group, place: int, linears: list[str]) -> None:
        joined = joined_linear(part, linears)
        if joined is not None:
            joined.register_forward_hook(partial(self._add_all, group, place))
            return
        for index, name in enumerate(linears):
            hook = partial(self._add, group, place, index)
            part.get_submodule(name).register_forward_hook(hook)

    @property
    def scales(self) -> torch.Tensor | None:
        """Of the run, [samples, rank]; None where it has no adapters."""
        return self._values.get(ADAPTER_SCALES)

    def matrices(self, linear: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [in, linears, rank] and B [linears, rank, out] of the linears that share a product.

        Args:
            linear: one of them, by its name in the only block.
        """
        name = self._group_of[linear].name
        return self._values[f"{name}_down"][0], self._values[f"{name}_up"][0]

    def feed(self, names: Iterable[str], tensors: Sequence[torch.Tensor]) -> None:
        """Take the inputs of a run by the names of their ports; none where it has no adapters."""
        self._values = dict(zip(names, tensors, strict=True)) if tensors else {}
        self._hidden.clear()

    def _add(
        self,
        group: Group,
        place: int,
        index: int,
        layer: nn.Module,
        inputs: tuple[torch.Tensor],
        output: torch.Tensor,
    ) -> torch.Tensor:
        if not self._values:  # what measures sizes has no adapters
            return output
        (x,) = inputs
        hidden = self._scaled(group, place, x)[..., index, :]
        up = cast(self._values[f"{group.name}_up"][place, index], x.dtype)
        return output + cast(hidden @ up, output.dtype)

    def _add_all(
        self,
        group: Group,
        place: int,
        layer: nn.Module,
        inputs: tuple[torch.Tensor],
        outputs: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            self._add(group, place, index, layer, inputs, output)
            for index, output in enumerate(outputs)
        )

    def _scaled(self, group: Group, place: int, x: torch.Tensor) -> torch.Tensor:
        """s ∘ (A·x) of the linears that read ``x``: [.., linears, rank]."""
        key = group.name, place
        known = self._hidden.get(key)
        if known is not None and known[0] is x:
            return known[1]
        down = cast(self._values[f"{group.name}_down"][place], x.dtype)
        rank = down.shape[-1]
        hidden = (x @ down.flatten(1)).reshape(*x.shape[:-1], group.size, rank)
        scales = cast(self._values[ADAPTER_SCALES], x.dtype)
        axis = self._axes.get(group.name, 0)
        around = (1,) * axis, (1,) * (hidden.ndim - axis - 2)
        scales = scales.reshape(*around[0], scales.shape[0], *around[1], rank)
        hidden = (hidden * scales).masked_fill(scales == 0, 0.0)
        self._hidden[key] = x, hidden
        return hidden
