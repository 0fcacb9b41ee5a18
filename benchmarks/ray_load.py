"""Requests to an application on Ray, and whether each is answered with its own picture."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from ray_cluster import TOKEN
from serve import body, percentiles
from serve_targets import PATH

from sd35_trt.runtime import Pipeline

_PATIENCE = 120.0
_HEADERS = {"Authorization": f"Bearer {TOKEN}"}


def picture_hash(pixels: np.ndarray) -> str:
    """What tells a picture, uint8 [H, W, 3], from others."""
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def expected(bundle: Path, count: int, steps: int, size: str) -> list[str]:
    """The hash of each request's picture, drawn alone."""
    width, height = map(int, size.split("x"))
    hashes = []
    with Pipeline.load(bundle, threads=1) as pipe:
        for number in range(count):
            asked = body(number, steps, size)
            drawn = pipe.generate(
                asked["prompt"], seed=asked["seed"], steps=steps, size=(width, height)
            )
            hashes.append(picture_hash(drawn.images[0]))
    return hashes


@dataclass
class Load:
    """Requests from clients that ask again as soon as they are answered.

    Attributes:
        hashes: what each request may give.
        sent: how many requests.
        statuses: how many answers had each.
        again: requests that were refused with 503, and asked again.
        wrong: what did not end as it should.
        seconds: each request took.
        taken: seconds of all.
    """

    url: str
    steps: int
    size: str
    hashes: list[set[str]]
    sent: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    again: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    taken: float = 0.0

    def run(self, connections: int, events: Mapping[int, Callable[[], None]]) -> None:
        """Send each request once.

        Args:
            events: called, in this thread, when so many were sent.
        """
        start = time.perf_counter()
        with ThreadPoolExecutor(1) as beside:
            sending = beside.submit(asyncio.run, self._send(connections))
            for number, event in events.items():
                while self.sent < number and not sending.done():
                    time.sleep(0.005)
                event()
            sending.result()
        self.taken = time.perf_counter() - start

    async def _send(self, connections: int) -> None:
        async with httpx.AsyncClient(
            base_url=self.url, timeout=_PATIENCE, headers=_HEADERS
        ) as client:
            await asyncio.gather(*(self._client(client) for _ in range(connections)))

    async def _client(self, client: httpx.AsyncClient) -> None:
        while self.sent < len(self.hashes):
            number = self.sent
            self.sent += 1
            start = time.perf_counter()
            response = await self._ask(client, number)
            if response is not None and response.status_code == 503:
                self.again += 1
                await asyncio.sleep(float(response.headers.get("Retry-After", "1")))
                response = await self._ask(client, number)
            self.seconds.append(time.perf_counter() - start)
            self._check(number, response)

    async def _ask(self, client: httpx.AsyncClient, number: int) -> httpx.Response | None:
        try:
            response = await client.post(PATH, json=body(number, self.steps, self.size))
        except httpx.TransportError as error:
            self.statuses[type(error).__name__] += 1
            return None
        self.statuses[str(response.status_code)] += 1
        return response

    def _check(self, number: int, response: httpx.Response | None) -> None:
        if response is None or response.status_code != 200:
            text = "no answer" if response is None else response.text[:200]
            self.wrong.append(f"request {number} is lost: {text}")
            return
        picture = response.json()["data"][0]
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture["b64_json"]))))
        if picture["seed"] != number or picture_hash(pixels) not in self.hashes[number]:
            self.wrong.append(f"request {number} has another picture")

    def figures(self) -> dict[str, Any]:
        """JSON-serializable."""
        return {
            "per_second": len(self.seconds) / self.taken,
            "requests": len(self.hashes),
            "statuses": dict(sorted(self.statuses.items())),
            "asked_again": self.again,
            "wrong": self.wrong,
            "seconds": percentiles(self.seconds),
        }


def beside_drawing(url: str, steps: int, size: str, count: int) -> float:
    """Milliseconds of a request that are not the pool's, at the median, of one client."""
    taken = []
    with httpx.Client(base_url=url, timeout=_PATIENCE, headers=_HEADERS) as client:
        for number in range(count):
            start = time.perf_counter()
            answer = client.post(PATH, json=body(number, steps, size)).raise_for_status().json()
            taken.append(time.perf_counter() - start - answer["timings"]["total"])
    return 1e3 * statistics.median(taken)
