"""Drawing from a bundle: the denoise loop and what it needs, without PyTorch."""

from .job import Result, Step
from .pipeline import Pipeline
from .pool import PipelinePool

__all__ = ["Pipeline", "PipelinePool", "Result", "Step"]
