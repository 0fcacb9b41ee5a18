"""Trains mini from nothing: the VAE, then the text encoders and the MMDiT jointly.

    python -m mini.training.train all --out out/mini

Each stage runs for a budget of minutes, to whose end the learning rate decays, and can be cut:
with ``--stop-after`` it saves its state and the same command takes it up again. Everything random
follows from ``--seed``, though the number of steps depends on the machine's speed.
"""

from __future__ import annotations

import math
import os
import shutil
from pathlib import Path

import click
import torch

from .curve import plot
from .data import make_data
from .joint import train_joint
from .run import TrainingRun
from .vae import train_vae


@click.command()
@click.argument("stage", type=click.Choice(["data", "vae", "joint", "plot", "all"]))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--examples", default=1_000_000, show_default=True, help="Captions to train on.")
@click.option("--workers", default=os.cpu_count(), help="Processes that write captions.")
@click.option("--vae-minutes", default=1.8, show_default=True)
@click.option("--joint-minutes", default=11.6, show_default=True)
@click.option("--stop-after", default=math.inf, help="Seconds after which to save and stop.")
@click.option("--vae-batch", default=256, show_default=True)
@click.option("--batch", default=1024, show_default=True)
@click.option(
    "--lr", default=3e-3, show_default=True, help="Peak learning rate of the joint stage."
)
@click.option("--look-every", default=150.0, show_default=True, help="Seconds between evaluations.")
@click.option("--look-at", default=128, show_default=True, help="Captions of one evaluation.")
@click.option("--compile/--no-compile", "compiled", default=True, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--start",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Train this diffusers directory on; its VAE stays as it is.",
)
def main(
    stage: str,
    out: Path,
    device: str,
    examples: int,
    workers: int,
    vae_minutes: float,
    joint_minutes: float,
    stop_after: float,
    vae_batch: int,
    batch: int,
    lr: float,
    look_every: float,
    look_at: int,
    compiled: bool,
    seed: int,
    start: Path | None,
) -> None:
    """Train mini. `all` runs data, vae, joint and plot one after the other.

    The result is OUT/checkpoint, a diffusers directory; OUT/log.jsonl and OUT/curve.png tell
    how it went.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.set_float32_matmul_precision("high")

    def run(name: str, minutes: float) -> TrainingRun:
        return TrainingRun(name, out, torch.device(device), 60 * minutes, stop_after, seed)

    if start and not (out / "start").exists():
        shutil.copytree(start, out / "start")
        shutil.copytree(start / "vae", out / "vae")
    if stage in ("data", "all"):
        make_data(out, examples, workers)
    if stage == "vae" or (stage == "all" and not start):
        train_vae(run("vae", vae_minutes), vae_batch, min(examples, 100_000), compiled)
    if stage in ("joint", "all"):
        train_joint(run("joint", joint_minutes), batch, lr, compiled, look_every, look_at)
    if stage in ("plot", "all"):
        plot(out, out / "curve.png")


if __name__ == "__main__":
    main()
