"""Programs and PyTorch: graphs of ``torch.export`` to data, data to functions, and their kernels.

A graph is data and not ``torch.export``'s own file, which is a pickle beside a schema that changes
with the version: operators of ATen and their arguments are the same in all versions that we
support, a size is an operator's result, and a device is wherever the program runs.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import operator
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.program import Call, Graph, Node, Program, View

from . import flash_attention, fused, kernels

logger = logging.getLogger("sd35_trt")

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
        "clone.default",
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

_ATTENTION = "aten.scaled_dot_product_attention.default"

# What torch.export adds about shapes and types: checks, and results that nobody reads.
_CHECKS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")

#: Of :data:`ATTENTION`: the kernels of :mod:`.flash_attention`, for what is compiled.
FLASH_4 = "flash4"

#: Attention kernels of CUDA by name, the preferred one first; the last takes everything. PyTorch's
#: own have their name in it too.
ATTENTION: dict[str, SDPBackend | None] = {
    FLASH_4: None,
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

# Bytes of pinned memory through which weights go at once.
_PIECE = 32 << 20

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
        known = item.target in _FUNCTIONS or kernels.is_fused(item.target)
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
    if argument is torch.contiguous_format:
        return {"contiguous": None}
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


def graph_module(
    graph: Graph, device: torch.device, fast_accumulation: bool, flash_4: bool = False
) -> fx.GraphModule:
    """A module whose ``forward`` takes the graph's weights, then its inputs; returns a tuple.

    Args:
        fast_accumulation: FP8 products may be summed with less than FP32's precision inside
            tensor cores.
        flash_4: whether attentions are :func:`sd35_trt.programs.flash_attention.attention`.

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
        if kind == "contiguous":
            return torch.contiguous_format
        raise ValueError(f"an argument of kind {kind!r}")

    try:
        for index, name in enumerate((*graph.weights, *graph.inputs)):
            values[name] = result.placeholder(f"p{index}")
        for node in graph.nodes:
            target, kwargs = _target(node.target, device), dict(node.kwargs)
            if flash_4 and node.target == _ATTENTION and len(node.args) == 3 and not kwargs:
                target = flash_attention.OPERATOR
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
    if kernels.is_fused(name):
        return kernels.find(name, device)
    namespace, _, rest = name.partition(".")
    if namespace != "aten" or rest not in OPERATORS:
        raise ValueError(f"the operator {name!r}")
    if rest == "_scaled_mm.default" and device.type == "cpu":
        return fused.reference_scaled_mm
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
        flash_4 = mode != "eager" and FLASH_4 in attention and flash_attention.is_usable(device)
        for name, graph in program.graphs.items():
            functions[name] = _function(graph, device, mode, fast_accumulation, flash_4)
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
        self._backends = _backends(attention)
        self._variants = contextlib.nullcontext if mode == "eager" else _many_variants

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All values when the steps are done, the outputs among them."""
        values = dict(inputs)
        with torch.no_grad(), sdpa_kernel(self._backends, set_priority=True), self._variants():
            for step in self._steps:
                step(values)
        return values


# Functions have no weights in them: a component that is closed and opened again needs no new ones.
_COMPILED: dict[tuple[str, str, str, bool, bool], Callable[..., Any]] = {}


def _function(
    graph: Graph, device: torch.device, mode: str, fast_accumulation: bool, flash_4: bool
) -> Callable[..., Any]:
    key = (repr(graph), str(device), mode, fast_accumulation, flash_4)
    if key not in _COMPILED:
        module = graph_module(graph, device, fast_accumulation, flash_4)
        compiled = module if mode == "eager" else torch.compile(module, mode=MODES[mode])
        _COMPILED[key] = compiled
    return _COMPILED[key]


def _backends(attention: Sequence[str]) -> list[SDPBackend]:
    """PyTorch's own among the kernels of these names."""
    return [backend for name in attention if (backend := ATTENTION[name]) is not None]


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


class StreamedProgram:
    """A program that runs operator by operator, with a part of its weights in its file.

    Weights that stay there are read, in the order of their use, into two buffers by turns: while
    operators work with the one, the other is filled.

    Args:
        path: the safetensors file; mapped.
        device: where the others are.
        held_bytes: bytes of weights on the device, the buffers included; at least the buffers'.
        attention, fast_accumulation: as of :class:`TorchProgram`.

    Attributes:
        device_bytes: what weights and buffers take.

    Raises:
        BundleError: the program and its weights do not fit.
        torch.OutOfMemoryError: no room for what is held.
    """

    def __init__(
        self,
        program: Program,
        path: Path,
        device: torch.device,
        held_bytes: int,
        attention: Sequence[str] = tuple(ATTENTION),
        fast_accumulation: bool = False,
    ) -> None:
        (step,) = program.steps
        assert isinstance(step, Call)
        self._call = step
        self._device = device
        self._module = graph_module(program.graphs[step.graph], device, fast_accumulation)
        self._backends = _backends(attention)
        nodes = list(self._module.graph.nodes)
        index = {node: k for k, node in enumerate(nodes)}
        places = [node for node in nodes if node.op == "placeholder"]
        self._weights = dict(zip(places, step.weights, strict=False))
        self._inputs = places[len(step.weights) :]
        self._last = {n: max(n.users, key=lambda user: index[user]) for n in nodes if n.users}
        self._reader: dict[fx.Node, fx.Node] = {}
        several = []
        for node in self._weights:
            readers = _readers(node)
            if len(readers) == 1:
                self._reader[node] = readers.pop()
            else:  # it stays, as it would hold its buffer up
                several.append(node)
        order = sorted(self._reader, key=lambda node: index[self._reader[node]])
        self._file = _open_mapped(path)
        sizes = {node: self._file.get_slice(name) for node, name in self._weights.items()}
        nbytes = {node: _slice_bytes(part) for node, part in sizes.items()}
        self._buffer_bytes = max((_aligned(nbytes[node]) for node in order), default=0)
        room = held_bytes - 2 * self._buffer_bytes - sum(nbytes[node] for node in several)
        held = several
        for node in order:
            if nbytes[node] <= room:
                room -= nbytes[node]
                held.append(node)
        streamed = [node for node in order if node not in held]
        self._upload = _Upload(device)
        self._held = {node: self._upload(self._read(node)) for node in held}
        self._groups = self._grouped(streamed, nbytes)
        self.device_bytes = sum(nbytes[n] for n in held) + (
            2 * self._buffer_bytes if self._groups else 0
        )
        self._read_by: dict[fx.Node, list[fx.Node]] = {}
        for node in streamed:
            self._read_by.setdefault(self._reader[node], []).append(node)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _read(self, node: fx.Node) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(self._weights[node])
        return tensor

    def _grouped(self, streamed: list[fx.Node], nbytes: dict[fx.Node, int]) -> list[list[fx.Node]]:
        """Neighbours that fit a buffer together."""
        groups: list[list[fx.Node]] = []
        filled = 0
        for node in streamed:
            size = _aligned(nbytes[node])
            if not groups or filled + size > self._buffer_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(node)
            filled += size
        return groups

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The outputs."""
        names = (name for name in self._call.inputs)
        values: dict[fx.Node, Any] = {node: inputs[next(names)] for node in self._inputs}
        values |= self._held
        feeder = _Feeder(self._upload, self._copies, self._buffer_bytes, self._groups, self._read)
        results: Sequence[torch.Tensor] = ()
        with torch.no_grad(), sdpa_kernel(self._backends, set_priority=True):
            for node in self._module.graph.nodes:
                if node.op == "placeholder":
                    continue

                def value(argument: fx.Node) -> Any:
                    return feeder.get(argument) if argument not in values else values[argument]

                args, kwargs = fx.map_arg((node.args, node.kwargs), value)
                if node.op == "output":
                    (results,) = args
                    break
                values[node] = node.target(*args, **kwargs)
                del args, kwargs
                for other in node.all_input_nodes:
                    if self._last[other] is node and other not in self._weights:
                        del values[other]
                for weight in self._read_by.get(node, ()):
                    feeder.done(weight)
        return dict(zip(self._call.outputs, results, strict=True))


class _Feeder:
    """Brings groups of weights to a device one ahead of their use, into two buffers by turns."""

    def __init__(
        self,
        upload: _Upload,
        copies: Any,
        buffer_bytes: int,
        groups: list[list[fx.Node]],
        read: Callable[[fx.Node], torch.Tensor],
    ) -> None:
        device = upload.device
        self._upload = upload
        self._groups = groups
        self._copies = copies
        self._read = read
        count = min(2, len(groups))
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, device=device) for _ in range(count)
        ]
        self._group_of = {node: k for k, group in enumerate(groups) for node in group}
        self._left = [len(group) for group in groups]
        self._tensors: dict[fx.Node, torch.Tensor] = {}
        self._ready: list[Any] = []  # by group: after its copy
        self._read_all: dict[int, Any] = {}  # by group: after the operators that read it
        self._filled = 0
        if copies is not None:
            # The buffers' memory was somebody else's, whose work is queued before.
            copies.wait_stream(torch.cuda.current_stream(device))
        for _ in range(count):
            self._fill()

    def get(self, node: fx.Node) -> torch.Tensor:
        """A weight; what is queued from now on comes after its copy."""
        group = self._group_of[node]
        while self._filled <= group:
            self._fill()
        if self._copies is not None:
            torch.cuda.current_stream().wait_event(self._ready[group])
        return self._tensors[node]

    def done(self, node: fx.Node) -> None:
        """The operator that reads a weight is queued.

        After a group's last, the buffer of the group before it is filled: the device has this
        group's work to do meanwhile.
        """
        group = self._group_of[node]
        del self._tensors[node]
        self._left[group] -= 1
        if self._left[group] == 0:
            copies = self._copies
            self._read_all[group] = torch.cuda.current_stream().record_event() if copies else None
            if group > 0 and self._filled < len(self._groups):
                self._fill()

    def _fill(self) -> None:
        buffer, first = self._buffers[self._filled % 2], 0
        if self._copies is not None and self._filled >= 2:
            self._copies.wait_event(self._read_all[self._filled - 2])
        stream = torch.cuda.stream(self._copies) if self._copies else contextlib.nullcontext()
        with stream:
            for node in self._groups[self._filled]:
                source = self._read(node)
                part = buffer[first : first + source.nbytes].view(source.dtype)
                self._tensors[node] = self._upload.copy(source, part.view(source.shape))
                first += _aligned(source.nbytes)
            self._ready.append(self._copies.record_event() if self._copies else None)
        self._filled += 1


# Results that may share the memory of an operand.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default", "chunk.default", "contiguous.default", "expand.default",
        "flatten.using_ints", "permute.default", "reshape.default", "select.int", "slice.Tensor",
        "split_with_sizes.default", "t.default", "to.device", "to.dtype", "transpose.int",
        "unflatten.int", "unsqueeze.default", "view.default",
    )
)  # fmt: skip


def _readers(node: fx.Node) -> set[fx.Node]:
    """The operators that read a value's memory, through others that only give views of it."""
    found: set[fx.Node] = set()
    for user in node.users:
        is_view = str(user.target) in _VIEWS or user.target is operator.getitem
        found |= _readers(user) if is_view else {user}
    return found


def _aligned(nbytes: int) -> int:
    """Up to where a tensor may begin in a buffer."""
    return -(-nbytes // 256) * 256


def _slice_bytes(part: Any) -> int:
    """Bytes of a tensor of a safetensors file, by its header."""
    bits = {"F8_E4M3": 8, "I8": 8, "U8": 8, "F16": 16, "BF16": 16, "F32": 32}[part.get_dtype()]
    return math.prod(part.get_shape()) * bits // 8


def _open_mapped(path: Path) -> Any:
    """A safetensors file whose tensors are views of its pages.

    Raises:
        BundleError: it is damaged.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise BundleError(f"{path} cannot be read: {error}", _AGAIN) from error


class _Upload:
    """Copies tensors from the host's memory, which may be a file's pages, to a device.

    To a GPU they go through two pinned pieces by turns: all cores fill the one while the other is
    on the bus. CUDA's own copy from memory that is not pinned is several times slower.

    Args:
        device: where copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        pinned = 2 if device.type == "cuda" else 0
        self._pieces = [
            torch.empty(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(pinned)
        ]
        self._left: list[Any] = [None] * pinned  # after a piece's last copy
        self._turn = 0

    def __call__(self, source: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, when the current stream gets there."""
        if not self._pieces:
            return source.to(self.device)
        return self.copy(source, torch.empty_like(source, device=self.device))

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Queue the copy of a tensor into another, which is contiguous; returns that."""
        if not self._pieces:
            return target.copy_(source)
        whole, into = (tensor.reshape(-1).view(torch.uint8) for tensor in (source, target))
        for first in range(0, len(whole), _PIECE):
            part = whole[first : first + _PIECE]
            turn, self._turn = self._turn, 1 - self._turn
            if self._left[turn] is not None:
                self._left[turn].synchronize()
            piece = self._pieces[turn][: len(part)].copy_(part)
            into[first : first + len(part)].copy_(piece, non_blocking=True)
            self._left[turn] = torch.cuda.current_stream(self.device).record_event()
        return target


def read_tensors(path: Path, names: Sequence[str], device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, on a device.

    Raises:
        BundleError: the file is damaged, or lacks one.
        torch.OutOfMemoryError: the device has no room.
    """
    file = _open_mapped(path)
    try:
        mapped = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise BundleError(f"{path} cannot be read: {error}", _AGAIN) from error
    if device.type == "cpu":
        return mapped
    # In one piece: PyTorch's allocator rounds every allocation up, 3 % for Large.
    sizes = [_aligned(tensor.nbytes) for tensor in mapped.values()]
    whole = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    upload = _Upload(device)
    return {
        name: upload.copy(source, part[: source.nbytes].view(source.dtype).view(source.shape))
        for (name, source), part in zip(mapped.items(), whole.split(sizes), strict=True)
    }


# What was compiled for this GPU, in a form that another process takes: an archive of the compiler's
# artifacts, and of the kernels of the fused operators and of attention, of which it does not know.

_ARTIFACTS = "torch"
_BINARIES = "triton/"
_FLASH_4 = "flash4/"


def collect_kernels() -> bytes | None:
    """Everything that this process has compiled, or None where it has compiled nothing.

    PyTorch's part is of its own format, with pickles in it: take it from nobody whom you would not
    take a program from.
    """
    found = torch.compiler.save_cache_artifacts()
    entries = {} if found is None else {_ARTIFACTS: found[0]}
    entries |= {f"{_BINARIES}{name}": data for name, data in kernels.compiled_binaries().items()}
    entries |= {f"{_FLASH_4}{name}": data for name, data in flash_attention.compiled().items()}
    if not entries:
        return None
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name in sorted(entries):
            # With one date for all, equal kernels are equal archives.
            file.writestr(zipfile.ZipInfo(name), entries[name], zipfile.ZIP_DEFLATED)
    return archive.getvalue()


def offer_kernels(data: bytes) -> None:
    """Let the compiler find what another process compiled; what it cannot use, it ignores."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            entries = {name: file.read(name) for name in file.namelist()}
        if artifacts := entries.pop(_ARTIFACTS, None):
            torch.compiler.load_cache_artifacts(artifacts)
    except Exception as error:  # noqa: BLE001 (pickles of PyTorch's own may fail in any way)
        logger.warning("kept kernels are damaged (%s): they are compiled again", error)
        return
    kernels.offer_binaries(_below(_BINARIES, entries))
    flash_attention.offer(_below(_FLASH_4, entries))


def _below(folder: str, entries: Mapping[str, bytes]) -> dict[str, bytes]:
    return {name.removeprefix(folder): d for name, d in entries.items() if name.startswith(folder)}
