"""FlashAttention-3 with E4M3 operands, on Hopper GPUs, where it is installed.

Nothing takes its place on a GPU: PyTorch has no such kernel, and plain operators take five times as
long as attention in half precision.

Source: the package fa3-fwd (github.com/Dao-AILab/flash-attention, hopper).
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from sd35_trt.compat.requirement import installed_version
from sd35_trt.errors import Sd35Error

from . import fused

PACKAGE = "fa3-fwd"

# The only compute capability that its FP8 kernels are for.
_MAJOR = 9

_FIX = "build the bundle with another --policy, e.g. fp8, which leaves attentions in half precision"


@functools.cache
def register(device: torch.device) -> None:
    """Let PyTorch call it for the operator on CUDA devices.

    Raises:
        Sd35Error: another GPU than Hopper, or it is not installed, or cannot be loaded.
    """
    if torch.cuda.get_device_capability(device)[0] != _MAJOR:
        name = torch.cuda.get_device_name(device)
        raise Sd35Error(f"attention in FP8 runs on Hopper GPUs, and this is {name}", _FIX)
    if installed_version(PACKAGE) is None:
        raise Sd35Error(
            f"attention in FP8 needs {PACKAGE}, which is not installed",
            "pip install 'sd35-trt[hopper]'",
        )
    try:
        library = importlib.import_module("fa3_fwd_interface")
    except (ImportError, OSError, RuntimeError) as error:
        reason, found = str(error).split("\n")[0], f"{PACKAGE} {installed_version(PACKAGE)}"
        raise Sd35Error(f"{found} cannot be loaded: {reason}", _FIX) from error
    kernel = functools.partial(attention, library)
    fused.fp8_attention.register_kernel("cuda", kernel)


def attention(library: Any, query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """See :mod:`sd35_trt.programs.fused`."""
    scales = (own.expand(len(query), -1) for own in scale)
    names = ("q_descale", "k_descale", "v_descale")
    mixed = library.flash_attn_func(query, key, value, **dict(zip(names, scales, strict=True)))
    # Versions differ in whether sums come with it.
    return (mixed[0] if isinstance(mixed, tuple) else mixed).half()
