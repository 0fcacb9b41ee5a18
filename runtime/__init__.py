"""Drawing from a bundle: the denoise loop and what it needs, without PyTorch."""

from .pipeline import Pipeline, Result, Step

__all__ = ["Pipeline", "Result", "Step"]
