"""Putting a bundle together: written beside its final name, then renamed in one step."""

from __future__ import annotations

import datetime
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sd35_trt.formats.bundle import (
    CALIBRATION,
    MANIFEST,
    Component,
    File,
    Manifest,
    Tokenizer,
    describe_file,
)
from sd35_trt.formats.calibration import Calibration
from sd35_trt.store.stages import stage_files
from sd35_trt.store.staging import staging

from .builder import Builder, CompiledComponent


def assemble(
    out: Path,
    builder: Builder,
    engines: Iterable[CompiledComponent],
    tokenizers: Path,
    lengths: Mapping[str, Mapping[str, int]],
    facts: Mapping[str, Any],
    calibration: Calibration | None = None,
) -> None:
    """Write the bundle.

    Args:
        out: the bundle's directory.
        builder: that made the engines.
        tokenizers: stage directory of the tokenizers.
        lengths: their ``length`` and ``pad_id`` by text encoder.
        facts: the manifest's other fields.
        calibration: what was built with; the bundle keeps it as ``calibration.json``.
    """
    with staging(out, MANIFEST) as work:
        entries = []
        for engine in engines:
            exported, name = engine.component, engine.component.name
            (work / name).mkdir()
            placed = builder.place(engine, work / name)
            known = stage_files(engine.folder)
            entries.append(
                Component(
                    name=name,
                    engine=builder.backend.name,
                    files=tuple(
                        # What is the stage's own file has been hashed before.
                        File(f"{name}/{file}", known[file].bytes, known[file].sha256)
                        if file in known
                        else describe_file(work, f"{name}/{file}")
                        for file in placed.files
                    ),
                    inputs=exported.inputs,
                    outputs=exported.outputs,
                    precisions=exported.precisions,
                    fp32_places=exported.fp32_places,
                    weight_bytes=placed.weight_bytes,
                    activation_bytes=placed.activation_bytes or engine.activation_bytes,
                    allocated_bytes=engine.allocated_bytes,
                    bounds={d: (b[0], b[-1]) for d, b in engine.bounds.items()},
                    largest_layer_bytes=exported.largest_layer_bytes,
                )
            )
        (work / "tokenizer").mkdir()
        texts = {}
        for name, length in lengths.items():
            path = f"tokenizer/{name}.json"
            shutil.copyfile(tokenizers / f"{name}.json", work / path)
            texts[name] = Tokenizer(path, length["length"], length["pad_id"])
        files = [text.path for text in texts.values()]
        if calibration:
            files.append(CALIBRATION)
            described = {**calibration.provenance, "amax": calibration.tensors()}
            (work / CALIBRATION).write_text(json.dumps(described, indent=1) + "\n", "utf-8")
        now = datetime.datetime.now(datetime.timezone.utc)
        manifest = Manifest(
            **facts,
            tokenizers=texts,
            components=tuple(entries),
            files=tuple(describe_file(work, path) for path in files),
            calibration=None if calibration is None else calibration.digest(),
            created=now.isoformat(timespec="seconds"),
        )
        _write_manifest(work, manifest)


def _write_manifest(work: Path, manifest: Manifest) -> None:
    """Write ``bundle.json`` last and flush it to disk: without it, nothing loads."""
    with (work / MANIFEST).open("w", encoding="utf-8") as stream:
        stream.write(manifest.to_json())
        stream.flush()
        os.fsync(stream.fileno())
