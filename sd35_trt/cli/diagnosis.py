"""What this machine can build and run."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sd35_trt import __version__
from sd35_trt.backends import BACKENDS, Backend, resolve
from sd35_trt.compat.library import load_library
from sd35_trt.compat.requirement import installed_version
from sd35_trt.compat.tensorrt import make_builder, make_logger
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.store.cache import default_cache_dir
from sd35_trt.targets import PresentGpu, Target, choose_builder, present_gpus, targets

_BUILD_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
# What every session on a GPU needs.
_CUDA = "cuda.bindings.runtime"


def examine() -> dict[str, Any]:
    """What is installed here, and what follows for each GPU family and the CPU.

    Returns:
        JSON-serializable; ``engines`` by name: ``library``, ``version``, and ``problem``, which
        says why it does not work here; ``targets`` by name: ``builder``, ``builds``, ``runs``,
        ``runtime`` (the library that runs it), ``gpu`` (the one present) and ``note`` (what to
        install).
    """
    packages = {package: installed_version(package) for package in _BUILD_PACKAGES}
    complete = None not in packages.values()
    gpus, no_gpu = present_gpus()
    families = [target for target in targets().values() if target.name == target.family]
    engines = {name: _examine_library(row, gpus) for name, row in BACKENDS.items()}
    return {
        "sd35-trt": __version__,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
        "cache": _cache(),
        "gpus": [asdict(gpu) for gpu in gpus],
        "no gpu": no_gpu,
        "packages": packages,
        "engines": engines,
        "targets": {t.name: _examine_target(t, engines, gpus, complete) for t in families},
    }


def _cache() -> str:
    try:
        return str(default_cache_dir())
    except UsageError as error:
        return f"no folder — {error.fix}"


def _examine_library(backend: Backend, gpus: Sequence[PresentGpu]) -> dict[str, Any]:
    """A kind of engine's library, loaded; on its GPU, one that times kernels is started too."""
    version = None
    try:
        library = load_library(backend)
        version = str(getattr(library, "__version__", None))
        present = {gpu.compute_capability for gpu in gpus} & {*backend.compute_capabilities}
        if backend.times_kernels and present:
            make_builder(library, f"{backend.title} {version}", make_logger(library))
        problem = None
    except Sd35Error as error:
        problem = str(error)
    return {"library": backend.title, "version": version, "problem": problem}


def _examine_target(
    target: Target,
    engines: Mapping[str, Mapping[str, Any]],
    gpus: Sequence[PresentGpu],
    complete: bool,
) -> dict[str, Any]:
    """What this machine can do for a target.

    Args:
        engines: what :func:`_examine_library` says of each kind.
        complete: whether all that every build takes is installed.
    """
    backend = BACKENDS[choose_builder(target)]
    engine = engines[backend.name]
    works = engine["problem"] is None
    gpu = next((g for g in gpus if g.compute_capability in target.compute_capabilities), None)
    on_cpu = not target.compute_capabilities
    has_cuda = _loads(_CUDA)
    ready = has_cuda and gpu is not None and _knows_gpus(backend)
    runs = works and (on_cpu or ready)
    faster = [
        companion.extra
        for companion in backend.companions
        if {*companion.compute_capabilities} & {*target.compute_capabilities}
        and not installed_version(companion.package)
    ]
    notes = []
    if not complete:
        notes.append("to build: pip install 'sd35-trt[build]'")
    if engine["version"] is None:
        notes.append(f"needs: pip install 'sd35-trt[{backend.extra}]'")
    elif not works:
        notes.append(f"{backend.title}: see above")
    elif gpu is not None and not has_cuda:
        notes.append("to run: pip install 'sd35-trt[cuda]'")
    elif gpu is not None and not ready:
        notes.append("to run: a PyTorch with CUDA, see pytorch.org/get-started")
    elif runs and faster:
        notes.append(f"faster with: pip install 'sd35-trt[{faster[0]}]'")
    return {
        "builder": backend.name,
        "builds": complete and (works or not backend.needs_library),
        "runs": runs,
        "runtime": f"{engine['library']} {engine['version']}" if runs else None,
        "gpu": gpu.name if gpu else None,
        "note": "; ".join(notes),
    }


def _loads(module: str) -> bool:
    """Whether a module can be imported, whichever package it is from."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return False
    return True


def _knows_gpus(backend: Backend) -> bool:
    """Whether the library was built with CUDA."""
    if backend.cuda is None:
        return True
    try:
        return resolve(backend.cuda) is not None
    except ImportError:  # it does not load: neither does its CUDA
        return False
