"""What we call of TensorRT's Python API, and how: checked against bindings that are imported.

As a script: ``python tensorrt_api.py BINDINGS LIBRARY…`` loads the libraries, imports the bindings
from a folder, and prints what differs.
"""

from __future__ import annotations

import ctypes
import importlib
import re
import sys
from collections.abc import Iterator
from typing import Any

#: Class → member → how many arguments we give; None where it is no method.
API: dict[str, dict[str, int | None]] = {
    "Builder": {
        "create_network": 1, "create_builder_config": 0, "create_optimization_profile": 0,
        "build_serialized_network": 2, "max_threads": None,
    },
    "NetworkDefinitionCreationFlag": {"STRONGLY_TYPED": None},
    "INetworkDefinition": {
        "get_input": 1, "num_inputs": None, "get_output": 1, "num_outputs": None, "get_layer": 1,
        "num_layers": None,
    },
    "OnnxParser": {"parse_from_file": 1, "get_error": 1, "num_errors": None},
    "ParserError": {"node_operator": 0, "node_name": 0, "desc": 0},
    "IOptimizationProfile": {"set_shape": 4},
    "IBuilderConfig": {
        "add_optimization_profile": 1, "progress_monitor": None, "set_flag": 1, "clear_flag": 1,
        "profiling_verbosity": None,
    },
    "ProfilingVerbosity": {"DETAILED": None},
    "BuilderFlag": {"WEIGHT_STREAMING": None, "REFIT": None, "TF32": None},
    "IProgressMonitor": {"phase_start": 3, "phase_finish": 1, "step_complete": 2},
    "ILogger": {"log": 2, "ERROR": None, "INFO": None},
    "Runtime": {"deserialize_cuda_engine": 1},
    "ICudaEngine": {
        "create_execution_context": 1, "streamable_weights_size": None,
        "weight_streaming_budget_v2": None, "weight_streaming_scratch_memory_size": None,
        "create_engine_inspector": 0,
    },
    "EngineInspector": {"get_engine_information": 1},
    "LayerInformationFormat": {"JSON": None},
    "ExecutionContextAllocationStrategy": {"USER_MANAGED": None},
    "IExecutionContext": {
        "set_input_shape": 2, "set_tensor_address": 2, "execute_async_v3": 1,
        "update_device_memory_size_for_shapes": 0, "set_device_memory": 2,
    },
}  # fmt: skip

#: Of a library that times kernels.
TIMING: dict[str, dict[str, int | None]] = {
    "IBuilderConfig": {
        "builder_optimization_level": None, "create_timing_cache": 1, "set_timing_cache": 2,
        "get_timing_cache": 0,
    },
    "ITimingCache": {"combine": 2, "serialize": 0},
}  # fmt: skip

#: Of versions from 10.15 on.
NEWER: dict[str, dict[str, int | None]] = {
    "Builder": {"build_serialized_network_to_stream": 3},
    # The documentation has the arguments of C++.
    "IStreamWriter": {"write": None},
    "LayerType": {"ATTENTION_OUTPUT": None},
    "IAttentionOutputLayer": {"attention": None},
    "IAttention": {"decomposable": None},
}

#: Of a library that finishes kernels where they run, and compiles for other GPUs.
LATE: dict[str, dict[str, int | None]] = {
    "IBuilderConfig": {"num_compute_capabilities": None, "set_compute_capability": 2},
    "ICudaEngine": {"create_runtime_config": 0},
    "IRuntimeConfig": {
        "set_execution_context_allocation_strategy": 1, "cuda_graph_strategy": None,
        "create_runtime_cache": 0, "set_runtime_cache": 1,
    },
    "IRuntimeCache": {"serialize": 0, "deserialize": 1},
    "CudaGraphStrategy": {"WHOLE_GRAPH_CAPTURE": None},
}  # fmt: skip


def differences(library: Any, *tables: dict[str, dict[str, int | None]]) -> list[str]:
    """Names that a library lacks, and methods that take other numbers of arguments."""
    return [line for table in tables for line in _differences(library, table)]


def _differences(library: Any, table: dict[str, dict[str, int | None]]) -> Iterator[str]:
    for kind, members in table.items():
        owner = getattr(library, kind, None)
        for member, count in members.items():
            attribute = getattr(owner, member, None)
            if attribute is None:
                yield f"no {kind}.{member}"
            elif count is not None and not _takes(attribute, member, count):
                yield f"{kind}.{member} takes other arguments than {count}: {attribute.__doc__}"


def _takes(method: Any, name: str, count: int) -> bool:
    """Whether one of a method's signatures, as its documentation has them, takes so many."""
    documentation = method.__doc__ or ""
    signatures = re.findall(rf"^\s*(?:\d+\. )?{name}\((.*)\)(?: ->|$)", documentation, re.MULTILINE)
    return not signatures or any(_fits(signature, count) for signature in signatures)


def _fits(signature: str, count: int) -> bool:
    # Commas inside a type's brackets part nothing.
    flat = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", signature))
    arguments = [a for a in flat.split(",") if a.strip() and not a.strip().startswith("self")]
    required = [a for a in arguments if "=" not in a]
    return len(required) <= count <= len(arguments)


def _main(bindings: str, *libraries: str) -> None:
    for path in libraries:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    sys.path.insert(0, bindings)
    library = importlib.import_module("tensorrt_bindings")
    print(library.__version__)
    for line in differences(library, API, TIMING, NEWER):
        print(line)


if __name__ == "__main__":
    _main(*sys.argv[1:])
