"""Prints the errors of the fused operators' kernels in Triton's interpreter, as JSON.

Its argument is the number of tilings to try.
"""

import json
import sys
from typing import Any

import torch
import triton
import triton.language as tl
from test_fused import ADAPTED, KERNELS, errors
from triton.runtime import interpreter

from sd35_trt.programs import triton_kernels, triton_operators
from sd35_trt.programs.fused import E4M3


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """The interpreter has no inline assembly."""
    return 2 * tl.sigmoid(2 * x) - 1


def convert(values: Any, given: Any, wanted: Any, rounding: Any) -> Any:
    """The interpreter loses the carry where a mantissa is rounded up to the next power of two."""
    if (given.name, wanted.name) != ("fp32", "fp8e4nv"):
        return convert_float(values, given, wanted, rounding)
    return torch.from_numpy(values.copy()).to(E4M3).view(torch.uint8).numpy()


convert_float = interpreter._convert_float
interpreter._convert_float = convert
triton_kernels._tanh = tanh
TILES = (
    triton_operators.Tiles(16, 128, 64, 4, 2, 1, True, 3),
    triton_operators.Tiles(32, 64, 64, 4, 2),
)
result = {}
for tiles in TILES[: int(sys.argv[1])]:
    triton_operators.TILES = dict.fromkeys(triton_operators.TILES, tiles)
    for tokens in ((48, 20), (33,)):
        for operator in KERNELS:
            kernel = getattr(triton_operators, operator)
            key = f"{operator} {tokens} {tiles.halves}"
            result[key] = errors(kernel, operator, tokens, 128, "cpu")
        key = f"qkv {tokens} {tiles.halves} quantized"
        result[key] = errors(triton_operators.qkv, "qkv", tokens, 128, "cpu", 0, True)
        for operator in ADAPTED:
            # Linears that share a tile, and a rank that is none of a tile.
            kernel = getattr(triton_operators, operator)
            key = f"{operator} {tokens} {tiles.halves} adapted"
            result[key] = errors(kernel, operator, tokens, 192, "cpu", 24)
print(json.dumps(result))
