"""Kernels for the operators of :mod:`sd35_trt.programs.fused` on Hopper GPUs, in Triton.

One persistent kernel computes the product of both streams: its programs take tiles of the image's
output, then go on with the text's, so that the few tiles of the text fill what the image's last
round leaves idle. Operands come through the tensor memory accelerator, the sums stay in registers
until the epilogue has made the result of them.

Sources: Triton's tutorial "Persistent Matmul" (triton-lang.org) for the loop over tiles; the
tile shapes are those that were fastest at SD3.5 Large's dimensions.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from . import fused

# Epilogues.
_QKV, _GELU, _GATED = 0, 1, 2


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
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    programs: int = 1
    halves: bool = False
    group: int = 8


#: By epilogue, and whether operands are E4M3.
TILES = {
    (_QKV, True): Tiles(128, 128, 128, warps=4, stages=3, programs=2, group=4),
    (_GELU, True): Tiles(128, 128, 128, warps=4, stages=3, programs=2),
    (_GATED, True): Tiles(128, 256, 128, warps=8, stages=3, halves=True, group=4),
    (_GATED, False): Tiles(128, 256, 64, warps=8, stages=3, halves=True, group=16),
}

# Of a program that normalizes a token.
_NORM_WARPS = 4


@triton.jit
def _tanh(x):
    # The hardware's: its error of 2^-11 is far below that of E4M3.
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _epilogue(
    sums, row, rows, column, N, factor, scale, bias, extra, residual, out, first, inverse, eps,
    EPILOGUE: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, COLUMNS)
    inside = columns < N
    y = sums
    if EPILOGUE == 0:
        by_column = scale * tl.load(factor + columns, inside, 0.0)
        y = y * by_column[None, :]
    elif FP8:
        y = y * scale
    y += tl.load(bias + columns, inside, 0.0).to(tl.float32)[None, :]
    if EPILOGUE == 0:
        # A third of the columns each are query, key and value; a head's stand together.
        kind = columns // (N // 3)
        weights = tl.load(extra + kind * HEAD + columns % HEAD, inside & (kind < 2), 1.0).to(
            tl.float32
        )
        heads = tl.reshape(y, (ROWS, COLUMNS // HEAD, HEAD))
        roots = tl.rsqrt(tl.sum(heads * heads, axis=2) / HEAD + eps)
        head = column // HEAD + tl.arange(0, COLUMNS // HEAD)
        roots = tl.where(head[None, :] < N // 3 * 2 // HEAD, roots, 1.0)
        y = tl.reshape(heads * roots[:, :, None], (ROWS, COLUMNS)) * weights[None, :]
    elif EPILOGUE == 1:
        y = 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
        y = tl.minimum(tl.maximum(y * inverse, -448.0), 448.0)
    own = row + tl.arange(0, ROWS)
    mask = (own < rows)[:, None] & inside[None, :]
    offsets = (first + own)[:, None].to(tl.int64) * N + columns[None, :]
    if EPILOGUE == 2:
        gate = tl.load(extra + columns, inside, 0.0).to(tl.float32)
        y = tl.load(residual + offsets, mask, 0.0).to(tl.float32) + gate[None, :] * y
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask)


@triton.jit
def _stream(
    start, N_BATCH, rows, x, x_rows, weight, input_scale, weight_scale, factor, bias,
    extra, extra_stride, residual, out, out_rows, output_scale, N, K, eps,
    EPILOGUE: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr, PRECISE: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    scale = 1.0
    if FP8:
        scale = tl.load(input_scale).to(tl.float32) * tl.load(weight_scale).to(tl.float32)
    inverse = 1.0
    if EPILOGUE == 1:
        inverse = 1.0 / tl.load(output_scale).to(tl.float32)
    down_each = tl.cdiv(rows, ROWS)
    down, across = N_BATCH * down_each, tl.cdiv(N, COLUMNS)
    grouped = GROUP * across
    for tile in tl.range(start, down * across, PROGRAMS, flatten=True):
        # Tiles in flight share rows and columns in the cache.
        group = tile // grouped
        height = min(down - group * GROUP, GROUP)
        index = group * GROUP + tile % grouped % height
        column = tile % grouped // height * COLUMNS
        sample = index // down_each
        row = index % down_each * ROWS
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for k in range(0, K, DEPTH):
            a = x.load([sample * x_rows + row, k])
            b = weight.load([column, k])
            if PRECISE:
                sums = tl.dot(a, b.T, sums, max_num_imprecise_acc=DEPTH)
            else:
                sums = tl.dot(a, b.T, sums)
        own_extra = extra + sample * extra_stride
        first = sample * out_rows
        if HALVES:
            HALF: tl.constexpr = COLUMNS // 2
            pair = tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1))
            left, right = tl.split(pair)
            _epilogue(
                left, row, rows, column, N, factor, scale, bias, own_extra, residual, out, first,
                inverse, eps, EPILOGUE, HEAD, FP8, ROWS, HALF,
            )  # fmt: skip
            _epilogue(
                right, row, rows, column + HALF, N, factor, scale, bias, own_extra, residual, out,
                first, inverse, eps, EPILOGUE, HEAD, FP8, ROWS, HALF,
            )  # fmt: skip
        else:
            _epilogue(
                sums, row, rows, column, N, factor, scale, bias, own_extra, residual, out, first,
                inverse, eps, EPILOGUE, HEAD, FP8, ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "rows0", "rows1", "x_rows0", "x_rows1",
                               "out_rows0", "out_rows1"])  # fmt: skip
def product(
    samples, N, K, eps,
    rows0, x0, x_rows0, weight0, input_scale0, weight_scale0, factor0, bias0, extra0,
    extra_stride0, residual0, out0, out_rows0, output_scale0,
    rows1, x1, x_rows1, weight1, input_scale1, weight_scale1, factor1, bias1, extra1,
    extra_stride1, residual1, out1, out_rows1, output_scale1,
    EPILOGUE: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr, PRECISE: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A product of two streams and its epilogue.

    Args:
        rows0: tokens of a sample; the second stream has none where there is one stream.
        x0: descriptor [samples * x_rows0, K] that begins at the stream's first token.
        extra0: the norms' weights, or the gate.
        out0: pointer to the stream's first token; samples are ``out_rows0`` tokens apart.
    """
    program = tl.program_id(0)
    _stream(
        program, samples, rows0, x0, x_rows0, weight0, input_scale0, weight_scale0, factor0,
        bias0, extra0, extra_stride0, residual0, out0, out_rows0, output_scale0, N, K, eps,
        EPILOGUE, HEAD, FP8, PRECISE, PROGRAMS, ROWS, COLUMNS, DEPTH, HALVES, GROUP,
    )  # fmt: skip
    done = samples * tl.cdiv(rows0, ROWS) * tl.cdiv(N, COLUMNS)
    _stream(
        (program + PROGRAMS - done % PROGRAMS) % PROGRAMS, samples, rows1, x1, x_rows1, weight1,
        input_scale1, weight_scale1, factor1, bias1, extra1, extra_stride1, residual1, out1,
        out_rows1, output_scale1, N, K, eps,
        EPILOGUE, HEAD, FP8, PRECISE, PROGRAMS, ROWS, COLUMNS, DEPTH, HALVES, GROUP,
    )  # fmt: skip


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

    def arguments(self, samples: int, tiles: Tiles) -> list[Any]:
        width = self.weight.shape[1]
        count = (samples - 1) * self.x_rows + max(self.rows, 1)
        x = TensorDescriptor(self.x, [count, width], [width, 1], [tiles.rows, tiles.depth])
        weight = TensorDescriptor(
            self.weight, [*self.weight.shape], [width, 1], [tiles.columns, tiles.depth]
        )
        given = (self.input_scale, self.weight_scale, self.factor)
        # What an epilogue does not read is any pointer.
        scales = [self.bias if tensor is None else tensor for tensor in given]
        rest = [self.bias if t is None else t for t in (self.extra, self.residual)]
        return [
            self.rows, x, self.x_rows, weight, *scales, self.bias, rest[0], self.extra_stride,
            rest[1], self.out, self.out_rows,
            self.bias if self.output_scale is None else self.output_scale,
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
    programs = _multiprocessors(first.x.device) * tiles.programs
    arguments = [a for stream in streams for a in stream.arguments(samples, tiles)]
    product[(programs,)](
        samples, *first.weight.shape, eps, *arguments,
        EPILOGUE=epilogue, HEAD=head, FP8=fp8, PRECISE=precise, PROGRAMS=programs,
        ROWS=tiles.rows, COLUMNS=tiles.columns, DEPTH=tiles.depth, HALVES=tiles.halves,
        GROUP=tiles.group, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


@triton.jit
def _modulate_row(row, x, shift, shift_stride, scale, scale_stride, input_scale, out, tokens, D,
                  eps, BLOCK: tl.constexpr):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    sample = row // tokens
    first = row.to(tl.int64) * D
    values = tl.load(x + first + columns, inside, 0.0).to(tl.float32)
    factor = tl.load(scale + sample * scale_stride + columns, inside, 0.0).to(tl.float32)
    added = tl.load(shift + sample * shift_stride + columns, inside, 0.0).to(tl.float32)
    inverse = 1.0 / tl.load(input_scale).to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values, axis=0) / D, 0.0)
    root = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    y = (centred * root * (1.0 + factor) + added) * inverse
    y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    tl.store(out + first + columns, y.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows0", "tokens0", "tokens1"])
def modulate(
    rows0, x0, shift0, shift_stride0, scale0, scale_stride0, input_scale0, out0, tokens0,
    x1, shift1, shift_stride1, scale1, scale_stride1, input_scale1, out1, tokens1,
    D, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token's normalization and modulation: the first stream's, then the second's."""
    row = tl.program_id(0)
    if row < rows0:
        _modulate_row(
            row, x0, shift0, shift_stride0, scale0, scale_stride0, input_scale0, out0, tokens0,
            D, eps, BLOCK,
        )  # fmt: skip
    else:
        _modulate_row(
            row - rows0, x1, shift1, shift_stride1, scale1, scale_stride1, input_scale1, out1,
            tokens1, D, eps, BLOCK,
        )  # fmt: skip


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
) -> Tensor:
    """See :mod:`sd35_trt.programs.fused`."""
    samples, tokens = len(x[0]), sum(rows.shape[1] for rows in x)
    out = x[0].new_empty((samples, tokens, len(weight[0])), dtype=torch.float16)
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
                norm[i],
            )
        )
        first += count
    _launch(streams, samples, _QKV, not use_fast_accum, norm[0].shape[1], eps)
    return out


def gelu(
    x: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    bias: list[Tensor],
    output_scale: list[Tensor],
    use_fast_accum: bool = False,
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    out = [rows.new_empty((*rows.shape[:-1], len(weight[0]))) for rows in x]
    streams = [
        _Stream(
            rows.shape[1], rows.contiguous(), rows.shape[1], weight[i], bias[i], out[i],
            rows.shape[1], input_scale[i], weight_scale[i], output_scale=output_scale[i],
        )
        for i, rows in enumerate(x)
    ]  # fmt: skip
    _launch(streams, len(x[0]), _GELU, not use_fast_accum)
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
) -> list[Tensor]:
    """See :mod:`sd35_trt.programs.fused`."""
    out = [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]
    streams = [
        _Stream(
            rows.shape[1], rows.contiguous(), rows.shape[1], weight[i], bias[i], out[i],
            rows.shape[1], input_scale[i], weight_scale[i], extra=gate[i],
            extra_stride=gate[i].stride(0), residual=residual[i].contiguous(),
        )
        for i, rows in enumerate(x)
    ]  # fmt: skip
    _launch(streams, len(x[0]), _GATED, not use_fast_accum)
    return out


def gated_half(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    gate: list[Tensor],
    residual: list[Tensor],
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
            )
        )
        first += count
    _launch(streams, len(x), _GATED, precise=False)
    return out


@functools.cache
def register() -> None:
    """Let PyTorch call the kernels for the operators on CUDA devices."""
    for kernel in (modulated, qkv, gelu, gated, gated_half):
        fused.OPERATORS[kernel.__name__].register_kernel("cuda", kernel)


# Binaries are kept where Triton keeps them, under the hash of all that decides about them: a
# group of files, of which a GPU needs these.
_NEEDED = (".cubin", ".json")


def compiled() -> dict[str, bytes]:
    """Binaries that this process made or found for its GPUs: ``hash/file`` → content."""
    return stored(
        {
            kernel.__name__: [
                binary.hash
                for cache, *_ in kernel.device_caches.values()
                for binary in cache.values()
            ]
            for kernel in (product, modulate)
        }
    )


def stored(hashes: Mapping[str, list[str]]) -> dict[str, bytes]:
    """Binaries in Triton's cache: ``hash/file`` → content.

    Args:
        hashes: by kernel.
    """
    return {
        f"{digest}/{file}": Path(path).read_bytes()
        for name, digests in hashes.items()
        for digest in digests
        for file, path in (get_cache_manager(digest).get_group(f"{name}.json") or {}).items()
        if file.endswith(_NEEDED)
    }


def offer(binaries: Mapping[str, bytes]) -> None:
    """Put binaries into Triton's cache.

    Args:
        binaries: as :func:`stored` gives them; what is named otherwise is left out.
    """
    groups: dict[str, dict[str, str]] = {}
    for name, data in binaries.items():
        if found := re.fullmatch(r"([0-9a-f]{64})/(\w+\.\w+)", name):
            digest, file = found.groups()
            groups.setdefault(digest, {})[file] = get_cache_manager(digest).put(data, file)
    for digest, files in groups.items():
        for file in files:
            if file.endswith(".json"):
                get_cache_manager(digest).put_group(file, files)
