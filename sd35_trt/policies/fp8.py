"""What of a checkpoint's part a policy computes in FP8, by the names of its modules alone.

Calibration looks for these names in diffusers' modules, export in its own: both have them alike.
"""

from __future__ import annotations

from collections.abc import Iterable

from sd35_trt.components import layer_owner

from . import Policy

# Attentions elsewhere compute their matmuls as their operands are.
_ATTENTION_PART = "transformer"


def fp8_linears(part: str, linears: Iterable[str], policy: Policy) -> list[str]:
    """``component/layer`` of the linears of a part that a policy computes in FP8.

    Args:
        part: the part's folder in the checkpoint.
        linears: names of its linears.
    """
    return [
        f"{component}/{name}"
        for name in linears
        if (component := layer_owner(part, name))
        and policy.rule(component, name, linear=True).precision == "fp8"
    ]


def fp8_attentions(part: str, attentions: Iterable[str], policy: Policy) -> list[str]:
    """``component/attention`` of those whose matmuls a policy computes in FP8: the MMDiT's only.

    Args:
        part: the part's folder in the checkpoint.
        attentions: names of its attentions.
    """
    if part != _ATTENTION_PART:
        return []
    names = []
    for name in attentions:
        component = layer_owner(part, f"{name}.to_q")
        rule = policy.attention_rule(component, name) if component else None
        if rule and rule.precision == "fp8":
            names.append(f"{component}/{name}")
    return names
