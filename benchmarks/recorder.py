"""Runs a step as the runtime does, and takes its time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from sd35_trt.runtime.devices.cpu import CpuDevice
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.devices.opening import open_device


class Recorder:
    """Runs work directly, then recorded."""

    def __init__(self, device: str) -> None:
        self.device: Device = CpuDevice() if device == "cpu" else open_device(device)
        self._queue: Any = None
        if device != "cpu":
            from sd35_trt.programs.torch_queue import TorchQueue

            self._queue = TorchQueue(self.device.index, self.device.stream)

    def median_ms(self, work: Callable[[], None], runs: int, record: bool) -> float:
        if self._queue is None:
            work()
            return statistics.median(_seconds(work) for _ in range(runs)) * 1e3
        torch.cuda.synchronize()  # inputs were made on another stream

        def queued() -> None:
            with self._queue.running():
                work()

        for _ in range(3):
            queued()
        self.device.synchronize()
        graph = self.device.capture(queued) if record else None
        again = graph.replay if graph else queued
        times = []
        for _ in range(runs):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record(self._queue.stream)
            again()
            last.record(self._queue.stream)
            last.synchronize()
            times.append(first.elapsed_time(last))
        if graph:
            graph.close()
        return statistics.median(times)


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
