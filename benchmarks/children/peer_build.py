"""The usual way: diffusers, modelopt's default FP8, torch.onnx, TensorRT for RTX: CHECKPOINT OUT.

Prints [time, stage, note] where a stage begins. Latents of 512 to 1536 pixels, text of 154 to 589
tokens, guidance: as our denoiser's ranges.
"""

import json
import sys
import time
from pathlib import Path

import modelopt.torch.quantization as mtq
import tensorrt_rtx as trt
import torch
from diffusers import SD3Transformer2DModel


def mark(stage: str) -> None:
    print(json.dumps([time.time(), stage, ""]), flush=True)


root, out = sys.argv[1:]
shapes: dict[str, list[tuple[int, ...]]] = {
    "hidden_states": [(2, 16, 64, 64), (2, 16, 128, 128), (2, 16, 192, 192)],
    "encoder_hidden_states": [(2, 154, 4096), (2, 333, 4096), (2, 589, 4096)],
    "pooled_projections": [(2, 2048)] * 3,
    "timestep": [(2,)] * 3,
}


@torch.no_grad()
def export() -> None:
    """Load the model, quantize it, and write it as ONNX."""
    mark("load")
    model = SD3Transformer2DModel.from_pretrained(
        root, subfolder="transformer", dtype=torch.float16
    ).eval()
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(s[0], generator=g).half() for name, s in shapes.items()}
    mark("quantize")
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(**inputs))
    mark("export")
    torch.onnx.export(
        model, (), out + "/model.onnx", kwargs={**inputs, "return_dict": False},
        input_names=list(inputs), output_names=["sample"], opset_version=20, dynamo=False,
        dynamic_axes={"hidden_states": {2: "h", 3: "w"}, "encoder_hidden_states": {1: "t"}},
    )  # fmt: skip


export()
mark("compile")
builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
if not parser.parse_from_file(out + "/model.onnx"):
    sys.exit(parser.get_error(0).desc())
config = builder.create_builder_config()
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
profile = builder.create_optimization_profile()
for name, sizes in shapes.items():
    profile.set_shape(name, *sizes)
config.add_optimization_profile(profile)
plan = builder.build_serialized_network(network, config)
Path(out, "engine.plan").write_bytes(plan)
mark("done")
