"""Callbacks that call back, and calls that would wait for themselves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from fake_engines import FakeEngines

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Pipeline, PipelinePool, Span

QUICK: dict[str, Any] = {"steps": 3, "size": (64, 64)}


@pytest.mark.parametrize("what", ["generate", "close", "preload"])
def test_a_callback_cannot_use_the_pipeline_that_calls_it(tiny_bundle: Path, what: str) -> None:
    calls = {
        "generate": lambda: pipe.generate("a ring", **QUICK),
        "close": lambda: pipe.close(),
        "preload": lambda: pipe.preload(),
    }
    with FakeEngines().pipeline(tiny_bundle) as pipe:
        with pytest.raises(UsageError, match=rf"{what}\(\) was called by a callback"):
            pipe.generate("a star", callback=lambda step: calls[what](), **QUICK)
        # What it may do: ask, and use another one.
        with FakeEngines().pipeline(tiny_bundle) as other:
            pipe.generate("a star", callback=lambda s: other.generate("a ring", **QUICK), **QUICK)
            pipe.generate("a star", callback=lambda step: pipe.memory(), **QUICK)


@pytest.mark.parametrize("what", ["generate", "close"])
@pytest.mark.parametrize("where", ["callback", "observer", "future"])
def test_the_thread_that_draws_cannot_wait_for_the_pool(
    tiny_bundle: Path, what: str, where: str
) -> None:
    caught: list[BaseException] = []

    def wait(*_: object) -> None:
        try:
            pool.close() if what == "close" else pool.generate("a ring", **QUICK)
        except UsageError as error:
            caught.append(error)

    def observe(span: Span) -> None:
        if where == "observer":
            wait()

    pipe = FakeEngines().pipeline(tiny_bundle)
    with PipelinePool({"a": pipe}, observer=observe) as pool:
        future = pool.submit("a star", callback=wait if where == "callback" else None, **QUICK)
        if where == "future":
            future.add_done_callback(wait)
            pool.submit("a star", **QUICK).add_done_callback(wait)
        future.result()
        again = pool.submit("a star", **QUICK)
        again.result()
    assert caught
    assert all("in the thread that draws" in str(error) for error in caught)


def test_submit_is_for_callbacks_too(tiny_bundle: Path) -> None:
    later: list[Any] = []
    with PipelinePool({"a": FakeEngines().pipeline(tiny_bundle)}) as pool:

        def more(step: Any) -> None:
            later.append(pool.submit("a ring", **QUICK))

        pool.generate("a star", callback=more, **QUICK)
        assert all(future.result().images.any() for future in later)


class Odd(BaseException):
    """What a callback should not raise."""


@pytest.mark.parametrize("error", [Odd("no"), SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_whatever_a_callback_raises_is_its_callers(tiny_bundle: Path, error: BaseException) -> None:
    """The others of the run are drawn, and the thread lives."""

    def fail(step: Any) -> None:
        raise error

    engines = FakeEngines(held=True)
    with PipelinePool({"a": engines.pipeline(tiny_bundle)}) as pool:
        first = pool.submit("a star", **QUICK)
        engines.wait_for_step()
        bad, good = pool.submit("a star", callback=fail, **QUICK), pool.submit("a ring", **QUICK)
        engines.release()
        assert bad.exception() is error
        assert good.result().images.any()
        assert first.result().images.any()
        assert engines.batches == [1, 2], "in one run"
        assert pool.generate("a star", **QUICK).images.any()


def test_exit_in_a_callback_ends_the_call(tiny_bundle: Path) -> None:
    with FakeEngines().pipeline(tiny_bundle) as pipe:
        with pytest.raises(SystemExit):
            pipe.generate("a star", callback=lambda step: sys.exit(3), **QUICK)
        assert pipe.generate("a star", **QUICK).images.any()


def test_a_prompt_longer_than_the_pool_takes(tiny_bundle: Path) -> None:
    with PipelinePool({"a": tiny_bundle}, preload=False, max_prompt_chars=10) as pool:
        with pytest.raises(UsageError, match="prompt has 11 characters, 10 are allowed"):
            pool.submit("eleven char")
        assert isinstance(pool.pipelines["a"], Pipeline)
