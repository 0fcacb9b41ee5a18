"""What ONNX Runtime tells in words alone."""

from __future__ import annotations


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of a session says that there is no memory; it has no type of its own."""
    text = str(error).lower()
    return "failed to allocate memory" in text or "out of memory" in text
