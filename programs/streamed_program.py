"""A program that runs operator by operator, with a part of its weights in its file."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.nn.attention import sdpa_kernel

from sd35_trt.errors import BundleError
from sd35_trt.formats.program import Call, Program

from .attention import ATTENTION, sdpa_backends
from .decoding import REBUILD, graph_module
from .tensors import Upload, aligned, open_mapped, slice_bytes

# Results that may share the memory of an operand.
_VIEWS = frozenset(
    f"aten.{name}"
    for name in (
        "alias.default", "chunk.default", "contiguous.default", "expand.default",
        "flatten.using_ints", "permute.default", "reshape.default", "select.int", "slice.Tensor",
        "split_with_sizes.default", "t.default", "to.device", "to.dtype", "transpose.int",
        "type_as.default",
        "unflatten.int", "unsqueeze.default", "view.default",
    )
)  # fmt: skip


class StreamedProgram:
    """A program that runs operator by operator, with a part of its weights in its file.

    Weights that stay there are read, in the order of their use, into two buffers by turns: while
    operators work with the one, the other is filled.

    Args:
        path: the safetensors file; mapped.
        device: where the others are.
        held_bytes: bytes of weights on the device, the buffers included; at least the buffers'.
        attention, fast_accumulation: as of :class:`sd35_trt.programs.torch_program.TorchProgram`.

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
        step = program.steps[0] if len(program.steps) == 1 else None
        if not isinstance(step, Call):
            raise BundleError("a program that is streamed is one call of one graph", REBUILD)
        self._call = step
        self._device = device
        self._module = graph_module(program.graphs[step.graph], device, fast_accumulation)
        self._backends = sdpa_backends(attention)
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
        self._file = open_mapped(path)
        sizes = {node: self._file.get_slice(name) for node, name in self._weights.items()}
        nbytes = {node: slice_bytes(part) for node, part in sizes.items()}
        self._buffer_bytes = max((aligned(nbytes[node]) for node in order), default=0)
        room = held_bytes - 2 * self._buffer_bytes - sum(nbytes[node] for node in several)
        resident = several
        for node in order:
            if nbytes[node] <= room:
                room -= nbytes[node]
                resident.append(node)
        streamed = [node for node in order if node not in resident]
        self._upload = Upload(device)
        self._held = {node: self._upload(self._read(node)) for node in resident}
        self._groups = self._grouped(streamed, nbytes)
        self.device_bytes = sum(nbytes[n] for n in resident) + (
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
            size = aligned(nbytes[node])
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
        upload: Upload,
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
        self._unread = [len(group) for group in groups]  # weights by group
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
        self._unread[group] -= 1
        if self._unread[group] == 0:
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
                first += aligned(source.nbytes)
            self._ready.append(self._copies.record_event() if self._copies else None)
        self._filled += 1


def _readers(node: fx.Node) -> set[fx.Node]:
    """The operators that read a value's memory, through others that only give views of it."""
    readers: set[fx.Node] = set()
    for user in node.users:
        is_view = str(user.target) in _VIEWS or user.target is operator.getitem
        readers |= _readers(user) if is_view else {user}
    return readers
