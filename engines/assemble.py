"""Putting a bundle together: written beside its final name, then renamed in one step."""

from __future__ import annotations

import datetime
import shutil
from collections.abc import Iterable
from pathlib import Path

from msgspec.structs import replace

from sd35_trt.formats.bundle import (
    CALIBRATION,
    MANIFEST,
    Component,
    File,
    Manifest,
    Tokenizer,
    describe_file,
    write_manifest,
)
from sd35_trt.formats.calibration import Calibration, CalibrationExtract
from sd35_trt.formats.step_cache import STEP_CACHE, StepCache
from sd35_trt.formats.tokenizers import read_tokenizers
from sd35_trt.store.replacement import replacement
from sd35_trt.store.stages import stage_files

from .builder import Builder, CompiledComponent


def assemble(
    out: Path,
    builder: Builder,
    engines: Iterable[CompiledComponent],
    tokenizers: Path,
    facts: Manifest,
    calibration: Calibration | None = None,
    step_cache: StepCache | None = None,
) -> None:
    """Write the bundle.

    Args:
        out: the bundle's directory.
        builder: that made the engines.
        tokenizers: stage directory of the tokenizers.
        facts: the manifest without components, tokenizers, files and calibration.
        calibration: what was built with; the bundle keeps it as ``calibration.json``.
        step_cache: of its short steps, for this model.
    """
    with replacement(out, MANIFEST) as work:
        entries, in_arena = [], builder.backend.allocation == "arena"
        for engine in engines:
            exported, name = engine.component, engine.component.name
            (work / name).mkdir()
            placed = builder.place(engine, work / name)
            hashed = stage_files(engine.folder)
            entries.append(
                Component(
                    name=name,
                    engine=builder.backend.name,
                    files=tuple(
                        # What is the stage's own file has been hashed before.
                        File(f"{name}/{file}", hashed[file].bytes, hashed[file].sha256)
                        if file in hashed
                        else describe_file(work, f"{name}/{file}")
                        for file in placed.files
                    ),
                    inputs=exported.inputs,
                    outputs=exported.outputs,
                    precisions=exported.precisions,
                    fp32_places=exported.fp32_places,
                    weight_bytes=placed.weight_bytes,
                    activation_bytes=placed.activation_bytes or engine.activation_bytes,
                    allocated_bytes=exported.allocated_bytes if in_arena else None,
                    bounds={d: (b[0], b[-1]) for d, b in engine.bounds.items()},
                    largest_layer_bytes=exported.largest_layer_bytes,
                    adapters=exported.adapters,
                )
            )
        (work / "tokenizer").mkdir()
        texts = {}
        for name, tokenizer in read_tokenizers(tokenizers).items():
            path = f"tokenizer/{name}.json"
            shutil.copyfile(tokenizers / f"{name}.json", work / path)
            texts[name] = Tokenizer(path, tokenizer.length, tokenizer.pad_id)
        files = [text.path for text in texts.values()]
        if calibration:
            files.append(CALIBRATION)
            (work / CALIBRATION).write_bytes(CalibrationExtract(calibration).encode())
        if step_cache:
            files.append(STEP_CACHE)
            (work / STEP_CACHE).write_bytes(step_cache.encode())
        now = datetime.datetime.now(datetime.timezone.utc)
        manifest = replace(
            facts,
            tokenizers=texts,
            components=tuple(entries),
            files=tuple(describe_file(work, path) for path in files),
            calibration=None if calibration is None else calibration.digest(),
            created=now.isoformat(timespec="seconds"),
        )
        # Last: without it, nothing loads.
        write_manifest(work, manifest)
