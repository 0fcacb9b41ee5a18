"""Server-sent events: progress, previews, pictures and failures; and what previews show."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import FakeEngines, overflow
from PIL import Image
from servers import Running, picture_file, running

from sd35_trt.runtime import Pipeline
from sd35_trt.serving.events import evenly
from sd35_trt.serving.previews import Preview

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
QUICK: dict[str, Any] = {"prompt": "a star", "steps": 6, "size": "64x64", "seed": 4}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with running({"tiny": Pipeline.load(tiny_bundle, threads=1)}) as server:
        yield server


def events(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line[0] != ":")
        if lines:
            data = json.loads(lines["data"])
            assert lines["event"] == data.get("type", "error")
            found.append(data)
    return found


def pixels(event: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(event["b64_json"]))))


def test_a_stream_shows_steps_previews_and_pictures(server: Running) -> None:
    body = {**QUICK, "stream": True, "progress": True, "partial_images": 2, "n": 2}
    response = server.client.post(GENERATIONS, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response.text)
    kinds = [event["type"].removeprefix("image_generation.") for event in found]
    assert kinds == [
        "progress", "progress", "partial_image", "partial_image", "progress", "progress",
        "partial_image", "partial_image", "progress", "progress", "completed", "completed",
    ]  # fmt: skip
    steps = [event["step"] for event in found if "step" in event]
    assert steps == [1, 2, 3, 4, 5, 6]
    partial = [event for event in found if event["type"].endswith("partial_image")]
    assert [(e["partial_image_index"], e["index"]) for e in partial] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert {pixels(event).shape for event in partial} == {(8, 8, 3)}
    whole = server.client.post(GENERATIONS, json={**QUICK, "n": 2}).json()
    assert [event["b64_json"] for event in found[-2:]] == [
        picture["b64_json"] for picture in whole["data"]
    ]
    assert [event["seed"] for event in found[-2:]] == [4, 5]


def test_a_stream_of_an_edit(server: Running, tmp_path: Path) -> None:
    fields = {"prompt": "a", "steps": "4", "stream": "true", "partial_images": "1"}
    files = {"image": picture_file(tmp_path).read_bytes()}
    found = events(server.client.post(EDITS, data=fields, files=files).text)
    assert [event["type"] for event in found] == [
        "image_edit.partial_image",
        "image_edit.completed",
    ]


def test_a_stream_that_is_refused_has_a_status(server: Running) -> None:
    response = server.client.post(GENERATIONS, json={**QUICK, "stream": True, "n": 9})
    assert (response.status_code, response.json()["error"]["param"]) == (422, "n")


def test_what_fails_while_it_streams_is_an_event(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}) as server:
        engines.error = overflow()
        response = server.client.post(GENERATIONS, json={**QUICK, "stream": True})
        assert response.status_code == 200
        (found,) = events(response.text)
        assert found["error"]["code"] == "engine_failed"


def test_a_silent_stream_says_that_it_lives(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sd35_trt.serving.events.IDLE", 0.05)
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}) as server:
        engines.hold()
        with server.client.stream("POST", GENERATIONS, json={**QUICK, "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines) == ": waiting"
            engines.release()
            assert any(line == "event: image_generation.completed" for line in lines)


@pytest.mark.parametrize(
    ("count", "total", "steps"),
    [(0, 28, []), (1, 28, [13]), (3, 28, [6, 13, 20]), (3, 2, [0, 1]), (5, 1, [0])],
)
def test_previews_are_spread_over_the_steps(count: int, total: int, steps: list[int]) -> None:
    shown = evenly(count)
    assert [index for index in range(total) if shown(index, total)] == steps


_HELD_OUT = (
    "a red cross on a gray background",
    "a cyan ring on a navy background",
    "a pink heart on a cream background",
)


def test_a_preview_is_learnt_from_pictures_and_shows_the_estimate(mini_bundle: Path) -> None:
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        preview = Preview(pipe.manifest.latent_channels)
        with pytest.raises(ValueError, match="learnt"):
            preview.show(np.zeros((16, 8, 8), np.float32))
        for background in ("white", "black", "gray", "cream", "navy", "brown"):
            learnt = pipe.generate(f"a small orange star on a {background} background", steps=4)
            preview.learn(learnt.latents, learnt.images)
        estimates: list[list[np.ndarray]] = []
        pictures = []
        for prompt in _HELD_OUT:
            seen: list[np.ndarray] = []
            result = pipe.generate(
                prompt, steps=6, callback=lambda s, seen=seen: seen.append(s.denoised[0].copy())
            )
            estimates.append(seen)
            pictures.append(shrunk(result.images[0]))

    def distances(denoised: np.ndarray) -> list[float]:
        shown = np.asarray(Image.open(io.BytesIO(preview.show(denoised))), float)
        return [float(np.abs(shown - picture).mean()) for picture in pictures]

    for own, seen in enumerate(estimates):
        # From the middle on, it shows what is being drawn.
        for denoised in seen[3:]:
            assert int(np.argmin(distances(denoised))) == own


def shrunk(image: np.ndarray) -> np.ndarray:
    """A picture with one pixel for each of its latents'."""
    height, width = image.shape[0] // 8, image.shape[1] // 8
    return image.reshape(height, 8, width, 8, 3).mean((1, 3))


def test_many_threads_teach_one_preview() -> None:
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(4, 3)) * 20
    preview = Preview(4)

    def teach() -> None:
        latents = rng.normal(size=(1, 4, 8, 8)).astype(np.float32)
        colours = (latents[0].transpose(1, 2, 0) @ truth + 128).clip(0, 255)
        preview.learn(latents, colours.repeat(8, 0).repeat(8, 1)[None].astype(np.uint8))

    threads = [threading.Thread(target=teach) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    latents = rng.normal(size=(4, 8, 8)).astype(np.float32)
    shown = np.asarray(Image.open(io.BytesIO(preview.show(latents))), float)
    expected = (latents.transpose(1, 2, 0) @ truth + 128).clip(0, 255)
    assert np.abs(shown - expected).mean() < 2
