"""Running the application: one process, one port, until it is told to stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from sd35_trt.errors import UsageError

from .service import Service
from .settings import Settings

# After the service has given up the last requests, so long may answers take.
_ANSWERING = 1.5

_BACKLOG = 1024


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet: whether it can be is known before work.

    Raises:
        UsageError: the address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, UnicodeError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"cannot listen on {host}, port {port}: {reason}", "choose another --host or --port"
        ) from error
    return sock


def address_of(sock: socket.socket) -> str:
    """The URL of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def configuration(app: ASGIApp, settings: Settings) -> uvicorn.Config:
    """How uvicorn runs an application."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        backlog=_BACKLOG,
        timeout_graceful_shutdown=int(settings.grace + _ANSWERING),
    )


class Server(uvicorn.Server):
    """uvicorn's, which has a service end its work when it stops.

    Args:
        config: see :func:`configuration`.
        service: of its application.
        started: called when requests are taken.
    """

    def __init__(
        self, config: uvicorn.Config, service: Service, started: Callable[[], object]
    ) -> None:
        super().__init__(config)
        self._service = service
        self._on_start = started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        stopping = asyncio.ensure_future(self._service.stop())
        await asyncio.sleep(0)  # new requests are refused from here on
        await super().shutdown(sockets=sockets)
        stopping.cancel()


def run(app: ASGIApp, service: Service, sock: socket.socket, started: Callable[[], object]) -> None:
    """Serve until SIGTERM or SIGINT; then requests in flight are drawn, or answered with 503 when
    the settings' ``grace`` is over.

    Args:
        sock: of :func:`bind`; closed afterwards.
        started: called when requests are taken.

    Raises:
        KeyboardInterrupt: it was SIGINT.
    """

    def stopped(signum: int, frame: FrameType | None) -> None:
        """uvicorn raises the signal again when it has stopped: then the pool is to be closed."""

    before = signal.signal(signal.SIGTERM, stopped)
    try:
        Server(configuration(app, service.settings), service, started).run(sockets=[sock])
    finally:
        signal.signal(signal.SIGTERM, before)
        sock.close()
