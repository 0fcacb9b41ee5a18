"""FlashAttention-3 in programs: its arithmetic on the CPU, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from sd35_trt.errors import Sd35Error
from sd35_trt.programs import flash_attention_3, fused, kernels
from sd35_trt.programs.fused import FUNCTIONS, quantize

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TARGET = "sd35.fp8_attention.default"


def operands(amax: float) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Query, key and value [2, 150, 3, 64], normal, and scales for a largest magnitude."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(2, 150, 3, 64, generator=generator) for _ in range(3)]
    return values, torch.full((3, 3), amax / 448)


def test_operands_are_rounded_and_no_more() -> None:
    """E4M3's own error, whatever the scale; BF16's in the result."""
    values, scale = operands(5.0)
    exact = functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in values))
    errors = []
    for factor in (1.0, 8.0):
        scales = factor * scale
        rounded = [quantize(x, own[:, None]) for x, own in zip(values, scales, strict=True)]
        actual = FUNCTIONS["fp8_attention"](*rounded, scales)
        assert (actual.dtype, actual.shape) == (torch.float16, values[0].shape)
        difference = actual.float() - exact.transpose(1, 2)
        errors.append(float(difference.norm() / exact.norm()))
    # Random operands, whose sums cancel. A picture's attention is 0.02 to 0.03 off.
    assert 0.02 < min(errors) <= max(errors) < 0.08, errors


def test_other_gpus_and_missing_packages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA RTX 4090")
    for capability, package, message in (
        ((8, 9), "0.0.3", "runs on Hopper GPUs, and this is NVIDIA RTX 4090 — build the bundle"),
        ((9, 0), None, r"needs fa3-fwd, which is not installed — pip install 'sd35-trt\[hopper\]'"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(flash_attention_3, "installed_version", lambda name, p=package: p)
        flash_attention_3.register.cache_clear()
        with pytest.raises(Sd35Error, match=message):
            kernels.find(TARGET, GPU)
    assert kernels.find(TARGET, CPU) is FUNCTIONS["fp8_attention"]


def test_the_library_is_given_a_scale_for_every_head(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a library of the same form in its place, which has no CPU's kernels."""
    calls: list[dict[str, Any]] = []

    def flash_attn_func(query: Any, key: Any, value: Any, **scales: Any) -> torch.Tensor:
        calls.append({"operands": (query, key, value), **scales})
        return torch.ones(query.shape, dtype=torch.bfloat16)

    values, scale = operands(5.0)
    rounded = [quantize(x, own[:, None]) for x, own in zip(values, scale, strict=True)]
    library = SimpleNamespace(flash_attn_func=flash_attn_func)
    actual = flash_attention_3.attention(library, *rounded, scale)
    assert actual.dtype == torch.float16
    (call,) = calls
    assert all(x.dtype == fused.E4M3 for x in call["operands"])
    for name, own in zip(("q_descale", "k_descale", "v_descale"), scale, strict=True):
        assert torch.equal(call[name], own.expand(2, 3))
