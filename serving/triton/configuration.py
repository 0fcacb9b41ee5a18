"""``config.pbtxt`` of the two models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from sd35_trt.formats.bundle import Manifest


@dataclass(frozen=True)
class Tensor:
    """An input or output.

    Attributes:
        kind: Triton's type, without ``TYPE_``.
        dims: of one image.
        optional: whether a request may leave it out.
    """

    name: str
    kind: str
    dims: tuple[int, ...] = (1,)
    optional: bool = True


_IMAGE = (-1, -1, 3)

#: What a request may say of any bundle; the first dimension of each counts its images.
INPUTS = (
    Tensor("prompt", "STRING", optional=False),
    Tensor("prompt_2", "STRING"),
    Tensor("prompt_3", "STRING"),
    Tensor("negative_prompt", "STRING"),
    Tensor("negative_prompt_2", "STRING"),
    Tensor("negative_prompt_3", "STRING"),
    Tensor("weighting", "BOOL"),
    Tensor("t5_tokens", "INT32"),
    Tensor("seed", "UINT64"),
    Tensor("size", "INT32", (2,)),
    Tensor("steps", "INT32"),
    Tensor("guidance", "FP32"),
    Tensor("shift", "FP32"),
    Tensor("sampler", "STRING"),
    Tensor("step_cache", "STRING"),
    Tensor("image", "UINT8", _IMAGE),
    Tensor("strength", "FP32"),
    Tensor("mask", "UINT8", (-1, -1)),
    Tensor("paste", "BOOL"),
    Tensor("skip_guidance_layers", "INT32", (-1,)),
    Tensor("skip_layer_guidance_scale", "FP32"),
    Tensor("skip_layer_guidance_start", "FP32"),
    Tensor("skip_layer_guidance_stop", "FP32"),
    Tensor("adapters", "STRING", (-1,)),
    Tensor("adapter_scales", "FP32", (-1,)),
)

#: What may be asked of a ControlNet: the field of :class:`~sd35_trt.runtime.Control`, and its
#: input, whose name follows the net's.
CONTROL = {
    "image": Tensor("", "UINT8", _IMAGE),
    "scale": Tensor("_scale", "FP32"),
    "start": Tensor("_start", "FP32"),
    "end": Tensor("_end", "FP32"),
    "edges": Tensor("_edges", "BOOL"),
}


def control_input(net: str, field: str) -> Tensor:
    """The input for a field of :data:`CONTROL`."""
    own = CONTROL[field]
    return replace(own, name=f"control_{net}{own.name}")


def inputs_of(manifest: Manifest) -> tuple[Tensor, ...]:
    """What a request may say of a bundle."""
    nets = (control.name for control in manifest.controls)
    return (*INPUTS, *(control_input(net, field) for net in nets for field in CONTROL))


#: What the model that answers once gives.
OUTPUTS = (Tensor("image", "UINT8", (-1, -1, 3)), Tensor("seed", "UINT64"))

#: What the stream has besides: in every response but the last, these alone.
PROGRESS = (Tensor("step", "INT32"), Tensor("steps", "INT32"))

# Microseconds that the first request waits for others.
_DELAY = 5000

# Of the model that answers once, which waits: while one batch is drawn, the next is gathered.
_WAITERS = 2


def stream_configuration(name: str, manifest: Manifest, parameters: Mapping[str, str]) -> str:
    """Of the model that draws, and streams: one instance for each GPU.

    Args:
        parameters: of the model, by key.
    """
    devices = "KIND_CPU" if manifest.target == "cpu" else "KIND_GPU"
    return _configuration(
        name, manifest, (*OUTPUTS, *PROGRESS), parameters,
        f"instance_group [ {{ count: 1 kind: {devices} }} ]",
        "model_transaction_policy { decoupled: true }",
    )  # fmt: skip


def once_configuration(name: str, manifest: Manifest, stream: str) -> str:
    """Of the model that answers once.

    Args:
        stream: name of the model that draws.
    """
    return _configuration(
        name, manifest, OUTPUTS, {"stream": stream},
        f"instance_group [ {{ count: {_WAITERS} kind: KIND_CPU }} ]",
    )  # fmt: skip


def _configuration(
    name: str,
    manifest: Manifest,
    outputs: Iterable[Tensor],
    parameters: Mapping[str, str],
    *lines: str,
) -> str:
    batch = manifest.ranges.batch[1]
    parts = [
        f"name: {json.dumps(name)}",
        'backend: "python"',
        f"max_batch_size: {batch}",
        *(f"input [ {_tensor(one, one.optional)} ]" for one in inputs_of(manifest)),
        *(f"output [ {_tensor(one, False)} ]" for one in outputs),
        f"dynamic_batching {{ max_queue_delay_microseconds: {_DELAY} }}",
        *lines,
        *(
            f"parameters {{ key: {json.dumps(key)} value {{ string_value: {json.dumps(value)} }} }}"
            for key, value in parameters.items()
        ),
    ]
    return "\n".join(parts) + "\n"


def _tensor(tensor: Tensor, optional: bool) -> str:
    dims = ", ".join(map(str, tensor.dims))
    end = " optional: true }" if optional else " }"
    return f'{{ name: "{tensor.name}" data_type: TYPE_{tensor.kind} dims: [ {dims} ]{end}'
