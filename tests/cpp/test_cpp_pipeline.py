"""The surface of libsd35: requests, callbacks, joined runs, fallback, memory, threads, errors."""

from __future__ import annotations

import concurrent.futures
import ctypes
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from ctypes import byref, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare_bundle import read_json, sign
from cpp_build import built, library
from poison import poisoned
from sd35_ctypes import Asked, Drawn, Failure, Library, LoadOptions, Pipe, RequestFields, StepView

from sd35_trt.errors import OutOfMemory, UsageError
from sd35_trt.runtime import Pipeline

QUICK = {"steps": 3}


@pytest.fixture(scope="module")
def lib() -> Library:
    return library()


@pytest.fixture(scope="module")
def pipe(lib: Library, mini_bundle: Path) -> Iterator[Pipe]:
    with Pipe(lib, mini_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def python(mini_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(mini_bundle, threads=1) as pipeline:
        yield pipeline


WRONG: list[dict[str, Any]] = [
    {"steps": 0}, {"steps": 1001}, {"steps": -3}, {"batch": 0}, {"batch": 5}, {"batch": -1},
    {"guidance": -1.0}, {"guidance": 100.5}, {"guidance": math.nan}, {"guidance": math.inf},
    {"shift": 0.0}, {"shift": 0.001}, {"shift": 101.0}, {"shift": math.nan},
    {"sampler": "heun"}, {"sampler": ""}, {"t5_tokens": 31}, {"t5_tokens": 513},
    {"size": (100, 128)}, {"size": (256, 64)}, {"size": (0, 64)}, {"size": (-64, 64)},
    {"size": (96, 160)}, {"seed": [1, 2]}, {"seed": 2**64 - 1, "batch": 2},
    {"negative": ["a", "b"]}, {"prompt": "x" * 10_001}, {"negative": "x" * 10_001},
    {"prompt": ["a"] * 5}, {"prompt": ["a", "b" * 10_001]}, {"strength": -0.1},
    {"strength": 1.5}, {"strength": math.nan},
    {"image": np.zeros((64, 64, 3), np.uint8), "strength": 0.0},
    {"image": np.zeros((64, 64, 3), np.uint8), "strength": 1e-18, "steps": 7},
    {"image": np.zeros((60, 64, 3), np.uint8)}, {"image": np.zeros((32, 32, 3), np.uint8)},
]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=lambda w: " ".join(map(str, w))[:40])
def test_what_python_refuses_is_refused_in_its_words(
    wrong: dict[str, Any], pipe: Pipe, python: Pipeline
) -> None:
    arguments = {"prompt": "a star", **wrong}
    with pytest.raises(UsageError) as expected:
        python.request(**arguments)
    for ask in (pipe.check, pipe.generate):
        with pytest.raises(Failure) as refused:
            ask(**arguments)
        assert refused.value.status == "usage"
        # Python counts two seeds among the images' list, and calls the last one so too.
        assert str(refused.value) == str(expected.value) or "last image" in str(expected.value)


@pytest.mark.parametrize(
    "right",
    [{"guidance": 0.0}, {"guidance": 100.0}, {"shift": 0.01}, {"shift": 100.0}, {"steps": 1000},
     {"batch": 4}, {"seed": 2**64 - 1}, {"t5_tokens": 32}, {"prompt": "ü" * 10_000},
     {"size": (192, 64)}, {"negative": ["a"]}, {"negative": []}],
    ids=str,
)  # fmt: skip
def test_what_python_takes_is_taken(right: dict[str, Any], pipe: Pipe) -> None:
    pipe.check(**{"prompt": "a star", **right})


def test_text_that_is_no_utf8_is_refused(pipe: Pipe) -> None:
    for name in ("prompt", "negative"):
        with pytest.raises(Failure, match=f"^{name} is no UTF-8 — ") as refused:
            pipe.check(**{"prompt": "a", name: b"a \xed\xa0\x80"})
        assert refused.value.status == "usage"
    with pytest.raises(Failure, match=r"^prompt\[1\] is no UTF-8"):
        pipe.check(["a", b"\xff"])


def test_a_picture_of_another_size_is_refused(pipe: Pipe) -> None:
    with pytest.raises(Failure, match="image is 64x128, the size is 128x128 — give the image at"):
        pipe.check("a", image=np.zeros((128, 64, 3), np.uint8), size=(128, 128))


def test_half_a_size_is_refused(pipe: Pipe) -> None:
    with pytest.raises(Failure, match="width and height must be given together"):
        pipe.check("a", width=128)


def test_no_prompt_is_refused(pipe: Pipe) -> None:
    with pytest.raises(Failure, match="there is no prompt"):
        pipe.check([])


def test_callback_sees_every_step(pipe: Pipe, python: Pipeline) -> None:
    seen: list[tuple[int, int, float]] = []
    latents: list[np.ndarray] = []

    def watch(step: StepView) -> None:
        seen.append((step.index, step.total, step.sigma))
        latents.append(np.ctypeslib.as_array(step.latents, tuple(step.shape)).copy())

    expected: list[tuple[int, int, float]] = []
    python.generate(
        "a star", steps=4, batch=2,
        callback=lambda s: expected.append((s.index, s.total, s.sigma)),
    )  # fmt: skip
    drawn = pipe.generate("a star", steps=4, batch=2, callback=watch)
    assert seen == expected
    np.testing.assert_array_equal(latents[-1], drawn.latents)
    assert np.abs(latents[0] - latents[1]).max() > 0


def test_a_callback_cancels_and_the_pipeline_goes_on(pipe: Pipe) -> None:
    before = pipe.generate("a star", **QUICK)
    with pytest.raises(Failure, match=r"^cancelled after step 2 of 5$") as cancelled:
        pipe.generate("a star", steps=5, callback=lambda step: step.index < 1)
    assert cancelled.value.status == "cancelled"
    same(pipe.generate("a star", **QUICK), before)


def same(one: Drawn, other: Drawn) -> None:
    np.testing.assert_array_equal(one.latents, other.latents)
    np.testing.assert_array_equal(one.images, other.images)
    assert one.parameters == other.parameters


def test_a_call_from_a_callback_is_refused(pipe: Pipe) -> None:
    refusals: list[str] = []

    def call(_: StepView) -> None:
        for action in (
            lambda: pipe.generate("a", **QUICK), lambda: pipe.call("preload"),
            lambda: pipe.call("close"),
        ):  # fmt: skip
            with pytest.raises(Failure) as refused:
                action()
            refusals.append(str(refused.value))
        pipe.memory()
        pipe.check("a")

    pipe.generate("a star", steps=1, callback=call)
    names = [text.partition(" was called by a callback")[0] for text in refusals]
    assert names == ["generate", "preload", "close"]


def test_joined_requests_have_their_own_outcomes(pipe: Pipe) -> None:
    one = {"prompt": "a red circle", "seed": 3, **QUICK}
    other = {"prompt": ["a blue star", "a ring"], "seed": 8, "guidance": 6.0, **QUICK}
    drawn = pipe.generate_joined([one, other])
    for outcome, alone in zip(drawn, (one, other), strict=True):
        assert isinstance(outcome, Drawn)
        np.testing.assert_allclose(outcome.latents, pipe.generate(**alone).latents, atol=2e-5)
    cancelled, kept = pipe.generate_joined([{**one, "callback": lambda _: False}, other])
    assert isinstance(cancelled, Failure)
    assert cancelled.status == "cancelled"
    assert isinstance(kept, Drawn)
    np.testing.assert_array_equal(kept.latents, drawn[1].latents)


def test_requests_that_do_not_join(pipe: Pipe) -> None:
    def joins(**change: Any) -> bool:
        lib = pipe.library
        one, other = Asked(lib, "a", **QUICK), Asked(lib, "b", **{**QUICK, **change})
        return pipe.joins(one, other)

    assert joins()
    assert joins(guidance=1.0, seed=5, negative="c")
    image = np.zeros((128, 128, 3), np.uint8)
    for change in ({"steps": 4}, {"shift": 2.0}, {"size": (64, 64)}, {"sampler": "dpmpp-2m"},
                   {"t5_tokens": 64}, {"image": image}):  # fmt: skip
        assert not joins(**change), change
    outcomes = pipe.generate_joined([{"prompt": "a", "steps": 3}, {"prompt": "b", "steps": 4}])
    assert [str(o) for o in outcomes] == [
        "these requests cannot be drawn in one run — ask sd35_pipeline_joins first"
    ] * 2
    outcomes = pipe.generate_joined([{"prompt": "a", "batch": 3, **QUICK}] * 2)
    assert "6 images at once, this bundle draws at most 4" in str(outcomes[0])


def test_notes_are_pythons(pipe: Pipe, python: Pipeline) -> None:
    arguments: dict[str, Any] = {
        "prompt": ["star " * 40, "ring " * 50], "negative": "blue " * 60, "guidance": 1.0,
        "steps": 1,
    }  # fmt: skip
    notes = pipe.generate(**arguments).notes
    assert notes == python.generate(**arguments).notes
    assert len(notes) > 3


def test_timings_are_by_stage(pipe: Pipe) -> None:
    drawn = pipe.generate("a timed star", **QUICK)
    assert list(drawn.timings) == [
        "queue", "text", "conditioning", "denoise", "decode", "total"
    ]  # fmt: skip
    image = np.zeros((64, 64, 3), np.uint8)
    timings = pipe.generate("a timed star", image=image, **QUICK).timings
    assert list(timings)[:3] == ["queue", "text", "encode"]
    parts = sum(v for k, v in timings.items() if k != "total")
    assert 0.9 * timings["total"] <= parts <= 1.001 * timings["total"]


def test_threads_share_a_pipeline(pipe: Pipe) -> None:
    """Every image is what it is alone, whatever else is drawn."""
    alone = [pipe.generate(f"star {i}", seed=i, **QUICK) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        futures = [
            threads.submit(pipe.generate, f"star {i % 8}", seed=i % 8, **QUICK) for i in range(24)
        ]
        for i, future in enumerate(futures):
            np.testing.assert_array_equal(future.result().images, alone[i % 8].images)


def test_closing_waits_and_is_final(lib: Library, mini_bundle: Path) -> None:
    pipe = Pipe(lib, mini_bundle, threads=1)
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        begun = concurrent.futures.Future[None]()
        drawn = threads.submit(
            pipe.generate, "a star", steps=6,
            callback=lambda _: None if begun.done() else begun.set_result(None),
        )  # fmt: skip
        begun.result(60)
        threads.submit(pipe.call, "close").result(60)
        assert len(drawn.result(60).images) == 1
    pipe.call("close")
    for action in (lambda: pipe.generate("a"), pipe.memory, lambda: pipe.call("preload")):
        with pytest.raises(Failure, match="the pipeline is closed — load it again"):
            action()
    pipe.free()


def test_memory_is_reported(lib: Library, mini_bundle: Path) -> None:
    with Pipe(lib, mini_bundle, threads=1) as pipe, Pipeline.load(mini_bundle, threads=1) as other:
        _, engines = pipe.memory()
        assert not any(engine["open"] for engine in engines.values())
        pipe.call("preload")
        other.preload()
        report, engines = pipe.memory()
        expected = other.memory()
        assert {n: (e["kind"], e["open"], e["weight_bytes"]) for n, e in engines.items()} == {
            n: (e.kind, e.open, e.weight_bytes) for n, e in expected.engines.items()
        }
        assert report["planned_peak"] == expected.planned_peak
        assert report["budget"] == 0
        assert 0 < report["used"] <= report["peak"]


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.5, 0.7, 0.9, 1.0])
def test_budgets_are_planned_as_python_does(
    share: float, lib: Library, mini_bundle: Path, python: Pipeline
) -> None:
    budget = max(1 << 20, int(share * python.memory().planned_peak))
    if share < 0.4:
        with pytest.raises(OutOfMemory) as expected:
            Pipeline.load(mini_bundle, threads=1, vram_budget=budget)
        with pytest.raises(Failure) as refused:
            Pipe(lib, mini_bundle, threads=1, vram_budget=budget)
        assert str(refused.value) == str(expected.value)
        assert refused.value.status == "out of memory"
        return
    other = Pipeline.load(mini_bundle, threads=1, vram_budget=budget)
    with other, Pipe(lib, mini_bundle, threads=1, vram_budget=budget) as pipe:
        arguments: dict[str, Any] = {"prompt": "a star", "steps": 35, "size": (64, 64)}
        drawn = pipe.generate(**arguments)
        np.testing.assert_array_equal(drawn.latents, other.generate(**arguments).latents)
        report, engines = pipe.memory()
        expected_report = other.memory()
        assert {n: (e["kind"], e["open"]) for n, e in engines.items()} == {
            n: (e.kind, e.open) for n, e in expected_report.engines.items()
        }
        assert report["planned_peak"] == expected_report.planned_peak


def test_a_budget_has_to_be_of_bytes(lib: Library, mini_bundle: Path) -> None:
    with pytest.raises(Failure, match="8 is less than 1 MiB"):
        Pipe(lib, mini_bundle, vram_budget=8)


def test_the_fallback_draws_what_is_not_finite(
    lib: Library, mini_bundle: Path, tmp_path: Path
) -> None:
    broken = poisoned(mini_bundle, tmp_path / "broken", "proj_out.weight", math.nan)
    with Pipe(lib, broken, threads=1) as pipe:
        with pytest.raises(
            Failure, match=r"the latents are not finite after step 1 \(seed 5\)"
        ) as e:
            pipe.generate("a star", seed=5, **QUICK)
        assert e.value.status == "not finite"
        assert lib.pipeline_anomalies(pipe.handle) == 1
    with Pipe(lib, mini_bundle, threads=1) as good:
        expected = good.generate("a star", seed=5, batch=2, **QUICK)
    with Pipe(lib, broken, threads=1, fallback=mini_bundle) as pipe:
        drawn = pipe.generate("a star", seed=5, batch=2, **QUICK)
        np.testing.assert_array_equal(drawn.images, expected.images)
        assert drawn.notes[-1] == f"drawn again with the fallback {mini_bundle}"
        assert [a["image"] for a in drawn.anomalies] == [0, 1]
        assert all(not a["finite"] and a["seed"] == 5 + a["image"] for a in drawn.anomalies)
        assert lib.pipeline_on_fallback(pipe.handle) == 1
        assert any("anomalous images in a row" in line for line in pipe.logged)
        drawn = pipe.generate("a star", seed=5, **QUICK)
        assert drawn.notes[-1] == f"drawn with the fallback {mini_bundle}"
        assert not drawn.anomalies
        lib.pipeline_restore(pipe.handle)
        assert lib.pipeline_on_fallback(pipe.handle) == 0


def test_statistics_unlike_calibrations_are_anomalous(
    lib: Library, make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    """Of a bundle that holds a calibration: the denoiser gives twice what it should."""
    source = make_bundle(policy="fp8")
    bundle = Path(shutil.copytree(source, tmp_path / "bundle"))
    data = read_json(bundle)
    calibration = bundle / "calibration.json"
    extract = json.loads(calibration.read_text("utf-8"))
    extract["latents"]["deviation"] = [[3 * v for v in p] for p in extract["latents"]["deviation"]]
    calibration.write_text(json.dumps(extract))
    [file] = [file for file in data["files"] if file["path"] == "calibration.json"]
    content = calibration.read_bytes()
    file.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    sign(bundle, json.dumps(data))
    arguments: dict[str, Any] = {"prompt": "a star", "batch": 2, "steps": 8}
    with Pipe(lib, bundle, threads=1) as pipe, Pipeline.load(bundle, threads=1) as other:
        drawn, expected = pipe.generate(**arguments), other.generate(**arguments)
        few = pipe.generate("a star", steps=3)
    assert len(expected.anomalies) == 2
    assert drawn.notes == expected.notes
    assert [a["what"] for a in drawn.anomalies] == [a.what for a in expected.anomalies]
    assert all(a["finite"] for a in drawn.anomalies)
    assert not few.anomalies, "calibration has no runs of so few steps"


def test_a_fallback_that_cannot_draw_as_much_is_refused(
    lib: Library, mini_bundle: Path, tiny_bundle: Path
) -> None:
    with pytest.raises(Failure, match="accepts fewer batches, sizes or text lengths") as refused:
        Pipe(lib, mini_bundle, fallback=tiny_bundle)
    assert refused.value.status == "bundle"


@pytest.mark.parametrize(
    ("device", "status", "words"),
    [("gpu", "bundle", "do not run on 'gpu'"), ("cuda:x", "usage", "unknown device 'cuda:x'"),
     ("cuda:-1", "usage", "unknown device"), ("cpu:1", "usage", "unknown device 'cpu:1'")],
)  # fmt: skip
def test_an_unknown_device(
    device: str, status: str, words: str, lib: Library, mini_bundle: Path
) -> None:
    with pytest.raises(Failure, match=words) as refused:
        Pipe(lib, mini_bundle, device=device)
    assert refused.value.status == status


def test_engines_of_another_kind_are_refused(lib: Library, tiny_programs: Path) -> None:
    with pytest.raises(Failure, match="libsd35 runs no inductor engines, but onnxruntime") as e:
        Pipe(lib, tiny_programs)
    assert e.value.status == "bundle"


def test_a_backend_that_is_missing_is_named(
    lib: Library, mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SD35_BACKENDS", str(tmp_path))
    with Pipe(lib, mini_bundle) as pipe:
        words = f"ONNX Runtime engines need {tmp_path}/libsd35-onnxruntime.so, which is missing — "
        with pytest.raises(Failure, match=words):
            pipe.generate("a star", **QUICK)
        shutil.copy(built() / "sd35" / "libsd35-onnxruntime.so", tmp_path)
        assert len(pipe.generate("a star", **QUICK).images) == 1
        # Never what lies where the process happens to stand.
        monkeypatch.setenv("SD35_BACKENDS", ".")
        monkeypatch.chdir(tmp_path)
    with Pipe(lib, mini_bundle) as pipe, pytest.raises(Failure, match="no absolute path"):
        pipe.generate("a star", **QUICK)


def test_a_structure_of_an_older_version_is_taken(lib: Library, mini_bundle: Path) -> None:
    """What it does not have has its usual value."""
    fields = LoadOptions()
    lib.load_options_init(byref(fields))
    fields.size = LoadOptions.vram_budget.offset
    fields.vram_budget = 1  # refused where it is read
    handle = c_void_p()
    lib.call("pipeline_load", str(mini_bundle).encode(), byref(fields), byref(handle))
    lib.pipeline_free(handle)
    fields.size = 0
    with pytest.raises(Failure, match="options->size is not set"):
        lib.call("pipeline_load", str(mini_bundle).encode(), byref(fields), byref(handle))


def test_nothing_is_an_error_too(lib: Library, pipe: Pipe) -> None:
    for name, arguments in (
        ("pipeline_load", (None, None, byref(c_void_p()))),
        ("pipeline_generate", (None, None, byref(c_void_p()))),
        ("pipeline_generate", (pipe.handle, None, byref(c_void_p()))),
        ("pipeline_generate", (pipe.handle, byref(RequestFields()), byref(c_void_p()))),
        ("pipeline_check", (pipe.handle, None)),
        ("pipeline_joins", (pipe.handle, None, None, byref(c_int()))),
        ("pipeline_memory", (None, byref(c_void_p()))),
        ("memory_engine", (None, c_size_t(0), None)),
        ("result_anomaly", (None, c_size_t(0), None)),
    ):
        with pytest.raises(Failure, match=r"is NULL|is not set") as refused:
            lib.call(name, *arguments)
        assert refused.value.status == "usage", name
        assert getattr(lib, name)(*arguments, None) != 0  # nobody asks for the error
    for name in ("pipeline_free", "result_free", "memory_free", "error_free"):
        getattr(lib, name)(None)
    assert lib.result_count(None) == 0


def test_a_pipeline_from_before_a_fork_says_so(lib: Library, mini_bundle: Path) -> None:
    with Pipe(lib, mini_bundle, threads=1) as pipe:
        pipe.generate("a star", **QUICK)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                pipe.generate("a star", **QUICK)
            except Failure as failure:
                pipe.free()
                status = 0 if "before this process was forked" in str(failure) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert ctypes.sizeof(RequestFields) > 0
