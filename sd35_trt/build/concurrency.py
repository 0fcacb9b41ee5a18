"""Stages of a build that are made at the same time, where the machine has room for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sd35_trt.engines.child_process import stop_children
from sd35_trt.errors import Cancelled
from sd35_trt.progress import Progress
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage

# A stage's work is one thread's, mostly; libraries beside it use more.
_CPUS_EACH = 2


def count_jobs(bytes_each: Sequence[int], wish: int | None = None) -> int:
    """How many pieces of work may run at the same time.

    Args:
        bytes_each: of memory, that each takes.
        wish: the user's number; None takes what processors and free memory allow.
    """
    if wish is not None:
        return wish
    count = min(len(bytes_each), max(1, len(os.sched_getaffinity(0)) // _CPUS_EACH))
    available = _available_memory()
    largest = sorted(bytes_each, reverse=True)
    while count > 1 and sum(largest[:count]) > available:
        count -= 1
    return max(count, 1)


def _available_memory() -> int:
    """Bytes that the system, or this process's control group, can still give."""
    lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    available = next(int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line)
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text("ascii").strip()
        usage = int((group / "memory.current").read_text("ascii"))
    except (OSError, ValueError):  # no control groups, or of version 1
        return available
    return available if limit == "max" else min(available, int(limit) - usage)


def run_stages(
    cache: StageCache, stages: Iterable[Stage], progress: Progress, jobs: int
) -> dict[str, Path]:
    """Directories of stages by name, ``jobs`` of them at the same time.

    Where one fails, the others are stopped.

    Args:
        stages: independent of each other. With more than one job, they do their work in a child
            process, which can be stopped.

    Raises:
        Exception: of the first, in their order, that failed.
    """
    if jobs == 1:
        return {stage.name: run_stage(cache, stage, progress) for stage in stages}
    stopped, turn = threading.Event(), threading.Lock()

    def report(stage: str, done: float, total: float, note: str = "", /) -> None:
        if stopped.is_set():
            raise Cancelled("the build was stopped")
        with turn:
            progress(stage, done, total, note)

    with ThreadPoolExecutor(jobs, thread_name_prefix="sd35-trt-build") as pool:
        futures = {stage.name: pool.submit(run_stage, cache, stage, report) for stage in stages}
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop_children()
            raise
