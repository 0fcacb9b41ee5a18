from __future__ import annotations

import importlib.util

import numpy as np
import pytest

from sd35_trt.quality import metrics


def test_psnr_and_ssim_of_equal_pictures() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)
    assert metrics.squared_error(image, image) == 0.0
    assert metrics.psnr(0.0) is None
    assert metrics.ssim(image, image) == 1.0


def test_psnr_and_ssim_fall_with_noise() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(40, 216, (32, 48, 3), np.uint8)
    assert metrics.psnr(metrics.squared_error(image + 10, image)) == pytest.approx(
        20 * np.log10(25.5)
    )
    # The difference does not wrap around.
    assert metrics.squared_error(image, image + 10) == 100.0
    similar = [
        metrics.ssim((image + rng.normal(0, s, image.shape)).clip(0, 255).astype(np.uint8), image)
        for s in (2, 10, 40)
    ]
    assert 1 > similar[0] > similar[1] > similar[2] > 0


def test_relative_errors_over_some_axes() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(4, 3, 2, 5, 5))
    value = reference + rng.normal(size=reference.shape)
    actual = metrics.relative_errors(value, reference, (2, 3, 4))
    assert actual.shape == (4, 3)
    expected = np.linalg.norm(value[1, 2] - reference[1, 2]) / np.linalg.norm(reference[1, 2])
    assert actual[1, 2] == pytest.approx(expected)


def test_lpips_says_why_it_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "lpips" else find("sys")
    )
    assert metrics.load_lpips() == (None, "lpips is not installed")
