"""A server under load: what HTTP costs, what joining brings, and latency at given rates.

    sd35-trt build --out bundles/mini
    python benchmarks/serve.py bundles/mini
    python benchmarks/serve.py bundles/medium --size 512x512 --rates 0.5,0.8,1.2 --seconds 60
    python benchmarks/serve.py bundles/mini --server triton
    python benchmarks/serve.py bundles/medium --size 1024x1024 --only joined

First, one client asks the server and a pool in this process in turns: the difference is what the
server takes. Then clients that ask again as soon as they are answered say how much joining brings.
Last, requests arrive by chance at given rates, shares of what one client gets in a second, whether
or not earlier ones are answered (an open loop; Poisson): latency counts from when a request was
due. Goodput is what was answered in time, in requests per second. The figures go to
results/serve.json too; the exit status is 1 where the server takes more than 5 ms. ``--only`` takes
some of these parts: overhead, joined, rates.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from serve_targets import Ask, Target, http_target, triton_target

from sd35_trt.runtime import Pipeline, PipelinePool

RESULTS = Path(__file__).parent / "results" / "serve.json"

#: Milliseconds that the server may take beside drawing, at the median.
OVERHEAD_MS = 5.0

_PROMPTS = ("a red star", "two blue squares", "a small green circle on white", "a yellow ring")

# Rounds of a closed loop before it counts: engines compile for every number of joined requests.
_WARM_UP = 3

#: Each needs those before it.
PARTS = ("overhead", "joined", "rates")

# An answer is in time after so many times what an idle server takes.
_IN_TIME = 5.0


def body(number: int, steps: int, size: str) -> dict[str, Any]:
    """One of the requests; each has its own seed, and few prompts are new."""
    prompt = _PROMPTS[number % len(_PROMPTS)]
    return {"prompt": prompt, "seed": number, "steps": steps, "size": size}


def overhead(target: Target, bundle: Path, steps: int, size: str, count: int) -> dict[str, float]:
    """Milliseconds at the median: of a request to the server, of the same to a pool here, of both
    in turns, and their difference; and where the server says how long it drew, what is beside.
    """
    width, height = map(int, size.split("x"))
    served, drawn, beside = [], [], []
    with PipelinePool({"one": Pipeline.load(bundle, threads=1)}) as pool:
        for number in range(-len(_PROMPTS), count):
            asked = body(abs(number), steps, size)
            start = time.perf_counter()
            seconds = target.draw(asked)
            middle = time.perf_counter()
            pool.generate(asked["prompt"], seed=asked["seed"], steps=steps, size=(width, height))
            end = time.perf_counter()
            if number >= 0:  # before, prompts are encoded
                served.append(middle - start)
                drawn.append(end - middle)
                if seconds is not None:
                    beside.append(middle - start - seconds)
    figures = {
        "server_ms": 1e3 * statistics.median(served),
        "pool_ms": 1e3 * statistics.median(drawn),
        "difference_ms": 1e3 * (statistics.median(served) - statistics.median(drawn)),
    }
    if beside:
        figures["beside_drawing_ms"] = 1e3 * statistics.median(beside)
    return figures


async def closed_loop(target: Target, clients: int, steps: int, size: str, seconds: float) -> float:
    """Pictures a second of clients that ask again as soon as they are answered.

    Raises:
        RuntimeError: one was not drawn.
    """
    answered = 0

    async def client(ask: Ask, number: int, end: float) -> None:
        nonlocal answered
        while True:
            status = await ask(body(number, steps, size))
            if status == "200":
                answered += 1
                number += clients
            elif status != "429":  # fewer may wait than there are clients
                raise RuntimeError(f"a request was answered with {status}")
            if time.perf_counter() >= end and status == "200":
                return
            if status == "429":
                await asyncio.sleep(0.02)

    async def together(ask: Ask, end: float) -> None:
        await asyncio.gather(*(client(ask, first, end) for first in range(clients)))

    async with target.clients() as ask:
        for _ in range(_WARM_UP):
            await together(ask, 0.0)
        answered, start = 0, time.perf_counter()
        await together(ask, start + seconds)
    return answered / (time.perf_counter() - start)


async def open_loop(
    target: Target, rate: float, steps: int, size: str, seconds: float, in_time: float
) -> dict[str, Any]:
    """Requests that arrive by chance.

    Args:
        rate: of arrivals, a second.
        in_time: seconds from when a request is due that count as good.

    Returns:
        Statuses, latency in seconds of what was drawn, goodput.
    """
    rng = random.Random(0)
    statuses: Counter[str] = Counter()
    latencies: list[float] = []
    start = time.perf_counter()

    async def one(ask: Ask, number: int, due: float) -> None:
        status = await ask(body(number, steps, size))
        statuses[status] += 1
        if status == "200":
            latencies.append(time.perf_counter() - start - due)

    async with target.clients() as ask:
        tasks, due, number = [], rng.expovariate(rate), 0
        while due < seconds:
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(ask, number, due)))
            due += rng.expovariate(rate)
            number += 1
        await asyncio.gather(*tasks)
    taken = time.perf_counter() - start
    good = sum(latency <= in_time for latency in latencies)
    return {
        "rate": rate,
        "requests": number,
        "statuses": dict(sorted(statuses.items())),
        "latency": percentiles(latencies),
        "in_time_seconds": in_time,
        "goodput": good / taken,
    }


def percentiles(values: list[float]) -> dict[str, float]:
    """The middle, the 95th, the 99th and the largest; nothing of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    return {
        name: ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("max", 1.0))
    }


def measure(
    bundle: Path, steps: int, size: str, rates: list[float], seconds: float, queue: int, count: int,
    kind: str = "http", only: Sequence[str] = PARTS,
) -> dict[str, Any]:  # fmt: skip
    """Run parts; JSON-serializable figures.

    Args:
        kind: of the server, one of ``TARGETS``.
    """
    found: dict[str, Any] = {
        "server": kind,
        "bundle": bundle.name,
        "steps": steps,
        "size": size,
        "queue": queue,
        "machine": {"cpus": os.cpu_count(), "system": platform.platform()},
    }
    with TARGETS[kind](bundle, queue) as target:
        if "overhead" in only:
            found["overhead"] = overhead(target, bundle, steps, size, count)
        if "joined" in only:
            found["pictures_per_second"] = {
                clients: asyncio.run(closed_loop(target, clients, steps, size, seconds))
                for clients in (1, 8)
            }
        if "rates" in only:
            in_time = _IN_TIME * found["overhead"]["server_ms"] / 1e3
            alone = found["pictures_per_second"][1]
            found["open_loop"] = [
                asyncio.run(open_loop(target, share * alone, steps, size, seconds, in_time))
                | {"share": share}
                for share in rates
            ]
    return found


def table(figures: dict[str, Any]) -> tuple[str, bool]:
    """What was found, and whether the server takes no more than it may."""
    well = True
    lines = [
        f"{figures['server']}: {figures['bundle']}, {figures['size']}, {figures['steps']} steps"
    ]
    if (beside := figures.get("overhead")) is not None:
        well = beside["difference_ms"] <= OVERHEAD_MS
        lines.append(
            f"one request: {beside['server_ms']:.1f} ms; pool.generate: {beside['pool_ms']:.1f} "
            f"ms; difference {beside['difference_ms']:.1f} ms (at most {OVERHEAD_MS:g})"
            f"{'' if well else '  missed'}"
        )
    if (joined := figures.get("pictures_per_second")) is not None:
        lines.append(
            f"pictures a second: one client {joined[1]:.2f}, eight {joined[8]:.2f}, "
            f"{joined[8] / joined[1]:.2f} times as many"
        )
    if "open_loop" in figures:
        lines += [
            "",
            f"{'load':>6}{'per s':>8}{'sent':>7}{'drawn':>7}{'429':>6}{'else':>6}"
            f"{'p50 s':>9}{'p95 s':>9}{'p99 s':>9}{'good/s':>9}",
            *map(_row, figures["open_loop"]),
        ]
    return "\n".join(lines), well


def _row(loop: dict[str, Any]) -> str:
    statuses = Counter(loop["statuses"])
    others = loop["requests"] - statuses["200"] - statuses["429"]
    latency = [f"{loop['latency'].get(name, float('nan')):9.3f}" for name in _SHOWN]
    return (
        f"{loop['share']:6.0%}{loop['rate']:8.2f}{loop['requests']:7}{statuses['200']:7}"
        f"{statuses['429']:6}{others:6}{''.join(latency)}{loop['goodput']:9.2f}"
    )


TARGETS = {"http": http_target, "triton": triton_target}

_SHOWN = ("p50", "p95", "p99")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--server", type=click.Choice(list(TARGETS)), default="http", show_default=True)
@click.option("--steps", default=4, show_default=True)
@click.option("--size", default="64x64", show_default=True)
@click.option("--rates", default="0.5,0.8,1.2,3", show_default=True, help="Of one client's.")
@click.option("--seconds", default=15.0, show_default=True, help="Of each load.")
@click.option("--queue", default=16, show_default=True, help="Of the server.")
@click.option("--count", default=200, show_default=True, help="Requests that are compared.")
@click.option("--only", default=",".join(PARTS), show_default=True, metavar="PART,...")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(
    bundle: Path, server: str, steps: int, size: str, rates: str, seconds: float, queue: int,
    count: int, only: str, out: Path,
) -> None:  # fmt: skip
    """Load a server of BUNDLE."""
    shares = [float(share) for share in rates.split(",")]
    parts = only.split(",")
    if unknown := set(parts) - set(PARTS):
        raise click.UsageError(f"there is no part {min(unknown)}")
    if "rates" in parts and set(parts) != set(PARTS):
        raise click.UsageError("rates are shares of what the other parts find")
    figures = measure(bundle, steps, size, shares, seconds, queue, count, server, parts)
    text, well = table(figures)
    print(text)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    sys.exit(not well)


if __name__ == "__main__":
    main()
