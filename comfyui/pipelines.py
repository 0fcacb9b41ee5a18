"""Pipelines that stay open while ComfyUI keeps what was made with them.

ComfyUI keeps a node's outputs until a graph without that node runs, or its cache is cleared. A
pipeline that no output names any more closes, and its memory is free.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Any

from comfy import model_management

from sd35_trt.runtime import Pipeline

from .folders import version

logger = logging.getLogger("sd35_trt")


class OpenPipeline:
    """A pipeline that closes when this is forgotten."""

    def __init__(self, pipe: Pipeline) -> None:
        self.pipe = pipe
        # At the end of the process, the pipeline closes by itself.
        weakref.finalize(self, _close, pipe).atexit = False


_open: weakref.WeakValueDictionary[Any, OpenPipeline] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def open_pipeline(path: str, device: str | None, vram_budget: str | None) -> OpenPipeline:
    """The pipeline of a bundle; the same for nodes that ask for the same.

    Args:
        path: the bundle's directory.
        device, vram_budget: see :meth:`sd35_trt.runtime.Pipeline.load`.

    Raises:
        Sd35Error: see :meth:`sd35_trt.runtime.Pipeline.load`.
    """
    key = path, version(path), device, vram_budget
    with _lock:
        opened = _open.get(key)
        if opened is None:
            opened = OpenPipeline(Pipeline.load(path, device=device, vram_budget=vram_budget))
            _open[key] = opened
            _make_room(opened.pipe)
    return opened


def _close(pipe: Pipeline) -> None:
    pipe.close()
    logger.info("%s is closed: no output of ComfyUI's needs it", pipe.bundle.root)


def _make_room(pipe: Pipeline) -> None:
    """Have ComfyUI move its own models out of the GPU that a pipeline draws on."""
    if pipe.memory().device.total is not None:
        model_management.unload_all_models()
        model_management.soft_empty_cache()
