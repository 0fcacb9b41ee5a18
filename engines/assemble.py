"""Putting a bundle together: written beside its final name, then renamed in one step."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sd35_trt.bundle import MANIFEST, Component, File, Manifest, Tokenizer, describe_file
from sd35_trt.cache import working_directory
from sd35_trt.errors import UsageError
from sd35_trt.stages import stage_files

from .builder import ExportedComponent, load_builder

# renameat2(2): swap two paths in one step, so that a bundle being replaced is never absent.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_destination(out: Path) -> None:
    """Refuse a destination that cannot become a bundle, before any work is done.

    Raises:
        UsageError: names the fix.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UsageError(f"{out} is a file or a link", "choose another --out")
    if out.is_dir() and any(out.iterdir()) and not (out / MANIFEST).is_file():
        raise UsageError(f"{out} is not empty and holds no bundle", "choose another --out")
    parent = out.absolute().parent
    while not parent.exists():
        parent = parent.parent
    try:
        with tempfile.TemporaryFile(dir=parent):  # has no name, so that a kill leaves nothing
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write in {parent}: {error.strerror}", "choose another --out"
        ) from error


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; False where the file system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    status: int = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    return status == 0


@contextlib.contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A directory to assemble the bundle in; it becomes ``out`` when the block ends.

    Nothing stays when the block raises; an older bundle at ``out`` then stays as it was.
    """
    out = out.absolute()
    with working_directory(out.parent, f".{out.name}.building-") as work:
        yield work
        if not out.exists():
            work.rename(out)
        elif _exchange(work, out):
            # Now the older bundle: without its manifest, nothing half-deleted looks like one.
            (work / MANIFEST).unlink(missing_ok=True)
        else:
            old = work.with_name(work.name + ".replaced")
            out.rename(old)
            work.rename(out)
            shutil.rmtree(old, ignore_errors=True)


def assemble(
    out: Path,
    components: Mapping[str, Path],
    tokenizers: Path,
    lengths: Mapping[str, Mapping[str, int]],
    facts: Mapping[str, Any],
) -> None:
    """Build the engines and write the bundle.

    Args:
        out: the bundle's directory.
        components: stage directories of the exported components by name.
        tokenizers: stage directory of the tokenizers.
        lengths: their ``length`` and ``pad_id`` by text encoder.
        facts: the manifest's other fields.
    """
    builder = load_builder(facts["builder"])
    with staging(out) as work:
        entries = []
        for name, folder in components.items():
            (work / name).mkdir()
            exported = ExportedComponent.read(folder)
            engine = builder.build_engine(exported, work / name, facts["ranges"])
            known = stage_files(folder)
            entries.append(
                Component(
                    name=name,
                    engine=builder.ENGINE,
                    files=tuple(
                        # What is the stage's own file has been hashed before.
                        File(f"{name}/{file}", known[file].bytes, known[file].sha256)
                        if file in known
                        else describe_file(work, f"{name}/{file}")
                        for file in engine.files
                    ),
                    inputs=exported.inputs,
                    outputs=exported.outputs,
                    weight_bytes=exported.weight_bytes,
                    activation_bytes=engine.activation_bytes,
                )
            )
        (work / "tokenizer").mkdir()
        texts = {}
        for name, length in lengths.items():
            path = f"tokenizer/{name}.json"
            shutil.copyfile(tokenizers / f"{name}.json", work / path)
            texts[name] = Tokenizer(path, length["length"], length["pad_id"])
        now = datetime.datetime.now(datetime.timezone.utc)
        manifest = Manifest(
            **facts,
            tokenizers=texts,
            components=tuple(entries),
            files=tuple(describe_file(work, text.path) for text in texts.values()),
            created=now.isoformat(timespec="seconds"),
        )
        _write_manifest(work, manifest)


def _write_manifest(work: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` last and flush it to disk: without it, nothing loads."""
    with (work / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
