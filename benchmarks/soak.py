"""A pool under load: many callers over two bundles, with cancels, time-outs, bad input, extreme
values and callbacks that misbehave.

    sd35-trt build --policy fp32 --out bundles/fp32
    sd35-trt build --policy half --out bundles/half
    python benchmarks/soak.py bundles/fp32 bundles/half [--requests 2000]

First one caller draws a part of the requests with a pipeline, one after the other; then 16 threads
send all of them to a pool of both bundles. Every image must be the one that its request gives
alone, every other request must end as it was made to end, and memory must be flat after the first
tenth. The table goes to results/soak.json too; the exit status is 1 where a figure is missed.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from soak_requests import DRAWN, SENDERS, SoakRequest, judge, make_requests

from sd35_trt.errors import PoolBusy
from sd35_trt.quality.metrics import psnr, squared_error
from sd35_trt.runtime import Pipeline, PipelinePool

RESULTS = Path(__file__).parent / "results" / "soak.json"

_SIZE = (64, 64)

# Requests that one caller draws, to compare throughput.
_ALONE = 100

#: Memory counts as flat when its line rises by less than this over the rest of the run.
FLAT = 0.02


def soak(
    bundles: tuple[Path, Path], count: int, steps: int, callers: int, least: float | None = None
) -> dict[str, Any]:
    """Run it.

    Args:
        least: PSNR, in dB, between a picture and the one that its request gives alone; None wants
            equal ones.

    Returns:
        JSON-serializable figures; ``wrong`` lists every request that did not end as it should.
    """
    requests = make_requests(count, steps)
    loads = []
    for path in bundles:
        start = time.perf_counter()
        with Pipeline.load(path, threads=1) as pipe:
            pipe.preload()
            loads.append(time.perf_counter() - start)
    pipes = {name: Pipeline.load(path, threads=1) for name, path in zip("ab", bundles, strict=True)}
    expected: dict[tuple[Any, ...], np.ndarray] = {}
    for request in requests:
        if request.kind in DRAWN and request.picture not in expected:
            expected[request.picture] = pipes[request.bundle].generate(**_arguments(request)).images
    drawings = [request for request in requests if request.kind == "draw"]
    some = drawings[:_ALONE]
    start = time.perf_counter()
    for request in some:
        pipes[request.bundle].generate(**_arguments(request))
    alone = len(some) / (time.perf_counter() - start)
    # Half of the callers can wait, so that the pool is busy at times.
    with PipelinePool(pipes, queue_limit=max(1, callers // 2)) as pool:
        switches = _switches(pool)
        figures = _send(pool, requests, expected, callers, least)
    speed = {"one caller": alone, "pool": figures.pop("pool_per_second")}
    return {
        "requests": count,
        "callers": callers,
        "steps": [steps, steps + 1],
        "size": list(_SIZE),
        "threads": 1,
        **figures,
        "images_per_second": speed,
        "load_seconds": loads,
        "switch_seconds": switches,
    }


def _arguments(request: SoakRequest) -> dict[str, Any]:
    return {**request.arguments, "size": _SIZE}


def _switches(pool: PipelinePool) -> dict[str, float]:
    """Seconds of the call that switches, and what the first image after it takes more."""
    calls: list[float] = []
    after: list[float] = []
    same: list[float] = []
    for i in range(20):
        for first in (True, False):
            if first:
                start = time.perf_counter()
                pool.switch("ab"[i % 2])
                calls.append(time.perf_counter() - start)
            result = pool.generate("a red star", steps=2, size=_SIZE)
            (after if first else same).append(result.timings["total"])
    # In the first round prompts are encoded.
    more = statistics.median(after[2:]) - statistics.median(same[2:])
    return {"call, worst": max(calls), "first image, more than the next": more}


def _send(
    pool: PipelinePool,
    requests: list[SoakRequest],
    expected: dict[tuple[Any, ...], np.ndarray],
    callers: int,
    least: float | None,
) -> dict[str, Any]:
    process, memory = psutil.Process(), []
    wrong: list[str] = []
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    busy = 0

    def call(number: int) -> None:
        nonlocal busy
        request = requests[number]
        while True:
            try:
                outcome, fault = _one(pool, request, expected, number, least)
                break
            except PoolBusy:  # as a client would: again, later
                with lock:
                    busy += 1
                time.sleep(0.01)
        with lock:
            outcomes[f"{request.kind}: {outcome}"] += 1
            if fault:
                wrong.append(f"request {number}, {request.kind}: {fault}")
            memory.append(process.memory_info().rss)

    start = time.perf_counter()
    with ThreadPoolExecutor(callers) as threads:
        futures = [threads.submit(call, number) for number in range(len(requests))]
    seconds = time.perf_counter() - start
    wrong += [f"a caller failed: {error!r}" for future in futures if (error := future.exception())]
    images = sum(n for name, n in outcomes.items() if name.endswith(": drawn"))
    rest = np.array(memory[len(memory) // 10 :], float)
    slope = np.polyfit(np.linspace(0, 1, len(rest)), rest, 1)[0]
    return {
        "seconds": seconds,
        "outcomes": dict(sorted(outcomes.items())),
        "busy": busy,
        "wrong": wrong,
        "pool_per_second": images / seconds,
        "memory": {
            "after a tenth": rest[0],
            "end": rest[-1],
            "largest": rest.max(),
            "rise": slope / rest[0],
            "curve": [int(memory[i * (len(memory) - 1) // 40]) for i in range(41)],
        },
    }


def _one(
    pool: PipelinePool,
    request: SoakRequest,
    expected: dict[tuple[Any, ...], np.ndarray],
    number: int,
    least: float | None,
) -> tuple[str, str]:
    """Send a request: how it ended, and what is wrong with that."""
    rng = random.Random(number)
    arguments = {"bundle": request.bundle, **_arguments(request)}
    try:
        result = SENDERS[request.kind](pool, arguments, rng)
    except PoolBusy:
        raise
    except BaseException as error:  # noqa: BLE001 a callback may raise anything
        return judge(request.kind, error)
    if request.kind not in DRAWN:
        return "drawn", "it was drawn"
    # A cancelled request may have been faster.
    images = expected.get(request.picture)
    distance = None if images is None else psnr(squared_error(result.images, images))
    if distance is None or (least is not None and distance >= least):
        return "drawn", ""
    where = f"bundle {request.bundle}, {request.arguments}"
    return "drawn", f"{distance:.1f} dB from what its request gives alone ({where})"


def table(figures: dict[str, Any]) -> tuple[str, bool]:
    """What was found beside what is wanted, and whether all is well."""
    speed, memory = figures["images_per_second"], figures["memory"]
    rows = [
        ("lost, swapped or wrong results", f"{len(figures['wrong'])}", "0", not figures["wrong"]),
        (
            "memory: rise after the first tenth",
            f"{memory['rise']:+.1%} of {memory['after a tenth'] / 1e6:.0f} MB",
            f"{FLAT:.0%}",
            memory["rise"] <= FLAT,
        ),
        (
            "images per second, of one caller's",
            f"{speed['pool'] / speed['one caller']:.2f}",
            "1.00",
            speed["pool"] >= speed["one caller"],
        ),
        (
            "switching between resident bundles",
            f"{figures['switch_seconds']['call, worst'] * 1e3:.3f} ms",
            "1 ms",
            figures["switch_seconds"]["call, worst"] <= 1e-3,
        ),
        (
            "loading a bundle and its engines",
            f"{max(figures['load_seconds']):.2f} s",
            "0.5 s",
            max(figures["load_seconds"]) <= 0.5,
        ),
    ]
    lines = [
        f"{figures['requests']} requests from {figures['callers']} threads in "
        f"{figures['seconds']:.0f} s",
        *(f"  {count:5}  {name}" for name, count in figures["outcomes"].items()),
        f"  {figures['busy']:5}  times busy, then sent again",
        "",
        f"{'':38}{'found':>18}{'wanted':>8}",
        *(
            f"{what:<38}{value:>18}{bound:>8}{'' if ok else '  missed'}"
            for what, value, bound, ok in rows
        ),
    ]
    return "\n".join(lines), all(ok for *_, ok in rows)


@click.command()
@click.argument("bundles", nargs=2, type=click.Path(path_type=Path, exists=True))
@click.option("--requests", default=2000, show_default=True)
@click.option("--steps", default=2, show_default=True, help="Half of the requests draw one more.")
@click.option("--callers", default=16, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(bundles: tuple[Path, Path], requests: int, steps: int, callers: int, out: Path) -> None:
    """Soak a pool of two BUNDLES."""
    figures = soak(bundles, requests, steps, callers)
    text, well = table(figures)
    print(text, *figures["wrong"][:10], sep="\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    figures["machine"] = {"cpus": os.cpu_count()}
    out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    sys.exit(not well)


if __name__ == "__main__":
    main()
