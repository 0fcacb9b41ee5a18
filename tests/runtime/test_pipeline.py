"""The pipeline's surface: arguments, cancelling, seeds, threads, images as input."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd35_trt.errors import Cancelled, Sd35Error, UsageError
from sd35_trt.runtime import Pipeline, Step
from sd35_trt.runtime.text_features import TextEncoder

QUICK = {"steps": 3}


@pytest.fixture(scope="module")
def pipe(mini_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(mini_bundle) as pipeline:
        yield pipeline


def test_call_returns_one_picture(pipe: Pipeline) -> None:
    image = pipe("a red star", **QUICK)
    assert isinstance(image, Image.Image)
    assert image.size == pipe.manifest.defaults.size
    assert image.mode == "RGB"


def test_generate_returns_arrays_and_timings(pipe: Pipeline) -> None:
    result = pipe.generate("a red star", seed=3, batch=2, size=(192, 128), **QUICK)
    assert result.images.shape == (2, 128, 192, 3)
    assert result.images.dtype == np.uint8
    assert result.latents.shape == (2, 16, 16, 24)
    assert result.seeds == (3, 4)
    assert result.parameters["prompt"] == ["a red star"] * 2
    assert result.parameters["steps"] == 3
    parts = [result.timings[k] for k in ("text", "conditioning", "denoise", "decode")]
    assert min(parts) >= 0
    assert sum(parts) <= result.timings["total"]


def test_a_seed_means_the_same_picture_in_any_batch(pipe: Pipeline) -> None:
    prompts = ["a red star", "two blue squares", "a small green circle"]
    together = pipe.generate(prompts, seed=[9, 5, 7], **QUICK)
    backwards = pipe.generate(prompts[::-1], seed=[7, 5, 9], **QUICK)
    for i, (prompt, seed) in enumerate(zip(prompts, (9, 5, 7), strict=True)):
        alone = pipe.generate(prompt, seed=seed, **QUICK)
        np.testing.assert_allclose(alone.latents[0], together.latents[i], atol=2e-5)
        np.testing.assert_allclose(backwards.latents[2 - i], together.latents[i], atol=2e-5)
    assert np.abs(together.latents[0] - together.latents[1]).max() > 0.1


def test_a_negative_prompt_and_guidance_matter(pipe: Pipeline) -> None:
    base = pipe.generate("a red star", **QUICK).latents
    for change in ({"negative": "a blue circle"}, {"guidance": 1.0}, {"shift": 5.0}, {"seed": 1}):
        other = pipe.generate("a red star", **{**QUICK, **change}).latents
        assert np.abs(other - base).max() > 1e-3, change


def test_samplers_draw_different_pictures(pipe: Pipeline) -> None:
    euler, dpm = (
        pipe.generate("a red star", steps=8, sampler=name).latents for name in ("euler", "dpmpp-2m")
    )
    assert np.abs(euler - dpm).max() > 1e-4


def test_callback_sees_every_step(pipe: Pipeline) -> None:
    progress: list[Step] = []
    latents: list[np.ndarray] = []

    def on_step(step: Step) -> None:
        progress.append(step)
        latents.append(step.latents.copy())

    result = pipe.generate("a red star", steps=4, callback=on_step)
    assert [(s.index, s.total) for s in progress] == [(i, 4) for i in range(4)]
    assert [s.sigma for s in progress] == sorted([s.sigma for s in progress], reverse=True)
    assert progress[-1].sigma == 0
    np.testing.assert_array_equal(latents[-1], result.latents)


def test_denoised_is_what_each_step_takes_for_the_finished_latents(tiny_bundle: Path) -> None:
    seen: list[tuple[float, np.ndarray, np.ndarray]] = []

    def on_step(step: Step) -> None:
        seen.append((step.sigma, step.latents.copy(), step.denoised.copy()))

    with Pipeline.load(tiny_bundle) as pipe:
        pipe.generate("a red star", steps=4, batch=2, sampler="euler", callback=on_step)
    # Euler's step goes from where it is to the estimate, by the share of noise that it removes.
    for (sigma, start, _), (after, end, denoised) in pairwise(seen):
        share = after / sigma
        np.testing.assert_allclose(end, share * start + (1 - share) * denoised, atol=1e-5)
    np.testing.assert_array_equal(seen[-1][1], seen[-1][2])


def test_callback_cancels_and_the_pipeline_goes_on(pipe: Pipeline) -> None:
    calls = []
    with pytest.raises(Cancelled, match="after step 2 of 5"):
        pipe.generate("a red star", steps=5, callback=lambda s: calls.append(s) or len(calls) < 2)
    assert len(calls) == 2
    pipe.generate("a red star", **QUICK)


def test_threads_take_turns(pipe: Pipeline) -> None:
    expected = {seed: pipe.generate("a red star", seed=seed, **QUICK).latents for seed in range(4)}
    actual: dict[int, np.ndarray] = {}

    def draw(seed: int) -> None:
        actual[seed] = pipe.generate("a red star", seed=seed, **QUICK).latents

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, latents in expected.items():
        np.testing.assert_array_equal(actual[seed], latents)


def test_strength_decides_how_much_of_an_image_stays(pipe: Pipeline) -> None:
    source = pipe("a large blue square", steps=4)
    distances = []
    for strength in (0.2, 0.6, 1.0):
        drawn = pipe("a red star", image=source, strength=strength, steps=10)
        distances.append(np.abs(np.asarray(drawn, int) - np.asarray(source, int)).mean())
    assert distances[0] < min(distances[1:])
    noise_only = pipe.generate("a red star", steps=10).latents
    full = pipe.generate("a red star", image=source, strength=1.0, steps=10).latents
    np.testing.assert_allclose(full, noise_only, atol=1e-5)


def test_an_image_is_taken_as_array_and_resized(pipe: Pipeline) -> None:
    array = np.zeros((100, 90, 3), np.uint8)
    result = pipe.generate("a red star", image=array, size=(128, 64), **QUICK)
    assert result.images.shape == (1, 64, 128, 3)


def test_a_long_prompt_works_and_reports_the_limit(pipe: Pipeline) -> None:
    result = pipe.generate("small red circles and " * 400, **QUICK)
    limit = pipe.manifest.tokenizers["clip_l"].length
    assert any(f"reads {limit}" in note and "clip_l" in note for note in result.notes)
    assert any("t5 tokens" in note for note in result.notes)
    assert all(len(note) < 200 for note in result.notes)
    # Cut, not corrupted: what is beyond the limit has no effect.
    again = pipe.generate("small red circles and " * 450, **QUICK)
    np.testing.assert_array_equal(again.latents, result.latents)


def test_an_empty_prompt_works(pipe: Pipeline) -> None:
    result = pipe.generate("", **QUICK)
    assert result.notes == ()


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"size": (100, 128)}, "the nearest is 128x128"),
    ({"size": (4096, 64)}, "the nearest is 192x64"),
    ({"size": (0, 0)}, "the nearest is 64x64"),
    ({"steps": 0}, "steps must be 1 to 1000, not 0"),
    ({"steps": -3}, "steps must be 1 to 1000, not -3"),
    ({"steps": 5000}, "steps must be 1 to 1000"),
    ({"guidance": float("nan")}, "guidance must be 0 to 100"),
    ({"guidance": -1.0}, "guidance must be 0 to 100"),
    ({"shift": 0.0}, "shift must be 0.01 to 100"),
    ({"batch": 0}, "batch must be 1 to"),
    ({"batch": 9}, "build with: --batch 1:9"),
    ({"sampler": "ddim"}, "use one of: euler, dpmpp-2m"),
    ({"seed": -1}, "seed must be 0 to"),
    ({"seed": [1, 2]}, "2 seeds for 1 images"),
    ({"seed": np.int64(-1)}, "seed must be 0 to"),
    ({"t5_tokens": 4}, "t5_tokens must be"),
    ({"negative": ["a", "b"]}, "2 negative prompts for 1 prompts"),
    ({"image": np.zeros((4, 4), np.float32)}, "not uint8"),
    (
        {"image": np.zeros((64, 64, 3), np.uint8), "strength": 0.0},
        "strength 0 of 10 steps is none",
    ),
    ({"image": np.zeros((65, 64, 3), np.uint8)}, "the nearest is 64x64"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments(pipe: Pipeline, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        pipe.generate("a red star", **{"steps": 10} | arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


def test_a_closed_pipeline_says_so(mini_bundle: Path) -> None:
    pipeline = Pipeline.load(mini_bundle)
    pipeline.close()
    with pytest.raises(Sd35Error, match="the pipeline is closed"):
        pipeline.generate("a red star", **QUICK)


def test_prompts_are_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.generate("a prompt not seen before", **QUICK)
    monkeypatch.setattr(TextEncoder, "_compute", lambda *_: pytest.fail("encoded again"))
    pipe.generate("a prompt not seen before", seed=5, **QUICK)
