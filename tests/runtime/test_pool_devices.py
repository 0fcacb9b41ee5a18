"""A pool with several devices: who draws what, what one fails to, and figures of each."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import PATIENCE, FakeEngines, overflow, same
from fake_gpu import QueuedSession, install_fake
from prometheus_client import CollectorRegistry

from sd35_trt.errors import OutOfMemory, Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.runtime import Pipeline, PipelinePool, Span, Step
from sd35_trt.runtime.job import Job
from sd35_trt.runtime.metrics import Metrics
from sd35_trt.runtime.pool_device import PoolDevice
from sd35_trt.runtime.ticket import Ticket
from sd35_trt.runtime.ticket_queue import TicketQueue

QUICK = {"steps": 3, "size": (64, 64)}
FIGURES = "sd35_trt_device_{}"


@pytest.fixture
def both() -> tuple[FakeEngines, FakeEngines]:
    """Engines of two devices, which wait before every step until the test lets them."""
    return FakeEngines(held=True), FakeEngines(held=True)


@pytest.fixture
def pool(both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path) -> Iterator[PipelinePool]:
    with PipelinePool({"a": [engines.pipeline(tiny_bundle) for engines in both]}) as pool:
        yield pool
        for engines in both:
            engines.release()


def alone(tiny_bundle: Path, **arguments: Any) -> Any:
    return FakeEngines().pipeline(tiny_bundle).generate("a star", **QUICK | arguments)


def done(*futures: concurrent.futures.Future) -> None:
    assert not concurrent.futures.wait(futures, PATIENCE).not_done


def test_both_draw_at_once_and_join_what_waits(
    pool: PipelinePool, both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path
) -> None:
    futures = [pool.submit("a star", seed=seed, **QUICK) for seed in range(2)]
    for engines in both:
        engines.wait_for_step()
    futures += [pool.submit("a star", seed=seed, **QUICK) for seed in range(2, 6)]
    assert pool.waiting == 4
    both[1].release()
    done(*futures[2:])
    assert both[0].batches == [1], "the one that was ready drew all that waited"
    assert both[1].batches == [1, 4]
    both[0].release()
    done(*futures)
    for seed, future in enumerate(futures):
        same(future.result(), alone(tiny_bundle, seed=seed))


def test_those_that_are_ready_share_what_waits(tiny_bundle: Path) -> None:
    pipe = FakeEngines().pipeline(tiny_bundle)
    devices = [PoolDevice(name, {"a": pipe}) for name in "xyz"]
    queue = TicketQueue(16)
    sizes = [1, 1, 1, 2]
    for seed, size in enumerate(sizes):
        job = Job(pipe.request("a star", seed=seed, batch=size, **QUICK))
        queue.add(Ticket("a", job, Future(), None, None, None))

    def taken(device: PoolDevice) -> list[int]:
        return [t.job.request.seeds[0] for t in queue.take(device, devices)]

    assert [taken(device) for device in devices] == [[0, 1], [2], [3]]
    assert taken(devices[0]) == []


def test_what_one_fails_to_draw_the_other_draws(
    pool: PipelinePool, both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path
) -> None:
    good, bad = both
    seen: list[int] = []

    def see(step: Step) -> None:
        seen.append(step.index)

    first = pool.submit("a star", callback=see, **QUICK)
    second = pool.submit("a star", seed=1, callback=see, **QUICK)
    for engines in both:
        engines.wait_for_step()
    waiting = [pool.submit("a star", seed=seed, **QUICK) for seed in (2, 3)]
    bad.let(1)
    bad.wait_for_step()
    bad.error = overflow()
    bad.release()
    good.release()
    done(first, second, *waiting)
    for seed, future in enumerate([first, second, *waiting]):
        same(future.result(), alone(tiny_bundle, seed=seed))
    assert sorted(seen) == [0, 0, 0, 1, 1, 2, 2], "steps count from 0 again"
    assert good.batches[0] == 1
    assert sum(good.batches) == 4


def test_a_joined_run_that_fails_is_drawn_request_by_request(
    pool: PipelinePool, both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path
) -> None:
    """The other device takes its share alone at first, and has to look again for the rest."""
    futures = [pool.submit("a star", seed=seed, **QUICK) for seed in range(2)]
    for engines in both:
        engines.wait_for_step()
    futures += [pool.submit("a star", seed=seed, **QUICK) for seed in range(2, 6)]
    first, second = both
    first.let(3)
    for _ in range(3):
        first.wait_for_step()
    assert first.batches == [1, 4]
    second.release()
    done(*futures[:2])
    first.error = overflow()
    first.release()
    done(*futures)
    for seed, future in enumerate(futures):
        same(future.result(), alone(tiny_bundle, seed=seed))


@pytest.mark.parametrize("error", [overflow(), MemoryError(), OutOfMemory("full", "less")])
def test_what_both_fail_to_draw_is_an_error(
    pool: PipelinePool, both: tuple[FakeEngines, FakeEngines], error: Exception
) -> None:
    for engines in both:
        engines.error = error
        engines.release()
    with pytest.raises(type(error)):
        pool.generate("a star", **QUICK)
    assert [engines.steps for engines in both] == [1, 1]
    both[0].error = None
    assert len(pool.generate("a star", **QUICK).images) == 1


def test_what_ends_while_it_is_drawn_again_is_drawn_no_more(
    pool: PipelinePool, both: tuple[FakeEngines, FakeEngines]
) -> None:
    blocked = [pool.submit("a star", **QUICK) for _ in both]
    for engines in both:
        engines.wait_for_step()
    both[0].error = overflow()
    both[0].let(1)
    while pool.waiting < 1:  # one failed and waits for the other
        assert not all(future.done() for future in blocked)
    for future in blocked:
        future.cancel()
    both[1].release()
    done(*blocked)
    assert pool.waiting == 0
    pool.close()
    assert both[1].steps == 1


def test_closing_draws_what_waits(both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path) -> None:
    pool = PipelinePool({"a": [engines.pipeline(tiny_bundle) for engines in both]})
    futures = [pool.submit("a star", seed=seed, **QUICK) for seed in range(7)]
    for engines in both:
        engines.release()
    pool.close()
    for seed, future in enumerate(futures):
        same(future.result(0), alone(tiny_bundle, seed=seed))


def test_closing_cancels_what_does_not_end(
    both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path
) -> None:
    pool = PipelinePool({"a": [engines.pipeline(tiny_bundle) for engines in both]})
    futures = [pool.submit("a star", **QUICK | {"steps": 500}) for _ in range(5)]
    for engines in both:
        engines.wait_for_step()
    closer = threading.Thread(target=pool.close, kwargs={"wait": False})
    closer.start()
    done(*futures)
    for engines in both:
        engines.let(1)
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert all(future.cancelled() for future in futures)
    assert [engines.steps for engines in both] == [1, 1]


def test_waiting_in_a_thread_that_draws_is_refused(
    pool: PipelinePool, both: tuple[FakeEngines, FakeEngines]
) -> None:
    refused: list[str] = []

    def wait(step: Step) -> None:
        for call in (pool.close, lambda: pool.generate("a star")):
            with pytest.raises(UsageError) as caught:
                call()
            refused.append(str(caught.value))

    futures = [pool.submit("a star", callback=wait, **QUICK | {"steps": 1}) for _ in both]
    for engines in both:
        engines.wait_for_step()
    for engines in both:
        engines.release()
    done(*futures)
    assert len(refused) == 4
    assert all("in the thread that draws for the pool" in text for text in refused)


def test_switch_traffic_and_fallback_hold_for_both(tiny_bundle: Path) -> None:
    engines = {(name, i): FakeEngines() for name in ("fp16", "fp8") for i in range(2)}
    pipes = {
        name: [engines[name, i].pipeline(tiny_bundle, fallback=tiny_bundle) for i in range(2)]
        for name in ("fp16", "fp8")
    }

    def drawn(name: str) -> int:
        return sum(len(engines[name, i].batches) for i in range(2))

    def poison(latents: np.ndarray, outputs: Any) -> None:
        outputs["next_latents"][:] = np.inf

    registry = CollectorRegistry()
    metrics = Metrics(registry)
    with PipelinePool(pipes, observer=metrics) as pool:
        metrics.watch(pool)
        pool.switch("fp8")
        for _ in range(4):
            pool.generate("a star", **QUICK)
        assert (drawn("fp16"), drawn("fp8")) == (0, 4)
        pool.set_traffic({"fp16": 100})
        assert pool.on_fallback == []
        engines["fp16", 0].poison = engines["fp16", 1].poison = poison
        for _ in range(3):  # two in a row on one of them
            with pytest.raises(Sd35Error, match="not finite"):
                pool.generate("a star", **QUICK)
        assert pool.on_fallback == ["fp16"]
        assert registry.get_sample_value("sd35_trt_fallback", {"bundle": "fp16"}) == 1
        assert registry.get_sample_value("sd35_trt_fallback", {"bundle": "fp8"}) == 0
        pool.restore("fp16")
        assert pool.on_fallback == []
        with pytest.raises(UsageError, match="no bundle 'int4'"):
            pool.restore("int4")


def test_figures_are_told_by_device(
    both: tuple[FakeEngines, FakeEngines], tiny_bundle: Path
) -> None:
    registry, spans = CollectorRegistry(), list[Span]()
    metrics = Metrics(registry)

    def observe(span: Span) -> None:
        spans.append(span)
        metrics(span)

    def value(name: str, device: str) -> float | None:
        return registry.get_sample_value(FIGURES.format(name), {"device": device})

    pipes = [engines.pipeline(tiny_bundle) for engines in both]
    with PipelinePool({"a": pipes}, observer=observe) as pool:
        metrics.watch(pool)
        assert list(pool.memory()) == ["cpu#1", "cpu#2"]
        report = pool.memory()["cpu#2"]["a"]
        assert report.engines["denoiser"].open
        futures = [pool.submit("a star", batch=2, **QUICK) for _ in both]
        for engines in both:
            engines.wait_for_step()
        both[0].error = overflow()
        for engines in both:
            engines.release()
        done(*futures)
        assert (value("images_total", "cpu#1"), value("images_total", "cpu#2")) == (0, 4)
        assert (value("failures_total", "cpu#1"), value("failures_total", "cpu#2")) == (1, 0)
        assert (value("memory_bytes", "cpu#1") or 0) > 1e6
    assert value("memory_bytes", "cpu#1") == 0
    (retry,) = [span for span in spans if span.name == "retry"]
    assert retry.attributes["device"] == "cpu#1"
    assert "denoiser failed" in str(retry.attributes["what"])
    assert {span.attributes["device"] for span in spans if span.name == "request"} == {"cpu#2"}


def test_what_a_pool_of_devices_refuses(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="devices names no device — give some"):
        PipelinePool({"a": tiny_bundle}, devices=[])
    with pytest.raises(UsageError, match="devices must be a list of devices, not 'cpu'"):
        PipelinePool({"a": tiny_bundle}, devices="cpu")
    with pytest.raises(Sd35Error, match="do not run on tpu"):
        PipelinePool({"a": tiny_bundle}, devices=["cpu", "tpu"])
    pipe = FakeEngines().pipeline(tiny_bundle)
    with pytest.raises(UsageError, match="bundle a has 1 pipelines for 2 devices — give its dir"):
        PipelinePool({"a": pipe, "b": tiny_bundle}, devices=["cpu", "cpu"])
    with pytest.raises(Sd35Error, match="the pipeline is closed"):
        pipe.generate("a star", **QUICK)


def test_a_directory_beside_pipelines_is_loaded_on_their_devices(tiny_bundle: Path) -> None:
    pipes = [FakeEngines().pipeline(tiny_bundle) for _ in range(2)]
    with PipelinePool({"a": pipes, "b": tiny_bundle}, threads=1) as pool:
        assert [list(device.pipelines) for device in pool.devices] == [["a", "b"]] * 2
        assert pool.generate("a star", bundle="b", **QUICK).images.any()


def test_two_gpus(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install_fake(monkeypatch, devices=2)

    def on_gpu(index: int) -> Pipeline:
        return Pipeline(
            Bundle.open(tiny_bundle),
            open_session=lambda bundle, component, device, options: QueuedSession(
                fake, bundle, component, device
            ),
            device=f"cuda:{index}",
        )

    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        expected = [pipe.generate("a star", seed=seed, **QUICK) for seed in range(4)]
    with PipelinePool({"a": [on_gpu(0), on_gpu(1)]}) as pool:
        assert list(pool.memory()) == ["cuda:0", "cuda:1"]
        futures = [pool.submit("a star", seed=seed, **QUICK) for seed in range(4)]
        done(*futures)
        for mine, theirs in zip(futures, expected, strict=True):
            same(mine.result(), theirs)


def test_mini_is_what_it_is_alone(mini_bundle: Path) -> None:
    cases = [{"prompt": "a red star", "seed": seed, "size": (64, 64)} for seed in range(4)]
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        expected = [pipe.generate(steps=2, **case) for case in cases]
    with PipelinePool({"mini": mini_bundle}, devices=["cpu", "cpu"], threads=1) as pool:
        futures = [pool.submit(steps=2, **case) for case in cases]
        for mine, theirs in zip(futures, expected, strict=True):
            same(mine.result(PATIENCE), theirs)


def test_many_callers_on_real_engines(tiny_bundle: Path) -> None:
    prompts = ["a red star", "two blue squares", "a small green circle"]
    cases = [
        {"prompt": prompts[i % 3], "seed": i, "guidance": 1.0 + i % 4, "steps": 2 + i % 2}
        for i in range(16)
    ]
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        expected = [pipe.generate(size=(64, 64), **case) for case in cases]
    with (
        PipelinePool({"a": tiny_bundle}, devices=["cpu", "cpu"], threads=1) as pool,
        concurrent.futures.ThreadPoolExecutor(8) as callers,
    ):
        actual = list(callers.map(lambda case: pool.generate(size=(64, 64), **case), cases))
    for mine, theirs in zip(actual, expected, strict=True):
        same(mine, theirs)
