"""Tensors of a safetensors file, and their way from its pages to a device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sd35_trt.errors import BundleError

from .decoding import REBUILD

# Bytes of pinned memory through which weights go at once.
_PIECE = 32 << 20


def aligned(nbytes: int) -> int:
    """Up to where a tensor may begin in a buffer."""
    return -(-nbytes // 256) * 256


def slice_bytes(part: Any) -> int:
    """Bytes of a tensor of a safetensors file, by its header."""
    bits = {"F8_E4M3": 8, "I8": 8, "U8": 8, "F16": 16, "BF16": 16, "F32": 32}[part.get_dtype()]
    return math.prod(part.get_shape()) * bits // 8


def open_mapped(path: Path) -> Any:
    """A safetensors file whose tensors are views of its pages.

    Raises:
        BundleError: it is damaged.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", REBUILD) from error


class Upload:
    """Copies tensors from the host's memory, which may be a file's pages, to a device.

    To a GPU they go through two pinned pieces by turns: all cores fill the one while the other is
    on the bus. CUDA's own copy from memory that is not pinned is several times slower.

    Args:
        device: where copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        pinned = 2 if device.type == "cuda" else 0
        self._pieces = [
            torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(pinned)
        ]
        self._copies: list[Any] = [None] * pinned  # events after a piece's last copy
        self._turn = 0

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, when the current stream gets there."""
        if not self._pieces:
            return source.to(self.device)
        return self.copy(source, torch.empty_like(source, device=self.device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Queue the copy of a tensor into another, which is contiguous; returns that."""
        if not self._pieces:
            return target.copy_(source)
        whole, into = (tensor.reshape(-1).view(torch.uint8) for tensor in (source, target))
        for first in range(0, len(whole), _PIECE):
            part = whole[first : first + _PIECE]
            turn, self._turn = self._turn, 1 - self._turn
            if self._copies[turn] is not None:
                self._copies[turn].synchronize()
            piece = self._pieces[turn][: len(part)].copy_(part)
            into[first : first + len(part)].copy_(piece, non_blocking=True)
            self._copies[turn] = torch.cuda.current_stream(self.device).record_event()
        return target


def read_tensors(path: Path, names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on a device.

    Raises:
        BundleError: the file is damaged, or lacks one.
        torch.OutOfMemoryError: the device has no room.
    """
    file = open_mapped(path)
    try:
        mapped = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise BundleError(f"{path} cannot be read: {error}", REBUILD) from error
    if device.type == "cpu":
        return mapped
    # In one piece: PyTorch's allocator rounds every allocation up, 3 % for Large.
    sizes = [aligned(tensor.nbytes) for tensor in mapped.values()]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    upload = Upload(device)
    return {
        name: upload.copy(source, part[: source.nbytes].view(source.dtype).view(source.shape))
        for (name, source), part in zip(mapped.items(), whole.split(sizes), strict=True)
    }
