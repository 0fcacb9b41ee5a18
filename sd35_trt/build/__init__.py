"""From a checkpoint to a bundle."""

from .options import BuildOptions
from .run import build

__all__ = ["BuildOptions", "build"]
