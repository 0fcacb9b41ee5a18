"""What a calibration has found so far, kept beside its output so that it can go on after a stop."""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct, field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sd35_trt.errors import Sd35Error
from sd35_trt.formats.band import LatentStatistics
from sd35_trt.formats.calibration import Provenance
from sd35_trt.formats.reading import Count, Name, Positive, read_document
from sd35_trt.store.disk import written_in

_PROGRESS, _LOCK = "progress.json", "lock"

# A line for every layer of the model.
_LARGEST = 64 << 20


class Identity(Provenance, frozen=True, kw_only=True):
    """Everything that a calibration's values depend on: ``command`` is None.

    Attributes:
        batch: prompts drawn at once.
    """

    batch: Positive


class Amax(Struct, frozen=True):
    """Values so far, by field of :class:`~sd35_trt.formats.calibration.Calibration`."""

    inputs: dict[Name, float] = field(default_factory=dict)
    activations: dict[Name, float] = field(default_factory=dict)
    bmm: dict[Name, float] = field(default_factory=dict)

    def widened(self, other: Amax) -> Amax:
        """With the larger of both, name by name."""
        return Amax(
            _larger(self.inputs, other.inputs),
            _larger(self.activations, other.activations),
            _larger(self.bmm, other.bmm),
        )


def _larger(one: dict[str, float], other: dict[str, float]) -> dict[str, float]:
    return {**one, **{name: max(one.get(name, 0.0), value) for name, value in other.items()}}


class Findings(Struct, frozen=True):
    """What ``progress.json`` holds.

    Attributes:
        done: stage → number of its batches that are finished.
        latents: their band; None before the first was drawn.
    """

    identity: Identity
    done: dict[Name, Count] = field(default_factory=dict)
    amax: Amax = field(default_factory=Amax)
    latents: LatentStatistics | None = None


class State:
    """Amax values and finished batches of one calibration, on disk after every batch.

    Args:
        folder: a directory of its own.
        identity: what another identity left in the folder is deleted.

    Attributes:
        findings: so far.
    """

    def __init__(self, folder: Path, identity: Identity) -> None:
        self.folder = folder
        self.findings = Findings(identity)
        try:
            findings = read_document(
                folder / _PROGRESS, Findings, _LARGEST, Sd35Error, "begin anew"
            )
        except Sd35Error:
            findings = None  # none there, or damaged
        if findings is not None and findings.identity == identity:
            self.findings = findings
            return
        for path in folder.iterdir():
            if path.name != _LOCK:
                path.unlink()

    def finish(self, stage: str, amax: Amax, latents: LatentStatistics | None) -> None:
        """Count one more batch of a stage, with the values so far, in one step on disk."""
        before = self.findings
        done = {**before.done, stage: before.done.get(stage, 0) + 1}
        self.findings = Findings(before.identity, done, before.amax.widened(amax), latents)
        partial = self.folder / f"{_PROGRESS}.partial"
        partial.write_bytes(msgspec.json.encode(self.findings))
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
def calibration_state(out: Path, identity: Identity) -> Iterator[State]:
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
        with written_in(folder):
            yield State(folder, identity)
        shutil.rmtree(folder)
