"""Plots what ``benchmarks/step_cache.py`` measured.

cd benchmarks && python step_cache_plot.py results/step_cache.json ../docs/images/step-cache.png
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

_SETTING = "28 euler"
_FASTEST = 3.0

_CURVES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "calibrated short steps": lambda row: (
        row["way"] == "short steps"
        and row["choice"] == "measured weights"
        and row["coefficients"] == "least squares, guided"
        and row["first_blocks"] == 1
    ),
    "fewer steps": lambda row: row["way"] == "fewer steps",
    "threshold, last change held (First-Block-Cache)": lambda row: (
        row["way"] == "threshold" and row["coefficients"] == "held"
    ),
    "threshold, extrapolated": lambda row: (
        row["way"] == "threshold" and row["coefficients"] == "line over sigmas"
    ),
}


@click.command()
@click.argument("results", type=click.Path(exists=True, path_type=Path))
@click.argument("image", type=click.Path(path_type=Path))
def main(results: Path, image: Path) -> None:
    """Plot scenes right and PSNR of RESULTS over block evaluations to IMAGE."""
    rows = [row for row in json.loads(results.read_text())["rows"] if row["setting"] == _SETTING]
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    scenes, likeness = figure.subplots(1, 2)
    for name, belongs in _CURVES.items():
        points = sorted(
            (row["speed"], 100 * row["scenes"]["value"], row["psnr"])
            for row in rows
            if belongs(row) and row["speed"] <= _FASTEST
        )
        speed, right, psnr = zip(*points, strict=True)
        scenes.plot(speed, right, marker="o", markersize=3, label=name)
        likeness.plot(speed, psnr, marker="o", markersize=3, label=name)
    exact = next(row for row in rows if row["way"] == "exact")
    scenes.axhline(100 * exact["scenes"]["value"], color="gray", linewidth=0.8)
    scenes.set(xlabel="times fewer block evaluations", ylabel="whole scenes, %")
    likeness.set(xlabel="times fewer block evaluations", ylabel="PSNR, dB")
    for axes in (scenes, likeness):
        axes.grid(alpha=0.3)
    scenes.legend(fontsize=8, loc="lower left")
    figure.savefig(image, dpi=110)


if __name__ == "__main__":
    main()
