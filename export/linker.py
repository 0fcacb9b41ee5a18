"""Putting a graph together from copies of traced segments."""

from __future__ import annotations

import onnx_ir as ir
import torch

from .ir_values import value_dtype, value_name

_TYPES = {torch.float16: ir.DataType.FLOAT16, torch.float32: ir.DataType.FLOAT}


class Linker:
    """Appends nodes and copies of traced segments to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._count = 0

    def _name(self) -> str:
        self._count += 1
        return f"link_{self._count}"

    def constant(self, values: list[int]) -> ir.Value:
        """A one-dimensional int64 constant."""
        name = self._name()
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape([len(values)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def node(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Append one operator; returns its output."""
        output = ir.Value(name=self._name())
        dtype = ir.DataType.INT64 if operator == "Shape" else value_dtype(inputs[0])
        output.type = ir.TensorType(dtype)
        self._graph.append(
            ir.node(operator, inputs, attributes=attributes, outputs=[output], name=output.name)
        )
        return output

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        """The same in another type."""
        wanted = _TYPES[dtype]
        if value_dtype(value) == wanted:
            return value
        output = self.node("Cast", value, to=int(wanted))
        output.type = ir.TensorType(wanted)
        return output

    def rows(self, tensor: ir.Value, first: int, count: int, axis: int = 1) -> ir.Value:
        """``tensor[:, first : first + count]``, of the second axis or another."""
        ends = (self.constant([first]), self.constant([first + count]), self.constant([axis]))
        return self.node("Slice", tensor, *ends)

    def length(self, tensor: ir.Value) -> ir.Value:
        """Of its first axis: int64 [1]."""
        return self.node("Shape", tensor, start=0, end=1)

    def between(self, tensor: ir.Value, first: ir.Value, last: ir.Value) -> ir.Value:
        """``tensor[first:last]``, the bounds being int64 [1]."""
        return self.node("Slice", tensor, first, last, self.constant([0]))

    def segment(
        self,
        segment: ir.Graph,
        inputs: dict[str, ir.Value],
        prefix: str,
        weights: str,
        local: str = "",
    ) -> list[ir.Value]:
        """Append a copy of a traced segment.

        Args:
            inputs: the values for its ports, by name.
            prefix: put before the names of its nodes and values.
            weights: put before the names of its weights, in place of ``local``; they become
                inputs of the graph.

        Returns:
            Its outputs.
        """
        copy = segment.clone()
        outputs = list(copy.outputs)
        copy.outputs.clear()
        for value in list(copy.inputs):
            name = value_name(value)
            copy.inputs.remove(value)
            # Ports come first, weights have a dot in their names.
            if "." not in name:
                ir.convenience.replace_all_uses_with(value, inputs[name])
            else:
                value.name = weights + name.removeprefix(local)
                self._graph.inputs.append(value)
        for name, value in list(copy.initializers.items()):
            del copy.initializers[name]
            value.name = f"{prefix}/{name}"
            self._graph.register_initializer(value)
        nodes = list(copy)
        copy.remove(nodes)
        for node in nodes:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}"
        self._graph.extend(nodes)
        return outputs
