"""Pictures over HTTP: what is drawn, what is refused and by which field."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engines import PATIENCE, FakeEngines, overflow
from PIL import Image
from servers import Running, picture_file, running

from sd35_trt.runtime import Pipeline
from sd35_trt.serving.settings import Settings

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
QUICK: dict[str, Any] = {"prompt": "a star", "steps": 2, "size": "64x64"}


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with running({"tiny": Pipeline.load(tiny_bundle, threads=1)}) as server:
        yield server


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def decoded(answer: dict[str, Any]) -> list[np.ndarray]:
    return [pixels(base64.b64decode(picture["b64_json"])) for picture in answer["data"]]


def error(response: Any, status: int) -> dict[str, Any]:
    """The error in an answer, which is one line."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    found = response.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    assert found["message"]
    assert "\n" not in found["message"]
    return found


def test_a_request_draws_what_the_pipeline_draws(server: Running, alone: Pipeline) -> None:
    body = {
        **QUICK, "negative_prompt": "red", "seed": 5, "n": 2, "guidance": 4.5, "shift": 2.0,
        "sampler": "dpmpp-2m", "steps": 4, "size": "128x64", "model": "tiny",
    }  # fmt: skip
    answer = server.client.post(GENERATIONS, json=body).json()
    expected = alone.generate(
        "a star", negative="red", seed=5, batch=2, guidance=4.5, shift=2.0, sampler="dpmpp-2m",
        steps=4, size=(128, 64),
    )  # fmt: skip
    np.testing.assert_array_equal(decoded(answer), expected.images)
    assert [picture["seed"] for picture in answer["data"]] == [5, 6]
    assert (answer["size"], answer["model"]) == ("128x64", "tiny")
    assert answer["parameters"] == json.loads(json.dumps(expected.parameters))
    assert abs(answer["created"] - time.time()) < PATIENCE


def test_without_a_seed_one_is_drawn_and_returned(server: Running) -> None:
    answers = [server.client.post(GENERATIONS, json=QUICK).json() for _ in range(2)]
    first, second = (answer["data"][0]["seed"] for answer in answers)
    assert first != second
    again = server.client.post(GENERATIONS, json={**QUICK, "seed": first}).json()
    np.testing.assert_array_equal(decoded(again), decoded(answers[0]))


def test_accept_asks_for_bytes(server: Running) -> None:
    response = server.client.post(
        GENERATIONS, json={**QUICK, "seed": 3}, headers={"Accept": "image/png"}
    )
    answer = server.client.post(GENERATIONS, json={**QUICK, "seed": 3}).json()
    assert response.headers["content-type"] == "image/png"
    assert (response.headers["x-seed"], response.headers["x-model"]) == ("3", "tiny")
    np.testing.assert_array_equal(pixels(response.content), decoded(answer)[0])
    text = Image.open(io.BytesIO(response.content)).text["sd35-trt"]  # type: ignore[attr-defined]
    assert json.loads(text)["seed"] == 3
    several = server.client.post(
        GENERATIONS, json={**QUICK, "n": 2}, headers={"Accept": "image/png"}
    )
    assert error(several, 422)["param"] == "n"


def test_an_edit_starts_from_the_picture(server: Running, alone: Pipeline, tmp_path: Path) -> None:
    file = picture_file(tmp_path, (96, 80))
    fields = {"prompt": "a star", "steps": "4", "seed": "2", "strength": "0.5", "size": "64x128"}
    expected = alone.generate(
        "a star", steps=4, seed=2, strength=0.5, size=(64, 128), image=Image.open(file)
    )
    for name in ("image", "image[]"):
        response = server.client.post(EDITS, data=fields, files={name: file.read_bytes()})
        np.testing.assert_array_equal(decoded(response.json()), expected.images)


@pytest.mark.parametrize(
    ("change", "status", "field", "words"),
    [
        ({"steps": 0}, 422, "steps", "greater than or equal to 1"),
        ({"steps": "4"}, 422, "steps", "valid integer"),
        ({"steps": True}, 422, "steps", "valid integer"),
        ({"n": 9}, 422, "n", "draws 1 to 4"),
        ({"size": "100x64"}, 422, "size", "the nearest is 128x64"),
        ({"size": "99999x99999"}, 422, "size", "nearest"),
        ({"size": "big"}, 422, "size", "pattern"),
        ({"guidance": 101}, 422, "guidance", "less than or equal to 100"),
        ({"shift": 0}, 422, "shift", "0.01"),
        ({"sampler": "/etc/passwd"}, 422, "sampler", "use one of: euler"),
        ({"seed": -1}, 422, "seed", "greater than or equal to 0"),
        ({"seed": 2**64 - 1, "n": 2}, 422, "n", "seed of the last image"),
        ({"seed": 10**400}, 422, "seed", "less than or equal"),
        ({"prompt": "x" * 10_001}, 422, "prompt", "10,001 characters"),
        ({"prompt": ["a"]}, 422, "prompt", "valid string"),
        ({"negative_prompt": "x" * 10_001}, 422, "negative_prompt", "10,001 characters"),
        ({"user": "x" * 10_001}, 422, "user", "10,001 characters"),
        ({"model": "../half"}, 404, "model", "use one of: tiny"),
        ({"response_format": "url"}, 422, "response_format", "b64_json"),
        ({"background": "transparent"}, 422, "background", "opaque"),
        ({"partial_images": 101}, 422, "partial_images", "100"),
        ({"adapters": [{"name": "a"}]}, 422, "adapters", "valid dictionary"),
        ({"controlnet": {}}, 422, "controlnet", "is no field of this request"),
        ({"image": "/etc/passwd"}, 422, "image", "is no field of this request"),
    ],
)
def test_a_bad_value_is_refused_by_its_field(
    server: Running, change: dict[str, Any], status: int, field: str, words: str
) -> None:
    found = error(server.client.post(GENERATIONS, json={**QUICK, **change}), status)
    assert found["param"] == field
    assert words in found["message"]


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"\xff\xfe", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b"", 422),
        (b"null", 422),
        (b'{"prompt": "a", "guidance": NaN}', 422),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400),
    ],
)
def test_a_body_that_is_no_request(server: Running, content: bytes, status: int) -> None:
    headers = {"Content-Type": "application/json"}
    error(server.client.post(GENERATIONS, content=content, headers=headers), status)


def test_halves_of_surrogate_pairs_are_replaced(server: Running) -> None:
    body = b'{"prompt": "a \\ud83d star", "steps": 1, "size": "64x64", "user": "\\udc00"}'
    headers = {"Content-Type": "application/json"}
    response = server.client.post(GENERATIONS, content=body, headers=headers)
    assert response.json()["parameters"]["prompt"] == ["a � star"]


def test_no_field_reads_a_file(server: Running, tmp_path: Path) -> None:
    file = picture_file(tmp_path)
    text = server.client.post(EDITS, data={"prompt": "a"}, files={"image": (None, str(file))})
    assert error(text, 422)["message"] == "image must be a file"
    named = server.client.post(
        EDITS, data={"prompt": "a"}, files={"image": (str(file), b"no picture")}
    )
    assert "must be a PNG, JPEG or WebP file" in error(named, 422)["message"]
    fields = {"prompt": str(file), "negative_prompt": f"file://{file}", "user": str(file)}
    assert server.client.post(GENERATIONS, json={**QUICK, **fields}).status_code == 200


def test_forms_that_are_refused(server: Running, tmp_path: Path) -> None:
    png = picture_file(tmp_path).read_bytes()
    fields = {"prompt": "a star", "steps": "2"}

    def sent(files: Any, **change: Any) -> tuple[str, str]:
        response = server.client.post(EDITS, data={**fields, **change}, files=files)
        found = error(response, 422)
        return found["param"], found["message"]

    one = {"image": png}
    field, message = sent({**one, "mask": png})
    assert (field, "build with: --inpainting" in message) == ("mask", True)
    assert sent({**one, "control": png})[0] == "control"
    assert sent({**one, "prompt": png})[0] == "prompt"
    assert sent([("image[]", png), ("image[]", png)]) == ("image", "image is one picture, not 2")
    assert sent({"other": png})[0] == "image"
    assert sent(one, strength="0")[0] == "strength"
    assert sent(one, strength="2")[0] == "strength"
    assert sent(one, steps="many")[0] == "steps"
    assert sent(one, steps=["2", "3"]) == ("steps", "steps is given twice")
    odd = {"image": picture_file(tmp_path, (70, 64)).read_bytes()}
    assert sent(odd)[0] == "image"
    gif = io.BytesIO()
    Image.new("RGB", (64, 64)).save(gif, format="GIF")
    assert "PNG, JPEG or WebP" in sent({"image": gif.getvalue()})[1]
    assert "PNG, JPEG or WebP" in sent({"image": png[:60]})[1]
    large = io.BytesIO()
    Image.new("1", (10_000, 5_000)).save(large, format="PNG")
    assert "more than 40 million" in sent({"image": large.getvalue()})[1]
    error(server.client.post(EDITS, json=QUICK), 422)


def test_a_full_queue_says_when_to_ask_again(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}, queue=1) as server:
        engines.hold()
        with ThreadPoolExecutor() as threads:
            first = threads.submit(server.client.post, GENERATIONS, json=QUICK)
            engines.wait_for_step()
            second = threads.submit(server.client.post, GENERATIONS, json=QUICK)
            while server.service.pool.waiting < 1:
                time.sleep(0.005)
            refused = server.client.post(GENERATIONS, json=QUICK)
            assert error(refused, 429)["code"] == "queue_full"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
            engines.release()
            assert {first.result().status_code, second.result().status_code} == {200}


def test_what_takes_too_long(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    settings = Settings(time_limit=0.2)
    with running({"tiny": engines.pipeline(tiny_bundle)}, settings) as server:
        engines.hold()
        found = error(server.client.post(GENERATIONS, json=QUICK), 504)
        assert found["code"] == "time_limit"
        engines.release()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_drawn_for_no_longer(tiny_bundle: Path, stream: bool) -> None:
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}) as server:
        before = engines.steps
        engines.hold()
        begun = threading.Event()
        thread = threading.Thread(target=_leave, args=(server, stream, begun))
        thread.start()
        engines.wait_for_step()
        begun.set()
        thread.join(PATIENCE)
        end = time.monotonic() + PATIENCE
        while server.service.in_flight and time.monotonic() < end:
            time.sleep(0.005)
        assert server.service.in_flight == 0
        engines.release()
        assert server.client.post(GENERATIONS, json=QUICK).status_code == 200
        assert engines.steps - before <= 3 + QUICK["steps"]  # of a hundred


def _leave(server: Running, stream: bool, begun: threading.Event) -> None:
    import socket

    body = json.dumps({**QUICK, "steps": 100, "stream": stream}).encode()
    host, port = server.client.base_url.host, server.client.base_url.port
    with socket.create_connection((host, port)) as connection:
        connection.sendall(
            b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            + f"{_authorization(server)}Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert begun.wait(PATIENCE)


def _authorization(server: Running) -> str:
    return f"Authorization: {server.client.headers['authorization']}\r\n"


def test_an_engine_that_fails_is_told_without_its_words(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}) as server:
        engines.error = overflow("/secret/bundle")
        for number in range(3):
            assert server.client.get("/health/live").status_code == 200, number
            found = error(server.client.post(GENERATIONS, json=QUICK), 500)
            assert (found["code"], "secret" in found["message"]) == ("engine_failed", False)
        assert server.client.get("/health/live").status_code == 503
        assert server.client.get("/health/ready").json()["status"] == "broken"
        engines.error = None
        assert server.client.post(GENERATIONS, json=QUICK).status_code == 200
        assert server.client.get("/health/live").status_code == 200


def test_pictures_that_are_not_finite_are_no_failure_of_the_server(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    with running({"tiny": engines.pipeline(tiny_bundle)}) as server:

        def poison(latents: np.ndarray, outputs: Any) -> None:
            outputs["next_latents"][:] = np.nan

        engines.poison = poison
        for _ in range(4):
            found = error(server.client.post(GENERATIONS, json=QUICK), 422)
            assert found["code"] == "not_finite"
        assert server.client.get("/health/live").status_code == 200
