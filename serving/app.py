"""The server as an ASGI application."""

from __future__ import annotations

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry

from sd35_trt import __version__
from sd35_trt.runtime import PipelinePool

from .failures import answer_failures
from .gate import Gate
from .images import image_routes
from .models import model_routes
from .operations import admin_routes, operation_routes
from .pages import page_routes
from .service import Service

_DESCRIPTION = "Pictures by Stable Diffusion 3.5, in OpenAI's form."


def make_app(
    service: Service, registry: CollectorRegistry, managed: PipelinePool | None = None
) -> FastAPI:
    """An application over a service.

    Args:
        service: draws.
        registry: holds the metrics, those of the service's pool among them.
        managed: the pool whose traffic operators may change; None has no admin endpoints.
    """
    app = FastAPI(
        title="sd35-trt", version=__version__, description=_DESCRIPTION,
        # FastAPI's own pages load scripts from elsewhere.
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    answer_failures(app)
    # It is the gate that checks tokens, before bodies are read; this names them in OpenAPI.
    token = Depends(HTTPBearer(auto_error=False, description="Of --token-file."))
    admin = Depends(
        HTTPBearer(auto_error=False, scheme_name="Admin", description="Of --admin-token-file.")
    )
    app.include_router(image_routes(service), dependencies=[token])
    app.include_router(model_routes(service), dependencies=[token])
    if managed is not None:
        app.include_router(admin_routes(service, managed), dependencies=[admin])
    app.include_router(operation_routes(service, registry))
    app.include_router(page_routes())
    app.add_middleware(Gate, settings=service.settings)
    return app
