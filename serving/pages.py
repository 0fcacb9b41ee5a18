"""The pages for people: one that draws, and one that lists the endpoints. Nothing in them comes
from another site."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Response

_FOLDER = Path(__file__).parent / "page"

_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css"}

#: Path → file in ``page/``.
FILES = {
    "/": "draw.html",
    "/draw.js": "draw.js",
    "/docs": "endpoints.html",
    "/endpoints.js": "endpoints.js",
    "/style.css": "style.css",
}

_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def page_routes() -> APIRouter:
    """The pages' files, read once."""
    router = APIRouter(include_in_schema=False)
    for path, name in FILES.items():
        file = _FOLDER / name
        router.add_api_route(path, _page(file.read_bytes(), _KINDS[file.suffix]), methods=["GET"])
    return router


def _page(data: bytes, kind: str) -> Callable[[], Awaitable[Response]]:
    async def page() -> Response:
        return Response(data, headers=_HEADERS, media_type=kind)

    return page
