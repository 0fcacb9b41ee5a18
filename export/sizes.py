"""Bytes of a component's weights and activations, before anything is exported.

The component is built on fake tensors with its policy applied, so weights count exactly as they
are stored later. Activations are the largest sum of tensors alive at once while the component
runs, operator by operator: attention is one operator, and dequantized operands count nothing, as
engines fuse both. An engine that fuses more needs less. Of its kernels' workspaces, only cuDNN's
convolutions have large ones. ONNX Runtime fuses less and allocates as :mod:`.arena` says.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.compat.torch import TorchDispatchMode, storage_key
from sd35_trt.components import component_row
from sd35_trt.policies import Policy

from .arena import Arena, Chunk
from .component import (
    ExportOptions,
    apply_policy,
    build_part,
    component_module,
    fake_tensors,
)
from .denoiser import Denoiser
from .part_layers import StoredSize
from .ports import ComponentModule, Ports
from .short_steps import COEFFICIENTS, REMEMBERED


@dataclass(frozen=True)
class Sizes:
    """Bytes of one component.

    Attributes:
        weights: as stored.
        activations: working memory at the shapes asked for, inputs and outputs included.
        with_cudnn: the same where convolutions are cuDNN's, which copies what is not NHWC.
        in_arena: the same in ONNX Runtime's arena, which also has what a GroupNormalization is
            made of there.
        allocated: what ONNX Runtime takes on a GPU for the weights.
        largest_layer: weights of its largest layer.
        ports: inputs and outputs alone, at these shapes.
        compiled: working memory that the compiler reports, without ``ports``; None where it was
            not asked.
    """

    weights: int
    activations: int
    with_cudnn: int
    in_arena: int
    allocated: int
    largest_layer: int
    ports: int
    compiled: int | None = None

    def working(self, allocation: str) -> int:
        """Working memory where tensors are allocated so; see :class:`sd35_trt.backends.Backend`."""
        by = {"live": self.activations, "cudnn": self.with_cudnn, "arena": self.in_arena}
        return by[allocation]


def component_sizes(
    name: str,
    source: AnyCheckpoint | Structure,
    policy: Policy,
    options: ExportOptions,
    dims: Mapping[str, int],
) -> Sizes:
    """Measure a component on fake tensors.

    Args:
        name: one that :func:`sd35_trt.components.component_row` knows.
        dims: a value for each dynamic dimension of its ports.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
        UsageError: the policy does not fit the component.
    """
    with fake_tensors():
        part = build_part(component_row(name).part, source)
        apply_policy(part, name, policy)
        size = StoredSize.of(part, name, options.features.first_blocks(name))
        module = component_module(name, part, options).eval()
        fixed = {storage_key(p) for p in part.parameters()}
        inputs = _tensors(module.inputs, dims)
        ports = sum(tensor.nbytes for tensor in inputs.values())
        del inputs
        with _Tracker(fixed) as tracker:
            if isinstance(module, Denoiser):
                outputs = _run_denoiser(module, dims)
            else:
                outputs = module(**_together(module, _tensors(module.inputs, dims)))
        ports += sum(tensor.nbytes for tensor in outputs)
    return Sizes(
        weights=size.weights,
        activations=tracker.peak,
        with_cudnn=tracker.peak_with_cudnn,
        in_arena=tracker.arena.total,
        allocated=size.allocated,
        largest_layer=size.largest_layer,
        ports=ports,
    )


def _tensors(ports: Ports, dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    return {
        name: torch.empty([dims[d] if isinstance(d, str) else d for d in shape], dtype=dtype)
        for name, (dtype, shape) in ports.items()
    }


def _together(module: ComponentModule, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Arguments of a module's ``forward``: what adapters take is one."""
    if not module.adapter_inputs:
        return dict(tensors)
    own = {name: t for name, t in tensors.items() if name not in module.adapter_inputs}
    return {**own, "adapters": tuple(tensors[name] for name in module.adapter_inputs)}


def _run_denoiser(denoiser: Denoiser, dims: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
    """The outputs of one step, put together as in :meth:`Denoiser.trace`.

    Of equal blocks, one is run.
    """
    inputs = _tensors(denoiser.inputs, dims)
    context, modulation = inputs["context"], inputs["modulation"]
    (image,) = denoiser.head(inputs["latents"])
    if denoiser.guided:
        third = dims["skipped"] if denoiser.skipping else 0
        context = torch.cat([inputs["uncond_context"], context, context[:third]])
        modulation = torch.cat([inputs["uncond_modulation"], modulation, modulation[:third]])
        image = torch.cat([image, image, image[:third]])
    grid = image.shape
    kept = image = image.flatten(1, 2)
    signatures = set()
    for number, block in enumerate(denoiser.blocks):
        signature = block.signature()
        if number == denoiser.first_blocks:
            kept = image
        if signature in signatures:
            continue
        signatures.add(signature)
        streams = {"image": image, "context": context, "modulation": modulation[:, : block.rows]}
        own = {name: block.inputs[name] for name in block.adapter_inputs}
        adapters = _tensors(own, {**dims, "samples": len(image)})
        *texts, image = block(**_together(block, {**streams, **adapters}))
        del streams, adapters
        context = texts[0] if texts else context
    changes: tuple[torch.Tensor, ...] = ()
    if denoiser.short:
        remembered = {name: inputs[name] for name in (COEFFICIENTS, *REMEMBERED)}
        (image,) = denoiser.extrapolation(image=image, **remembered)
    elif denoiser.first_blocks:
        both = 2 * dims["batch"] if denoiser.guided else dims["batch"]
        changes = denoiser.change(image=image[:both], kept=kept[:both])
    del kept
    image, modulation = image.view(grid), modulation[:, -denoiser.tail.rows :]
    if denoiser.skipping:
        rest = slice(dims["batch"] + third, 2 * dims["batch"])
        image, modulation = (torch.cat([x, x[rest]]) for x in (image, modulation))
    tail = {**inputs, "image": image, "modulation": modulation}
    del image, context, modulation
    outputs: tuple[torch.Tensor, ...] = denoiser.tail(
        **{name: tail[name] for name in denoiser.tail.inputs}
    )
    return outputs + changes


class _Tracker(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive.

    Args:
        fixed: storages that do not count: the weights.
    """

    def __init__(self, fixed: set[int]) -> None:
        super().__init__()
        self.peak = 0
        self.peak_with_cudnn = 0
        self.arena = Arena()
        self._fixed = fixed
        self._live = 0
        self._tensors: dict[int, int] = {}  # storage → tensors that share it
        self._chunks: dict[int, Chunk] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if _is_dequantize(func, args):
            return result
        copies = args[0].nbytes + result.nbytes if _is_convolution(func) else 0
        beside = self._work(func, args, copies)
        for tensor in _flatten(result):
            key, size = storage_key(tensor), tensor.untyped_storage().nbytes()
            if key in self._fixed:
                continue
            if key not in self._tensors:
                self._live += size
                self.peak = max(self.peak, self._live)
                self._chunks[key] = self.arena.allocate(size)
            self._tensors[key] = self._tensors.get(key, 0) + 1
            weakref.finalize(tensor, self._release, key, size)
        self.peak_with_cudnn = max(self.peak_with_cudnn, self._live + copies)
        if beside is not None:
            self.arena.free(beside)
        return result

    def _work(self, func: Any, args: tuple[Any, ...], copies: int) -> Chunk | None:
        """What ONNX Runtime allocates for an operator before its output; free it after."""
        if copies:
            return self.arena.allocate(copies)
        if not _is_group_norm(func):
            return None
        # The operator's definition, in FP32: the input, its square, and its deviation.
        x: torch.Tensor = args[0]
        size = x.numel() * torch.float32.itemsize
        cast = [] if x.dtype == torch.float32 else [self.arena.allocate(size)]
        square, deviation = self.arena.allocate(size), self.arena.allocate(size)
        for chunk in (square, *cast):
            self.arena.free(chunk)
        return deviation

    def _release(self, key: int, size: int) -> None:
        self._tensors[key] -= 1
        if not self._tensors[key]:
            del self._tensors[key]
            self._live -= size
            self.arena.free(self._chunks.pop(key))


def _is_dequantize(func: Any, args: tuple[Any, ...]) -> bool:
    return func.namespace == "onnx_symbolic" and "DequantizeLinear" in args


def _is_group_norm(func: Any) -> bool:
    return func.namespace == "aten" and "group_norm" in func.__name__


def _is_convolution(func: Any) -> bool:
    return func.namespace == "aten" and "conv" in func.__name__


def _flatten(result: Any) -> Iterator[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        yield result
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _flatten(item)
