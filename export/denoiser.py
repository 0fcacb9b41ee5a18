"""The denoiser: one sampling step of the MMDiT.

``denoised = latents - sigma * velocity`` and
``next = a * latents + b * denoised + c * previous_denoised`` with the step's coefficients
(a, b, c), all in FP32. Sigma, guidance and coefficients are per sample, so that samples at
different steps can share a batch.

Where steps can be short, there are two denoisers; see :mod:`.short_steps`.

It is traced in segments, of which the blocks repeat: 38 blocks cost what one costs, and the graph
is put together from copies.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from sd35_trt.dialects import Dialect
from sd35_trt.features import PLAIN, Features
from sd35_trt.formats.bundle import ADAPTER_SCALES, RESIDUALS
from sd35_trt.formats.program import Program

from .adapters import adapter_groups, take_adapters
from .branches import Branches, MaskedRows, SkippingBranches
from .denoiser_program import denoiser_program
from .denoiser_segments import Block, BranchTail, Head, Tail
from .linker import Linker
from .modules import modulated_norms, modulation_dtype, modulation_rows
from .ports import ComponentModule, Ports
from .range_guard import carries_fp32
from .short_steps import (
    CHANGE,
    COEFFICIENTS,
    REMEMBERED,
    Change,
    Extrapolation,
    change_dtype,
)
from .trace import empty_model, trace


class Denoiser(ComponentModule):
    """The component; with ``guided``, both guidance branches run as one batch inside the graph.

    ControlNets' ``residuals`` are of both branches, or one token of zeros that is added to all.
    With layer skipping, the first images of a batch have a third branch: as many as its layer mask
    has rows, which may be none.

    Args:
        short: whether it is the denoiser of short steps, which computes the first blocks.
        branch: whether it is the denoiser of one branch, which neither guides nor updates.

    Attributes:
        first_blocks: of a short step; 0 where all steps are full ones.
        short: as given.
    """

    def __init__(
        self,
        transformer: Any,
        guided: bool,
        features: Features = PLAIN,
        short: bool = False,
        branch: bool = False,
    ) -> None:
        super().__init__()
        self.part = transformer
        self.guided = guided
        self.short = short
        self.first_blocks = features.short_steps
        self.dtype = transformer.context_embedder.dtype
        context_dtype = transformer.context_embedder.output_dtype
        modulated = modulation_dtype(transformer)
        config, width = transformer.config, transformer.inner_dim
        self.rows = sum(map(modulation_rows, modulated_norms(transformer)))
        latents = (torch.float32, ("batch", config.in_channels, "height", "width"))
        per_sample = (torch.float32, ("batch",))
        update: Ports = {
            "coefficients": (torch.float32, ("batch", 3)),
            "previous_denoised": latents,
        }
        self.inputs = {
            "latents": latents,
            "sigma": per_sample,
            **({} if branch else update),
            "context": (context_dtype, ("batch", "tokens", config.caption_projection_dim)),
            "modulation": (modulated, ("batch", self.rows, width)),
        }
        if guided:
            self.inputs["uncond_context"] = self.inputs["context"]
            self.inputs["uncond_modulation"] = self.inputs["modulation"]
            self.inputs["guidance"] = per_sample
        if features.inpainting:
            self.inputs["mask"] = (torch.float32, ("batch", 1, "height", "width"))
            self.inputs["source"] = self.inputs["source_noise"] = latents
            self.inputs["next_sigma"] = per_sample
        self.skipping = features.skip_layer_guidance
        if self.skipping:
            layers = len(transformer.transformer_blocks)
            self.inputs["layer_mask"] = (torch.float32, ("skipped", layers))
            self.inputs["skip_guidance"] = per_sample
        self.controls = features.control_blocks
        if self.controls:
            residuals = (self.controls, "residual_samples", "residual_pixels", width)
            self.inputs[RESIDUALS] = (self.dtype, residuals)
        self.outputs = {} if branch else {"next_latents": latents}
        self.outputs["denoised"] = latents
        tail_ports = self.inputs, self.outputs
        if self.first_blocks:
            tokens = ("samples", "pixels", width)
            changed = change_dtype(transformer, self.first_blocks, self.dtype), tokens
            if short:
                coefficients = torch.float32, ("batch", 2)
                remembered = dict.fromkeys(REMEMBERED, changed)
                self.inputs = {**self.inputs, COEFFICIENTS: coefficients, **remembered}
            else:
                self.outputs = {**self.outputs, CHANGE: changed}
        adapters = bool(features.adapter_ranks)
        groups = adapter_groups(transformer, "denoiser") if adapters else []
        count = self.first_blocks if short else len(transformer.transformer_blocks)
        groups = [group for group in groups if min(group.blocks) < count]
        if adapters:
            take_adapters(self, groups, self.dtype, "batch")
        self.head = Head(transformer, self.dtype, latents)
        dtypes = {
            "image": self.head.output_dtype,
            "context": context_dtype,
            "modulation": modulated,
        }
        self.blocks = []
        last = transformer.transformer_blocks[-1]
        for number, layers in enumerate(transformer.transformer_blocks[:count]):
            block = Block(layers, dtypes, self.dtype, width)
            if adapters:
                block.take_adapters(groups, number, self.dtype)
            dtypes = {"image": block.stream, "context": block.stream, "modulation": modulated}
            self.blocks.append(block)
        if self.first_blocks:
            stream = torch.float32 if carries_fp32(last) else self.dtype
            kept = self.blocks[self.first_blocks - 1].stream
            change = change_dtype(transformer, self.first_blocks, self.dtype)
            self.change = Change(stream, kept, change, width)
            self.extrapolation = Extrapolation(kept, change, stream, width, guided)
            dtypes = {**dtypes, "image": stream, "context": stream}
        tail = BranchTail if branch else Tail
        self.tail = tail(transformer, dtypes, self.dtype, *tail_ports, guided)
        if self.skipping:
            rows_of_blocks = [block.rows for block in self.blocks]
            self.masked_rows = MaskedRows(rows_of_blocks, self.inputs["modulation"])

    def trace(self, dialect: Dialect) -> ir.Model:
        """See :func:`sd35_trt.export.trace.trace`."""
        model = empty_model(self, dialect)
        link = Linker(model.graph)
        values: dict[str, ir.Value] = {str(v.name): v for v in model.graph.inputs}
        context, modulation = values["context"], values["modulation"]
        latents = values["latents"]
        scales = values.get(ADAPTER_SCALES)
        head = trace(self.head, dialect).graph
        (image,) = link.segment(head, {"latents": latents}, "head", "part.")
        if self.guided:
            branches = self._branches(link, values, dialect)
            if scales is not None:
                scales = branches.join(scales, scales)
            context = branches.join(values["uncond_context"], context)
            modulation = branches.join_modulation(values["uncond_modulation"], modulation)
            image = branches.join(image, image)
        grid = link.node("Shape", image)
        image = link.node("Reshape", image, link.constant([0, -1, int(self.part.inner_dim)]))  # type: ignore[arg-type]
        traced: dict[tuple[object, ...], ir.Graph] = {}
        kept, first = image, 0
        for k, block in enumerate(self.blocks):
            signature = block.signature()
            if signature not in traced:
                traced[signature] = trace(block, dialect).graph
            rows = link.rows(modulation, first, block.rows)
            inputs = {"image": image, "context": context, "modulation": rows}
            if block.adapted is not None and scales is not None:
                inputs[ADAPTER_SCALES] = scales
                for group in block.adapted.groups:
                    place = group.index(k)
                    for name in group.ports(self.dtype):
                        inputs[name] = link.rows(values[name], place, 1, axis=0)
            *_, image = out = link.segment(
                traced[signature], inputs, f"block{k}", f"part.transformer_blocks.{k}.", "block."
            )
            context = out[0]
            first += block.rows
            if RESIDUALS in values and not block.last:
                residual = self._residual(link, values[RESIDUALS], k)
                if self.skipping:
                    residual = branches.of_both(residual)
                image = link.node("Add", image, link.cast(residual, block.stream))
            if k + 1 == self.first_blocks:
                kept = image
        changes: list[ir.Value] = []
        if self.short:
            remembered = {name: values[name] for name in (COEFFICIENTS, *REMEMBERED)}
            extrapolation = trace(self.extrapolation, dialect).graph
            (image,) = link.segment(
                extrapolation, {"image": image, **remembered}, "extrapolation", ""
            )
        elif self.first_blocks:
            ends = {"image": image, "kept": kept}
            if self.guided:
                ends = {name: branches.both(value) for name, value in ends.items()}
            changes = link.segment(trace(self.change, dialect).graph, ends, "change", "")
        image = link.node("Reshape", image, grid)
        modulation = link.rows(modulation, self.rows - self.tail.rows, self.tail.rows)
        if self.guided:
            image, modulation = branches.complete(image), branches.complete(modulation)
        inputs = {**values, "image": image, "modulation": modulation}
        outputs = link.segment(trace(self.tail, dialect).graph, inputs, "tail", "part.")
        outputs += changes
        for value, port in zip(outputs, self.declared_ports()[-len(outputs) :], strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.shape)
            model.graph.outputs.append(value)
        return model

    def _branches(self, link: Linker, values: dict[str, ir.Value], dialect: Dialect) -> Branches:
        if not self.skipping:
            return Branches(link)
        masked_rows = trace(self.masked_rows, dialect).graph
        return SkippingBranches(link, values["latents"], values["layer_mask"], masked_rows)

    def _residual(self, link: Linker, residuals: ir.Value, block: int) -> ir.Value:
        """What ControlNets add to the image after a block."""
        own = link.rows(residuals, self.control_of(block), 1, axis=0)
        return link.node("Squeeze", own, link.constant([0]))

    def control_of(self, block: int) -> int:
        """The block of a ControlNet that a block's residuals are of, by diffusers' arithmetic."""
        interval = len(self.part.transformer_blocks) / self.controls  # type: ignore[arg-type]
        return int(block / interval)

    def program(self) -> Program:
        """See :class:`sd35_trt.export.ports.ComponentModule`."""
        return denoiser_program(self)
