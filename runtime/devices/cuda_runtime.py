"""Calls of the CUDA runtime that raise where they fail.

Source: CUDA Runtime API reference (docs.nvidia.com/cuda/cuda-runtime-api), whose names are those of
cuda-bindings.
"""

from __future__ import annotations

from typing import Any

from cuda.bindings import runtime as cudart

from sd35_trt.errors import OutOfMemory, Sd35Error


class CudaError(Sd35Error):
    """A call of the CUDA runtime failed.

    Attributes:
        reason: the runtime's own words.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f"CUDA failed: {reason}", "check the driver with: nvidia-smi")
        self.reason = reason


def check(result: tuple[Any, ...]) -> Any:
    """The value of a call, without its status.

    Args:
        result: what a function of ``cuda.bindings.runtime`` returned.

    Raises:
        OutOfMemory: the GPU has no memory left.
        CudaError: the call failed otherwise.
    """
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        reason = text.decode() if isinstance(text, bytes) else str(text)
        if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise OutOfMemory(
                f"the GPU has no memory left ({reason})",
                "draw a smaller size or batch, or load with a vram_budget",
            )
        raise CudaError(reason)
    return values[0] if len(values) == 1 else tuple(values)


def count_devices(name: str) -> int:
    """How many GPUs there are.

    Args:
        name: of the device that is asked for, for the message.

    Raises:
        Sd35Error: there is no driver, or it is too old.
    """
    try:
        return int(check(cudart.cudaGetDeviceCount()))
    except CudaError as error:
        status, version = cudart.cudaDriverGetVersion()
        missing = status == cudart.cudaError_t.cudaSuccess and version == 0
        reason = "this machine has no NVIDIA driver" if missing else error.reason
        raise Sd35Error(
            f"{name} cannot be used: {reason}",
            "install the NVIDIA driver, or build for this machine with: sd35-trt build --gpu cpu",
        ) from error


def allow_peer(index: int) -> None:
    """Let the active GPU at another one's memory."""
    (status,) = cudart.cudaDeviceEnablePeerAccess(index, 0)
    if status == cudart.cudaError_t.cudaErrorPeerAccessAlreadyEnabled:
        cudart.cudaGetLastError()  # or another library would take it for its own
    else:
        check((status,))
