"""Sessions of ONNX Runtime that run a graph as it is written."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
from onnx import ModelProto


def written_options() -> ort.SessionOptions:
    """How a graph runs operator by operator, as written: fusions would move what is compared."""
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def open_graph(
    model: ModelProto, folder: Path, options: ort.SessionOptions | None = None
) -> ort.InferenceSession:
    """A session on the CPU.

    Args:
        folder: where the files of its weights are.
        options: None takes :func:`written_options`.
    """
    options = options or written_options()
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(folder)
    )
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
