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


def split_names(device: str | None) -> tuple[str | None, str | None]:
    """The devices of ``cuda:0,cuda:1``; of one, the second is None.

    Raises:
        UsageError: more than two, two of different kinds, or a comma too many.
    """
    if device is None or "," not in device:
        return device, None
    names = [name.strip() for name in device.split(",")]
    if len(names) != 2 or not all(names):
        raise UsageError(
            f"device {device} is not two devices",
            "one picture is drawn by two at most: cuda:0,cuda:1; a PipelinePool has more",
        )
    if len({name.partition(":")[0] for name in names}) > 1:
        raise UsageError(f"device {device} is of two kinds", "give two of one: cuda:0,cuda:1")
    return names[0], names[1]
