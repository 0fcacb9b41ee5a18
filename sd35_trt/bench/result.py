"""A benchmark's result as a file, and the versions in it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd35_trt import __version__
from sd35_trt.backends import BACKENDS
from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Manifest
from sd35_trt.store.disk import file_errors

from .options import WITH_DIFFUSERS, BenchOptions
from .peer import LIBRARIES

#: Version of the JSON.
FORMAT = 1


def check_result_file(out: Path) -> None:
    """Refuse a file that could not be written, before anything is measured.

    Raises:
        UsageError: names the fix.
    """
    folder = out.absolute().parent
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory", "name a file in it")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"{folder} is not a writable directory", "make it, or choose another --out"
        )


def save_result(result: Mapping[str, Any], out: Path) -> None:
    """Write a result as JSON, whole or not at all.

    Raises:
        Sd35Error: the file cannot be written.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    with file_errors(out, "choose another --out"):
        try:
            partial.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)


def versions(manifest: Manifest, options: BenchOptions) -> dict[str, str]:
    """Of what takes part in a benchmark."""
    backend = BACKENDS[manifest.builder]
    names = ["numpy", *backend.packages, *(c.package for c in backend.companions)]
    if options.against in WITH_DIFFUSERS:
        names += LIBRARIES
    result = {"sd35-trt": __version__, "python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            result[name] = importlib.metadata.version(name)
    return result
