"""Stages that are made at the same time: how many, what a failure does, what comes out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sd35_trt.build import BuildOptions, build, concurrency
from sd35_trt.build.concurrency import count_jobs, run_stages
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.engines.child_process import run_in_child
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import checkpoint_path
from sd35_trt.progress import silent
from sd35_trt.store.cache import StageCache
from sd35_trt.store.stages import Stage


def _stage(name: str, run: Callable[[Path, Any], None]) -> Stage:
    return Stage(name, {}, (), run)


def test_as_many_as_processors_and_memory_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(concurrency, "_available_memory", lambda: 10)
    assert count_jobs([1] * 7) == 4
    assert count_jobs([1] * 3) == 3
    assert count_jobs([4] * 7) == 2
    assert count_jobs([1, 1, 9, 1]) == 2
    assert count_jobs([99, 99]) == 1
    assert count_jobs([]) == 1
    assert count_jobs([99, 99], wish=2) == 2
    monkeypatch.setattr(concurrency.os, "sched_getaffinity", lambda _: range(2))
    assert count_jobs([1] * 7) == 1


def test_the_memory_of_this_machine() -> None:
    assert 1 << 20 < concurrency._available_memory() < 1 << 50


def test_they_run_at_the_same_time(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)

    def run(out: Path, report: Any) -> None:
        barrier.wait()
        (out / "file").write_text("made")

    stages = [_stage(name, run) for name in "abc"]
    folders = run_stages(StageCache(tmp_path), stages, silent, 3)
    assert list(folders) == ["a", "b", "c"]
    assert {(folder / "file").read_text() for folder in folders.values()} == {"made"}


def _sleeps(started: Path, report: Any) -> None:
    import time

    started.touch()
    report(0.5, "asleep")
    time.sleep(1000)


def test_a_failure_stops_the_others(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def fail(out: Path, report: Any) -> None:
        while not started.exists():
            pass
        raise Sd35Error("it does not compile")

    def sleep(out: Path, report: Any) -> None:
        run_in_child("sleeping", _sleeps, started, report)

    stages = [_stage("fails", fail), _stage("sleeps", sleep)]
    with pytest.raises(Sd35Error, match="it does not compile"):
        run_stages(StageCache(tmp_path / "cache"), stages, silent, 2)
    assert not [p for p in tmp_path.glob("cache/*/*") if not p.name.startswith(".")]


def test_an_exporter_in_a_child_writes_the_same(
    stage_cache: Path, tmp_path: Path, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at the same time, of what is not in the cache; the rest is."""
    cache = tmp_path / "cache"
    for folder in stage_cache.iterdir():
        if folder.name not in ("clip_l", "vae_encoder"):
            (cache / folder.name).parent.mkdir(exist_ok=True)
            (cache / folder.name).symlink_to(folder)
    notes: set[tuple[str, str]] = set()
    out = build(
        BuildOptions(out=tmp_path / "bundle", cache_dir=cache, jobs=2),
        lambda stage, done, total, note="": notes.add((stage, note)),
    )
    assert {("clip_l", "done"), ("vae_encoder", "done"), ("t5", "unchanged")} <= notes
    one, other = (Bundle.open(path).manifest.components for path in (out, mini_bundle))
    assert one == other


def test_a_checkpoint_in_one_file_is_opened_again_elsewhere(tmp_path: Path) -> None:
    import pickle

    checkpoint = look(ModelOptions(str(checkpoint_path()))).checkpoint
    assert pickle.loads(pickle.dumps(checkpoint)).root == checkpoint.root  # noqa: S301
