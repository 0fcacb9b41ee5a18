"""numpy noise equals PyTorch's CPU generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sd35_trt.runtime.noise import randn

SEEDS = [*range(12), 42, 1234, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**32 + 5, 2**40 + 3]
SHAPES = [(1, 16, 16, 16), (1, 16, 128, 128), (3, 16, 24, 16), (2, 16, 9, 7), (17,), (16,), (5, 5)]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_torch(shape: tuple[int, ...]) -> None:
    assert len(SEEDS) == 20
    for seed in SEEDS:
        generator = torch.Generator("cpu").manual_seed(seed)
        expected = torch.randn(shape, generator=generator).numpy()
        actual = randn(shape, seed)
        assert actual.dtype == np.float32
        assert np.abs(actual - expected).max() <= 1e-6, seed


def test_too_few_values() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        randn((3, 5), 0)
