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
) -> Tensor:
    """Query, key and value of all tokens, the image's before the text's: FP16 [N, tokens, 3 D].

    Args:
        x: E4M3 [N, tokens, D].
        weight: E4M3 [3 D, D].
        factor: FP32 [3 D], by which columns are multiplied before the bias FP16 [3 D].
        norm: FP16 [2, head]: weights of the RMS normalizations of a head's query and key.
    """
    results = []
    for i, rows in enumerate(x):
        y = scaled_product(
            rows, weight[i], input_scale[i], weight_scale[i], None, torch.float16, use_fast_accum
        )
        y = (y * factor[i] + bias[i]).half()
        head = norm[i].shape[1:]
        query, key, value = y.unflatten(-1, (3, -1, *head)).unbind(2)
        query, key = (
            functional.rms_norm(part, head, norm[i][k], eps) for k, part in enumerate((query, key))
        )
        results.append(torch.stack([query, key, value], dim=2).flatten(2))
    return torch.cat(results, dim=1)


def _gelu(
    x: list[Tensor],
    weight: list[Tensor],
    input_scale: list[Tensor],
    weight_scale: list[Tensor],
    bias: list[Tensor],
    output_scale: list[Tensor],
    use_fast_accum: bool = False,
) -> list[Tensor]:
    """GELU (by tanh) of linears, divided by ``output_scale``: E4M3 [N, tokens, out].

    Args:
        x: E4M3 [N, tokens, in].
        weight: E4M3 [out, in].
    """
    results = []
    for i, rows in enumerate(x):
        y = scaled_product(
            rows, weight[i], input_scale[i], weight_scale[i], bias[i], torch.float16, use_fast_accum
        )
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
) -> list[Tensor]:
    """``residual + gate * linear``, of the residual's dtype.

    Args:
        x: E4M3 [N, tokens, in].
        weight: E4M3 [out, in].
        gate: [N, out].
        residual: [N, tokens, out].
    """
    results = []
    for i, rows in enumerate(x):
        y = scaled_product(
            rows, weight[i], input_scale[i], weight_scale[i], bias[i], torch.float16, use_fast_accum
        )
        results.append((residual[i] + gate[i][:, None] * y).to(residual[i].dtype).contiguous())
    return results


def _gated_half(
    x: Tensor,
    weight: list[Tensor],
    bias: list[Tensor],
    gate: list[Tensor],
    residual: list[Tensor],
) -> list[Tensor]:
    """As ``gated``, of FP16 operands, for tokens that follow each other.

    Args:
        x: FP16 [N, tokens, in], the image's before the text's; without a text in the other lists,
            its tokens are left out.
        weight: FP16 [out, in].
    """
    results = []
    first = 0
    for i, old in enumerate(residual):
        rows = x[:, first : first + old.shape[1]]
        first += old.shape[1]
        y = functional.linear(rows, weight[i], bias[i])
        results.append((old + gate[i][:, None] * y).to(old.dtype).contiguous())
    return results


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "modulated": _modulated,
    "qkv": _qkv,
    "gelu": _gelu,
    "gated": _gated,
    "gated_half": _gated_half,
}

NAMESPACE = "sd35"

# Operators, so that a traced graph has them as one node.
OPERATORS = {
    name: torch.library.custom_op(f"{NAMESPACE}::{name}", function, mutates_args=())
    for name, function in FUNCTIONS.items()
}
modulated, qkv, gelu, gated, gated_half = OPERATORS.values()


@modulated.register_fake
def _(x: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [rows.new_empty(rows.shape, dtype=E4M3) for rows in x]


@qkv.register_fake
def _(x: list[Tensor], weight: list[Tensor], *_: Any, **__: Any) -> Tensor:
    tokens = sum(rows.shape[1] for rows in x)
    return x[0].new_empty((x[0].shape[0], tokens, weight[0].shape[0]), dtype=torch.float16)


@gelu.register_fake
def _(x: list[Tensor], weight: list[Tensor], *_: Any, **__: Any) -> list[Tensor]:
    return [rows.new_empty((*rows.shape[:-1], weight[0].shape[0])) for rows in x]


@gated.register_fake
def _(
    x: list[Tensor], weight: list[Tensor], input_scale: list[Tensor], weight_scale: list[Tensor],
    bias: list[Tensor], gate: list[Tensor], residual: list[Tensor], use_fast_accum: bool = False,
) -> list[Tensor]:  # fmt: skip
    return [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]


@gated_half.register_fake
def _(
    x: Tensor, weight: list[Tensor], bias: list[Tensor], gate: list[Tensor], residual: list[Tensor]
) -> list[Tensor]:
    return [torch.empty_like(old, memory_format=torch.contiguous_format) for old in residual]
