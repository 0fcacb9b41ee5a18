"""What the endpoints share: the pool, previews, what is being drawn, and whether all is well."""

from __future__ import annotations

import asyncio
import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sd35_trt.errors import Cancelled, Sd35Error, UsageError
from sd35_trt.runtime import Result

from .bodies import FIELDS
from .drawing import Drawing, Model, Pool
from .failures import EngineHealth, Refusal, refusal_of
from .previews import Preview
from .settings import Settings

logger = logging.getLogger("sd35_trt")

# Of the mean time of a request, what the last one weighs.
_WEIGHT = 0.2

_LONGEST_RETRY = 60

# Few steps load as many engines; between them, the pictures have the colours that previews are
# learnt from.
_WARM_UP_STEPS = 4
_WARM_UP_PROMPTS = (
    "a red ball on green grass under a blue sky",
    "a yellow flower on a black background",
    "a purple square beside an orange square on white",
    "a brown house, a cyan car and a pink cloud",
)


class Service:
    """Draws for the endpoints. Used in the event loop's thread, unless a method says otherwise.

    Args:
        pool: draws; it is closed by who made it.
        settings: limits.

    Attributes:
        stopping: whether new requests are refused.
    """

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self.pool = pool
        self.settings = settings
        self.stopping = False
        self._previews = {
            name: Preview(pipe.manifest.latent_channels) for name, pipe in pool.pipelines.items()
        }
        self._drawings: set[Drawing] = set()
        self._health = EngineHealth()
        self._seconds = 1.0

    def warm_up(self) -> None:
        """Draw pictures with each bundle on each device; previews are learnt from them. Takes as
        long as that does: before the loop runs.

        Raises:
            Sd35Error: a bundle that does not draw.
        """
        if len(self.pool.devices) > 1:
            for device in self.pool.devices:
                for pipe in device.pipelines.values():
                    batch = pipe.manifest.ranges.batch[0]
                    pipe.generate(_WARM_UP_PROMPTS[0], steps=_WARM_UP_STEPS, batch=batch)
        for name, model in self.pool.pipelines.items():
            batch = model.manifest.ranges.batch[0]
            for prompt in _WARM_UP_PROMPTS:
                drawn = self.pool.submit(prompt, bundle=name, steps=_WARM_UP_STEPS, batch=batch)
                self.learn(name, drawn.result())

    def learn(self, bundle: str, result: Result) -> None:
        """Learn a preview from a finished request, in any thread."""
        self._previews[bundle].learn(result.latents, result.images)

    def preview(self, bundle: str) -> Preview:
        """The preview of a bundle."""
        return self._previews[bundle]

    def bundle_of(self, model: str | None, key: str | None) -> str:
        """The bundle that a request goes to.

        Args:
            model: as the request names it; None leaves it to the traffic.
            key: keeps a user on one bundle.

        Raises:
            Refusal: there is no such model.
        """
        if model is None:
            try:
                return self.pool.choose(key)
            except UsageError as error:
                raise refusal_of(error, "user") from error
        if model not in self.pool.pipelines:
            names = ", ".join(self.pool.pipelines)
            raise Refusal(
                404, f"there is no model of this name — use one of: {names}", "model_not_found",
                param="model",
            )  # fmt: skip
        return model

    @contextmanager
    def drawing(
        self,
        bundle: str,
        arguments: Mapping[str, Any],
        shown: Callable[[int, int], bool] | None = None,
    ) -> Iterator[Drawing]:
        """A request that is drawn, and given up when the block ends.

        Args:
            bundle: its name.
            arguments: of the request, see :meth:`~sd35_trt.runtime.Pipeline.request`.
            shown: see :class:`~sd35_trt.serving.drawing.Drawing`.

        Raises:
            Refusal: the pool does not accept it, or it has failed.
        """
        try:
            if self.stopping:
                raise Cancelled("the server is about to stop", "ask again")
            drawing = Drawing(self.pool, bundle, arguments, self.settings.time_limit, shown)
        except UsageError as error:
            raise refusal_of(error, culprit(self.pool.pipelines[bundle], arguments)) from error
        except Sd35Error as error:
            raise self._refusal(error) from error
        self._drawings.add(drawing)
        try:
            yield drawing
        except Sd35Error as error:
            raise self._refusal(error) from error
        finally:
            self._drawings.discard(drawing)
            drawing.cancel()

    def check_adapters(self, adapters: Mapping[str, float] | None) -> None:
        """Refuse names that are not the server's: the runtime would take one for a file's.

        Raises:
            Refusal: names it.
        """
        known = self.settings.adapters
        for name in adapters or ():
            if name not in known:
                listed = f"use one of: {', '.join(sorted(known))}" if known else "leave it out"
                raise Refusal(
                    422, f"there is no adapter {reprlib.repr(name)} — {listed}", "invalid_value",
                    param="adapters",
                )  # fmt: skip

    def drawn(self, result: Result) -> None:
        """Note a success."""
        self._health.succeeded()
        taken = result.timings["total"] - result.timings["queue"]
        self._seconds += _WEIGHT * (taken - self._seconds)

    def _refusal(self, error: Sd35Error) -> Refusal:
        self._health.failed(error)
        return refusal_of(error, retry_after=self.retry_after)

    @property
    def retry_after(self) -> int:
        """Seconds until what waits is drawn, as far as one can tell."""
        waiting = self.pool.waiting + 1
        return max(1, min(_LONGEST_RETRY, math.ceil(waiting * self._seconds)))

    @property
    def broken(self) -> bool:
        """Whether the engines failed so often in a row that the process should start anew."""
        return self._health.broken

    @property
    def in_flight(self) -> int:
        """How many requests wait or are being drawn."""
        return len(self._drawings)

    async def stop(self) -> None:
        """Refuse new requests, wait for those that there are, and after the settings' ``grace``
        give up the rest, which are then answered with 503.
        """
        self.stopping = True
        loop = asyncio.get_running_loop()
        end = loop.time() + self.settings.grace
        while self._drawings and loop.time() < end:
            await asyncio.sleep(0.02)
        if self._drawings:
            logger.warning("%d requests are given up: their time is over", len(self._drawings))
        for drawing in list(self._drawings):
            drawing.cancel()


def culprit(pipe: Model, arguments: Mapping[str, Any]) -> str | None:
    """The body's field without which a refused request would pass, or be refused for another
    reason; None where it is no single one.

    Args:
        arguments: of :meth:`~sd35_trt.runtime.Pipeline.request`, which refuses them.
    """

    def complaint(**changed: Any) -> str | None:
        try:
            pipe.request(**changed)
        except UsageError as error:
            return str(error)
        return None

    whole = complaint(**arguments)
    for argument, field in FIELDS.items():
        if argument not in arguments:
            continue
        others = {name: value for name, value in arguments.items() if name != argument}
        if complaint(**{"prompt": "", **others}) != whole:
            return field
    return None
