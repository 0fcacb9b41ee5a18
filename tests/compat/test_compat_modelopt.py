"""modelopt's quantizers behave as we rely on."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sd35_trt.calibration.quantizers import insert_quantizers
from sd35_trt.compat.modelopt import (
    collect_statistics,
    collected_amax,
    is_range_error,
    quantizers,
    restored_functions,
)


def quantized_linear() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    insert_quantizers(model, ["0.input_quantizer"])
    return model


def test_a_linear_has_these_quantizers() -> None:
    modules = quantizers(quantized_linear())
    assert {"0.input_quantizer", "0.weight_quantizer"} <= modules.keys()
    assert [name for name, quantizer in modules.items() if quantizer.is_enabled] == [
        "0.input_quantizer"
    ]


def test_statistics_are_the_largest_magnitude_of_what_passed() -> None:
    model = quantized_linear()
    quantizer = quantizers(model)["0.input_quantizer"]
    collect_statistics(model)
    assert collected_amax(quantizer) is None
    for value in (1.0, -7.0, 3.0):
        model(torch.full((2, 4), value))
    assert collected_amax(quantizer) == 7.0


def test_values_that_are_not_finite_are_known_by_the_error() -> None:
    model = quantized_linear()
    collect_statistics(model)
    with pytest.raises(AssertionError) as caught:
        model(torch.full((2, 4), torch.nan))
    assert is_range_error(caught.value)
    assert not is_range_error(AssertionError("something else"))


def test_functions_are_restored_after_an_error() -> None:
    before = (torch.bmm, torch.baddbmm, F.scaled_dot_product_attention)

    def swap() -> None:
        torch.bmm = F.scaled_dot_product_attention = None  # type: ignore[assignment]
        raise ValueError

    with pytest.raises(ValueError), restored_functions():  # noqa: PT011
        swap()
    assert (torch.bmm, torch.baddbmm, F.scaled_dot_product_attention) == before
