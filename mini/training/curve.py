"""How training went: losses and accuracy over time, plotted from its log."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def plot(out: Path, image: Path) -> None:
    """Plot losses and accuracy over the minutes of each stage from ``out/log.jsonl``."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    panels: list[tuple[str, str, dict[str, str], bool]] = [
        ("VAE", "vae", {"error": "reconstruction error"}, True),
        (
            "Text encoders and MMDiT",
            "joint",
            {"flow": "flow loss", "reading": "reading loss", "layout": "layout loss"},
            True,
        ),
        (
            "Held-out captions",
            "joint",
            {"attributes": "attributes", "whole": "whole scenes"},
            False,
        ),
    ]
    panels = [panel for panel in panels if any(row["stage"] == panel[1] for row in rows)]
    size = (4.4 * len(panels), 3.6)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained")
    for axis, (title, stage, names, logarithmic) in zip(np.atleast_1d(axes), panels, strict=True):
        for name, label in names.items():
            points = [
                (r["seconds"] / 60, r[name]) for r in rows if r["stage"] == stage and name in r
            ]
            axis.plot(*np.array(points).reshape(-1, 2).T, label=label)
        axis.set(title=title, xlabel="minutes")
        if logarithmic:
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(image, dpi=110)
