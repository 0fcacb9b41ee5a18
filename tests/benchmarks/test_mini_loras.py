"""What FP8 costs with a LoRA is compared with what it costs without, caption by caption."""

from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_equal_losses_are_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import mini_loras

    plain = {"half": [True, True, True, False], "fp8": [True, False, True, True]}
    worse = {"half": [True, True, True, True], "fp8": [False, False, True, True]}
    assert mini_loras.differences(plain).tolist() == [0, -1, 0, 1]
    same = mini_loras.row(plain, plain)
    assert same["half"]["value"] == same["fp8"]["value"] == 0.75
    assert (same["difference"]["lost"], same["difference"]["gained"]) == (1, 1)
    assert same["difference against the first's"] == {"mean": 0, "low": 0, "high": 0}
    other = mini_loras.row(worse, plain)["difference against the first's"]
    assert other["mean"] == np.mean([-1, 0, 0, -1])
    assert other["low"] < other["mean"] < other["high"]
