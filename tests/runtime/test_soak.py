"""The soak of benchmarks/soak.py in short."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engines import FakeEngines

from sd35_trt.runtime import Pipeline

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("soak", "soak_requests"):
        sys.modules.pop(name, None)


@pytest.mark.nightly
@pytest.mark.usefixtures("benchmarks")
def test_sixty_requests(tiny_bundle: Path, make_bundle: Callable[..., Path]) -> None:
    from soak import make_requests, soak, table

    half = make_bundle(policy="half")
    figures = soak((tiny_bundle, half), 60, steps=1, callers=8)
    assert figures["wrong"] == []
    assert sum(figures["outcomes"].values()) == 60
    kinds = [request.kind for request in make_requests(60, 1)]
    assert set(kinds) == {"draw", "extreme", "cancel", "timeout", "callback", "invalid"}
    assert figures["outcomes"]["draw: drawn"] == kinds.count("draw")
    assert figures["outcomes"]["invalid: refused"] == kinds.count("invalid")
    assert "60 requests from 8 threads" in table(figures)[0]


@pytest.mark.usefixtures("benchmarks")
def test_two_thousand_requests_on_stub_engines(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is mixed with them, normal requests equal their single ones, and the pool lives."""
    import soak
    from soak_requests import make_requests

    def load(path: Path, **arguments: Any) -> Pipeline:
        return FakeEngines().pipeline(path, fallback=path)

    monkeypatch.setattr(soak.Pipeline, "load", load)
    requests = make_requests(2000, 2)
    kinds = Counter(request.kind for request in requests)
    figures = soak.soak((tiny_bundle, tiny_bundle), len(requests), steps=2, callers=16)
    assert figures["wrong"] == []
    outcomes = figures["outcomes"]
    assert sum(outcomes.values()) == 2000
    assert outcomes["draw: drawn"] == kinds["draw"]
    assert outcomes["extreme: drawn"] == kinds["extreme"]
    assert outcomes["invalid: refused"] == kinds["invalid"]
    assert (
        outcomes["callback: its own error"]
        + outcomes["callback: called back"]
        + outcomes["callback: cancelled"]
        == kinds["callback"]
    )


@pytest.mark.usefixtures("benchmarks")
def test_a_swapped_result_is_found(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import soak

    draw = Pipeline.draw

    def swap(self: Pipeline, jobs: list) -> None:
        draw(self, jobs)
        if len(jobs) > 1:
            jobs[0].outcome, jobs[1].outcome = jobs[1].outcome, jobs[0].outcome

    monkeypatch.setattr(Pipeline, "draw", swap)
    wrong = soak.soak((tiny_bundle, tiny_bundle), 40, steps=1, callers=8)["wrong"]
    assert any("dB from what its request gives alone" in line for line in wrong)
