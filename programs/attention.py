"""The kernels of attention by name, and which of them PyTorch may use."""

from __future__ import annotations

from collections.abc import Sequence

from torch.nn.attention import SDPBackend

#: Of :data:`ATTENTION`: the kernels of :mod:`.flash_attention`, for what is compiled.
FLASH_4 = "flash4"

#: Attention kernels of CUDA by name, the preferred one first; the last takes everything. PyTorch's
#: own have their name in it too.
ATTENTION: dict[str, SDPBackend | None] = {
    FLASH_4: None,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def sdpa_backends(attention: Sequence[str]) -> list[SDPBackend]:
    """PyTorch's own among the kernels of these names."""
    return [backend for name in attention if (backend := ATTENTION[name]) is not None]
