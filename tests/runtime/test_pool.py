"""The pool's queue: order, batches, limits, time, cancelling, failing and closing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_engines import PATIENCE, FakeEngines, overflow, same
from prometheus_client import CollectorRegistry

from sd35_trt.errors import Cancelled, PoolBusy, Sd35Error, TimedOut, UsageError
from sd35_trt.runtime import Pipeline, PipelinePool, Span, Step
from sd35_trt.runtime.job import Job
from sd35_trt.runtime.metrics import Metrics

QUICK = {"steps": 3, "size": (64, 64)}


@pytest.fixture
def engines() -> FakeEngines:
    return FakeEngines(held=True)


@pytest.fixture
def pool(engines: FakeEngines, tiny_bundle: Path) -> Iterator[PipelinePool]:
    """Its denoiser waits before every step until the test lets it."""
    with PipelinePool({"fp16": engines.pipeline(tiny_bundle)}, queue_limit=6) as pool:
        yield pool
        engines.release()


def alone(tiny_bundle: Path, prompt: str = "a star", **arguments: Any) -> Any:
    return FakeEngines().pipeline(tiny_bundle).generate(prompt, **QUICK | arguments)


def done(*futures: concurrent.futures.Future) -> None:
    assert not concurrent.futures.wait(futures, PATIENCE).not_done


def test_waiting_requests_share_a_run(
    pool: PipelinePool, engines: FakeEngines, tiny_bundle: Path
) -> None:
    requests: list[dict[str, Any]] = [
        {"seed": 1},
        {"seed": 2, "guidance": 1.0},
        {"seed": 3, "steps": 5},
        {"seed": 4, "guidance": 7.0, "negative": "red"},
        {"seed": 5, "batch": 2},
        {"seed": 7, "size": (128, 64)},
    ]
    first = pool.submit("a star", **QUICK)
    engines.wait_for_step()
    futures = [pool.submit("a star", **QUICK | request) for request in requests]
    engines.release()
    done(first, *futures)
    # The first alone; then 1, 2, 4 of four images at most, with 5 left out; 3; 5; 7.
    assert engines.batches == [1, 3, 1, 2, 1]
    for request, future in zip(requests, futures, strict=True):
        same(future.result(), alone(tiny_bundle, **request))


def test_a_joined_request_sees_its_own_latents(tiny_bundle: Path) -> None:
    def watched(seen: list[np.ndarray]) -> Any:
        return lambda step: seen.extend([step.latents.copy(), step.denoised.copy()])

    expected: dict[int, list[np.ndarray]] = {seed: [] for seed in (1, 2)}
    for seed, seen in expected.items():
        engines = FakeEngines()
        engines.pipeline(tiny_bundle).generate("a star", seed=seed, callback=watched(seen), **QUICK)
    together: dict[int, list[np.ndarray]] = {seed: [] for seed in expected}
    engines = FakeEngines(held=True)
    with PipelinePool({"fp16": engines.pipeline(tiny_bundle)}) as pool:
        first = pool.submit("a star", **QUICK)
        engines.wait_for_step()
        futures = [
            pool.submit("a star", seed=seed, callback=watched(seen), **QUICK)
            for seed, seen in together.items()
        ]
        engines.release()
        done(first, *futures)
    assert engines.batches == [1, 2]
    for seed, seen in together.items():
        assert len(seen) == 2 * QUICK["steps"]
        for one, other in zip(seen, expected[seed], strict=True):
            np.testing.assert_array_equal(one, other)


def test_an_image_is_drawn_by_itself(pool: PipelinePool, engines: FakeEngines) -> None:
    first = pool.submit("a star", **QUICK)
    engines.wait_for_step()
    picture = np.zeros((64, 64, 3), np.uint8)
    futures = [pool.submit("a star", steps=3, image=picture) for _ in range(2)]
    engines.release()
    done(first, *futures)
    assert engines.steps == 3 + 2 * 2  # strength 0.6 of three steps, twice


def test_busy_names_the_limit_and_a_cancelled_request_makes_room(
    pool: PipelinePool, engines: FakeEngines
) -> None:
    pool.submit("a star", **QUICK)
    engines.wait_for_step()
    waiting = [pool.submit("a star", **QUICK) for _ in range(6)]
    assert pool.waiting == 6
    with pytest.raises(PoolBusy, match=r"6 requests are waiting, .* — try again later"):
        pool.submit("a star", **QUICK)
    assert waiting[0].cancel()
    assert pool.waiting == 5
    waiting[0] = pool.submit("a star", **QUICK)
    engines.release()
    done(*waiting)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"steps": 0}, "steps must be 1 to 1000"),
        ({"bundle": "int4"}, "no bundle 'int4' — use one of: fp16"),
    ],
)
def test_bad_input_raises_at_once(
    pool: PipelinePool, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        pool.submit("a star", **QUICK | arguments)
    assert pool.waiting == 0


def test_time_ends_while_waiting(pool: PipelinePool, engines: FakeEngines) -> None:
    running = pool.submit("a star", **QUICK)
    engines.wait_for_step()
    with pytest.raises(TimedOut, match="ended while it was waiting — allow it more") as caught:
        pool.generate("a star", timeout=0.01, **QUICK)
    assert isinstance(caught.value, TimeoutError)
    assert pool.waiting == 0
    engines.release()
    done(running)
    assert engines.batches == [1]


def test_time_ends_between_steps(
    pool: PipelinePool, engines: FakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(
        "sd35_trt.runtime.ticket.time", SimpleNamespace(monotonic=lambda: clock.now)
    )
    slow = pool.submit("a star", timeout=10, **QUICK | {"steps": 9})
    engines.wait_for_step()
    waiting = pool.submit("a star", timeout=10, **QUICK)
    clock.now = 9.9
    engines.let(1)
    engines.wait_for_step()
    assert not slow.done()
    clock.now = 10.0
    engines.let(1)
    done(slow, waiting)
    with pytest.raises(TimedOut, match="while it was being drawn"):
        slow.result()
    with pytest.raises(TimedOut, match="while it was waiting"):
        waiting.result()
    engines.release()
    pool.generate("a star", **QUICK)
    assert engines.steps == 2 + 3


def test_one_of_a_run_is_cancelled(
    pool: PipelinePool, engines: FakeEngines, tiny_bundle: Path
) -> None:
    first = pool.submit("a star", **QUICK)
    engines.wait_for_step()
    dropped, kept = (pool.submit("a star", seed=seed, **QUICK) for seed in (1, 2))
    engines.let(3)
    done(first)
    engines.wait_for_step()
    assert dropped.cancel()
    done(dropped)  # at once
    engines.release()
    same(kept.result(PATIENCE), alone(tiny_bundle, seed=2))
    assert dropped.cancelled()
    assert engines.batches == [1, 2]


def test_a_run_of_which_all_are_cancelled_stops(pool: PipelinePool, engines: FakeEngines) -> None:
    event = threading.Event()
    first = pool.submit("a star", cancel=event, **QUICK)
    engines.wait_for_step()
    second = pool.submit("a star", **QUICK)
    second.cancel()
    event.set()
    engines.let(1)
    with pytest.raises(Cancelled, match="the request was cancelled"):
        first.result(PATIENCE)
    engines.release()
    pool.generate("a star", **QUICK)
    assert engines.steps == 1 + 3
    assert engines.batches == [1, 1]


def test_callbacks_see_their_own_images(
    pool: PipelinePool, engines: FakeEngines, tiny_bundle: Path
) -> None:
    pictures: list[np.ndarray] = []
    first = pool.submit("a star", **QUICK)
    engines.wait_for_step()

    def refuse(step: Step) -> bool:
        return step.index < 1

    def fail(step: Step) -> None:
        raise RuntimeError("the callback's own")

    def keep(step: Step) -> None:
        pictures.append(step.latents.copy())

    stopped, failed, kept = (
        pool.submit("a star", seed=seed, callback=callback, **QUICK)
        for seed, callback in ((1, refuse), (2, fail), (3, keep))
    )
    engines.release()
    done(first, stopped, failed, kept)
    with pytest.raises(Cancelled, match="after step 2 of 3"):
        stopped.result()
    with pytest.raises(RuntimeError, match="the callback's own"):
        failed.result()
    same(kept.result(), alone(tiny_bundle, seed=3))
    assert [latents.shape for latents in pictures] == [(1, 16, 8, 8)] * 3
    np.testing.assert_array_equal(pictures[-1], kept.result().latents)
    assert engines.batches == [1, 3]


@pytest.mark.parametrize("error", [overflow(), MemoryError()])
def test_a_failure_is_that_run_s_alone(
    pool: PipelinePool, engines: FakeEngines, error: Exception
) -> None:
    first = pool.submit("a star", **QUICK)
    engines.wait_for_step()
    engines.error = error
    engines.let(1)
    with pytest.raises(type(error)):
        first.result(PATIENCE)
    engines.error = None
    engines.release()
    assert len(pool.generate("a star", **QUICK).images) == 1


def test_closing_draws_what_waits(engines: FakeEngines, tiny_bundle: Path) -> None:
    pool = PipelinePool({"a": engines.pipeline(tiny_bundle)}, queue_limit=10000)
    futures = [pool.submit("a star", **QUICK) for _ in range(6)]
    engines.wait_for_step()
    closer = threading.Thread(target=pool.close)
    closer.start()
    refused = None
    while refused is None:
        try:
            futures.append(pool.submit("a star", **QUICK))
        except Sd35Error as error:
            refused = error
    assert "the pool is closed" in str(refused)
    assert closer.is_alive()
    engines.release()
    closer.join(PATIENCE)
    assert all(future.result().images.shape[0] == 1 for future in futures)
    pool.close()


@pytest.mark.parametrize("arguments", [{"wait": False}, {"wait": True, "timeout": 0.01}])
def test_closing_cancels_what_does_not_end(
    engines: FakeEngines, tiny_bundle: Path, arguments: dict[str, Any]
) -> None:
    pool = PipelinePool({"a": engines.pipeline(tiny_bundle)})
    futures = [pool.submit("a star", **QUICK | {"steps": 500})]
    engines.wait_for_step()
    futures += [pool.submit("a star", **QUICK | {"steps": 500}) for _ in range(5)]
    caller_saw: list[BaseException] = []

    def caller() -> None:
        try:
            pool.generate("a star", **QUICK)
        except Cancelled as error:
            caller_saw.append(error)

    thread = threading.Thread(target=caller)
    thread.start()
    while pool.waiting < 6:
        thread.join(0.001)
    closer = threading.Thread(target=lambda: pool.close(**arguments))
    closer.start()
    done(*futures)
    assert all(future.cancelled() for future in futures)
    assert closer.is_alive(), "an engine cannot be stopped within a step"
    engines.let(1)
    closer.join(PATIENCE)
    thread.join(PATIENCE)
    assert not closer.is_alive()
    assert engines.steps == 1
    assert "the pool was closed" in str(caller_saw[0])
    with pytest.raises(Sd35Error, match="the pool is closed"):
        pool.submit("a star", **QUICK)


def test_an_error_in_the_with_block_does_not_wait(engines: FakeEngines, tiny_bundle: Path) -> None:
    def serve() -> None:
        with PipelinePool({"a": engines.pipeline(tiny_bundle)}) as pool:
            futures.extend(pool.submit("a star", **QUICK | {"steps": 500}) for _ in range(3))
            engines.wait_for_step()
            engines.let(1)
            raise KeyError

    futures: list[concurrent.futures.Future] = []
    with pytest.raises(KeyError):
        serve()
    assert all(future.cancelled() for future in futures)


def test_traffic_and_switching(tiny_bundle: Path) -> None:
    engines = {name: FakeEngines() for name in ("fp16", "fp8")}
    pipes = {name: fake.pipeline(tiny_bundle) for name, fake in engines.items()}

    def drawn() -> tuple[int, ...]:
        return tuple(len(fake.batches) for fake in engines.values())

    with PipelinePool(pipes, default="fp8") as pool:
        opens = [list(fake.opened) for fake in engines.values()]
        pool.generate("a star", **QUICK)
        assert drawn() == (0, 1)
        pool.switch("fp16")
        pool.generate("a star", **QUICK)
        assert drawn() == (1, 1)
        pool.generate("a star", bundle="fp8", **QUICK)
        assert drawn() == (1, 2)
        pool.set_traffic({"fp16": 50, "fp8": 50})
        for _ in range(2):
            for i in range(12):
                pool.generate("a star", key=f"user-{i}", **QUICK)
        # Of twelve keys: see test_traffic.py.
        assert drawn() == (1 + 2 * 3, 2 + 2 * 9)
        assert pool.traffic == {"fp16": 50, "fp8": 50}
        with pytest.raises(UsageError, match="no bundle 'int4' — use one of: fp16, fp8"):
            pool.set_traffic({"fp16": 50, "int4": 50})
        with pytest.raises(UsageError, match="no bundle 'int4'"):
            pool.switch("int4")
        assert pool.traffic == {"fp16": 50, "fp8": 50}
        assert [list(fake.opened) for fake in engines.values()] == opens, "nothing loads again"


def test_what_a_pool_refuses(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match="needs a bundle"):
        PipelinePool({})
    with pytest.raises(UsageError, match="queue_limit must be at least 1"):
        PipelinePool({"a": tiny_bundle}, queue_limit=0)
    pipe = FakeEngines().pipeline(tiny_bundle)
    with pytest.raises(UsageError, match="no bundle 'b'"):
        PipelinePool({"a": pipe}, default="b")
    with pytest.raises(Sd35Error, match="the pipeline is closed"):
        pipe.generate("a star", **QUICK)


def test_futures_work_with_the_standard_library(
    pool: PipelinePool, engines: FakeEngines, tiny_bundle: Path
) -> None:
    async def serve() -> Any:
        one, other = (
            asyncio.wrap_future(pool.submit("a star", seed=seed, **QUICK)) for seed in (1, 2)
        )
        await asyncio.to_thread(engines.wait_for_step)
        one.cancel()
        engines.release()
        return await asyncio.wait_for(other, PATIENCE)

    same(asyncio.run(serve()), alone(tiny_bundle, seed=2))


def test_observers_are_told_every_stage(engines: FakeEngines, tiny_bundle: Path) -> None:
    spans: list[Span] = []
    engines.release()
    with PipelinePool({"a": engines.pipeline(tiny_bundle)}, observer=spans.append) as pool:
        result = pool.generate("a star", trace="its trace", batch=2, **QUICK)
        with pytest.raises(UsageError):
            pool.generate("a star", steps=0)
    names = ["queue", "text", "conditioning", "denoise", "decode", "request"]
    assert [span.name for span in spans] == [*names, "request"]
    assert {span.trace for span in spans[:-1]} == {"its trace"}
    whole = spans[5]
    assert whole.attributes == {"bundle": "a", "device": "cpu", "outcome": "ok", "images": 2}
    assert spans[6].attributes == {"bundle": "a", "outcome": "invalid"}
    for span in spans[:5]:
        assert whole.start_ns <= span.start_ns <= span.end_ns <= whole.end_ns
        seconds = float(span.attributes["seconds"])
        assert 0 <= seconds <= (span.end_ns - span.start_ns) / 1e9 + 1e-9
        assert seconds == pytest.approx(result.timings[span.name], abs=1e-9)
    parts = [seconds for stage, seconds in result.timings.items() if stage != "total"]
    assert sum(parts) <= result.timings["total"]


def test_an_observer_that_fails_harms_nobody(tiny_bundle: Path) -> None:
    def fail(span: Span) -> None:
        raise ValueError(span.name)

    pipe = FakeEngines().pipeline(tiny_bundle)
    with PipelinePool({"a": pipe}, observer=fail) as pool:
        for _ in range(2):
            assert len(pool.generate("a star", **QUICK).images) == 1


def test_metrics(engines: FakeEngines, tiny_bundle: Path) -> None:
    registry = CollectorRegistry()
    metrics = Metrics(registry)

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(name, labels)

    pipe = engines.pipeline(tiny_bundle, fallback=tiny_bundle)
    with PipelinePool({"fp8": pipe}, observer=metrics, queue_limit=2) as pool:
        metrics.watch(pool)
        assert value("sd35_trt_fallback", bundle="fp8") == 0
        futures = [pool.submit("a star", **QUICK)]
        engines.wait_for_step()
        futures += [pool.submit("a star", **QUICK) for _ in range(2)]
        with pytest.raises(PoolBusy):
            pool.submit("a star", **QUICK)
        assert value("sd35_trt_waiting") == 2
        futures[1].cancel()
        assert value("sd35_trt_waiting") == 1

        def explode(latents: np.ndarray, outputs: Any) -> None:
            outputs["next_latents"][:] = np.inf

        engines.poison = explode
        engines.let(1)  # not finite: drawn again by the fallback, then the next one's turn
        engines.wait_for_step()
        engines.poison = lambda *_: None
        engines.release()
        done(*futures)
    for outcome, count in {"ok": 2, "busy": 1, "cancelled": 1}.items():
        assert value("sd35_trt_requests_total", bundle="fp8", outcome=outcome) == count
    assert value("sd35_trt_anomalies_total", bundle="fp8") == 1
    assert value("sd35_trt_stage_seconds_count", bundle="fp8", stage="queue") == 3
    assert value("sd35_trt_stage_seconds_count", bundle="fp8", stage="decode") == 2
    assert value("sd35_trt_request_seconds_count", bundle="fp8", outcome="ok") == 2


def test_an_image_depends_on_its_own_request_alone(tiny_bundle: Path) -> None:
    cases: list[dict[str, Any]] = [
        {"prompt": "a red star", "seed": 9, "guidance": 1.0},
        {"prompt": "two blue squares", "seed": 5, "guidance": 7.0, "negative": "a ring"},
        {"prompt": "", "seed": 7},
    ]
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        expected = [pipe.generate(**case, **QUICK) for case in cases]
        for order in ((0, 1, 2), (2, 0), (1, 2, 0)):
            jobs = [Job(pipe.request(**cases[i], **QUICK)) for i in order]
            pipe.draw(jobs)
            for i, job in zip(order, jobs, strict=True):
                same(job.outcome, expected[i])


def test_an_observer_may_restore_the_bundle(tiny_bundle: Path) -> None:
    """Also one that is called while the pipeline draws."""
    engines = FakeEngines(held=True)
    pipe = engines.pipeline(tiny_bundle, fallback=tiny_bundle)
    event = threading.Event()
    with PipelinePool({"a": pipe}, observer=lambda span: pipe.restore()) as pool:
        future = pool.submit("a star", cancel=event, **QUICK)
        engines.wait_for_step()
        event.set()
        engines.release()
        done(future)


def test_many_callers_on_real_engines(tiny_bundle: Path) -> None:
    prompts = ["a red star", "two blue squares", "a small green circle"]
    cases = [
        {"prompt": prompts[i % 3], "seed": i, "guidance": 1.0 + i % 4, "steps": 2 + i % 2}
        for i in range(12)
    ]
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        expected = [pipe.generate(size=(64, 64), **case) for case in cases]
    with (
        PipelinePool({"a": tiny_bundle, "b": tiny_bundle}, threads=1) as pool,
        concurrent.futures.ThreadPoolExecutor(6) as callers,
    ):
        pool.set_traffic({"a": 50, "b": 50})
        actual = list(callers.map(lambda case: pool.generate(size=(64, 64), **case), cases))
    for mine, theirs in zip(actual, expected, strict=True):
        same(mine, theirs)
    assert Counter(len(result.images) for result in actual) == {1: 12}
