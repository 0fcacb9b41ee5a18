"""Kernels for the operators of :mod:`sd35_trt.programs.fused` on Hopper GPUs, in Triton's language.

One persistent kernel computes the product of both streams: its programs take tiles of the image's
output, then go on with the text's, so that the few tiles of the text fill what the image's last
round leaves idle. Operands come through the tensor memory accelerator, the sums stay in registers
until the epilogue has made the result of them.

Source: Triton's tutorial "Persistent Matmul" (triton-lang.org) for the loop over tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Epilogues: what follows a product.
QKV, GELU, GATED = 0, 1, 2


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
