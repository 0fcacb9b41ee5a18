"""Triton in a process of its own, from the wheel nvidia-pytriton, for scripts and tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Until it has loaded its models, and until it has ended.
_PATIENCE = 120.0


@dataclass(frozen=True)
class Running:
    """Where a server listens: ``host:port``."""

    http: str
    grpc: str


def triton_root() -> Path | None:
    """Where the wheel has the server; None where it is not installed."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / "tritonserver"


@contextlib.contextmanager
def triton(repository: Path, log: Path | None = None) -> Iterator[Running]:
    """A server of a model repository, whose models run in this Python.

    Args:
        log: what it prints goes there.

    Raises:
        RuntimeError: it is not installed, or did not start.
    """
    root = triton_root()
    if root is None:
        raise RuntimeError("pip install nvidia-pytriton: its wheel has the server")
    with tempfile.TemporaryDirectory() as folder:
        backends = Path(folder) / "backends"
        shutil.copytree(root / "backends", backends)
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = root / "python_backend_stubs" / version / "triton_python_backend_stub"
        shutil.copy(stub, backends / "python")
        http, grpc = _free_port(), _free_port()
        command = [
            str(root / "bin" / "tritonserver"), f"--model-repository={repository}",
            f"--backend-directory={backends}", "--allow-metrics=false",
            "--http-address=127.0.0.1", f"--http-port={http}",
            "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        ]  # fmt: skip
        libraries = root.parents[1] / "nvidia_pytriton.libs"
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": f"{libraries}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            # By this, the stub finds the packages of this environment.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        }
        with Path(os.devnull if log is None else log).open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            _wait(process, http)
            yield Running(f"127.0.0.1:{http}", f"127.0.0.1:{grpc}")
            process.send_signal(signal.SIGTERM)
            process.wait(_PATIENCE)
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def _wait(process: subprocess.Popen[bytes], port: int) -> None:
    """Until it answers, which it does when every model is loaded."""
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.05)
    raise RuntimeError("Triton did not start")
