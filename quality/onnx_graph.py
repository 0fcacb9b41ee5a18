"""A component's ONNX graph and its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, ValueInfoProto, helper

from sd35_trt.errors import BundleError

#: Arrays by name of a port, or of a value of a graph.
Arrays = Mapping[str, np.ndarray]


class OnnxGraph:
    """A graph, its weights not loaded.

    Attributes:
        folder: where its weights are.
        types: of its inputs, outputs and values between, by name.
        producers: index of the node that makes a value.
        consumers: nodes that take a value.

    Raises:
        BundleError: the file is missing or no ONNX.
    """

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        try:
            self.model = onnx.load(str(path), load_external_data=False)
        except (OSError, DecodeError) as error:
            raise BundleError(
                f"{path} is no ONNX graph ({error})", "build the bundle again with: sd35-trt build"
            ) from error
        if not self.model.graph.value_info:  # which the exporter writes
            self.model = onnx.shape_inference.infer_shapes(self.model)
        graph = self.model.graph
        self.inputs = {value.name: value for value in graph.input}
        self.outputs = [value.name for value in graph.output]
        self.types: dict[str, ValueInfoProto] = {v.name: v for v in graph.value_info}
        self.types |= self.inputs | {v.name: v for v in graph.output}
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: i for i, n in enumerate(graph.node) for name in n.output}
        self.consumers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def dtype(self, value: str) -> np.dtype:
        """The type of a value's elements."""
        return helper.tensor_dtype_to_np_dtype(self.types[value].type.tensor_type.elem_type)

    def with_outputs(self, names: Sequence[str]) -> ModelProto:
        """The graph with these values as its outputs."""
        model = ModelProto()
        model.CopyFrom(self.model)
        del model.graph.output[:]
        model.graph.output.extend(self.types[name] for name in names)
        return model

    def feed(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Arrays for its inputs, in their types."""
        return {name: arrays[name].astype(self.dtype(name), copy=False) for name in self.inputs}
