"""libsd35 beside Python's runtime on a GPU, with one bundle of mini: pictures, time, memory.

    sd35-trt build --gpu auto --builder tensorrt --out bundles/mini
    TENSORRT_ROOT=DIR make cpp
    python benchmarks/libsd35.py bundles/mini --out libsd35.json

Each side draws in a process of its own: two ONNX Runtimes in one would share their CUDA provider.
Every check is a line with its figure and its bound; the exit status is 1 where a bound is missed.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import click
import numpy as np
from conformance_bench import Check, holds
from libsd35_sides import Request, Side, Work, by_libsd35, by_python

from sd35_trt.bench.meters import describe_host
from sd35_trt.quality.metrics import psnr, squared_error

_STAR: Request = {"prompt": "a red star", "seed": 3}
_REQUESTS: dict[str, Request] = {
    "all default steps": _STAR,
    "without guidance": {**_STAR, "guidance": 1.0, "steps": 8},
    "negative prompt, shift": {**_STAR, "negative": "blue", "shift": 2.0, "steps": 8},
    "batch 2": {**_STAR, "batch": 2, "steps": 8},
    "192×64": {**_STAR, "size": (192, 64), "steps": 8},
    "DPM-Solver++": {**_STAR, "sampler": "dpmpp-2m", "steps": 7},
    "a long text": {**_STAR, "prompt": "a red star " * 40, "t5_tokens": 77, "steps": 8},
    "image to image": {**_STAR, "strength": 0.6, "steps": 8},
}

_SHARES = (0.5, 0.0)

# Device memory that comes and goes with a process's libraries.
_NOISE = 8 << 20

# Of Python's; both draw on the same GPU, whose clock changes.
_SLOWER = 1.05


def _requests() -> list[Request]:
    y, x, channel = np.indices((128, 128, 3))
    picture = ((x * (channel + 1) + 2 * y) % 256).astype(np.uint8)
    last = {**_REQUESTS["image to image"], "image": picture}
    return [*list(_REQUESTS.values())[:-1], last]


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
    for what, one, other in zip(_REQUESTS, ours.pictures, its.pictures, strict=True):
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
    for budget, (kinds, peak, *drawn) in ours.budgets.items():
        what = f"within {budget / 1e6:.0f} MB"
        if budget not in its.budgets:
            yield holds(f"{what}: as Python plans", False, f"its: {list(its.budgets)}")
            continue
        expected, _, *python = its.budgets[budget]
        count = len(set(kinds.values()) - {"resident"})
        yield holds(f"{what}: as Python plans", kinds == expected, f"{count} kinds but resident")
        yield Check(f"{what}: peak, of the budget", peak / budget, most=1.0)
        yield _pictures(what, tuple(drawn), tuple(python))
    if ours.device_bytes:
        after = ours.device_bytes[len(ours.device_bytes) // 10 :]
        what = f"{work.loads} loads and closes: device memory"
        yield Check(what, (max(after) - after[0]) / 1e6, " MB", most=_NOISE / 1e6)


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
@click.option("--loads", default=200, show_default=True, help="Loads and closes.")
@click.option("--budgets/--no-budgets", default=True, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSON.")
def main(
    bundle: Path, device: str, build: Path, runs: int, loads: int, budgets: bool, out: Path
) -> None:  # fmt: skip
    """Draw with both, print the checks, and write them."""
    shares = _SHARES if budgets else ()
    work = Work(bundle, device, build, _requests(), runs, shares, loads)
    # Python's loads and closes are conformance.py's to count.
    its = _apart(Work(bundle, device, build, work.requests, runs, shares, 0), by_python)
    ours = _apart(work, by_libsd35)
    checks = list(compare(ours, its, work))
    for check in checks:
        print(f"  {check}", flush=True)
    rows = [{**asdict(check), "passed": check.passed} for check in checks]
    facts = {"bundle": bundle.name, "device": device, "machine": describe_host(), "checks": rows}
    out.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    sys.exit(not all(check.passed for check in checks))


if __name__ == "__main__":
    main()
