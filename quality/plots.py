"""The report's plots, as SVG that takes its ink from the page and refers to nothing outside."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sd35_trt.formats.report import LatentErrors, LinearError, PicturePair, Scenes

# Stands for the page's text colour until the SVG is written.
_INK = "#010203"

# Readable on white and on black.
_COLOURS = ("#4c8bd6", "#e0803a", "#3fa66b", "#b565c9", "#c9a227", "#d65a6a", "#45aaa5", "#8c8c8c")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 11,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

#: Kind of linear by what its name contains, the first that does.
_KINDS = (
    ("output projections", ("to_out", "to_add_out", "out_proj", "SelfAttention.o")),
    ("q, k, v", ("to_q", "to_k", "to_v", "q_proj", "k_proj", "v_proj", "SelfAttention.")),
    ("feed-forward in", ("net.0", "wi_", "fc1")),
    ("feed-forward out", ("net.2", ".wo", "fc2")),
    ("adaLN", ("norm",)),
)


def kind(layer: str) -> str:
    """What a linear is for, e.g. ``feed-forward in``."""
    return next((name for name, parts in _KINDS if any(p in layer for p in parts)), "embedders")


class _Plot:
    """A context manager around one figure; ``svg`` is set when it ends."""

    def __init__(self, name: str, height: float = 3.0) -> None:
        self._name = name
        self._height = height
        style: Any = {**_STYLE, "svg.hashsalt": name}
        self._style = matplotlib.rc_context(style)
        self.svg = ""

    def __enter__(self) -> Axes:
        self._style.__enter__()
        self._figure = Figure(figsize=(5.2, self._height), layout="constrained")
        self._figure.patch.set_alpha(0)
        axes: Axes = self._figure.add_subplot()
        axes.patch.set_alpha(0)
        axes.grid(alpha=0.25, linewidth=0.6, color=_INK)
        return axes

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            stream = io.StringIO()
            self._figure.savefig(stream, format="svg")
            self.svg = _inline(stream.getvalue(), self._name)
        self._style.__exit__(kind, error, trace)


def _inline(svg: str, name: str) -> str:
    """An SVG document as an element of a page: no prologue, no metadata, names of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg)
    prefix = name.replace(" ", "-")
    svg = re.sub(r'\sid="', f' id="{prefix}-', svg)
    svg = svg.replace("url(#", f"url(#{prefix}-").replace('xlink:href="#', f'href="#{prefix}-')
    svg = svg.replace(_INK, "currentColor")
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{name}"', 1)


def latent_curve(latents: LatentErrors) -> str:
    """Error of the latents after each step, and of each step alone."""
    plot = _Plot("latent error by step")
    free, forced = latents.free_running, latents.teacher_forced
    steps = np.arange(1, len(free.mean) + 1)
    with plot as axes:
        axes.fill_between(steps, free.p10, free.p90, color=_COLOURS[0], alpha=0.2, lw=0)
        axes.plot(steps, free.median, color=_COLOURS[0], label="latents, median and 80 %")
        axes.plot(steps, free.mean, color=_COLOURS[0], ls="--", label="latents, mean")
        axes.plot(
            steps, forced.mean, color=_COLOURS[1],
            label="velocity of one step from the same latents",
        )  # fmt: skip
        _log(axes, [*free.p10, *free.p90, *free.mean, *forced.mean])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="step", ylabel="relative error")
        axes.legend()
    return plot.svg


def _log(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where there is anything to show on it."""
    if min(values) > 0:
        axes.set_yscale("log")
    elif max(values) > 0:
        axes.set_yscale("symlog", linthresh=min(v for v in values if v > 0))
    else:
        axes.set_ylim(0, 1)


def layer_errors(linears: Sequence[LinearError]) -> str:
    """Own error of every linear by depth and kind."""
    plot = _Plot("layer errors by depth", height=3.8)
    kinds: dict[str, list[tuple[int, float]]] = {}
    for row in linears:
        depth = re.search(r"\.(\d+)\.", row.layer)
        if row.own_error:
            place = kinds.setdefault(f"{row.component}: {kind(row.layer)}", [])
            place.append((int(depth[1]) if depth else 0, row.own_error))
    with plot as axes:
        for i, (name, points) in enumerate(sorted(kinds.items())):
            x, y = np.array(points).T
            # Side by side, so that kinds do not cover each other.
            shift = (i - (len(kinds) - 1) / 2) * 0.6 / len(kinds)
            marker = "osD^vPX"[i // len(_COLOURS) % 7]
            colour = _COLOURS[i % len(_COLOURS)]
            axes.plot(x + shift, y, marker, ms=4, color=colour, alpha=0.85, label=name)
        if kinds:
            axes.set_yscale("log")
            axes.legend(ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel="block", ylabel="relative error, same input")
    return plot.svg


def similarity(each: Sequence[PicturePair]) -> str:
    """How many pictures have which SSIM."""
    plot = _Plot("pictures by ssim", height=2.6)
    with plot as axes:
        values = [pair.ssim for pair in each]
        lowest = min(0.9, math.floor(10 * min(values)) / 10)
        axes.hist(values, bins=30, range=(lowest, 1), color=_COLOURS[0])
        axes.set(xlabel="SSIM", ylabel="pictures")
    return plot.svg


def scene_accuracy(scenes: Scenes, names: tuple[str, str]) -> str:
    """Whole-scene accuracy of both bundles, with 95 % intervals."""
    rows = {"all": scenes.whole, **scenes.kinds}
    sides = [[row.reference for row in rows.values()], [row.candidate for row in rows.values()]]
    plot = _Plot("scene accuracy", height=2.8)
    with plot as axes:
        for i, shares in enumerate(sides):
            y = np.array([100 * share.value for share in shares])
            ends = [[100 * share.low for share in shares], [100 * share.high for share in shares]]
            spread = np.abs(np.array(ends) - y)
            x = np.arange(len(rows)) + 0.4 * i - 0.2
            axes.bar(x, y, 0.38, color=_COLOURS[i], alpha=0.8, label=names[i])
            axes.errorbar(x, y, spread, fmt="none", ecolor=_INK, elinewidth=1, capsize=2)
        axes.set_xticks(np.arange(len(rows)), list(rows))
        axes.set(ylabel="scenes right, %", ylim=(0, 100))
        axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return plot.svg


@dataclass(frozen=True)
class TrendPoint:
    """One measurement of a series.

    Attributes:
        label: below it.
        value: its height.
        low, high: the bounds of what it varied between.
        mark: ``worse``, ``better`` or nothing.
    """

    label: str
    value: float
    low: float
    high: float
    mark: str = ""


#: So many labels are legible below a trend.
_LABELS = 7

_MARKS = {"worse": ("#d65a6a", "X"), "better": ("#3fa66b", "*")}


def trend(
    name: str,
    points: Sequence[TrendPoint],
    unit: str,
    usual: tuple[float, float] | None = None,
) -> str:
    """A figure over time.

    Args:
        name: unique on the page; letters, digits, spaces, ``-``, ``.`` and ``_``.
        points: the oldest first.
        unit: of the values.
        usual: the value before the last point, and how far from it is still noise.
    """
    plot = _Plot(name, height=2.2)
    with plot as axes:
        x = np.arange(len(points))
        value, low, high = np.array([(p.value, p.low, p.high) for p in points]).T
        axes.fill_between(x, low, high, color=_COLOURS[0], alpha=0.2, lw=0)
        axes.plot(x, value, "o-", ms=3, lw=1.2, color=_COLOURS[0])
        if usual is not None:
            middle, noise = usual
            axes.axhspan(middle - noise, middle + noise, color=_COLOURS[7], alpha=0.15, lw=0)
            axes.axhline(middle, color=_COLOURS[7], lw=0.8, ls="--")
        for place, point in enumerate(points):
            if point.mark in _MARKS:
                colour, marker = _MARKS[point.mark]
                axes.plot(place, point.value, marker, ms=9, color=colour)
        # From zero, so that a change looks as large as it is.
        axes.set_ylim(0, 1.15 * float(np.max(high)) or 1)
        some = x[:: -max(1, math.ceil(len(x) / _LABELS))]
        axes.set_xticks(some, [points[i].label for i in some])
        axes.set(ylabel=unit)
    return plot.svg
