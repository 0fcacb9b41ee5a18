"""TensorRT's two libraries, which have one API: their log, their objects when they fail, what a
version lacks, and layers that the bindings hand out as their base class.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from sd35_trt.errors import Sd35Error


def without_noise(message: str) -> str:
    """A message on one line, without the lines that complain about a GPU that is not there."""
    lines = (line.strip() for line in message.splitlines())
    return " ".join(line for line in lines if line and "cudaError" not in line)


_P = ParamSpec("_P")
_R = TypeVar("_R")


def freed_on_error(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorates what makes objects of a library: where it raises, they are freed at once.

    The error's traceback would keep them until the garbage collector finds it. That may be in the
    library's call of a logger, where the library holds the lock that it takes to free a builder:
    it would wait for itself, forever.
    """

    @functools.wraps(function)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            cause: BaseException | None = error
            while cause is not None:
                traceback.clear_frames(cause.__traceback__)
                cause = cause.__cause__ or cause.__context__
            raise

    return run


def make_logger(trt: Any) -> Any:
    """A logger of a library that keeps errors, and hands other messages on.

    Returns:
        An ``ILogger`` with ``errors``, a list, ``reasons()``, these as text, and ``on_message``,
        a function that may be replaced.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.on_message = lambda message: None

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message)
            elif severity <= trt.ILogger.INFO:  # there may be a million more
                self.on_message(message)

        def reasons(self) -> str:
            lines = [line for line in map(without_noise, self.errors) if line]
            return "; ".join(dict.fromkeys(lines)) or "it gives no reason"

    return Log()


def make_builder(trt: Any, title: str, log: Any) -> Any:
    """A library's ``Builder``.

    Args:
        title: its name and version, for messages.
        log: of :func:`make_logger`.

    Raises:
        Sd35Error: it cannot start, and why.
    """
    try:
        return trt.Builder(log)
    except TypeError as error:  # the bindings' word for a null pointer
        reasons = log.reasons()
        lacks = "Unable to load library" in reasons
        raise Sd35Error(
            f"{title} cannot start: {reasons}",
            "it lacks what it needs for this GPU: install another version of it"
            if lacks
            else "see: sd35-trt doctor",
        ) from error


_MEMORY_LINE = re.compile(r"Total (Activation|Weights) Memory: (\d+) bytes")


def logged_memory(message: str) -> dict[str, int]:
    """What a builder's message says of an engine's memory; no API tells.

    Returns:
        Bytes as ``Activation`` or ``Weights``; empty where the message is another.
    """
    match = _MEMORY_LINE.search(message)
    return {} if match is None else {match[1]: int(match[2])}


def attentions(trt: Any, network: Any) -> list[Any]:
    """Each ``IAttention`` of a network; versions before 10.15 have none."""
    if not hasattr(trt.LayerType, "ATTENTION_OUTPUT"):
        return []
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    outputs = [layer for layer in layers if layer.type == trt.LayerType.ATTENTION_OUTPUT]
    for layer in outputs:
        # A layer comes as its base class; the bindings know it by the class it is given.
        layer.__class__ = trt.IAttentionOutputLayer
    return [layer.attention for layer in outputs]
