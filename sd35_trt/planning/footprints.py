"""What each engine takes of a device's memory on a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sd35_trt.backends import BACKENDS, Backend
from sd35_trt.components import runs_every_step
from sd35_trt.residency import STREAM_BUFFERS, Footprint, phases_of
from sd35_trt.targets import Target, choose_builder

if TYPE_CHECKING:
    from sd35_trt.export.sizes import Sizes


def footprints(sizes: Mapping[str, Sizes], steps: int, target: Target) -> list[Footprint]:
    """The engines of a model on a target.

    Args:
        sizes: by component.
        steps: that the denoiser runs.
    """
    backend = BACKENDS[choose_builder(target)]
    return [
        Footprint(
            name,
            phase,
            sizes[name].weights,
            _working_bytes(sizes[name], backend),
            steps if runs_every_step(name) else 1,
            min(STREAM_BUFFERS * sizes[name].largest_layer, sizes[name].weights)
            if backend.can_stream(name)
            else None,
            backend.keeps(name),
            runs_every_step(name),
        )
        for phase, names in phases_of(sizes).items()
        for name in names
    ]


def reserve(target: Target) -> int:
    """Bytes of device memory that a process takes beside its engines."""
    return 0 if target.name == "cpu" else BACKENDS[choose_builder(target)].context_bytes


def activation_bytes(sizes: Sizes, backend: Backend) -> int:
    """An engine's working memory: the compiler's figure, or the estimate."""
    if sizes.compiled is not None:
        return sizes.compiled
    return sizes.working(backend.allocation) + backend.workspace_bytes


def _working_bytes(sizes: Sizes, backend: Backend) -> int:
    """What an engine takes beside its weights, its inputs and outputs included."""
    # The estimate has them already.
    return activation_bytes(sizes, backend) + (0 if sizes.compiled is None else sizes.ports)
