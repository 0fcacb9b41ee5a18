"""The model that draws, and answers with a stream: each step, then the pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from sd35_trt.errors import Cancelled, OutOfMemory, Sd35Error, UsageError
from sd35_trt.runtime import Pipeline, Result, Step
from sd35_trt.runtime.job import Job

from .configuration import inputs_of
from .flags import CancelFlag
from .tensors import arguments, runs

# Codes of Triton's, by class of the error. The stub adds them to the module after it is imported.
_CODES = ((UsageError, "INVALID_ARG"), (Cancelled, "CANCELLED"), (OutOfMemory, "UNAVAILABLE"))


class Stream:
    """As Triton's Python backend wants it: requests that Triton gathered are drawn in one run
    where they agree.
    """

    def initialize(self, args: dict[str, str]) -> None:
        """Load the bundle and draw a picture, before Triton says that the model is ready."""
        parameters = {
            key: value["string_value"]
            for key, value in json.loads(args["model_config"])["parameters"].items()
        }
        gpu = args["model_instance_kind"] == "GPU"
        self._pipe = Pipeline.load(
            parameters["bundle"],
            threads=int(parameters["threads"]) if "threads" in parameters else None,
            device=f"cuda:{args['model_instance_device_id']}" if gpu else None,
            vram_budget=parameters.get("vram_budget"),
            trust_kernels="trust_kernels" in parameters,
        )
        self._adapters = json.loads(parameters.get("adapters", "{}"))
        for name, file in self._adapters.items():
            self._pipe.load_adapter(name, file)
        self._pipe.preload()
        least, self._room = self._pipe.manifest.ranges.batch
        self._pipe.generate([""] * least)

    def finalize(self) -> None:
        """Release the engines."""
        self._pipe.close()

    def execute(self, requests: Sequence[Any]) -> None:
        """Draw requests; responses go out as they come about."""
        asked = [_Asked(request) for request in requests]
        accepted = [(one, job) for one in asked if (job := self._accept(one)) is not None]
        rank = max(self._pipe.manifest.adapter_ranks, default=0)
        for run in runs([job.request for _, job in accepted], self._room, rank):
            self._draw([accepted[index] for index in run])

    def _accept(self, asked: _Asked) -> Job | None:
        """What is to be drawn; None where it is refused, and answered."""
        manifest = self._pipe.manifest
        nets = [control.name for control in manifest.controls]
        try:
            tensors = asked.tensors([tensor.name for tensor in inputs_of(manifest)])
            request = self._pipe.request(**arguments(tensors, nets, self._adapters))
            return Job(request, asked.on_step)
        except Sd35Error as error:
            asked.answer(error)
            return None

    def _draw(self, run: Sequence[tuple[_Asked, Job]]) -> None:
        error: BaseException | None = None
        try:
            self._pipe.draw([job for _, job in run])
        except Exception as raised:  # noqa: BLE001 told to who asked
            error = raised
        for asked, job in run:
            asked.answer(job.outcome or error)


class _Asked:
    """A request, and where its responses go."""

    def __init__(self, request: Any) -> None:
        self._request = request
        self._sender = request.get_response_sender()
        self._flag = CancelFlag.of_parameters(request.parameters())

    def tensors(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """Its inputs by name.

        Raises:
            Cancelled: nobody waits for it any more.
        """
        if self._given_up():
            raise Cancelled("the request was cancelled")
        return {
            name: found.as_numpy()
            for name in names
            if (found := pb_utils.get_input_tensor_by_name(self._request, name))
        }

    def _given_up(self) -> bool:
        return self._sender.is_cancelled() or (self._flag is not None and self._flag.is_set)

    def on_step(self, step: Step) -> bool:
        """Tell of a step; False gives up."""
        if self._given_up():
            return False
        count = len(step.latents)
        self._send(
            {
                "step": np.full((count, 1), step.index + 1, np.int32),
                "steps": np.full((count, 1), step.total, np.int32),
            }
        )
        return True

    def answer(self, outcome: Result | BaseException | None) -> None:
        """Send the last response."""
        final = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
        if isinstance(outcome, Result):
            seeds = np.array(outcome.seeds, np.uint64).reshape(-1, 1)
            self._send({"image": outcome.images, "seed": seeds}, final)
            return
        code = next((code for kind, code in _CODES if isinstance(outcome, kind)), "INTERNAL")
        told = pb_utils.TritonError(str(outcome), getattr(pb_utils.TritonError, code))
        # Apart: of an error that ends a stream, a model that asked is never told.
        self._sender.send(pb_utils.InferenceResponse(output_tensors=[], error=told))
        self._sender.send(flags=final)

    def _send(self, tensors: dict[str, np.ndarray], flags: int = 0) -> None:
        outputs = [pb_utils.Tensor(name, array) for name, array in tensors.items()]
        send: Callable[..., None] = self._sender.send
        send(pb_utils.InferenceResponse(output_tensors=outputs), flags=flags)
