"""libsd35 on a GPU that is the host's memory: pools, streams, copies and graphs, as late as CUDA
lets them be. What it draws is what the same engines draw on the CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cpp_build import built, library, run_program
from sd35_ctypes import Failure, Library, Pipe, StepView

from sd35_trt.runtime import Pipeline


def plugins(preset: str = "release") -> Path:
    folder = built(preset) / "tests" / "fake_gpu"
    if not folder.exists():
        pytest.skip("libsd35-cuda.so is not built: CUDA's headers are not installed")
    return folder


@pytest.fixture
def lib(monkeypatch: pytest.MonkeyPatch) -> Library:
    monkeypatch.setenv("SD35_BACKENDS", str(plugins()))
    return library()


@pytest.fixture
def gpu(lib: Library, mini_bundle: Path) -> Iterator[Pipe]:
    with Pipe(lib, mini_bundle, device="cuda") as pipe:
        yield pipe


@pytest.fixture
def cpu(lib: Library, mini_bundle: Path) -> Iterator[Pipe]:
    with Pipe(lib, mini_bundle, device="cpu") as pipe:
        yield pipe


def same(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(one.latents.view(np.uint32), other.latents.view(np.uint32))
    np.testing.assert_array_equal(one.images, other.images)


def test_pictures_are_those_of_the_cpu(gpu: Pipe, cpu: Pipe) -> None:
    """Shapes that come again, and others between them; texts of other lengths; pictures."""
    image = (np.arange(64 * 128 * 3) % 251).astype(np.uint8).reshape(64, 128, 3)
    requests: list[dict[str, Any]] = [
        {"steps": 1}, {"steps": 7}, {"steps": 7, "seed": 5}, {"steps": 7, "t5_tokens": 77},
        {"steps": 5, "size": (64, 64), "batch": 3}, {"steps": 7, "guidance": 1.0},
        {"steps": 5, "size": (192, 64)}, {"steps": 7}, {"steps": 40, "sampler": "dpmpp-2m"},
        {"steps": 6, "image": image, "strength": 0.5}, {"steps": 6, "batch": 4},
    ]  # fmt: skip
    for request in requests:
        same(gpu.generate("a star", **request), cpu.generate("a star", **request))


def test_a_callback_sees_each_steps_own_latents(gpu: Pipe, cpu: Pipe) -> None:
    def watched(pipe: Pipe) -> list[np.ndarray]:
        seen: list[np.ndarray] = []

        def watch(step: StepView) -> None:
            seen.append(np.ctypeslib.as_array(step.latents, tuple(step.shape)).copy())

        pipe.generate("a star", steps=6, callback=watch)
        return seen

    for mine, its in zip(watched(gpu), watched(cpu), strict=True):
        np.testing.assert_array_equal(mine, its)


def test_cancelling_leaves_nothing_behind(gpu: Pipe, cpu: Pipe) -> None:
    for last in (0, 1, 4):
        with pytest.raises(Failure) as cancelled:
            gpu.generate("a star", steps=9, callback=lambda step, last=last: step.index < last)
        assert cancelled.value.status == "cancelled"
        assert str(cancelled.value) == f"cancelled after step {last + 1} of 9"
    same(gpu.generate("a star", steps=9), cpu.generate("a star", steps=9))


def test_joined_requests(gpu: Pipe, cpu: Pipe) -> None:
    requests = [{"prompt": "a", "steps": 4}, {"prompt": ["b", "c"], "steps": 4, "guidance": 7.0}]
    for mine, its in zip(gpu.generate_joined(requests), cpu.generate_joined(requests), strict=True):
        same(mine, its)


def test_engines_come_and_go_within_a_budget(
    lib: Library, mini_bundle: Path, cpu: Pipe, gpu: Pipe
) -> None:
    gpu.generate("a star", steps=2)
    report, _ = gpu.memory()
    budget = 400_000_000 + (report["planned_peak"] - 400_000_000) * 7 // 10
    with Pipe(lib, mini_bundle, device="cuda:0", vram_budget=budget) as pipe:
        for request in ({"steps": 40}, {"steps": 3, "seed": 2}, {"steps": 40, "seed": 3}):
            same(pipe.generate("a star", **request), cpu.generate("a star", **request))
        _, engines = pipe.memory()
        assert {engine["kind"] for engine in engines.values()} == {"resident", "loaded"}


def test_working_memory_is_given_back_before_an_engine_loads(
    lib: Library, mini_bundle: Path
) -> None:
    """Within a budget: the plan counts it in the stages of the engines before alone."""
    trims = ctypes.CDLL(str(plugins() / "libsd35-cuda.so")).sd35_fake_trims
    for budget in (0, 4 << 30):
        before = trims()
        with Pipe(lib, mini_bundle, device="cuda", vram_budget=budget) as pipe:
            pipe.generate("a star", steps=2)
            _, engines = pipe.memory()
            opened = sum(engine["open"] for engine in engines.values())
            assert trims() - before == (opened if budget else 0)


def test_memory_is_given_back(lib: Library, mini_bundle: Path) -> None:
    for _ in range(3):
        with Pipe(lib, mini_bundle, device="cuda") as pipe:
            pipe.generate("a star", steps=3)
            report, _ = pipe.memory()
            # Nothing of the pipelines before this one.
            assert 0 < report["used"] <= report["peak"] < 100 << 20
            assert report["total"] == 8 << 30


def test_a_gpu_without_room(
    lib: Library, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pipe(lib, mini_bundle, device="cuda") as pipe:
        pipe.generate("a star", steps=2, size=(64, 64))
        monkeypatch.setenv("FAKE_GPU_BYTES", str(1 << 20))
        with pytest.raises(Failure, match=r"cuda:0 has no room for .* more — draw") as refused:
            pipe.generate("a star", steps=2, size=(192, 192), batch=4)
        assert refused.value.status == "out of memory"
        monkeypatch.delenv("FAKE_GPU_BYTES")
        assert len(pipe.generate("a star", steps=2).images) == 1


@pytest.mark.parametrize(
    ("gpus", "device", "words"),
    [(0, "cuda", "cuda:0 cannot be used: this machine has no NVIDIA driver — install the NVIDIA"),
     (1, "cuda:1", r"there is no cuda:1: this machine has 1 GPU\(s\) — use cuda")],
)  # fmt: skip
def test_no_such_gpu(
    gpus: int, device: str, words: str, lib: Library, mini_bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("FAKE_GPUS", str(gpus))
    with pytest.raises(Failure, match=words) as refused:
        Pipe(lib, mini_bundle, device=device)
    assert refused.value.status == "failed"


def test_gpus_without_their_plug_in(
    lib: Library, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD35_BACKENDS", str(tmp_path))
    with pytest.raises(Failure, match=r"GPUs need .*/libsd35-cuda.so, which is missing — build"):
        Pipe(lib, mini_bundle, device="cuda")


def test_threads_on_a_gpu(lib: Library, mini_bundle: Path) -> None:
    run_program(built() / "tests" / "stress", mini_bundle, "cuda")


@pytest.mark.nightly
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_a_gpu_under_sanitizers(
    preset: str, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD35_BACKENDS", str(plugins(preset)))
    stress = built(preset) / "tests" / "stress"
    run_program(stress, mini_bundle, "cuda")
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        peak = pipe.memory().planned_peak
    run_program(stress, mini_bundle, "cuda", 400_000_000 + peak * 14 // 10)
