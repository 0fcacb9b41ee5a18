"""Graphs as ONNX Runtime optimized them for the CPU at hand, kept for the next load.

Optimizing takes longer than all else of opening a small component. What comes of it may be laid
out for this processor alone, so it is no part of a bundle.
"""

from __future__ import annotations

import functools
import logging
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import onnxruntime as ort

from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import Component
from sd35_trt.runtime.kept_files import KeptFiles

logger = logging.getLogger("sd35_trt")

#: One file is of a component, a processor and a version of ONNX Runtime.
OPTIMIZED = KeptFiles(
    "optimized", ".onnx", "graphs optimized for this CPU", 64, 1 << 30, quiet=True
)

# A file holds what is computed of weights ahead; reading a larger component takes longer than that.
_LARGEST = 256 << 20

# A session's entry: where a model that is no file has its weights.
_WEIGHTS = "session.model_external_initializers_file_folder_path"

# Of /proc/cpuinfo, what decides about layouts and fusions.
_PROCESSOR = ("model name", "flags", "Features", "CPU implementer", "CPU part")

_Session = TypeVar("_Session")


def open_optimized(
    path: str,
    component: Component,
    make_options: Callable[[], ort.SessionOptions],
    open_model: Callable[[str | bytes, ort.SessionOptions], _Session],
) -> _Session:
    """Open a component on the CPU, from what is kept of it if there is anything.

    Args:
        path: of its graph.
        make_options: gives how it is opened.
        open_model: opens a graph by its path, or what a file of one holds.

    Raises:
        BundleError: as ``open_model`` does of the graph itself.
    """
    if component.weight_bytes > _LARGEST:
        return open_model(path, make_options())
    about = [file.sha256 for file in component.files]
    file = OPTIMIZED.file(*about, ort.__version__, _processor())
    if file is not None and file.exists() and (kept := OPTIMIZED.read(file)):
        options = make_options()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        # Weights that were left as they are are the bundle's.
        options.add_session_config_entry(_WEIGHTS, str(Path(path).parent))
        try:
            return open_model(kept, options)
        except BundleError as error:
            logger.warning("%s is damaged, and made anew: %s", file, error)
    if OPTIMIZED.can_write(file):
        try:
            return _open_and_keep(path, file, make_options(), open_model)
        except (OSError, BundleError) as error:  # no room for files, or a graph that is none
            logger.debug("%s is not kept: %s", file, error)
    return open_model(path, make_options())


def _open_and_keep(
    path: str,
    file: Path | None,
    options: ort.SessionOptions,
    open_model: Callable[[str | bytes, ort.SessionOptions], _Session],
) -> _Session:
    """Open a graph, and keep what it became.

    Raises:
        OSError: there is no folder for temporary files.
        BundleError: the graph is none, or what it became could not be written.
    """
    with tempfile.TemporaryDirectory(prefix="sd35-trt-") as folder:
        written = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(written)
        session = open_model(path, options)
        OPTIMIZED.write(file, written.read_bytes())
    return session


@functools.cache
def _processor() -> str:
    return "\n".join([platform.machine(), platform.processor(), *_lines()])


def _lines() -> Iterator[str]:
    """What Linux says of the first processor."""
    try:
        text = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:  # another system
        return
    for line in text.split("\n\n", 1)[0].splitlines():
        if line.partition(":")[0].strip() in _PROCESSOR:
            yield line
