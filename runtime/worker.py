"""A thread that draws for a pool, on one of its devices."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger("sd35_trt")

_Calls = SimpleQueue[Callable[[], object] | None]


class Worker:
    """Calls what it is given, one after another, in a thread of its own.

    The thread is a daemon: the interpreter's end does not wait until everything has been called,
    as it does for :class:`concurrent.futures.ThreadPoolExecutor`. It ends with :meth:`close`, or
    when nobody refers to the worker.
    """

    def __init__(self) -> None:
        self._calls: _Calls = SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._calls,), name="sd35-trt", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._calls.put, None).atexit = False

    def submit(self, call: Callable[[], object]) -> None:
        """Have something called; what it raises is logged."""
        self._calls.put(call)

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is its own."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Wait until everything has been called."""
        self._calls.put(None)
        self._thread.join()


def _serve(calls: _Calls) -> None:
    while (call := calls.get()) is not None:
        try:
            call()
        except BaseException:
            logger.exception("a call of the pool's thread failed")
        del call  # whose object may be freed while this waits
