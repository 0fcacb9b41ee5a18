"""What TensorRT calls while it compiles: where the plan is written, and progress.

The library's interfaces are subclassed in functions because it is imported at run time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

# Seconds between two reports: a convolution's kernels are a hundred thousand steps.
_INTERVAL = 0.1


def write_plan(trt: Any, builder: Any, network: Any, config: Any, stream: BinaryIO) -> int:
    """Compile a network and write the plan.

    Args:
        trt: the library; from 10.13 on, it writes without a second copy of the plan in memory.

    Returns:
        Bytes of the plan; 0 where the library made none, and its log says why.

    Raises:
        OSError: it cannot be written.
    """
    if not hasattr(trt, "IStreamWriter"):
        plan = builder.build_serialized_network(network, config)
        return 0 if plan is None else stream.write(memoryview(plan))
    writer = _stream_writer(trt, stream)
    success = builder.build_serialized_network_to_stream(network, config, writer)
    if writer.error is not None:
        raise writer.error
    return int(writer.bytes) if success else 0


def _stream_writer(trt: Any, stream: BinaryIO) -> Any:
    """An ``IStreamWriter`` with ``bytes``, how many were written, and ``error``, an OSError or
    None.
    """

    class Writer(trt.IStreamWriter):
        """Writes the plan piece by piece; an error is kept, as the library would swallow it."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.bytes = 0
            self.error: OSError | None = None

        def write(self, data: bytes) -> int:
            if self.error is None:
                try:
                    count = stream.write(data)
                except OSError as error:
                    self.error = error
                else:
                    self.bytes += count
                    return count
            return -1

    return Writer()


def progress_monitor(trt: Any, progress: Callable[[float, str], None]) -> Any:
    """An ``IProgressMonitor``; the caller keeps it alive, a configuration does not.

    Args:
        trt: the library.
        progress: called with a fraction that grows to 1, and the phase.
    """

    class Monitor(trt.IProgressMonitor):
        """Turns nested phases into one growing fraction."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            # Innermost last: name, steps, steps done.
            self._phases: list[tuple[str, int, int]] = []
            self._reached = 0.0
            self._next = 0.0
            self._lock = threading.Lock()

        def _report(self) -> None:
            fraction, share = 0.0, 1.0
            for _, steps, done in self._phases:
                share /= steps
                fraction += share * done
            self._reached = max(self._reached, min(fraction, 1.0))
            now = time.monotonic()
            if now < self._next and self._phases:  # the last report is not left out
                return
            self._next = now + _INTERVAL
            note = self._phases[-1][0].lower() if self._phases else "writing"
            progress(self._reached, note)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            with self._lock:
                self._phases.append((phase, max(steps, 1), 0))
                self._report()

        def step_complete(self, phase: str, step: int) -> bool:
            with self._lock:
                for i, (name, steps, _) in enumerate(self._phases):
                    if name == phase:
                        self._phases[i] = (name, steps, step + 1)
                self._report()
            return True

        def phase_finish(self, phase: str) -> None:
            with self._lock:
                self._phases = [entry for entry in self._phases if entry[0] != phase]
                self._report()

    return Monitor()
