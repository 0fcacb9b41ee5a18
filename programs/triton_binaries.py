"""What Triton compiled of the kernels: collected, and offered to another process.

Binaries are kept where Triton keeps them, under the hash of all that decides about them: a group of
files for each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sd35_trt.compat.triton import binary_hashes, cached_files, get_cache_manager

from .triton_kernels import modulate, product

# What a GPU needs of a group.
_NEEDED = (".cubin", ".json")


def compiled() -> dict[str, bytes]:
    """Binaries that this process made or found for its GPUs: ``hash/file`` → content."""
    return stored({kernel.__name__: binary_hashes(kernel) for kernel in (product, modulate)})


def stored(hashes: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Binaries in Triton's cache: ``hash/file`` → content.

    Args:
        hashes: by kernel.
    """
    return {
        f"{digest}/{file}": Path(path).read_bytes()
        for name, digests in hashes.items()
        for digest in digests
        for file, path in cached_files(digest, name).items()
        if file.endswith(_NEEDED)
    }


def offer(binaries: Mapping[str, bytes]) -> None:
    """Put binaries into Triton's cache.

    Args:
        binaries: as :func:`stored` gives them; what is named otherwise is left out.
    """
    groups: dict[str, dict[str, str]] = {}
    for name, data in binaries.items():
        if match := re.fullmatch(r"([0-9a-f]{64})/(\w+\.\w+)", name):
            digest, file = match.groups()
            groups.setdefault(digest, {})[file] = get_cache_manager(digest).put(data, file)
    for digest, files in groups.items():
        for file in files:
            if file.endswith(".json"):
                get_cache_manager(digest).put_group(file, files)
