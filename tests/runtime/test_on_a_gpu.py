"""The pipeline where work is queued: on the fake CUDA, whose streams are as late as they may be.

What it draws is compared bit by bit with the same graphs on the CPU.
"""

from __future__ import annotations

import gc
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_gpu import FakeTensorRT, QueuedSession, install_fake
from models.make import make
from msgspec.structs import replace

from sd35_trt.errors import Cancelled, OutOfMemory, Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle, write_manifest
from sd35_trt.runtime import Pipeline, Step
from sd35_trt.runtime.job import Job
from sd35_trt.runtime.sessions import tensorrt as tensorrt_session

Opened = list[tuple[str, int | None]]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fake(monkeypatch)


@pytest.fixture(scope="module")
def bare_bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that does not know its engines' memory: budgets count the bytes of weights."""
    out = tmp_path_factory.mktemp("bare") / "bundle"
    shutil.copytree(tiny_bundle, out)
    manifest = Bundle.open(out).manifest
    components = tuple(
        replace(c, activation_bytes=None, allocated_bytes=None) for c in manifest.components
    )
    write_manifest(out, replace(manifest, components=components))
    return out


def on_gpu(
    root: Path,
    fake: FakeCuda,
    recordable: bool = True,
    before_open: Callable[[str], None] = lambda name: None,
    **arguments: Any,
) -> Pipeline:
    """A pipeline on the fake; sessions note what was opened and closed.

    Args:
        before_open: called with the name of each component that is about to be opened.
    """
    log: Opened = []

    class Session(QueuedSession):
        def close(self) -> None:
            log.append((f"-{self._component.name}", None))
            super().close()

    def open_session(bundle: Any, component: Any, device: Any, options: Any) -> Session:
        before_open(component.name)
        session = Session(fake, bundle, component, device)
        session.recordable = recordable
        log.append((component.name, options.held_bytes))
        return session

    pipe = Pipeline(Bundle.open(root), open_session=open_session, device="cuda", **arguments)
    pipe.log = log  # type: ignore[attr-defined]
    return pipe


def denoised_by_step(pipe: Pipeline, wanted: Callable[[int], bool], **request: Any) -> Any:
    """The result, and by step what a callback fetched of the steps that it wanted."""
    seen: dict[int, np.ndarray] = {}

    def on_step(step: Step) -> None:
        if wanted(step.index):
            seen[step.index] = step.denoised.copy()

    return pipe.generate(**request, callback=on_step), seen


def equal(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(one.latents, other.latents)
    np.testing.assert_array_equal(one.images, other.images)


REQUESTS: tuple[dict[str, Any], ...] = (
    {"prompt": "a red star", "seed": 3, "steps": 6},
    {"prompt": "a red star", "seed": 4, "steps": 5},
    {"prompt": ["two blue squares", "a green circle"], "seed": 5, "steps": 6, "negative": "red"},
    {"prompt": "a red star", "seed": 3, "steps": 6, "size": (192, 128), "sampler": "dpmpp-2m"},
    {"prompt": "a red star", "seed": 3, "steps": 1},
    {"prompt": "a red star", "seed": 3, "steps": 2, "guidance": 1.0},
    {"prompt": "a pink heart", "seed": 9, "steps": 6},
)


@pytest.mark.parametrize("recordable", [True, False])
def test_it_draws_what_the_cpu_draws(tiny_bundle: Path, fake: FakeCuda, recordable: bool) -> None:
    with Pipeline.load(tiny_bundle) as cpu, on_gpu(tiny_bundle, fake, recordable) as gpu:
        for request in REQUESTS:
            equal(gpu.generate(**request), cpu.generate(**request))
        assert ("cudaGraphLaunch" in fake.calls) == recordable
        source = cpu.generate(**REQUESTS[0]).images[0]
        request = {**REQUESTS[0], "image": source, "strength": 0.5}
        equal(gpu.generate(**request), cpu.generate(**request))


@pytest.mark.parametrize("recordable", [True, False])
def test_denoised_is_that_of_the_step_that_is_looked_at(
    tiny_bundle: Path, fake: FakeCuda, recordable: bool
) -> None:
    with Pipeline.load(tiny_bundle) as cpu, on_gpu(tiny_bundle, fake, recordable) as gpu:
        for request in REQUESTS:
            _, expected = denoised_by_step(cpu, lambda _: True, **request)
            for wanted in (lambda _: True, lambda index: index % 3 == 1):
                result, seen = denoised_by_step(gpu, wanted, **request)
                equal(result, cpu.generate(**request))
                assert set(seen) == {index for index in expected if wanted(index)}
                for index, denoised in seen.items():
                    np.testing.assert_array_equal(denoised, expected[index])


def test_text_of_another_length_is_recorded_anew(tiny_bundle: Path, fake: FakeCuda) -> None:
    low, high = Bundle.open(tiny_bundle).manifest.ranges.t5_tokens
    with Pipeline.load(tiny_bundle) as cpu, on_gpu(tiny_bundle, fake) as gpu:
        for tokens in (low, high, low):
            request = {**REQUESTS[0], "t5_tokens": tokens}
            equal(gpu.generate(**request), cpu.generate(**request))


def test_a_step_is_one_replay_and_nobody_waits(tiny_bundle: Path, fake: FakeCuda) -> None:
    with on_gpu(tiny_bundle, fake) as gpu:
        for _ in range(2):
            gpu.generate("a red star", steps=8)
        fake.calls.clear()
        gpu.generate("a red star", steps=8)
        launches = [i for i, call in enumerate(fake.calls) if call == "cudaGraphLaunch"]
        assert len(launches) == 8
        inside = fake.calls[launches[0] : launches[-1]]
        assert not [call for call in inside if call.endswith("Synchronize")]
        assert not [call for call in inside if "Malloc" in call or "Create" in call]
        # Into where the graph reads: modulation and constants; out of it: the latents.
        assert inside.count("cudaMemcpyAsync") == 3 * 7


def test_preloading_opens_each_engine_once_and_the_denoiser_beside_the_others(
    tiny_bundle: Path, fake: FakeCuda
) -> None:
    names = [component.name for component in Bundle.open(tiny_bundle).manifest.components]
    threads: dict[str, threading.Thread] = {}

    def note(name: str) -> None:
        threads[name] = threading.current_thread()

    with on_gpu(tiny_bundle, fake, before_open=note) as gpu:
        gpu.preload()
        assert sorted(name for name, _ in gpu.log) == sorted(names)  # type: ignore[attr-defined]
        beside = [name for name in names if threads[name] is not threading.current_thread()]
        assert beside == ["denoiser"]
        gpu.preload()
        assert len(gpu.log) == len(names)  # type: ignore[attr-defined]


def test_what_fails_beside_the_others_is_told(tiny_bundle: Path, fake: FakeCuda) -> None:
    refused = {"denoiser"}

    def refuse(name: str) -> None:
        if name in refused:
            raise OutOfMemory(f"no room for {name}", "load with a vram_budget")

    with on_gpu(tiny_bundle, fake, before_open=refuse) as gpu:
        with pytest.raises(OutOfMemory, match="no room for denoiser"):
            gpu.preload()
        refused.clear()
        assert len(gpu.generate("a red star", steps=2).images) == 1


def test_a_callback_sees_each_step_while_the_next_is_queued(
    tiny_bundle: Path, fake: FakeCuda
) -> None:
    pictures: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    queued: list[int] = []

    def look(step: Step) -> None:
        assert step.index == len(pictures)
        pictures.append(step.latents.copy())
        queued.append(fake.calls.count("cudaGraphLaunch"))

    with on_gpu(tiny_bundle, fake) as gpu:
        gpu.generate("a red star", steps=6)
        fake.calls.clear()
        result = gpu.generate("a red star", steps=6, callback=look)
    with Pipeline.load(tiny_bundle) as cpu:
        cpu.generate("a red star", steps=6, callback=lambda s: expected.append(s.latents.copy()))
    np.testing.assert_array_equal(np.stack(pictures), np.stack(expected))
    np.testing.assert_array_equal(pictures[-1], result.latents)
    assert queued == [2, 3, 4, 5, 6, 6], "one step ahead"


def test_cancelling_stops_the_loop(tiny_bundle: Path, fake: FakeCuda) -> None:
    with Pipeline.load(tiny_bundle) as cpu, on_gpu(tiny_bundle, fake) as gpu:
        gpu.generate("a red star", steps=8)
        fake.calls.clear()
        with pytest.raises(Cancelled, match="after step 2 of 8"):
            gpu.generate("a red star", steps=8, callback=lambda s: s.index < 1)
        assert fake.calls.count("cudaGraphLaunch") == 3
        equal(gpu.generate("a red star", steps=8), cpu.generate("a red star", steps=8))


def test_requests_drawn_together(tiny_bundle: Path, fake: FakeCuda) -> None:
    with Pipeline.load(tiny_bundle) as cpu, on_gpu(tiny_bundle, fake) as gpu:
        jobs = [Job(gpu.request("a red star", seed=s, steps=4)) for s in (1, 2)]
        gpu.draw(jobs)
        alone = [cpu.generate("a red star", seed=s, steps=4) for s in (1, 2)]
        for job, other in zip(jobs, alone, strict=True):
            assert not isinstance(job.outcome, Exception)
            np.testing.assert_allclose(job.outcome.latents, other.latents, atol=2e-5)


def test_an_engine_that_fails_leaves_the_pipeline_usable(
    tiny_bundle: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = QueuedSession.run
    failures = [3]

    def fail(self: QueuedSession, inputs: Any, outputs: Any) -> None:
        if self._component.name == "denoiser":
            failures[0] -= 1
            if failures[0] == 0:
                raise Sd35Error("denoiser failed")
        run(self, inputs, outputs)

    monkeypatch.setattr(QueuedSession, "run", fail)
    with Pipeline.load(tiny_bundle) as cpu, on_gpu(tiny_bundle, fake) as gpu:
        with pytest.raises(Sd35Error, match="denoiser failed"):
            gpu.generate("a red star", steps=6)
        for _ in range(2):
            equal(gpu.generate("a red star", steps=6), cpu.generate("a red star", steps=6))


def test_loading_and_closing_leaves_nothing(tiny_bundle: Path, fake: FakeCuda) -> None:
    for i in range(200):
        with on_gpu(tiny_bundle, fake) as gpu:
            if i % 50 == 0:
                gpu.generate("a red star", steps=4)
            elif i % 10 == 0:
                gpu.preload()
    gc.collect()
    assert fake.used == 0
    assert fake.alive == {**dict.fromkeys(fake.alive, 0), "stream": 1}


def test_tensorrt_draws(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The whole of a bundle for Ada, with the graphs that its plans stand for."""
    monkeypatch.setenv("SD35_TRT_CACHE", str(tmp_path))
    fake = install_fake(monkeypatch)
    ada = make(tmp_path / "ada", tmp_path / "stages", "ada")
    library = FakeTensorRT("tensorrt-rtx", fake, ada, tiny_bundle)
    monkeypatch.setattr(tensorrt_session, "load_library", lambda flavour: library)
    with Pipeline.load(tiny_bundle) as cpu, Pipeline.load(ada) as gpu:
        for request in REQUESTS[:3]:
            equal(gpu.generate(**request), cpu.generate(**request))
    gc.collect()
    assert fake.used == 0


# Residency.


def weights(bundle: Path) -> dict[str, int]:
    return {c.name: c.weight_bytes for c in Bundle.open(bundle).manifest.components}


CONTEXT = 400_000_000


def budget(bundle: Path, share: float) -> int:
    """Between the least that works and what holds everything."""
    sizes = weights(bundle)
    return CONTEXT + int(max(sizes.values()) + share * (sum(sizes.values()) - max(sizes.values())))


def test_without_a_budget_engines_stay(tiny_bundle: Path, fake: FakeCuda) -> None:
    with on_gpu(tiny_bundle, fake) as gpu:
        for _ in range(2):
            gpu.generate("a red star", steps=2)
        assert [name for name, _ in gpu.log] == [  # type: ignore[attr-defined]
            "clip_l", "clip_g", "t5", "conditioner", "denoiser", "vae_decoder"
        ]  # fmt: skip
        report = gpu.memory()
        assert {n for n, e in report.engines.items() if e.open} == {*weights(tiny_bundle)} - {
            "vae_encoder"
        }
        assert {e.kind for e in report.engines.values()} == {"resident"}
        assert report.device.used == fake.used
        assert report.device.peak >= report.device.used


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_budget_is_kept_to(bare_bundle: Path, fake: FakeCuda, share: float) -> None:
    limit = budget(bare_bundle, share)
    with Pipeline.load(bare_bundle) as cpu:
        expected = [cpu.generate(**request) for request in REQUESTS[:3]]
    with on_gpu(bare_bundle, fake, vram_budget=limit) as gpu:
        start = fake.used
        most = [0]
        for request, other in zip(REQUESTS[:3], expected, strict=True):
            equal(gpu.generate(**request), other)
            weight_bytes = sum(e.weight_bytes for e in gpu.memory().engines.values() if e.open)
            most[0] = max(most[0], weight_bytes)
        report = gpu.memory()
        assert report.budget == limit
        assert report.planned_peak <= limit
        assert most[0] <= limit - CONTEXT
        opened = [name for name, _ in gpu.log if name == "denoiser"]  # type: ignore[attr-defined]
        kinds = {e.kind for e in report.engines.values()}
        assert kinds == ({"resident"} if share == 1.0 else kinds | {"loaded"})
        assert len(opened) == (1 if report.engines["denoiser"].kind == "resident" else 3)
    assert fake.used <= start


def test_a_budget_without_working_memory_is_noted(
    tiny_bundle: Path, bare_bundle: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    logger = logging.getLogger("sd35_trt")
    monkeypatch.setattr(logger, "warning", lambda text, *rest: notes.append(text % rest))
    on_gpu(bare_bundle, fake).close()
    on_gpu(tiny_bundle, fake, vram_budget=1 << 30).close()
    Pipeline.load(bare_bundle, vram_budget="1GiB").close()
    assert not notes
    on_gpu(bare_bundle, fake, vram_budget=1 << 30).close()
    (note,) = notes
    assert "vram_budget counts their weights alone" in note


def test_what_engines_work_with_is_planned_for(
    tiny_bundle: Path, bare_bundle: Path, fake: FakeCuda
) -> None:
    def planned(bundle: Path, pixels: int) -> int:
        with on_gpu(bundle, fake) as gpu:
            gpu.generate("a red star", steps=2, size=(pixels, pixels))
            return gpu.memory().planned_peak

    components = {c.name: c for c in Bundle.open(tiny_bundle).manifest.components}
    weight_bytes = sum((c.allocated_bytes or 0) - c.weight_bytes for c in components.values())
    works = {name: c.activation_bytes or 0 for name, c in components.items()}
    # Both prompts, of up to eight; one picture of up to four, and of up to 192 pixels a side.
    text = works["t5"] * 2 / 8
    for pixels in (128, 192):
        share = (pixels / 192) ** 2 / 4
        # The denoiser keeps what it works with.
        most = share * works["denoiser"] + max(text, share * works["vae_decoder"])
        more = planned(tiny_bundle, pixels) - planned(bare_bundle, pixels)
        assert more == pytest.approx(weight_bytes + most, rel=1e-6)


def test_the_planned_peak_is_that_of_requests(
    bare_bundle: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a plan without working memory, where more could stay."""
    whole = sum(weights(bare_bundle).values())
    monkeypatch.setattr(
        "sd35_trt.runtime.memory_plan.working_bytes",
        lambda component, dims: whole // 2 if dims and component.name == "denoiser" else 0,
    )
    with on_gpu(bare_bundle, fake, vram_budget=CONTEXT + whole) as gpu:
        gpu.generate("a red star", steps=2)
        report = gpu.memory()
    sizes = {name: engine.weight_bytes for name, engine in report.engines.items()}
    stays = sum(sizes[name] for name, e in report.engines.items() if e.kind == "resident")
    come = [size for name, size in sizes.items() if report.engines[name].kind == "loaded"]
    # What the denoiser works with stays its own.
    assert report.planned_peak == CONTEXT + whole // 2 + stays + max(come)
    assert report.planned_peak < CONTEXT + whole


def test_weights_in_memory_never_exceed_the_budget(
    bare_bundle: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every moment, engines that are opened ahead included."""
    limit = budget(bare_bundle, 0.3)
    weight_bytes, peak = [0], [0]
    init, close = QueuedSession.__init__, QueuedSession.close

    def opened(self: QueuedSession, fake: Any, bundle: Any, component: Any, device: Any) -> None:
        init(self, fake, bundle, component, device)
        weight_bytes[0] += component.weight_bytes
        peak[0] = max(peak[0], weight_bytes[0])

    def closed(self: QueuedSession) -> None:
        close(self)
        weight_bytes[0] -= self._component.weight_bytes

    monkeypatch.setattr(QueuedSession, "__init__", opened)
    monkeypatch.setattr(QueuedSession, "close", closed)
    with on_gpu(bare_bundle, fake, vram_budget=limit) as gpu:
        for seed in range(3):
            gpu.generate(f"star {seed}", steps=2, seed=seed)
    assert 0 < peak[0] <= limit - CONTEXT
    assert weight_bytes[0] == 0


def test_a_repeated_prompt_loads_no_text_encoder(bare_bundle: Path, fake: FakeCuda) -> None:
    with on_gpu(bare_bundle, fake, vram_budget=budget(bare_bundle, 0.0)) as gpu:
        gpu.generate("a red star", steps=2)
        gpu.log.clear()  # type: ignore[attr-defined]
        gpu.generate("a red star", steps=2, seed=5)
        names = {name.strip("-") for name, _ in gpu.log}  # type: ignore[attr-defined]
        assert not names & {"clip_l", "clip_g", "t5"}


def test_more_steps_than_the_conditioner_computes_at_once(
    bare_bundle: Path, fake: FakeCuda
) -> None:
    """It has to make room for the denoiser, and is not loaded again in between."""
    request = {"prompt": "a red star", "steps": 70}
    with on_gpu(bare_bundle, fake, vram_budget=budget(bare_bundle, 0.0)) as gpu:
        result = gpu.generate(**request)
        names = [name for name, _ in gpu.log]  # type: ignore[attr-defined]
        assert names.count("conditioner") == names.count("denoiser") == 1
    with Pipeline.load(bare_bundle) as cpu:
        equal(result, cpu.generate(**request))


def test_a_budget_too_small_names_the_smallest(tiny_bundle: Path, fake: FakeCuda) -> None:
    with pytest.raises(OutOfMemory) as caught:
        on_gpu(tiny_bundle, fake, vram_budget=100 << 20)
    words = str(caught.value)
    assert "does not fit in 104.9 MB at this size — the smallest vram_budget for it is" in words
    smallest = int(float(words.split()[-2]) * 1e6)
    with on_gpu(tiny_bundle, fake, vram_budget=smallest) as gpu:
        gpu.generate("a red star", steps=2)
    assert fake.used == 0


def test_budgets_as_text(tiny_bundle: Path) -> None:
    with Pipeline.load(tiny_bundle, vram_budget="1GiB") as pipe:
        assert pipe.memory().budget == 1 << 30
        pipe.generate("a red star", steps=2)
        assert pipe.memory().engines["denoiser"].open
    with pytest.raises(UsageError, match="'lots' is not a number of bytes"):
        Pipeline.load(tiny_bundle, vram_budget="lots")


def test_the_cpu_keeps_to_a_budget_too(bare_bundle: Path) -> None:
    sizes = weights(bare_bundle)
    with Pipeline(Bundle.open(bare_bundle), vram_budget=max(sizes.values()) + 1000) as pipe:
        result = pipe.generate("a red star", steps=3)
        assert [n for n, e in pipe.memory().engines.items() if e.open] == ["vae_decoder"]
    with Pipeline.load(bare_bundle) as other:
        equal(result, other.generate("a red star", steps=3))
