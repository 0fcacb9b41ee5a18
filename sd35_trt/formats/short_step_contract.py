"""What a manifest has to state of short steps; see :mod:`.contract`."""

from __future__ import annotations

from collections.abc import Iterator

from sd35_trt.components import SHORT_DENOISER
from sd35_trt.features import STEP_CACHE

from .bundle import Component, Manifest


def short_step_faults(manifest: Manifest) -> Iterator[str]:
    """What is wrong with the denoiser of short steps, its ports' shapes aside."""
    full, short = manifest.component("denoiser"), manifest.component(SHORT_DENOISER)
    if not manifest.features.short_steps:
        if STEP_CACHE in manifest.requires:
            yield "its short steps compute no block"
        if short is not None:
            yield f"it has a {SHORT_DENOISER} and no short steps"
        return
    if short is None:
        yield f"it has no {SHORT_DENOISER}"
    elif full is not None:
        yield from _mismatches(full, short)


def _mismatches(full: Component, short: Component) -> Iterator[str]:
    """In what the two differ that are given the same, and each other's."""
    groups = {group.down: group for group in full.adapters}
    yield from (
        f"{short.name} takes adapters of {group.down}, the denoiser takes others"
        for group in short.adapters
        if groups.get(group.down) != group
    )
    given = {port.name: port.dtype for port in full.inputs}
    changes = [port.dtype for port in full.outputs if port.name == "change"]
    given |= {name: dtype for name in ("last_change", "earlier_change") for dtype in changes}
    yield from (
        f"{short.name} takes {port.name} in {port.dtype}, the denoiser has it in {given[port.name]}"
        for port in short.inputs
        if given.get(port.name, port.dtype) != port.dtype
    )
