"""What TensorRT is told, and how it is heard, on stand-ins for the library."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.tensorrt import make_logger
from sd35_trt.components import COMPONENTS, runs_every_step
from sd35_trt.engines.builder import EngineOptions, ExportedComponent
from sd35_trt.engines.tensorrt import TensorRTBuilder
from sd35_trt.engines.tensorrt_callbacks import progress_monitor
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage, run_stage

TENSORRT = BACKENDS["tensorrt"]


def _component(name: str, tmp_path: Path) -> ExportedComponent:
    """A finished stage with the files of a component."""

    def write(out: Path, progress: Any) -> None:
        for file in ("model.onnx", "weights.data"):
            (out / file).write_bytes(name.encode())

    cache = StageCache(tmp_path)
    folder = run_stage(cache, Stage(name, {}, (), write), lambda *report: None)
    return cast(ExportedComponent, SimpleNamespace(name=name, folder=folder))


def test_what_runs_once_a_picture_is_compiled_quickly_unless_asked_otherwise(
    tmp_path: Path,
) -> None:
    assert TENSORRT.levels.keys() < COMPONENTS.keys()
    assert not any(map(runs_every_step, TENSORRT.levels))
    library = SimpleNamespace(__version__="10.6.0")

    def inputs(name: str, options: EngineOptions) -> Any:
        builder = TensorRTBuilder(TENSORRT, library, ("9.0",), options)
        stage = builder.stage(_component(name, tmp_path), {})
        return stage.inputs.get("optimization_level")

    usual, asked = EngineOptions(), EngineOptions(optimization_level=4)
    assert inputs("clip_g", usual) == usual.level(TENSORRT, "clip_g") == 1
    assert inputs("denoiser", usual) is usual.level(TENSORRT, "denoiser") is None
    assert inputs("clip_g", asked) == inputs("denoiser", asked) == 4
    assert EngineOptions().level(BACKENDS["tensorrt-rtx"], "clip_g") is None


def test_progress_is_reported_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution has a hundred thousand steps."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    reports: list[tuple[float, str]] = []
    library = SimpleNamespace(IProgressMonitor=type("Base", (), {"__init__": lambda self: None}))
    monitor = progress_monitor(library, lambda *report: reports.append(report))
    monitor.phase_start("Building", None, 1000)
    for step in range(1000):
        now += 0.001
        assert monitor.step_complete("Building", step)
    assert 8 <= len(reports) <= 12
    assert [fraction for fraction, _ in reports] == sorted(fraction for fraction, _ in reports)
    assert reports[-1][0] > 0.8


def test_what_a_library_says_in_detail_is_not_looked_at() -> None:
    severities = {"ERROR": 1, "WARNING": 2, "INFO": 3, "VERBOSE": 4, "__init__": lambda self: None}
    log = make_logger(SimpleNamespace(ILogger=type("Base", (), severities)))
    heard: list[str] = []
    log.on_message = heard.append
    for severity in (4, 3, 2, 1):
        log.log(severity, f"message of {severity}")
    assert heard == ["message of 3", "message of 2"]
    assert log.errors == ["message of 1"]
