"""What a policy means for a checkpoint: every layer with its precision, its rule and its bytes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain

import torch

from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.components import COMPONENTS, control_name, part_rows
from sd35_trt.policies import Policy

from .component import (
    apply_policy,
    build_part,
    fake_tensors,
)
from .layers import ExportLinear
from .part_layers import component_attentions, component_layers, stored_bytes


@dataclass(frozen=True)
class LayerEntry:
    """One layer of one component, or an attention whose own matrix products a rule names.

    Attributes:
        linear: whether it is a matrix product.
        shape: [in, out] of a linear; of another layer, the shape of its weight; none of an
            attention.
        precision: what the policy asks for.
        rule: the glob that decided, and ``reason`` why.
        bytes: weights, scales and biases as stored.
    """

    component: str
    layer: str
    linear: bool
    shape: tuple[int, ...]
    precision: str
    rule: str
    reason: str
    bytes: int


def inventory(checkpoint: AnyCheckpoint | Structure, policy: Policy) -> list[LayerEntry]:
    """List every layer of the checkpoint's components; no weight is loaded.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
        UsageError: the policy does not fit.
    """
    entries = []
    nets = filter(control_name, checkpoint.given)
    for row in (*COMPONENTS.values(), *chain.from_iterable(map(part_rows, nets))):
        component = row.name
        if not checkpoint.has(row.part):
            continue
        with fake_tensors():
            part = build_part(row.part, checkpoint)
            before = component_layers(part, component)
            apply_policy(part, component, policy)
            after = component_layers(part, component)
            attentions = component_attentions(part, component)
        for name, layer in before.items():
            linear = isinstance(layer, ExportLinear)
            rule = policy.rule(component, name, linear)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, torch.Tensor):
                weight = next(layer.parameters(recurse=False))
            entries.append(
                LayerEntry(
                    component,
                    name,
                    linear,
                    tuple(weight.shape),
                    rule.precision,
                    rule.match,
                    rule.reason,
                    sum(stored_bytes(after[name])),
                )
            )
        for name in attentions:
            if (named := policy.attention_rule(component, name)) is not None:
                entries.append(
                    LayerEntry(
                        component, name, True, (), named.precision, named.match, named.reason, 0
                    )
                )
    return entries
