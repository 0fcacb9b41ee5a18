"""A bundle as models of a Triton model repository."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.errors import UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.runtime.adapters import AdapterShelf
from sd35_trt.runtime.sessions.session import device_of
from sd35_trt.store.replacement import check_destination, replacement

from .configuration import once_configuration, stream_configuration

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

#: By which a model of ours is known.
MARKER = "sd35_trt.txt"

_MODEL = """from sd35_trt.serving.triton.{module} import {kind} as TritonPythonModel

__all__ = ["TritonPythonModel"]
"""


@dataclass(frozen=True)
class Exported:
    """Names of the two models."""

    once: str
    stream: str


def export_triton(
    path: Path,
    repository: Path,
    name: str | None = None,
    options: Mapping[str, str] | None = None,
    adapters: Mapping[str, Path] | None = None,
) -> Exported:
    """Write the models; older ones of the same names are replaced. The bundle stays where it is.

    Args:
        path: of the bundle.
        repository: the model repository, made where there is none.
        name: of the model that answers once; the stream's is followed by ``_stream``. None takes
            the bundle's directory.
        options: ``threads``, ``vram_budget``, ``trust_kernels``: as text, see
            :meth:`sd35_trt.runtime.Pipeline.load`.
        adapters: files by the name that requests use; they stay where they are.

    Raises:
        BundleError: missing, damaged or foreign.
        UsageError: a name that is none, an adapter that does not fit, or a destination that holds
            something else.
    """
    name = path.resolve().name if name is None else name
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} is no name of a model", "give --name of letters, digits, dots and dashes"
        )
    bundle = Bundle.open(path)
    device_of(bundle)
    files = {own: str(file.resolve()) for own, file in (adapters or {}).items()}
    shelf = AdapterShelf(bundle)
    for own, file in files.items():
        shelf.load(own, file)
    names = Exported(name, f"{name}_stream")
    for one in (names.once, names.stream):
        check_destination(
            repository / one, MARKER, "model of sd35-trt", "choose another --name or --repository"
        )
    parameters = {"bundle": str(path.resolve()), **(options or {})}
    if files:
        parameters["adapters"] = json.dumps(files)
    _write(
        repository / names.stream, "stream", "Stream",
        stream_configuration(names.stream, bundle.manifest, parameters),
    )  # fmt: skip
    _write(
        repository / names.once, "once", "Once",
        once_configuration(names.once, bundle.manifest, names.stream),
    )  # fmt: skip
    return names


def _write(folder: Path, module: str, kind: str, configuration: str) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacement(folder, MARKER) as work:
        (work / "1").mkdir()
        (work / "1" / "model.py").write_text(_MODEL.format(module=module, kind=kind), "utf-8")
        (work / "config.pbtxt").write_text(configuration, "utf-8")
        (work / MARKER).write_text("Written by sd35-trt export-triton.\n", "utf-8")
