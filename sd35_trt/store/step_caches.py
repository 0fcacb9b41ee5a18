"""Giving a bundle that is built another step cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from msgspec.structs import replace

from sd35_trt.formats.bundle import (
    MANIFEST,
    MANIFEST_DIGEST,
    Bundle,
    describe_file,
    write_manifest,
)
from sd35_trt.formats.step_cache import STEP_CACHE, StepCache

from .replacement import check_destination, replacement


def set_step_cache(root: Path, cache: StepCache) -> None:
    """Replace a bundle by one that differs in its step cache alone, in one step.

    Engines are linked, not copied, where the file system can.

    Args:
        root: the bundle's directory.
        cache: for its model and its short steps; one that it has is replaced.

    Raises:
        BundleError: it is no bundle, or damaged.
        OSError: it cannot be written.
        UsageError: the step cache is of another model, or of other short steps.
    """
    manifest = Bundle.open(root).manifest
    cache.check(manifest, STEP_CACHE)
    check_destination(root, MANIFEST, "bundle", "copy the bundle to a folder of your own")
    with replacement(root, MANIFEST) as work:
        shutil.copytree(
            root,
            work,
            symlinks=True,
            ignore=_rewritten,
            copy_function=_link_or_copy,
            dirs_exist_ok=True,
        )
        (work / STEP_CACHE).write_bytes(cache.encode())
        others = tuple(file for file in manifest.files if file.path != STEP_CACHE)
        write_manifest(work, replace(manifest, files=(*others, describe_file(work, STEP_CACHE))))


def _rewritten(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if name in (MANIFEST, MANIFEST_DIGEST, STEP_CACHE)]


def _link_or_copy(source: str, target: str) -> str:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without links, or another one's file
        return shutil.copy2(source, target, follow_symlinks=False)
    return target
