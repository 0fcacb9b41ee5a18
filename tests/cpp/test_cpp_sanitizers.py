"""libsd35 under sanitizers: threads on a fake engine, memory and behaviour on the real one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from cpp_adapters import DAMAGED, adapters_of_the_cases
from cpp_build import ROOT, built, bundle_options, run_program

from sd35_trt.runtime import Pipeline


def test_threads_draw_what_they_draw_alone(mini_bundle: Path) -> None:
    run_program(built() / "tests" / "stress", mini_bundle)


@pytest.fixture(scope="module")
def everything(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini with all features."""
    return make_bundle(**bundle_options("everything", tmp_path_factory.mktemp("nets")))


@pytest.mark.nightly
def test_no_race(
    mini_bundle: Path, everything: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake engine: the sanitizer reports falsely of libraries that it does not know."""
    build = built("tsan")
    monkeypatch.setenv("SD35_BACKENDS", str(build / "tests" / "fake"))
    run_program(build / "tests" / "units")
    run_program(build / "tests" / "stress", mini_bundle)
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        peak = pipe.memory().planned_peak
    # Engines come and go, some opened ahead in threads of their own.
    run_program(build / "tests" / "stress", mini_bundle, "cpu", peak * 6 // 10)
    adapters = adapters_of_the_cases(everything, tmp_path)
    run_program(build / "tests" / "stress", everything, "cpu", 0, *adapters)


@pytest.mark.nightly
def test_no_undefined_behaviour(
    mini_bundle: Path,
    tiny_bundle: Path,
    everything: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build = built("asan")
    monkeypatch.setenv("ASAN_OPTIONS", "detect_leaks=1:strict_string_checks=1")
    run_program(build / "tests" / "units")
    run_program(build / "tests" / "stress", tiny_bundle)
    cases = ROOT / "cpp/tests/cases.json"
    adapters = adapters_of_the_cases(everything, tmp_path)
    for name, bundle, own in (("fp32", mini_bundle, []), ("everything", everything, adapters)):
        out = tmp_path / name
        out.mkdir()
        run_program(build / "tests" / "conformance", cases, name, bundle, out, *own)
        assert any(os.scandir(out))
    for number, (content, _) in enumerate(DAMAGED.values()):
        (tmp_path / str(number)).write_bytes(content)
    paths = json.dumps([str(tmp_path / str(number)) for number in range(len(DAMAGED))])
    refusals = json.loads(run_program(build / "tests" / "probe", "adapters", text=paths))
    assert len(refusals) == len(DAMAGED)
    weights = json.dumps(["(" * 10_000, "(a:1)" * 500, "((a):1e999)", "\\\\(" * 99])
    run_program(build / "tests" / "probe", "weights", text=weights)
