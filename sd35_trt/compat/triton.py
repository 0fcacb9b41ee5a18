"""What we use of Triton's inside: which binaries a kernel has, and where they are kept."""

from __future__ import annotations

from typing import Any

from triton.runtime.cache import get_cache_manager

__all__ = ["binary_hashes", "cached_files", "get_cache_manager"]


def binary_hashes(kernel: Any) -> list[str]:
    """Hashes of the binaries that this process made or found for a kernel, for all its GPUs.

    Args:
        kernel: a function of ``triton.jit``.
    """
    return [binary.hash for cache, *_ in kernel.device_caches.values() for binary in cache.values()]


def cached_files(digest: str, kernel: str) -> dict[str, str]:
    """Paths of a binary's files in Triton's cache, by name; empty where it is not there.

    Args:
        digest: one of :func:`binary_hashes`.
        kernel: the function's name.
    """
    return dict(get_cache_manager(digest).get_group(f"{kernel}.json") or {})
