"""The server on Ray Serve: ``serve run sd35_trt.serving.ray_app:build bundles=/bundles/half``.

An ingress has the endpoints and the rules of ``sd35-trt serve``; replicas draw. A request's
bundle is what ``serve.multiplexed`` reads, so that requests go where their bundle is loaded.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prometheus_client import CollectorRegistry
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from ray import serve
from ray.exceptions import RayError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from sd35_trt.errors import PoolBusy, Sd35Error, UsageError
from sd35_trt.runtime import Result
from sd35_trt.runtime.metrics import Metrics

from .app import make_app
from .drawing import Seen
from .failures import EngineHealth, refusal_of_fields
from .fleet.fleet import Fleet, RemoteModel
from .fleet.orders import Answers, Order, ReplicaLost
from .fleet.replica import Engines, Studio, answers
from .names import named_bundles, named_files, parse_traffic, read_pictures
from .service import Service
from .settings import Settings, read_token

# Seconds between looks at a replica's health; after three bad ones, Ray takes it out.
_PERIOD = 2.0
_TAKEN_OUT = 5 * _PERIOD

_PROXY = "RAY_SERVE_ENABLE_HA_PROXY"


def _parts(value: Any) -> Any:
    """A command line's text is a list with commas."""
    return value.split(",") if isinstance(value, str) else value


class Options(BaseModel):
    """Arguments of the application. Paths are the same on every node.

    Attributes:
        bundles: ``DIR`` or ``NAME=DIR``.
        adapters: ``NAME=FILE``, known to every bundle that takes adapters.
        controls: ``NAME=FILE`` of pictures that requests may have nets follow.
        loaded: how many bundles a replica keeps loaded; beyond, the longest unused makes room.
        traffic, token_file, key_header, time_limit, body_limit: as of ``sd35-trt serve``; sizes
            in bytes.
        threads, device, vram_budget, trust_kernels: see :meth:`sd35_trt.runtime.Pipeline.load`.
    """

    model_config = ConfigDict(extra="forbid")

    bundles: Annotated[list[str], BeforeValidator(_parts)] = Field(min_length=1)
    adapters: Annotated[list[str], BeforeValidator(_parts)] = []
    controls: Annotated[list[str], BeforeValidator(_parts)] = []
    loaded: int = Field(2, ge=1)
    traffic: str = ""
    token_file: Path | None = None
    key_header: str | None = None
    time_limit: float = Field(300.0, gt=0)
    body_limit: int = Field(32 << 20, gt=0)
    threads: int | None = Field(None, ge=1)
    device: str | None = None
    vram_budget: str | None = None
    trust_kernels: bool = False

    def paths(self) -> dict[str, Path]:
        """Directories by name.

        Raises:
            UsageError: a name that occurs twice, or a path that depends on where a process runs.
        """
        return _absolute(named_bundles(self.bundles))

    def adapter_files(self) -> dict[str, str]:
        """Files by name; raises as :meth:`paths` does."""
        found = _absolute(named_files(self.adapters, "adapters"))
        return {name: str(path) for name, path in found.items()}

    def picture_files(self) -> dict[str, Path]:
        """Files by name; raises as :meth:`paths` does."""
        return _absolute(named_files(self.controls, "controls"))

    def settings(self) -> Settings:
        """Limits and secrets; the token and pictures are read on this node.

        Raises:
            UsageError: see :meth:`paths`; or a file that is not what it should be.
        """
        token = None if self.token_file is None else read_token(self.token_file, "token_file")
        return Settings(
            token=token, key_header=self.key_header, time_limit=self.time_limit,
            body_limit=self.body_limit, local=token is None,
            adapters=frozenset(self.adapter_files()),
            pictures=read_pictures(self.picture_files(), "controls"),
        )  # fmt: skip


def _absolute(paths: dict[str, Path]) -> dict[str, Path]:
    for path in paths.values():
        if not path.is_absolute():
            raise UsageError(f"{path} is relative", "give the path from the root")
    return paths


def build(args: dict[str, Any]) -> serve.Application:
    """The application, as a Serve configuration names it.

    Args:
        args: see :class:`Options`.

    Raises:
        UsageError: an option that does not fit.
    """
    try:
        options = Options.model_validate(args)
    except ValidationError as error:
        refusal = refusal_of_fields(error.errors())
        raise UsageError(f"args: {refusal.message}") from None
    paths = options.paths()
    options.picture_files()
    if options.token_file is None and os.environ.get(_PROXY) == "1":
        raise UsageError(
            f"with {_PROXY}, ingresses are reached from elsewhere, and there is no token",
            "give token_file",
        )
    parse_traffic(options.traffic, list(paths))
    first = [str(path) for path in paths.values()][: options.loaded]
    engines = Engines(
        adapters=options.adapter_files(), threads=options.threads, device=options.device,
        vram_budget=options.vram_budget, trust_kernels=options.trust_kernels,
    )  # fmt: skip
    ingress = serve.deployment(max_ongoing_requests=1000, graceful_shutdown_timeout_s=60)(
        serve.ingress()(Ingress)
    )
    return ingress.bind(drawer(options.loaded).bind(engines, first), options)


def drawer(loaded: int) -> serve.Deployment:
    """The deployment of the replicas that draw.

    Args:
        loaded: how many bundles each keeps loaded.
    """

    @serve.deployment(
        max_ongoing_requests=8, max_queued_requests=64, health_check_period_s=_PERIOD,
        graceful_shutdown_timeout_s=60,
    )  # fmt: skip
    class Drawer:
        """Draws orders."""

        async def __init__(  # type: ignore[misc]  # Ray awaits it
            self, engines: Engines, first: list[str]
        ) -> None:
            self._engines = engines
            self._health = EngineHealth()
            for path in first:
                await self.studio(path)

        @serve.multiplexed(max_num_models_per_replica=loaded)
        async def studio(self, path: str) -> Studio:
            """The bundle in a directory, loaded."""
            return await asyncio.to_thread(Studio, Path(path), self._engines)

        async def draw(self, order: Order) -> Result | Sd35Error:
            """The last of the answers."""
            async with aclosing(self.watch(order)) as found:
                async for answer in found:
                    if not isinstance(answer, Seen):
                        return answer
            raise Sd35Error("the request was not drawn", "report this")

        async def watch(self, order: Order) -> Answers:
            """See :func:`sd35_trt.serving.fleet.replica.answers`."""
            try:
                studio = await self.studio(serve.get_multiplexed_model_id())
            except Sd35Error as error:
                yield error
                return
            held = answers(studio.pool, order, self._health, hold=_TAKEN_OUT)
            async with aclosing(held) as found:
                async for answer in found:
                    yield answer

        def check_health(self) -> None:
            """Ray Serve replaces a replica whose engines fail every request."""
            if self._health.broken:
                raise RuntimeError("the engines failed every one of the last requests")

    return Drawer


async def send(replicas: DeploymentHandle, order: Order) -> Answers:
    """Have a replica draw an order, one that has its bundle loaded if it can be.

    Raises:
        ReplicaLost: it ended, or is not reached.
        PoolBusy: as many requests wait for a replica as may.
    """
    bound = replicas.options(stream=order.shown is not None, multiplexed_model_id=order.bundle)
    ended = False
    response = (bound.draw if order.shown is None else bound.watch).remote(order)
    try:
        if order.shown is None:
            answer = await response
            ended = True
            yield answer
        else:
            async for answer in response:
                ended = not isinstance(answer, Seen)
                yield answer
    except BackPressureError as error:
        raise PoolBusy("as many requests wait for a replica as may", "try again later") from error
    except (RayTaskError, TaskCancelledError):
        raise  # of ours
    except (RayError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
        raise ReplicaLost(type(error).__name__) from error
    except (asyncio.CancelledError, GeneratorExit):
        if not ended:
            response.cancel()
        raise


class Ingress:
    """The endpoints of ``sd35-trt serve``, over replicas.

    Args:
        replicas: that draw.
        options: of the application.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it
        self, replicas: DeploymentHandle, options: Options
    ) -> None:
        self._app = await asyncio.to_thread(
            _make_app, replicas, options, asyncio.get_running_loop()
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app


def _make_app(
    replicas: DeploymentHandle, options: Options, loop: asyncio.AbstractEventLoop
) -> ASGIApp:
    """In another thread than the loop's: its bundles draw before it serves."""
    adapters = options.adapter_files()
    models = {name: RemoteModel(path, adapters) for name, path in options.paths().items()}
    registry = CollectorRegistry()
    metrics = Metrics(registry)
    shares = parse_traffic(options.traffic, list(models))
    fleet = Fleet(models, shares, partial(send, replicas), loop, metrics)
    metrics.watch(fleet)
    service = Service(fleet, options.settings())
    service.warm_up()
    return make_app(service, registry)
