"""Which steps of a run are short, and what full ones leave for them."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sd35_trt.components import SHORT_DENOISER
from sd35_trt.formats.bundle import Component, Manifest, Port
from sd35_trt.formats.step_cache import Coefficients

from .devices.device import Buffer, Device
from .sessions.session import Session

CHANGE = "change"
COEFFICIENTS = "change_coefficients"
LAST, EARLIER = "last_change", "earlier_change"

#: Where a full step's change goes that no short step reads; the two others are remembered.
SCRATCH = 2

#: Changes that a run with short steps holds.
SLOTS = 3

# SD3's patches are 2×2 latent pixels.
_PATCH = 4


@dataclass(frozen=True)
class PlannedStep:
    """One step of a run.

    Attributes:
        coefficients: of the last remembered change and of that before it; None of a full step.
        slot: where a full step puts its change; of a short one, where the last is.
    """

    coefficients: Coefficients | None = None
    slot: int = SCRATCH


@dataclass(frozen=True)
class StepKinds:
    """What decides about a run's steps besides its plan.

    Attributes:
        third: of each, whether it has a third branch of guidance.
        nets: of each, the ControlNets that run in it.
    """

    third: Sequence[bool]
    nets: Sequence[Hashable]


def planned_steps(
    coefficients: Sequence[Coefficients | None], kinds: StepKinds
) -> tuple[PlannedStep, ...]:
    """The steps of a run; empty where none of them is short.

    A step is short where the plan says so, the two full ones before it that the plan means are
    computed, the same ControlNets ran in them, and it has no third branch. Others that are full
    although the plan has them short leave nothing: coefficients are those of the plan's.

    Args:
        coefficients: of the plan's steps. The run's are the last of them: image to image leaves
            out the first.
        kinds: of the run's steps.
    """
    steps: list[PlannedStep] = []
    remembered: list[int] = []
    for step, pair in enumerate(coefficients[len(coefficients) - len(kinds.third) :]):
        if pair is None:
            remembered.append(step)
            steps.append(PlannedStep(None, (len(remembered) - 1) % 2))
            continue
        nets = {kinds.nets[other] for other in (*remembered[-2:], step)}
        if len(remembered) < 2 or kinds.third[step] or len(nets) > 1:
            steps.append(PlannedStep())
        else:
            steps.append(PlannedStep(pair, (len(remembered) - 1) % 2))
    return tuple(steps) if any(step.coefficients for step in steps) else ()


def step_coefficients(planned: Sequence[PlannedStep], steps: int, count: int) -> np.ndarray:
    """Coefficients of each step and image, float32 [steps, count, 2]; zeros of full steps.

    Args:
        planned: may be empty: all steps are full.
    """
    values = np.zeros((steps, count, 2), np.float32)
    for number, step in enumerate(planned):
        if step.coefficients is not None:
            values[number] = step.coefficients
    return values


def change_port(manifest: Manifest) -> Port | None:
    """What full steps put out for short ones; None in a bundle that has none."""
    denoiser = manifest.component("denoiser")
    if denoiser is None or not manifest.features.short_steps:
        return None
    return denoiser.output(CHANGE)


def change_bytes(manifest: Manifest, dims: Mapping[str, int]) -> int:
    """Of one change in a run; 0 in a bundle without short steps.

    Args:
        dims: ``batch``, ``height`` and ``width`` in latent pixels; those left out count as least.
    """
    port, denoiser = change_port(manifest), manifest.component("denoiser")
    if port is None or denoiser is None:
        return 0
    sizes = {
        d: dims.get(d, denoiser.bounds.get(d, (1, 1))[0]) for d in ("batch", "height", "width")
    }
    shape = _change_shape(manifest, port, sizes["batch"], sizes["height"], sizes["width"])
    return math.prod(shape) * np.dtype(port.dtype).itemsize


def _change_shape(
    manifest: Manifest, port: Port, batch: int, height: int, width: int
) -> tuple[int, ...]:
    samples = 2 * batch if manifest.guided else batch
    return port.resolve(samples=samples, pixels=height * width // _PATCH)


class Changes:
    """Buffers of changes, made when they are first asked for.

    Args:
        latents: shape of the run's, [B, C, h, w].
    """

    def __init__(self, device: Device, manifest: Manifest, latents: tuple[int, ...]) -> None:
        self._device = device
        batch, _, height, width = latents
        port = change_port(manifest)
        self._shape = () if port is None else _change_shape(manifest, port, batch, height, width)
        self._dtype = np.dtype(np.float32 if port is None else port.dtype)
        self._slots: dict[int, Buffer] = {}

    def __getitem__(self, slot: int) -> Buffer:
        if slot not in self._slots:
            self._slots[slot] = self._device.empty(self._shape, self._dtype)
        return self._slots[slot]


class StepEngines:
    """The denoiser of full steps and, where the run has some, that of short ones.

    Args:
        manifest: of their bundle.
        full: the ``denoiser``.
        short: the ``denoiser_short``; None where no step is short.

    Attributes:
        full, short: as given.
        remembers: whether full steps put out a change.
    """

    def __init__(self, manifest: Manifest, full: Session, short: Session | None = None) -> None:
        self.full = full
        self.short = short
        self.remembers = change_port(manifest) is not None
        self._manifest = manifest
        self._full_inputs = _inputs(manifest.component("denoiser"))
        self._short_inputs = _inputs(manifest.component(SHORT_DENOISER))

    def changes(self, device: Device, latents: tuple[int, ...]) -> Changes:
        """Buffers for a run's changes.

        Args:
            latents: their shape.
        """
        return Changes(device, self._manifest, latents)

    def run(
        self,
        step: tuple[bool, int],
        feed: Mapping[str, Buffer],
        outputs: Mapping[str, Buffer],
        changes: Changes,
    ) -> None:
        """Queue a step.

        Args:
            step: whether it is short, and its slot; see :class:`PlannedStep`.
            feed: inputs of either, by port.
            outputs: of both.
        """
        is_short, slot = step
        if not self.remembers:
            self.full.run(feed, outputs)
        elif is_short and self.short is not None:
            remembered = {LAST: changes[slot], EARLIER: changes[1 - slot]}
            self.short.run(_some({**feed, **remembered}, self._short_inputs), outputs)
        else:
            everything = {**outputs, CHANGE: changes[slot]}
            self.full.run(_some(feed, self._full_inputs), everything)


def _inputs(component: Component | None) -> frozenset[str]:
    return frozenset(port.name for port in component.inputs) if component else frozenset()


def _some(feed: Mapping[str, Buffer], names: Collection[str]) -> dict[str, Buffer]:
    return {name: buffer for name, buffer in feed.items() if name in names}
