"""From a Stable Diffusion 3.5 checkpoint to ONNX components, without loading the model."""

from .checkpoint import Checkpoint
from .component import COMPONENTS, ExportOptions, export_component

__all__ = ["COMPONENTS", "Checkpoint", "ExportOptions", "export_component"]
