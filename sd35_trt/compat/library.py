"""Loading the library behind a kind of engine."""

from __future__ import annotations

import importlib
from typing import Any

from sd35_trt.backends import Backend, version_numbers
from sd35_trt.errors import Sd35Error


def load_library(backend: Backend) -> Any:
    """The imported library.

    Raises:
        Sd35Error: it is not installed, does not load, or is too old.
    """
    advice = f"pip install 'sd35-trt[{backend.extra}]'"
    try:
        library = importlib.import_module(backend.module)
    except (ImportError, OSError, RuntimeError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == backend.module
        state = "is not installed" if absent else "does not load"
        raise Sd35Error(f"{backend.title} {state} ({error})", advice) from error
    version = str(getattr(library, "__version__", backend.minimum_version))
    if version_numbers(version) < version_numbers(backend.minimum_version):
        raise Sd35Error(
            f"{backend.title} {version} is too old, {backend.minimum_version} is needed", advice
        )
    return library
