"""Which engines stay in device memory, which are loaded for their stage, and which stream.

A pure function of byte counts and a budget: the plan before a build and the runtime share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .components import BRANCH_DENOISER, COMBINE, SHORT_DENOISER, control_name, runs_every_step

#: Phases of a picture in their order → their components.
PHASES = {
    "text": ("clip_l", "clip_g", "t5"),
    "image to image": ("vae_encoder",),
    "conditioning": ("conditioner",),
    "denoising": ("denoiser", SHORT_DENOISER, BRANCH_DENOISER, COMBINE),
    "decoding": ("vae_decoder",),
}


def phases_of(components: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """As :data:`PHASES`, of these components; ControlNets' come behind the transformer's."""
    names = list(components)
    nets = [name for name in names if control_name(name) is not None]
    own = {
        "conditioning": tuple(name for name in nets if not runs_every_step(name)),
        "denoising": tuple(name for name in nets if runs_every_step(name)),
    }
    phases = {
        phase: (*(name for name in usual if name in names), *own.get(phase, ()))
        for phase, usual in PHASES.items()
    }
    return {phase: there for phase, there in phases.items() if there}


#: TensorRT streams through two buffers: a layer computes from one while the next fills the other.
STREAM_BUFFERS = 2

#: How an engine's weights are held.
RESIDENT, LOADED, STREAMED = "resident", "loaded", "streamed"


@dataclass(frozen=True)
class Footprint:
    """What the planner needs to know of one engine.

    Attributes:
        name: of the component.
        phase: of the generation; engines run one after another, in the order given.
        weight_bytes: of its weights.
        activation_bytes: working memory while it runs, its inputs and outputs included.
        runs: how often it runs per picture.
        stream_bytes: the least device memory that its weights need when they stream from the
            host's memory; None where the engine cannot stream.
        keeps_activations: whether its working memory stays its own when it has run.
        every_step: whether it runs in every step, in turn with others that do: they are in memory
            together, all resident or none.
    """

    name: str
    phase: str
    weight_bytes: int
    activation_bytes: int
    runs: int = 1
    stream_bytes: int | None = None
    keeps_activations: bool = False
    every_step: bool = False


@dataclass(frozen=True)
class Placement:
    """Where an engine's weights are.

    Attributes:
        kind: :data:`RESIDENT`: always in device memory; :data:`LOADED`: before it runs, and freed
            after; :data:`STREAMED`: as loaded, with only ``device_bytes`` of it in device memory,
            the rest crossing the bus in each run.
        device_bytes: of weights in device memory while it runs.
        bus_bytes: of weights that cross the bus per picture.
        peak_bytes: device memory while it runs.
    """

    kind: str
    device_bytes: int
    bus_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Residency:
    """A plan.

    Attributes:
        placements: by engine.
        resident_bytes: of weights that stay.
        bus_bytes: of weights that cross the bus per picture.
        peak_bytes: device memory at its fullest.
        fits: whether the peak is within the budget.
    """

    placements: dict[str, Placement]
    resident_bytes: int
    bus_bytes: int
    peak_bytes: int
    fits: bool


def plan_residency(engines: Sequence[Footprint], budget: int | None, reserve: int = 0) -> Residency:
    """The plan that moves the fewest bytes per picture within a budget.

    Every set of engines to keep is tried; the others are loaded for their run, or streamed where
    they do not fit even alone. Of plans that move as many bytes, the one with the lowest peak.

    Args:
        budget: bytes of device memory; None keeps everything.
        reserve: bytes taken besides (the CUDA context).

    Returns:
        The best plan; where none fits, the one with the lowest peak.
    """
    if budget is None:
        return _place(engines, frozenset(e.name for e in engines), None, reserve)
    loop = tuple(engine.name for engine in engines if engine.every_step)
    units = [*([loop] if loop else []), *((e.name,) for e in engines if not e.every_step)]
    plans = [
        _place(engines, frozenset(itertools.chain.from_iterable(residents)), budget, reserve)
        for count in range(len(units) + 1)
        for residents in itertools.combinations(units, count)
    ]
    return min(
        plans,
        key=lambda p: (not p.fits, p.bus_bytes if p.fits else 0, p.peak_bytes, -p.resident_bytes),
    )


def _place(
    engines: Sequence[Footprint], residents: frozenset[str], budget: int | None, reserve: int
) -> Residency:
    resident = sum(e.weight_bytes for e in engines if e.name in residents)
    reserve += sum(e.activation_bytes for e in engines if e.keeps_activations)
    working = _working(engines)
    loop = [e for e in engines if e.every_step and e.name not in residents]
    # Of the engines that run in turn, what each holds.
    held = {e.name: e.weight_bytes for e in loop}
    if budget is not None and any(
        resident + reserve + working[e.name] + sum(held.values()) > budget for e in loop
    ):
        held |= {e.name: e.stream_bytes for e in loop if e.stream_bytes is not None}

    def others(engine: Footprint) -> int:
        beside = sum(held.values()) - held[engine.name] if engine in loop else 0
        return resident + reserve + working[engine.name] + beside

    placements: dict[str, Placement] = {}
    streamed: list[tuple[Footprint, int]] = []
    for engine in engines:
        weights, beside = engine.weight_bytes, others(engine)
        if engine.name in residents:
            placements[engine.name] = Placement(RESIDENT, weights, 0, beside)
        elif budget is None or beside + weights <= budget or engine.stream_bytes is None:
            placements[engine.name] = Placement(LOADED, weights, weights, beside + weights)
            if engine in loop:
                held[engine.name] = weights
        else:
            streamed.append((engine, engine.stream_bytes))
    # Weights that stream cross the bus once per run whatever part of them is held; holding more
    # than the other stages need anyway helps only an engine that runs more than once.
    peak = max((p.peak_bytes for p in placements.values()), default=0)
    for engine, least in streamed:
        beside = others(engine)
        limit = peak if budget is None or engine.runs == 1 else budget
        share = min(max(limit - beside, least), engine.weight_bytes)
        if engine in loop:
            held[engine.name] = share
        # What streams goes through buffers of this size, beside what is held.
        passing = engine.weight_bytes - max(share - least, 0)
        moved = engine.weight_bytes - passing + passing * engine.runs
        placements[engine.name] = Placement(STREAMED, share, moved, beside + share)
    peak = max(p.peak_bytes for p in placements.values())
    return Residency(
        placements={e.name: placements[e.name] for e in engines},
        resident_bytes=resident,
        bus_bytes=sum(p.bus_bytes for p in placements.values()),
        peak_bytes=peak,
        fits=budget is None or peak <= budget,
    )


def _working(engines: Sequence[Footprint]) -> Mapping[str, int]:
    """Working memory by engine, while it runs; of those that run in turn, the most of any."""
    working = {e.name: 0 if e.keeps_activations else e.activation_bytes for e in engines}
    loop = [e.name for e in engines if e.every_step]
    most = max((working[name] for name in loop), default=0)
    return {**working, **dict.fromkeys(loop, most)}
