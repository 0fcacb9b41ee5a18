"""Models, traffic, health, metrics and pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fake_engines import FakeEngines
from servers import ADMIN, TOKEN, Running, running

from sd35_trt.serving.pages import FILES
from sd35_trt.serving.settings import Settings

GENERATIONS = "/v1/images/generations"
QUICK: dict[str, Any] = {"prompt": "a star", "steps": 2, "size": "64x64"}
ADMINS = {"Authorization": f"Bearer {ADMIN}"}


@pytest.fixture
def server(tiny_bundle: Path) -> Iterator[Running]:
    pipelines = {name: FakeEngines().pipeline(tiny_bundle) for name in ("half", "fp8")}
    settings = Settings(token=TOKEN, admin_token=ADMIN, key_header="X-Account")
    with running(pipelines, settings) as server:
        yield server


def drawn_by(server: Running, **headers: str) -> str:
    return str(server.client.post(GENERATIONS, json=QUICK, headers=headers).json()["model"])


def test_models_are_the_bundles(server: Running) -> None:
    listed = server.client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["half", "fp8"]
    one = server.client.get("/v1/models/fp8").json()
    assert one == listed["data"][1]
    assert one["sizes"] == [64, 192]
    assert one["most_images"] == 4
    assert one["defaults"] == {
        "size": "128x128", "steps": 28, "guidance": 3.0, "shift": 3.0, "sampler": "euler"
    }  # fmt: skip
    assert one["created"] > 1_600_000_000
    missing = server.client.get("/v1/models/none")
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")


def test_traffic_and_switches(server: Running) -> None:
    assert drawn_by(server) == "half"
    split = {"traffic": {"half": 50, "fp8": 50}}
    assert server.client.put("/admin/traffic", json=split, headers=ADMINS).json() == split
    by_user = {user: drawn_by(server, **{"X-Account": user}) for user in map(str, range(12))}
    assert set(by_user.values()) == {"half", "fp8"}
    for user, model in by_user.items():
        assert drawn_by(server, **{"X-Account": user}) == model
    switched = server.client.post("/admin/switch", json={"model": "fp8"}, headers=ADMINS)
    assert switched.json() == {"traffic": {"fp8": 100}}
    assert drawn_by(server) == "fp8"
    named = server.client.post(GENERATIONS, json={**QUICK, "model": "half"}).json()
    assert named["model"] == "half"


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("PUT", "/admin/traffic", {"traffic": {"half": 50}}, "traffic"),
        ("PUT", "/admin/traffic", {"traffic": {"none": 100}}, "traffic"),
        ("PUT", "/admin/traffic", {"traffic": {"half": -1, "fp8": 101}}, "traffic"),
        ("PUT", "/admin/traffic", {"shares": {}}, "traffic"),
        ("POST", "/admin/switch", {"model": "none"}, "model"),
        ("POST", "/admin/restore", {"model": "none"}, "model"),
    ],
)
def test_admin_requests_that_are_refused(
    server: Running, method: str, path: str, body: dict[str, Any], field: str
) -> None:
    response = server.client.request(method, path, json=body, headers=ADMINS)
    assert (response.status_code, response.json()["error"]["param"]) == (422, field)
    assert drawn_by(server) == "half"


def test_a_fallback_is_shown_and_taken_back(tiny_bundle: Path) -> None:
    engines = FakeEngines()
    pipelines = {"tiny": engines.pipeline(tiny_bundle, fallback=tiny_bundle)}
    with running(pipelines) as server:
        runs = iter([True, False, True, False])

        def poison(latents: np.ndarray, outputs: Any) -> None:
            if next(runs, False):
                outputs["next_latents"][:] = np.nan

        engines.poison = poison
        body = {**QUICK, "steps": 1}
        for _ in range(2):
            answer = server.client.post(GENERATIONS, json=body).json()
            assert "drawn again with the fallback" in answer["notes"][-1]
        assert server.client.get("/health/ready").json()["on_fallback"] == ["tiny"]
        assert 'sd35_trt_fallback{bundle="tiny"} 1.0' in server.client.get("/metrics").text
        restored = server.client.post("/admin/restore", json={"model": "tiny"}, headers=ADMINS)
        assert restored.json()["on_fallback"] == []


def test_metrics_count_requests_by_bundle_and_outcome(server: Running) -> None:
    def count(outcome: str) -> float:
        text = server.client.get("/metrics").text
        found = re.search(
            rf'sd35_trt_requests_total{{bundle="half",outcome="{outcome}"}} (\S+)', text
        )
        return float(found[1]) if found else 0.0

    drawn, refused = count("ok"), count("invalid")
    server.client.post(GENERATIONS, json=QUICK)
    server.client.post(GENERATIONS, json={**QUICK, "n": 9})
    assert (count("ok"), count("invalid")) == (drawn + 1, refused + 1)


def test_health(server: Running) -> None:
    live = server.client.get("/health/live")
    expected = {"status": "live", "waiting": 0, "in_flight": 0, "on_fallback": []}
    assert (live.status_code, live.json()) == (200, expected)
    server.service.stopping = True
    ready = server.client.get("/health/ready")
    assert (ready.status_code, ready.json()["status"]) == (503, "stopping")
    assert server.client.get("/health/live").status_code == 200
    refused = server.client.post(GENERATIONS, json=QUICK)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    assert "retry-after" in refused.headers


def test_pages_load_nothing_from_elsewhere(server: Running) -> None:
    for path in FILES:
        response = httpx.get(server.url + path)
        assert response.status_code == 200
        assert not re.search(
            r"(https?:)?//[a-z]", re.sub(r"^\s*//.*$", "", response.text, flags=re.M)
        )
        policy = response.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self';")


def test_openapi_names_what_is_there(server: Running) -> None:
    spec = server.client.get("/openapi.json").json()
    assert set(spec["paths"]) == {
        GENERATIONS, "/v1/images/edits", "/v1/models", "/v1/models/{model}", "/admin/traffic",
        "/admin/switch", "/admin/restore", "/health/live", "/health/ready", "/metrics",
    }  # fmt: skip
    form = spec["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    properties = form["multipart/form-data"]["schema"]["properties"]
    assert properties["image"]["format"] == "binary"
    assert {"strength", "seed", "steps", "guidance"} <= set(properties)
    assert spec["paths"][GENERATIONS]["post"]["security"] == [{"HTTPBearer": []}]
    assert spec["paths"]["/admin/switch"]["post"]["security"] == [{"Admin": []}]
