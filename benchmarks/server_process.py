"""``sd35-trt serve`` in a process of its own, for the scripts that load it."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

# Until a stopped server has answered what it had accepted.
_PATIENCE = 60


@contextlib.contextmanager
def server(bundle: Path, *options: str) -> Iterator[tuple[str, psutil.Process]]:
    """A server of a bundle on a free port, whose engines have one CPU thread.

    Yields:
        Its URL and its process.

    Raises:
        RuntimeError: it did not start, or did not end well.
    """
    words = ["serve", str(bundle), "--port", "0", "--threads", "1", *options]
    command = [sys.executable, "-m", "sd35_trt", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("listening on "):
            raise RuntimeError("the server did not start")
        yield line.split()[-1], psutil.Process(process.pid)
        process.send_signal(signal.SIGTERM)
        if process.wait(_PATIENCE) != 0:
            raise RuntimeError(f"the server ended with status {process.returncode}")
    finally:
        process.kill()
        process.wait()
