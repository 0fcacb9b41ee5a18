"""Benchmarks of a matrix of builds, kept in a history, with regressions flagged.

    python benchmarks/nightly.py benchmarks/nightly.toml --gpu cpu
        --history out/nightly.jsonl --page out/nightly.html

Every case of the matrix is built (what is unchanged comes from the cache) and measured with
``sd35-trt bench``, each in a process of its own; a case with ``serve`` is served too, and loaded by
``benchmarks/serve.py``. Each measurement becomes a line of the history at
once. A figure that is worse than in the earlier runs on this host and device, beyond their noise,
is measured again, and flagged where it is worse again; so is a case that other processes disturbed,
and where they go on it is not judged. A case that fails is recorded and the others go on. The exit
status is 1 where a figure is flagged or a case failed.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import click
import history
from history import Entry, Finding

from sd35_trt.bench.meters import describe_host
from sd35_trt.cli import main as sd35_trt
from sd35_trt.errors import Sd35Error, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

# Options that this script sets.
_OWN = {"--out", "--json", "--help", "--debug", "--only"}

_LOADER = Path(__file__).with_name("serve.py")

# Measurements of a case, at most.
_ATTEMPTS = 3

_REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class MatrixRow:
    """A row of the matrix.

    Attributes:
        build, bench: options of ``sd35-trt build`` and ``sd35-trt bench``, without ``--``.
        serve: those of ``benchmarks/serve.py``; None does not serve it.
        minutes: after which a build or a measurement is ended.
    """

    name: str
    build: dict[str, Any]
    bench: dict[str, Any]
    serve: dict[str, Any] | None
    minutes: float

    @property
    def gpu(self) -> str:
        """What it is built for."""
        return str(self.build.get("gpu", "cpu"))


def read_matrix(path: Path) -> list[MatrixRow]:
    """The cases of a matrix file; ``[build]`` and ``[bench]`` at its top are their defaults.

    Raises:
        UsageError: unreadable, or names an option that there is not.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read the matrix {path}: {error}", "see nightly.toml") from error
    rows = data.pop("case", [])
    common = {name: data.pop(name, {}) for name in ("build", "bench")}
    minutes = data.pop("minutes", 60)
    if data or not rows:
        wrong = f"has an unknown key {next(iter(data))!r}" if data else "has no [[case]]"
        raise UsageError(f"{path} {wrong}", "see nightly.toml")
    cases: list[MatrixRow] = []
    for row in rows:
        name = str(row.get("name", ""))
        if not re.fullmatch(r"[\w.-]+", name) or name in [case.name for case in cases]:
            raise UsageError(
                f"{path}: a case is named {name!r}",
                "give each a name of its own of letters, digits, '-', '.' and '_'",
            )
        if unknown := row.keys() - {"name", "build", "bench", "serve", "minutes"}:
            raise UsageError(f"{path}: {name} has an unknown key {min(unknown)!r}")
        options = {part: {**common[part], **row.get(part, {})} for part in common}
        serve = row.get("serve")
        for part, values in {**options, "serve": serve or {}}.items():
            _check_options(f"{path}: {name}", part, values)
        own = float(row.get("minutes", minutes))
        cases.append(MatrixRow(name, **options, serve=serve, minutes=own))
    return cases


def _check_options(where: str, command: str, options: Mapping[str, Any]) -> None:
    program, row = f"sd35-trt {command}", sd35_trt.get_command(click.Context(sd35_trt), command)
    if command == "serve":
        import serve

        program, row = _LOADER.name, serve.main
    assert row is not None
    flags = {word for p in row.params for word in (*p.opts, *p.secondary_opts)}
    for word in _words(options):
        if word.startswith("--") and (word not in flags or word in _OWN):
            raise UsageError(
                f"{where}: {command} takes no {word} here",
                f"see: {program} --help",
            )


def _words(options: Mapping[str, Any]) -> list[str]:
    """As on a command line: ``{"size": "64:128", "guidance": False}``."""
    words = []
    for key, value in options.items():
        option = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{option}" if value else f"--no-{option}")
        else:
            words += [f"--{option}", os.path.expandvars(str(value))]
    return words


def measure(case: MatrixRow, work: Path) -> dict[str, Any]:
    """Build a case and measure it.

    Returns:
        What its line of the history holds of it.
    """
    bundle, result = work / case.name, work / f"{case.name}.json"
    start = time.perf_counter()
    host = {"host": describe_host()}
    try:
        for words in map(_words, (case.build, case.bench, case.serve or {})):
            if unset := [word for word in words if re.search(r"\$\{?[A-Za-z_]", word)]:
                raise Sd35Error(f"{unset[0]} names a variable that is not set")
        _run(case, ["build", *_words(case.build), "--out", str(bundle), "--json"])
        seconds = time.perf_counter() - start
        _run(
            case,
            [
                "bench",
                str(bundle),
                "--trust-kernels",
                *_words(case.bench),
                "--out",
                str(result),
                "--json",
            ],
        )
        data = json.loads(result.read_text("utf-8"))
        served = None if case.serve is None else _served(case, case.serve, bundle, work)
    except Sd35Error as error:
        return {"status": "failed", "error": str(error), **host}
    fields = ("model", "policy", "target", "builder", "manifest_sha256", "weight_bytes")
    return {
        "status": "ok",
        **{
            key: data[key]
            for key in ("host", "device", "versions", "settings", "notes", "disturbed")
        },
        "bundle": {key: data["bundle"][key] for key in fields},
        "images_per_second": data["bundle"]["images_per_second"],
        "psnr_db": data["comparison"] and data["comparison"]["psnr_db"],
        "figures": history.figures(data, served),
        "build_seconds": round(seconds, 1),
    }


def _served(
    case: MatrixRow, options: Mapping[str, Any], bundle: Path, work: Path
) -> dict[str, Any]:
    """What ``benchmarks/serve.py`` finds of a bundle."""
    out = work / f"{case.name}-serve.json"
    words = [str(bundle), *_words(options), "--only", "overhead,joined", "--out", str(out)]
    # That the server takes too long is a figure, too.
    _run(case, words, [str(_LOADER)], fine=(0, 1))
    found: dict[str, Any] = json.loads(out.read_text("utf-8"))
    out.unlink()
    return found


def _run(
    case: MatrixRow,
    words: Sequence[str],
    program: Sequence[str] = ("-m", "sd35_trt"),
    fine: Sequence[int] = (0,),
) -> None:
    """Run a command of this project.

    Raises:
        Sd35Error: the line with which it failed.
    """
    what = words[0] if program[0] == "-m" else "serve"
    command = [sys.executable, *program, *words]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=60 * case.minutes)
    except subprocess.TimeoutExpired:
        raise Sd35Error(f"{what} took more than {case.minutes:g} minutes") from None
    if process.returncode not in fine:
        lines = process.stderr.strip().splitlines() or [f"ended with status {process.returncode}"]
        reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
        raise Sd35Error(f"{what}: {reason.removeprefix('error: ')}")


def _commit() -> dict[str, Any]:
    def git(*words: str) -> str:
        command = ["git", "-C", str(_REPOSITORY), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        return {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": False}


def findings(entries: Sequence[Entry], run: str, baseline_runs: int) -> list[Finding]:
    """What is known of the figures measured in a run."""
    return [
        finding
        for one in history.series(entries)
        if one.newest["run"] == run
        for finding in history.judge(one, baseline_runs)
    ]


def night(
    cases: Sequence[MatrixRow], path: Path, work: Path, baseline_runs: int
) -> tuple[list[Entry], str]:
    """Measure cases and add them to the history.

    Returns:
        The history, and the run's name in it.
    """
    start = datetime.datetime.now(datetime.timezone.utc)
    run = f"{start.isoformat(timespec='seconds')}-{os.getpid()}"
    commit = _commit()
    entries = history.read(path)
    for case in cases:
        for attempt in range(_ATTEMPTS):
            entry: Entry = {
                "format": history.FORMAT,
                "run": run,
                "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                **commit,
                "case": case.name,
                "build": case.build,
                "bench": case.bench,
                **measure(case, work),
            }
            history.append(path, entry)
            entries.append(entry)
            click.echo(f"{case.name}: {_summary(entry)}")
            why = _doubt(entries, entry, baseline_runs)
            if not why or attempt == _ATTEMPTS - 1:
                break
            click.echo(f"{case.name}: {why}, measuring again")
    return entries, run


def _doubt(entries: Sequence[Entry], entry: Entry, baseline_runs: int) -> str:
    """Why a case should be measured again, if at all."""
    if entry["status"] != "ok":
        return ""
    if entry["disturbed"]:
        return "the machine was busy"
    same = [e for e in entries if e["run"] == entry["run"] and e["case"] == entry["case"]]
    for finding in findings(entries, entry["run"], baseline_runs):
        if finding.case == entry["case"] and finding.verdict == "worse":
            twice = sum(not e["disturbed"] for e in same) > 1
            return "" if twice else f"{finding.metric.label} seems worse"
    return ""


def _summary(entry: Entry) -> str:
    if entry["status"] != "ok":
        return f"failed: {entry['error']}"
    total = entry["figures"]["total"]
    ends = " – ".join(history.format_value(history.METRICS[0], total[k]) for k in ("p10", "p90"))
    middle = history.format_value(history.METRICS[0], total["value"])
    busy = f" ({'; '.join(entry['notes'])})" if entry["notes"] else ""
    return f"{middle} end to end, {ends}{busy}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("matrix", type=click.Path(path_type=Path))
@click.option(
    "--history",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="JSON lines that the measurements are added to.",
)
@click.option(
    "--page",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="The HTML page to write.",
)
@click.option(
    "--gpu", multiple=True, metavar="TARGET", help="Only the cases that are built for this."
)
@click.option("--only", multiple=True, metavar="PATTERN", help="Only the cases named like this.")
@click.option(
    "--work",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("out/nightly"),
    show_default=True,
    metavar="DIR",
    help="Where the bundles are built.",
)
@click.option(
    "--baseline",
    type=click.IntRange(history.LEAST_RUNS),
    default=history.BASELINE_RUNS,
    show_default=True,
    metavar="RUNS",
    help="Compare with the median of so many earlier runs.",
)
def main(
    matrix: Path,
    path: Path,
    page: Path,
    gpu: tuple[str, ...],
    only: tuple[str, ...],
    work: Path,
    baseline: int,
) -> None:
    """Measure the cases of MATRIX, add them to the history, and render the page."""
    warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
    try:
        cases = [
            case
            for case in read_matrix(matrix)
            if (not gpu or case.gpu in gpu)
            and (not only or any(fnmatch(case.name, p) for p in only))
        ]
        if not cases:
            raise UsageError("no case of the matrix is chosen", "change --gpu or --only")
        # Before hours of measuring: a plotting library that is missing.
        from trends import render

        for folder in (work, path.parent, page.parent):
            folder.mkdir(parents=True, exist_ok=True)
        entries, run = night(cases, path, work, baseline)
        page.write_text(render(entries, run, baseline), "utf-8")
    except Sd35Error as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_status)
    results = findings(entries, run, baseline)
    failures = [e for e in entries if e["run"] == run and e["status"] != "ok"]
    for entry in failures:
        click.echo(f"failed: {entry['case']}: {entry['error']}", err=True)
    for case in dict.fromkeys(f.case for f in results if f.verdict == "disturbed"):
        click.echo(f"not judged: {case}: other processes kept the machine busy", err=True)
    for verdict, word in (("worse", "regression"), ("better", "improvement")):
        for finding in results:
            if finding.verdict == verdict:
                click.echo(f"{word}: {finding}", err=True)
    click.echo(f"{page}")
    sys.exit(1 if failures or any(f.verdict == "worse" for f in results) else 0)


if __name__ == "__main__":
    main()
