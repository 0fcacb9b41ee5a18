"""What a calibration says of one part of a checkpoint: the scales, and where FP16 is too narrow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sd35_trt.components import CONTROLNET, layer_holder, part_kind, part_rows
from sd35_trt.formats.calibration import Calibration

#: The largest finite FP16.
HALF_MAX = 65504.0

#: Outputs beyond it are carried in FP32: prompts that were not calibrated with may reach further.
HALF_LIMIT = HALF_MAX / 4

_ADALN = re.compile(r"(\w*)conditioner/(.*norm(?:1|1_context|_out))\.linear")

# What a text encoder hands over without a normalization behind it.
_TEXT_FEATURES = re.compile(
    r"clip_[lg]/(text_model\.encoder\.layers\.\d+|text_projection)|t5/encoder\.final_layer_norm"
)


@dataclass(frozen=True)
class Scales:
    """A calibration, seen from one part.

    Attributes:
        inputs: ``component/layer`` → amax of an FP8 linear's input.
        bmm: ``component/attention.operand`` → amax of an FP8 matmul's operand.
        wide: ``component/module`` → amax of an output beyond :data:`HALF_LIMIT`. An adaptive norm
            is there too where the bound of what it puts out exceeds FP16.
        wide_text: whether text features are beyond the limit.
    """

    inputs: Mapping[str, float] = field(default_factory=dict)
    bmm: Mapping[str, float] = field(default_factory=dict)
    wide: Mapping[str, float] = field(default_factory=dict)
    wide_text: bool = False

    @classmethod
    def of(cls, calibration: Calibration, part: str) -> Scales:
        """What concerns the components of one part.

        Args:
            part: its folder in the checkpoint.
        """
        names = [row.name for row in part_rows(part)]

        def own(values: Mapping[str, float]) -> dict[str, float]:
            return {k: v for k, v in values.items() if k.partition("/")[0] in names}

        beyond = {k: v for k, v in calibration.activations.items() if v > HALF_LIMIT}
        wide = {**_wide_modulation(own(calibration.activations)), **own(beyond)}
        text = any(_TEXT_FEATURES.fullmatch(name) for name in beyond)
        return cls(
            own(calibration.inputs),
            own(calibration.bmm),
            wide,
            text and part_kind(part) in ("transformer", CONTROLNET),
        )

    def describe(self, component: str) -> dict[str, Any]:
        """What a component's export depends on, JSON-serializable; empty where it has no effect.

        Scales are the component's own; places in FP32 change what its part's others hand to it.
        """

        holder = layer_holder(component)

        def own(values: Mapping[str, float]) -> dict[str, float]:
            return {k: v for k, v in values.items() if k.partition("/")[0] == holder}

        values = {"inputs": own(self.inputs), "bmm": own(self.bmm), "wide": self.wide}
        described: dict[str, Any] = {k: dict(sorted(v.items())) for k, v in values.items() if v}
        return {**described, "wide_text": True} if self.wide_text else described

    def structure(self, component: str) -> dict[str, Any]:
        """What a component's graph depends on, JSON-serializable: names, as values are weights.

        An input beyond :data:`HALF_LIMIT` matters to the layers of all the part.
        """
        described: dict[str, Any] = {k: sorted(v) for k, v in self.describe(component).items()
                                     if isinstance(v, Mapping)}  # fmt: skip
        beyond = sorted(name for name, amax in self.inputs.items() if amax > HALF_LIMIT)
        return {**described, "beyond": beyond, "wide_text": self.wide_text}


def _wide_modulation(activations: Mapping[str, float]) -> dict[str, float]:
    """Adaptive norms whose output may exceed FP16, by name, with the bound.

    A normalized vector of D channels has no value beyond √D; D is at most 2432 in SD3.5, and the
    modulation's amax is known. What :class:`Calibration` does not have is the modulated value.
    """
    bounds = {}
    for name, amax in activations.items():
        match = _ADALN.fullmatch(name)
        if match and (bound := 50 * (1 + amax) + amax) > HALF_MAX:
            owner = match[1].removesuffix("_") or "denoiser"
            bounds[f"{owner}/{match[2]}"] = bound
    return bounds
