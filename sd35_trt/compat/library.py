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
    if _is_bare_folder(library):
        # What pip leaves of two packages that share their files, when one of them is uninstalled.
        package = backend.packages[0]
        raise Sd35Error(
            f"{backend.title} is installed in parts ({package} shares its files with others)",
            f"pip uninstall -y {' '.join(backend.packages)}, then: {advice}",
        )
    version = str(getattr(library, "__version__", backend.minimum_version))
    if version_numbers(version) < version_numbers(backend.minimum_version):
        raise Sd35Error(
            f"{backend.title} {version} is too old, {backend.minimum_version} is needed", advice
        )
    return library


def _is_bare_folder(module: Any) -> bool:
    """Whether a module is a folder without ``__init__.py``, which Python imports as well."""
    spec = getattr(module, "__spec__", None)
    return spec is not None and spec.origin is None and spec.submodule_search_locations is not None
