"""Adapters of random values for a bundle, and files that are none."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt.formats.adapter import Adapter, AdapterLayer, adapter_slots, write_adapter
from sd35_trt.formats.bundle import Bundle

#: What the cases call adapters → rank, and the part of the model that it changes.
_NAMED = {"style": (4, ""), "subject": (3, "text_encoder"), "shape": (9, "transformer")}


def random_adapter(bundle: Path, rank: int, seed: int, part: str = "") -> Adapter:
    """Of all linears of a bundle, or of those whose part begins so."""
    noise = np.random.default_rng(seed)
    layers = {}
    for layer, slot in adapter_slots(Bundle.open(bundle).manifest).items():
        if layer.startswith(part):
            down = noise.standard_normal((rank, slot.shape[0])).astype(np.float32)
            up = noise.standard_normal((slot.shape[1], rank)).astype(np.float32)
            layers[layer] = AdapterLayer(0.1 * down, 0.1 * up)
    return Adapter(layers, f"{seed}" * 64)


def adapters_of_the_cases(bundle: Path, folder: Path) -> list[Path]:
    """Files for ``cases.json``; none where the bundle takes none."""
    if not Bundle.open(bundle).manifest.adapter_ranks:
        return []
    paths = []
    for seed, (name, (rank, part)) in enumerate(_NAMED.items()):
        paths.append(folder / f"{name}.safetensors")
        write_adapter(paths[-1], random_adapter(bundle, rank, seed, part))
    return paths


def _header(text: str | bytes, content: bytes = b"") -> bytes:
    data = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(data)) + data + content


def _tensors(layers: dict[str, Any], content: bytes, **metadata: str) -> bytes:
    own = {"format": "sd35-trt-adapter-1", "source": "0" * 64, **metadata}
    return _header(json.dumps({"__metadata__": own, **layers}), content)


def _matrix(rows: int, columns: int, begin: int, dtype: str = "F32") -> dict[str, Any]:
    end = begin + rows * columns * (4 if dtype == "F32" else 2)
    return {"dtype": dtype, "shape": [rows, columns], "data_offsets": [begin, end]}


_LAYER = "transformer/transformer_blocks.0.attn.to_q"
_NAN = np.array([[np.nan]], np.float32).tobytes()

#: Damaged and foreign files → words of the refusal in both languages.
DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "cannot be read"),
    "short": (b"\x10\0\0", "cannot be read"),
    "a header without end": (struct.pack("<Q", 2**63), "cannot be read"),
    "a header beyond the file": (struct.pack("<Q", 1000) + b"{}", "cannot be read"),
    "no JSON": (_header("{"), "cannot be read"),
    "no UTF-8": (_header(b"\xff\xfe"), "cannot be read"),
    "deep": (_header("[" * 100_000), "cannot be read"),
    "of another": (_header("{}"), "is no adapter of sd35-trt"),
    "a later format": (_tensors({}, b"", format="sd35-trt-adapter-2"), "is no adapter of sd35-trt"),
    "nothing": (_tensors({}, b""), "holds no adapter"),
    "offsets outside": (
        _tensors({f"{_LAYER}.down": _matrix(1, 8, 0)}, bytes(16)), "cannot be read"
    ),
    "offsets that wrap": (
        _tensors({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64 - 8]}}, b""),
        "cannot be read",
    ),
    "a hole": (_tensors({f"{_LAYER}.down": _matrix(1, 2, 4)}, bytes(12)), "cannot be read"),
    "too much": (_tensors({f"{_LAYER}.down": _matrix(1, 2, 0)}, bytes(80)), "cannot be read"),
    "a foreign name": (_tensors({"lora.down": _matrix(1, 1, 0)}, bytes(4)), "is no matrix"),
    "T5's": (_tensors({"text_encoder_3/a.down": _matrix(1, 1, 0)}, bytes(4)), "is no matrix"),
    "a name without a layer": (
        _tensors({"transformer/.down": _matrix(1, 1, 0)}, bytes(4)), "is no matrix"
    ),
    "halves": (_tensors({f"{_LAYER}.down": _matrix(1, 1, 0, "F16")}, bytes(2)), "is no matrix"),
    "no rank": (_tensors({f"{_LAYER}.down": _matrix(0, 8, 0)}, b""), "is no matrix"),
    "a vector": (
        _tensors(
            {f"{_LAYER}.down": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)
        ),
        "is no matrix",
    ),
    "not finite": (_tensors({f"{_LAYER}.down": _matrix(1, 1, 0)}, _NAN), "holds NaN or infinite"),
    "half a pair": (_tensors({f"{_LAYER}.up": _matrix(1, 1, 0)}, bytes(4)), "do not fit each"),
    "ranks that differ": (
        _tensors({f"{_LAYER}.down": _matrix(2, 1, 0), f"{_LAYER}.up": _matrix(1, 3, 8)}, bytes(20)),
        "do not fit each other",
    ),
    "another structure": (
        _tensors(
            {f"{_LAYER}.down": _matrix(1, 7, 0), f"{_LAYER}.up": _matrix(7, 1, 28)}, bytes(56)
        ),
        "take an adapter that was converted for this model",
    ),
    "another layer": (
        _tensors(
            {"transformer/a.down": _matrix(1, 1, 0), "transformer/a.up": _matrix(1, 1, 4)}, bytes(8)
        ),
        "the bundle takes none of 'transformer/a'",
    ),
}  # fmt: skip
