"""What is in a plan of TensorRT or of TensorRT for RTX, by the library's engine inspector.

Source: docs.nvidia.com/deeplearning/tensorrt, "Engine Inspector".
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.library import load_library
from sd35_trt.compat.tensorrt import freed_on_error, make_logger
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.bundle import Bundle, Component

from .contents import Contents

# How versions of the library write the types of tensors; what contains another comes first. As in
# Polygraphy's tools/inspect/subtool/model/extractors/_trt.py.
_TYPES = {
    "FLOAT8": "fp8", "FP8": "fp8", "E4M3": "fp8", "FLOAT4": "fp4", "FP4": "fp4",
    "BFLOAT16": "bf16", "BF16": "bf16", "FP16": "half", "HALF": "half", "FP32": "fp32",
    "FLOAT": "fp32", "UINT8": "uint8", "INT8": "int8", "INT4": "int4", "INT64": "int64",
    "INT32": "int32", "BOOL": "bool",
}  # fmt: skip

# The narrowest type that a layer computes with stands for it.
_NARROWEST = ("fp4", "int4", "fp8", "int8", "half", "bf16", "fp32", "uint8", "int32", "int64")


@freed_on_error
def look_inside(bundle: Bundle, component: Component) -> Contents:
    """Layers by type and by the precision of what they read.

    Raises:
        Sd35Error: the library is not installed, or does not load the plan: that takes its GPU.
    """
    backend = BACKENDS[component.engine]
    trt = load_library(backend)
    log = make_logger(trt)
    title = f"{backend.title} {trt.__version__}"
    try:
        runtime = trt.Runtime(log)
    except TypeError as error:  # the bindings' word for a null pointer
        raise Sd35Error(f"{title} cannot start here: {log.reasons()}", "look on the GPU") from error
    engine = runtime.deserialize_cuda_engine(bundle.path(component.files[0].path).read_bytes())
    if engine is None:
        raise Sd35Error(f"{title} does not load the plan here: {log.reasons()}", "look on the GPU")
    inspector = engine.create_engine_inspector()
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
    return plan_contents(f"plan, {title}", json.loads(text)["Layers"])


def plan_contents(form: str, layers: list[Any]) -> Contents:
    """What the inspector's list of layers says.

    Args:
        form: what the engine is.
        layers: each an object with ``LayerType``, ``Inputs`` and ``Outputs``; a name alone in plans
            that were built without details.
    """
    if any(isinstance(layer, str) for layer in layers):
        note = "built without details of its layers: build it again with this version"
        return Contents(form, {"layer": len(layers)}, note=note)
    return Contents(
        form,
        dict(Counter(str(layer.get("LayerType", "other")) for layer in layers)),
        dict(Counter(_precision(layer) for layer in layers)),
    )


def _precision(layer: dict[str, Any]) -> str:
    """The narrowest type among a layer's tensors."""
    tensors = [*(layer.get("Inputs") or ()), *(layer.get("Outputs") or ())]
    types = {_type(tensor) for tensor in tensors}
    return next((name for name in _NARROWEST if name in types), "other")


def _type(tensor: dict[str, Any]) -> str:
    # TensorRT 11 has two fields where there was one.
    fields = (tensor.get(key) for key in ("Format/Datatype", "Datatype", "Format"))
    text = " ".join(str(field) for field in fields if field).upper()
    return next((name for word, name in _TYPES.items() if word in text), "other")
