"""The two sides of :mod:`libsd35`, each for a process of its own: Python's runtime, and libsd35."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from conformance_bench import process_bytes, unrecorded

# The library's functions in Python, which its tests have.
sys.path.append(str(Path(__file__).parents[1] / "tests" / "cpp"))

# Steps of the runs that host time is taken from: CUDA takes all of them without a wait.
_SHORT, _RUNS = 8, 8

Request = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a side is to do.

    Attributes:
        build: of libsd35: a build directory of CMake.
        requests: by what they are, each drawn once; the first is timed.
        runs: pictures that are timed, of the first request.
        shares: budgets between the smallest and what the bundle takes without one.
        loads: how many times it is loaded, drawn from and closed; then it does nothing else.
    """

    bundle: Path
    device: str
    build: Path
    requests: Mapping[str, Request]
    runs: int
    shares: Sequence[float]
    loads: int = 0

    @property
    def first(self) -> Request:
        """The request that is timed."""
        return next(iter(self.requests.values()))

    @property
    def builder(self) -> str:
        return str(json.loads((self.bundle / "bundle.json").read_text("utf-8"))["builder"])

    @property
    def records(self) -> bool:
        """Whether steps are recorded as graphs."""
        return self.builder == "tensorrt"


@dataclass
class Side:
    """What came of it.

    Attributes:
        pictures: latents and images of each request.
        picture_seconds, step_seconds: of each timed picture.
        between_steps: seconds of the host between two steps, less what it waited for the GPU.
        replays: of graphs, in the runs that those are of.
        direct: latents and images of the first request, no step being recorded, and its seconds
            of a step.
        budgets: bytes → kinds of residence by component, peak, latents and images.
        held_bytes: of the device by NVML, or of the host, after each load and close.
    """

    load_seconds: float = 0.0
    pictures: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    picture_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    between_steps: list[float] = field(default_factory=list)
    replays: int = 0
    direct: tuple[np.ndarray, np.ndarray, float] | None = None
    budgets: dict[int, tuple[dict[str, str], int, np.ndarray, np.ndarray]] = field(
        default_factory=dict
    )
    held_bytes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Means:
    """How a side does it.

    Attributes:
        load: opens a pipeline, with options.
        observed: gives seconds between steps, and the number of replays, since the last call.
        direct: in it, pipelines that are opened record nothing.
        report: of a pipeline: planned peak, kinds by component, peak of the device.
    """

    load: Callable[..., Any]
    observed: Callable[[], tuple[list[float], int]]
    direct: Callable[[], Any]
    report: Callable[[Any], tuple[int, dict[str, str], int]]


def _do(work: Work, means: _Means) -> Side:
    side = Side()
    first = work.first
    if work.loads:
        side.held_bytes += _loads(work, means)
        return side
    start = time.perf_counter()
    with means.load() as pipe:
        side.load_seconds = time.perf_counter() - start
        for request in work.requests.values():
            drawn = pipe.generate(**request)
            side.pictures.append((drawn.latents, drawn.images))
        for _ in range(work.runs):
            start = time.perf_counter()
            drawn = pipe.generate(**first)
            side.picture_seconds.append(time.perf_counter() - start)
            side.step_seconds.append(drawn.timings["denoise"] / drawn.parameters["steps"])
        short = {**first, "steps": _SHORT}
        pipe.generate(**short)
        means.observed()
        for _ in range(_RUNS):
            pipe.generate(**short)
            between, replays = means.observed()
            side.between_steps += between
            side.replays += replays
        full, _, _ = means.report(pipe)
    with means.direct(), means.load() as pipe:
        for _ in range(3):
            drawn = pipe.generate(**first)
        seconds = drawn.timings["denoise"] / drawn.parameters["steps"]
        side.direct = (drawn.latents, drawn.images, seconds)
    smallest = _smallest_budget(means, first) if work.shares else 0
    for share in work.shares:
        budget = int(smallest + share * (full - smallest))
        with means.load(vram_budget=budget) as pipe:
            pipe.generate(**{**first, "prompt": "another text"})
            drawn = pipe.generate(**first)
            _, kinds, peak = means.report(pipe)
            side.budgets[budget] = (kinds, peak, drawn.latents, drawn.images)
    return side


def _loads(work: Work, means: _Means) -> Iterator[int]:
    """Bytes that this process holds after each load, picture and close."""
    for _ in range(work.loads):
        with means.load() as pipe:
            pipe.generate(**{**work.first, "steps": 2})
        gc.collect()
        if work.device == "cpu":
            yield psutil.Process().memory_info().rss
        else:
            # Where NVML does not tell processes apart, that of all of them.
            yield process_bytes() or _used_bytes()


def _used_bytes() -> int:
    import pynvml as nvml

    nvml.nvmlInit()
    try:
        return int(nvml.nvmlDeviceGetMemoryInfo(nvml.nvmlDeviceGetHandleByIndex(0)).used)
    finally:
        nvml.nvmlShutdown()


def _smallest_budget(means: _Means, request: Request) -> int:
    """As the refusal of one that is too small names it."""
    from sd35_trt.units import parse_bytes

    try:
        with means.load(vram_budget=1 << 20) as pipe:
            pipe.generate(**request)
    except Exception as error:
        match = re.search(r"vram_budget for it is (\S+ ?\S*)", str(error))
        if match is None:
            raise
        return parse_bytes(match[1].replace(" ", "").rstrip(","))
    raise RuntimeError("it fits into one byte")


def by_python(work: Work) -> Side:
    """Python's runtime."""
    from sd35_trt.runtime import Pipeline

    def load(**options: Any) -> Pipeline:
        if straight and work.records:
            return unrecorded(work.bundle)
        return Pipeline.load(work.bundle, device=work.device, **options)

    @contextmanager
    def direct() -> Iterator[None]:
        straight.append(True)
        yield
        straight.clear()

    def report(pipe: Pipeline) -> tuple[int, dict[str, str], int]:
        memory = pipe.memory()
        kinds = {name: engine.kind for name, engine in memory.engines.items()}
        return memory.planned_peak, kinds, memory.device.peak

    straight: list[bool] = []
    watch = _Watch()
    with watch.patches():
        return _do(work, _Means(load, watch.taken, direct, report))


class _Watch:
    """Python's counterpart of cpp/tests/observer.cpp."""

    def __init__(self) -> None:
        self._launches: list[tuple[float, float, float]] = []
        self._waited = 0.0
        self._replays = 0

    @contextmanager
    def patches(self) -> Iterator[None]:
        """Replays, runs of the denoiser and waits are noted inside."""
        from sd35_trt.runtime.devices.cuda_streams import CudaFetch, CudaGraph
        from sd35_trt.runtime.sessions import onnxruntime as backend

        replay, wait, run = CudaGraph.replay, CudaFetch.wait, backend.OnnxRuntimeSession.run

        def timed_replay(graph: Any) -> None:
            begin = time.perf_counter()
            replay(graph)
            self._launched(begin)
            self._replays += 1

        def timed_wait(fetch: Any) -> Any:
            begin = time.perf_counter()
            latents = wait(fetch)
            self._waited += time.perf_counter() - begin
            return latents

        def timed_run(session: Any, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> None:
            begin = time.perf_counter()
            run(session, inputs, outputs)
            if "next_latents" in outputs:
                self._launched(begin)

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(CudaGraph, "replay", timed_replay))
            stack.enter_context(mock.patch.object(CudaFetch, "wait", timed_wait))
            stack.enter_context(mock.patch.object(backend.OnnxRuntimeSession, "run", timed_run))
            yield

    def _launched(self, begin: float) -> None:
        self._launches.append((begin, time.perf_counter(), self._waited))

    def taken(self) -> tuple[list[float], int]:
        """Seconds between steps and the number of replays since the last call."""
        pairs = zip(self._launches, self._launches[1:], strict=False)
        between = [b[0] - a[1] - (b[2] - a[2]) for a, b in pairs]
        replays, self._replays = self._replays, 0
        self._launches.clear()
        return between, replays


def by_libsd35(work: Work) -> Side:
    """libsd35, through its C functions."""
    from sd35_ctypes import Library, Pipe  # type: ignore[import-not-found]

    os.environ["SD35_BACKENDS"] = str((work.build / "tests" / "observer").resolve())
    os.environ["SD35_OBSERVED"] = str(
        (work.build / "sd35" / f"libsd35-{work.builder}.so").resolve()
    )
    library = Library(work.build / "libsd35.so")
    observer = ctypes.CDLL(f"{os.environ['SD35_BACKENDS']}/libsd35-cuda.so")
    observer.observations.restype = ctypes.c_char_p

    def observed() -> tuple[list[float], int]:
        figures = json.loads(observer.observations())
        return figures["between_steps_seconds"], figures["replays"]

    def report(pipe: Pipe) -> tuple[int, dict[str, str], int]:
        device, engines = pipe.memory()
        kinds = {name: engine["kind"] for name, engine in engines.items()}
        return device["planned_peak"], kinds, device["peak"]

    return _do(
        work,
        _Means(
            lambda **options: Pipe(library, work.bundle, device=work.device, **options),
            observed,
            lambda: mock.patch.dict(os.environ, {"SD35_OBSERVED_DIRECT": "1"}),
            report,
        ),
    )
