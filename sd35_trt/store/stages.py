"""A build's stages: each a cached directory that is reused while its inputs are unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import File
from sd35_trt.formats.reading import Count, Digest, Name, decode, read_file

from .cache import StageCache
from .code import code_digest

#: Called with a stage's name, the fraction of it that is done, and what is being done.
Progress = Callable[[str, float, str], None]

_FILES = "stage.json"


@dataclass(frozen=True)
class Stage:
    """A step of the build.

    Attributes:
        name: the kind of stage, and the word in front of its progress bar.
        inputs: everything its result depends on besides code, JSON-serializable.
        code: modules that make the result; what they import of this package counts too.
        run: writes the result into a directory, reporting progress as (fraction, note).
    """

    name: str
    inputs: Mapping[str, Any]
    code: tuple[str, ...]
    run: Callable[[Path, Callable[[float, str], None]], None]

    @property
    def key(self) -> str:
        """What finds the result in the cache: other inputs or other code have another."""
        return StageCache.key({**self.inputs, "code": code_digest(*self.code)})


def run_stage(cache: StageCache, stage: Stage, progress: Progress) -> Path:
    """The stage's directory, from the cache where its inputs and its files are unchanged."""
    key = stage.key
    found = cache.find(stage.name, key)
    if found is not None:
        if _is_whole(cache, found):
            progress(stage.name, 1.0, "unchanged")
            return found
        cache.discard(stage.name, key)
    with cache.create(stage.name, key) as work:
        stage.run(work, lambda fraction, note: progress(stage.name, fraction, note))
        files = {}
        for path in sorted(work.iterdir()):
            # Later builds rely on these bytes: nobody should write to them by accident.
            path.chmod(0o444)
            files[path.name] = [path.stat().st_size, cache.file_hash(path)]
        (work / _FILES).write_text(json.dumps(files, indent=1) + "\n", "utf-8")
    found = cache.find(stage.name, key)
    assert found is not None
    progress(stage.name, 1.0, "done")
    return found


def _is_whole(cache: StageCache, folder: Path) -> bool:
    try:
        return all(
            (folder / file.path).stat().st_size == file.bytes
            and cache.file_hash(folder / file.path) == file.sha256
            for file in stage_files(folder).values()
        )
    except (OSError, BundleError):
        return False


def stage_files(folder: Path) -> dict[str, File]:
    """Sizes and hashes of a stage's files by name, as recorded when it was written."""
    path = folder / _FILES
    files = decode(read_file(path, 64 << 20), dict[Name, tuple[Count, Digest]], path,
                   BundleError, "delete it: the next build writes it again")  # fmt: skip
    return {name: File(name, size, digest) for name, (size, digest) in files.items()}
