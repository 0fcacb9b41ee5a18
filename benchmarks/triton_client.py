"""Clients of the models that ``sd35-trt export-triton`` writes."""

from __future__ import annotations

import queue
from collections.abc import Mapping
from typing import Any

import numpy as np

_PATIENCE = 600.0

# By input: numpy's type, and Triton's.
_KINDS: Mapping[str, tuple[Any, str]] = {
    "seed": (np.uint64, "UINT64"),
    "steps": (np.int32, "INT32"),
    "size": (np.int32, "INT32"),
}

# By numpy's type.
_OF_ARRAYS: Mapping[type, str] = {
    np.uint8: "UINT8",
    np.int32: "INT32",
    np.float32: "FP32",
    np.bool_: "BOOL",
    np.object_: "BYTES",
}


def inputs(module: Any, asked: Mapping[str, Any]) -> list[Any]:
    """A request of one picture.

    Args:
        module: ``tritonclient.http`` or ``tritonclient.grpc``.
        asked: as the body of a request to the HTTP server; arrays are tensors as they are.
    """
    width, height = map(int, asked["size"].split("x"))
    values = {**asked, "size": [width, height]}
    arrays = {"prompt": (np.array([[values.pop("prompt").encode()]], dtype=object), "BYTES")}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            arrays[name] = (value, _OF_ARRAYS[value.dtype.type])
        else:
            kind, triton_kind = _KINDS[name]
            arrays[name] = (np.array(value, kind).reshape(1, -1), triton_kind)
    found = []
    for name, (array, kind) in arrays.items():
        tensor = module.InferInput(name, list(array.shape), kind)
        tensor.set_data_from_numpy(array)
        found.append(tensor)
    return found


class HttpTriton:
    """The model that answers once, over HTTP.

    Args:
        address: ``host:port``.
        model: its name.
    """

    def __init__(self, address: str, model: str) -> None:
        import tritonclient.http as module

        self._module, self._model = module, model
        self._client = module.InferenceServerClient(
            address, connection_timeout=_PATIENCE, network_timeout=_PATIENCE
        )

    def draw(self, asked: Mapping[str, Any]) -> np.ndarray:
        """A picture, uint8 [1, H, W, 3]."""
        answer = self._client.infer(self._model, inputs(self._module, asked))
        picture: np.ndarray = answer.as_numpy("image")
        return picture


class StreamTriton:
    """The model that streams, over gRPC.

    Args:
        address: ``host:port``.
        model: its name.
    """

    def __init__(self, address: str, model: str) -> None:
        import tritonclient.grpc as module

        self._module, self._model = module, model
        self._client = module.InferenceServerClient(address)

    def draw(self, asked: Mapping[str, Any]) -> tuple[list[int], np.ndarray]:
        """The steps that were told of, and a picture, uint8 [1, H, W, 3]."""
        answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
        self._client.start_stream(callback=lambda result, error: answers.put((result, error)))
        steps: list[int] = []
        try:
            self._client.async_stream_infer(self._model, inputs(self._module, asked))
            while True:
                result, error = answers.get(timeout=_PATIENCE)
                if error is not None:
                    raise error
                picture = result.as_numpy("image")
                if picture is not None:
                    return steps, picture
                steps.append(int(result.as_numpy("step")[0, 0]))
        finally:
            self._client.stop_stream()
