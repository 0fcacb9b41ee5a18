"""Programs and PyTorch: graphs of ``torch.export`` to data, data to functions, and their kernels.

A graph is data and not ``torch.export``'s own file, which is a pickle beside a schema that changes
with the version: operators of ATen and their arguments are the same in all versions that we
support, a size is an operator's result, and a device is wherever the program runs.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import fused
from .errors import BundleError, Sd35Error
from .program import Call, Graph, Node, Program, View

#: Versions of PyTorch that run programs: at least the first, below the second.
SUPPORTED = ((2, 9), (2, 14))

# Functions on sizes.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "floordiv": operator.floordiv,
    "getitem": operator.getitem,
    "mul": operator.mul,
    "sub": operator.sub,
}

#: Operators of ATen that a graph may hold. None reaches a file or memory that is not its operands'.
OPERATORS = frozenset(
    [
        "_scaled_mm.default",
        "abs.default",
        "add.Tensor",
        "add_.Tensor",
        "alias.default",
        "amax.default",
        "arange.default",
        "arange.start",
        "argmax.default",
        "bitwise_and.Scalar",
        "bitwise_right_shift.Tensor_Scalar",
        "bitwise_xor.Scalar",
        "cat.default",
        "chunk.default",
        "clamp.default",
        "contiguous.default",
        "conv2d.default",
        "cos.default",
        "div.Tensor",
        "dropout.default",
        "embedding.default",
        "eq.Scalar",
        "exp.default",
        "expand.default",
        "flatten.using_ints",
        "full_like.default",
        "gelu.default",
        "group_norm.default",
        "gt.Scalar",
        "index.Tensor",
        "layer_norm.default",
        "le.Tensor",
        "linear.default",
        "log.default",
        "lt.Scalar",
        "matmul.default",
        "min.other",
        "mul.Tensor",
        "pad.default",
        "permute.default",
        "pixel_shuffle.default",
        "pow.Tensor_Scalar",
        "reshape.default",
        "rms_norm.default",
        "round.default",
        "scaled_dot_product_attention.default",
        "select.int",
        "sigmoid.default",
        "silu.default",
        "sin.default",
        "slice.Tensor",
        "softmax.int",
        "split_with_sizes.default",
        "stack.default",
        "sub.Tensor",
        "sym_size.int",
        "t.default",
        "tanh.default",
        "to.device",
        "to.dtype",
        "transpose.int",
        "unflatten.int",
        "unsqueeze.default",
        "upsample_nearest2d.vec",
        "view.default",
        "where.self",
    ]
)

# Operators that sum FP8 products.
_SUMS = ("aten._scaled_mm.default", *(f"sd35.{name}.default" for name in ("qkv", "gelu", "gated")))

# What torch.export adds about shapes and types: checks, and results that nobody reads.
_CHECKS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")

#: Attention kernels of CUDA by name, the preferred one first; the last takes everything.
ATTENTION = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

#: How graphs are compiled → ``torch.compile``'s mode; ``eager`` is not in it. CUDA graphs are the
#: caller's.
MODES = {"default": None, "max-autotune": "max-autotune-no-cudagraphs"}

# Combinations of sizes for which a graph is compiled; beyond it, PyTorch stops compiling.
_VARIANTS = 64

_AGAIN = "build the bundle again with: sd35-trt build"


def check_version(found: str) -> None:
    """Refuse a PyTorch that programs have not been tried with.

    Raises:
        Sd35Error: names the versions that run them.
    """
    low, high = SUPPORTED
    numbers = tuple(int(part) for part in found.split(".")[:2])
    if not low <= numbers < high:
        raise Sd35Error(
            f"programs run on PyTorch {_dotted(low)} and newer below {_dotted(high)}, "
            f"this is {found}",
            "pip install 'sd35-trt[inductor]'",
        )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


# A graph of torch.export as data.


def graph_data(graph: fx.Graph, weights: Sequence[str], inputs: Sequence[str]) -> Graph:
    """A traced graph, its parameters named anew.

    Args:
        graph: placeholders in the order of ``weights``, then ``inputs``.
        weights: those that nothing reads are left out.

    Raises:
        NotImplementedError: an operator or an argument that has no place in a program.
    """
    names: dict[fx.Node, str] = {}
    nodes: list[Node] = []
    outputs: tuple[str, ...] = ()
    parameters = iter([*weights, *inputs])
    for node in graph.nodes:
        if node.op == "call_function" and str(node.target) in _CHECKS:
            continue
        if node.op == "placeholder":
            names[node] = next(parameters)
        elif node.op == "call_function":
            names[node] = f"v{len(names)}"
            target = _target_name(node.target)
            arguments = [_encode(argument, names) for argument in node.args]
            keywords = {key: _encode(value, names) for key, value in node.kwargs.items()}
            nodes.append(Node(names[node], target, arguments, keywords))
        elif node.op == "output":
            outputs = tuple(names[value] for value in node.args[0])
        else:
            raise NotImplementedError(f"a node of kind {node.op}")
    needed = set(outputs)
    kept: list[Node] = []
    for item in reversed(nodes):
        # What works in place has readers through its operand.
        if item.name in needed or item.target.split(".")[1:2] == ["add_"]:
            kept.append(item)
            needed.update(_values([item.args, item.kwargs]))
    for item in kept:
        known = item.target in _FUNCTIONS or fused.is_fused(item.target)
        if not known and item.target.removeprefix("aten.") not in OPERATORS:
            raise NotImplementedError(f"the operator {item.target}")
    used = tuple(name for name in weights if name in needed)
    return Graph(used, tuple(inputs), tuple(reversed(kept)), outputs)


def _target_name(target: Any) -> str:
    for name, function in _FUNCTIONS.items():
        if target is function:
            return name
    return str(target)


def _encode(argument: Any, names: Mapping[fx.Node, str]) -> Any:
    if isinstance(argument, fx.Node):
        return {"value": names[argument]}
    if isinstance(argument, (list, tuple)):
        return [_encode(item, names) for item in argument]
    if isinstance(argument, torch.dtype):
        return {"dtype": str(argument).removeprefix("torch.")}
    if isinstance(argument, torch.device):
        return {"device": None}
    if argument is None or isinstance(argument, (bool, int, str)):
        return argument
    if isinstance(argument, float):
        # JSON has no infinity.
        return argument if math.isfinite(argument) else {"float": str(argument)}
    raise NotImplementedError(f"the argument {argument!r}")


def _values(data: Any) -> Iterator[str]:
    """Names of the values in encoded arguments."""
    if isinstance(data, dict):
        if "value" in data:
            yield data["value"]
        else:
            for item in data.values():
                yield from _values(item)
    elif isinstance(data, list):
        for item in data:
            yield from _values(item)


# Data to functions.


def graph_module(graph: Graph, device: torch.device, fast_accumulation: bool) -> fx.GraphModule:
    """A module whose ``forward`` takes the graph's weights, then its inputs; returns a tuple.

    Args:
        fast_accumulation: FP8 products may be summed with less than FP32's precision inside
            tensor cores.

    Raises:
        BundleError: an operator that programs do not have.
    """
    result = fx.Graph()
    values: dict[str, fx.Node] = {}

    def decode(data: Any) -> Any:
        if isinstance(data, list):
            return [decode(item) for item in data]
        if not isinstance(data, dict):
            return data
        ((kind, value),) = data.items()
        if kind == "value":
            return values[value]
        if kind == "dtype":
            return _dtype(value)
        if kind == "float":
            return float(value)
        if kind == "device":
            return device
        raise ValueError(f"an argument of kind {kind!r}")

    try:
        for index, name in enumerate((*graph.weights, *graph.inputs)):
            values[name] = result.placeholder(f"p{index}")
        for node in graph.nodes:
            target, kwargs = _target(node.target, device), dict(node.kwargs)
            if node.target in _SUMS:
                kwargs["use_fast_accum"] = fast_accumulation
            values[node.name] = result.call_function(
                target,
                tuple(decode(argument) for argument in node.args),
                {key: decode(value) for key, value in kwargs.items()},
            )
        result.output(tuple(values[name] for name in graph.outputs))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise BundleError(f"a graph is damaged: {error}", _AGAIN) from error
    return fx.GraphModule(torch.nn.Module(), result)


def _target(name: str, device: torch.device) -> Callable[..., Any]:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    if fused.is_fused(name):
        return fused.find(name, device)
    namespace, _, rest = name.partition(".")
    if namespace != "aten" or rest not in OPERATORS:
        raise ValueError(f"the operator {name!r}")
    packet, _, overload = rest.partition(".")
    found: Callable[..., Any] = getattr(getattr(torch.ops.aten, packet), overload)
    return found


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"the type {name!r}")
    return found


class TorchProgram:
    """A program with its weights on a device, ready to be called.

    Args:
        weights: by name; see :func:`read_tensors`.
        device: where they are.
        mode: a key of :data:`MODES`, or ``eager`` to compile nothing. A graph is compiled when it
            is called first, and again when sizes change for the first time: then for all sizes.
        attention: keys of :data:`ATTENTION` that may be used, the preferred one first.
        fast_accumulation: see :func:`graph_module`.

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
        for name, graph in program.graphs.items():
            functions[name] = _function(graph, device, mode, fast_accumulation)
        self._steps: list[Callable[[dict[str, torch.Tensor]], None]] = []
        for step in program.steps:
            if isinstance(step, View):
                self._steps.append(_view(step))
                continue
            graph = program.graphs[step.graph]
            if len(step.weights) != len(graph.weights):
                raise BundleError(f"{step.graph} takes {len(graph.weights)} weights", _AGAIN)
            given = [weights[name] for name in step.weights]
            self._steps.append(_call(step, functions[step.graph], given))
        self._backends = [ATTENTION[name] for name in attention]
        self._variants = contextlib.nullcontext if mode == "eager" else _many_variants

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All values when the steps are done, the outputs among them."""
        values = dict(inputs)
        with torch.no_grad(), sdpa_kernel(self._backends, set_priority=True), self._variants():
            for step in self._steps:
                step(values)
        return values


# Functions have no weights in them: a component that is closed and opened again needs no new ones.
_COMPILED: dict[tuple[str, str, str, bool], Callable[..., Any]] = {}


def _function(
    graph: Graph, device: torch.device, mode: str, fast_accumulation: bool
) -> Callable[..., Any]:
    key = (repr(graph), str(device), mode, fast_accumulation)
    if key not in _COMPILED:
        module = graph_module(graph, device, fast_accumulation)
        compiled = module if mode == "eager" else torch.compile(module, mode=MODES[mode])
        _COMPILED[key] = compiled
    return _COMPILED[key]


@contextlib.contextmanager
def _many_variants() -> Iterator[None]:
    config: Any = torch._dynamo.config
    with config.patch(recompile_limit=_VARIANTS):
        yield


def _call(
    call: Call, function: Callable[..., Any], weights: list[torch.Tensor]
) -> Callable[[dict[str, torch.Tensor]], None]:
    def run(values: dict[str, torch.Tensor]) -> None:
        results = function(*weights, *(values[name] for name in call.inputs))
        values.update(zip(call.outputs, results, strict=True))

    return run


def _view(view: View) -> Callable[[dict[str, torch.Tensor]], None]:
    def run(values: dict[str, torch.Tensor]) -> None:
        value = values[view.value]
        if view.kind == "rows":
            value = value.narrow(1, view.first, view.count)
        elif view.kind == "tokens":
            value = value.flatten(1, 2)
        else:
            value = value.unflatten(1, values[view.like].shape[1:3])
        values[view.output] = value

    return run


def read_tensors(path: Path, names: Sequence[str], device: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on a device.

    Raises:
        BundleError: the file is damaged, or lacks one.
        torch.OutOfMemoryError: the device has no room.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            return {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", _AGAIN) from error


# The compiler's artifacts: what it compiled for this GPU, in a form that another process takes.


def collect_kernels() -> bytes | None:
    """Everything that this process has compiled, or None where it has compiled nothing.

    PyTorch's own format, with pickles in it: take it from nobody whom you would not take a
    program from.
    """
    found = torch.compiler.save_cache_artifacts()
    return None if found is None else found[0]


def offer_kernels(data: bytes) -> None:
    """Let the compiler find what another process compiled; what it cannot use, it ignores."""
    torch.compiler.load_cache_artifacts(data)
