"""Health and metrics, for what runs servers; and the admin endpoints, for who does."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from pydantic import BaseModel, ConfigDict

from sd35_trt.errors import UsageError
from sd35_trt.runtime import PipelinePool

from .answers import Failure
from .failures import refusal_of
from .service import Service

_UNHEALTHY = 503


class State(BaseModel):
    """How a server is."""

    status: str
    waiting: int
    in_flight: int
    on_fallback: list[str]


class Traffic(BaseModel):
    """Percent of the requests by bundle, 100 in all."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    traffic: dict[str, float]


class Bundle(BaseModel):
    """A bundle's name."""

    model_config = ConfigDict(extra="forbid")

    model: str


def operation_routes(service: Service, registry: CollectorRegistry) -> APIRouter:
    """Health and metrics, which need no token.

    Args:
        registry: holds the metrics.
    """
    router = APIRouter(tags=["operations"])

    @router.get("/health/live", responses={_UNHEALTHY: {"model": State}})
    async def live(response: Response) -> State:
        """200; 503 where the process is to be started anew: its engines fail every request."""
        response.status_code = _UNHEALTHY if service.broken else 200
        return _state(service, "broken" if service.broken else "live")

    @router.get("/health/ready", responses={_UNHEALTHY: {"model": State}})
    async def ready(response: Response) -> State:
        """200 where it takes requests; 503 where it stops, or its engines fail."""
        well = not (service.stopping or service.broken)
        response.status_code = 200 if well else _UNHEALTHY
        return _state(service, "ready" if well else "stopping" if service.stopping else "broken")

    @router.get("/metrics", response_class=Response)
    def metrics() -> Response:
        """Figures in Prometheus' text form."""
        return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})

    return router


def admin_routes(service: Service, pool: PipelinePool) -> APIRouter:
    """What changes where new requests go; it needs a token of its own.

    Args:
        pool: of the service.
    """
    router = APIRouter(
        tags=["admin"],
        responses={code: {"model": Failure} for code in (401, 403, 422)},
    )

    @router.get("/admin/traffic")
    async def traffic() -> Traffic:
        """The split of new requests among bundles."""
        return Traffic(traffic=pool.traffic)

    @router.put("/admin/traffic")
    async def set_traffic(body: Traffic) -> Traffic:
        """Split new requests among bundles; those that are not named get none."""
        try:
            pool.set_traffic(body.traffic)
        except UsageError as error:
            raise refusal_of(error, "traffic") from error
        return Traffic(traffic=pool.traffic)

    @router.post("/admin/switch")
    async def switch(body: Bundle) -> Traffic:
        """Send all new requests to one bundle."""
        try:
            pool.switch(body.model)
        except UsageError as error:
            raise refusal_of(error, "model") from error
        return Traffic(traffic=pool.traffic)

    @router.post("/admin/restore")
    async def restore(body: Bundle) -> State:
        """Draw with a bundle itself again where its fallback took over."""
        try:
            pool.restore(body.model)
        except UsageError as error:
            raise refusal_of(error, "model") from error
        return _state(service, "ready")

    return router


def _state(service: Service, status: str) -> State:
    return State(
        status=status,
        waiting=service.pool.waiting,
        in_flight=service.in_flight,
        on_fallback=list(service.pool.on_fallback),
    )
