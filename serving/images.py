"""``POST /v1/images/generations`` and ``POST /v1/images/edits``."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Control, Result

from .answers import Answer, Failure, json_answer, png_answer, wants_png
from .bodies import Body, EditBody, GenerationBody
from .controls import controls_of
from .drawing import Drawing
from .events import drawing_events, evenly, event
from .failures import LEFT, Refusal, refusal_of
from .forms import EDIT_FORM, Edit, read_edit
from .pictures import decode_mask, decode_picture
from .service import Service, culprit

_T = TypeVar("_T")

_ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": Answer,
        "content": {"image/png": {}, "text/event-stream": {}},
        "description": "The pictures.",
    },
    **{
        status: {"model": Failure, "description": description}
        for status, description in (
            (400, "The body is not JSON, or no form."),
            (401, "The token is missing or wrong."),
            (403, "A page of another site asks."),
            (404, "There is no model of this name."),
            (408, "The body did not come in time."),
            (413, "The body is too large."),
            (422, "A value cannot be drawn."),
            (429, "The queue is full."),
            (500, "An engine failed."),
            (503, "The server is about to stop."),
            (504, "The time limit."),
        )
    },
}


def image_routes(service: Service) -> APIRouter:
    """The endpoints that draw."""
    router = APIRouter(tags=["images"])

    @router.post("/v1/images/generations", response_model=None, responses=_ANSWERS)
    async def generate(body: GenerationBody, request: Request) -> Response:
        """Draw pictures of a text."""
        bundle = service.bundle_of(body.model, _key(service, body, request))
        service.check_adapters(body.adapters)
        arguments = body.arguments()
        if body.control:
            arguments = await asyncio.to_thread(_with_controls, service, bundle, body, arguments)
        return await _draw(service, request, body, bundle, arguments, "image_generation")

    @router.post(
        "/v1/images/edits", response_model=None, responses=_ANSWERS,
        openapi_extra={"requestBody": EDIT_FORM},
    )  # fmt: skip
    async def edit(request: Request, edit: Annotated[Edit, Depends(read_edit)]) -> Response:
        """Draw pictures that start from one, or draw anew what a mask says of it."""
        body = edit.body
        bundle = service.bundle_of(body.model, _key(service, body, request))
        image = await edit.image.read()
        mask = None if edit.mask is None else await edit.mask.read()
        arguments = await asyncio.to_thread(_with_picture, service, bundle, body, image, mask)
        return await _draw(service, request, body, bundle, arguments, "image_edit")

    return router


def _key(service: Service, body: Body, request: Request) -> str | None:
    header = service.settings.key_header
    return body.user if header is None else request.headers.get(header)


def _with_picture(
    service: Service, bundle: str, body: EditBody, image: bytes, mask: bytes | None
) -> dict[str, Any]:
    """A body's arguments with uploaded pictures, decoded and of the size that is drawn."""
    pipe = service.pool.pipelines[bundle]
    service.check_adapters(body.adapters)
    picture = decode_picture(image)
    # As OpenAI has it, a picture's own alpha is its mask, where it has no other.
    own = picture.mask if pipe.manifest.features.inpainting else None
    drawn = own if mask is None else decode_mask(mask)
    arguments = body.arguments(masked=drawn is not None)
    arguments |= {"image": picture.pixels, "mask": drawn}
    if pipe.manifest.component("vae_encoder") is None:
        raise Refusal(422, "this model draws from no picture", "invalid_value", param="image")
    return _with_controls(service, bundle, body, arguments)


def _with_controls(
    service: Service, bundle: str, body: Body, arguments: dict[str, Any]
) -> dict[str, Any]:
    """Arguments with the pictures that nets follow; all pictures are as they are drawn from."""
    pipe = service.pool.pipelines[bundle]
    if body.control:
        known = {control.name for control in pipe.manifest.controls}
        pictures = service.settings.pictures
        arguments = {**arguments, "controls": controls_of(body.control, known, pictures)}
    try:
        request = pipe.request(**arguments)
    except UsageError as error:
        raise refusal_of(error, culprit(pipe, arguments)) from error
    controls = {
        use.name: Control(use.pictures[0], use.scales[0], use.start, use.end)
        for use in request.controls
    }
    arguments = {**arguments, "controls": controls or None}
    if request.image is None:
        return arguments
    drawn = None if request.mask is None else request.mask[0]
    return {**arguments, "image": request.image[0], "mask": drawn, "size": None}


async def _draw(
    service: Service,
    request: Request,
    body: Body,
    bundle: str,
    arguments: dict[str, Any],
    kind: str,
) -> Response:
    if body.stream:
        return await _stream(service, body, bundle, arguments, kind)
    answer = png_answer if wants_png(request.headers.get("accept", "")) else json_answer
    if answer is png_answer and body.n > 1:
        raise Refusal(422, "n: image/png holds one picture — accept JSON", "invalid_value",
                      param="n")  # fmt: skip
    with service.drawing(bundle, arguments) as drawing:
        result = await _unless_gone(request, drawing.result())
        if result is None:
            return Response(status_code=LEFT)
        service.drawn(result)
        return await asyncio.to_thread(_finish, service, bundle, result, answer)


def _finish(service: Service, bundle: str, result: Result, answer: Any) -> Response:
    service.learn(bundle, result)
    response: Response = answer(result, bundle)
    return response


async def _unless_gone(request: Request, work: Awaitable[_T]) -> _T | None:
    """What a coroutine returns; None when the client leaves before, and it is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    """Return when the client has left; its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    service: Service, body: Body, bundle: str, arguments: dict[str, Any], kind: str
) -> Response:
    """The stream of a request that the pool has accepted: one that it refuses has a status."""
    opened = contextlib.ExitStack()
    shown = evenly(body.partial_images or 0)
    drawing = opened.enter_context(service.drawing(bundle, arguments, shown))
    return _EventStream(
        _events(service, drawing, opened, kind, body.progress),
        opened,
    )


async def _events(
    service: Service, drawing: Drawing, opened: contextlib.ExitStack, kind: str, progress: bool
) -> AsyncIterator[bytes]:
    def finished(result: Result) -> None:
        service.learn(drawing.bundle, result)
        service.drawn(result)

    preview = service.preview(drawing.bundle)
    try:
        with opened:
            async for data in drawing_events(drawing, preview, kind, progress, finished):
                yield data
    except Refusal as refusal:
        yield event("error", refusal.body())


class _EventStream(StreamingResponse):
    """Gives the request up also where no event was ever sent."""

    def __init__(self, events: AsyncIterator[bytes], opened: contextlib.ExitStack) -> None:
        # Proxies are not to hold events back.
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._opened = opened

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._opened.close()
