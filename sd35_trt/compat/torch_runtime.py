"""What running programs takes of PyTorch beside its public API."""

from __future__ import annotations

import torch


def scaled_mm(
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The product of FP8 matrices, each times its scale.

    ``torch.nn.functional.scaled_mm`` is public from PyTorch 2.10 on; 2.9 is still taken.

    Args:
        a: [M, K], row-major.
        b: [K, N], column-major.
        scale_a, scale_b: float32, of no dimensions.
        dtype: of the result, [M, N].
    """
    return torch._scaled_mm(a, b, scale_a, scale_b, out_dtype=dtype)


def clear_cublas_workspaces() -> None:
    """Free the workspaces that PyTorch keeps for cuBLAS, one for each stream that it has seen."""
    torch._C._cuda_clearCublasWorkspaces()
