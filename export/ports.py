"""What a component looks like from outside: its named, typed inputs and outputs."""

from __future__ import annotations

import abc

import onnx_ir as ir
import torch
from torch import nn

from sd35_trt.dialects import Dialect
from sd35_trt.formats.bundle import AdapterGroup, Port
from sd35_trt.formats.program import Program

#: Integers, and the names of dynamic dimensions.
Shape = tuple["int | str", ...]
Ports = dict[str, tuple[torch.dtype, Shape]]


class ComponentModule(nn.Module, abc.ABC):
    """A module with named, typed ports; ``part`` is the checkpoint's module it is made from.

    Attributes:
        adapters: what it takes of adapters.
        adapter_inputs: names of the inputs for them, which come last: ``forward`` takes them
            together, as its argument ``adapters``.
    """

    inputs: Ports
    outputs: Ports
    part: nn.Module
    adapters: tuple[AdapterGroup, ...] = ()
    adapter_inputs: tuple[str, ...] = ()

    @abc.abstractmethod
    def trace(self, dialect: Dialect) -> ir.Model:
        """The ONNX graph, its weights being inputs behind the module's own."""

    @abc.abstractmethod
    def program(self) -> Program:
        """The same as PyTorch operators."""

    def declared_ports(self) -> list[Port]:
        """Inputs and outputs, as a bundle's manifest names them."""
        declared = [*self.inputs.items(), *self.outputs.items()]
        return [Port(name, str(t).removeprefix("torch."), shape) for name, (t, shape) in declared]
