"""What a benchmark is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sd35_trt.runtime.request import EXACT

#: The words for diffusers' pipeline in ``--against``: eager, or its blocks compiled.
DIFFUSERS = "diffusers"
DIFFUSERS_COMPILED = "diffusers-compiled"

#: Both of them.
WITH_DIFFUSERS = (DIFFUSERS, DIFFUSERS_COMPILED)

_PROMPT = "a small red circle to the left of a large blue square"


@dataclass(frozen=True)
class BenchOptions:
    """What ``sd35-trt bench`` takes.

    Attributes:
        bundle: the bundle's directory.
        runs: measured runs.
        warmup: runs before them.
        steps, size, guidance: None takes the bundle's.
        batch: pictures in a run, of one prompt.
        step_cache: of the bundle alone; as :meth:`sd35_trt.runtime.Pipeline.request` takes it.
        prompt: a number is added for each run.
        against: None, ``diffusers``, ``diffusers-compiled``, or another bundle's directory.
        model: with ``diffusers``, the checkpoint behind the bundle; None is mini.
        threads: CPU threads of an engine, and of PyTorch; None is all that the process may use.
        device, vram_budget, trust_kernels: as :meth:`sd35_trt.runtime.Pipeline.load` takes them.
        command: recorded in the result.
    """

    bundle: Path
    runs: int = 7
    warmup: int = 2
    steps: int | None = None
    size: tuple[int, int] | None = None
    batch: int = 1
    guidance: float | None = None
    step_cache: str = EXACT
    prompt: str = _PROMPT
    against: str | None = None
    model: str | None = None
    threads: int | None = None
    device: str | None = None
    vram_budget: int | None = None
    trust_kernels: bool = False
    command: str = ""
