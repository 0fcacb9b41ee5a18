"""What we use of modelopt's quantizers beside ``quantize`` itself.

modelopt is imported where it is called: a calibration that quantizes nothing does without.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def quantizers(model: nn.Module) -> dict[str, Any]:
    """modelopt's quantizers in a model, by name; ``is_enabled`` says which are switched on."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {n: module for n, module in model.named_modules() if isinstance(module, TensorQuantizer)}


def collect_statistics(model: nn.Module) -> None:
    """Let the quantizers that are switched on see what passes, and quantize nothing."""
    from modelopt.torch.quantization.model_calib import enable_stats_collection

    enable_stats_collection(model)


def collected_amax(quantizer: Any) -> float | None:
    """The largest magnitude that a quantizer saw since :func:`collect_statistics`.

    None where nothing passed it.
    """
    value = quantizer._calibrator.compute_amax()
    return None if value is None else float(value)


# What modelopt swaps while an attention runs; it leaves them swapped when that raises.
_SWAPPED = ((torch, "bmm"), (torch, "baddbmm"), (F, "scaled_dot_product_attention"))


@contextlib.contextmanager
def restored_functions() -> Iterator[None]:
    """torch's own functions are back in place afterwards, whatever happened."""
    functions = [(module, name, getattr(module, name)) for module, name in _SWAPPED]
    try:
        yield
    finally:
        for module, name, function in functions:
            setattr(module, name, function)
            vars(module).pop(f"_{name}", None)


def is_range_error(error: AssertionError) -> bool:
    """Whether modelopt failed because what a quantizer saw is not finite."""
    return "values in amax" in str(error)
