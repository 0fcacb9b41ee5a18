"""What was compiled: offered to another process, and damaged."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from example_program import CPU, two_calls

from sd35_trt.programs import kernel_archive
from sd35_trt.programs.kernel_archive import collect_kernels, offer_kernels
from sd35_trt.programs.torch_program import TorchProgram

_LOAD = """
import sys, torch
from pathlib import Path
from sd35_trt.formats.program import read_program
from sd35_trt.programs.kernel_archive import offer_kernels
from sd35_trt.programs.tensors import read_tensors
from sd35_trt.programs.torch_program import TorchProgram
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


@pytest.mark.nightly
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
    process = subprocess.run(
        [sys.executable, "-c", _LOAD, str(tmp_path), str(torch.get_num_threads())],
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-800:]
    compiled, hits = map(int, process.stdout.split())
    assert compiled == 0
    assert hits > 0


def test_what_others_compile_stays_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_archive, "_artifacts", {})
    program, weights = two_calls(tmp_path)
    torch._dynamo.reset()

    @torch.compile
    def theirs(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() * 31).cumsum(0)

    theirs(torch.randn(7))
    assert collect_kernels() is None
    TorchProgram(program, weights, CPU, "default")({"x": torch.randn(3, 5, 4)})
    ours = collect_kernels()
    assert ours is not None
    theirs(torch.randn(7, 3))
    assert collect_kernels() == ours
    saved = torch.compiler.save_cache_artifacts()
    assert saved is not None, "and they have their own"
    assert b"cumsum" in saved[0]
    with zipfile.ZipFile(io.BytesIO(ours)) as archive:
        kept = [archive.read(name) for name in archive.namelist()]
    assert kept
    assert not any(b"cumsum" in data for data in kept)


def test_so_many_artifacts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_archive, "_artifacts", {})
    monkeypatch.setattr(kernel_archive, "_MOST_BYTES", 100)
    for size in (40, 41, 40, 42):  # the third is the first again
        kernel_archive._keep(b"x" * size)
    assert [len(data) for data in kernel_archive._artifacts] == [40, 42]


def test_damaged_kernels_are_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(kernel_archive.logger, "warning", lambda *words: said.append(str(words)))
    offer_kernels(b"PK no archive")
    assert "compiled again" in said[0]
