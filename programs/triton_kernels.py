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
def _scaled(
    sums, column, N, factor, scale,
    EPILOGUE: tl.constexpr, FP8: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if EPILOGUE == 0:
        columns = column + tl.arange(0, COLUMNS)
        by_column = scale * tl.load(factor + columns, columns < N, 0.0)
        sums = sums * by_column[None, :]
    elif FP8:
        sums = sums * scale
    return sums


@triton.jit
def _adapted(
    sums, first, row, rows, column, N, hidden, up,
    LINEARS: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, TOUCHED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A tile touches one of the linears that share the product, or several beside each other.
    own = row + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    width = N // LINEARS
    of_rows = hidden + (first + own)[:, None].to(tl.int64) * (LINEARS * RANK)
    for touched in tl.static_range(TOUCHED):
        linear = column // width + touched
        inside = (columns // width == linear) & (columns < N)
        for start in tl.static_range(0, RANK, CHUNK):
            ranks = start + tl.arange(0, CHUNK)
            known = (ranks < RANK) & (linear < LINEARS)
            h = tl.load(
                of_rows + (linear * RANK + ranks)[None, :], (own < rows)[:, None] & known[None, :],
                0.0,
            )  # fmt: skip
            b = tl.load(
                up + (linear * RANK + ranks)[:, None] * width + (columns - linear * width)[None, :],
                known[:, None] & inside[None, :], 0.0,
            )  # fmt: skip
            sums = tl.dot(h, b, sums)
    return sums


@triton.jit
def _epilogue(
    sums, row, rows, column, N, factor, scale, bias, extra, residual, added, out, first, inverse,
    output_scale, eps,
    EPILOGUE: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr, SCALED: tl.constexpr,
    ADDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = column + tl.arange(0, COLUMNS)
    inside = columns < N
    y = sums
    if not SCALED:
        y = _scaled(y, column, N, factor, scale, EPILOGUE, FP8, COLUMNS)
    y += tl.load(bias + columns, inside, 0.0).to(tl.float32)[None, :]
    if EPILOGUE == 0 and HEAD > 0:
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
        if out.dtype.element_ty == tl.float8e4nv:
            y = y / tl.load(output_scale + columns // HEAD, inside, 1.0)[None, :]
            y = tl.minimum(tl.maximum(y, -448.0), 448.0)
    elif EPILOGUE == 1:
        y = 0.5 * y * (1.0 + _tanh(0.7978845608028654 * (y + 0.044715 * y * y * y)))
        y = tl.minimum(tl.maximum(y * inverse, -448.0), 448.0)
    own = row + tl.arange(0, ROWS)
    mask = (own < rows)[:, None] & inside[None, :]
    offsets = (first + own)[:, None].to(tl.int64) * N + columns[None, :]
    if EPILOGUE == 2:
        gate = tl.load(extra + columns, inside, 0.0).to(tl.float32)
        y = tl.load(residual + offsets, mask, 0.0).to(tl.float32) + gate[None, :] * y
        if ADDED:
            y += tl.load(added + offsets, mask, 0.0).to(tl.float32)
    tl.store(out + offsets, y.to(out.dtype.element_ty), mask)


@triton.jit
def _stream(
    start, N_BATCH, rows, x, x_rows, weight, input_scale, weight_scale, factor, bias,
    extra, extra_stride, residual, out, out_rows, output_scale, hidden, up, added, N, K, eps,
    EPILOGUE: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr, PRECISE: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr, LINEARS: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr, TOUCHED: tl.constexpr, ADDED: tl.constexpr,
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
        SCALED: tl.constexpr = RANK > 0
        if SCALED:
            sums = _scaled(sums, column, N, factor, scale, EPILOGUE, FP8, COLUMNS)
            sums = _adapted(
                sums, sample * rows, row, rows, column, N, hidden, up,
                LINEARS, RANK, CHUNK, TOUCHED, ROWS, COLUMNS,
            )  # fmt: skip
        if HALVES:
            HALF: tl.constexpr = COLUMNS // 2
            pair = tl.permute(tl.reshape(sums, (ROWS, 2, HALF)), (0, 2, 1))
            left, right = tl.split(pair)
            _epilogue(
                left, row, rows, column, N, factor, scale, bias, own_extra, residual, added, out,
                first, inverse, output_scale, eps, EPILOGUE, HEAD, FP8, SCALED, ADDED, ROWS, HALF,
            )  # fmt: skip
            _epilogue(
                right, row, rows, column + HALF, N, factor, scale, bias, own_extra, residual, added,
                out, first, inverse, output_scale, eps, EPILOGUE, HEAD, FP8, SCALED, ADDED,
                ROWS, HALF,
            )  # fmt: skip
        else:
            _epilogue(
                sums, row, rows, column, N, factor, scale, bias, own_extra, residual, added, out,
                first, inverse, output_scale, eps, EPILOGUE, HEAD, FP8, SCALED, ADDED,
                ROWS, COLUMNS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["samples", "rows0", "rows1", "x_rows0", "x_rows1",
                               "out_rows0", "out_rows1"])  # fmt: skip
def product(
    samples, N, K, eps,
    rows0, x0, x_rows0, weight0, input_scale0, weight_scale0, factor0, bias0, extra0,
    extra_stride0, residual0, out0, out_rows0, output_scale0, hidden0, up0, added0,
    rows1, x1, x_rows1, weight1, input_scale1, weight_scale1, factor1, bias1, extra1,
    extra_stride1, residual1, out1, out_rows1, output_scale1, hidden1, up1, added1,
    EPILOGUE: tl.constexpr, HEAD: tl.constexpr, FP8: tl.constexpr, PRECISE: tl.constexpr,
    PROGRAMS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    HALVES: tl.constexpr, GROUP: tl.constexpr, LINEARS: tl.constexpr, RANK: tl.constexpr,
    CHUNK: tl.constexpr, TOUCHED: tl.constexpr, ADDED: tl.constexpr,
):  # fmt: skip
    """A product of two streams and its epilogue.

    Args:
        rows0: tokens of a sample; the second stream has none where there is one stream.
        x0: descriptor [samples * x_rows0, K] that begins at the stream's first token.
        extra0: the norms' weights, of HEAD channels each, or the gate. Where HEAD is 0, queries
            and keys are not normalized.
        output_scale0: by which the result is divided where it is E4M3: one, or of each head.
        out0: pointer to the stream's first token; samples are ``out_rows0`` tokens apart.
        hidden0, up0: what adapters made of x0, of each linear that shares the product, and what it
            is multiplied by; read where RANK is not 0, CHUNK of its columns at a time.
        added0: to the first stream's result, laid out as it is, where ADDED.
        TOUCHED: of the linears that share the product, so many can have columns in a tile.
    """
    program = tl.program_id(0)
    _stream(
        program, samples, rows0, x0, x_rows0, weight0, input_scale0, weight_scale0, factor0,
        bias0, extra0, extra_stride0, residual0, out0, out_rows0, output_scale0, hidden0, up0,
        added0, N, K, eps, EPILOGUE, HEAD, FP8, PRECISE, PROGRAMS, ROWS, COLUMNS, DEPTH, HALVES,
        GROUP, LINEARS, RANK, CHUNK, TOUCHED, ADDED,
    )  # fmt: skip
    done = samples * tl.cdiv(rows0, ROWS) * tl.cdiv(N, COLUMNS)
    _stream(
        (program + PROGRAMS - done % PROGRAMS) % PROGRAMS, samples, rows1, x1, x_rows1, weight1,
        input_scale1, weight_scale1, factor1, bias1, extra1, extra_stride1, residual1, out1,
        out_rows1, output_scale1, hidden1, up1, added1, N, K, eps,
        EPILOGUE, HEAD, FP8, PRECISE, PROGRAMS, ROWS, COLUMNS, DEPTH, HALVES, GROUP,
        LINEARS, RANK, CHUNK, TOUCHED, False,
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


@triton.jit
def _low_rank_tile(
    tile, column, rows, x, x_stride, down, scales, input_scale, out, K,
    FP8: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    down_each = tl.cdiv(rows, ROWS)
    sample = tile // down_each
    own = tile % down_each * ROWS + tl.arange(0, ROWS)
    columns = column + tl.arange(0, COLUMNS)
    inside, within = columns < WIDTH, own < rows
    of_rows = x + sample.to(tl.int64) * x_stride + own[:, None].to(tl.int64) * K
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, K, DEPTH):
        channels = k + tl.arange(0, DEPTH)
        known = channels < K
        a = tl.load(of_rows + channels[None, :], within[:, None] & known[None, :], 0.0)
        b = tl.load(
            down + channels[:, None] * WIDTH + columns[None, :],
            known[:, None] & inside[None, :], 0.0,
        )  # fmt: skip
        sums = tl.dot(a.to(tl.float16), b, sums)
    if FP8:
        sums = sums * tl.load(input_scale).to(tl.float32)
    factor = tl.load(scales + sample * RANK + columns % RANK, inside, 0.0).to(tl.float32)
    y = tl.where((factor == 0.0)[None, :], 0.0, sums * factor[None, :])
    offsets = (sample * rows + own)[:, None].to(tl.int64) * WIDTH + columns[None, :]
    tl.store(out + offsets, y.to(tl.float16), within[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["tiles0", "rows0", "rows1"])
def low_rank(
    tiles0, scales, K, rows0, x0, x_stride0, down0, input_scale0, out0,
    rows1, x1, x_stride1, down1, input_scale1, out1,
    FP8: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """What adapters make of streams: the first stream's tiles, then the second's.

    Args:
        tiles0: of rows, of the first stream.
        scales: [samples, RANK].
        x0: [samples, rows0, K], samples being ``x_stride0`` elements apart.
        down0: [K, WIDTH], WIDTH being RANK times the linears that read ``x0``.
        out0: [samples, rows0, WIDTH].
    """
    tile, column = tl.program_id(0), tl.program_id(1) * COLUMNS
    if tile < tiles0:
        _low_rank_tile(
            tile, column, rows0, x0, x_stride0, down0, scales, input_scale0, out0, K,
            FP8, WIDTH, RANK, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
    else:
        _low_rank_tile(
            tile - tiles0, column, rows1, x1, x_stride1, down1, scales, input_scale1, out1, K,
            FP8, WIDTH, RANK, ROWS, COLUMNS, DEPTH,
        )  # fmt: skip
