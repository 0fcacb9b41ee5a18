"""The nightly benchmark's history as one page that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from history import Entry, Finding, Metric, Series, format_value, judge, series

from sd35_trt.quality.page import document, table
from sd35_trt.quality.plots import TrendPoint, trend

# Runs in a plot.
_SHOWN = 60

_WORDS = {
    "worse": "worse",
    "better": "better",
    "same": "within the noise",
    "new": "too few runs",
    "disturbed": "machine busy",
}


def render(entries: Sequence[Entry], run: str, baseline_runs: int) -> str:
    """The page.

    Args:
        run: the run whose failures, regressions and improvements stand at the top.
        baseline_runs: see :func:`history.judge`.
    """
    every = [(one, list(judge(one, baseline_runs))) for one in series(entries)]
    ours = [e for e in entries if e["run"] == run]
    title = "Benchmarks by night"
    parts = [f"<h1>{title}</h1>", _intro(ours), _summary(ours, every, run)]
    for number, (one, findings) in enumerate(every):
        parts.append(_section(number, one, findings, one.newest["run"] == run))
    return document(title, parts)


def _intro(ours: Sequence[Entry]) -> str:
    first = ours[0]
    commit = (first["commit"] or "no commit")[:12] + (", changed" if first["dirty"] else "")
    text = f"{first['date']}, {commit}, {first['host']['name']}, {first['host']['cpu']}"
    return f"<p class=soft>{escape(text)}</p>"


def _summary(ours: Sequence[Entry], every: Sequence[tuple[Series, list[Finding]]], run: str) -> str:
    failures = [e for e in ours if e["status"] != "ok"]
    lines = [
        f"<li class=bad>{escape(e['case'])}: failed: {escape(e['error'])}</li>" for e in failures
    ]
    figures = [(one, f) for one, found in every if one.newest["run"] == run for f in found]
    for verdict, style in (("worse", "bad"), ("better", "good")):
        lines += [
            f"<li class={style}>{escape(str(f))}</li>" for _, f in figures if f.verdict == verdict
        ]
    cases = len({e["case"] for e in ours})
    worse = sum(f.verdict == "worse" for _, f in figures)
    text = (
        f"Cases: {cases}, of which {len(failures)} failed. "
        f"Figures: {len(figures)}, of which {worse} are worse than before."
    )
    key = (
        "Blue: the median of a measurement, with the middle 80 % of its runs. Grey: the median "
        "that the newest is compared with, and what counts as noise around it."
    )
    items = f"<ul>{''.join(lines)}</ul>" if lines else ""
    return f"<p>{text}</p>{items}<p class=soft>{key}</p>"


def _section(number: int, one: Series, findings: Sequence[Finding], current: bool) -> str:
    newest = one.newest
    s, bundle = newest["settings"], newest["bundle"]
    facts = [
        f"{bundle['model']}, {bundle['policy']}, for {bundle['target']} by {bundle['builder']}",
        f"{s['size'][0]}×{s['size'][1]}, batch {s['batch']}, {s['steps']} steps, "
        f"guidance {s['guidance']:g}",
        newest["device"]["name"] if s["device"] != "cpu" else newest["host"]["cpu"],
        newest["host"]["name"],
        f"{newest['images_per_second']:.3g} images per second",
        *newest["notes"],
    ]
    if not current:
        facts.append(f"last measured {newest['date']}")
    rows = []
    for f in findings:
        spread = newest["figures"][f.metric.key]
        ends = " – ".join(format_value(f.metric, spread[end]) for end in ("p10", "p90"))
        if spread["p10"] == spread["p90"]:  # measured once
            ends = "–"
        change = "–" if f.change is None else f"{100 * f.change:+.1f} %"
        noise = "–" if not f.usual else f"{100 * (f.noise or 0) / f.usual:.1f} %"
        rows.append(
            [
                f.metric.label, format_value(f.metric, f.value), ends,
                format_value(f.metric, f.usual), change, noise, _WORDS[f.verdict],
            ]
        )  # fmt: skip
    earlier = max((f.earlier for f in findings), default=0)
    heads = ["", "newest", "middle 80 %", f"median of {earlier} before", "change", "noise", ""]
    plots = "".join(
        f"<figure><figcaption>{escape(f.metric.label)}{_mark(f)}</figcaption>"
        f"{_plot(number, one, f)}</figure>"
        for f in findings
    )
    return (
        f"<h2>{escape(newest['case'])}</h2><p class=soft>{escape('; '.join(facts))}</p>"
        + table(heads, rows)
        + f"<p></p><div class=pairs>{plots}</div>"
    )


def _mark(finding: Finding) -> str:
    style = {"worse": "bad", "better": "good"}.get(finding.verdict)
    return f": <b class={style}>{finding.verdict}</b>" if style else ""


def _plot(number: int, one: Series, finding: Finding) -> str:
    metric = finding.metric
    entries = [
        e
        for run in one.runs
        for e in run
        if metric.key in e["figures"] and (not e["disturbed"] or e is one.newest)
    ][-_SHOWN:]
    largest = max(e["figures"][metric.key]["p90"] for e in entries)
    scale, unit = _scale(metric, largest)
    points = []
    for entry in entries:
        spread: dict[str, Any] = entry["figures"][metric.key]
        mark = finding.verdict if entry["run"] == one.newest["run"] else ""
        value, low, high = (spread[key] / scale for key in ("value", "p10", "p90"))
        points.append(TrendPoint(entry["date"][5:10], value, low, high, mark))
    usual = None
    if finding.usual is not None and finding.noise is not None:
        usual = finding.usual / scale, finding.noise / scale
    name = re.sub(r"[^\w.-]+", " ", f"{number} {one.newest['case']} {metric.label}")
    return trend(name, points, unit, usual)


def _scale(metric: Metric, largest: float) -> tuple[float, str]:
    """What the values are divided by, and their unit then."""
    if metric.unit == "s":
        return (1.0, "s") if largest >= 1 else (1e-3, "ms")
    if metric.unit == "B":
        return (1e9, "GB") if largest >= 1e9 else (1e6, "MB")
    return 1.0, metric.unit or "ratio"
