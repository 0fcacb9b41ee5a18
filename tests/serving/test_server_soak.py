"""The load of benchmarks/serve_soak.py and benchmarks/serve.py: in short, and at night in full."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in (
        "serve_soak",
        "serve",
        "serve_targets",
        "server_process",
        "soak",
        "triton_client",
        "triton_process",
    ):
        sys.modules.pop(name, None)


def soaked(bundle: Path, count: int, connections: int) -> dict[str, Any]:
    from serve_soak import make_requests, soak

    figures = soak(bundle, count, 2, connections)
    assert figures["wrong"] == []
    kinds = [request.kind for request in make_requests(count, 2)]
    endings = {"draw": "drawn", "stream": "drawn", "leave": "left",
               "malformed": "refused", "oversize": "refused"}  # fmt: skip
    assert figures["outcomes"] == {
        f"{kind}: {ending}": kinds.count(kind) for kind, ending in sorted(endings.items())
    }
    return figures


def test_a_hundred_requests(tiny_bundle: Path) -> None:
    soaked(tiny_bundle, 100, 8)


@pytest.mark.nightly
def test_two_thousand_requests(mini_bundle: Path) -> None:
    from serve_soak import table

    figures = soaked(mini_bundle, 2000, 32)
    text, well = table(figures)
    assert well, text


def test_a_swapped_picture_is_found(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import serve_soak

    right = serve_soak._pixels
    monkeypatch.setattr(serve_soak, "_pixels", lambda *sent: np.roll(right(*sent), 1))
    wrong = serve_soak.soak(tiny_bundle, 20, 1, 2)["wrong"]
    assert any("another picture" in line for line in wrong)


def test_the_load_generator_measures(tiny_bundle: Path) -> None:
    from serve import measure, percentiles, table

    figures = measure(tiny_bundle, 1, "64x64", [0.2, 4.0], 0.5, 1, 20)
    slow, fast = figures["open_loop"]
    for loop in (slow, fast):
        assert sum(loop["statuses"].values()) == loop["requests"]
        assert set(loop["statuses"]) <= {"200", "429"}
        assert loop["latency"]["p50"] <= loop["latency"]["p99"] <= loop["latency"]["max"]
    assert "429" in fast["statuses"]
    assert min(figures["overhead"]["server_ms"], figures["overhead"]["pool_ms"]) > 0
    assert "64x64, 1 steps" in table(figures)[0]
    assert percentiles([]) == {}
    assert percentiles([3.0, 1.0, 2.0]) == {"p50": 2.0, "p95": 3.0, "p99": 3.0, "max": 3.0}
