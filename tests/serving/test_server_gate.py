"""Who may ask, and how much they may send."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_engines import FakeEngines
from servers import ADMIN, PATIENCE, TOKEN, Running, running

from sd35_trt.errors import UsageError
from sd35_trt.serving.answers import wants_png
from sd35_trt.serving.settings import Settings, is_loopback, read_token

GENERATIONS = "/v1/images/generations"
QUICK: dict[str, Any] = {"prompt": "a star", "steps": 1, "size": "64x64"}
SETTINGS = Settings(token=TOKEN, admin_token=ADMIN, body_limit=20_000, upload_limit=0.3)


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    with running({"tiny": FakeEngines().pipeline(tiny_bundle)}, SETTINGS) as server:
        yield server


@pytest.fixture(scope="module")
def local(tiny_bundle: Path) -> Iterator[Running]:
    """Without a token, on a loopback address."""
    settings = Settings(local=True)
    with running({"tiny": FakeEngines().pipeline(tiny_bundle)}, settings) as server:
        yield server


def code(response: httpx.Response) -> str:
    return str(response.json()["error"]["code"])


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, f"Bearer {ADMIN}",
     "Bearer \xff"],
)  # fmt: skip
def test_without_the_token_nothing_is_drawn(server: Running, header: str | None) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in (GENERATIONS, "/v1/images/edits", "/v1/models", "/v1/nothing"):
        response = httpx.post(server.url + path, json=QUICK, headers=headers)
        assert (response.status_code, code(response)) == (401, "invalid_api_key")
        assert response.headers["www-authenticate"] == "Bearer"


def test_health_metrics_and_pages_are_open(server: Running) -> None:
    for path in ("/health/live", "/health/ready", "/metrics", "/", "/docs", "/openapi.json"):
        assert httpx.get(server.url + path).status_code == 200


def test_the_admin_endpoints_have_a_token_of_their_own(server: Running, local: Running) -> None:
    assert server.client.get("/admin/traffic").status_code == 401
    admin = {"Authorization": f"bearer {ADMIN}"}
    assert server.client.get("/admin/traffic", headers=admin).status_code == 200
    response = local.client.get("/admin/traffic", headers=admin)
    assert (response.status_code, code(response)) == (403, "no_admin_token")


def test_other_sites_pages_do_not_draw_on_this_machine(local: Running, server: Running) -> None:
    def status(one: Running, **headers: str) -> int:
        return one.client.post(GENERATIONS, json=QUICK, headers=headers).status_code

    port = local.client.base_url.port
    assert status(local) == 200
    assert status(local, Host=f"localhost:{port}", Origin=f"http://localhost:{port}") == 200
    assert status(local, Origin="https://example.org") == 403
    assert status(local, Origin="null") == 403
    assert status(local, Host="example.org") == 403
    assert status(local, Host="[") == 403
    assert status(local, Host=f"localhost.example.org:{port}") == 403
    # A page of another site does not have the token.
    assert status(server, Host="pictures.example.org", Origin="https://example.org") == 200


def test_json_that_calls_itself_text_is_not_read(local: Running) -> None:
    response = local.client.post(
        GENERATIONS, content=json.dumps(QUICK), headers={"Content-Type": "text/plain"}
    )
    assert response.status_code == 422


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(server: Running, chunked: bool) -> None:
    body = json.dumps({**QUICK, "prompt": "x" * 30_000}).encode()
    content: Any = iter([body[:10_000], body[10_000:]]) if chunked else body
    headers = {"Content-Type": "application/json"}
    response = server.client.post(GENERATIONS, content=content, headers=headers)
    assert (response.status_code, code(response)) == (413, "body_too_large")
    files = {"image": b"x" * 30_000}
    response = server.client.post("/v1/images/edits", data={"prompt": "a"}, files=files)
    assert response.status_code == 413
    assert server.client.post(GENERATIONS, json=QUICK).status_code == 200


def test_a_body_that_does_not_come(server: Running) -> None:
    with socket.create_connection((server.client.base_url.host, server.client.base_url.port)) as s:
        s.settimeout(PATIENCE)
        s.sendall(
            f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n"
            "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{".encode()
        )
        assert s.recv(12) == b"HTTP/1.1 408"


def test_paths_that_are_not_there(server: Running) -> None:
    assert code(server.client.get("/v1/images")) == "not_found"
    assert code(server.client.get(GENERATIONS)) == "method_not_allowed"
    assert code(server.client.get("/../../etc/passwd")) == "not_found"
    assert code(server.client.get("/page/draw.html")) == "not_found"


@pytest.mark.parametrize(
    ("accept", "png"),
    [
        ("", False),
        ("*/*", False),
        ("image/png", True),
        ("image/*", True),
        ("IMAGE/PNG;q=0.5", True),
        ("application/json, image/png", False),
        ("application/json;q=0.5, image/png", True),
        ("image/png;q=0.2, */*;q=0.5", False),
        ("image/png;q=x", True),
        ("image/png;q=0", False),
        ("text/html", False),
    ],
)
def test_what_accept_asks_for(accept: str, png: bool) -> None:
    assert wants_png(accept) == png


def test_token_files(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"  {TOKEN}\n")
    assert read_token(file, "--token-file") == TOKEN
    for content in (b"", b"short", b"two words of a longer token", b"\xff" * 40):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="--token-file"):
            read_token(file, "--token-file")
    with pytest.raises(UsageError, match="No such file"):
        read_token(tmp_path / "none", "--token-file")
    with pytest.raises(UsageError, match="directory"):
        read_token(tmp_path, "--token-file")


@pytest.mark.parametrize(
    ("host", "inside"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_which_hosts_are_this_machine(host: str, inside: bool) -> None:
    assert is_loopback(host) == inside


def test_settings_are_not_shown_in_messages() -> None:
    assert TOKEN not in repr(SETTINGS)
