"""What the steps of a program begin and end with, around the blocks: the branches of guidance."""

from __future__ import annotations

import torch

from sd35_trt.formats.bundle import ADAPTER_SCALES, RESIDUALS

from .branches import MaskedRows
from .denoiser_segments import Head
from .ports import Ports
from .short_steps import Change
from .whole import WholeModule


def _by_tokens(image: torch.Tensor) -> torch.Tensor:
    """The same, a token's channels beside each other in memory, not as the convolution left them.

    A copy that a compiler merges with what comes before; ``contiguous`` is none where tracing
    takes another layout for granted than there will be.
    """
    return image.clone(memory_format=torch.contiguous_format)


class PlainHead(WholeModule):
    """What the blocks of a program read that is not an input: image tokens on their grid."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.inputs = head.inputs
        self.outputs = {"grid": head.outputs["image"]}

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        (image,) = self.head(latents)
        return (_by_tokens(image),)


class GuidedHead(WholeModule):
    """What all blocks of a program read, of both branches: image tokens on their grid, text,
    modulation.

    Args:
        inputs: those of the denoiser, by name
    """

    def __init__(self, head: Head, inputs: Ports) -> None:
        super().__init__()
        self.head = head
        names = ("latents", "context", "modulation", "uncond_context", "uncond_modulation")
        self.inputs = {name: inputs[name] for name in names}
        single = {
            "grid": self.head.outputs["image"],
            "context": self.inputs["context"],
            "branches_modulation": self.inputs["modulation"],
        }
        self.outputs = {
            n: (dtype, ("branches", *shape[1:])) for n, (dtype, shape) in single.items()
        }

    def forward(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        uncond_context: torch.Tensor,
        uncond_modulation: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (image,) = self.head(latents)
        context = torch.cat([uncond_context, context])
        both = _by_tokens(torch.cat([image, image]))
        return both, context, torch.cat([uncond_modulation, modulation])


def _with_third(both: torch.Tensor, skipped: int, axis: int = 0) -> torch.Tensor:
    """Two branches, and behind them the one with text of the first images.

    By index: a length of a slice would be fixed while tracing.

    Args:
        skipped: images that have a third branch.
    """
    two = both.shape[axis]
    index = torch.arange(two + skipped, device=both.device)
    index = torch.where(index < two, index, index - two // 2)
    return both.index_select(axis, index)


class SkippingHead(WholeModule):
    """As :class:`GuidedHead`, of three branches; see :mod:`.branches`.

    Args:
        masked_rows: of the denoiser.
    """

    def __init__(self, head: Head, inputs: Ports, masked_rows: MaskedRows) -> None:
        super().__init__()
        self.two = GuidedHead(head, inputs)
        self.masked_rows = masked_rows
        self.inputs = {**self.two.inputs, "layer_mask": inputs["layer_mask"]}
        self.outputs = {
            name: (dtype, ("computed", *shape[1:]))
            for name, (dtype, shape) in self.two.outputs.items()
        }

    def forward(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        uncond_context: torch.Tensor,
        uncond_modulation: torch.Tensor,
        layer_mask: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        both = self.two(latents, context, modulation, uncond_context, uncond_modulation)
        skipped = layer_mask.shape[0]
        grid, context, modulation = (_with_third(values, skipped) for values in both)
        two = layer_mask.new_ones((2 * latents.shape[0], layer_mask.shape[1]))
        (modulation,) = self.masked_rows(modulation, torch.cat([two, layer_mask]))
        return grid, context, modulation


class BranchScales(WholeModule):
    """Scales of adapters, of the samples of all branches.

    Args:
        inputs: those of the denoiser, by name.
        skipping: whether there are three.
    """

    def __init__(self, inputs: Ports, skipping: bool) -> None:
        super().__init__()
        names = (ADAPTER_SCALES, "layer_mask") if skipping else (ADAPTER_SCALES,)
        self.inputs = {name: inputs[name] for name in names}
        dtype, (_, rank) = inputs[ADAPTER_SCALES]
        self.outputs = {"branches_scales": (dtype, ("computed", rank))}

    def forward(
        self, adapter_scales: torch.Tensor, layer_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        both = torch.cat([adapter_scales, adapter_scales])
        return (both if layer_mask is None else _with_third(both, layer_mask.shape[0]),)


class BranchResiduals(WholeModule):
    """What ControlNets made of two branches, of the samples of three.

    Args:
        inputs: those of the denoiser, by name.
    """

    def __init__(self, inputs: Ports) -> None:
        super().__init__()
        dtype, (count, _, _, width) = inputs[RESIDUALS]
        shape = (count, "samples", "pixels", width)
        self.inputs = {RESIDUALS: (dtype, shape), "layer_mask": inputs["layer_mask"]}
        self.outputs = {"branches_residuals": (dtype, (count, "computed", "pixels", width))}

    def forward(self, residuals: torch.Tensor, layer_mask: torch.Tensor) -> tuple[torch.Tensor]:
        return (_with_third(residuals, layer_mask.shape[0], axis=1),)


class BranchChange(WholeModule):
    """The change of the two branches with and without text, of three.

    Args:
        inputs: those of the denoiser, by name.
    """

    def __init__(self, change: Change, inputs: Ports) -> None:
        super().__init__()
        self.change = change
        self.inputs = {
            name: (dtype, ("computed", *shape[1:]))
            for name, (dtype, shape) in change.inputs.items()
        }
        self.inputs["guidance"] = inputs["guidance"]
        self.outputs = change.outputs

    def forward(
        self, image: torch.Tensor, kept: torch.Tensor, guidance: torch.Tensor
    ) -> tuple[torch.Tensor]:
        index = torch.arange(2 * guidance.shape[0], device=image.device)
        ends = (values.index_select(0, index) for values in (image, kept))
        change: tuple[torch.Tensor] = self.change(*ends)
        return change
