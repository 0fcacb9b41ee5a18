"""Prints the errors of the fused operators' kernels in Triton's interpreter, as JSON."""

import json

import triton
import triton.language as tl
from test_fused import errors

from sd35_trt import fused_triton as kernels
from sd35_trt.fused import FUNCTIONS


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """The interpreter has no inline assembly."""
    return 2 * tl.sigmoid(2 * x) - 1


kernels._tanh = tanh
found = {}
for tiles in (kernels.Tiles(32, 64, 64, 4, 2), kernels.Tiles(16, 128, 64, 4, 2, 1, True, 3)):
    kernels.TILES = dict.fromkeys(kernels.TILES, tiles)
    for tokens in ((48, 20), (33,)):
        for operator in FUNCTIONS:
            kernel = getattr(kernels, operator)
            key = f"{operator} {tokens} {tiles.halves}"
            found[key] = errors(kernel, operator, tokens, 128, "cpu")
print(json.dumps(found))
