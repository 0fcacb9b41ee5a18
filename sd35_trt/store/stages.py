"""A build's stages: each a cached directory that is reused while its inputs are unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.bundle import File
from sd35_trt.formats.reading import Count, Digest, Name, decode, read_file
from sd35_trt.progress import Progress

from .cache import STAGE_FILE, StageCache
from .code import code_digest
from .disk import CACHE, file_errors

_INPUTS = "inputs.json"


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
    """The stage's directory, from the cache where its inputs and its files are unchanged.

    Of several processes that need a stage, one makes it and the others wait for it.

    Raises:
        Sd35Error: a finished stage cannot be read, and stays; or none can be made: there is no
            room, or nothing can be written. Names the file.
    """
    key = stage.key

    def waiting() -> None:
        progress(stage.name, 0, 1, "waiting for another process")

    with file_errors(cache.root, CACHE.way, {cache.root: CACHE}):
        if (folder := _finished(cache, stage, key)) is not None:
            progress(stage.name, 1, 1, "unchanged")
            return folder
        with cache.lock(stage.name, key, waiting):
            folder = _finished(cache, stage, key)
            if folder is None:
                cache.discard(stage.name, key)
                folder = _make(cache, stage, key, progress)
    progress(stage.name, 1, 1, "done")
    return folder


def _finished(cache: StageCache, stage: Stage, key: str) -> Path | None:
    """The stage's directory where it is in the cache, undamaged."""
    folder = cache.find(stage.name, key)
    return folder if folder is not None and _is_whole(cache, folder) else None


def _make(cache: StageCache, stage: Stage, key: str, progress: Progress) -> Path:
    with cache.create(stage.name, key) as work:
        stage.run(work, lambda fraction, note: progress(stage.name, fraction, 1, note))
        paths = sorted(work.iterdir())
        for path in paths:
            # Later builds rely on these bytes: nobody should write to them by accident.
            path.chmod(0o444)
        files = {path.name: [path.stat().st_size, cache.file_hash(path)] for path in paths}
        (work / _INPUTS).write_text(json.dumps(dict(stage.inputs)) + "\n", "utf-8")
        (work / STAGE_FILE).write_text(json.dumps(files, indent=1) + "\n", "utf-8")
    folder = cache.find(stage.name, key)
    if folder is None:
        raise Sd35Error(f"{cache.root / stage.name / key} was deleted meanwhile", "try again")
    return folder


def _is_whole(cache: StageCache, folder: Path) -> bool:
    """Whether a stage's files are there, as they were written.

    Raises:
        OSError: that cannot be told: a file cannot be read.
    """
    try:
        return all(
            (folder / file.path).stat().st_size == file.bytes
            and cache.file_hash(folder / file.path) == file.sha256
            for file in stage_files(folder).values()
        )
    except (FileNotFoundError, NotADirectoryError, BundleError):
        return False


def recorded_stages(cache: StageCache, name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Whole stages of a kind in the cache, the last used first, each with the inputs that made it.

    Those that cannot be read are left out.
    """
    folders = [path for path in (cache.root / name).glob("*") if (path / STAGE_FILE).is_file()]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            inputs = json.loads((folder / _INPUTS).read_text("utf-8"))
            whole = cache.find(name, folder.name) is not None and _is_whole(cache, folder)
        except (OSError, ValueError):  # made by an older version, or damaged
            continue
        if whole:
            yield folder, inputs


def stage_files(folder: Path) -> dict[str, File]:
    """Sizes and hashes of a stage's files by name, as recorded when it was written.

    Raises:
        BundleError: there is no such record, or not as it was written.
        OSError: it cannot be read.
    """
    path, fix = folder / STAGE_FILE, "delete it: the next build writes it again"
    try:
        data = read_file(path, 64 << 20)
    except OSError as error:
        if error.errno is not None and not isinstance(error, IsADirectoryError):
            raise
        raise BundleError(f"{path} cannot be read: {error}", fix) from error
    files = decode(data, dict[Name, tuple[Count, Digest]], path, BundleError, fix)
    return {name: File(name, size, digest) for name, (size, digest) in files.items()}
