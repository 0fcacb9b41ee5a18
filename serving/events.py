"""A request's steps and pictures as server-sent events, named as OpenAI names them."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from sd35_trt.runtime import Result

from .answers import encoded, of_result
from .drawing import Drawing, Seen
from .previews import Preview

#: Seconds of silence after which a comment says that the connection lives.
IDLE = 10.0


def evenly(count: int) -> Callable[[int, int], bool]:
    """Which steps are shown as previews, of any number of steps.

    Args:
        count: of previews.

    Returns:
        A function of a step's index and the number of steps.
    """

    def shown(index: int, total: int) -> bool:
        return any(
            index == max(1, round((number + 1) * total / (count + 1))) - 1
            for number in range(count)
        )

    return shown


def event(kind: str, data: dict[str, Any]) -> bytes:
    """One event; ``data`` names its kind too, as OpenAI's do."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


async def drawing_events(
    drawing: Drawing,
    preview: Preview,
    kind: str,
    progress: bool,
    finished: Callable[[Result], None],
) -> AsyncIterator[bytes]:
    """Events of a request until all its pictures are sent.

    Args:
        preview: of its bundle.
        kind: of the events: ``image_generation`` or ``image_edit``.
        progress: whether each step is one.
        finished: called with the result, in another thread.

    Raises:
        Sd35Error: see :meth:`~sd35_trt.serving.drawing.Drawing.result`.
    """
    shown = 0
    async for seen in drawing.steps(IDLE):
        if seen is None:
            yield b": waiting\n\n"
            continue
        if progress:
            yield event(f"{kind}.progress", {"step": seen.index + 1, "steps": seen.total})
        if seen.denoised is not None:
            for data in await asyncio.to_thread(_partial_images, seen, preview):
                yield event(f"{kind}.partial_image", {"partial_image_index": shown, **data})
            shown += 1
    result = drawing.outcome()
    await asyncio.to_thread(finished, result)
    for index, seed in enumerate(result.seeds):
        data = {
            "b64_json": await asyncio.to_thread(encoded, result, index),
            **_usual(),
            **of_result(result, drawing.bundle),
            "index": index,
            "seed": seed,
            "parameters": result.parameters,
            "notes": result.notes,
        }
        yield event(f"{kind}.completed", data)


def _partial_images(seen: Seen, preview: Preview) -> list[dict[str, Any]]:
    """One for each picture of the request."""
    if seen.denoised is None:
        return []
    height, width = seen.denoised.shape[2:]
    return [
        {
            "b64_json": base64.b64encode(preview.show(denoised)).decode("ascii"),
            **_usual(),
            "size": f"{width}x{height}",
            "index": index,
        }
        for index, denoised in enumerate(seen.denoised)
    ]


def _usual() -> dict[str, Any]:
    """What OpenAI's events have beside."""
    return {
        "created_at": int(time.time()),
        "background": "opaque",
        "output_format": "png",
        "quality": "auto",
    }
