"""What the sections of :mod:`conformance` share: bundles, drawing, comparing, device memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sd35_trt.bench.meters import describe_host
from sd35_trt.build import BuildOptions, build
from sd35_trt.errors import UsageError
from sd35_trt.quality.metrics import psnr, squared_error
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.job import Result


@dataclass(frozen=True)
class Check:
    """One figure and its bound.

    Attributes:
        least, most: bounds of the figure; None is no bound.
        note: what else was seen.
    """

    what: str
    figure: float
    unit: str = ""
    least: float | None = None
    most: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        above = self.least is None or self.figure >= self.least
        return bool(above and (self.most is None or self.figure <= self.most))

    def __str__(self) -> str:
        bound = "" if self.least is None else f" (at least {self.least:g})"
        bound += "" if self.most is None else f" (at most {self.most:g})"
        missed = "" if self.passed else "  MISSED"
        note = f"  {self.note}" if self.note else ""
        return f"{self.what:58} {self.figure:10.4g}{self.unit}{bound}{missed}{note}"


def holds(what: str, true: bool, note: str = "") -> Check:
    """A check of something that is so or not."""
    return Check(what, float(true), least=1.0, note=note)


@dataclass
class Bench:
    """Bundles of mini for one target.

    Attributes:
        quick: fewer repetitions.
        seconds: how long each bundle took to build, in the order of building.
    """

    target: str
    builder: str
    work: Path
    quick: bool

    def __post_init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def bundle(self, policy: str, **options: Any) -> Path:
        """A bundle for the target, built at first use."""
        return self._build(self.target, self.builder, policy, options)

    def has(self, policy: str) -> bool:
        """Whether bundles of a policy are built for the target."""
        try:
            self.bundle(policy)
        except UsageError:
            return False
        return True

    def reference(self, policy: str) -> Path:
        """A bundle of ONNX Runtime for the CPU."""
        return self._build("cpu", "onnxruntime", policy, {})

    def _build(self, target: str, builder: str, policy: str, options: dict[str, Any]) -> Path:
        name = "-".join([builder, policy, *options])
        out = self.work / name
        if not out.exists():
            start = time.perf_counter()
            build(
                BuildOptions(
                    target=target,
                    builder=builder,
                    policy=policy,
                    out=out,
                    cache_dir=self.work / "cache",
                    **options,
                )
            )
            self.seconds[name] = round(time.perf_counter() - start, 1)
        return out

    @property
    def on_gpu(self) -> bool:
        return self.target != "cpu"

    def device_bytes(self) -> int:
        """Memory of this process on the first GPU, by NVML; 0 without one."""
        return process_bytes() if self.on_gpu else 0

    def machine(self) -> dict[str, Any]:
        """What it ran on."""
        return describe_host()


def process_bytes() -> int:
    """Memory of this process on the first GPU, by NVML."""
    import pynvml as nvml

    nvml.nvmlInit()
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(nvml.nvmlDeviceGetHandleByIndex(0))
        return sum(one.usedGpuMemory or 0 for one in processes if one.pid == os.getpid())
    finally:
        nvml.nvmlShutdown()


def decibels(one: Result, other: Result) -> float:
    """PSNR of all pictures of two results; 100 for equal ones."""
    errors = [squared_error(a, b) for a, b in zip(one.images, other.images, strict=True)]
    value = psnr(float(np.mean(errors)))
    return 100.0 if value is None else value


def is_equal(one: Result, other: Result) -> bool:
    """Whether two results have the same latents and pictures, bit by bit."""
    return np.array_equal(one.latents, other.latents) and np.array_equal(one.images, other.images)


def unrecorded(bundle: Path, change: Callable[[str, Any], None] | None = None) -> Pipeline:
    """A pipeline whose steps are not recorded.

    Args:
        change: called with the name and the outputs of every engine that ran.
    """
    from sd35_trt.formats.bundle import Bundle
    from sd35_trt.runtime.sessions.session import open_session

    class Direct:
        recordable = False

        def __init__(self, *arguments: Any) -> None:
            self._name = arguments[1].name
            self._inner = open_session(*arguments)

        def run(self, inputs: Any, outputs: Any) -> None:
            self._inner.run(inputs, outputs)
            if change is not None:
                change(self._name, outputs)

        def close(self) -> None:
            self._inner.close()

    return Pipeline(Bundle.open(bundle), open_session=Direct)
