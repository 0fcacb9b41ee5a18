"""The ingress of a fleet: where requests go, what is tried again, and what clients are told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from control_nets import every_feature
from fake_engines import PATIENCE, FakeEngines
from PIL import Image
from prometheus_client import CollectorRegistry

from sd35_trt.errors import PoolBusy, Sd35Error, UsageError
from sd35_trt.runtime import Control, Pipeline, PipelinePool, Result
from sd35_trt.runtime.metrics import Metrics
from sd35_trt.serving.app import make_app
from sd35_trt.serving.drawing import Seen
from sd35_trt.serving.failures import EngineHealth
from sd35_trt.serving.fleet.fleet import Fleet, RemoteModel
from sd35_trt.serving.fleet.orders import Answers, Order, ReplicaLost
from sd35_trt.serving.fleet.replica import Engines, Studio, answers
from sd35_trt.serving.service import Service
from sd35_trt.serving.settings import Settings

GENERATIONS = "/v1/images/generations"
QUICK: dict[str, Any] = {"prompt": "a star", "steps": 2, "size": "64x64"}


class Replicas:
    """Studios in this process, which are lost as often as a test wants.

    Attributes:
        orders: that were sent, in order.
        faults: called with the order instead of drawing, the next first.
    """

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.faults: list[Callable[[Order], Answers]] = []
        self.health = EngineHealth()
        self._studios: dict[str, Studio] = {}

    async def send(self, order: Order) -> AsyncGenerator[Seen | Result | Sd35Error, None]:
        self.orders.append(order)
        if self.faults:
            async for answer in self.faults.pop(0)(order):
                yield answer
            return
        async for answer in self.draw(order):
            yield answer

    def draw(self, order: Order) -> AsyncGenerator[Seen | Result | Sd35Error, None]:
        if order.bundle not in self._studios:
            self._studios[order.bundle] = Studio(Path(order.bundle), Engines(threads=1))
        return answers(self._studios[order.bundle].pool, order, self.health)

    async def lost(self, order: Order) -> AsyncGenerator[Seen | Result | Sd35Error, None]:
        """Ends after the first step, where that is watched, or at once."""
        async for answer in self.draw(order):
            if isinstance(answer, Seen):
                yield answer
            break
        raise ReplicaLost("ActorDiedError")

    async def busy(self, order: Order) -> AsyncGenerator[Seen | Result | Sd35Error, None]:
        raise PoolBusy("as many requests wait for a replica as may", "try again later")
        yield

    async def failing(self, order: Order) -> AsyncGenerator[Seen | Result | Sd35Error, None]:
        yield Sd35Error("/secret/engine.plan failed")


class Ingress:
    """The endpoints over replicas, and a client of them."""

    def __init__(self, bundles: dict[str, Path], shares: dict[str, float] | None = None) -> None:
        self.replicas = Replicas()
        self.registry = CollectorRegistry()
        self._bundles, self._shares = bundles, shares or {}

    def ask(self, *requests: dict[str, Any], path: str = GENERATIONS) -> list[httpx.Response]:
        """The answers to requests in turn."""
        self.registry = CollectorRegistry()

        async def all_of_them() -> list[httpx.Response]:
            models = {name: RemoteModel(path) for name, path in self._bundles.items()}
            fleet = Fleet(
                models, self._shares, self.replicas.send, asyncio.get_running_loop(),
                Metrics(self.registry),
            )  # fmt: skip
            service = Service(fleet, Settings(time_limit=PATIENCE))
            transport = httpx.ASGITransport(make_app(service, self.registry))
            async with httpx.AsyncClient(transport=transport, base_url="http://fleet") as client:
                return [await client.post(path, **request) for request in requests]

        return asyncio.run(all_of_them())

    def generate(self, **fields: Any) -> httpx.Response:
        return self.ask({"json": {**QUICK, **fields}})[0]


@pytest.fixture
def ingress(tiny_bundle: Path) -> Ingress:
    return Ingress({"tiny": tiny_bundle})


@pytest.fixture(scope="module")
def alone(tiny_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        yield pipe


def pixels(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    png = base64.b64decode(response.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_replica_draws_what_a_pipeline_draws(ingress: Ingress, alone: Pipeline) -> None:
    drawn = pixels(ingress.generate(seed=5))
    expected = alone.generate("a star", seed=5, steps=2, size=(64, 64))
    np.testing.assert_array_equal(drawn, expected.images[0])


def test_an_edit_takes_its_picture_along(ingress: Ingress, alone: Pipeline) -> None:
    image = Image.new("RGB", (64, 64), "navy")
    file = io.BytesIO()
    image.save(file, format="PNG")
    fields = {"prompt": "a star", "steps": "4", "seed": "2", "strength": "0.5"}
    request = {"data": fields, "files": {"image": file.getvalue()}}
    [response] = ingress.ask(request, path="/v1/images/edits")
    expected = alone.generate("a star", steps=4, seed=2, strength=0.5, image=image)
    np.testing.assert_array_equal(pixels(response), expected.images[0])


def test_a_request_takes_its_nets_pictures_along(
    make_bundle: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = make_bundle(**every_feature(tmp_path / "nets"))
    followed = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(followed).save(file, format="PNG")
    control = {"image": base64.b64encode(file.getvalue()).decode(), "scale": 0.5, "end": 0.8}
    ingress = Ingress({"mini": bundle})
    ingress.replicas.faults = [ingress.replicas.lost]
    drawn = pixels(ingress.generate(seed=4, control={"canny": control}))
    with Pipeline.load(bundle, threads=1) as alone:
        expected = alone.generate(
            "a star", seed=4, steps=2, size=(64, 64),
            controls={"canny": Control(followed, 0.5, end=0.8)},
        )  # fmt: skip
    np.testing.assert_array_equal(drawn, expected.images[0])
    assert len(ingress.replicas.orders) == 2
    refused = ingress.generate(control={"pose": control}).json()["error"]
    assert (refused["param"], "no ControlNet 'pose'" in refused["message"]) == ("control", True)


def test_a_lost_replica_is_replaced_with_the_same_seed(ingress: Ingress, alone: Pipeline) -> None:
    ingress.replicas.faults = [ingress.replicas.lost]
    response = ingress.generate()
    first, second = ingress.replicas.orders
    seed = response.json()["data"][0]["seed"]
    assert first.arguments == second.arguments
    assert second.arguments["seed"] == seed
    expected = alone.generate("a star", seed=seed, steps=2, size=(64, 64))
    np.testing.assert_array_equal(pixels(response), expected.images[0])
    assert second.seconds < first.seconds


def test_a_stream_goes_on_with_another_replica(ingress: Ingress) -> None:
    ingress.replicas.faults = [ingress.replicas.lost]
    fields = {"seed": 3, "steps": 4, "stream": True, "progress": True}
    events = ingress.generate(**fields).text.strip().split("\n\n")
    kinds = [event.splitlines()[0] for event in events]
    assert kinds == ["event: image_generation.progress"] * 4 + ["event: image_generation.completed"]
    assert len(ingress.replicas.orders) == 2


def test_a_request_that_ends_replicas_ends_three(ingress: Ingress) -> None:
    ingress.replicas.faults = [ingress.replicas.lost] * 10
    response = ingress.generate()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "replica_lost")
    assert response.headers["Retry-After"] == "1"
    assert len(ingress.replicas.orders) == 3


def test_a_full_queue_is_429(ingress: Ingress) -> None:
    ingress.replicas.faults = [ingress.replicas.busy]
    response = ingress.generate()
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert int(response.headers["Retry-After"]) >= 1
    assert len(ingress.replicas.orders) == 1


def test_failing_engines_are_tried_once_more(ingress: Ingress) -> None:
    ingress.replicas.faults = [ingress.replicas.failing]
    assert ingress.generate().status_code == 200
    ingress.replicas.faults = [ingress.replicas.failing] * 2
    response = ingress.ask({"json": QUICK})[0]
    assert response.status_code == 500
    assert "secret" not in response.text
    assert not ingress.replicas.faults


def test_what_cannot_be_drawn_reaches_no_replica(ingress: Ingress) -> None:
    response = ingress.generate(size="100x100")
    assert (response.status_code, response.json()["error"]["param"]) == (422, "size")
    assert ingress.generate(model="other").status_code == 404
    assert not ingress.replicas.orders


def test_the_model_or_the_traffic_decides(tiny_bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.symlink_to(tiny_bundle)
    ingress = Ingress({"tiny": tiny_bundle, "other": other}, {"other": 100.0})
    found = [ingress.generate(**fields).json()["model"] for fields in ({}, {"model": "tiny"})]
    assert found == ["other", "tiny"]
    assert [order.bundle for order in ingress.replicas.orders] == [str(other), str(tiny_bundle)]


def test_requests_are_counted(ingress: Ingress) -> None:
    ingress.replicas.faults = [ingress.replicas.lost]
    ingress.ask({"json": QUICK}, {"json": QUICK})
    labels = {"bundle": "tiny", "outcome": "ok"}
    assert ingress.registry.get_sample_value("sd35_trt_requests_total", labels) == 2


def test_a_fleet_needs_a_bundle() -> None:
    with pytest.raises(UsageError, match="a fleet needs a bundle"):
        Fleet({}, {}, Replicas().send, asyncio.new_event_loop(), lambda span: None)


def order(bundle: Path, steps: int = 2) -> Order:
    arguments = {"prompt": "a star", "seed": 1, "steps": steps, "size": (64, 64)}
    return Order(str(bundle), arguments, PATIENCE)


def test_a_replica_whose_engines_fail_is_broken(tiny_bundle: Path) -> None:
    engines, health = FakeEngines(), EngineHealth()

    async def draw(pool: PipelinePool, wanted: Order) -> list[Any]:
        return [answer async for answer in answers(pool, wanted, health)]

    with PipelinePool({"bundle": engines.pipeline(tiny_bundle)}) as pool:
        engines.error = Sd35Error("the engine failed")
        for _ in range(3):
            assert not health.broken
            [answer] = asyncio.run(draw(pool, order(tiny_bundle)))
            assert answer is engines.error
        assert health.broken
        [refused] = asyncio.run(draw(pool, order(tiny_bundle, steps=0)))
        assert isinstance(refused, UsageError)
        engines.error = None
        [drawn] = asyncio.run(draw(pool, order(tiny_bundle)))
        assert isinstance(drawn, Result)
        assert not health.broken


def test_broken_engines_hold_on_to_what_fails(tiny_bundle: Path) -> None:
    """Until the replica is taken out: one that fails at once has the least to do, and gets all."""
    engines, health = FakeEngines(), EngineHealth()
    engines.error = Sd35Error("the engine failed")

    async def draw(pool: PipelinePool) -> list[float]:
        taken = []
        for _ in range(4):
            start = time.monotonic()
            async for _ in answers(pool, order(tiny_bundle), health, hold=0.5):
                pass
            taken.append(time.monotonic() - start)
        return taken

    with PipelinePool({"bundle": engines.pipeline(tiny_bundle)}) as pool:
        taken = asyncio.run(draw(pool))
    assert min(taken[2:]) >= 0.5 > max(taken[:2])


def test_an_order_that_nobody_waits_for_is_given_up(tiny_bundle: Path) -> None:
    engines = FakeEngines(held=True)

    async def leave(pool: PipelinePool) -> None:
        health = EngineHealth()
        waiting = asyncio.ensure_future(anext(answers(pool, order(tiny_bundle, 50), health)))
        await asyncio.to_thread(engines.wait_for_step)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting

    with PipelinePool({"bundle": engines.pipeline(tiny_bundle)}) as pool:
        asyncio.run(leave(pool))
        engines.release()
    assert engines.steps < 50


def test_a_studio_that_makes_room_draws_what_it_accepted(tiny_bundle: Path) -> None:
    studio = Studio(tiny_bundle, Engines(threads=1))
    future = studio.pool.submit("a star", steps=2, size=(64, 64))
    unloading = threading.Thread(target=studio.__del__)
    unloading.start()
    unloading.join(PATIENCE)
    assert isinstance(future.result(timeout=0), Result)
