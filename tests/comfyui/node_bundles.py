"""What the nodes draw with in tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt.formats.adapter import Adapter, AdapterLayer, adapter_slots, write_adapter
from sd35_trt.formats.bundle import Bundle

#: Of a bundle with every feature; as in tests/runtime/test_skip_layers.py, so that it is made once.
FEATURES: dict[str, Any] = {"skip_layer_guidance": True, "inpainting": True, "adapters": 16}

_LAYER = "transformer/transformer_blocks.0.attn.to_q"


def adapter(bundle: Path, path: Path, seed: int) -> Path:
    """A random adapter of rank 4 for one linear, written to a file."""
    values = np.random.default_rng(seed)
    inner, outer = adapter_slots(Bundle.open(bundle).manifest)[_LAYER].shape
    layer = AdapterLayer(
        values.normal(0, 0.2, (4, inner)).astype(np.float32),
        values.normal(0, 0.2, (outer, 4)).astype(np.float32),
    )
    write_adapter(path, Adapter({_LAYER: layer}, f"{seed:064x}"))
    return path


def picture(width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3], of all shades."""
    rows, columns = np.mgrid[:height, :width]
    values = np.stack([rows * 2 % 256, columns * 2 % 256, (rows + columns) % 256], axis=-1)
    return values.astype(np.uint8)
