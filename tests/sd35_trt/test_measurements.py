"""Figures of the kinds of engine: the families' order follows them, and the build's hint."""

from __future__ import annotations

import pytest

from sd35_trt.backends import BACKENDS
from sd35_trt.measurements import faster_builder, measurements
from sd35_trt.policies import builtin_policies
from sd35_trt.targets import find_target, targets

PYTORCH = "torch"


@pytest.mark.parametrize("row", measurements(), ids=lambda row: f"{row.family}-{row.policy}")
def test_builders_are_in_the_order_of_their_figures(row) -> None:  # type: ignore[no-untyped-def]
    builders = list(targets()[row.family].builders)
    assert row.policy in builtin_policies()
    # ONNX Runtime builds for "cpu", and draws on a GPU too.
    assert set(row.ms) <= {*builders, "onnxruntime"}
    without_pytorch = [name for name in builders if BACKENDS[name].module != PYTORCH]
    figures = [row.ms[name] for name in without_pytorch if name in row.ms]
    assert figures == sorted(figures)
    assert without_pytorch == builders[: len(without_pytorch)]


def test_a_faster_one_is_named_with_its_figure() -> None:
    hopper = find_target("h100")
    line = faster_builder(hopper, "tensorrt", "fp8")
    assert line is not None
    assert "--builder inductor" in line
    assert "\n" not in line
    (row,) = (m for m in measurements() if (m.family, m.policy) == ("hopper", "fp8"))
    for name in ("tensorrt", "inductor"):
        assert f"{row.ms[name]:g} ms" in line


@pytest.mark.parametrize(
    ("target", "builder", "policy"),
    [("h100", "inductor", "fp8"), ("h100", "tensorrt", "fp32"), ("rtx4090", "tensorrt", "fp8")],
)
def test_nothing_is_said_where_nothing_faster_was_measured(
    target: str, builder: str, policy: str
) -> None:
    assert faster_builder(find_target(target), builder, policy) is None
