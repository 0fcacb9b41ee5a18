"""The nightly benchmark's history, JSON lines, and what in it is a regression.

A line is one measurement of one case of the matrix. Lines are compared where the case, its build
options, what it draws, the host and the device are the same.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy.stats import norm, t

from sd35_trt.units import format_bytes, format_seconds

#: Version of a line.
FORMAT = 1

#: Without so many earlier runs nothing is judged.
LEAST_RUNS = 3

#: The newest so many earlier runs are what a figure is compared with.
BASELINE_RUNS = 10

# A change within so many deviations of the earlier runs is noise, and so is one within this share.
_DEVIATIONS = 3.0
_SHARE = 0.03

# Median absolute deviation → standard deviation, where the noise is normal.
_MAD = 1.4826

Entry = dict[str, Any]


@dataclass(frozen=True)
class Metric:
    """A figure whose trend is watched; the smaller, the better.

    Attributes:
        key: in a line's ``figures``.
        label: for people.
        unit: ``s``, ``B``, ``J`` or nothing.
    """

    key: str
    label: str
    unit: str


METRICS = (
    Metric("total", "end to end", "s"),
    Metric("step", "one step", "s"),
    Metric("text", "text", "s"),
    Metric("conditioning", "conditioning", "s"),
    Metric("denoise", "denoising", "s"),
    Metric("decode", "decoding", "s"),
    Metric("load", "loading", "s"),
    Metric("host_memory", "memory, peak", "B"),
    Metric("device_memory", "GPU memory, added", "B"),
    Metric("energy", "energy per image", "J"),
    Metric("ratio", "end to end, ours / peer", ""),
    Metric("server", "server, beside drawing", "s"),
    Metric("alone", "a picture, one client", "s"),
    Metric("joined", "a picture, eight clients", "s"),
)


def figures(
    result: Mapping[str, Any], served: Mapping[str, Any] | None = None
) -> dict[str, dict[str, float]]:
    """The metrics that results have: ``value``, ``p10`` and ``p90``.

    Args:
        result: of ``sd35-trt bench``.
        served: of ``benchmarks/serve.py``.
    """
    bundle = result["bundle"]
    spreads = {**bundle["stages"], "step": bundle["step"]}
    values = {
        name: {"value": s["median"], "p10": s["p10"], "p90": s["p90"]}
        for name, s in spreads.items()
        if s is not None
    }
    device = bundle["memory"]["device"]
    single = {
        "load": bundle["load_seconds"],
        "host_memory": bundle["memory"]["host"]["peak_bytes"],
        "device_memory": device and device["own_bytes"],
        "energy": bundle["joules_per_image"],
        **({} if served is None else _served(served)),
    }
    values |= {k: {"value": v, "p10": v, "p90": v} for k, v in single.items() if v is not None}
    if result["comparison"]:
        ratio = result["comparison"]["ratios"]["total"]
        values["ratio"] = {"value": ratio["ratio"], "p10": ratio["p10"], "p90": ratio["p90"]}
    return {metric.key: values[metric.key] for metric in METRICS if metric.key in values}


def _served(found: Mapping[str, Any]) -> dict[str, float]:
    rates = found["pictures_per_second"]
    return {
        "server": found["overhead"]["beside_drawing_ms"] / 1e3,
        "alone": 1 / rates["1"],
        "joined": 1 / rates["8"],
    }


def append(path: Path, entry: Entry) -> None:
    """Add a line that is on the disk, whole, when this returns.

    It begins on a line of its own, whatever a crash left at the end of the file.

    Raises:
        OSError: it cannot be written.
    """
    line = json.dumps(entry, sort_keys=True) + "\n"
    with path.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            if stream.read(1) != b"\n":
                line = "\n" + line
        stream.write(line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def read(path: Path) -> list[Entry]:
    """All lines, the oldest first; one that is torn, or of another version, is warned of."""
    if not path.exists():
        return []
    entries = []
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            warnings.warn(f"{path}:{number} is torn and left out", stacklevel=2)
            continue
        if not isinstance(entry, dict) or entry.get("format") != FORMAT:
            warnings.warn(f"{path}:{number} is not of format {FORMAT}, left out", stacklevel=2)
            continue
        entries.append(entry)
    return entries


def series_key(entry: Entry) -> str:
    """The same for measurements that may be compared, of those that did not fail."""
    host, settings = entry["host"], dict(entry["settings"])
    for name in ("runs", "warmup"):  # how well it is measured, not what
        del settings[name]
    return json.dumps(
        [
            entry["case"], entry["build"], entry["bench"].get("against"), settings,
            host["name"], host["cpu"], host["cores"], entry["device"]["name"],
        ],
        sort_keys=True,
    )  # fmt: skip


@dataclass(frozen=True)
class Series:
    """Comparable measurements, by run of the matrix, the oldest first.

    A run has more than one where the machine was busy, or the first seemed to be a regression.
    """

    runs: tuple[tuple[Entry, ...], ...]

    @property
    def newest(self) -> Entry:
        return self.runs[-1][-1]

    def values(self, metric: Metric, run: Sequence[Entry]) -> list[float]:
        """The metric's values in a run, where other processes did not disturb it."""
        return [
            e["figures"][metric.key]["value"]
            for e in run
            if metric.key in e["figures"] and not e["disturbed"]
        ]


def series(entries: Sequence[Entry]) -> list[Series]:
    """Every series in a history; the one that was measured last comes first."""
    groups: dict[str, dict[str, list[Entry]]] = {}
    for entry in entries:
        if entry["status"] == "ok":
            key = series_key(entry)
            runs = groups.pop(key, {})
            runs.setdefault(entry["run"], []).append(entry)
            groups[key] = runs
    return [Series(tuple(map(tuple, runs.values()))) for runs in reversed(groups.values())]


@dataclass(frozen=True)
class Finding:
    """The newest value of a figure against those of earlier runs.

    Attributes:
        value: of the newest run.
        usual: median of the earlier runs; None with fewer than :data:`LEAST_RUNS`.
        noise: how far from it is still noise.
        earlier: how many runs that is.
        verdict: ``worse``, ``better``, ``same``, ``new`` without a median, or ``disturbed`` where
            other processes were busy.
    """

    case: str
    metric: Metric
    value: float
    usual: float | None
    noise: float | None
    earlier: int
    verdict: str

    @property
    def change(self) -> float | None:
        """Relative to the median of the earlier runs."""
        return None if not self.usual else self.value / self.usual - 1

    def __str__(self) -> str:
        value, usual = (format_value(self.metric, v) for v in (self.value, self.usual))
        text = f"{self.case}: {self.metric.label} is {self.verdict}: {value}"
        if self.change is None or not self.usual or self.noise is None:
            return text
        return (
            f"{text}, {100 * self.change:+.1f} % against {usual}, the median of {self.earlier} "
            f"runs; {100 * self.noise / self.usual:.1f} % are noise"
        )


def format_value(metric: Metric, value: float | None) -> str:
    """With its unit."""
    if value is None:
        return "–"
    if metric.unit == "s":
        return format_seconds(value)
    return format_bytes(value) if metric.unit == "B" else f"{value:.3g} {metric.unit}".strip()


def _deviations(runs: int) -> float:
    """What three deviations of a known normal distribution are for a new value of one that so many
    earlier values are known of: the bound of Student's prediction interval."""
    return float(t.ppf(norm.cdf(_DEVIATIONS), runs - 1)) * math.sqrt(1 + 1 / runs)


def judge(one: Series, baseline_runs: int = BASELINE_RUNS) -> Iterator[Finding]:
    """Compare the newest run of a series with those before it, metric by metric.

    A figure is worse, or better, where all measurements of the newest run differ from the median
    of the earlier runs by more than 3 %, and by more than three standard deviations of those. These
    are estimated from the median absolute deviation, and widened for how few the runs are.
    """
    for metric in METRICS:
        if metric.key not in one.newest["figures"]:
            continue
        before = [values for run in one.runs[:-1] if (values := one.values(metric, run))]
        newest = one.values(metric, one.runs[-1])
        earlier = [statistics.median(values) for values in before[-baseline_runs:]]
        case = one.newest["case"]
        if not newest:
            value = one.newest["figures"][metric.key]["value"]
            yield Finding(case, metric, value, None, None, len(earlier), "disturbed")
            continue
        value = statistics.median(newest)
        if len(earlier) < LEAST_RUNS:
            yield Finding(case, metric, value, None, None, len(earlier), "new")
            continue
        usual = statistics.median(earlier)
        deviation = _MAD * statistics.median(abs(v - usual) for v in earlier)
        noise = max(_deviations(len(earlier)) * deviation, _SHARE * abs(usual))
        verdict = "same"
        if min(newest) > usual + noise:
            verdict = "worse"
        elif max(newest) < usual - noise:
            verdict = "better"
        yield Finding(case, metric, value, usual, noise, len(earlier), verdict)
