"""Graphs that ONNX Runtime optimized are kept for the next load, and draw the same."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.sessions import optimized_graphs

DRAWN: dict[str, Any] = {"steps": 2, "size": (64, 64), "seed": 3}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SD35_TRT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def levels(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """How far each graph was optimized when it was opened."""
    seen: list[Any] = []
    opened = ort.InferenceSession

    def watched(model: Any, options: ort.SessionOptions, *more: Any) -> Any:
        seen.append(options.graph_optimization_level)
        return opened(model, options, *more)

    monkeypatch.setattr(ort, "InferenceSession", watched)
    return seen


def draw(bundle: Path) -> np.ndarray:
    with Pipeline.load(bundle, threads=1) as pipe:
        result = pipe.generate("a red star", **DRAWN)
        image = pipe.generate("a blue ring", image=result.images[0], **DRAWN)
        return np.concatenate([result.latents, image.latents])


@pytest.mark.parametrize("policy", ["fp32", "fp8", "int8-weight"])
def test_a_kept_graph_draws_the_same(
    policy: str, make_bundle: Any, cache: Path, levels: list[Any]
) -> None:
    bundle = make_bundle(policy=policy)
    first = draw(bundle)
    kept = {path.name: path.read_bytes() for path in (cache / "optimized").iterdir()}
    assert len(kept) == len(levels) == 7
    assert set(levels) == {ort.GraphOptimizationLevel.ORT_ENABLE_ALL}
    levels.clear()
    assert np.array_equal(draw(bundle), first)
    assert set(levels) == {ort.GraphOptimizationLevel.ORT_DISABLE_ALL}
    assert {path.name: path.read_bytes() for path in (cache / "optimized").iterdir()} == kept


def test_a_damaged_one_is_made_anew(mini_bundle: Path, cache: Path, levels: list[Any]) -> None:
    first = draw(mini_bundle)
    files = sorted((cache / "optimized").iterdir())
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"no graph")
    files[2].chmod(0o666)  # may be another's
    levels.clear()
    assert np.array_equal(draw(mini_bundle), first)
    assert levels.count(ort.GraphOptimizationLevel.ORT_ENABLE_ALL) == 3
    files[2].chmod(0o600)
    levels.clear()
    draw(mini_bundle)
    assert set(levels) == {ort.GraphOptimizationLevel.ORT_DISABLE_ALL}


def test_another_processor_has_its_own(
    mini_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(mini_bundle)
    monkeypatch.setattr(optimized_graphs, "_processor", lambda: "another")
    draw(mini_bundle)
    assert len(list((cache / "optimized").iterdir())) == 14


def test_where_nothing_can_be_kept(
    mini_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is opened as ever, in silence: little is lost."""
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("sd35_trt"), "warning", lambda *w: said.append(w[0]))
    cache.write_text("a file in its place")
    draw(mini_bundle)
    for name in ("SD35_TRT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "home", no_home)
        draw(mini_bundle)
    assert not said


@pytest.mark.parametrize("folder", ["missing", "full"])
def test_without_room_for_temporary_files(
    folder: str, mini_bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose disk cannot be written to, but for the cache."""
    first = draw(mini_bundle)
    for file in (cache / "optimized").iterdir():
        file.unlink()
    here = "/dev/full" if folder == "full" else str(tmp_path / "missing" / "more")
    if folder == "missing":
        monkeypatch.setattr("tempfile.tempdir", here)
    else:  # ONNX Runtime itself cannot write the file
        monkeypatch.setattr(optimized_graphs, "Path", lambda *parts: Path("/dev/full/x"))
    assert np.array_equal(draw(mini_bundle), first)
    assert not list((cache / "optimized").iterdir())


def test_a_large_component_is_read_from_the_bundle(
    mini_bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimized_graphs, "_LARGEST", 1 << 20)
    draw(mini_bundle)
    assert 0 < len(list((cache / "optimized").iterdir())) < 7
