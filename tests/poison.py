"""Bundles whose weights are wrong although every hash is right, for the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
from msgspec.structs import replace

from sd35_trt.formats.bundle import Bundle, describe_file, write_manifest


def poisoned(source: Path, out: Path, weight: str, factor: float, name: str = "denoiser") -> Path:
    """A copy of an FP32 bundle with one weight of one component multiplied.

    Args:
        weight: what the name of its tensor contains; there is one such.
        factor: NaN makes every value NaN.
    """
    shutil.copytree(source, out)
    manifest = Bundle.open(out).manifest
    component = manifest.component(name)
    assert component is not None
    model = out / component.files[0].path
    tensors = onnx.load(model, load_external_data=False).graph.initializer
    (tensor,) = (t for t in tensors if weight in t.name and t.external_data)
    assert tensor.data_type == onnx.TensorProto.FLOAT
    where = {entry.key: entry.value for entry in tensor.external_data}
    data = model.parent / where["location"]
    values = np.memmap(data, np.float32, "r+", int(where["offset"]), (int(where["length"]) // 4,))
    values *= factor
    values.flush()
    files = tuple(describe_file(out, file.path) for file in component.files)
    components = (replace(c, files=files) if c is component else c for c in manifest.components)
    write_manifest(out, replace(manifest, components=tuple(components)))
    return out
