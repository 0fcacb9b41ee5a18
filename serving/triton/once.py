"""The model that answers once, as HTTP wants it: it asks the one that draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import triton_python_backend_utils as pb_utils

from .configuration import OUTPUTS
from .flags import CancelFlag

# Seconds between looks at who has left.
_LOOK = 0.05


class Once:
    """As Triton's Python backend wants it. It holds no engines: those are the stream's."""

    def initialize(self, args: dict[str, str]) -> None:
        """Prepare for as many requests as Triton gathers."""
        configuration = json.loads(args["model_config"])
        self._stream = configuration["parameters"]["stream"]["string_value"]
        self._inputs = [one["name"] for one in configuration["input"]]
        self._threads = ThreadPoolExecutor(configuration["max_batch_size"])

    def finalize(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Ask for all of them at once, so that they are drawn together."""
        flags = [CancelFlag() for _ in requests]
        try:
            answers = list(map(self._threads.submit, [self._ask] * len(flags), requests, flags))
            while wait(answers, _LOOK).not_done:
                for request, flag in zip(requests, flags, strict=True):
                    if request.is_cancelled():
                        flag.set()
            return [answer.result() for answer in answers]
        finally:
            for flag in flags:
                flag.remove()

    def _ask(self, request: Any, flag: CancelFlag) -> Any:
        """The last response of the stream, or its error."""
        given = [pb_utils.get_input_tensor_by_name(request, name) for name in self._inputs]
        asked = pb_utils.InferenceRequest(
            model_name=self._stream,
            requested_output_names=[tensor.name for tensor in OUTPUTS],
            inputs=[tensor for tensor in given if tensor is not None],
            parameters=flag.parameters,
        )
        last = None
        for response in asked.exec(decoupled=True):
            if response.has_error():
                return pb_utils.InferenceResponse(output_tensors=[], error=response.error())
            if response.output_tensors():
                last = response.output_tensors()
        return pb_utils.InferenceResponse(output_tensors=last)
