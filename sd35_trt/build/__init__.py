"""From a checkpoint to a bundle."""

from .run import BuildOptions, build

__all__ = ["BuildOptions", "build"]
