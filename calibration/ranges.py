"""The largest magnitude that each module of a model puts out, recorded while it runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from sd35_trt.components import module_owner
from sd35_trt.errors import Sd35Error

# transformers' modules return tuples whose further members are caches and masks.
_FIRST_ONLY = ("text_encoder", "text_encoder_2", "text_encoder_3")


def amax(tensor: torch.Tensor) -> float:
    """Largest magnitude; NaN where there is one, 0 for an empty tensor."""
    if not tensor.numel():
        return 0.0
    low, high = torch.aminmax(tensor.detach())
    return float(torch.maximum(low.abs(), high.abs()))


class RangeRecorder:
    """Records the output amax of every module of a part, by forward hooks.

    Make it before quantizers are inserted, which are modules too.

    Args:
        part: the part's folder in the checkpoint; it decides which components own the modules.
        model: its module.

    Attributes:
        amax: ``component/module`` → the largest magnitude so far, in order of first use.
        last: when a module last finished (of ``time.monotonic``), and which.
    """

    def __init__(self, part: str, model: nn.Module) -> None:
        self.amax: dict[str, float] = {}
        self.last = (0.0, "the input")
        self._first_only = part in _FIRST_ONLY
        self._handles = []
        for name, module in model.named_modules(remove_duplicate=False):
            component = module_owner(part, name) if name else None
            if component is not None:
                self._handles.append(
                    module.register_forward_hook(self._hook(f"{component}/{name}"))
                )

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, inputs: Any, output: Any) -> None:
            for tensor in self._tensors(output):
                value = amax(tensor)
                if not math.isfinite(value):
                    raise not_finite(f"the output of {name}", value)
                self.amax[name] = max(self.amax.get(name, 0.0), value)
            self.last = (time.monotonic(), name)

        return record

    def _tensors(self, output: Any) -> Iterator[torch.Tensor]:
        members = output if isinstance(output, (tuple, list)) else (output,)
        for member in members[:1] if self._first_only else members:
            if isinstance(member, torch.Tensor) and member.is_floating_point():
                yield member

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def not_finite(where: str, value: float = math.nan) -> Sd35Error:
    """The error for a module whose arithmetic fails."""
    return Sd35Error(
        f"{where} has {value:g} during calibration",
        "check the checkpoint, or calibrate in --dtype fp32",
    )
