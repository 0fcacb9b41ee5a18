"""What we use of PyTorch that its documentation does not promise."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = [
    "FakeTensorMode",
    "TorchDispatchMode",
    "add_each",
    "clear_cublas_workspaces",
    "compiled_apart",
    "lerp_each",
    "multiply_each",
    "onnx_functions_kept",
    "recompile_limit",
    "scaled_mm",
    "storage_key",
    "unset_fake_temporarily",
]

#: ``aten._scaled_mm``: a product of E4M3 matrices, the second one column-major. The public
#: ``torch.nn.functional.scaled_mm`` came with PyTorch 2.10; 2.9 is still taken.
scaled_mm = torch._scaled_mm


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for tensors that share memory, of fake ones too, as long as they live."""
    return int(tensor.untyped_storage()._cdata)


@contextlib.contextmanager
def recompile_limit(count: int) -> Iterator[None]:
    """Let a function be compiled for so many combinations of sizes."""
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=count):
        yield


@contextlib.contextmanager
def compiled_apart(keep: Callable[[bytes], None]) -> Iterator[None]:
    """Tell what the compiler makes inside from what it makes for others in this process, whose
    compiling waits meanwhile.

    Args:
        keep: is given it, in the form of ``torch.compiler.save_cache_artifacts``, if there is any.
    """
    # It takes a second to import.
    from torch._dynamo.convert_frame import compile_lock
    from torch.compiler._cache import CacheArtifactManager

    with compile_lock, CacheArtifactManager.with_fresh_cache():
        yield
        if artifacts := torch.compiler.save_cache_artifacts():
            keep(artifacts[0])


#: By version of ONNX's operators: what ``torch.onnx.export`` translates operators to.
_onnx_functions: dict[int, Any] = {}


@contextlib.contextmanager
def onnx_functions_kept() -> Iterator[None]:
    """Let ``torch.onnx.export`` read what it translates operators to once: it takes a second.

    Not for calls with a ``custom_translation_table``: what that adds would stay.
    """
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    registry: Any = ONNXRegistry
    method, read = vars(registry)["from_torchlib"], registry.from_torchlib

    def from_torchlib(opset_version: int) -> Any:
        if opset_version not in _onnx_functions:
            _onnx_functions[opset_version] = read(opset_version)
        return _onnx_functions[opset_version]

    registry.from_torchlib = staticmethod(from_torchlib)
    try:
        yield
    finally:
        registry.from_torchlib = method


def lerp_each(targets: list[torch.Tensor], ends: list[torch.Tensor], weight: float) -> None:
    """``targets[i].lerp_(ends[i], weight)`` in few kernels."""
    torch._foreach_lerp_(targets, ends, weight)


def multiply_each(targets: list[torch.Tensor], factor: float) -> None:
    """``targets[i].mul_(factor)`` in few kernels."""
    torch._foreach_mul_(targets, factor)


def add_each(targets: list[torch.Tensor], others: list[torch.Tensor], alpha: float) -> None:
    """``targets[i].add_(others[i], alpha=alpha)`` in few kernels."""
    torch._foreach_add_(targets, others, alpha=alpha)


def clear_cublas_workspaces() -> None:
    """Free the workspaces that PyTorch keeps for cuBLAS, one for each stream that it has seen."""
    torch._C._cuda_clearCublasWorkspaces()
