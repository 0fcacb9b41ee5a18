"""Finding what computes the fused operators on a device, and keeping what was compiled for it."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch

from . import flash_attention_3, fused

# Of the operators, the one that is FlashAttention's.
_FP8_ATTENTION = "fp8_attention"


def is_fused(target: str) -> bool:
    """Whether a graph's target names one of these operators."""
    namespace, _, rest = target.partition(".")
    return namespace == fused.NAMESPACE and rest.removesuffix(".default") in fused.FUNCTIONS


def find(target: str, device: torch.device) -> Callable[..., Any]:
    """What computes an operator on a device.

    Args:
        target: ``sd35.<operator>.default``, one that :func:`is_fused` accepts.

    Raises:
        Sd35Error: attention in FP8 on a GPU that has no kernel for it.
    """
    name = target.split(".")[1]
    if name == _FP8_ATTENTION and device.type == "cuda":
        flash_attention_3.register(device)
    elif not _has_kernels(device):
        return fused.FUNCTIONS[name]
    operator: Callable[..., Any] = getattr(getattr(torch.ops, fused.NAMESPACE), name).default
    return operator


@functools.cache
def _has_kernels(device: torch.device) -> bool:
    """Whether a device runs the kernels, which are then registered."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if not _has_triton():
        return False
    from . import triton_operators

    triton_operators.register()
    return True


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def compiled_binaries() -> dict[str, bytes]:
    """What this process compiled of the kernels, by name; see :func:`offer_binaries`."""
    if not _has_triton():
        return {}
    from . import triton_binaries

    return triton_binaries.compiled()


def offer_binaries(binaries: Mapping[str, bytes]) -> None:
    """Let Triton find what another process compiled."""
    if binaries and _has_triton():
        from . import triton_binaries

        triton_binaries.offer(binaries)
