"""Images that calibration would not have seen: found, told, and drawn again by the fallback."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import PATIENCE, FakeEngines
from models.make import make
from msgspec.structs import replace
from poison import poisoned

from sd35_trt.errors import BundleError, Cancelled, NotFinite
from sd35_trt.formats.bundle import Bundle, Manifest, PolicyRecord, PolicyRule, write_manifest
from sd35_trt.formats.calibration import Calibration
from sd35_trt.mini import calibration_path
from sd35_trt.runtime import Pipeline, PipelinePool
from sd35_trt.runtime.job import Job, Result
from sd35_trt.runtime.latent_guard import Band, Guard
from sd35_trt.runtime.request import make_request

QUICK: dict[str, Any] = {"steps": 4, "size": (64, 64)}

# The denoiser's last layer: its output is the velocity.
LAST = "proj_out.weight"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the packaged calibration, whose band is wide enough for the tiny networks."""
    folder = tmp_path_factory.mktemp("calibrated")
    known = Calibration.load(calibration_path())
    return make(folder / "bundle", folder / "stages", calibration=known)


@pytest.fixture(scope="module")
def broken(calibrated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("poisoned")
    return {
        name: poisoned(calibrated, root / name, LAST, factor)
        for name, factor in (("nan", np.nan), ("loud", 40.0))
    }


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """What is logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sd35_trt")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


def edited(source: Path, out: Path, change: Callable[[Manifest], Manifest]) -> Path:
    shutil.copytree(source, out)
    write_manifest(out, change(Bundle.open(out).manifest))
    return out


def guard_for(manifest: Manifest, band: Band | None, **arguments: Any) -> Guard:
    request: dict[str, Any] = dict.fromkeys(
        ("steps", "guidance", "shift", "size", "sampler", "t5_tokens", "image")
    )
    request |= {"prompt": ["a", "b"], "negative": "", "seed": 7, "batch": 1, "strength": 0.5}
    return Guard(band, manifest, make_request(manifest, **request | arguments))


BAND = Band(np.array([0.0, 1.0]), np.array([[-0.1, 0.1]] * 2), np.array([[0.5, 1.0], [0.9, 1.1]]))


def noise(mean: float, deviation: float) -> np.ndarray:
    """[2, 16, 8, 8]; the first image is healthy."""
    values = np.random.default_rng(0).standard_normal((2, 16, 8, 8))
    values = (values - values.mean((1, 2, 3), keepdims=True)) / values.std((1, 2, 3), keepdims=True)
    values[1] = values[1] * deviation + mean
    return values.astype(np.float32)


@pytest.mark.parametrize(
    ("sigma", "mean", "deviation", "what"),
    [
        (0.0, 0.0, 0.26, None),
        (0.0, 0.0, 0.24, "deviation of the latents 0.24, expected 0.25 to 2"),
        (0.0, 0.0, 1.99, None),
        (0.0, 0.0, 2.1, "deviation of the latents 2.1, expected 0.25 to 2"),
        (0.0, 0.34, 1.0, None),
        (0.0, 0.36, 1.0, "mean of the latents 0.36, expected -0.35 to 0.35"),
        (0.0, -0.36, 1.0, "mean of the latents -0.36, expected -0.35 to 0.35"),
        # Halfway, the band is between its ends.
        (0.5, 0.0, 0.36, None),
        (0.5, 0.0, 0.34, "deviation of the latents 0.34, expected 0.35 to 2.1"),
        (0.0, 0.0, np.inf, "latents are not finite"),
        (0.0, np.nan, 1.0, "latents are not finite"),
        (0.0, 1e30, 1.0, "mean of the latents 1e+30, expected -0.35 to 0.35"),
    ],
)
def test_what_is_an_anomaly(
    tiny_bundle: Path, sigma: float, mean: float, deviation: float, what: str | None
) -> None:
    guard = guard_for(Bundle.open(tiny_bundle).manifest, BAND)
    guard.look(3, sigma, noise(mean, deviation))
    if what is None:
        assert guard.anomalies == {}
        return
    (anomaly,) = guard.anomalies.values()
    assert (anomaly.image, anomaly.step, anomaly.sigma, anomaly.seed) == (1, 3, sigma, 8)
    assert anomaly.what == what
    assert anomaly.finite == ("finite" not in what)
    assert anomaly.prompt == hashlib.sha256(b"b").hexdigest()[:12]
    assert guard.within(slice(1, 2)) == [dataclasses.replace(anomaly, image=0)]
    assert guard.within(slice(0, 1)) == []


@pytest.mark.parametrize("arguments", [{"steps": 3}, {"image": np.zeros((64, 64, 3), np.uint8)}])
def test_runs_unlike_calibration_must_only_be_finite(
    tiny_bundle: Path, arguments: dict[str, Any]
) -> None:
    guard = guard_for(Bundle.open(tiny_bundle).manifest, BAND, **arguments)
    guard.look(0, 0.0, noise(0.0, 50.0))
    guard.look(0, 0.0, noise(1e30, 1.0))  # its squares are not finite
    assert guard.anomalies == {}
    guard.look(1, 0.0, noise(np.nan, 1.0))
    assert list(guard.anomalies) == [1]


def test_the_first_anomaly_is_kept_unless_a_worse_one_comes(tiny_bundle: Path) -> None:
    guard = guard_for(Bundle.open(tiny_bundle).manifest, BAND)
    for step, deviation in enumerate((50.0, 60.0)):
        guard.look(step, 0.0, noise(0.0, deviation))
    assert guard.anomalies[1].step == 0
    guard.look(2, 0.0, noise(np.nan, 1.0))
    guard.look(3, 0.0, noise(np.nan, 1.0))
    assert (guard.anomalies[1].step, guard.anomalies[1].finite) == (2, False)


def test_a_bundle_brings_its_band(calibrated: Path, tiny_bundle: Path) -> None:
    band = Band.of(Bundle.open(calibrated))
    assert band is not None
    assert len(band.sigma) == 28
    assert (np.diff(band.sigma) > 0).all()
    assert band.deviation.shape == band.mean.shape == (28, 2)
    # Near noise, latents are noise.
    np.testing.assert_allclose(band.deviation[-1], 1.0, atol=0.1)
    assert Band.of(Bundle.open(tiny_bundle)) is None


def test_healthy_images_are_not_anomalous(calibrated: Path) -> None:
    with Pipeline.load(calibrated, threads=1) as pipe:
        for guidance in (1.0, 7.0):
            for steps, sampler in ((4, "euler"), (8, "dpmpp-2m")):
                result = pipe.generate(
                    ["a red star", "two blue squares", ""], steps=steps, guidance=guidance,
                    sampler=sampler, seed=50,
                )  # fmt: skip
                assert result.anomalies == result.notes == ()
        assert pipe.anomalies == 0


def test_nan_stops_at_its_step(broken: dict[str, Path], log: list[str]) -> None:
    steps: list[int] = []
    with Pipeline.load(broken["nan"], threads=1) as pipe:
        with pytest.raises(NotFinite, match=r"not finite after step 1 \(seed 5\) — lower"):
            pipe.generate("a star", seed=5, callback=lambda s: steps.append(s.index), **QUICK)
        assert pipe.anomalies == 1
        assert not pipe.on_fallback
    assert steps == []
    (line,) = log
    digest = hashlib.sha256(b"a star").hexdigest()[:12]
    assert f"anomaly at step 1 (sigma 0.858), seed 5, prompt {digest}: latents are not" in line


def test_a_request_that_is_not_finite_is_drawn_by_the_fallback(
    broken: dict[str, Path], calibrated: Path, log: list[str]
) -> None:
    with Pipeline.load(calibrated, threads=1) as pipe:
        expected = pipe.generate("a star", seed=5, **QUICK)
    with Pipeline.load(broken["nan"], threads=1, fallback=calibrated) as pipe:
        first = pipe.generate("a star", seed=5, **QUICK)
        np.testing.assert_array_equal(first.images, expected.images)
        assert f"drawn again with the fallback {calibrated}" in first.notes
        assert [anomaly.seed for anomaly in first.anomalies] == [5]
        assert not pipe.on_fallback
        pipe.generate("a star", seed=6, **QUICK)
        assert pipe.on_fallback
        assert any("2 anomalous images in a row" in line for line in log)
        third = pipe.generate("a star", seed=5, **QUICK)
        np.testing.assert_array_equal(third.images, expected.images)
        assert third.notes == (f"drawn with the fallback {calibrated}",)
        assert pipe.anomalies == 2, "the poisoned engines did not run"
        pipe.restore()
        assert not pipe.on_fallback
        assert pipe.generate("a star", seed=7, **QUICK).anomalies
        assert not pipe.on_fallback, "restore() counts anew"


def test_images_outside_the_band_are_returned_with_a_note(
    broken: dict[str, Path], calibrated: Path, log: list[str]
) -> None:
    with Pipeline.load(broken["loud"], threads=1, fallback=calibrated) as pipe:
        result = pipe.generate("a star", seed=3, **QUICK)
        (anomaly,) = result.anomalies
        assert anomaly.finite
        assert "of the latents" in anomaly.what
        assert result.notes == (str(anomaly),)
        assert sum(str(anomaly) in line for line in log) == 1
        assert not pipe.on_fallback
        # One run of two images is enough for a second in a row.
        pipe.generate(["a star", "a ring"], **QUICK)
        assert pipe.on_fallback
        assert pipe.generate("a star", seed=3, **QUICK).anomalies == ()


def test_only_two_in_a_row_switch(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    pipe = engines.pipeline(tiny_bundle, fallback=tiny_bundle)
    ill: set[int] = set()

    def explode(latents: np.ndarray, outputs: Any) -> None:
        if engines.steps in ill:
            outputs["next_latents"][:] = np.inf

    engines.poison = explode
    with pipe:
        for healthy in range(3):
            ill.add(engines.steps + 1)
            assert pipe.generate("a star", **QUICK).anomalies  # drawn by the fallback
            if healthy < 2:
                assert not pipe.generate("a star", **QUICK).anomalies
        assert not pipe.on_fallback
        assert pipe.anomalies == 3
        ill.add(engines.steps + 1)
        pipe.generate("a star", **QUICK)
        assert pipe.on_fallback


@pytest.mark.parametrize("odd", [{"guidance": 60}, {"shift": 0.02}, {"shift": 90}])
def test_what_one_asks_for_moves_nobody_else(tiny_bundle: Path, odd: dict[str, Any]) -> None:
    engines = FakeEngines()
    engines.poison = lambda _, outputs: outputs["next_latents"].fill(np.inf)
    with engines.pipeline(tiny_bundle, fallback=tiny_bundle) as pipe:
        for _ in range(4):
            with pytest.raises(NotFinite):
                pipe.generate("a star", **QUICK | odd)
            assert not pipe.on_fallback
        for in_a_row in range(2):
            assert not pipe.on_fallback
            with pytest.raises(NotFinite):
                pipe.generate("a star", **QUICK)
            assert pipe.on_fallback == (in_a_row == 1)


@pytest.mark.parametrize("odd", [{"guidance": 60}, {"shift": 0.02}])
def test_statistics_are_of_usual_requests(tiny_bundle: Path, odd: dict[str, Any]) -> None:
    for arguments, found in (({}, 1), (odd, 0)):
        guard = guard_for(Bundle.open(tiny_bundle).manifest, BAND, **arguments)
        guard.look(1, 0.5, noise(0.0, 9.0))
        assert len(guard.anomalies) == found


def test_what_the_fallback_cannot_draw_raises(tiny_bundle: Path, tmp_path: Path) -> None:
    """What is advised is a more precise policy, where there is one."""
    engines = FakeEngines()

    def explode(latents: np.ndarray, outputs: Any) -> None:
        outputs["next_latents"][:] = np.inf

    engines.poison = explode
    with (
        engines.pipeline(tiny_bundle, fallback=tiny_bundle) as pipe,
        pytest.raises(NotFinite, match="not finite after step 1"),
    ):
        pipe.generate("a star", **QUICK)
    assert pipe.anomalies == 2
    for precision, words in (("half", "--policy fp32"), ("fp32", "lower the guidance")):
        record = PolicyRecord("own", "0" * 64, (PolicyRule("*", "*", precision, ""),))
        bundle = edited(tiny_bundle, tmp_path / precision, partial(replace, policy=record))
        with engines.pipeline(bundle) as pipe, pytest.raises(NotFinite, match=words):
            pipe.generate("a star", **QUICK)


@pytest.mark.parametrize("with_fallback", [True, False])
def test_others_in_the_run_keep_their_images(tiny_bundle: Path, with_fallback: bool) -> None:
    expected = FakeEngines().pipeline(tiny_bundle).generate("a star", seed=1, **QUICK)
    engines = FakeEngines(held=True)

    def explode(latents: np.ndarray, outputs: Any) -> None:
        if len(latents) == 2:
            outputs["next_latents"][1] = np.nan

    engines.poison = explode
    pipe = engines.pipeline(tiny_bundle, fallback=tiny_bundle if with_fallback else None)
    with PipelinePool({"a": pipe}) as pool:
        pool.submit("a star", **QUICK)
        engines.wait_for_step()
        healthy, ill = (pool.submit("a star", seed=seed, **QUICK) for seed in (1, 2))
        engines.release()
        np.testing.assert_array_equal(healthy.result(PATIENCE).images, expected.images)
        assert healthy.result().anomalies == ()
        if with_fallback:
            assert [a.image for a in ill.result(PATIENCE).anomalies] == [0]
        else:
            with pytest.raises(NotFinite, match=r"not finite after step 1 \(seed 2\)"):
                ill.result(PATIENCE)
    assert engines.batches == ([1, 2, 1] if with_fallback else [1, 2])


def test_what_was_cancelled_is_not_drawn_again(tiny_bundle: Path) -> None:
    engines = FakeEngines()

    def explode(latents: np.ndarray, outputs: Any) -> None:
        if engines.steps == 2:
            outputs["next_latents"][0] = np.nan

    engines.poison = explode
    with engines.pipeline(tiny_bundle, fallback=tiny_bundle) as pipe:
        ill, healthy = (
            Job(pipe.request("a star", seed=seed, **QUICK), callback)
            for seed, callback in ((1, lambda step: False), (2, None))
        )
        pipe.draw([ill, healthy])
        assert isinstance(ill.outcome, Cancelled)
        assert isinstance(healthy.outcome, Result)
        assert engines.batches == [2]


def test_fallbacks_that_do_not_fit(tiny_bundle: Path, tmp_path: Path) -> None:
    changes: dict[str, Callable[[Manifest], Manifest]] = {
        "is large, .* is mini": lambda m: replace(m, model=replace(m.model, variant="large")),
        "was built without guidance": lambda m: replace(m, guided=False),
        "accepts fewer batches": lambda m: replace(m, ranges=replace(m.ranges, batch=(1, 2))),
        "accepts fewer .* sizes": lambda m: replace(m, ranges=replace(m.ranges, size_step=128)),
        "accepts fewer .* text": lambda m: replace(m, ranges=replace(m.ranges, t5_tokens=(64, 99))),
    }
    for i, (words, change) in enumerate(changes.items()):
        other = edited(tiny_bundle, tmp_path / str(i), change)
        with pytest.raises(BundleError, match=f"the fallback {other} {words}"):
            Pipeline.load(tiny_bundle, fallback=other)
    with pytest.raises(BundleError, match="is not a bundle"):
        Pipeline.load(tiny_bundle, fallback=tmp_path / "nowhere")
