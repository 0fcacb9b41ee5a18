"""What is said where a library is missing, or does not load."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator

from sd35_trt.errors import Sd35Error

_PACKAGE = __name__.partition(".")[0]


@contextlib.contextmanager
def requirement(purpose: str, extra: str) -> Iterator[None]:
    """Explain a library that cannot be imported inside.

    Args:
        purpose: what needs it, e.g. ``building``.
        extra: of this package, that installs it.

    Raises:
        Sd35Error: names the library, and why it does not load where it is installed.
    """
    fix = f"pip install 'sd35-trt[{extra}]'"
    try:
        yield
    except ImportError as error:
        library = (error.name or "").partition(".")[0]
        if library == _PACKAGE:
            raise  # a mistake of ours
        if isinstance(error, ModuleNotFoundError):
            raise Sd35Error(f"{purpose} needs {library or error}", fix) from error
        reason = f"{library or 'a library'} does not load ({error})"
        raise Sd35Error(f"{purpose}: {reason}", fix) from error


def installed_version(distribution: str) -> str | None:
    """Of a distribution, None where it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
