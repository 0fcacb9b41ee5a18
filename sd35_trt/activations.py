"""Working memory of TensorRT engines, as its builder reported it for SD3.5's structures.

The table, ``activations.json``, is written by ``benchmarks/activations.py``: bytes as a sum of
products of a component's dimensions, for the packaged policies.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from importlib import resources
from math import prod
from typing import Any

from .policy import Policy, load_policy
from .targets import Target

# The builder whose figures these are.
_BUILDER = "tensorrt-rtx"


def activation_bytes(terms: Mapping[str, float], dims: Mapping[str, int]) -> int:
    """The sum at some shape.

    Args:
        terms: dimensions to multiply, such as ``batch*tokens``, or none, → bytes.
        dims: sizes of the dimensions.
    """
    return round(sum(value * product(term, dims) for term, value in terms.items()))


def product(term: str, dims: Mapping[str, int]) -> int:
    """A term's dimensions multiplied; 1 for the empty term."""
    return prod(dims[name] for name in term.split("*") if name)


def measured_activations(
    component: str,
    model: str,
    guided: bool,
    policy: Policy,
    target: Target,
    dims: Mapping[str, int],
) -> int | None:
    """Bytes that an engine takes beside its weights, where that was measured.

    Args:
        component: a key of :data:`sd35_trt.components.COMPONENTS`.
        model: name of a :class:`~sd35_trt.variants.Variant`.
        dims: sizes of the component's dynamic dimensions, the largest that the engine is for.

    Returns:
        None for another builder, structure or policy. For several GPUs, what the worst takes.
    """
    if target.builder != _BUILDER or not _is_packaged(policy):
        return None
    found = []
    for capability in target.builders[_BUILDER]:
        row = next(
            (
                row
                for row in _rows()
                if row["component"] == component
                and model in row["models"]
                and row["guided"] in (None, guided)
                and row["policy"] == policy.name
                and capability in row["compute_capabilities"]
            ),
            None,
        )
        if row is None:
            return None
        found.append(activation_bytes(row["terms"], dims))
    return max(found)


def _is_packaged(policy: Policy) -> bool:
    """Whether it is what its name says, and no file of the same name."""
    return policy.name in {row["policy"] for row in _rows()} and policy == load_policy(policy.name)


@functools.cache
def _rows() -> list[dict[str, Any]]:
    text = resources.files("sd35_trt").joinpath("activations.json").read_text("utf-8")
    rows: list[dict[str, Any]] = json.loads(text)["rows"]
    return rows
