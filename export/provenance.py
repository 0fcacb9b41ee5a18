"""What an exported component depends on besides the checkpoint: our code and other libraries."""

from __future__ import annotations

import importlib.metadata
import platform

from sd35_trt import __version__
from sd35_trt.errors import Sd35Error

_VERSIONED = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir", "tokenizers")


def tool_versions(*others: str) -> dict[str, str]:
    """Versions of what takes part in a build.

    Args:
        others: distributions that a model needs besides.

    Raises:
        Sd35Error: one of them is not installed.
    """
    versions = {"python": platform.python_version(), "sd35-trt": __version__}
    for package in (*_VERSIONED, *others):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError as error:
            raise Sd35Error(f"building needs {package}", "pip install 'sd35-trt[build]'") from error
    return versions
