"""What the denoise loop costs beside the engine, on a GPU: host time and gaps between replays.

    python benchmarks/loop.py bundles/large-h200 --out loop.json

Host time is from the return of one replay to the call of the next, less the waits for the device,
in runs so short that CUDA takes all of their steps without making the caller wait. Gaps are on the
device, by CUPTI through PyTorch's profiler, from the end of one replay's last kernel to the start
of the next one's first; the copies of a step's inputs are in them. The bundle's engine must be one
that can be recorded.
"""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import click
import numpy as np

from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.devices.cuda_streams import CudaFetch, CudaGraph

# A replay has more kernels than this; what else is queued has one each.
_KERNELS = 8

_PROMPT = "a lighthouse at dusk"

# Steps and runs that host time is taken from.
_SHORT, _RUNS = 8, 8


def host_seconds(pipe: Pipeline) -> list[float]:
    """From the end of each replay's launch to the beginning of the next, less what was waited."""
    return [second for _ in range(_RUNS) for second in _host_seconds(pipe)]


def _host_seconds(pipe: Pipeline) -> list[float]:
    """Of one run."""
    replay, wait = CudaGraph.replay, CudaFetch.wait
    calls: list[tuple[float, float, float]] = []
    waited = 0.0

    def timed(graph: CudaGraph) -> None:
        start = time.perf_counter()
        replay(graph)
        calls.append((start, time.perf_counter(), waited))

    def timed_wait(fetch: CudaFetch) -> np.ndarray:
        nonlocal waited
        start = time.perf_counter()
        latents = wait(fetch)
        waited += time.perf_counter() - start
        return latents

    with (
        mock.patch.multiple(CudaGraph, replay=timed),
        mock.patch.multiple(CudaFetch, wait=timed_wait),
    ):
        pipe.generate(_PROMPT, steps=_SHORT)
    if len(calls) < _SHORT:
        raise click.ClickException("this bundle's engine is not recorded")
    return [
        later[0] - earlier[1] - (later[2] - earlier[2])
        for earlier, later in itertools.pairwise(calls)
    ]


def replays(pipe: Pipeline, steps: int) -> list[tuple[float, float]]:
    """Begin and end of each replay on the device, in seconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        pipe.generate(_PROMPT, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text("utf-8"))["traceEvents"]
    launches: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            begin = event["ts"] / 1e6
            launches[event["args"]["correlation"]].append((begin, begin + event["dur"] / 1e6))
    spans = [
        (min(b for b, _ in kernels), max(e for _, e in kernels))
        for kernels in launches.values()
        if len(kernels) > _KERNELS
    ]
    return sorted(spans)


@click.command()
@click.argument("bundle", type=click.Path(exists=True, path_type=Path))
@click.option("--steps", default=28, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(bundle: Path, steps: int, out: Path) -> None:
    """Measure, print, and write JSON."""
    with Pipeline.load(bundle, device="cuda", trust_kernels=True) as pipe:
        for _ in range(2):
            pipe.generate(_PROMPT, steps=steps)
        host = host_seconds(pipe)
        spans = replays(pipe, steps)
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(spans)]
    lasting = [end - begin for begin, end in spans]
    rows = {"host_us": host, "gap_us": gaps, "replay_us": lasting}
    result: dict[str, Any] = {"bundle": bundle.name, "steps": steps, "replays": len(spans)}
    print(f"{'':12}{'median':>12}{'p10':>12}{'p90':>12}")
    for name, seconds in rows.items():
        low, median, high = (np.percentile(seconds, (10, 50, 90)) * 1e6).round(1).tolist()
        result[name] = {"median": median, "p10": low, "p90": high}
        print(f"{name:12}{median:12.1f}{low:12.1f}{high:12.1f}")
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
