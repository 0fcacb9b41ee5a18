"""Requests that schemathesis generates from the OpenAPI page: none breaks the server."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from servers import PATIENCE, TOKEN, Running, running

from sd35_trt.runtime import Pipeline
from sd35_trt.serving.settings import Settings

# Operations that the page names, and those with a body: of the others there are few requests.
_OPERATIONS, _BODIES = 11, 5


@pytest.fixture(scope="module")
def server(tiny_bundle: Path) -> Iterator[Running]:
    # One token for all, as a fuzzer has.
    limits = Settings(token=TOKEN, admin_token=TOKEN, time_limit=PATIENCE)
    pipelines = {name: Pipeline.load(tiny_bundle, threads=1) for name in ("half", "fp8")}
    with running(pipelines, limits) as server:
        yield server


@pytest.mark.parametrize("requests", [200, pytest.param(2000, marks=pytest.mark.nightly)])
def test_no_generated_request_breaks_it(server: Running, requests: int) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == _OPERATIONS
    statuses: list[int] = []
    headers = {"Authorization": f"Bearer {TOKEN}"}

    def ask(case: schemathesis.Case) -> None:
        response = case.call(headers=headers, timeout=PATIENCE)
        assert response.status_code < 500, (case.as_curl_command(), response.text)
        statuses.append(response.status_code)

    for operation, mode in itertools.product(operations, GenerationMode):
        share = settings(
            max_examples=math.ceil(requests / _BODIES / len(GenerationMode)),
            deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        # Of an operation that takes nothing, no request is bad.
        with contextlib.suppress(Unsatisfiable):
            share(given(operation.as_strategy(mode))(ask))()
    assert {200, 422} <= set(statuses)
    assert len(statuses) >= requests
    assert server.client.get("/health/live").status_code == 200
