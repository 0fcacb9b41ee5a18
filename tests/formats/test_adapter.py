"""Adapters in our format: written and read again, and refused where they are not as it says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sd35_trt.errors import UsageError
from sd35_trt.formats.adapter import FORMAT, Adapter, AdapterLayer, read_adapter, write_adapter

Tensors = dict[str, np.ndarray]
NAME = "transformer/transformer_blocks.0.attn.to_q"


def adapter() -> Adapter:
    noise = np.random.default_rng(0)
    layers = {
        name: AdapterLayer(
            noise.standard_normal((rank, 5)).astype(np.float32),
            noise.standard_normal((7, rank)).astype(np.float32),
        )
        for name, rank in ((NAME, 2), ("text_encoder/text_model.encoder.layers.0.mlp.fc1", 3))
    }
    return Adapter(layers, "0" * 64)


def test_it_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = adapter()
    write_adapter(tmp_path / "new" / "style.safetensors", written)
    read = read_adapter(tmp_path / "new" / "style.safetensors")
    assert read.source == written.source
    assert read.rank == 3
    assert read.parts() == {"transformer": 1, "text_encoder": 1}
    assert read.nbytes == 4 * (2 * 12 + 3 * 12)
    for name, layer in written.layers.items():
        assert np.array_equal(read.layers[name].down, layer.down)
        assert np.array_equal(read.layers[name].up, layer.up)
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["style.safetensors"]


DOWN, UP = np.ones((2, 5), np.float32), np.ones((7, 2), np.float32)
PAIR = {f"{NAME}.down": DOWN, f"{NAME}.up": UP}

REFUSED: dict[str, tuple[Tensors, str]] = {
    "no tensor": ({}, "holds no adapter"),
    "half a pair": ({f"{NAME}.down": DOWN}, "do not fit each other"),
    "another rank": (PAIR | {f"{NAME}.up": UP[:, :1]}, "do not fit each other"),
    "another name": (PAIR | {"style": UP}, "'style' is no matrix"),
    "another part": (PAIR | {"vae/conv_in.down": DOWN}, "'vae/conv_in.down' is no matrix"),
    "another type": (PAIR | {f"{NAME}.up": UP.astype(np.float16)}, "is no matrix"),
    "another form": (PAIR | {f"{NAME}.up": UP[None]}, "is no matrix"),
    "no rank": ({f"{NAME}.down": DOWN[:0], f"{NAME}.up": UP[:, :0]}, "is no matrix"),
    "NaN": (PAIR | {f"{NAME}.up": UP * np.float32("nan")}, "NaN or infinite"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    tensors, message = REFUSED[case]
    path = tmp_path / "style.safetensors"
    save_file(tensors, path, {"format": FORMAT})
    with pytest.raises(UsageError, match=message):
        read_adapter(path)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "is missing"),
    "a LoRA": (lambda path: save_file(PAIR, path), "no adapter of sd35-trt.*adapter convert"),
    "text": (lambda path: path.write_text("no"), "cannot be read"),
    "half": (
        lambda path: (save_file(PAIR, path, {"format": FORMAT}),
                      path.write_bytes(path.read_bytes()[:-8])),
        "cannot be read",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_refused(case: str, tmp_path: Path) -> None:
    make, message = FILES[case]
    path = tmp_path / "style.safetensors"
    make(path)
    with pytest.raises(UsageError) as caught:
        read_adapter(path)
    assert re.search(message, str(caught.value))
