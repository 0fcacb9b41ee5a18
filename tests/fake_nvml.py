"""NVIDIA's management library (``pynvml``) as ``sd35-trt --gpu auto`` and ``doctor`` ask it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any


class Nvml(SimpleNamespace):
    """Stands in for ``pynvml`` on a machine with one GPU of the given kind."""

    class NVMLError(Exception):
        pass

    def __init__(self, capability: tuple[int, int], count: int = 1) -> None:
        values: dict[str, Any] = {
            "Init": None,
            "Shutdown": None,
            "DeviceGetCount": count,
            "DeviceGetHandleByIndex": 0,
            "DeviceGetName": "NVIDIA RTX A2000",
            "DeviceGetCudaComputeCapability": capability,
            "DeviceGetMemoryInfo": SimpleNamespace(total=6 * 2**30),
            "DeviceGetMaxPcieLinkGeneration": 4,
            "DeviceGetMaxPcieLinkWidth": 16,
        }
        super().__init__(**{f"nvml{k}": lambda *_, v=v: v for k, v in values.items()})
