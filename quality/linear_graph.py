"""The linear layers of a component's ONNX graph: where each is, and how to run it alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnx import GraphProto, ModelProto, TensorProto, helper

from .onnx_graph import OnnxGraph

#: What each way of storing a weight is called in a policy.
_PRECISIONS = {
    TensorProto.FLOAT: "fp32",
    TensorProto.FLOAT16: "half",
    TensorProto.FLOAT8E4M3FN: "fp8",
    TensorProto.INT8: "int8-weight",
    TensorProto.INT4: "int4-weight",
}

# What may stand between a stored weight, or an activation, and the product.
_CONVERSIONS = {"Cast", "QuantizeLinear", "DequantizeLinear", "Transpose", "Clip"}

_PREFIX = "part."


@dataclass(frozen=True)
class GraphLinear:
    """Where a linear is in a graph.

    Attributes:
        precision: how its weight is stored, named as in a policy.
        source: name of the value that is its input, before any conversion.
        output: of the value that it puts out, bias included.
        features: of its input and output together.
    """

    precision: str
    source: str
    output: str
    features: int


class LinearGraph(OnnxGraph):
    """A component's ONNX graph with its linears by layer name."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.linears = dict(self._find())

    def _before(self, value: str) -> str:
        """The value that a chain of conversions starts from."""
        while (index := self.producers.get(value)) is not None:
            node = self.model.graph.node[index]
            if node.op_type not in _CONVERSIONS:
                break
            value = node.input[0]
        return value

    def _find(self) -> Iterator[tuple[str, GraphLinear]]:
        for node in self.model.graph.node:
            if node.op_type != "MatMul":
                continue
            weight = self.weights.get(self._before(node.input[1]))
            if weight is None or not weight.name.endswith(".weight"):
                continue
            layer = weight.name.removeprefix(_PREFIX).removesuffix(".weight")
            yield (
                layer,
                GraphLinear(
                    _PRECISIONS.get(weight.data_type, TensorProto.DataType.Name(weight.data_type)),
                    self._before(node.input[0]),
                    self._with_bias(node.output[0], f"{_PREFIX}{layer}.bias"),
                    sum(weight.dims),
                ),
            )

    def _with_bias(self, product: str, bias: str) -> str:
        """The sum of a product and its bias, or the product where it has none."""
        value = product
        while len(users := self.consumers.get(value, [])) == 1:
            (user,) = users
            if user.op_type == "Add" and bias in map(self._before, user.input):
                return user.output[0]
            if user.op_type not in _CONVERSIONS:
                break
            value = user.output[0]
        return product

    def cut_out(self, layers: Sequence[str]) -> ModelProto:
        """These linears alone, side by side, each from its input to its output."""
        graph = GraphProto(name="linears")
        nodes: set[int] = set()
        sources = {self.linears[layer].source for layer in layers}
        for source in sorted(sources):
            value = graph.input.add()
            value.CopyFrom(self.types[source])
            # Not its own name: it may be the output of another linear.
            value.name = input_name(source)
            value.type.tensor_type.ClearField("shape")
        for layer in layers:
            linear = self.linears[layer]
            graph.output.append(self.types[linear.output])
            self._take(linear.output, linear.source, nodes)
        values: set[str] = set()
        for index in sorted(nodes):
            node = self.model.graph.node[index]
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [input_name(n) if n in sources else n for n in node.input]
            values |= set(node.input)
        graph.initializer.extend(self.weights[name] for name in sorted(values & set(self.weights)))
        return helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            functions=self.model.functions,
            ir_version=self.model.ir_version,
        )

    def _take(self, value: str, source: str, taken: set[int]) -> None:
        """Collect the nodes between a source and a value."""
        index = self.producers.get(value)
        if value == source or index is None or index in taken:
            return
        taken.add(index)
        for name in self.model.graph.node[index].input:
            self._take(name, source, taken)


def input_name(source: str) -> str:
    """What the input of :meth:`LinearGraph.cut_out` is called that takes a value's place."""
    return f"input/{source}"
