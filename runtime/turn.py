"""Taking turns: one thread at a time, and never twice."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from sd35_trt.errors import UsageError


class Turn:
    """A lock that tells its holder, who asks for it again, that this would wait for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    @contextlib.contextmanager
    def take(self, what: str) -> Iterator[None]:
        """Wait for the turn, and hold it while the block runs.

        Args:
            what: it is needed for, a function's name.

        Raises:
            UsageError: the calling thread holds it: it is in a callback.
        """
        me = threading.get_ident()
        if self._holder == me:
            raise UsageError(
                f"{what} was called by a callback of the pipeline that is drawing",
                "return from the callback first; False cancels the request",
            )
        with self._lock:
            self._holder = me
            try:
                yield
            finally:
                self._holder = None
