"""A traced graph has the ports that its module declares, or there is none."""

from __future__ import annotations

import pytest
import torch

from sd35_trt.dialects import DIALECTS
from sd35_trt.export.component import fake_tensors
from sd35_trt.export.ports import Ports
from sd35_trt.export.trace import trace
from sd35_trt.export.whole import WholeModule


class Double(WholeModule):
    """``2 x``, and whatever is declared of it."""

    def __init__(self, outputs: Ports) -> None:
        super().__init__()
        self.inputs = {"x": (torch.float32, ("batch", 4))}
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + x,)


def test_ports_are_named_as_declared() -> None:
    with fake_tensors():
        model = trace(Double({"y": (torch.float32, ("batch", 4))}), DIALECTS["opset23"])
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "y"]


@pytest.mark.parametrize(
    ("dtype", "shape"), [(torch.float16, ("batch", 4)), (torch.float32, ("batch", 5)),
                         (torch.float32, (2, 4)), (torch.float32, ("batch",))],
)  # fmt: skip
def test_other_ports_are_refused(dtype: torch.dtype, shape: tuple[int | str, ...]) -> None:
    with fake_tensors(), pytest.raises(ValueError, match="is declared"):
        trace(Double({"y": (dtype, shape)}), DIALECTS["opset23"])


def test_another_number_of_outputs_is_refused() -> None:
    port = (torch.float32, ("batch", 4))
    with fake_tensors(), pytest.raises(ValueError, match="1 outputs, declared are"):
        trace(Double({"y": port, "z": port}), DIALECTS["opset23"])
