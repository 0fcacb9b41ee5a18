"""How long each kernel took on this GPU, as TensorRT measured it: kept for the next build.

One file for each library, GPU and driver, shared by components, policies and builds.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sd35_trt.store.lock import exclusive
from sd35_trt.store.own_files import read_own, write_own

logger = logging.getLogger("sd35_trt")

_WHAT = "timings of kernels"


@contextlib.contextmanager
def timing_cache(trt: Any, config: Any, folder: Path | None) -> Iterator[None]:
    """What is compiled with ``config`` inside uses the file's timings; new ones are added to it.

    A file that is damaged, or of another version, GPU or driver, is as good as none. Timings may
    hold compiled code, so that a file that others can write to is none either.

    Args:
        trt: the library.
        config: its ``IBuilderConfig``.
        folder: of the files; None keeps nothing.
    """
    if folder is None:
        yield
        return
    path = folder / f"{_slug(trt.__name__, trt.__version__, *_gpu())}.timings"
    before = read_own(path, _WHAT)
    if not config.set_timing_cache(config.create_timing_cache(before), ignore_mismatch=False):
        config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    yield
    timings = config.get_timing_cache()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive(path.with_suffix(".lock")):
            latest = read_own(path, _WHAT)
            if latest != before:  # another build has added its own
                timings.combine(config.create_timing_cache(latest), ignore_mismatch=False)
            write_own(path, bytes(memoryview(timings.serialize())), _WHAT)
    except OSError as error:  # what was compiled with them stays
        logger.warning("%s cannot be kept in %s: %s", _WHAT, folder, error.strerror or error)


def _gpu() -> tuple[str, str]:
    """Name and driver of the GPU that the library compiles on."""
    from cuda.bindings import runtime as cudart

    _, number = cudart.cudaGetDevice()
    _, properties = cudart.cudaGetDeviceProperties(number)
    _, driver = cudart.cudaDriverGetVersion()
    return properties.name.decode("utf-8", "replace"), str(driver)


def _slug(*words: str) -> str:
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", word.lower()).strip("-") for word in words)
