"""Operators of :mod:`sd35_trt.programs.fused` on Hopper GPUs: how their kernels are launched."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import fused, triton_kernels
from .triton_kernels import GATED, GELU, QKV, modulate, product


@dataclass(frozen=True)
class Tiles:
    """How a product is cut.

    Attributes:
        rows, columns, depth: of a tile: of the result, and of the operands at a time.
        warps: of a program.
        stages: depths in flight.
        programs: on a multiprocessor.
        halves: whether the epilogue works on one half of the columns after the other, for which
            it needs fewer registers.
        group: tiles of rows that are done for the same columns one after another.
        ranks: of adapters, at a time.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1
    halves: bool = False
    group: int = 8
    ranks: int = 16


#: By epilogue, and whether operands are E4M3: the fastest at SD3.5 Large's dimensions.
TILES = {
    (QKV, True): Tiles(128, 128, 128, warps=4, stages=3, programs=2, group=4),
    (GELU, True): Tiles(128, 128, 128, warps=4, stages=3, programs=2),
    (GATED, True): Tiles(128, 256, 128, warps=8, stages=3, halves=True, group=4, ranks=64),
    (GATED, False): Tiles(128, 256, 64, warps=8, stages=3, halves=True, group=16, ranks=64),
}

# Of a program that normalizes a token.
_NORM_WARPS = 4

# Of the first product of adapters: rows and the depth of a tile, and the most columns.
_LOW_RANK_ROWS, _LOW_RANK_DEPTH, _LOW_RANK_COLUMNS = 64, 64, 128
_LEAST_COLUMNS = 16


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":  # Triton's interpreter
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass
class _Stream:
    """One stream's part of a launch; see :func:`product`.

    Attributes:
        x: begins at the stream's first token.
        x_rows: tokens from one sample to the next.
        extra_stride: elements from one sample's ``extra`` to the next.
        hidden, up: of adapters.
        added: to the result.
    """

    rows: int
    x: Tensor
    x_rows: int
    weight: Tensor
    bias: Tensor
    out: Tensor
    out_rows: int
    input_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    factor: Tensor | None = None
    extra: Tensor | None = None
    extra_stride: int = 0
    residual: Tensor | None = None
    output_scale: Tensor | None = None
    hidden: Tensor | None = None
    up: Tensor | None = None
    added: Tensor | None = None

    def arguments(self, samples: int, tiles: Tiles) -> list[Any]:
        width = self.weight.shape[1]
        count = (samples - 1) * self.x_rows + max(self.rows, 1)
        x = TensorDescriptor(self.x, [count, width], [width, 1], [tiles.rows, tiles.depth])
        weight = TensorDescriptor(
            self.weight, [*self.weight.shape], [width, 1], [tiles.columns, tiles.depth]
        )
        # What an epilogue does not read is any pointer.
        optional = (
            self.input_scale, self.weight_scale, self.factor, self.extra, self.residual,
            self.output_scale, self.hidden, self.up, self.added,
        )  # fmt: skip
        *scales, extra, residual, output_scale, hidden, up, added = (
            self.bias if tensor is None else tensor for tensor in optional
        )
        return [
            self.rows, x, self.x_rows, weight, *scales, self.bias, extra, self.extra_stride,
            residual, self.out, self.out_rows, output_scale, hidden, up, added,
        ]  # fmt: skip


def _launch(
    streams: list[_Stream], samples: int, epilogue: int, precise: bool, head: int = 1,
    eps: float = 0.0, tiles: Tiles | None = None,
) -> None:  # fmt: skip
    first = streams[0]
    fp8 = first.x.dtype == fused.E4M3
    tiles = tiles or TILES[epilogue, fp8]
    if len(streams) == 1:
        streams = [first, _Stream(**{**vars(first), "rows": 0})]
    linears, rank = (1, 0) if first.up is None else first.up.shape[:2]
    programs = _multiprocessors(first.x.device) * tiles.programs
    arguments = [a for stream in streams for a in stream.arguments(samples, tiles)]
    product[(programs,)](
        samples, *first.weight.shape, eps, *arguments,
        EPILOGUE=epilogue, HEAD=head, FP8=fp8, PRECISE=precise, PROGRAMS=programs,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, HALVES=tiles.halves,
        GROUP=tiles.group, LINEARS=linears, RANK=rank,
        CHUNK=min(tiles.ranks, max(_LEAST_COLUMNS, triton.next_power_of_2(rank))),
        TOUCHED=_touched(len(first.weight) // linears, tiles.columns) if rank else 1,
        ADDED=first.added is not None, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _touched(width: int, columns: int) -> int:
    """Of linears so wide beside each other, how many can have columns in a tile."""
    return 1 if width % columns == 0 else -(-columns // width) + 1


def _of_adapters(hidden: list[Tensor] | None, up: list[Tensor] | None, i: int) -> dict[str, Any]:
    """What a stream has of adapters."""
    if hidden is None or up is None:
        return {}
    return {"hidden": hidden[i], "up": up[i].contiguous()}


def modulated(
    x: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    input_scale: list[Tensor],
    eps: float,
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    out = [rows.new_empty(rows.shape, dtype=fused.E4M3) for rows in x]
    streams = [
        [
            rows.contiguous(), shift[i], shift[i].stride(0), scale[i], scale[i].stride(0),
            input_scale[i], out[i], rows.shape[1],
        ]
        for i, rows in enumerate(x)
    ]  # fmt: skip
    samples, first, width = x[0].shape
    count = samples * sum(rows.shape[1] for rows in x)
    modulate[(count,)](
        samples * first, *streams[0], *streams[-1], width, eps,
        BLOCK=triton.next_power_of_2(width), num_warps=_NORM_WARPS,
    )  # fmt: skip
    return out


def qkv(
    x: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    factor: list[Tensor],
    bias: list[Tensor],
    norm: list[Tensor],
    eps: float,
    use_fast_accum: bool = False,
    hidden: list[Tensor] | None = None,
    up: list[Tensor] | None = None,
    operand_scale: Tensor | None = None,
) -> Tensor:
    """See :mod:`sd35_trt.programs.fused`."""
    samples, tokens = len(x[0]), sum(rows.shape[1] for rows in x)
    dtype = torch.float16 if operand_scale is None else fused.E4M3
    out = x[0].new_empty((samples, tokens, len(weight[0])), dtype=dtype)
    streams, first = [], 0
    for i, rows in enumerate(x):
        count = rows.shape[1]
        streams.append(
            _Stream(
                count,
                rows.contiguous(),
                count,
                weight[i],
                bias[i],
                out[:, first:],
                tokens,
                input_scale[i],
                weight_scale[i],
                factor[i],
                norm[i] if norm else None,
                output_scale=None if operand_scale is None else operand_scale.contiguous(),
                **_of_adapters(hidden, up, i),
            )
        )
        first += count
    _launch(streams, samples, QKV, not use_fast_accum, norm[0].shape[1] if norm else 0, eps)
    return out


def gelu(
    x: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    bias: list[Tensor],
    output_scale: list[Tensor],
    use_fast_accum: bool = False,
    hidden: list[Tensor] | None = None,
    up: list[Tensor] | None = None,
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    out = [rows.new_empty((*rows.shape[:-1], len(weight[0]))) for rows in x]
    streams = [
        _Stream(
            rows.shape[1], rows.contiguous(), rows.shape[1], weight[i], bias[i], out[i],
            rows.shape[1], input_scale[i], weight_scale[i], output_scale=output_scale[i],
            **_of_adapters(hidden, up, i),
        )
        for i, rows in enumerate(x)
    ]  # fmt: skip
    _launch(streams, len(x[0]), GELU, not use_fast_accum)
    return out


def gated(
    x: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    bias: list[Tensor],
    gate: list[Tensor],
    residual: list[Tensor],
    use_fast_accum: bool = False,
    hidden: list[Tensor] | None = None,
    up: list[Tensor] | None = None,
    added: Tensor | None = None,
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    out = [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]
    streams = [
        _Stream(
            rows.shape[1], rows.contiguous(), rows.shape[1], weight[i], bias[i], out[i],
            rows.shape[1], input_scale[i], weight_scale[i], extra=gate[i],
            extra_stride=gate[i].stride(0), residual=residual[i].contiguous(),
            added=None if added is None or i > 0 else added.contiguous(),
            **_of_adapters(hidden, up, i),
        )
        for i, rows in enumerate(x)
    ]  # fmt: skip
    _launch(streams, len(x[0]), GATED, not use_fast_accum)
    return out


def gated_half(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    gate: list[Tensor],
    residual: list[Tensor],
    hidden: list[Tensor] | None = None,
    up: list[Tensor] | None = None,
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    x = x.contiguous()
    out = [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]
    streams, first = [], 0
    for i, old in enumerate(residual):
        count = old.shape[1]
        streams.append(
            _Stream(
                count,
                x[:, first:],
                x.shape[1],
                weight[i],
                bias[i],
                out[i],
                count,
                extra=gate[i],
                extra_stride=gate[i].stride(0),
                residual=old.contiguous(),
                **_of_adapters(hidden, up, i),
            )
        )
        first += count
    _launch(streams, len(x), GATED, precise=False)
    return out


def low_rank(
    x: list[Tensor], down: list[Tensor], scales: Tensor, input_scale: list[Tensor]
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    samples, depth = len(scales), x[0].shape[-1]
    _, linears, rank = down[0].shape
    width = linears * rank
    out, streams, tiles = [], [], []
    for i, rows in enumerate(x):
        # Tokens of a sample follow each other; samples may have others between them.
        rows = rows if rows.stride()[1:] == (depth, 1) else rows.contiguous()
        count = rows.shape[1]
        out.append(rows.new_empty((samples, count, width), dtype=torch.float16))
        scale = input_scale[i] if input_scale else scales
        streams.append([count, rows, rows.stride(0), down[i].contiguous(), scale, out[i]])
        tiles.append(samples * triton.cdiv(count, _LOW_RANK_ROWS))
    columns = min(_LOW_RANK_COLUMNS, max(_LEAST_COLUMNS, triton.next_power_of_2(width)))
    triton_kernels.low_rank[(sum(tiles), triton.cdiv(width, columns))](
        tiles[0], scales.contiguous(), depth, *streams[0], *streams[-1],
        FP8=bool(input_scale), WIDTH=width, RANK=rank, ROWS=_LOW_RANK_ROWS, COLUMNS=columns,
        DEPTH=_LOW_RANK_DEPTH, num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


@functools.cache
def register() -> None:
    """Let PyTorch call the kernels for the operators on CUDA devices."""
    for kernel in (modulated, qkv, gelu, gated, gated_half, low_rank):
        fused.OPERATORS[kernel.__name__].register_kernel("cuda", kernel)
