"""Sessions on ONNX Runtime: its CPU provider, and its CUDA provider on our stream.

Source: onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html for the options.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime as ort

from sd35_trt.backends import BACKENDS
from sd35_trt.errors import BundleError, OutOfMemory, Sd35Error
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.runtime.devices.device import Buffer, Device

from .failure import engine_failure, lacks_memory
from .optimized_graphs import open_optimized
from .session import SessionOptions

# Level of what ONNX Runtime prints.
_ERRORS = 3


def session_options(threads: int | None = None, fp8: bool = False) -> ort.SessionOptions:
    """How components are loaded.

    Args:
        threads: for one operator; None takes all cores.
        fp8: whether the graph holds FP8 Q/DQ: ONNX Runtime's fusions of Q/DQ with the operators
            around them do not know FP8, and without them it would fold weights and their
            DequantizeLinear into one of four times the bytes.
    """
    options = ort.SessionOptions()
    options.log_severity_level = _ERRORS
    # Laid out ahead as one block, a run's tensors are allocated beside those of the first run, and
    # take no less time.
    options.enable_mem_pattern = False
    # Each engine has threads of its own, which would spin on while the next one runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
    if fp8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry(
            "optimization.disable_specified_optimizers", "ConstantFolding"
        )
    return options


def _run_options(device: Device, name: str) -> ort.RunOptions:
    """How a component runs: on a GPU, what it has worked with may be given back after a run.

    On the CPU it is kept: the allocations of each run would scatter over the heap, which grows.
    """
    options = ort.RunOptions()
    if device.kind != "cpu" and not BACKENDS["onnxruntime"].keeps(name):
        entry = "memory.enable_memory_arena_shrinkage"
        options.add_run_config_entry(entry, f"gpu:{device.index}")
    return options


def _providers(device: Device) -> list[Any]:
    if device.kind == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Sd35Error(
            f"this onnxruntime {ort.__version__} has no CUDA provider",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then: "
            "pip install 'sd35-trt[onnxruntime-gpu]'",
        )
    # Or each load warns that the provider is no plug-in, past the session's own level.
    ort.set_default_logger_severity(_ERRORS)
    cuda = {
        "device_id": str(device.index),
        "user_compute_stream": str(device.stream),
        # Growing by powers of two would take twice the weights of a large component.
        "arena_extend_strategy": "kSameAsRequested",
    }
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


class OnnxRuntimeSession:
    """Runs one ONNX component with inputs and outputs bound to the caller's buffers."""

    # Operators on shapes run on the host in each run, and ONNX Runtime may copy their results
    # from memory that it frees afterwards: nothing that a graph may hold on to.
    recordable = False

    def __init__(
        self,
        path: str,
        name: str,
        device: Device,
        options: ort.SessionOptions,
        model: bytes | None = None,
    ) -> None:
        """Open a graph.

        Args:
            path: of its file, for messages where ``model`` is what is opened.
        """
        self._name = name
        self._device = device
        self._run_options = _run_options(device, name)
        providers = _providers(device)
        try:
            self._session = ort.InferenceSession(model or path, options, providers)
        except Exception as error:
            if lacks_memory(error):
                raise OutOfMemory(
                    f"{device.name} has no room for {name}", "load with a vram_budget"
                ) from error
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}",
                "build the bundle again with: sd35-trt build",
            ) from error
        provider = "CPUExecutionProvider" if device.kind == "cpu" else "CUDAExecutionProvider"
        if self._session.get_providers()[0] != provider:
            raise Sd35Error(
                f"onnxruntime {ort.__version__} cannot start its CUDA provider",
                "install the CUDA and cuDNN libraries that it was built for",
            )

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        """See :class:`sd35_trt.runtime.sessions.session.Session`."""
        binding = self._session.io_binding()
        where = self._device.kind, self._device.index
        for name, buffer in inputs.items():
            address = self._device.pointer(buffer)
            binding.bind_input(name, *where, buffer.dtype, buffer.shape, address)
        for name, buffer in outputs.items():
            address = self._device.pointer(buffer)
            binding.bind_output(name, *where, buffer.dtype, buffer.shape, address)
        try:
            # On a GPU it waits for the work. Told not to (disable_synchronize_execution_providers),
            # ONNX Runtime 1.31 keeps the pinned memory of each run until the session is closed,
            # and then frees it in a callback of CUDA, which ends the process.
            self._session.run_with_iobinding(binding, self._run_options)
        except Exception as error:
            raise engine_failure(self._name, "ONNX Runtime", error) from error

    def close(self) -> None:
        """Release the engine's memory, also where its last work failed."""
        try:
            self._device.synchronize()
        finally:
            del self._session


def open_session(
    bundle: Bundle, component: Component, device: Device, options: SessionOptions
) -> OnnxRuntimeSession:
    """Load a component of a bundle; see :func:`sd35_trt.runtime.sessions.session.open_session`."""
    path = bundle.path(component.files[0].path)
    fp8 = bool(component.precisions.get("fp8"))

    def settings() -> ort.SessionOptions:
        return session_options(options.threads, fp8)

    def open_model(model: str | bytes, own: ort.SessionOptions) -> OnnxRuntimeSession:
        content = model if isinstance(model, bytes) else None
        return OnnxRuntimeSession(str(path), component.name, device, own, content)

    if device.kind == "cpu":
        return open_optimized(str(path), component, settings, open_model)
    return open_model(str(path), settings())
