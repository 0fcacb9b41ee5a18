"""The benchmark of FP8 recipes, on small transformers."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

_BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "fp8_recipes.py"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(_BENCHMARK))


@pytest.mark.parametrize("structure", ["large-like", "medium-like"])
def test_the_policy_beats_the_default_recipe(structure: str, benchmark: dict[str, Any]) -> None:
    shape = benchmark["STRUCTURES"][structure]
    small = {**shape, "num_attention_heads": 3, "caption_projection_dim": 192,
             "joint_attention_dim": 256, "pooled_projection_dim": 160}  # fmt: skip
    model = benchmark["random_transformer"](small)
    calibration, evaluation = (benchmark["random_inputs"](model, 2, seed) for seed in (1, 2))
    row = benchmark["compare"](model, calibration, evaluation)
    assert 0.005 < row["policy"]["error"] < row["default"]["error"] < 0.5
    assert 0 < row["policy"]["layers"] < row["default"]["layers"]
    assert not hasattr(model.proj_out, "input_quantizer"), "the model given stays as it was"
