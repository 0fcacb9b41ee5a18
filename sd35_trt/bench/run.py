"""``sd35-trt bench``: how fast a bundle draws, stage by stage, alone or against a peer.

Every run draws a prompt that was not drawn before: the runtime keeps the embeddings of prompts, so
that a repeated one would not be encoded. The empty negative prompt is kept from the warm-up on, as
in a server.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from dataclasses import asdict, replace
from typing import Any

from sd35_trt.formats.bundle import Bundle
from sd35_trt.progress import Progress, silent

from .compare import Side, compare, describe
from .contenders import EngineContender
from .meters import Gpu, Others, describe_host, host_memory, usable_cores
from .options import BenchOptions
from .peer import open_peer
from .result import FORMAT, versions
from .workload import Workload, decide_workload

# Seconds before a run against a peer: idle threads of the other's pool spin for a while.
_SETTLE = 0.1

# Other processes on more than this share of the cores disturb a measurement.
_BUSY = 0.1


def bench(options: BenchOptions, progress: Progress = silent) -> dict[str, Any]:
    """Measure a bundle.

    Returns:
        The result, JSON-serializable: seconds, bytes and joules; its version is
        :data:`sd35_trt.bench.result.FORMAT`.

    Raises:
        UsageError: an argument that the bundle does not accept.
        Sd35Error: the bundle or its peer cannot be run, or the checkpoint is not the bundle's.
    """
    start = time.perf_counter()
    bundle = Bundle.open(options.bundle, trust_kernels=options.trust_kernels)
    workload = decide_workload(bundle, options)
    peer = open_peer(bundle, options, workload)
    gpu, note = (None, "") if workload.device.startswith("cpu") else Gpu.open()
    notes = [note] if note else []
    sides = [Side(EngineContender(bundle, workload))]
    if peer is not None:
        sides.append(Side(peer))
    with contextlib.ExitStack() as stack:
        if gpu is not None:
            stack.callback(gpu.close)
        for number, side in enumerate(sides):
            stack.callback(side.contender.close)
            _start(side, workload, gpu, number, len(sides), progress)
        others = Others()
        for index in range(workload.runs):
            # Each goes first in turn.
            for side in sides if index % 2 == 0 else reversed(sides):
                if peer is not None:
                    time.sleep(_SETTLE)
                _run(side, workload, index, gpu)
            progress("runs", index + 1, workload.runs)
        busy = round(others.cores(), 2)
        described = [describe(side, workload) for side in sides]
        device = gpu.describe() if gpu is not None else {"name": workload.device}
    disturbed = busy > _BUSY * usable_cores()
    if disturbed:
        notes.append(f"other processes kept {busy:.1f} of {usable_cores()} cores busy meanwhile")
    notes += dict.fromkeys(note for side in sides for note in side.runs[-1].notes)
    comparison = compare(*sides) if peer is not None else None
    if comparison and not comparison["same_work"]:
        notes.append(
            "the pictures of the two are hardly more alike than those of two seeds: this may not "
            "be the same work"
        )
    return {
        "format": FORMAT,
        "made": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": options.command,
        "host": {**describe_host(), "others_cores": busy},
        "device": {"kind": workload.device, **device},
        "versions": versions(bundle.manifest, options),
        "settings": asdict(workload),
        "bundle": described[0],
        "peer": described[1] if peer is not None else None,
        "comparison": comparison,
        "disturbed": disturbed,
        "notes": notes,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _start(
    side: Side, workload: Workload, gpu: Gpu | None, number: int, sides: int, progress: Progress
) -> None:
    """Load a contender and warm it up, watching how much memory that takes."""
    with contextlib.ExitStack() as watch:
        host = watch.enter_context(host_memory())
        device = watch.enter_context(gpu.memory()) if gpu is not None else None
        side.load = side.contender.load()
        for i in range(workload.warmup):
            run = side.contender.draw(f"{workload.prompt} ({i})", i * workload.batch)
            if i == 0:
                side.first = run.timings["total"]
            side.warm_images = run.images
            progress("warm-up", number * workload.warmup + i + 1, sides * workload.warmup)
    side.memory = {
        "host": host.as_dict(),
        "device": device.as_dict() if device is not None else None,
    }


def _run(side: Side, workload: Workload, index: int, gpu: Gpu | None) -> None:
    number = workload.warmup + index
    before = gpu.energy() if gpu is not None else None
    run = side.contender.draw(f"{workload.prompt} ({number})", number * workload.batch)
    after = gpu.energy() if gpu is not None else None
    side.joules.append(None if before is None or after is None else after - before)
    if side.runs:  # only the last pictures are looked at
        side.runs[-1] = replace(side.runs[-1], images=side.runs[-1].images[:0])
    side.runs.append(run)
