"""A program with its weights on a device: graphs compiled, called in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import sdpa_kernel

from sd35_trt.compat.torch import recompile_limit
from sd35_trt.errors import BundleError
from sd35_trt.formats.program import Call, Condition, Graph, Program, View

from . import flash_attention
from .attention import ATTENTION, FLASH_4, sdpa_backends
from .decoding import REBUILD, graph_module
from .kernel_archive import compiling

#: How graphs are compiled → ``torch.compile``'s mode; ``eager`` is not in it. CUDA graphs are the
#: caller's.
MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}

_Step = Callable[[dict[str, torch.Tensor]], None]

# Combinations of sizes for which a graph is compiled; beyond it, PyTorch stops compiling.
_VARIANTS = 64


class TorchProgram:
    """A program with its weights on a device, ready to be called.

    Args:
        weights: by name; see :func:`sd35_trt.programs.tensors.read_tensors`.
        device: where they are.
        mode: a key of :data:`MODES`, or ``eager`` to compile nothing. A graph is compiled when it
            is called first, and again when sizes change for the first time: then for all sizes.
        attention: keys of :data:`~sd35_trt.programs.attention.ATTENTION` that may be used, the
            preferred one first.
        fast_accumulation: see :func:`sd35_trt.programs.decoding.graph_module`.

    Raises:
        BundleError: the program and its weights do not fit.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        device: torch.device,
        mode: str = "default",
        attention: Sequence[str] = tuple(ATTENTION),
        fast_accumulation: bool = False,
    ) -> None:
        functions: dict[str, Callable[..., Any]] = {}
        flash_4 = mode != "eager" and FLASH_4 in attention and flash_attention.is_usable(device)
        for name, graph in program.graphs.items():
            functions[name] = _function(graph, device, mode, fast_accumulation, flash_4)
        self._steps: list[tuple[tuple[Condition, ...], _Step]] = []
        for step in program.steps:
            if isinstance(step, View):
                self._steps.append((step.conditions, _view(step)))
                continue
            graph = program.graphs[step.graph]
            if len(step.weights) != len(graph.weights):
                raise BundleError(f"{step.graph} takes {len(graph.weights)} weights", REBUILD)
            tensors = [weights[name] for name in step.weights]
            run = _call(step, functions[step.graph], tensors)
            self._steps.append((step.conditions, run))
        self._backends = sdpa_backends(attention)
        self._compiled = mode != "eager"

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All values when the steps are done, the outputs among them."""
        values = dict(inputs)
        with contextlib.ExitStack() as settings:
            settings.enter_context(torch.no_grad())
            settings.enter_context(sdpa_kernel(self._backends, set_priority=True))
            if self._compiled:
                settings.enter_context(recompile_limit(_VARIANTS))
                settings.enter_context(compiling())
            for conditions, step in self._steps:
                if all(_is_met(condition, inputs) for condition in conditions):
                    step(values)
        return values


def _is_met(condition: Condition, inputs: Mapping[str, torch.Tensor]) -> bool:
    length = inputs[condition.value].shape[condition.axis]
    return (length > condition.above) == condition.holds


# Functions have no weights in them: a component that is closed and opened again needs no new ones.
_MOST_FUNCTIONS = 64
_COMPILED: dict[tuple[str, str, str, bool, bool], Callable[..., Any]] = {}


def _function(
    graph: Graph, device: torch.device, mode: str, fast_accumulation: bool, flash_4: bool
) -> Callable[..., Any]:
    key = (repr(graph), str(device), mode, fast_accumulation, flash_4)
    if key not in _COMPILED:
        module = graph_module(graph, device, fast_accumulation, flash_4)
        compiled = module if mode == "eager" else torch.compile(module, mode=MODES[mode])
        _COMPILED[key] = compiled
        while len(_COMPILED) > _MOST_FUNCTIONS:
            del _COMPILED[next(iter(_COMPILED))]
    return _COMPILED[key]


def _call(call: Call, function: Callable[..., Any], weights: list[torch.Tensor]) -> _Step:
    def run(values: dict[str, torch.Tensor]) -> None:
        results = function(*weights, *(values[name] for name in call.inputs))
        values.update(zip(call.outputs, results, strict=True))

    return run


def _view(view: View) -> _Step:
    def run(values: dict[str, torch.Tensor]) -> None:
        value = values[view.value]
        if view.kind == "rows":
            value = value.narrow(1, view.first, view.count)
        elif view.kind == "stack":
            value = value.narrow(0, view.first, view.count)
        elif view.kind == "tokens":
            value = value.flatten(1, 2)
        else:
            value = value.unflatten(1, values[view.like].shape[1:3])
        values[view.output] = value

    return run
