"""The scheduler that a model is drawn with: read from its ``scheduler_config.json``, or refused.

``FlowMatchEulerDiscreteScheduler`` alone is computed. Names and defaults are diffusers':
https://huggingface.co/docs/diffusers/api/schedulers/flow_match_euler_discrete
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.formats.bundle import Scheduler
from sd35_trt.store.cache import StageCache

from .diffusers import Checkpoint, read_json
from .merged import AnyCheckpoint
from .structure import Structure

#: Where a model directory has it.
FOLDER = "scheduler"
FILE = "scheduler_config.json"

_CLASS = "FlowMatchEulerDiscreteScheduler"

# Of Large, Large-Turbo and Medium, by the files in their repositories.
_PUBLISHED = Scheduler(3.0, 1000.0)

# Where its configuration says nothing.
_DEFAULTS: dict[str, float | int] = {"shift": 1.0, "num_train_timesteps": 1000}

# Each changes sigmas or steps where diffusers takes its value for true.
_NOT_COMPUTED = (
    "use_dynamic_shifting",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "invert_sigmas",
    "shift_terminal",
    "stochastic_sampling",
)

# Of ``use_dynamic_shifting`` alone; diffusers loads no other.
_TIME_SHIFTS = ("exponential", "linear")

# Below, diffusers' FP32 makes another first sigma (1 becomes 1.0001 at 0.01); above, all steps but
# the last are one.
_SHIFTS = (0.1, 1000.0)
_TRAIN_TIMESTEPS = (1, 2**24)

_GIVE = f'give another: --scheduler FILE with {{"_class_name": "{_CLASS}", "shift": 3.0}}'


@dataclass(frozen=True)
class SchedulerSource:
    """A scheduler and where it was read.

    Attributes:
        values: as a bundle holds them.
        file: None where a model has none: its scheduler is the published models'.
    """

    values: Scheduler
    file: Path | None = None

    def hashes(self, cache: StageCache) -> dict[str, str]:
        """SHA-256 of the file in hex, by the name that manifests list it under."""
        return {} if self.file is None else {f"{FOLDER}/{FILE}": cache.file_hash(self.file)}


def find_scheduler(checkpoint: AnyCheckpoint | Structure, path: Path | None) -> SchedulerSource:
    """The scheduler of a model.

    Args:
        path: a ``scheduler_config.json``, or a folder with one, to take in its place.

    Raises:
        CheckpointError: it is not computed here; names the class, the option or the value.
        UsageError: there is no file at ``path``.
    """
    if path is not None:
        file = _named_file(path)
        return SchedulerSource(_read(file), file)
    if not isinstance(checkpoint, Checkpoint):
        return SchedulerSource(_PUBLISHED)
    # diffusers takes the class from the index, not from the file.
    listed = checkpoint.index.get("scheduler") or [None, None]
    if listed not in ([None, None], ["diffusers", _CLASS]):
        name = listed[-1] if isinstance(listed, list) else listed
        raise CheckpointError(
            f"{checkpoint.root / 'model_index.json'} lists the scheduler {name}, which is not "
            "computed here",
            _GIVE,
        )
    file = checkpoint.root / FOLDER / FILE
    return SchedulerSource(_read(file, None if listed == [None, None] else _CLASS), file)


def write_scheduler(folder: Path, scheduler: Scheduler) -> Path:
    """Write a scheduler's configuration into a folder; returns the file."""
    steps = int(scheduler.num_train_timesteps)
    config = {"_class_name": _CLASS, "shift": scheduler.shift, "num_train_timesteps": steps}
    file = folder / FILE
    file.write_text(json.dumps(config), "utf-8")
    return file


def _named_file(path: Path) -> Path:
    places = (path, path / FILE, path / FOLDER / FILE)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        reason = f"has no {FILE}" if path.is_dir() else "is missing"
        raise UsageError(f"--scheduler: {path} {reason}", f"give a {FILE}, or a folder with one")
    return file


def _read(file: Path, class_name: str | None = None) -> Scheduler:
    """The scheduler in a file.

    Args:
        class_name: where the file says none.

    Raises:
        CheckpointError: see :func:`find_scheduler`.
    """
    config = read_json(file, _GIVE)
    name = config.get("_class_name", class_name)
    if name is None:
        raise CheckpointError(f"{file} names no scheduler (_class_name)", _GIVE)
    if name != _CLASS:
        raise CheckpointError(f"{file} asks for {name}, which is not computed here", _GIVE)
    unusual = [option for option in _NOT_COMPUTED if config.get(option)]
    if config.get("time_shift_type", _TIME_SHIFTS[0]) not in _TIME_SHIFTS:
        unusual.append("time_shift_type")
    if unusual:
        settings = ", ".join(f"{option} = {json.dumps(config[option])}" for option in unusual)
        raise CheckpointError(f"{file} sets {settings}, which is not computed here", _GIVE)
    shift = _number(file, config, "shift", _SHIFTS)
    steps = _number(file, config, "num_train_timesteps", _TRAIN_TIMESTEPS)
    return Scheduler(float(shift), float(steps))


def _number(
    file: Path, config: Mapping[str, Any], key: str, bounds: tuple[float, float]
) -> float | int:
    """A number within bounds; a whole one where the default is."""
    default, (low, high) = _DEFAULTS[key], bounds
    value, whole = config.get(key, default), isinstance(default, int)
    # NaN is in no range; True is an int.
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not (number and low <= value <= high):
        kind = "a whole number" if whole else "a number"
        raise CheckpointError(
            f"{file} has {key} = {json.dumps(value)}, not {kind} from {low:g} to {high:g}", _GIVE
        )
    return value
