"""mini: a small Stable Diffusion 3.5 that ships with the package."""

from pathlib import Path


def checkpoint_path() -> Path:
    """Directory of the packaged checkpoint, in the diffusers layout."""
    return Path(__file__).parent / "checkpoint"
