"""What a pipeline gives back: when it is closed, when engines make room, and between pictures."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_cuda import FakeCuda
from fake_engines import FakeEngines
from fake_gpu import QueuedSession, install_fake

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.byte_cache import ByteCache

QUICK: dict[str, Any] = {"steps": 3, "size": (64, 64)}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fake(monkeypatch)


class Engines:
    """Engines on the fake CUDA.

    Attributes:
        refuse: components whose engines fail to close, after they have.
        open: names of those that are open.
        graphs: how many graphs there were whenever a denoiser closed.
        scratch: bytes of working memory, by component.
        left: bytes of it that were allocated whenever an engine opened.
    """

    def __init__(self, fake: FakeCuda, refuse: tuple[str, ...] = ()) -> None:
        self.refuse = refuse
        self.open: list[str] = []
        self.graphs: list[int] = []
        self.scratch: dict[str, int] = {}
        self.left: list[int] = []
        self._fake = fake

    def pipeline(self, root: Path, **arguments: Any) -> Pipeline:
        bundle = Bundle.open(root)
        return Pipeline(bundle, open_session=self._session, device="cuda", **arguments)

    def _session(self, bundle: Any, component: Any, device: Any, options: Any) -> Any:
        engines, name = self, component.name

        class Session(QueuedSession):
            def run(self, inputs: Any, outputs: Any) -> None:
                if needed := engines.scratch.get(name):
                    device.scratch(needed)
                super().run(inputs, outputs)

            def close(self) -> None:
                super().close()
                engines.open.remove(name)
                if name == "denoiser":
                    engines.graphs.append(engines._fake.alive.get("executable", 0))
                if name in engines.refuse:
                    raise Sd35Error(f"{name} does not close")

        self.left.append(device._pool._scratch_bytes)
        session = Session(self._fake, bundle, component, device)
        session.recordable = True
        self.open.append(name)
        return session


def test_closing_goes_on_where_a_part_of_it_fails(tiny_bundle: Path, fake: FakeCuda) -> None:
    engines = Engines(fake, refuse=("denoiser", "t5"))
    pipe = engines.pipeline(tiny_bundle, fallback=Bundle.open(tiny_bundle))
    pipe.generate("a star", **QUICK)
    pipe._renderers[1].engines.use("denoiser")
    with pytest.raises(Sd35Error, match="does not close"):
        pipe.close()
    gc.collect()
    assert engines.open == []
    assert fake.used == 0
    assert not {name for name, count in fake.alive.items() if count and name != "stream"}
    pipe.close()
    with pytest.raises(Sd35Error, match="the pipeline is closed"):
        pipe.generate("a star", **QUICK)


def test_a_device_that_fails_to_open_leaves_nothing(
    tiny_bundle: Path, fake: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*arguments: Any) -> Any:
        raise Sd35Error("no pinned memory")

    monkeypatch.setattr("sd35_trt.runtime.devices.cuda.pinned_array", refused)
    with pytest.raises(Sd35Error, match="no pinned memory"):
        Engines(fake).pipeline(tiny_bundle)
    assert not {name for name, count in fake.alive.items() if count and name != "stream"}


def test_graphs_and_buffers_go_with_an_evicted_denoiser(tiny_bundle: Path, fake: FakeCuda) -> None:
    engines = Engines(fake)
    with engines.pipeline(tiny_bundle) as pipe:
        pipe.generate("a star", **QUICK | {"steps": 6})
        assert fake.alive["executable"] == 2
        held = fake.used
        pipe._renderer.engines.release()
        assert engines.graphs == [0]
        assert fake.used < held
        assert not pipe._renderer._loop._recorded
        pipe.generate("a star", **QUICK)


def test_working_memory_goes_with_the_engines(fake: FakeCuda) -> None:
    from sd35_trt.runtime.devices.cuda import CudaDevice

    device = CudaDevice()
    address, version = device.scratch(1000), device.scratch_version
    assert device.scratch(10) == address
    device.trim()
    assert fake.used == 0
    assert device.scratch_version > version, "graphs that use it are recorded anew"
    device.scratch(10)
    device.close()
    assert fake.used == 0


def test_an_engine_is_loaded_without_the_working_memory_of_the_one_before(
    tiny_bundle: Path, fake: FakeCuda
) -> None:
    """Of all, the autoencoder works with most: a budget has no room for it beside the denoiser."""
    for budget, left in ((1 << 30, {0}), (None, {0, 500})):
        engines = Engines(fake)
        engines.scratch = {"clip_l": 500, "denoiser": 1000, "vae_decoder": 100_000}
        with engines.pipeline(tiny_bundle, vram_budget=budget) as pipe:
            pipe.generate("a star", **QUICK)
            pipe._renderer.engines._close("denoiser")
            pipe.generate("a star", seed=2, **QUICK)
        assert left <= set(engines.left)
        assert (set(engines.left) == {0}) == (budget is not None)


def test_host_memory_is_pinned_once_a_shape(tiny_bundle: Path, fake: FakeCuda) -> None:
    with Engines(fake).pipeline(tiny_bundle) as pipe:
        for size in ((64, 64), (128, 64)):
            pipe.generate("a star", steps=4, size=size)
        pinned = fake.calls.count("cudaHostAlloc")
        first = pipe.generate("a star", steps=4, size=(64, 64)).latents
        kept = first.copy()
        pipe.generate("a ring", seed=5, steps=4, size=(64, 64))
        pipe.generate("a star", steps=3, size=(128, 64))
        assert fake.calls.count("cudaHostAlloc") == pinned
        np.testing.assert_array_equal(first, kept, err_msg="a result is the caller's")
        pipe.generate("a star", steps=6, size=(64, 64))
        assert fake.calls.count("cudaHostAlloc") == pinned + 2, "two steps more"
    gc.collect()
    assert fake.alive["pinned"] == 0


class _Bytes:
    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes


def test_a_cache_of_bytes_holds_what_was_used_last() -> None:
    cache: ByteCache[str, _Bytes] = ByteCache(100)
    for name, size in (("a", 40), ("b", 40)):
        cache.put(name, _Bytes(size))
    assert cache.get("a")
    cache.put("c", _Bytes(30))
    assert cache.get("b") is None
    assert cache.get("a")
    assert cache.get("c")
    cache.put("c", _Bytes(60))
    assert cache.nbytes == 100
    cache.put("large", _Bytes(101))
    assert cache.get("large") is None
    assert cache.nbytes <= 100
    cache.clear()
    assert cache.nbytes == 0


@pytest.mark.parametrize(("limit", "runs"), [(0, 4), (1 << 20, 2)])
def test_the_prompt_cache_has_a_limit(tiny_bundle: Path, limit: int, runs: int) -> None:
    """And a run whose texts it does not hold all is drawn."""
    engines = FakeEngines()
    with Pipeline(Bundle.open(tiny_bundle), open_session=engines.open, prompt_cache=limit) as pipe:
        encoded = 0
        run = pipe._renderer._text._compute

        def count(*arguments: Any) -> Any:
            nonlocal encoded
            encoded += 1
            return run(*arguments)

        pipe._renderer._text._compute = count  # type: ignore[method-assign]
        for _ in range(2):
            pipe.generate(["a star", "a ring"], **QUICK)
            pipe.generate("a heart", **QUICK)
        assert encoded == runs
        assert pipe._renderer._text._cache.nbytes <= limit


def test_the_limit_is_said_in_bytes(tiny_bundle: Path) -> None:
    Pipeline.load(tiny_bundle, prompt_cache=0).close()
    Pipeline.load(tiny_bundle, prompt_cache="2MB").close()
    for wrong, words in ((17, "less than 1 MiB"), ("much", "'much' is not a number of bytes"),
                         (True, "prompt_cache must be a whole number")):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            Pipeline.load(tiny_bundle, prompt_cache=wrong)


SECRET = "my neighbour Ada's blue door " * 20


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What is logged, at the level that a test sets."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sd35_trt")
    level = logger.level
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
def test_prompts_are_logged_at_debug_level_alone(
    tiny_bundle: Path, level: int, log: list[str]
) -> None:
    logging.getLogger("sd35_trt").setLevel(level)
    with FakeEngines().pipeline(tiny_bundle) as pipe:
        result = pipe.generate(SECRET, negative=f"no {SECRET}", **QUICK)
        assert ("Ada" in "".join(log)) == (level == logging.DEBUG)
        assert [note.split(" has ")[0] for note in result.notes] == [
            "the negative prompt", "the negative prompt", "the prompt", "the prompt"
        ]  # fmt: skip
        notes = pipe.generate(["a star", f"two {SECRET}"], **QUICK).notes
        assert {note.split(" has ")[0] for note in notes} == {"prompt 2"}
