"""What makes steps short: the change of the later blocks, remembered and extrapolated.

A full step puts out what the blocks behind the first few changed of the image's stream. A short one
computes the first few alone, and adds what that change is taken to be.
"""

from __future__ import annotations

from typing import Any

import torch

from .layers import cast
from .range_guard import carries_fp32
from .whole import WholeModule

#: Outputs and inputs of the denoisers.
CHANGE = "change"
COEFFICIENTS = "change_coefficients"
REMEMBERED = ("last_change", "earlier_change")


def change_dtype(transformer: Any, blocks: int, dtype: torch.dtype) -> torch.dtype:
    """Of the change: FP32 where the stream is that behind the first blocks, or behind all.

    Args:
        transformer: its policy applied.
        blocks: the first ones.
        dtype: of the streams that do not exceed FP16.
    """
    ends = (transformer.transformer_blocks[blocks - 1], transformer.transformer_blocks[-1])
    return torch.float32 if any(map(carries_fp32, ends)) else dtype


class Change(WholeModule):
    """What the later blocks changed of the image's stream.

    Args:
        image: dtype of the stream behind all blocks.
        kept: of the stream behind the first ones.
        change: of the change.
        width: channels.
    """

    def __init__(
        self, image: torch.dtype, kept: torch.dtype, change: torch.dtype, width: int
    ) -> None:
        super().__init__()
        shape = ("samples", "pixels", width)
        self.inputs = {"image": (image, shape), "kept": (kept, shape)}
        self.outputs = {CHANGE: (change, shape)}

    def forward(self, image: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor]:
        dtype = self.outputs[CHANGE][0]
        return (cast(image, dtype) - cast(kept, dtype),)


class Extrapolation(WholeModule):
    """The stream behind all blocks, of that behind the first ones and two remembered changes.

    Args:
        kept: dtype of the stream behind the first blocks.
        change: of the changes.
        image: of the stream behind all blocks.
        width: channels.
        guided: whether the stream has both branches of guidance.
    """

    def __init__(
        self,
        kept: torch.dtype,
        change: torch.dtype,
        image: torch.dtype,
        width: int,
        guided: bool,
    ) -> None:
        super().__init__()
        self.guided = guided
        shape = ("branches" if guided else "batch", "pixels", width)
        self.inputs = {
            "image": (kept, shape),
            COEFFICIENTS: (torch.float32, ("batch", 2)),
            **dict.fromkeys(REMEMBERED, (change, shape)),
        }
        self.outputs = {"image": (image, shape)}

    def forward(
        self,
        image: torch.Tensor,
        change_coefficients: torch.Tensor,
        last_change: torch.Tensor,
        earlier_change: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        factors = change_coefficients[:, :, None, None]
        if self.guided:
            factors = torch.cat([factors, factors])
        # In FP32: coefficients of both signs cancel.
        change = factors[:, 0] * last_change.float() + factors[:, 1] * earlier_change.float()
        return (cast(image.float() + change, self.outputs["image"][0]),)
