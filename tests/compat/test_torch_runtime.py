"""What running programs takes of PyTorch inside is still there, and does what it did."""

from __future__ import annotations

import pytest
import torch

from sd35_trt.compat.torch_runtime import scaled_mm


def test_scaled_mm_multiplies_by_both_scales() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-4, 5, (16, 16), generator=rng).float() for _ in range(2))
    scales = torch.tensor(0.5), torch.tensor(4.0)
    narrow = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t().contiguous().t()
    product = scaled_mm(*narrow, *scales, torch.float32)
    assert torch.equal(product, 2.0 * (a @ b)), f"torch {torch.__version__}: torch._scaled_mm"


def test_cublas_workspaces_can_be_cleared() -> None:
    if torch.version.cuda is None:
        pytest.skip("a PyTorch without CUDA")
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    assert callable(clear), f"torch {torch.__version__}: torch._C._cuda_clearCublasWorkspaces"
