"""Devices by name."""

from __future__ import annotations

import importlib
import re

from sd35_trt.errors import Sd35Error, UsageError

from .cpu import CpuDevice
from .device import Device


def open_device(name: str) -> Device:
    """A device by name: ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    Raises:
        UsageError: an unknown name.
        Sd35Error: no GPU, no driver, or cuda-bindings is not installed or does not load.
    """
    if name == "cpu":
        return CpuDevice()
    match = re.fullmatch(r"cuda(?::(\d+))?", name)
    if match is None:
        raise UsageError(f"unknown device {name!r}", "use cpu, cuda or cuda:N")
    advice = "pip install 'sd35-trt[cuda]'"
    try:
        # Its import loads CUDA's libraries, which a CPU does without.
        module = importlib.import_module("sd35_trt.runtime.devices.cuda")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("cuda"):
            raise
        raise Sd35Error(f"{name} needs cuda-bindings, which is not installed", advice) from error
    except (ImportError, OSError, RuntimeError) as error:
        raise Sd35Error(f"{name} needs cuda-bindings, which does not load ({error})", advice) from (
            error
        )
    device: Device = module.CudaDevice(int(match[1] or 0))
    return device
