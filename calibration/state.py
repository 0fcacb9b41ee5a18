"""What a calibration has found so far, kept beside its output so that it can go on after a stop."""

from __future__ import annotations

import contextlib
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_trt.errors import Sd35Error

_PROGRESS, _LOCK = "progress.json", "lock"

FIELDS = ("inputs", "activations", "bmm")


class State:
    """Amax values and finished batches of one calibration, on disk after every batch.

    Args:
        folder: a directory of its own.
        identity: everything the values depend on, JSON-serializable; what another identity left
            in the folder is deleted.

    Attributes:
        done: stage → number of its batches that are finished.
        amax: field of :class:`~sd35_trt.formats.calibration.Calibration` → its values so far.
        latents: the band of the latents so far, as
            :class:`~sd35_trt.calibration.latents.LatentBand` has it; empty at first.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        self.done: dict[str, int] = {}
        self.amax: dict[str, dict[str, float]] = {field: {} for field in FIELDS}
        self.latents: Mapping[str, Any] = {}
        try:
            record = json.loads((folder / _PROGRESS).read_text("utf-8"))
            if record["identity"] == self._identity:
                self.done, self.amax, self.latents = (
                    record[key] for key in ("done", "amax", "latents")
                )
                return
        except (OSError, ValueError, KeyError, TypeError):
            record = None  # none there, or damaged: begin anew
        for path in folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def finish(
        self, stage: str, amax: Mapping[str, Mapping[str, float]], latents: Mapping[str, Any]
    ) -> None:
        """Count one more batch of a stage, with the values so far, in one step on disk."""
        self.latents = latents
        for field, values in amax.items():
            largest = self.amax[field]
            for name, value in values.items():
                largest[name] = max(largest.get(name, 0.0), value)
        self.done[stage] = self.done.get(stage, 0) + 1
        data = {
            "identity": self._identity,
            "done": self.done,
            "amax": self.amax,
            "latents": self.latents,
        }
        partial = self.folder / f"{_PROGRESS}.partial"
        partial.write_text(json.dumps(data), "utf-8")
        partial.replace(self.folder / _PROGRESS)

    def save_tensors(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors that a later stage needs."""
        partial = self.folder / f"{name}.partial"
        save_file(tensors, partial)
        partial.replace(self.folder / name)

    def load_tensors(self, name: str) -> dict[str, Tensor]:
        """What :meth:`save_tensors` wrote.

        Raises:
            Sd35Error: gone or damaged.
        """
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise Sd35Error(
                f"{self.folder / name} cannot be read: {error}", f"delete {self.folder}"
            ) from error


@contextlib.contextmanager
def calibration_state(out: Path, identity: Mapping[str, Any]) -> Iterator[State]:
    """The state of the calibration that will become ``out``; deleted when the block ends well.

    Raises:
        Sd35Error: another process is at it.
    """
    out = out.absolute()
    folder = out.parent / f".{out.name}.calibrating"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Sd35Error(
                f"another process is calibrating to {out}", "wait for it, or choose another --out"
            ) from error
        yield State(folder, identity)
        shutil.rmtree(folder)
