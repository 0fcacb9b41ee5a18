"""``sd35-trt serve`` as a user sees it: options, refusals, and how it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import one_error_line
from fake_engines import FakeEngines
from servers import ADMIN, PATIENCE, TOKEN, picture_file, running, serving

from sd35_trt.errors import UsageError
from sd35_trt.serving.names import named_bundles, named_fallbacks, parse_traffic
from sd35_trt.serving.server import address_of, bind
from sd35_trt.serving.settings import Settings

GENERATIONS = "/v1/images/generations"
QUICK: dict[str, Any] = {"prompt": "a star", "steps": 2, "size": "64x64"}


def ended(process: subprocess.Popen[str], number: int) -> tuple[int, float, str]:
    """Exit status, seconds until then, and standard error, of a process that gets a signal."""
    start = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    return process.returncode, time.monotonic() - start, err


def test_it_serves_what_it_was_started_with(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "admin").write_text(ADMIN)
    words = (
        f"half={tiny_bundle}", f"fp8={tiny_bundle}", "--traffic", "half=0,fp8=100",
        "--fallback", f"fp8={tiny_bundle}", "--key-header", "X-Account", "--body-limit", "1MiB",
        "--queue", 3, "--device", "cpu,cpu", "--threads", 1, "--time-limit", 100,
        "--host", "0.0.0.0", "--control", f"frame={picture_file(tmp_path)}",
        "--token-file", tmp_path / "token", "--admin-token-file", tmp_path / "admin",
    )  # fmt: skip
    with serving(*words) as (process, url):
        assert url.startswith("http://0.0.0.0:")
        local = url.replace("0.0.0.0", "127.0.0.1")
        headers = {"Authorization": f"Bearer {TOKEN}"}
        with httpx.Client(base_url=local, headers=headers, timeout=PATIENCE) as client:
            assert client.post(GENERATIONS, json=QUICK).json()["model"] == "fp8"
            control = {"canny": {"picture": "frame"}}
            without = client.post(GENERATIONS, json={**QUICK, "control": control}).json()["error"]
            assert (without["param"], "--controlnet" in without["message"]) == ("control", True)
            large = client.post(GENERATIONS, json={**QUICK, "prompt": "x" * (1 << 20)})
            assert large.status_code == 413
            assert httpx.get(local + "/v1/models").status_code == 401
            traffic = client.get("/admin/traffic", headers={"Authorization": f"Bearer {ADMIN}"})
            assert traffic.json() == {"traffic": {"half": 0, "fp8": 100}}
            metrics = client.get("/metrics").text
            assert "process_resident_memory_bytes" in metrics
            assert 'sd35_trt_device_memory_bytes{device="cpu#2"}' in metrics
        status, seconds, err = ended(process, signal.SIGTERM)
    assert (status, err) == (0, "")
    assert seconds < 5


def test_a_client_that_leaves_while_it_sends_is_no_failure(tiny_bundle: Path) -> None:
    kinds = ("application/json", "multipart/form-data; boundary=x")
    with serving(tiny_bundle) as (process, url):
        address = url.removeprefix("http://")
        for path, kind in zip((GENERATIONS, "/v1/images/edits"), kinds, strict=True):
            host, port = address.split(":")
            with socket.create_connection((host, int(port))) as connection:
                head = f"POST {path} HTTP/1.1\r\nHost: {address}\r\nContent-Type: {kind}\r\n"
                connection.sendall(f"{head}Content-Length: 1000\r\n\r\n--x\r\n".encode())
                time.sleep(0.2)
        time.sleep(0.2)
        assert httpx.post(url + GENERATIONS, json=QUICK, timeout=PATIENCE).status_code == 200
        assert ended(process, signal.SIGTERM)[::2] == (0, "")


def test_an_interrupt_ends_it(tiny_bundle: Path) -> None:
    with serving(tiny_bundle) as (process, url):
        assert httpx.get(url + "/health/ready").status_code == 200
        status, _, err = ended(process, signal.SIGINT)
    assert (status, err.strip()) == (130, "interrupted")


@pytest.mark.parametrize("size", [None, "64x64"])
def test_what_was_accepted_is_answered_when_it_is_told_to_stop(
    mini_bundle: Path, size: str | None
) -> None:
    """Small pictures are drawn in time; of large ones, the last are not."""
    body = {**QUICK, "size": size, "steps": 3 if size else 150}
    with (
        serving(mini_bundle, "--queue", 100) as (process, url),
        ThreadPoolExecutor(20) as threads,
        httpx.Client(base_url=url, timeout=PATIENCE) as client,
    ):
        answers: list[Future[httpx.Response]] = [
            threads.submit(client.post, GENERATIONS, json={**body, "seed": seed, "stream": False})
            for seed in range(20)
        ]
        end = time.monotonic() + PATIENCE
        while client.get("/health/ready").json()["in_flight"] < 20 and time.monotonic() < end:
            time.sleep(0.01)
            if any(answer.done() for answer in answers):
                break  # so quick that they are never there all at once
        status, seconds, _ = ended(process, signal.SIGTERM)
        statuses = []
        for answer in answers:
            # Those that were not accepted were refused a connection, or it was closed.
            with contextlib.suppress(httpx.TransportError):
                statuses.append(answer.result().status_code)
    assert status == 0
    assert seconds < 10
    assert set(statuses) <= {200, 503}
    if size is None:
        assert len(statuses) == 20
        assert 503 in statuses
    else:
        assert 200 in statuses


def test_a_stream_ends_with_an_error_when_the_server_stops(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    settings = Settings(grace=0.2)
    with running({"tiny": engines.pipeline(tiny_bundle)}, settings) as server:
        engines.hold()
        body = {**QUICK, "stream": True}
        with server.client.stream("POST", GENERATIONS, json=body) as response:
            engines.wait_for_step()
            server.stop()
            lines = list(response.iter_lines())
        assert lines[0] == "event: error"
        assert '"code": "stopping"' in lines[1]
        engines.release()


def refused(run: Any, *words: object) -> str:
    status, out, err = run("serve", *words)
    assert (status, out) == (2, "")
    return one_error_line(err)


def test_wrong_use_is_refused_before_work(run, tiny_bundle: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    absent = "no-such-bundle"  # nothing was opened where the option is what is named
    assert "and there is no token" in refused(run, absent, "--host", "0.0.0.0")
    assert "--token-file none: No such file" in refused(run, absent, "--token-file", "none")
    os.mkfifo(tmp_path / "pipe")
    for path in ("/dev/zero", tmp_path / "pipe"):
        assert "it is no regular file" in refused(run, absent, "--token-file", path)
    assert "two bundles are called bundle" in refused(run, "a/bundle", "b/bundle")
    assert "is no split" in refused(run, absent, "--traffic", "half")
    assert "there is no bundle b" in refused(run, f"a={absent}", "--traffic", "b=100")
    assert "are 90 % in all" in refused(run, f"a={absent}", "--traffic", "a=90")
    assert "there is no bundle b" in refused(run, f"a={absent}", "--fallback", "b=c")
    assert "a device without a name" in refused(run, absent, "--device", "cpu,")
    assert "--control x.png has no name" in refused(run, absent, "--control", "x.png")
    assert "no.png is missing" in refused(run, absent, "--control", "a=no.png")
    (tmp_path / "text.png").write_text("no picture")
    assert "is not a readable picture" in refused(run, absent, "--control", "a=text.png")
    elsewhere = ("--host", "203.0.113.1", "--token-file", token(tmp_path))
    assert "choose another --host or --port" in refused(run, absent, *elsewhere)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: Address already in use" in refused(run, absent, "--port", port)
    status, _, err = run("serve", absent)
    assert status == 1
    assert one_error_line(err).startswith("error: no-such-bundle")


def token(folder: Path) -> Path:
    path = folder / "token"
    path.write_text(TOKEN)
    return path


_WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from sd35_trt.cli import main
main(["serve", "bundle"])
"""


@pytest.mark.parametrize("library", ["fastapi", "uvicorn", "prometheus_client", "python_multipart"])
def test_a_library_that_is_missing_is_named(library: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _WITHOUT, library], cwd=tmp_path, capture_output=True, text=True
    )
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"error: serving needs {library} — pip install 'sd35-trt[serve]'\n"


def test_names_of_bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert named_bundles(["a/half", "x=b/half", "./c=d", "."]) == {
        "half": Path("a/half"), "x": Path("b/half"), "c=d": Path("./c=d"),
        tmp_path.name: Path(),
    }  # fmt: skip
    assert named_fallbacks(["all", "b=other"], ["a", "b"]) == {
        "a": Path("all"), "b": Path("other"),
    }  # fmt: skip
    assert parse_traffic("a=90, b=10", ["a", "b"]) == {"a": 90, "b": 10}
    assert parse_traffic("", ["a"]) == {}


def test_addresses() -> None:
    with bind("127.0.0.1", 0) as sock:
        assert address_of(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
        with socket.socket() as client, pytest.raises(ConnectionRefusedError):
            client.connect(sock.getsockname())  # it does not listen yet
    for host in ("no.such.host.invalid", "a" * 70, "\ud800"):
        with pytest.raises(UsageError, match="cannot listen on"):
            bind(host, 0)
