"""What mini's ControlNet learns from: captioned scenes, and the edges of their pictures."""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from sd35_trt.compat.opencv import canny_edges
from sd35_trt.mini import checkpoint_path
from sd35_trt.mini.world import SIZE

from . import batches

_COLUMNS = ("things", "background", "tokenizer", "tokenizer_2", "tokenizer_3")


def scene_edges(table: batches.Table, batch: int = 256) -> np.ndarray:
    """Edges of a table's scenes, found as those of a user's picture are.

    Returns:
        A bit a pixel: uint8 [n, SIZE² / 8].
    """
    renderer = batches.SceneRenderer(torch.device("cpu"))
    packed = []
    for first in range(0, len(table["background"]), batch):
        part = slice(first, first + batch)
        things, background = (
            torch.from_numpy(table[name][part]) for name in ("things", "background")
        )
        pictures = ((renderer(things, background) + 1) * 127.5).round().byte()
        for picture in pictures.permute(0, 2, 3, 1).numpy():
            edges = canny_edges(np.ascontiguousarray(picture))[..., 0]
            packed.append(np.packbits(edges > 0))
    return np.stack(packed)


def pictures_of(edges: np.ndarray) -> np.ndarray:
    """White on black, uint8 [n, SIZE, SIZE, 3], of edges uint8 [n, SIZE² / 8]."""
    white = 255 * np.unpackbits(edges, axis=1).reshape(-1, SIZE, SIZE, 1)
    return np.repeat(white, 3, axis=3)


def write_edges(path: Path, number: int, workers: int) -> None:
    """Write the first ``number`` training examples with their edges, compressed."""
    parts = []
    for table in batches.tables(number, checkpoint_path(), workers, shard=4000):
        parts.append({name: table[name] for name in _COLUMNS} | {"edges": scene_edges(table)})
    np.savez_compressed(path, **batches.join(parts))  # type: ignore[arg-type]


def read_edges(path: Path) -> batches.Table:
    """What :func:`write_edges` wrote."""
    if not path.exists():
        raise click.ClickException(
            f"there is no {path}; "
            f"make it with: python -m mini.training.control data --out {path.parent}"
        )
    with np.load(path) as columns:
        return dict(columns)
