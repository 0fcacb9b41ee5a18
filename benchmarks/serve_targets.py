"""What benchmarks/serve.py loads: ``sd35-trt serve``, or Triton with the models of a bundle."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from server_process import server
from triton_client import HttpTriton, inputs
from triton_process import triton

from sd35_trt.serving.triton.export import export_triton

#: Where pictures are asked for.
PATH = "/v1/images/generations"

# Nothing is waited for longer.
_PATIENCE = 600.0

Ask = Callable[[Mapping[str, Any]], Awaitable[str]]


@dataclass(frozen=True)
class Target:
    """A server.

    Attributes:
        draw: asks for a picture and waits; returns the seconds that the server says it drew, None
            where it does not say.
        clients: opens connections, over which many ask at once: for each request, the status.
    """

    draw: Callable[[Mapping[str, Any]], float | None]
    clients: Callable[[], AbstractAsyncContextManager[Ask]]


@contextlib.contextmanager
def http_target(bundle: Path, queue: int) -> Iterator[Target]:
    """``sd35-trt serve``.

    Args:
        queue: how many requests may wait.
    """
    with (
        server(bundle, "--queue", str(queue)) as (url, _),
        httpx.Client(base_url=url, timeout=_PATIENCE) as client,
    ):

        def draw(asked: Mapping[str, Any]) -> float:
            seconds: float = _timings(client.post(PATH, json=asked))["total"]
            return seconds

        @contextlib.asynccontextmanager
        async def clients() -> AsyncIterator[Ask]:
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=_PATIENCE, limits=limits) as many:

                async def ask(asked: Mapping[str, Any]) -> str:
                    try:
                        return str((await many.post(PATH, json=asked)).status_code)
                    except httpx.TransportError as error:
                        return type(error).__name__

                yield ask

        yield Target(draw, clients)


def _timings(response: httpx.Response) -> dict[str, float]:
    timings: dict[str, float] = response.raise_for_status().json()["timings"]
    return timings


@contextlib.contextmanager
def triton_target(bundle: Path, queue: int) -> Iterator[Target]:
    """Triton from the wheel nvidia-pytriton, over HTTP; ``queue`` is Triton's own matter."""
    import tritonclient.http.aio as many_http
    from tritonclient.utils import InferenceServerException

    with tempfile.TemporaryDirectory() as folder:
        name = export_triton(bundle, Path(folder), "load", {"threads": "1"}).once
        with triton(Path(folder)) as running:
            one = HttpTriton(running.http, name)

            def draw(asked: Mapping[str, Any]) -> None:
                one.draw(asked)

            @contextlib.asynccontextmanager
            async def clients() -> AsyncIterator[Ask]:
                many = many_http.InferenceServerClient(
                    running.http, conn_limit=1000, conn_timeout=_PATIENCE
                )

                async def ask(asked: Mapping[str, Any]) -> str:
                    try:
                        await many.infer(name, inputs(many_http, asked))
                    except InferenceServerException as error:
                        return str(error.status())
                    return "200"

                try:
                    yield ask
                finally:
                    await many.close()

            yield Target(draw, clients)
