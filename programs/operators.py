"""Operators that a program's graph may hold: of ATen, our fused ones, and functions on sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from . import kernels

#: Functions on sizes, by name.
SIZE_FUNCTIONS: dict[str, Callable[..., Any]] = {
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
        "index_select.default",
        "layer_norm.default",
        "le.Tensor",
        "linear.default",
        "log.default",
        "lt.Scalar",
        "masked_fill.Scalar",
        "matmul.default",
        "min.other",
        "mul.Tensor",
        "new_ones.default",
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
        "type_as.default",
        "unflatten.int",
        "unsqueeze.default",
        "upsample_nearest2d.vec",
        "view.default",
        "where.self",
        "zeros_like.default",
    ]
)


def is_known(target: str) -> bool:
    """Whether a graph may hold a target, e.g. ``aten.add.Tensor``."""
    return (
        target in SIZE_FUNCTIONS
        or kernels.is_fused(target)
        or target.removeprefix("aten.") in OPERATORS
    )
