"""What a request meets before its body is read: who asks, and how much they may send."""

from __future__ import annotations

import asyncio
import hmac
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .failures import Refusal
from .settings import Settings, is_loopback

_AUTHENTICATION = "authentication_error"


class Gate:
    """Middleware that refuses strangers, other sites' pages, and bodies that are too large or too
    slow. Health, metrics and the pages are open to all.

    Args:
        app: what stands behind it.
        settings: tokens and limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        try:
            self._check_site(headers)
            self._check_token(scope["path"], headers)
            self._check_length(headers)
        except Refusal as refusal:
            await refusal.response()(scope, receive, send)
            return
        limits = self._settings.body_limit, self._settings.upload_limit
        await self._app(scope, LimitedBody(receive, *limits), send)

    def _check_site(self, headers: Headers) -> None:
        """A page of another site that is open in a browser here has this machine's address."""
        if not self._settings.local:
            return
        host = headers.get("host", "")
        origin = headers.get("origin")
        if not is_loopback(_hostname(host)):
            raise Refusal(403, "the Host header names another machine", "foreign_host")
        if origin is not None and urlsplit(origin).netloc != host:
            raise Refusal(403, "pages of other sites may not draw here", "foreign_origin")

    def _check_token(self, path: str, headers: Headers) -> None:
        settings = self._settings
        if path.startswith("/admin/"):
            if settings.admin_token is None:
                raise Refusal(
                    403, "the server was started without --admin-token-file", "no_admin_token",
                    _AUTHENTICATION,
                )  # fmt: skip
            wanted = settings.admin_token
        elif path.startswith("/v1/") and settings.token is not None:
            wanted = settings.token
        else:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        given_bytes = given.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given_bytes, wanted.encode()):
            raise Refusal(
                401, "the token is missing or wrong — send it as: Authorization: Bearer TOKEN",
                "invalid_api_key", _AUTHENTICATION, headers={"WWW-Authenticate": "Bearer"},
            )  # fmt: skip

    def _check_length(self, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self._settings.body_limit:
            raise Refusal(413, _too_large(self._settings.body_limit), "body_too_large")


class LimitedBody:
    """Receives a request's body, up to a limit and within a time.

    Args:
        receive: ASGI's.
        limit: bytes.
        seconds: until all of it is there.
    """

    def __init__(self, receive: Receive, limit: int, seconds: float) -> None:
        self._receive = receive
        self._left = self._limit = limit
        self._deadline = asyncio.get_running_loop().time() + seconds
        self._complete = False

    async def __call__(self) -> Message:
        """ASGI's ``receive``.

        Raises:
            HTTPException: of status 408 or 413.
        """
        if self._complete:  # the next one comes when the client leaves
            return await self._receive()
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            message = await asyncio.wait_for(self._receive(), max(0, left))
        except (TimeoutError, asyncio.TimeoutError):
            raise HTTPException(408, "the body did not come in time") from None
        if message["type"] == "http.request":
            self._left -= len(message.get("body", b""))
            self._complete = not message.get("more_body", False)
        if self._left < 0:
            raise HTTPException(413, _too_large(self._limit))
        return message


def _too_large(limit: int) -> str:
    return f"the body has more than {limit:,} bytes"


def _hostname(host: str) -> str:
    """The name in a Host header; nothing where there is none that is one."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
