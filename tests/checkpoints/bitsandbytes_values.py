"""Weights that bitsandbytes packed, and the values that it makes of them, for the tests.

Run with bitsandbytes installed, this writes the file that the tests read.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

#: A layer's tensors as bitsandbytes saves them, and its values as ``expected.<layer>``.
FILE = Path(__file__).with_name("bitsandbytes.safetensors")

_SHAPE = (24, 20)


def _write() -> None:
    from bitsandbytes import functional

    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                weight = (torch.randn(_SHAPE) * 0.05).to(dtype)
                packed, state = functional.quantize_4bit(
                    weight, blocksize=64, compress_statistics=nested, quant_type=kind
                )
                layer = f"{kind}.{'nested' if nested else 'single'}.{dtype}".replace("torch.", "")
                tensors[f"{layer}.weight"] = packed
                tensors |= {f"{layer}.weight.{k}": v for k, v in state.as_dict(True).items()}
                tensors[f"expected.{layer}"] = functional.dequantize_4bit(packed, state)
    data, largest, _ = functional.int8_vectorwise_quant(torch.randn(_SHAPE).half())
    tensors["int8.weight"], tensors["int8.SCB"] = data, largest
    tensors["int8.weight_format"] = torch.tensor(0, dtype=torch.uint8)
    tensors["expected.int8"] = functional.int8_vectorwise_dequant(data, largest)
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, FILE)


if __name__ == "__main__":
    _write()
