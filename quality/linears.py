"""Errors of single linear layers, measured in the bundles' own ONNX graphs.

Every linear of the reference sees real activations: the inputs of a component, recorded while it
drew, are run again with the input and the output of every linear exposed. The compared bundle's
linears are then run on exactly these inputs, each cut out of its graph with whatever casts,
quantizes and dequantizes around its product (``own_error``), and in their places in the network
(``in_place_error``, which also carries what the layers before it add).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper

from sd35_trt.errors import Sd35Error

#: Inputs of a component by port name.
Feed = Mapping[str, np.ndarray]

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

# Exposed activations held at a time.
_BUDGET = 2 << 30

_PREFIX = "part."


@dataclass(frozen=True)
class LinearError:
    """One linear of a component.

    Attributes:
        precision: how the compared bundle stores the weight, ``reference_precision`` how the
            reference does; names as in a policy.
        own_error: ‖y' − y‖ / ‖y‖ on the same input; None where it is not finite.
        in_place_error: the same with each bundle's own input.
    """

    component: str
    layer: str
    precision: str
    reference_precision: str
    own_error: float | None
    in_place_error: float | None


@dataclass(frozen=True)
class _Linear:
    """Where a linear is in a graph: ``source`` is its input before any conversion."""

    precision: str
    source: str
    output: str
    features: int


class _Graph:
    """A component's ONNX graph with its linears by layer name."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        self.model = onnx.load(str(path), load_external_data=False)
        graph = self.model.graph
        self.inputs = {value.name: value for value in graph.input}
        self.types: dict[str, ValueInfoProto] = {v.name: v for v in graph.value_info}
        self.types |= self.inputs | {v.name: v for v in graph.output}
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: i for i, n in enumerate(graph.node) for name in n.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
        self.linears = dict(self._find())

    def _before(self, value: str) -> str:
        """The value that a chain of conversions starts from."""
        while (index := self.producers.get(value)) is not None:
            node = self.model.graph.node[index]
            if node.op_type not in _CONVERSIONS:
                break
            value = node.input[0]
        return value

    def _find(self) -> Iterator[tuple[str, _Linear]]:
        for node in self.model.graph.node:
            if node.op_type != "MatMul":
                continue
            weight = self.weights.get(self._before(node.input[1]))
            if weight is None or not weight.name.endswith(".weight"):
                continue
            layer = weight.name.removeprefix(_PREFIX).removesuffix(".weight")
            yield (
                layer,
                _Linear(
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

    def dtype(self, value: str) -> np.dtype:
        return helper.tensor_dtype_to_np_dtype(self.types[value].type.tensor_type.elem_type)

    def with_outputs(self, names: Sequence[str]) -> ModelProto:
        """The graph with these values as its outputs."""
        model = ModelProto()
        model.CopyFrom(self.model)
        del model.graph.output[:]
        model.graph.output.extend(self.types[name] for name in names)
        return model

    def cut_out(self, layers: Sequence[str]) -> ModelProto:
        """These linears alone, side by side, each from its input to its output."""
        graph = GraphProto(name="linears")
        taken: set[int] = set()
        sources = {self.linears[layer].source for layer in layers}
        for source in sorted(sources):
            value = graph.input.add()
            value.CopyFrom(self.types[source])
            # Not its own name: it may be the output of another linear.
            value.name = _input_name(source)
            value.type.tensor_type.ClearField("shape")
        for layer in layers:
            linear = self.linears[layer]
            graph.output.append(self.types[linear.output])
            self._take(linear.output, linear.source, taken)
        used: set[str] = set()
        for index in sorted(taken):
            node = self.model.graph.node[index]
            copy = graph.node.add()
            copy.CopyFrom(node)
            copy.input[:] = [_input_name(n) if n in sources else n for n in node.input]
            used |= set(node.input)
        graph.initializer.extend(self.weights[name] for name in sorted(used & set(self.weights)))
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


def _input_name(source: str) -> str:
    return f"input/{source}"


def _open(model: ModelProto, folder: Path) -> ort.InferenceSession:
    """A session on a graph whose weights are files in ``folder``."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    # Operator by operator, as written: fusions would move the values to compare.
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def _groups(graph: _Graph, layers: Sequence[str], feeds: Sequence[Feed]) -> list[list[str]]:
    """The layers in groups whose inputs and outputs fit the memory set aside for them."""
    rows = max(_rows(feed) for feed in feeds)
    groups: list[list[str]] = [[]]
    size = 0
    for layer in layers:
        need = 4 * rows * graph.linears[layer].features
        if groups[-1] and size + need > _BUDGET:
            groups.append([])
            size = 0
        groups[-1].append(layer)
        size += need
    return groups


def _rows(feed: Feed) -> int:
    """No linear of the component has more rows of input than this."""
    if "latents" in feed:
        batch, _, height, width = feed["latents"].shape
        tokens = feed["context"].shape[1] if "context" in feed else 0
        return 2 * batch * (height * width + tokens)
    return max(array.size // (array.shape[-1] if array.ndim > 2 else 1) for array in feed.values())


class _Ratio:
    """‖difference‖ / ‖reference‖ over several arrays, per layer."""

    def __init__(self) -> None:
        self._squares: dict[str, list[float]] = {}

    def add(self, layer: str, value: np.ndarray, reference: np.ndarray) -> None:
        exact = reference.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            error = np.square(value.astype(np.float64) - exact).sum()
        sums = self._squares.setdefault(layer, [0.0, 0.0])
        sums[0] += float(error)
        sums[1] += float(np.square(exact).sum())

    def get(self, layer: str) -> float | None:
        error, size = self._squares[layer]
        value = (error / size) ** 0.5 if size else (0.0 if error == 0 else np.inf)
        return value if np.isfinite(value) else None


def equal_linears(component: str, path: Path) -> list[LinearError]:
    """The linears of a component that two bundles have in the same file: no error."""
    return [
        LinearError(component, layer, linear.precision, linear.precision, 0.0, 0.0)
        for layer, linear in _Graph(path).linears.items()
    ]


def linear_errors(
    component: str,
    reference: Path,
    candidate: Path,
    feeds: Sequence[Feed],
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[LinearError]:
    """Errors of a component's linears, in the order of the reference's graph.

    Args:
        reference: its ONNX file, and ``candidate`` the one to compare.
        feeds: inputs of the component, as the reference got them.
        progress: called with the fraction done.

    Raises:
        Sd35Error: the graphs do not have the same linears, or the engine fails.
    """
    one, other = _Graph(reference), _Graph(candidate)
    if one.linears.keys() != other.linears.keys():
        odd = sorted(one.linears.keys() ^ other.linears.keys())
        raise Sd35Error(
            f"{candidate} and {reference} do not both have the linear {odd[0]}",
            "build both bundles with this version",
        )
    own, in_place = _Ratio(), _Ratio()
    groups = _groups(one, list(one.linears), feeds)
    for number, layers in enumerate(groups):

        def report(fraction: float, number: int = number) -> None:
            progress((number + fraction) / len(groups))

        _measure(one, other, layers, feeds, own, in_place, report)
    return [
        LinearError(
            component,
            layer,
            other.linears[layer].precision,
            linear.precision,
            own.get(layer),
            in_place.get(layer),
        )
        for layer, linear in one.linears.items()
    ]


class _Measured:
    """A graph's linears twice: in their places, and cut out."""

    def __init__(self, graph: _Graph, layers: Sequence[str]) -> None:
        self._graph = graph
        linears = [graph.linears[layer] for layer in layers]
        self.sources = {layer: graph.linears[layer].source for layer in layers}
        self.outputs = {layer: graph.linears[layer].output for layer in layers}
        exposed = {n for linear in linears for n in (linear.source, linear.output)}
        self._exposed = sorted(exposed - graph.inputs.keys())
        self._whole = _open(graph.with_outputs(self._exposed), graph.folder)
        self._cut = _open(graph.cut_out(layers), graph.folder)

    def in_place(self, feed: Feed) -> dict[str, np.ndarray]:
        """Inputs and outputs of the linears, by name of the value."""
        ports = {name: feed[name].astype(self._graph.dtype(name)) for name in self._graph.inputs}
        return ports | dict(zip(self._exposed, self._whole.run(self._exposed, ports), strict=True))

    def alone(self, inputs: Feed) -> dict[str, np.ndarray]:
        """Outputs by layer for inputs by layer."""
        sources = {
            source: inputs[layer].astype(self._graph.dtype(source))
            for layer, source in self.sources.items()
        }
        names = sorted(set(self.outputs.values()))
        out = self._cut.run(names, {_input_name(k): v for k, v in sources.items()})
        values = dict(zip(names, out, strict=True))
        return {layer: values[name] for layer, name in self.outputs.items()}


def _measure(
    one: _Graph,
    other: _Graph,
    layers: Sequence[str],
    feeds: Sequence[Feed],
    own: _Ratio,
    in_place: _Ratio,
    progress: Callable[[float], None],
) -> None:
    """Add the errors of some layers over all feeds."""
    try:
        a, b = _Measured(one, layers), _Measured(other, layers)
        for done, feed in enumerate(feeds, 1):
            expected, got = a.in_place(feed), b.in_place(feed)
            # Both cut out, so that equal layers give equal bits.
            inputs = {layer: expected[source] for layer, source in a.sources.items()}
            expected_alone, got_alone = a.alone(inputs), b.alone(inputs)
            for layer in layers:
                own.add(layer, got_alone[layer], expected_alone[layer])
                in_place.add(layer, got[b.outputs[layer]], expected[a.outputs[layer]])
            progress(done / len(feeds))
    except RuntimeError as error:
        raise Sd35Error(f"{other.folder} failed in onnxruntime: {error}") from error
