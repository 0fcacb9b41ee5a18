"""A small program: two calls of one graph, with weights of their own."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from sd35_trt.formats.program import Call, Graph, Program, read_program
from sd35_trt.programs.encoding import graph_data
from sd35_trt.programs.tensors import read_tensors

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
