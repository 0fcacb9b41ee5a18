"""An engine that is opened while another one runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from .sessions.session import Session


class Opening:
    """Opens an engine in a thread of its own, a daemon: an executor's refuses work as soon as the
    main thread has ended, while others may still draw.

    Args:
        open_session: opens it.
    """

    def __init__(self, open_session: Callable[[], Session]) -> None:
        self._future: Future[Session] = Future()
        threading.Thread(
            target=_open, args=(self._future, open_session), name="sd35-trt-load", daemon=True
        ).start()

    def session(self) -> Session:
        """The engine, once it is open; raises what opening it raised."""
        return self._future.result()

    def session_if_any(self) -> Session | None:
        """The engine, once it is open; None where that failed."""
        return None if self._future.exception() is not None else self._future.result()


def _open(future: Future[Session], open_session: Callable[[], Session]) -> None:
    try:
        future.set_result(open_session())
    except BaseException as error:  # noqa: BLE001 raised where the engine is used
        future.set_exception(error)
