"""libsd35 under sanitizers: threads on a fake engine, memory and behaviour on the real one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cpp_build import ROOT, built, run_program

from sd35_trt.runtime import Pipeline


def test_threads_draw_what_they_draw_alone(mini_bundle: Path) -> None:
    run_program(built() / "tests" / "stress", mini_bundle)


@pytest.mark.nightly
def test_no_race(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a fake engine: the sanitizer reports falsely of libraries that it does not know."""
    build = built("tsan")
    monkeypatch.setenv("SD35_BACKENDS", str(build / "tests" / "fake"))
    run_program(build / "tests" / "units")
    run_program(build / "tests" / "stress", mini_bundle)
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        peak = pipe.memory().planned_peak
    # Engines come and go, some opened ahead in threads of their own.
    run_program(build / "tests" / "stress", mini_bundle, "cpu", peak * 6 // 10)


@pytest.mark.nightly
def test_no_undefined_behaviour(
    mini_bundle: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = built("asan")
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=1:strict_string_checks=1")
    run_program(build / "tests" / "units")
    run_program(build / "tests" / "stress", tiny_bundle)
    cases = ROOT / "cpp/tests/cases.json"
    run_program(build / "tests" / "conformance", cases, "fp32", mini_bundle, tmp_path)
    assert any(os.scandir(tmp_path))
