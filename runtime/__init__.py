"""Drawing from a bundle: the denoise loop and what it needs, without PyTorch.

What is named here is for servers and other programs; the modules behind it may change. Errors are
in :mod:`sd35_trt.errors`; metrics for Prometheus in :mod:`sd35_trt.runtime.metrics`, which needs
a package more.
"""

from .controls import Control
from .job import Result, Step
from .latent_guard import Anomaly
from .pipeline import Pipeline
from .pool import PipelinePool
from .pool_device import PoolDevice
from .request import Request
from .resident import EngineMemory, MemoryReport
from .tracing import Observer, Span

__all__ = [
    "Anomaly",
    "Control",
    "EngineMemory",
    "MemoryReport",
    "Observer",
    "Pipeline",
    "PipelinePool",
    "PoolDevice",
    "Request",
    "Result",
    "Span",
    "Step",
]
