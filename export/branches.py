"""The branches of guidance that a denoiser computes as one batch, in a graph.

Without text first, then with text; with layer skipping, behind these a third for the first images
of the batch: with text, without some of the blocks. A block whose modulation is zero leaves its
streams as they are, for its gates are: that is how one is skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import onnx_ir as ir
import torch

from .linker import Linker
from .ports import Ports
from .whole import WholeModule


class Branches:
    """Two branches.

    Attributes:
        count: of a batch's images, how many samples the tail is given.
    """

    count = 2

    def __init__(self, link: Linker) -> None:
        self._link = link

    def join(self, uncond: ir.Value, cond: ir.Value) -> ir.Value:
        """One batch of what the branches are given."""
        return self._link.node("Concat", uncond, cond, axis=0)

    def join_modulation(self, uncond: ir.Value, cond: ir.Value) -> ir.Value:
        """The same of the modulation."""
        return self.join(uncond, cond)

    def complete(self, samples: ir.Value) -> ir.Value:
        """For the tail: as many samples in each branch."""
        return samples

    def both(self, samples: ir.Value) -> ir.Value:
        """Those without and with text alone."""
        return samples

    def of_both(self, residual: ir.Value) -> ir.Value:
        """Of all branches, what is given of the two with and without text, or for all alike."""
        return residual


class SkippingBranches(Branches):
    """Three branches; images that the third leaves out have what they have with text.

    Args:
        latents: of the batch.
        layer_mask: [skipped, layers].
        masked_rows: the traced graph of :class:`MaskedRows`.
    """

    count = 3

    def __init__(
        self, link: Linker, latents: ir.Value, layer_mask: ir.Value, masked_rows: ir.Graph
    ) -> None:
        super().__init__(link)
        self._layer_mask = layer_mask
        self._masked_rows = masked_rows
        self._skipped = link.length(layer_mask)
        self._batch = batch = link.length(latents)
        self._both = link.node("Add", batch, batch)
        self._computed = link.node("Add", batch, self._skipped)

    def join(self, uncond: ir.Value, cond: ir.Value) -> ir.Value:
        return self._link.node("Concat", uncond, cond, self._third(cond), axis=0)

    def join_modulation(self, uncond: ir.Value, cond: ir.Value) -> ir.Value:
        inputs = {"modulation": self._third(cond), "layer_mask": self._layer_mask}
        (third,) = self._link.segment(self._masked_rows, inputs, "masked_rows", "")
        return self._link.node("Concat", uncond, cond, third, axis=0)

    def complete(self, samples: ir.Value) -> ir.Value:
        rest = self._link.between(samples, self._computed, self._both)
        return self._link.node("Concat", samples, rest, axis=0)

    def both(self, samples: ir.Value) -> ir.Value:
        return self._link.between(samples, self._link.constant([0]), self._both)

    def of_both(self, residual: ir.Value) -> ir.Value:
        one = self._link.constant([1])
        samples = self._link.node("Concat", self._both, one, one, axis=0)
        both = self._link.node("Expand", residual, samples)
        cond = self._link.between(both, self._batch, self._computed)
        return self._link.node("Concat", both, cond, axis=0)

    def _third(self, cond: ir.Value) -> ir.Value:
        return self._link.between(cond, self._link.constant([0]), self._skipped)


class MaskedRows(WholeModule):
    """Modulation whose rows are zero where a layer is skipped.

    Args:
        rows: of each block, in order.
        modulation: the denoiser's port.
    """

    def __init__(self, rows: Sequence[int], modulation: tuple[torch.dtype, tuple[int | str, ...]]):
        super().__init__()
        self._rows = tuple(rows)
        dtype, (_, *shape) = modulation
        self.inputs: Ports = {
            "modulation": (dtype, ("skipped", *shape)),
            "layer_mask": (torch.float32, ("skipped", len(self._rows))),
        }
        self.outputs = {"masked": self.inputs["modulation"]}

    def forward(self, modulation: torch.Tensor, layer_mask: torch.Tensor) -> tuple[torch.Tensor]:
        masked, row, layer = [], 0, 0
        for rows, equal in groupby(self._rows):
            count = len(list(equal))
            own = modulation[:, row : row + count * rows].unflatten(1, (count, rows))
            mask = layer_mask[:, layer : layer + count, None, None].to(own.dtype)
            masked.append((own * mask).flatten(1, 2))
            row, layer = row + count * rows, layer + count
        return (torch.cat([*masked, modulation[:, row:]], dim=1),)
