"""Programs without a model: that they compute what was traced, and their views."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from example_program import CPU, Twice, two_calls

from sd35_trt.errors import BundleError
from sd35_trt.formats.program import Program, View, read_program
from sd35_trt.programs.torch_program import TorchProgram


def test_a_program_computes_what_was_traced(tmp_path: Path) -> None:
    program, weights = two_calls(tmp_path)
    run = TorchProgram(program, weights, CPU, "eager")
    for shape in ((3, 5, 4), (2, 7, 4)):
        x = torch.randn(shape)
        values = run({"x": x})
        for name, keys in (("a", ("flat", "half")), ("b", ("out", "rest"))):
            module = Twice()
            module.weight.data = weights[name]
            with torch.no_grad():
                expected = module(x)
            for key, value in zip(keys, expected, strict=True):
                torch.testing.assert_close(values[key], value, rtol=0, atol=0)


def test_views() -> None:
    steps = (
        View("rows", "x", "rows", 1, 2),
        View("tokens", "x", "tokens"),
        View("grid", "tokens", "back", like="x"),
    )
    run = TorchProgram(Program(torch.__version__, {}, steps), {}, CPU, "eager")
    x = torch.randn(2, 3, 4, 5)
    values = run({"x": x})
    assert torch.equal(values["rows"], x[:, 1:3])
    assert torch.equal(values["tokens"], x.reshape(2, 12, 5))
    assert torch.equal(values["back"], x)
    assert all(value.data_ptr() >= x.data_ptr() for value in values.values()), "nothing is copied"


def test_damaged_programs(tmp_path: Path) -> None:
    two_calls(tmp_path)
    path = tmp_path / "program.json"
    whole = path.read_text()
    data = json.loads(whole)
    changes: list[str] = [whole[: len(whole) // 2], "[]", json.dumps({**data, "steps": [{}]})]
    changes.append(json.dumps({**data, "steps": [{"kind": "copy", "value": "", "output": ""}]}))
    for text in changes:
        path.write_text(text)
        with pytest.raises(BundleError, match=r"program\.json (cannot be|lacks).*build the bundle"):
            read_program(path)
    path.write_text(json.dumps({**data, "format": 99}))
    with pytest.raises(BundleError, match="has format 99, this version reads 1"):
        read_program(path)
