"""The denoiser as a program of PyTorch's operators: graphs for what a step has, and has not.

What a bundle can take and a step is not given costs the step nothing: which graphs are called
depends on the shapes of the inputs.
"""

from __future__ import annotations

from typing import Protocol

import torch

from sd35_trt.formats.bundle import ADAPTER_SCALES, RESIDUALS
from sd35_trt.formats.program import Program, View

from .branches import MaskedRows
from .denoiser_segments import Block, Head, Tail
from .ports import Ports
from .program_heads import (
    BranchChange,
    BranchResiduals,
    BranchScales,
    GuidedHead,
    PlainHead,
    SkippingHead,
)
from .program_steps import (
    ADAPTING,
    CONTROLLED,
    NOT_ADAPTING,
    NOT_CONTROLLED,
    NOT_SKIPPING,
    SKIPPING,
    Conditions,
    ProgramSteps,
)
from .short_steps import Change, Extrapolation


class Denoiser(Protocol):
    """What is read of :class:`sd35_trt.export.denoiser.Denoiser`."""

    guided: bool
    skipping: bool
    dtype: torch.dtype
    inputs: Ports
    head: Head
    blocks: list[Block]
    tail: Tail
    masked_rows: MaskedRows
    rows: int
    short: bool
    first_blocks: int
    change: Change
    extrapolation: Extrapolation

    def control_of(self, block: int) -> int:
        """The block of a ControlNet that a block's residuals are of."""


class _DenoiserSteps(ProgramSteps):
    """The steps of a denoiser, in order."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self._own = denoiser
        self._names: dict[tuple[object, ...], str] = {}
        self._scales = "branches_scales" if denoiser.guided else ADAPTER_SCALES
        self._modulation = "branches_modulation" if denoiser.guided else "modulation"
        # Steps with two branches, and with three.
        self._two: Conditions = (NOT_SKIPPING,) if denoiser.skipping else ()

    def head(self) -> None:
        """What the blocks read."""
        own, inputs = self._own, self._own.inputs
        head = GuidedHead(own.head, inputs) if own.guided else PlainHead(own.head)
        self.call("head", head, "part.", "head.", self._two)
        adapting = (ADAPTING,)
        if own.guided and ADAPTER_SCALES in inputs:
            self.call("scales", BranchScales(inputs, False), conditions=(*self._two, *adapting))
        if not own.skipping:
            return
        skipping = SkippingHead(own.head, inputs, own.masked_rows)
        self.call("skipping_head", skipping, "part.", "two.head.", (SKIPPING,))
        if ADAPTER_SCALES in inputs:
            scales = BranchScales(inputs, True)
            self.call("skipping_scales", scales, conditions=(SKIPPING, *adapting))
        if RESIDUALS in inputs:
            residuals = BranchResiduals(inputs)
            self.call("skipping_residuals", residuals, conditions=(SKIPPING, CONTROLLED))

    def blocks(self) -> None:
        """All blocks, or the first ones and what the others are taken to change."""
        own = self._own
        self.view(View("tokens", "grid", "image"))
        first, image = 0, "image"
        for number, block in enumerate(own.blocks):
            self.view(View("rows", self._modulation, "rows", first, block.rows))
            first += block.rows
            following = "kept" if number + 1 == own.first_blocks and not own.short else "image"
            for adapted in (False, True) if block.adapter_inputs else (False,):
                self._block(number, block, adapted, (image, following))
            image = following
        if own.short:
            self.call("extrapolation", own.extrapolation)
        elif own.first_blocks:
            self.call("change", own.change, conditions=self._two)
            if own.skipping:
                change = BranchChange(own.change, own.inputs)
                self.call("skipping_change", change, conditions=(SKIPPING,))

    def _block(self, number: int, block: Block, adapted: bool, images: tuple[str, str]) -> None:
        """A block, with adapters or without.

        Args:
            images: names of the image before and after it.
        """
        own = self._own
        name = self._names.setdefault(block.signature(), f"block{len(self._names)}")
        conditions: Conditions = ()
        inputs = {"modulation": "rows", "image": images[0]}
        outputs = {"image": images[1]}
        if block.adapter_inputs:
            conditions = (ADAPTING if adapted else NOT_ADAPTING,)
        if adapted and block.adapted is not None:
            name += "_adapted"
            inputs[ADAPTER_SCALES] = self._scales
            for group in block.adapted.groups:
                for port in group.ports(own.dtype):
                    inputs[port] = f"{port}_own"
                    place = group.index(number)
                    self.view(View("stack", port, f"{port}_own", place, 1, conditions=conditions))
        weights = f"part.transformer_blocks.{number}."
        controlled = RESIDUALS in own.inputs and not block.last
        plain = (*conditions, NOT_CONTROLLED) if controlled else conditions
        self.call(name, block.variant(adapted, None), weights, "block.", plain, inputs, outputs)
        if not controlled:
            return
        with_residuals = block.variant(adapted, own.dtype)
        for third in (False, True) if own.skipping else (False,):
            branches: Conditions = (SKIPPING,) if third else self._two
            given = (*conditions, CONTROLLED, *branches)
            values = "branches_residuals" if third else RESIDUALS
            place = own.control_of(number)
            self.view(View("stack", values, "residual", place, 1, conditions=given))
            read = {**inputs, RESIDUALS: "residual"}
            controls = f"{name}_controlled"
            self.call(controls, with_residuals, weights, "block.", given, read, outputs)

    def tail(self) -> None:
        """What comes of the image."""
        tail = self._own.tail
        first = self._own.rows - tail.rows
        self.view(View("rows", self._modulation, "rows", first, tail.rows))
        self.view(View("grid", "image", "image", like="grid"))
        read = {"modulation": "rows"}
        self.call("tail", tail.without_third(), "part.", conditions=self._two, inputs=read)
        if self._own.skipping:
            self.call("skipping_tail", tail.completing(), "part.", "", (SKIPPING,), read)


def denoiser_program(denoiser: Denoiser) -> Program:
    """See :meth:`sd35_trt.export.ports.ComponentModule.program`."""
    steps = _DenoiserSteps(denoiser)
    steps.head()
    steps.blocks()
    steps.tail()
    return steps.program()
