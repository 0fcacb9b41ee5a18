"""Reading the tensors of a program."""

from __future__ import annotations

from pathlib import Path

import pytest
from example_program import CPU, two_calls

from sd35_trt.errors import BundleError
from sd35_trt.programs.tensors import read_tensors


def test_damaged_tensors(tmp_path: Path) -> None:
    two_calls(tmp_path)
    tensors = tmp_path / "weights.safetensors"
    content = tensors.read_bytes()
    for broken in (content[:-8], content[:20], b""):
        tensors.write_bytes(broken)
        with pytest.raises(BundleError, match=r"weights\.safetensors cannot be read"):
            read_tensors(tensors, ["a"], CPU)
    tensors.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot be read.*nothing"):
        read_tensors(tensors, ["nothing"], CPU)
