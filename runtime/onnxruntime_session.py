"""Sessions on ONNX Runtime's CPU provider."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnxruntime as ort

from sd35_trt.bundle import Bundle, Component
from sd35_trt.errors import BundleError, Sd35Error


def session_options(threads: int | None = None, fp8: bool = False) -> ort.SessionOptions:
    """How components are loaded.

    Args:
        threads: for one operator; None takes all cores.
        fp8: whether the graph holds FP8 Q/DQ: ONNX Runtime's fusions of Q/DQ with the operators
            around them do not know FP8.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    if threads is not None:
        options.intra_op_num_threads = threads
    if fp8:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


class OnnxRuntimeSession:
    """Runs one ONNX component with inputs and outputs bound to the caller's arrays."""

    def __init__(self, path: str, name: str, options: ort.SessionOptions) -> None:
        self._name = name
        try:
            self._session = ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        except Exception as error:
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}",
                "build the bundle again with: sd35-trt build",
            ) from error

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> None:
        """See :class:`sd35_trt.runtime.session.Session`."""
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, array in outputs.items():
            assert array.flags.c_contiguous, name
            binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise Sd35Error(
                f"{self._name} failed in onnxruntime: {error}", "try a smaller size or batch"
            ) from error

    def close(self) -> None:
        """Release the engine's memory."""
        del self._session


def open_session(bundle: Bundle, component: Component, threads: int | None) -> OnnxRuntimeSession:
    """Load a component of a bundle; see :func:`sd35_trt.runtime.session.open_session`."""
    path = bundle.path(component.files[0].path)
    fp8 = bool(component.precisions.get("fp8"))
    return OnnxRuntimeSession(str(path), component.name, session_options(threads, fp8))
