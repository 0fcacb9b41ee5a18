"""The application of ``sd35_trt.serving.ray_app``, whose engines fail where a file says so."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

#: The variable of the environment that names the file; its text is a process's number.
FAULT = "SD35_TRT_FAULT"


def build(args: dict[str, Any]) -> Any:
    """As :func:`sd35_trt.serving.ray_app.build`."""
    from sd35_trt.serving import ray_app

    own = ray_app.drawer

    def drawer(loaded: int) -> Any:
        deployment = own(loaded)
        return deployment.options(func_or_class=faulty(deployment.func_or_class))

    ray_app.drawer = drawer
    try:
        return ray_app.build(args)
    finally:
        ray_app.drawer = own


def faulty(drawer: Any) -> type:
    """A class of replicas as another, whose engines fail where the file says so."""

    class Drawer(drawer):
        async def __init__(self, *args: Any) -> None:  # type: ignore[misc]  # Ray awaits it
            fail_where_told()
            await super().__init__(*args)

    return Drawer


def fail_where_told() -> None:
    """Have this process's pipelines fail from the moment on that the file has its number."""
    from sd35_trt.errors import Sd35Error
    from sd35_trt.runtime import Pipeline
    from sd35_trt.runtime.job import Job

    own, file = Pipeline.draw, Path(os.environ[FAULT])

    def draw(pipe: Any, jobs: Sequence[Job]) -> None:
        if file.exists() and file.read_text("utf-8") == str(os.getpid()):
            raise Sd35Error("the engine failed")
        own(pipe, jobs)

    Pipeline.draw = draw  # type: ignore[assignment, method-assign]
