"""Bit flips over a bundle's files: whether verification and loading notice them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import click

from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle
from sd35_trt.runtime import Pipeline


def flip_bits(bundle: Path, count: int, seed: int = 0) -> dict[str, Any]:
    """Flip one bit of one file at a time, and see what ``verify`` and a load say.

    Every file is as likely to be hit as any other.
    """
    generator = random.Random(seed)
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    missed, crashed = [], []
    with click.progressbar(range(count), label="bit flips") as bar:
        for _ in bar:
            path = generator.choice(files)
            position, bit = generator.randrange(path.stat().st_size), generator.randrange(8)
            _flip(path, position, bit)
            where = f"{path.relative_to(bundle)}:{position}.{bit}"
            try:
                Bundle.open(bundle, verify=True)
                missed.append(where)
            except Sd35Error:
                pass  # as it should
            try:
                Pipeline.load(bundle).close()
            except Sd35Error:
                pass  # small files are checked at every load
            except Exception as error:  # noqa: BLE001 (what must not happen is what is counted)
                crashed.append(f"{where}: {error!r}")
            _flip(path, position, bit)
    Bundle.open(bundle, verify=True)
    return {"flips": count, "files": len(files), "missed": missed, "crashed": crashed}


def _flip(path: Path, position: int, bit: int) -> None:
    path.chmod(0o644)
    with path.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 1 << bit]))
