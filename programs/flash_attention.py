"""FlashAttention-4 as the attention of compiled programs, on Hopper GPUs, where it is installed.

At SD3.5 Large's shapes it takes four fifths of the time of cuDNN's kernel, the fastest that PyTorch
itself has. Its kernels are compiled where they run, in seconds; what was compiled can be kept.
Source: the package flash-attn-4 (github.com/Dao-AILab/flash-attention, flash_attn/cute).
"""

from __future__ import annotations

import functools
import logging
import os
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sd35_trt.compat.requirement import installed_version

logger = logging.getLogger("sd35_trt")

PACKAGE = "flash-attn-4"

# Of compute capabilities, those that it has been tried on.
_MAJOR = 9

_DTYPES = (torch.float16, torch.bfloat16)
_LARGEST_HEAD = 256

# The library keeps what it compiled where the environment says when it is imported.
_KEEP, _FOLDER = (f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}" for name in ("ENABLED", "DIR"))

# Below its folder: hashes of its sources and of what decides about a kernel.
_KERNEL = re.compile(r"[0-9a-f]{64}/(\w+/)?[0-9a-f]{64}\.o")


@functools.cache
def is_usable(device: torch.device) -> bool:
    """Whether a device runs it, and it can be loaded."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != _MAJOR:
        return False
    if installed_version(PACKAGE) is None:
        return False
    try:
        _library()
    except Exception as error:  # noqa: BLE001 (its dependencies may fail in any way)
        logger.warning(
            "%s %s cannot be loaded (%s: %s): attention takes PyTorch's own kernels",
            PACKAGE, installed_version(PACKAGE), type(error).__name__, str(error).split("\n")[0],
        )  # fmt: skip
        return False
    return True


@functools.cache
def _library() -> Any:
    _folder()
    # What its compiler says about itself.
    warnings.filterwarnings("ignore", module=r"(cutlass|nvidia_cutlass_dsl)\b")
    import flash_attn.cute

    return flash_attn.cute


@functools.cache
def _folder() -> Path | None:
    """Where the library keeps its kernels for us; None where the user has it keep them."""
    if os.environ.get(_KEEP) == "1":
        return None
    # For this process: what others compiled is offered to it, see offer().
    folder = tempfile.TemporaryDirectory(prefix="sd35-trt-")
    os.environ[_KEEP], os.environ[_FOLDER] = "1", folder.name
    _TEMPORARY.append(folder)
    return Path(folder.name)


# Removed when the process ends.
_TEMPORARY: list[tempfile.TemporaryDirectory[str]] = []


def compiled() -> dict[str, bytes]:
    """What this process compiled, or was offered, by name."""
    if not _TEMPORARY:
        return {}
    folder = Path(_TEMPORARY[0].name)
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.o")}
    return {name: paths[name].read_bytes() for name in sorted(paths) if _KERNEL.fullmatch(name)}


def offer(kernels: Mapping[str, bytes]) -> None:
    """Let the library find what another process compiled."""
    folder = _folder() if kernels else None
    if folder is None:
        return
    for name, data in kernels.items():
        if _KERNEL.fullmatch(name):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@torch.library.custom_op("sd35::attention", mutates_args=())
def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``softmax(query keyᵀ / √head) value``, each [N, heads, tokens, head], tokens before heads in
    the result's memory."""
    if query.dtype not in _DTYPES or query.shape[-1] > _LARGEST_HEAD:
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return mixed.transpose(1, 2).contiguous().transpose(1, 2)
    mixed = _library().flash_attn_func(*(x.transpose(1, 2) for x in (query, key, value)))
    # Versions differ in whether sums come with it.
    return (mixed[0] if isinstance(mixed, tuple) else mixed).transpose(1, 2)


@attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    count, heads, tokens, _ = query.shape
    return query.new_empty((count, tokens, heads, value.shape[-1])).transpose(1, 2)


#: As graphs call it.
OPERATOR = torch.ops.sd35.attention.default
