"""The example server: OpenAI's form, a bounded queue, clients that go away."""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from control_nets import every_feature
from cpp_adapters import random_adapter
from cpp_build import environment, examples
from PIL import Image

from sd35_trt.formats.adapter import write_adapter
from sd35_trt.runtime import Control, Pipeline

PATH = "/v1/images/generations"


class Server:
    """A running one."""

    def __init__(self, bundle: Path, *options: object) -> None:
        program = examples() / "server" / "sd35_server"
        if not program.exists():
            pytest.skip("the example server is not built: cpp-httplib of 0.18 or libpng is missing")
        words = [program, bundle, "--port", 0, "--threads", 1, *options]
        self.process = subprocess.Popen(
            list(map(str, words)), stdout=subprocess.PIPE, text=True, env=environment()
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.fullmatch(r"http://127\.0\.0\.1:(\d+)\n", line)
        assert match, line
        self.port = int(match[1])

    def ask(self, method: str, path: str, body: str | bytes = "") -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()

    def draw(self, **fields: Any) -> tuple[int, dict[str, Any]]:
        status, body = self.ask("POST", PATH, json.dumps(fields))
        return status, json.loads(body)

    def picture(self, **fields: Any) -> np.ndarray:
        status, answer = self.draw(**fields)
        assert status == 200, answer
        return decoded(answer["data"][0])

    def metric(self, name: str) -> float:
        _, body = self.ask("GET", "/metrics")
        [value] = re.findall(rf"^{re.escape(name)} (\S+)$", body.decode(), re.MULTILINE)
        return float(value)

    def begin(self, **fields: Any) -> socket.socket:
        """A request whose answer is not read."""
        body = json.dumps(fields).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(head + body)
        return connection

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            assert self.process.stdout is not None
            self.process.stdout.close()


def decoded(entry: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(entry["b64_json"]))))


def wait_until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def server(mini_bundle: Path) -> Iterator[Server]:
    running = Server(mini_bundle)
    yield running
    assert running.stop() == 0


def test_pictures_are_pythons(server: Server, mini_bundle: Path) -> None:
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        expected = pipe.generate("a red star", seed=3, batch=2, size=(192, 64), steps=3)
    status, answer = server.draw(prompt="a red star", seed=3, n=2, size="192x64", steps=3)
    assert status == 200
    for entry, image, seed in zip(answer["data"], expected.images, (3, 4), strict=True):
        np.testing.assert_array_equal(decoded(entry), image)
        assert entry["seed"] == seed
    assert abs(answer["created"] - time.time()) < 60


def test_text_cut_within_a_character_is_replaced(server: Server) -> None:
    expected = server.picture(prompt="a \ufffd star \ufffd \\ud800 \U0001f308", steps=2)
    body = '{"prompt": "a \\ud800 star \\uDC00 \\\\ud800 \\ud83c\\udf08", "steps": 2}'
    status, answer = server.ask("POST", PATH, body)
    assert status == 200, answer
    np.testing.assert_array_equal(decoded(json.loads(answer)["data"][0]), expected)


_PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(40)).decode()

BAD: list[tuple[str | bytes, str]] = [
    ('{"prompt": "a", "weighting": 1}', "weighting must be true or false"),
    ('{"prompt": "a", "prompt_3": []}', "prompt_3 must be text"),
    ('{"prompt": "(a:1e9)", "weighting": true}', "-100 to 100"),
    ('{"prompt": "a", "adapters": {"/etc/passwd": 1}}', 'there is no adapter "/etc/passwd"'),
    ('{"prompt": "a", "adapters": ["style"]}', "adapters must be an object"),
    ('{"prompt": "a", "skip_guidance_layers": 1}', "skip_guidance_layers must be a list"),
    ('{"prompt": "a", "skip_guidance_layers": [0.5]}', "must be a whole number"),
    ('{"prompt": "a", "skip_guidance_layers": [1]}', "built without skip-layer guidance"),
    ('{"prompt": "a", "control": {"canny": 1}}', "control.canny must be an object"),
    ('{"prompt": "a", "control": {"canny": {}}}', "control.canny.image is missing"),
    ('{"prompt": "a", "control": {"canny": {"image": "?"}}}', "PNG file in base64"),
    (json.dumps({"prompt": "a", "control": {"canny": {"image": _PNG}}}), "must be a PNG file"),
    ('{"prompt": "a", "control": {"canny": {"picture": "a"}}}', 'the field "picture" of control'),
    ('{"prompt": "a", "strength": 0.5}', 'the field "strength" is not known'),
    ("", "no JSON"), ("[]", "must be an object"), ("{}", "prompt is missing"),
    ('{"prompt": 5}', "prompt must be text"), ('{"prompt": "a", "n": 1.5}', "n must be a whole"),
    ('{"prompt": "a", "n": 0}', "batch must be 1 to"), ('{"prompt": "a", "n": 9}', "9 images"),
    ('{"prompt": "a", "size": "big"}', "size must be such as"),
    ('{"prompt": "a", "size": "64x"}', "size must be such as"),
    ('{"prompt": "a", "size": "65x64"}', "the nearest is 64x64"),
    ('{"prompt": "a", "steps": 9999}', "steps must be 1 to 1000"),
    ('{"prompt": "a", "seed": -1}', "seed must be"),
    ('{"prompt": "a", "seed": 18446744073709551616}', "seed must be"),
    ('{"prompt": "a", "response_format": "url"}', "must be b64_json"),
    ('{"prompt": "a", "colour": 1}', 'the field "colour" is not known'),
    ('{"prompt": "a", "guidance": "high"}', "guidance must be a number"),
    ('{"prompt": "a", "guidance": 1e999}', "no JSON"), ('{"prompt": "a"', "no JSON"),
    (b'{"prompt": "\xff"}', "no JSON"), ('{"prompt": ' + "[" * 100_000, "nested too deeply"),
    (json.dumps({"prompt": "x" * 10_001}), "10,001 characters"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), BAD, ids=[words for _, words in BAD])
def test_what_cannot_be_drawn_is_refused(body: str | bytes, words: str, server: Server) -> None:
    status, answer = server.ask("POST", PATH, body)
    error = json.loads(answer)["error"]
    assert status == error["code"] == 400
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()


def ask_edit(
    server: Server, fields: dict[str, str], files: dict[str, bytes]
) -> tuple[int, dict[str, Any]]:
    """A form, as ``curl -F`` sends it."""
    mark = "----of-a-form"
    parts = [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()
        for name, value in fields.items()
    ] + [
        f'--{mark}\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
        "Content-Type: image/png\r\n\r\n".encode()
        + content
        + b"\r\n"
        for name, content in files.items()
    ]
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=120)
    with contextlib.closing(connection):
        kind = f"multipart/form-data; boundary={mark}"
        body = b"".join(parts) + f"--{mark}--\r\n".encode()
        connection.request("POST", "/v1/images/edits", body, {"Content-Type": kind})
        response = connection.getresponse()
        return response.status, json.loads(response.read())


PIXELS = (np.arange(64 * 64 * 3) % 251).astype(np.uint8).reshape(64, 64, 3)


@pytest.fixture(scope="module")
def everything(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(**every_feature(tmp_path_factory.mktemp("nets")))


def test_all_that_a_bundle_can(everything: Path, tmp_path: Path) -> None:
    """Texts and weights, adapters, skipped layers, ControlNets, and edits under a mask."""
    adapter = tmp_path / "style.safetensors"
    write_adapter(adapter, random_adapter(everything, 4, 1))
    steps: dict[str, Any] = {"steps": 3, "seed": 5}
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9}
    own = {**steps, **skip, "prompt_2": "a ring", "prompt_3": "(a:1.3) star", "weighting": True}
    control = {"image": base64.b64encode(png(PIXELS)).decode(), "scale": 0.6, "end": 0.8}
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    clear = np.dstack([PIXELS, 255 - mask])
    server = Server(everything, "--adapter", f"style={adapter}")
    with Pipeline.load(everything, threads=1) as pipe:
        pipe.load_adapter("style", adapter)

        def check(answer: tuple[int, dict[str, Any]], **arguments: Any) -> None:
            status, body = answer
            assert status == 200, body
            [expected] = pipe.generate("a red star", **arguments).images
            np.testing.assert_array_equal(decoded(body["data"][0]), expected)

        fields = {**own, "size": "64x64", "adapters": {"style": 0.7}, "control": {"canny": control}}
        drawn = server.draw(
            prompt="a red star", negative_prompt="grey", negative_prompt_2="", **fields
        )
        check(
            drawn, **own, size=(64, 64), adapters={"style": 0.7}, negative="grey", negative_2="",
            controls={"canny": Control(PIXELS, 0.6, end=0.8)},
        )  # fmt: skip
        start = {"prompt": "a red star", "steps": "4", "seed": "7"}
        edit = {"image": PIXELS, "steps": 4, "seed": 7}
        check(ask_edit(server, start, {"image": png(PIXELS)}), **edit)
        masked = {**edit, "mask": mask, "strength": 1.0, "paste": True}
        files = {"image": png(PIXELS), "mask": png(mask)}
        check(ask_edit(server, {**start, "paste": "true"}, files), **masked)
        check(ask_edit(server, {**start, "paste": "true"}, {"image": png(clear)}),
              **{**masked, "image": Image.fromarray(clear)})  # fmt: skip
        adapted = {**start, "strength": "0.5", "adapters": '{"style": 0.4}'}
        check(ask_edit(server, adapted, {"image": png(PIXELS)}), **edit, strength=0.5,
              adapters={"style": 0.4})  # fmt: skip
    refused: list[tuple[dict[str, str], dict[str, bytes], str]] = [
        (start, {}, "image is missing"), (start, {"image": b"no picture"}, "image must be a PNG"),
        (start, {"image": png(PIXELS), "mask": b""}, "mask must be a PNG"),
        (start, {"image": png(PIXELS), "other": b""}, 'the file "other" is not known'),
        ({**start, "paste": "yes"}, {"image": png(PIXELS)}, "paste must be as in JSON"),
        ({**start, "strength": "2"}, {"image": png(PIXELS)}, "strength must be 0 to 1"),
        (start, {"image": png(PIXELS[:60])}, "the nearest is 64x64"),
        ({"steps": "4"}, {"image": png(PIXELS)}, "prompt is missing"),
        ({**start, "control": "[]"}, {"image": png(PIXELS)}, "control must be an object"),
    ]  # fmt: skip
    for form, files, words in refused:
        status, body = ask_edit(server, form, files)
        assert status == 400
        assert words in body["error"]["message"]
    assert server.stop() == 0


def test_other_paths_and_large_bodies(server: Server) -> None:
    assert server.ask("GET", "/health") == (200, b'{"status":"ok"}')
    assert server.ask("GET", "/other")[0] == 404
    assert server.ask("POST", PATH, "x" * (17 << 20))[0] == 413


def test_a_client_that_goes_away_cancels(server: Server) -> None:
    gone = 'sd35_requests_total{status="499"}'
    before = 0.0
    with contextlib.suppress(ValueError):  # not counted yet
        before = server.metric(gone)
    connection = server.begin(prompt="a star that nobody waits for", steps=1000)
    time.sleep(0.3)  # so that it is drawn
    connection.close()
    start = time.monotonic()
    server.picture(prompt="a red star", steps=1)
    assert time.monotonic() - start < 10, "a thousand steps take longer"

    def counted() -> bool:
        with contextlib.suppress(ValueError):
            return server.metric(gone) == before + 1
        return False

    wait_until(counted)


def test_a_full_queue_refuses(mini_bundle: Path) -> None:
    running = Server(mini_bundle, "--queue", 2)
    drawn = running.begin(prompt="first", steps=1000)
    wait_until(lambda: running.metric("sd35_waiting") == 0)
    time.sleep(0.3)
    waiting = [running.begin(prompt="waits", steps=1000, seed=i) for i in range(2)]
    wait_until(lambda: running.metric("sd35_waiting") == 2)
    status, answer = running.draw(prompt="too many")
    assert status == 429
    assert answer["error"]["type"] == "rate_limit_error"
    for connection in (drawn, *waiting):
        connection.close()
    wait_until(lambda: running.metric("sd35_waiting") == 0)
    assert running.draw(prompt="again", steps=1)[0] == 200
    # What is drawn and what waits ends with the server.
    running.begin(prompt="last", steps=1000)
    time.sleep(0.3)
    assert running.stop() == 0


def soak(server: Server, count: int, pictures: dict[int, np.ndarray]) -> None:
    """Many clients at once: some leave, some send nonsense; nobody gets another's picture."""
    generator = random.Random(7)
    kinds = [generator.random() for _ in range(count)]

    def one(number: int) -> None:
        seed = number % len(pictures)
        if kinds[number] < 0.1:
            connection = server.begin(prompt="a star", seed=seed, steps=2)
            time.sleep(kinds[number])
            connection.close()
        elif kinds[number] < 0.15:
            assert server.ask("POST", PATH, '{"prompt": ')[0] == 400
        else:
            image = server.picture(prompt="a star", seed=seed, steps=2, size="64x64")
            difference = np.abs(image.astype(int) - pictures[seed].astype(int))
            assert difference.max() <= 1, "it is another's, or of another batch"

    with concurrent.futures.ThreadPoolExecutor(16) as clients:
        list(clients.map(one, range(count)))


def check_soak(server: Server, count: int) -> None:
    pictures = {
        seed: server.picture(prompt="a star", seed=seed, steps=2, size="64x64")
        for seed in range(12)
    }
    process = psutil.Process(server.process.pid)
    soak(server, count // 10, pictures)
    before = process.memory_info().rss
    soak(server, count - count // 10, pictures)
    assert process.memory_info().rss - before < 32 << 20
    # The last who went away may still wait.
    wait_until(lambda: server.metric("sd35_waiting") == 0)


def test_many_clients(server: Server) -> None:
    check_soak(server, 200)


@pytest.mark.nightly
def test_many_more_clients(server: Server) -> None:
    check_soak(server, 2000)
