"""The process that engines were loaded in: what a fork does not take along, and what its end waits
for."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import os
import weakref
from typing import Protocol

from sd35_trt.errors import UsageError


class HomeProcess:
    """The process that made this object."""

    def __init__(self) -> None:
        self._pid = os.getpid()

    @property
    def is_this(self) -> bool:
        """False after a fork, in the child."""
        return os.getpid() == self._pid

    def check(self, what: str) -> None:
        """Refuse to use in a child what was loaded before the fork.

        Args:
            what: is used, with its article.

        Raises:
            UsageError: this is such a child.
        """
        if not self.is_this:
            raise UsageError(
                f"{what} was loaded before this process was forked, and its engines do not work "
                "here",
                "load it after the fork, in each child",
            )


# What has threads or a driver behind it.
_NATIVE: weakref.WeakSet[object] = weakref.WeakSet()


def keep_from_forks(native: object) -> None:
    """Never destroy an object, or what it refers to, in a child of a fork.

    Its destructor would wait there for threads, or ask a driver, that only the parent has.
    """
    _watch_forks()
    _NATIVE.add(native)


@functools.cache
def _watch_forks() -> None:
    os.register_at_fork(after_in_child=_abandon)


def _abandon() -> None:
    for native in list(_NATIVE):
        # One reference more than anybody drops; one in a list would end with the interpreter.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(native))
    # Libraries, too, have destructors: ONNX Runtime 1.32's waits for its telemetry's thread, for
    # ever. So the child ends when Python has: with its status, and without them.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "on_exit"):
        libc.on_exit(libc._exit, None)
        atexit.register(libc.fflush, None)


class Leaving(Protocol):
    """What has to stop before the interpreter is gone."""

    def leave(self) -> None:
        """Stop what runs, drop what waits, and release everything; nothing in a forked child."""


_LEAVING: weakref.WeakSet[Leaving] = weakref.WeakSet()


def leave_at_exit(one: Leaving) -> None:
    """Have :meth:`Leaving.leave` called when the process ends.

    A thread that came back from an engine after the interpreter's end would abort the process.
    """
    _LEAVING.add(one)


def _leave() -> None:
    with contextlib.ExitStack() as leaving:
        for one in list(_LEAVING):
            leaving.callback(one.leave)


atexit.register(_leave)
