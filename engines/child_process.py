"""Work in a process of its own: it can be stopped at any moment, and its memory goes with it.

A compiler that is called in this process hears of an interruption only between its steps, which
take minutes, and ends the process where it crashes.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.spawn
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import IO, Any, TypeVar

from sd35_trt.errors import Sd35Error

Report = Callable[[float, str], None]
Job = TypeVar("Job")

# What the child runs. Modules are found where they are found here.
_START = f"""
import json, sys
sys.path[:] = json.loads(sys.argv[2])
from {__name__} import serve
serve(int(sys.argv[1]))
"""

_RUNNING: set[subprocess.Popen[bytes]] = set()

# Of what a child wrote before it died, so much is shown.
_LAST = 300


class _ChildTraceback(Exception):
    """Where an error arose, in a child: the cause of the error that is raised here."""


def run_in_child(
    title: str, function: Callable[[Job, Report], None], job: Job, progress: Report
) -> None:
    """Call a function in a child process, and wait for it.

    Args:
        title: names the work in messages: "compiling denoiser".
        function: of a module; it is given the job and a function to report progress with.
        job: what can be pickled.
        progress: called with the fractions and notes that it reports.

    Raises:
        Sd35Error: the process died.
        BaseException: what the function raised.
    """
    ours, theirs = multiprocessing.Pipe()
    with tempfile.TemporaryFile() as output, ours:
        with theirs:
            child = _start(theirs, output)
        _RUNNING.add(child)
        try:
            ours.send((function, job))
            failure = _follow(ours, progress)
        except (EOFError, ConnectionError) as error:
            raise Sd35Error(f"{title} stopped: {_death(child, output)}") from error
        finally:
            # It has nothing left to do, or is to stop.
            _RUNNING.discard(child)
            child.kill()
            child.wait()
    if failure is not None:
        raised, where = failure
        raise raised from _ChildTraceback(where)


def stop_children() -> None:
    """End all work in child processes; those that wait for it get an error."""
    for child in list(_RUNNING):
        child.kill()


def _start(connection: Connection, output: IO[bytes]) -> subprocess.Popen[bytes]:
    executable = os.fsdecode(multiprocessing.spawn.get_executable() or sys.executable)
    descriptor = connection.fileno()
    return subprocess.Popen(
        [executable, "-c", _START, str(descriptor), json.dumps(sys.path)],
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        # An interruption from the terminal is for this process, which stops the child.
        start_new_session=True,
    )


def _follow(connection: Connection, progress: Report) -> tuple[BaseException, str] | None:
    """Hand progress on until the work is done; then its error and traceback, if any."""
    while True:
        message: Any = connection.recv()
        if message is None:
            return None
        if isinstance(message[0], BaseException):
            error, where = message
            return error, where
        progress(*message)


def _death(child: subprocess.Popen[bytes], output: IO[bytes]) -> str:
    """How a child ended, and the last that it wrote."""
    status = child.wait()
    output.seek(0)
    text = " ".join(output.read().decode("utf-8", "replace").split())[-_LAST:]
    if status < 0:
        reason = f"its process was ended by {signal.Signals(-status).name}"
    else:
        reason = f"its process ended with status {status}"
    return f"{reason} ({text})" if text else reason


def serve(descriptor: int) -> None:
    """Do what :func:`run_in_child` asks for; in the child.

    Args:
        descriptor: of its end of the connection.
    """
    connection = Connection(descriptor)
    function, job = connection.recv()
    threading.Thread(target=_end_with_parent, args=(connection,), daemon=True).start()
    try:
        function(job, lambda fraction, note: connection.send((fraction, note)))
    except BaseException as error:  # noqa: BLE001 - raised again where it was asked for
        connection.send((_portable(error), traceback.format_exc()))
    else:
        connection.send(None)


def _end_with_parent(connection: Connection) -> None:
    """End this process where the one that waits for it is gone: nothing more comes from there."""
    try:
        connection.recv()
    except (EOFError, OSError):
        os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """The error, or one in its place where it cannot be handed over."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 - its own
    except Exception:  # noqa: BLE001 - whatever its constructor takes amiss
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
