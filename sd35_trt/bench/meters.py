"""What a benchmark reads off the machine: memory, energy, and which machine it is."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

# Seconds between two looks at a GPU's memory. Engines keep what they allocate for much longer.
_INTERVAL = 0.005

# The kernel counts resident pages per CPU and sums them up now and then.
_SLACK = 4 << 20

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class Memory:
    """Bytes in use over a span of time; filled when it ends.

    Attributes:
        before: when the span began.
        peak: largest during the span; None where that cannot be told.
    """

    before: int
    peak: int | None = None

    def as_dict(self) -> dict[str, int | None]:
        """``peak_bytes``, and ``own_bytes``: by how much it exceeds what was in use before."""
        own = None if self.peak is None else max(0, self.peak - self.before)
        return {"peak_bytes": self.peak, "own_bytes": own}


@contextlib.contextmanager
def host_memory() -> Iterator[Memory]:
    """Resident set of this process: Python, libraries, engines, and file pages that it maps.

    ``peak`` is of this span alone where the kernel lets a process reset its high-water mark;
    elsewhere it is None unless the span reached higher than all before it.
    """
    with contextlib.suppress(OSError):
        _CLEAR_REFS.write_text("5")  # proc(5): resets the peak resident set size
    start = _status()
    memory = Memory(start["VmRSS"])
    yield memory
    peak = _status()["VmHWM"]
    was_reset = start["VmHWM"] - start["VmRSS"] < _SLACK
    memory.peak = peak if was_reset or peak > start["VmHWM"] else None


def _status() -> dict[str, int]:
    """Bytes in ``/proc/self/status``. (``getrusage`` would count the parent's peak too.)"""
    rows = (line.split() for line in _STATUS.read_text("ascii", "replace").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if row[-1] == "kB"}


class Gpu:
    """The first GPU that CUDA sees, through the driver's management library (NVML)."""

    def __init__(self, nvml: Any, device: Any) -> None:
        self._nvml = nvml
        self._device = device

    @classmethod
    def open(cls) -> tuple[Gpu | None, str]:
        """The GPU, or None and the reason."""
        try:
            import pynvml as nvml
        except ImportError:
            return None, "memory and energy of the GPU need nvidia-ml-py: pip install nvidia-ml-py"
        try:
            nvml.nvmlInit()
            # NVML counts all GPUs, CUDA those that this names.
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
            if first.isdigit():
                device = nvml.nvmlDeviceGetHandleByIndex(int(first))
            else:
                device = nvml.nvmlDeviceGetHandleByUUID(first)
        except nvml.NVMLError as error:
            return None, f"memory and energy of the GPU are not known: {error}"
        return cls(nvml, device), ""

    def describe(self) -> dict[str, Any]:
        """Name, memory in bytes, and the driver's version."""
        nvml = self._nvml
        return {
            "name": str(nvml.nvmlDeviceGetName(self._device)),
            "memory_bytes": int(nvml.nvmlDeviceGetMemoryInfo(self._device).total),
            "driver": str(nvml.nvmlSystemGetDriverVersion()),
        }

    def energy(self) -> float | None:
        """Joules since the driver was loaded; None where the GPU does not count them."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device)) / 1000
        except self._nvml.NVMLError:
            return None

    def memory(self) -> Sampler:
        """Memory in use on the whole GPU, other processes' included, every 5 ms."""
        return Sampler(self)

    def used(self) -> int:
        """Bytes in use now."""
        return int(self._nvml.nvmlDeviceGetMemoryInfo(self._device).used)

    def close(self) -> None:
        """Release the library."""
        self._nvml.nvmlShutdown()


class Sampler:
    """A context manager that looks at a GPU's memory from a thread of its own."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Memory:
        usage = self._gpu.used()
        self._memory = Memory(usage, usage)
        self._peak = usage
        self._thread.start()
        return self._memory

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._memory.peak = max(self._peak, self._gpu.used())

    def _look(self) -> None:
        while not self._stop.wait(_INTERVAL):
            self._peak = max(self._peak, self._gpu.used())


def describe_host() -> dict[str, Any]:
    """Which machine this is."""
    return {
        "name": platform.node(),
        "cpu": _cpu(),
        "cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
    }


class Others:
    """How many CPU cores other processes, and other virtual machines, kept busy meanwhile."""

    def __init__(self) -> None:
        self._start = self._read()

    def cores(self) -> float:
        """Mean since this object was made."""
        elapsed, busy, own = (
            now - then for now, then in zip(self._read(), self._start, strict=True)
        )
        return max(0.0, busy - own) / elapsed if elapsed else 0.0

    @staticmethod
    def _read() -> tuple[float, float, float]:
        """Seconds: on the clock, of all cores at work, of this process at work."""
        line = Path("/proc/stat").read_text("ascii", "replace").split("\n", 1)[0]
        # proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
        ticks = [int(value) for value in line.split()[1:9]]
        busy = (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


def usable_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
