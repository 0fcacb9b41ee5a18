"""What is said of an engine that fails while it runs."""

from __future__ import annotations

from sd35_trt.errors import OutOfMemory, Sd35Error

# Libraries say in words alone that there is no memory: ONNX Runtime's allocators, CUDA, cuBLAS.
_NO_MEMORY = ("failed to allocate memory", "out of memory", "alloc_failed")


def lacks_memory(reason: object) -> bool:
    """Whether a library's error says that there is no memory."""
    text = str(reason).lower()
    return any(words in text for words in _NO_MEMORY)


def engine_failure(name: str, library: str, reason: object) -> Sd35Error:
    """The error of an engine that fails while it runs.

    Args:
        name: of the component.
        library: that ran it, for the message.
        reason: what it said.
    """
    message = f"{name} failed in {library}: {reason}"
    if lacks_memory(reason):
        return OutOfMemory(message, "try a smaller size or batch")
    return Sd35Error(
        message, "check the bundle: sd35-trt verify BUNDLE, and this machine: sd35-trt doctor"
    )
