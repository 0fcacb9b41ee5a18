"""A traced graph as data: what has no place in it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sd35_trt.programs.encoding import graph_data


def test_an_operator_without_a_place_is_not_written() -> None:
    class Sorted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sort().values

    program = torch.export.export(Sorted(), (torch.zeros(3),), strict=False)
    with pytest.raises(NotImplementedError, match=r"aten\.sort"):
        graph_data(program.graph, [], ["x"])
