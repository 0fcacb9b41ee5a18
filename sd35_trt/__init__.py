"""Compile Stable Diffusion 3.5 ahead of time into per-GPU engines and run them without PyTorch."""

__version__ = "0.1.0"
