"""``GET /v1/models``: the bundles, in OpenAI's form."""

from __future__ import annotations

import contextlib
from datetime import datetime
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from sd35_trt.runtime.schedule import SAMPLERS

from . import drawing
from .answers import Failure
from .service import Service


class Model(BaseModel):
    """A bundle: OpenAI's fields, what it was built from, and what it accepts."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "sd35-trt"
    variant: str
    policy: str
    target: str
    sizes: tuple[int, int]
    size_step: int
    most_images: int
    guided: bool
    samplers: list[str]
    controls: dict[str, str]
    defaults: dict[str, Any]


class Models(BaseModel):
    """All bundles."""

    object: str = "list"
    data: list[Model]


def model_routes(service: Service) -> APIRouter:
    """The endpoints that list bundles."""
    router = APIRouter(tags=["models"])
    pipelines = service.pool.pipelines

    @router.get("/v1/models")
    async def models() -> Models:
        """List the bundles."""
        return Models(data=[_model(name, pipe) for name, pipe in pipelines.items()])

    @router.get("/v1/models/{model}", responses={404: {"model": Failure}})
    async def model(model: str) -> Model:
        """Describe a bundle."""
        return _model(model, pipelines[service.bundle_of(model, None)])

    return router


def _model(name: str, pipe: drawing.Model) -> Model:
    manifest = pipe.manifest
    created = 0
    with contextlib.suppress(ValueError):  # any text may be there
        created = max(0, int(datetime.fromisoformat(manifest.created).timestamp()))
    defaults = manifest.defaults
    width, height = defaults.size
    return Model(
        id=name,
        created=created,
        variant=manifest.model.variant,
        policy=manifest.policy.name,
        target=manifest.target,
        sizes=manifest.ranges.size,
        size_step=manifest.ranges.size_step,
        most_images=manifest.ranges.batch[1],
        guided=manifest.guided,
        samplers=list(SAMPLERS),
        controls={control.name: control.kind for control in manifest.controls},
        defaults={
            "size": f"{width}x{height}",
            "steps": defaults.steps,
            "guidance": defaults.guidance,
            "shift": manifest.scheduler.shift,
            "sampler": defaults.sampler,
        },
    )
