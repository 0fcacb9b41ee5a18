"""OpenAI's own Python client, unchanged."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest
from fake_engines import FakeEngines
from PIL import Image
from servers import TOKEN, Running, picture_file, running

from sd35_trt.runtime import Pipeline
from sd35_trt.serving.settings import Settings


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with running({"tiny": Pipeline.load(tiny_bundle, threads=1)}) as server:
        yield server


@pytest.fixture
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=0)


def pixels(data: str | None) -> np.ndarray:
    assert data is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_it_draws(client: openai.OpenAI, tiny_bundle: Path) -> None:
    response = client.images.generate(
        prompt="a star", model="tiny", n=2, size="128x64", quality="auto", background="auto",
        output_format="png", moderation="low", user="somebody",
        extra_body={"seed": 7, "steps": 3, "negative_prompt": "red"},
    )  # type: ignore[call-overload]  # fmt: skip
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        expected = pipe.generate("a star", seed=7, steps=3, negative="red", batch=2, size=(128, 64))
    drawn = [pixels(picture.b64_json) for picture in response.data]
    np.testing.assert_array_equal(drawn, expected.images)
    assert response.size == "128x64"
    assert [picture.seed for picture in response.data] == [7, 8]


def test_it_edits(client: openai.OpenAI, tmp_path: Path) -> None:
    file = picture_file(tmp_path)
    body = {"seed": 7, "steps": 4, "strength": 0.5}
    with file.open("rb") as one, file.open("rb") as other:
        alone = client.images.edit(image=one, prompt="a star", extra_body=body)
        listed = client.images.edit(image=[other], prompt="a star", extra_body=body)
    assert alone.data and listed.data  # noqa: PT018
    np.testing.assert_array_equal(pixels(alone.data[0].b64_json), pixels(listed.data[0].b64_json))


def test_it_streams(client: openai.OpenAI, tmp_path: Path) -> None:
    body = {"steps": 6, "seed": 1}
    stream = client.images.generate(prompt="a star", stream=True, partial_images=2, extra_body=body)
    kinds = []
    for event in stream:
        kinds.append((type(event).__name__, event.type))
        pixels(event.b64_json)
    partial = ("ImageGenPartialImageEvent", "image_generation.partial_image")
    assert kinds == [partial, partial, ("ImageGenCompletedEvent", "image_generation.completed")]
    with picture_file(tmp_path).open("rb") as picture:
        edits = client.images.edit(
            image=picture, prompt="a", stream=True, partial_images=1, extra_body=body
        )
        assert [event.type for event in edits] == [
            "image_edit.partial_image", "image_edit.completed"
        ]  # fmt: skip


def test_it_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "sd35-trt"


def test_it_raises_its_own_errors(client: openai.OpenAI, server: Running) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as invalid:
        client.images.generate(prompt="a star", n=9)
    assert (invalid.value.param, invalid.value.code) == ("n", "invalid_value")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt="a star", model="gpt-image-1")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="another", max_retries=0).models.list()


def test_it_asks_again_when_the_queue_is_full(tiny_bundle: Path) -> None:
    """``Retry-After`` is followed: the second time there is room."""
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}, Settings(token=TOKEN)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN, max_retries=2)
        submit, refused = server.service.pool.submit, []

        def busy_at_first(*arguments, **named):  # type: ignore[no-untyped-def]
            from sd35_trt.errors import PoolBusy

            if not refused:
                refused.append(True)
                raise PoolBusy("16 requests are waiting", "try again later")
            return submit(*arguments, **named)

        server.service.pool.submit = busy_at_first  # type: ignore[method-assign]
        assert client.images.generate(prompt="a star", extra_body={"steps": 1}).data
        assert refused
