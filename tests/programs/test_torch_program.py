"""Programs without a model: what a graph may hold, and when it is compiled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.program import Call, Graph, Node, Program, View, read_program
from sd35_trt.programs import torch_program
from sd35_trt.programs.torch_program import (
    TorchProgram,
    check_version,
    collect_kernels,
    graph_data,
    graph_module,
    offer_kernels,
    read_tensors,
)

CPU = torch.device("cpu")


class Twice(nn.Module):
    """A layer of an odd collection of operators and arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(x.shape[1], device=x.device).to(torch.float32)
        lowest = torch.full_like(x, float("-inf")).clamp(min=-1.0)
        y = torch.matmul(x, self.weight.t()) + positions[None, :, None] + lowest
        first, _ = y.chunk(2, dim=-1)
        y += 1
        return y.reshape(x.shape[0] * x.shape[1], -1), first


def traced(module: nn.Module, *example: torch.Tensor) -> Graph:
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    program = torch.export.export(
        module, example, dynamic_shapes=({0: batch, 1: length},), strict=False
    )
    return graph_data(program.graph, ["weight"], ["x"])


def two_calls(tmp_path: Path) -> tuple[Program, dict[str, torch.Tensor]]:
    """Two calls of one graph with weights of their own, read from files."""
    graph = traced(Twice(), torch.zeros(3, 5, 4))
    steps = (
        Call("twice", ("a",), ("x",), ("flat", "half")),
        Call("twice", ("b",), ("x",), ("out", "rest")),
    )
    path = tmp_path / "program.json"
    path.write_text(Program(torch.__version__, {"twice": graph}, steps).to_json())
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(4, 4, generator=generator) for name in "ab"}
    save_file(weights, tmp_path / "weights.safetensors")
    program = read_program(path)
    return program, read_tensors(tmp_path / "weights.safetensors", program.weights(), CPU)


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


_LOAD = """
import sys, torch
from pathlib import Path
from sd35_trt.program import read_program
from sd35_trt.torch_program import TorchProgram, offer_kernels, read_tensors
folder = Path(sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))  # kernels for the CPU are for so many threads
offer_kernels((folder / "kernels").read_bytes())
program = read_program(folder / "program.json")
weights = read_tensors(folder / "weights.safetensors", program.weights(), torch.device("cpu"))
TorchProgram(program, weights, torch.device("cpu"))({"x": torch.ones(3, 5, 4)})
counters = torch._dynamo.utils.counters
hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]
print(counters["inductor"]["fxgraph_cache_miss"], hits)
"""


def test_a_graph_is_compiled_once_for_all_its_calls_and_processes(tmp_path: Path) -> None:
    program, weights = two_calls(tmp_path)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run = TorchProgram(program, weights, CPU, "default")
    again = TorchProgram(program, weights, CPU, "default")
    eager = TorchProgram(program, weights, CPU, "eager")
    x = torch.randn(3, 5, 4)
    for one in (run, run, again):
        for key, value in eager({"x": x}).items():
            torch.testing.assert_close(one({"x": x})[key], value)
    stats: Any = torch._dynamo.utils.counters["stats"]
    assert stats["unique_graphs"] == 1
    kernels = collect_kernels()
    assert kernels
    (tmp_path / "kernels").write_bytes(kernels)
    # With a compiler cache of its own, that is empty at first.
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path), str(torch.get_num_threads())],
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-800:]
    compiled, found = map(int, done.stdout.split())
    assert compiled == 0
    assert found > 0


def test_damaged_kernels_are_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(torch_program.logger, "warning", lambda *words: said.append(str(words)))
    offer_kernels(b"PK no archive")
    assert "compiled again" in said[0]


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


@pytest.mark.parametrize("target", ["aten.from_file.default", "os.system", "aten.nonsense.default",
                                    "prims.device_put.default", "eval"])  # fmt: skip
def test_operators_that_programs_do_not_have(target: str) -> None:
    graph = Graph((), ("x",), (Node("v", target, [{"value": "x"}], {}),), ("v",))
    with pytest.raises(BundleError, match=f"damaged: the operator '{target}'"):
        graph_module(graph, CPU, False)


@pytest.mark.parametrize(
    "argument", [{"value": "y"}, {"dtype": "Tensor"}, {"module": "os"}, {"a": 1, "b": 2}]
)
def test_arguments_that_programs_do_not_have(argument: Any) -> None:
    graph = Graph((), ("x",), (Node("v", "aten.to.dtype", [{"value": "x"}, argument], {}),), ("v",))
    with pytest.raises(BundleError, match="a graph is damaged"):
        graph_module(graph, CPU, False)


def test_an_operator_without_a_place_is_not_written() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort().values

    program = torch.export.export(Sorted(), (torch.zeros(3),), strict=False)
    with pytest.raises(NotImplementedError, match=r"aten\.sort"):
        graph_data(program.graph, [], ["x"])


def test_damaged_files(tmp_path: Path) -> None:
    two_calls(tmp_path)
    path, tensors = tmp_path / "program.json", tmp_path / "weights.safetensors"
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
    content = tensors.read_bytes()
    for broken in (content[:-8], content[:20], b""):
        tensors.write_bytes(broken)
        with pytest.raises(BundleError, match=r"weights\.safetensors cannot be read"):
            read_tensors(tensors, ["a"], CPU)
    tensors.write_bytes(content)
    with pytest.raises(BundleError, match=r"cannot be read.*nothing"):
        read_tensors(tensors, ["nothing"], CPU)


@pytest.mark.parametrize("version", ["2.8.1", "2.14.0", "3.0.0+cu140"])
def test_other_versions_of_pytorch(version: str) -> None:
    with pytest.raises(Sd35Error, match=rf"2\.9 and newer below 2\.14, this is {version[:5]}"):
        check_version(version)
    check_version("2.11.0+cu130")
    check_version(torch.__version__)


def test_the_modes_are_pytorchs() -> None:
    known = torch._inductor.list_mode_options()
    assert all(mode is None or mode in known for mode in torch_program.MODES.values())
