"""The identity of a checkpoint: the hashes of its files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from sd35_trt.errors import CheckpointError
from sd35_trt.store.cache import StageCache

from .contents import refusal
from .merged import AnyCheckpoint, MergedCheckpoint


def folder_files(checkpoint: AnyCheckpoint, folders: Iterable[str]) -> dict[str, Path]:
    """Files of a checkpoint by ``folder/name``, as a bundle's manifest and a calibration list them.

    A LoRA in a part is ``part/lora-N/file:SCALE``.

    Args:
        folders: its parts, such as ``transformer``, or tokenizers' folders.

    Raises:
        CheckpointError: a file or a folder is missing.
    """
    files = {}
    for folder in folders:
        for path in checkpoint.files(folder):
            if not path.is_file():
                raise refusal(path, "a file of the model")
            files[f"{folder}/{path.name}"] = path
        files |= _lora_files(checkpoint, folder)
    return files


def _lora_files(checkpoint: AnyCheckpoint, folder: str) -> dict[str, Path]:
    """What LoRAs are in a part: another one, or another scale, is another checkpoint."""
    if not isinstance(checkpoint, MergedCheckpoint):
        return {}
    return {f"{folder}/{name}": path for name, path in checkpoint.lora_files(folder).items()}


def file_hashes(
    checkpoint: AnyCheckpoint, folders: Iterable[str], cache: StageCache
) -> dict[str, str]:
    """SHA-256 of a checkpoint's files, in hexadecimal, by ``folder/name``.

    Args:
        folders: as of :func:`folder_files`.
        cache: remembers the hashes of files that have not changed.

    Raises:
        CheckpointError: a file or a folder is missing.
    """
    files = folder_files(checkpoint, folders)
    return {name: cache.file_hash(path) for name, path in files.items()}


def difference(
    checkpoint: AnyCheckpoint, hashes: Mapping[str, str], cache: StageCache
) -> str | None:
    """The first of some files that a checkpoint does not have: ``vae/config.json differs``.

    Args:
        hashes: of :func:`file_hashes`, of a checkpoint as it was.

    Returns:
        The name and what is the matter; None where every file is as it was.
    """
    folders = dict.fromkeys(name.partition("/")[0] for name in hashes)
    files = {name: path for folder in folders for name, path in _present_files(checkpoint, folder)}
    for name, digest in hashes.items():
        if name not in files:
            return f"{name} is missing"
        if cache.file_hash(files[name]) != digest:
            return f"{name} differs"
    added = (name for folder in folders for name in _lora_files(checkpoint, folder))
    return next((f"{name} was not in it" for name in added if name not in hashes), None)


def _present_files(checkpoint: AnyCheckpoint, folder: str) -> Iterator[tuple[str, Path]]:
    try:
        paths = checkpoint.files(folder) if checkpoint.has(folder) else []
    except CheckpointError:  # no such folder: its files are missing
        paths = []
    for path in paths:
        if path.is_file():
            yield f"{folder}/{path.name}", path
    yield from _lora_files(checkpoint, folder).items()
