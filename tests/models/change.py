"""Makes a bundle compute something else than what it was built from."""

from __future__ import annotations

from pathlib import Path

import onnx
from msgspec.structs import replace
from onnx import numpy_helper

from sd35_trt.formats.bundle import Bundle, describe_file, write_manifest


def change_weight(bundle: Path, component: str, weight: str) -> None:
    """Make a weight another, and the manifest agree: an engine that computes something else."""
    manifest, folder = Bundle.open(bundle).manifest, bundle / component
    model = onnx.load(folder / "model.onnx")
    (tensor,) = (t for t in model.graph.initializer if t.name == weight)
    array = numpy_helper.to_array(tensor).copy()
    array[0] += 1.0
    tensor.CopyFrom(numpy_helper.from_array(array, weight))
    for name in ("model.onnx", "weights.data"):
        (folder / name).unlink()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="weights.data",
        size_threshold=128,
    )  # fmt: skip
    changed = []
    for entry in manifest.components:
        if entry.name == component:
            files = tuple(describe_file(bundle, file.path) for file in entry.files)
            entry = replace(entry, files=files)
        changed.append(entry)
    write_manifest(bundle, replace(manifest, components=tuple(changed)))
