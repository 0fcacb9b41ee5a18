"""libsd35 beside Python's runtime on a GPU, with one bundle: pictures, time, memory.

    sd35-trt build --gpu auto --builder tensorrt --out bundles/mini
    TENSORRT_ROOT=DIR make cpp
    python benchmarks/libsd35.py bundles/mini --out libsd35.json

Each side draws in a process of its own: two ONNX Runtimes in one would share their CUDA provider.
Every check is a line with its figure and its bound; the exit status is 1 where a bound is missed.
What a bundle does not accept, such as another size, is left out. ``libsd35_gpu.py`` does it for
several bundles, which it builds.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np
from conformance_bench import Check, holds
from libsd35_sides import Request, Side, Work, by_libsd35, by_python

from sd35_trt.bench.meters import describe_host
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.quality.metrics import psnr, squared_error

_STAR: Request = {"prompt": "a red star", "seed": 3}

_SHARES = (0.5, 0.0)

# Device memory that comes and goes with a process's libraries.
_NOISE = 8 << 20

# Of Python's; both draw on the same GPU, whose clock changes.
_SLOWER = 1.05


def requests_of(manifest: Manifest) -> dict[str, Request]:
    """What is drawn from a bundle, of what it accepts."""
    width, height = manifest.defaults.size
    y, x, channel = np.indices((height, width, 3))
    picture = ((x * (channel + 1) + 2 * y) % 256).astype(np.uint8)
    ranges = manifest.ranges
    wide = min(ranges.size[1], 3 * ranges.size[0]), ranges.size[0]
    least = ranges.t5_tokens[0]
    requests: dict[str, Request] = {
        "all default steps": _STAR,
        "negative prompt, shift": {**_STAR, "negative": "blue", "shift": 2.0, "steps": 8},
        "DPM-Solver++": {**_STAR, "sampler": "dpmpp-2m", "steps": 7},
        "a long text": {**_STAR, "prompt": "a red star " * 40, "t5_tokens": least, "steps": 8},
        "image to image": {**_STAR, "strength": 0.6, "steps": 8, "image": picture},
    }
    if manifest.guided:
        requests["without guidance"] = {**_STAR, "guidance": 1.0, "steps": 8}
    if ranges.batch[1] > 1:
        requests["batch 2"] = {**_STAR, "batch": 2, "steps": 8}
    if wide != manifest.defaults.size:
        requests[f"{wide[0]}×{wide[1]}"] = {**_STAR, "size": wide, "steps": 8}
    return requests


def _apart(work: Work, side: Callable[[Work], Side]) -> Side:
    """One side's work in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(side, work).result()


def _pictures(what: str, one: tuple[np.ndarray, ...], other: tuple[np.ndarray, ...]) -> Check:
    equal = all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    if equal:
        return holds(f"{what}: equal to Python's", True)
    decibels = psnr(float(np.mean(squared_error(one[1], other[1]))))
    return holds(f"{what}: equal to Python's", False, f"{decibels:.1f} dB")


def _times(ours: Side, its: Side) -> Iterator[Check]:
    rows = {
        "a picture": ("ms", 1e3, ours.picture_seconds, its.picture_seconds),
        "a step": ("ms", 1e3, ours.step_seconds, its.step_seconds),
        "the host between two steps": ("µs", 1e6, ours.between_steps, its.between_steps),
    }
    for what, (unit, scale, mine, python) in rows.items():
        figure, peer = statistics.median(mine), statistics.median(python)
        yield Check(
            what, figure * scale, f" {unit}", most=peer * scale * _SLOWER,
            note=f"Python's {peer * scale:.4g} {unit}",
        )  # fmt: skip


def compare(ours: Side, its: Side, work: Work) -> Iterator[Check]:
    """Checks of libsd35's side against Python's."""
    for what, one, other in zip(work.requests, ours.pictures, its.pictures, strict=True):
        yield _pictures(what, one, other)
    yield from _times(ours, its)
    yield Check("loading", ours.load_seconds, " s", note=f"Python's {its.load_seconds:.3g} s")
    if work.records:
        yield Check("replays", ours.replays, least=its.replays, most=its.replays)
    if ours.direct is not None and its.direct is not None:
        *picture, seconds = ours.direct
        yield _pictures("nothing recorded", tuple(picture), its.direct[:2])
        yield _pictures("nothing recorded, and recorded", tuple(picture), ours.pictures[0])
        note = f"Python's {1e3 * its.direct[2]:.4g} ms"
        yield Check("a step, nothing recorded", 1e3 * seconds, " ms", note=note)
    yield from _budgets(ours, its, work)


def _budgets(ours: Side, its: Side, work: Work) -> Iterator[Check]:
    moved = 0
    for budget, (kinds, peak, *drawn) in ours.budgets.items():
        what = f"within {budget / 1e6:.0f} MB"
        if budget not in its.budgets:
            yield holds(f"{what}: as Python plans", False, f"its: {list(its.budgets)}")
            continue
        expected, _, *python = its.budgets[budget]
        moving = [name for name, kind in kinds.items() if kind != "resident"]
        moved = max(moved, len(moving))
        note = f"come and go: {', '.join(moving) or 'none'}"
        yield holds(f"{what}: as Python plans", kinds == expected, note)
        if work.device != "cpu":  # whose peak is the process's
            yield Check(f"{what}: peak, of the budget", peak / budget, most=1.0)
        yield _pictures(what, tuple(drawn), tuple(python))
    if ours.budgets:
        yield Check("engines that come and go within a budget", moved, least=1)


def flatness(held: Sequence[int]) -> Iterator[Check]:
    """Checks of the bytes that a process held after each load and close."""
    after = held[len(held) // 10 :]
    first, last = (value / 1e6 for value in (held[0], held[-1]))
    what = f"{len(held)} loads and closes: memory"
    note = f"after the first {first:.1f} MB, the last {last:.1f} MB"
    yield Check(
        f"{what} grew by", (max(after) - after[0]) / 1e6, " MB", most=_NOISE / 1e6, note=note
    )
    if len(after) > 1:
        slope = float(np.polyfit(np.arange(len(after)), np.array(after, np.float64), 1)[0])
        yield Check(f"{what}, slope", slope / 1e3, " kB a load", most=_NOISE / len(after) / 1e3)


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--device", default="cuda", show_default=True, help="As for generate.")
@click.option(
    "--build",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path("build/cpp/release"),
    show_default=True,
    help="Where libsd35 and its tests were built.",
)
@click.option("--runs", default=20, show_default=True, help="Pictures that are timed.")
@click.option("--loads", default=200, show_default=True, help="Loads and closes of libsd35.")
@click.option("--compare/--no-compare", "compares", default=True, show_default=True)
@click.option("--budgets/--no-budgets", default=True, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON.")
def main(
    bundle: Path, device: str, build: Path, runs: int, loads: int, compares: bool, budgets: bool,
    out: Path,
) -> None:  # fmt: skip
    """Draw with both, print the checks, and write them."""
    shares = _SHARES if budgets else ()
    requests = requests_of(Bundle.open(bundle).manifest)
    work = Work(bundle, device, build, requests, runs, shares)
    checks: list[Check] = []
    if compares:
        its, ours = _apart(work, by_python), _apart(work, by_libsd35)
        checks += compare(ours, its, work)
    if loads:
        # Python's loads and closes are conformance.py's to count.
        checks += flatness(_apart(replace(work, loads=loads), by_libsd35).held_bytes)
    for check in checks:
        print(f"  {check}", flush=True)
    rows = [{**asdict(check), "passed": check.passed} for check in checks]
    facts = {"bundle": bundle.name, "device": device, "machine": describe_host(), "checks": rows}
    out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    sys.exit(not all(check.passed for check in checks))


if __name__ == "__main__":
    main()
