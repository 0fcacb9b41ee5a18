"""Failures as clients see them: a status, and OpenAI's JSON.

====== ==============================================================
422    a value that cannot be drawn, by the field's name
429    the queue is full; ``Retry-After`` says when to ask again
503    the server is about to stop
504    the time limit
500    an engine failed; its log says why
====== ==============================================================
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sd35_trt.errors import (
    Cancelled,
    NotFinite,
    OutOfMemory,
    PoolBusy,
    Sd35Error,
    TimedOut,
    UsageError,
)

logger = logging.getLogger("sd35_trt")

#: Of an answer that nobody reads: nginx's number for a client that left.
LEFT = 499

_INVALID = "invalid_request_error"
_SERVER = "server_error"

# Engine failures in a row after which the process is better started anew.
_BROKEN = 3

# By class of the error: status, type and code. The first that fits.
_KINDS: tuple[tuple[type[Sd35Error], int, str, str], ...] = (
    (UsageError, 422, _INVALID, "invalid_value"),
    # The same request fails again: clients repeat what is 5xx.
    (NotFinite, 422, _INVALID, "not_finite"),
    (OutOfMemory, 422, _INVALID, "out_of_memory"),
    (PoolBusy, 429, "rate_limit_error", "queue_full"),
    (TimedOut, 504, _SERVER, "time_limit"),
    (Cancelled, 503, _SERVER, "stopping"),
)

# Of what the framework refuses, and the gate while a body comes.
_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_too_slow",
    413: "body_too_large",
}


class Refusal(Exception):
    """A request that is not answered with pictures.

    Attributes:
        status: of HTTP.
        message: one line.
        kind, code: ``type`` and ``code`` of OpenAI's form.
        param: the field that it is about; None where it is no field.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        kind: str = _INVALID,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.kind, self.param, self.headers = kind, param, dict(headers or {})

    def body(self) -> dict[str, Any]:
        """OpenAI's form."""
        error = {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code
        }  # fmt: skip
        return {"error": error}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def refusal_of(error: Exception, param: str | None = None, retry_after: int = 1) -> Refusal:
    """How a client is told of an error.

    Args:
        param: the field that it is about.
        retry_after: seconds, where the client may ask again.
    """
    if isinstance(error, Refusal):
        return error
    for kind, status, name, code in _KINDS:
        if isinstance(error, kind):
            headers = {"Retry-After": str(retry_after)} if status in (429, 503) else {}
            return Refusal(status, str(error), code, name, param, headers)
    # What it says may name files of the server's.
    logger.error("a request failed", exc_info=error)
    message = "drawing failed; the server's log says why"
    return Refusal(500, message, "engine_failed", _SERVER)


def engine_failed(error: Exception) -> bool:
    """Whether drawing failed for no reason that a client is told."""
    return not isinstance(error, (Refusal, *(kind for kind, *_ in _KINDS)))


class EngineHealth:
    """Tells engines that fail every request."""

    def __init__(self) -> None:
        self._failures = 0

    def succeeded(self) -> None:
        """Note a request that was drawn."""
        self._failures = 0

    def failed(self, error: Exception) -> None:
        """Note a request that was not; what is a client's doing does not count."""
        self._failures += engine_failed(error)

    @property
    def broken(self) -> bool:
        """Whether the engines failed so often in a row that the process should start anew."""
        return self._failures >= _BROKEN


def short(name: str) -> str:
    """A client's name for something, not so long that it hides the message."""
    return name if len(name) <= 40 else f"{name[:40]}…"


def refusal_of_fields(errors: Sequence[Mapping[str, Any]]) -> Refusal:
    """How a client is told of pydantic's errors: of the first.

    Args:
        errors: as ``ValidationError.errors()`` gives them.
    """
    error = errors[0]
    if error["type"] == "json_invalid":
        return Refusal(400, "the body is not JSON", "invalid_json")
    loc = error["loc"]
    path = [short(str(part)) for part in (loc[1:] if loc[:1] in (("body",), ("path",)) else loc)]
    field, where = next(iter(path), None), ".".join(path)
    if error["type"] == "extra_forbidden":
        message, code = f"{where} is no field of this request — leave it out", "unknown_field"
    elif error["type"] == "missing":
        message, code = f"{where or 'the body'} is missing", "missing_field"
    elif field is None:
        message, code = "the body must be a JSON object", "invalid_value"
    else:
        message, code = f"{where}: {error['msg']}", "invalid_value"
    return Refusal(422, " ".join(message.split()), code, param=field)


def answer_failures(app: FastAPI) -> None:
    """Have every failure of an application answered in OpenAI's form."""

    @app.exception_handler(Refusal)
    async def refused(request: Request, error: Refusal) -> JSONResponse:
        return error.response()

    @app.exception_handler(Sd35Error)
    async def failed(request: Request, error: Sd35Error) -> JSONResponse:
        return refusal_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return refusal_of_fields(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "bad_request")
        message = " ".join(str(error.detail).split())
        return Refusal(error.status_code, message, code, headers=error.headers).response()

    @app.exception_handler(ClientDisconnect)
    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(Exception)
    async def unforeseen(request: Request, error: Exception) -> JSONResponse:
        message = "the server failed; its log says why"
        return Refusal(500, message, "server_failed", _SERVER).response()
