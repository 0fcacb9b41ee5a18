"""Products of a transformer block with what follows them, each as one operator of programs.

A product writes its sums, and what follows reads them: where it is done before the sums are
written, that memory traffic is gone. What a product reads, normalized, modulated and quantized, is
an operator too: one pass over both streams. Here the operators are what they mean, by PyTorch's
own; :mod:`sd35_trt.programs.triton_operators` has the kernels for Hopper GPUs, where graphs call
the operators themselves. Everywhere else graphs get these functions, and the compiler sees through
them.

Lists have an entry for each stream, the image's first; the text's may be missing. Activations are
[N, tokens, channels], weights [out, in].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sd35_trt.compat.torch import scaled_mm
from sd35_trt.formats.calibration import E4M3_MAX

E4M3 = torch.float8_e4m3fn

# FlashAttention-3 multiplies by it what it rounds to E4M3, so that small shares are not lost.
_SHARES = 256.0


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """``x / scale`` in E4M3, saturating, rounded to nearest even."""
    return (x.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def reference_scaled_mm(
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    """``aten._scaled_mm`` for the CPU, in FP32, where PyTorch's own takes a thousand times as long.

    Args:
        scale_result, use_fast_accum: not used.
    """
    y = (a.float() @ b.float()) * (scale_a * scale_b)
    return (y if bias is None else y + bias).to(out_dtype or a.dtype)


def scaled_product(
    x: Tensor,
    weight: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    use_fast_accum: bool = False,
) -> Tensor:
    """E4M3 ``x`` [..., in] times an E4M3 weight [out, in], in ``dtype``."""
    # cuBLASLt adds no bias to FP32 results.
    inside = None if dtype == torch.float32 else bias
    # An exported graph has aten's operator.
    by_aten = x.device.type != "cpu" or torch.compiler.is_exporting()
    y = (scaled_mm if by_aten else reference_scaled_mm)(
        x.flatten(0, -2),
        weight.t(),
        scale_a=input_scale,
        scale_b=weight_scale,
        bias=inside,
        out_dtype=dtype,
        use_fast_accum=use_fast_accum,
    )
    if bias is not None and inside is None:
        y = y + bias
    return y.unflatten(0, x.shape[:-1])


def _added(hidden: Tensor, up: Tensor) -> Tensor:
    """What adapters add to the linears that share a product: FP32 [N, tokens, linears · out].

    Args:
        hidden: of ``low_rank``, FP16 [N, tokens, linears · rank].
        up: FP16 [linears, rank, out].
    """
    linears = hidden.float().unflatten(-1, up.shape[:2]).unbind(2)
    return torch.cat([h @ own.float() for h, own in zip(linears, up, strict=True)], dim=-1)


def _low_rank(
    x: list[Tensor], down: list[Tensor], scales: Tensor, input_scale: list[Tensor]
) -> list[Tensor]:
    """What adapters make of their input, scaled: FP16 [N, tokens, linears · rank].

    Where a scale is zero, the product is selected away: 0·∞ is NaN.

    Args:
        x: E4M3 [N, tokens, in]; FP16 where there is no ``input_scale``.
        down: FP16 [in, linears, rank], of the linears that read ``x``.
        scales: FP16 [N, rank].
        input_scale: by which ``x`` was divided.
    """
    results = []
    factors = scales[:, None, None].float()
    for i, rows in enumerate(x):
        hidden = rows.float() @ down[i].float().flatten(1)
        hidden = hidden * input_scale[i] if input_scale else hidden
        hidden = hidden.unflatten(-1, down[i].shape[1:]) * factors
        results.append(hidden.masked_fill(factors == 0, 0.0).half().flatten(2))
    return results


def _modulated(
    x: list[Tensor],
    shift: list[Tensor],
    scale: list[Tensor],
    input_scale: list[Tensor],
    eps: float,
) -> list[Tensor]:
    """Layer normalization without parameters, times 1 + ``scale``, plus ``shift``: E4M3.

    Args:
        x: [N, tokens, D].
        shift, scale: [N, D].
        input_scale: by which the result is divided.
    """
    results = []
    for i, rows in enumerate(x):
        y = functional.layer_norm(rows, rows.shape[-1:], eps=eps).half()
        y = y * (1 + scale[i][:, None]) + shift[i][:, None]
        results.append(quantize(y, input_scale[i]))
    return results


def _qkv(
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
    """Query, key and value of all tokens, the image's before the text's: FP16 [N, tokens, 3 D], or
    E4M3 for ``fp8_attention``.

    Args:
        x: E4M3 [N, tokens, D].
        weight: E4M3 [3 D, D].
        factor: FP32 [3 D], by which columns are multiplied before the bias FP16 [3 D].
        norm: FP16 [2, head]: weights of the RMS normalizations of a head's query and key; none
            where these are not normalized.
        hidden, up: of adapters: FP16 [N, tokens, 3 rank], see ``low_rank``, and [3, rank, D].
        operand_scale: FP32 [3, heads], by which query, key and value are divided; None leaves them
            in FP16.
    """
    results = []
    for i, rows in enumerate(x):
        y = scaled_product(
            rows, weight[i], input_scale[i], weight_scale[i], None, torch.float16, use_fast_accum
        )
        y = y * factor[i] + bias[i]
        y = (y if hidden is None or up is None else y + _added(hidden[i], up[i])).half()
        if norm:
            head = norm[i].shape[1:]
            query, key, value = y.unflatten(-1, (3, -1, *head)).unbind(2)
            query, key = (
                functional.rms_norm(x, head, norm[i][k], eps) for k, x in enumerate((query, key))
            )
            y = torch.stack([query, key, value], dim=2).flatten(2)
        results.append(y)
    packed = torch.cat(results, dim=1)
    if operand_scale is None:
        return packed
    heads = packed.unflatten(-1, (*operand_scale.shape, -1))
    return quantize(heads, operand_scale[..., None]).flatten(2)


def _fp8_attention(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    """``softmax(query keyᵀ / √head) value`` by FlashAttention-3's arithmetic: FP16 of BF16, [N,
    tokens, heads, head].

    What the exponential function gives, relative to the largest of a row, is rounded to E4M3 too.

    Args:
        query, key, value: E4M3 [N, tokens, heads, head].
        scale: FP32 [3, heads], by which they were divided.
    """
    query, key, value = (
        (x.float() * own[:, None]).transpose(1, 2)
        for x, own in zip((query, key, value), scale, strict=True)
    )
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    shares = torch.exp(scores - scores.amax(-1, keepdim=True))
    rounded = quantize(shares, torch.tensor(1 / _SHARES)).float() / _SHARES
    mixed = rounded @ value / shares.sum(-1, keepdim=True)
    return mixed.to(torch.bfloat16).half().transpose(1, 2).contiguous()


def _gelu(
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
    """GELU (by tanh) of linears, divided by ``output_scale``: E4M3 [N, tokens, out].

    Args:
        x: E4M3 [N, tokens, in].
        weight: E4M3 [out, in].
        hidden, up: of adapters: FP16 [N, tokens, rank], see ``low_rank``, and [1, rank, out].
    """
    results = []
    for i, rows in enumerate(x):
        y = scaled_product(
            rows, weight[i], input_scale[i], weight_scale[i], bias[i], torch.float16, use_fast_accum
        )
        y = y if hidden is None or up is None else (y + _added(hidden[i], up[i])).half()
        results.append(quantize(functional.gelu(y, approximate="tanh"), output_scale[i]))
    return results


def _gated(
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
    """``residual + gate * linear``, of the residual's dtype.

    Args:
        x: E4M3 [N, tokens, in].
        weight: E4M3 [out, in].
        gate: [N, out].
        residual: [N, tokens, out].
        hidden, up: of adapters, as of ``gelu``.
        added: to the image's stream, which is [N, tokens, out] too.
    """
    results = []
    for i, rows in enumerate(x):
        y = scaled_product(
            rows, weight[i], input_scale[i], weight_scale[i], bias[i], torch.float16, use_fast_accum
        )
        y = y if hidden is None or up is None else (y + _added(hidden[i], up[i])).half()
        y = residual[i] + gate[i][:, None] * y
        y = y if added is None or i > 0 else y + added
        results.append(y.to(residual[i].dtype).contiguous())
    return results


def _gated_half(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    gate: list[Tensor],
    residual: list[Tensor],
    hidden: list[Tensor] | None = None,
    up: list[Tensor] | None = None,
) -> list[Tensor]:
    """As ``gated``, of FP16 operands, for tokens that follow each other.

    Args:
        x: FP16 [N, tokens, in], the image's before the text's; without a text in the other lists,
            its tokens are left out.
        weight: FP16 [out, in].
        hidden, up: of adapters, as of ``gelu``.
    """
    results = []
    first = 0
    for i, old in enumerate(residual):
        rows = x[:, first : first + old.shape[1]]
        first += old.shape[1]
        y = functional.linear(rows, weight[i], bias[i])
        y = y if hidden is None or up is None else (y + _added(hidden[i], up[i])).half()
        results.append((old + gate[i][:, None] * y).to(old.dtype).contiguous())
    return results


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "modulated": _modulated,
    "qkv": _qkv,
    "gelu": _gelu,
    "gated": _gated,
    "gated_half": _gated_half,
    "low_rank": _low_rank,
    "fp8_attention": _fp8_attention,
}

NAMESPACE = "sd35"

_ADAPTERS = "Tensor[]? hidden=None, Tensor[]? up=None"
_PRODUCT = "Tensor[] x, Tensor[] weight, Tensor[] input_scale, Tensor[] weight_scale"
_FAST = "bool use_fast_accum=False"

# By hand where lists may be left out, which PyTorch does not infer.
_SCHEMAS = {
    "qkv": f"({_PRODUCT}, Tensor[] factor, Tensor[] bias, Tensor[] norm, float eps, {_FAST}, "
    f"{_ADAPTERS}, Tensor? operand_scale=None) -> Tensor",
    "gelu": f"({_PRODUCT}, Tensor[] bias, Tensor[] output_scale, {_FAST}, {_ADAPTERS}) -> Tensor[]",
    "gated": f"({_PRODUCT}, Tensor[] bias, Tensor[] gate, Tensor[] residual, {_FAST}, "
    f"{_ADAPTERS}, Tensor? added=None) -> Tensor[]",
    "gated_half": "(Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] gate, Tensor[] residual, "
    f"{_ADAPTERS}) -> Tensor[]",
}

# Operators, so that a traced graph has them as one node.
OPERATORS = {
    name: torch.library.custom_op(
        f"{NAMESPACE}::{name}", function, mutates_args=(), schema=_SCHEMAS.get(name)
    )
    for name, function in FUNCTIONS.items()
}
modulated, qkv, gelu, gated, gated_half, low_rank, fp8_attention = OPERATORS.values()


@low_rank.register_fake
def _(x: list[Tensor], down: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    widths = [own.shape[1] * own.shape[2] for own in down]
    return [
        rows.new_empty((*rows.shape[:-1], width), dtype=torch.float16)
        for rows, width in zip(x, widths, strict=True)
    ]


@modulated.register_fake
def _(x: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [rows.new_empty(rows.shape, dtype=E4M3) for rows in x]


@qkv.register_fake
def _(
    x: list[Tensor], weight: list[Tensor], input_scale: list[Tensor], weight_scale: list[Tensor],
    factor: list[Tensor], bias: list[Tensor], norm: list[Tensor], eps: float,
    use_fast_accum: bool = False, hidden: Any = None, up: Any = None,
    operand_scale: Tensor | None = None,
) -> Tensor:  # fmt: skip
    tokens = sum(rows.shape[1] for rows in x)
    dtype = torch.float16 if operand_scale is None else E4M3
    return x[0].new_empty((x[0].shape[0], tokens, weight[0].shape[0]), dtype=dtype)


@fp8_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(query.shape, dtype=torch.float16, device=query.device)


@gelu.register_fake
def _(x: list[Tensor], weight: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [rows.new_empty((*rows.shape[:-1], weight[0].shape[0])) for rows in x]


@gated.register_fake
def _(
    x: list[Tensor], weight: list[Tensor], input_scale: list[Tensor], weight_scale: list[Tensor],
    bias: list[Tensor], gate: list[Tensor], residual: list[Tensor], use_fast_accum: bool = False,
    *_: Any, **__: Any,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]


@gated_half.register_fake
def _(
    x: Tensor, weight: list[Tensor], bias: list[Tensor], gate: list[Tensor], residual: list[Tensor],
    *_: Any, **__: Any,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]
