"""Values of the plain tensors in a safetensors file, in FP32, read without a framework."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from sd35_trt.errors import CheckpointError

from .file_formats import AGAIN
from .tensor_files import open_safetensors

# Types as headers spell them → numpy's of the stored bytes; BF16 has none there.
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

_LENGTH = 8  # bytes of the number in front of a header


class PlainTensors:
    """A safetensors file whose tensors are floating-point numbers, mapped.

    Args:
        path: the file.
        wanted: what the file should be, for messages.

    Attributes:
        metadata: what the header says besides.

    Raises:
        CheckpointError: missing, something else, truncated or damaged; a tensor of another type.
    """

    def __init__(self, path: Path, wanted: str) -> None:
        self.path = path
        # Refuses what is no whole file.
        header = open_safetensors(path, "np", wanted)
        self.metadata: Mapping[str, str] = header.metadata() or {}
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(_LENGTH), "little")
            entries = json.loads(stream.read(length))
        entries.pop("__metadata__", None)
        self._entries = entries
        self._start = _LENGTH + length

    @property
    def names(self) -> Collection[str]:
        """Of all tensors."""
        return self._entries.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._entries[name]["shape"])

    def values(self, name: str) -> np.ndarray:
        """A tensor in FP32.

        Raises:
            CheckpointError: it is of a type that is not read, or not finite.
        """
        entry = self._entries[name]
        kind, (first, last) = entry["dtype"], entry["data_offsets"]
        if kind not in _STORED:
            raise CheckpointError(
                f"{self.path}: {name!r} is stored in {kind}, which is not read here",
                "save it in FP32, FP16 or BF16",
            )
        stored = np.dtype(_STORED[kind])
        count = (last - first) // stored.itemsize
        with self.path.open("rb") as stream:
            stream.seek(self._start + first)
            data = np.fromfile(stream, stored, count)
        if kind == "BF16":  # the upper half of an FP32
            data = (data.astype(np.uint32) << 16).view(np.float32)
        values = data.astype(np.float32, copy=False).reshape(entry["shape"])
        if not np.isfinite(values).all():
            raise CheckpointError(
                f"{self.path}: {name!r} holds NaN or infinite values", f"{AGAIN}, or take another"
            )
        return values
