"""Servers for tests: in a thread of this process, over engines that a test watches, or in a
process of their own."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
from prometheus_client import CollectorRegistry

from sd35_trt.runtime import Pipeline, PipelinePool
from sd35_trt.runtime.metrics import Metrics
from sd35_trt.serving.app import make_app
from sd35_trt.serving.server import Server, address_of, bind, configuration
from sd35_trt.serving.service import Service
from sd35_trt.serving.settings import Settings

#: Nothing that a test waits for takes longer, unless it never comes.
PATIENCE = 120.0

TOKEN = "a-token-of-clients-0123456789"
ADMIN = "a-token-of-operators-0123456789"


@dataclass
class Running:
    """A server in a thread.

    Attributes:
        url: where it is.
        client: sends its token.
        service: that draws.
    server: in whose thread it runs.
    """

    url: str
    client: httpx.Client
    service: Service
    server: Server

    def stop(self) -> None:
        """As a signal does."""
        self.server.should_exit = True


@contextlib.contextmanager
def running(
    pipelines: dict[str, Pipeline], settings: Settings | None = None, queue: int = 16,
    warm: bool = True,
) -> Iterator[Running]:  # fmt: skip
    """A server over pipelines, which are closed with it."""
    settings = settings or Settings(token=TOKEN, admin_token=ADMIN, time_limit=PATIENCE)
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    pool = PipelinePool(pipelines, queue_limit=queue, observer=metrics)
    try:
        metrics.watch(pool)
        service = Service(pool, settings)
        if warm:
            service.warm_up()
        sock = bind("127.0.0.1", 0)
        url = address_of(sock)
        ready = threading.Event()
        server = Server(
            configuration(make_app(service, registry, pool), settings), service, ready.set
        )
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        assert ready.wait(PATIENCE)
        headers = {} if settings.token is None else {"Authorization": f"Bearer {settings.token}"}
        with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
            yield Running(url, client, service, server)
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()
    finally:
        pool.close(wait=False)


@contextlib.contextmanager
def serving(*words: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """``sd35-trt serve`` on a free port: the process, and its URL."""
    options = ("--port", "0", "--threads", "1")
    command = [sys.executable, "-m", "sd35_trt", "serve", *options, *map(str, words)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("listening on "), process.stderr and process.stderr.read()
        yield process, line.split()[-1]
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()


def picture_file(folder: Path, size: tuple[int, int] = (64, 64)) -> Path:
    """A PNG of two colours."""
    from PIL import Image

    image = Image.new("RGB", size, "navy")
    image.paste("orange", (size[0] // 4, size[1] // 4, size[0] // 2, size[1] // 2))
    path = folder / f"{size[0]}x{size[1]}.png"
    image.save(path)
    return path
