"""What was compiled for this GPU, in a form that another process takes.

An archive of the compiler's artifacts, and of the kernels of the fused operators and of attention,
of which the compiler does not know.
"""

from __future__ import annotations

import contextlib
import io
import logging
import zipfile
from collections.abc import Iterator, Mapping

import torch

from sd35_trt.compat.torch import compiled_apart

from . import flash_attention, kernels

logger = logging.getLogger("sd35_trt")

_ARTIFACTS = "torch/"
_BINARIES = "triton/"
_FLASH_4 = "flash4/"


# Of what the compiler made, in this process: the latest, so many and of so many bytes together.
_MOST_ARTIFACTS = 64
_MOST_BYTES = 512 << 20

# As keys, in the order in which they were made.
_artifacts: dict[bytes, None] = {}


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Collect what PyTorch's compiler makes inside, and nothing that it makes for others."""
    with compiled_apart(_keep):
        yield


def _keep(artifacts: bytes) -> None:
    _artifacts.pop(artifacts, None)
    _artifacts[artifacts] = None
    while len(_artifacts) > _MOST_ARTIFACTS or sum(map(len, _artifacts)) > _MOST_BYTES:
        del _artifacts[next(iter(_artifacts))]


def collect_kernels() -> bytes | None:
    """Everything that was compiled for programs in this process, or None where nothing was.

    PyTorch's part is of its own format, with pickles in it: take it from nobody whom you would not
    take a program from.
    """
    entries = {f"{_ARTIFACTS}{i}": data for i, data in enumerate(_artifacts)}
    entries |= {f"{_BINARIES}{name}": data for name, data in kernels.compiled_binaries().items()}
    entries |= {f"{_FLASH_4}{name}": data for name, data in flash_attention.compiled().items()}
    if not entries:
        return None
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(entries):
            # With one date for all, equal kernels are equal archives.
            file.writestr(zipfile.ZipInfo(name), entries[name], zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def offer_kernels(data: bytes) -> None:
    """Let the compiler find what another process compiled; what it cannot use, it ignores."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = {name: file.read(name) for name in file.namelist()}
        for artifacts in _below(_ARTIFACTS, entries).values():
            torch.compiler.load_cache_artifacts(artifacts)
    except Exception as error:  # noqa: BLE001 (pickles of PyTorch's own may fail in any way)
        logger.warning("kept kernels are damaged (%s): they are compiled again", error)
        return
    kernels.offer_binaries(_below(_BINARIES, entries))
    flash_attention.offer(_below(_FLASH_4, entries))


def _below(folder: str, entries: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(folder): d for name, d in entries.items() if name.startswith(folder)}
