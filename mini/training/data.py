"""What training starts from: tables of examples, and the untrained pipeline."""

from __future__ import annotations

import os
import time
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file

from . import batches
from .model import build_pipeline, save_pipeline, start_at_zero


def make_data(out: Path, number: int, workers: int) -> None:
    """Write the tables of the first ``number`` training examples to ``out/data``."""
    folder = out / "data"
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = start_pipeline(out, 0)
    for index, table in enumerate(batches.tables(number, checkpoint, workers)):
        partial = folder / f"{index:04}.partial"
        save_file({name: torch.from_numpy(column) for name, column in table.items()}, partial)
        partial.rename(folder / f"{index:04}.safetensors")
    (folder / "done").write_text(f"{number}\n")


def load_data(out: Path, least: int = 0, patience: float = 300) -> batches.Table:
    """The tables in ``out/data``: all once they are done, or as soon as there are enough rows.

    ``train data`` may still be writing them; after ``patience`` seconds without a new one, or
    where it never ran, this fails.
    """
    folder = out / "data"
    count, since = -1, time.monotonic()
    while True:
        done = (folder / "done").exists()
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != count:
            count, since = len(paths), time.monotonic()
            parts = [load_file(path) for path in paths]
            rows = sum(len(part["background"]) for part in parts)
        if paths and (done or (least and rows >= least)):
            return batches.join([{k: v.numpy() for k, v in part.items()} for part in parts])
        if not folder.exists() or time.monotonic() - since > patience:
            raise click.ClickException(
                f"no training data in {folder}; "
                f"make it with: python -m mini.training.train data --out {out}"
            )
        time.sleep(1)


def start_pipeline(out: Path, seed: int) -> Path:
    """The untrained pipeline of this run, saved once."""
    start = out / "start"
    if not start.exists():
        partial = out / f"start.{os.getpid()}"
        pipe = build_pipeline(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            start_at_zero(pipe.transformer)
        save_pipeline(pipe, partial)
        partial.rename(start)
    return start
