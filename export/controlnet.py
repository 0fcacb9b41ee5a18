"""A ControlNet: what its blocks make of latents and a picture, for the denoiser's blocks to add.

Its conditioner has all that depends on the prompt and the timestep alone, as the transformer's has.
The net itself is traced in segments, of which the blocks repeat, and adds what it makes to what
nets before it made.
"""

from __future__ import annotations

import copy
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from sd35_trt.dialects import Dialect
from sd35_trt.formats.bundle import RESIDUALS
from sd35_trt.formats.program import Program, View

from .denoiser_segments import Block, BlockSegment, Segment, SingleBlock
from .layers import cast
from .linker import Linker
from .modules import (
    modulated_norms,
    modulation_dtype,
    modulation_of,
    modulation_rows,
    text_reader,
)
from .ports import ComponentModule, Ports
from .program_steps import CONTROLLED, NOT_CONTROLLED, ProgramSteps
from .trace import empty_model, trace
from .whole import WholeModule


class ControlConditioner(WholeModule):
    """Context and modulation of a net's blocks: as :class:`~sd35_trt.export.modules.Conditioner`.

    A net that was trained without pooled text has zeros in its place. One without a text stream has
    no context.
    """

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.part = net
        config = net.config
        self.norms = modulated_norms(net)
        self.modulation_dtype = modulation_dtype(net)
        reader = text_reader(net)
        self.dtype = torch.float32 if reader.follows else reader.dtype
        rows = sum(map(modulation_rows, self.norms))
        self.inputs: Ports = {
            "pooled": (self.dtype, ("samples", config.pooled_projection_dim)),
            "timesteps": (torch.float32, ("steps",)),
        }
        modulation = (self.modulation_dtype, ("steps", "samples", rows, net.inner_dim))
        self.outputs: Ports = {"modulation": modulation}
        if net.context_embedder is not None:
            embeds = ("samples", "tokens", config.joint_attention_dim)
            self.inputs["prompt_embeds"] = (self.dtype, embeds)
            context = ("samples", "tokens", net.inner_dim)
            self.outputs["context"] = (net.context_embedder.output_dtype, context)

    def forward(
        self,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        net: Any = self.part
        if net.config.force_zeros_for_pooled_projection:
            pooled = torch.zeros_like(pooled)
        modulation = modulation_of(net, self.norms, pooled, timesteps)
        outputs = (cast(modulation, self.modulation_dtype),)
        if prompt_embeds is None:
            return outputs
        return (*outputs, net.context_embedder(prompt_embeds))


class ControlHead(WholeModule):
    """Latents and the picture's latents → image tokens."""

    def __init__(self, net: Any, dtype: torch.dtype, latents: Any) -> None:
        super().__init__()
        self.pos_embed = net.pos_embed
        self.pos_embed_input = net.pos_embed_input
        self.dtype = dtype
        self.inputs = {"latents": latents, "hint": latents}
        self.outputs = {"image": (dtype, ("batch", "pixels", net.inner_dim))}

    def forward(self, latents: torch.Tensor, hint: torch.Tensor) -> tuple[torch.Tensor]:
        embed: Any = self.pos_embed
        own: Any = self.pos_embed_input
        image = embed.proj(cast(latents, self.dtype))
        rows, columns = image.shape[-2:]
        tokens = image.flatten(2).transpose(1, 2)
        tokens = tokens + cast(embed.pos_embed(rows, columns), image.dtype)
        tokens = tokens + own.proj(cast(hint, self.dtype)).flatten(2).transpose(1, 2)
        return (cast(tokens, self.dtype),)


class Residual(Segment):
    """What a block's image tokens become, times the net's scale.

    Where the scale is 0, the product is selected away: 0·∞ is NaN.
    """

    def __init__(self, linear: nn.Module, image: torch.dtype, dtype: torch.dtype, width: int):
        super().__init__()
        self.block = linear
        self.dtype = dtype
        tokens = ("samples", "pixels", width)
        self.inputs: Ports = {"image": (image, tokens), "scale": (torch.float32, ("samples",))}
        self.outputs = {"residual": (dtype, tokens)}

    def after_others(self) -> Residual:
        """The same, added to what other nets made."""
        other = copy.copy(self)
        dtype, shape = self.outputs["residual"]
        other.inputs = {**self.inputs, "before": (dtype, (1, *shape))}
        return other

    def forward(
        self, image: torch.Tensor, scale: torch.Tensor, before: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        factors = scale.view(-1, 1, 1)
        residual = self.block(image)
        scaled = residual * cast(factors, residual.dtype)
        scaled = cast(scaled.masked_fill(factors == 0, 0.0), self.dtype)
        return (scaled if before is None else scaled + before[0],)


class ControlBranches(WholeModule):
    """What the blocks of a program read, of both branches where there are two.

    Args:
        inputs: those of the net, by name.
    """

    def __init__(self, head: ControlHead, inputs: Ports, guided: bool) -> None:
        super().__init__()
        self.head = head
        self.count = 2 if guided else 1
        self.inputs = {**head.inputs, "scale": inputs["scale"]}
        samples = "branches" if guided else "batch"
        dtype, (_, *tokens) = head.outputs["image"]
        self.outputs = {
            "image": (dtype, (samples, *tokens)),
            "branches_scale": (torch.float32, (samples,)),
        }

    def forward(
        self, latents: torch.Tensor, hint: torch.Tensor, scale: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (image,) = self.head(latents, hint)
        # A token's channels beside each other in memory, not as the convolution left them.
        images = torch.cat([image] * self.count).clone(memory_format=torch.contiguous_format)
        return images, torch.cat([scale] * self.count)


class ControlNet(ComponentModule):
    """A net, for both branches of guidance where the denoiser has both.

    Its input ``residuals`` is what other nets made: of the shape of its output, or one token of
    zeros, which is added to all.
    """

    def __init__(self, net: Any, guided: bool) -> None:
        super().__init__()
        self.part = net
        self.guided = guided
        self.dtype = text_reader(net).dtype
        config, width = net.config, net.inner_dim
        count = len(net.transformer_blocks)
        modulated = modulation_dtype(net)
        rows = sum(map(modulation_rows, modulated_norms(net)))
        latents = (torch.float32, ("batch", config.in_channels, "height", "width"))
        self.inputs: Ports = {
            "latents": latents,
            "hint": latents,
            "scale": (torch.float32, ("batch",)),
            "residuals": (self.dtype, (count, "residual_samples", "residual_pixels", width)),
            "modulation": (modulated, ("samples", rows, width)),
        }
        self.outputs = {"next_residuals": (self.dtype, (count, "samples", "pixels", width))}
        dtypes = {"image": self.dtype, "modulation": modulated}
        if net.context_embedder is not None:
            dtypes["context"] = net.context_embedder.output_dtype
            self.inputs["context"] = (dtypes["context"], ("samples", "tokens", width))
        self.head = ControlHead(net, self.dtype, latents)
        self.blocks: list[BlockSegment] = []
        self.residuals: list[Residual] = []
        for layers, linear in zip(net.transformer_blocks, net.controlnet_blocks, strict=True):
            kind = Block if "context" in dtypes else SingleBlock
            block = kind(layers, dtypes, self.dtype, width)
            dtypes |= {name: dtype for name, (dtype, _) in block.outputs.items()}
            self.blocks.append(block)
            self.residuals.append(Residual(linear, dtypes["image"], self.dtype, width))

    def trace(self, dialect: Dialect) -> ir.Model:
        """See :func:`sd35_trt.export.trace.trace`."""
        model = empty_model(self, dialect)
        link = Linker(model.graph)
        values = {str(value.name): value for value in model.graph.inputs}
        head = trace(self.head, dialect).graph
        (image,) = link.segment(
            head, {name: values[name] for name in self.head.inputs}, "head", "part."
        )
        scale, modulation = values["scale"], values["modulation"]
        if self.guided:
            image = link.node("Concat", image, image, axis=0)
            scale = link.node("Concat", scale, scale, axis=0)
        streams = {"image": image}
        if "context" in values:
            streams["context"] = values["context"]
        traced: dict[tuple[object, ...], ir.Graph] = {}
        made, first = [], 0
        for k, (block, residual) in enumerate(zip(self.blocks, self.residuals, strict=True)):
            for segment in (block, residual):
                if segment.signature() not in traced:
                    traced[segment.signature()] = trace(segment, dialect).graph
            inputs = {**streams, "modulation": link.rows(modulation, first, block.rows)}
            weights = f"part.transformer_blocks.{k}."
            graph = traced[block.signature()]
            out = link.segment(graph, inputs, f"block{k}", weights, "block.")
            streams = dict(zip(block.outputs, out, strict=True))
            first += block.rows
            inputs = {"image": streams["image"], "scale": scale}
            weights, graph = f"part.controlnet_blocks.{k}.", traced[residual.signature()]
            (scaled,) = link.segment(graph, inputs, f"residual{k}", weights, "block.")
            made.append(link.node("Unsqueeze", scaled, link.constant([0])))
        total = link.node("Add", link.node("Concat", *made, axis=0), values["residuals"])
        (port,) = self.declared_ports()[-1:]
        total.name = port.name
        total.shape = ir.Shape(port.shape)
        model.graph.outputs.append(total)
        return model

    def forward(self, **values: torch.Tensor) -> tuple[torch.Tensor]:
        """The same, segment by segment, to measure its sizes."""
        (image,) = self.head(values["latents"], values["hint"])
        branches = 2 if self.guided else 1
        streams = {"image": image.repeat(branches, 1, 1)}
        if "context" in values:
            streams["context"] = values["context"]
        made, first = [], 0
        for block, residual in zip(self.blocks, self.residuals, strict=True):
            rows = values["modulation"][:, first : first + block.rows]
            feed = {**streams, "modulation": rows}
            out = block(*(feed[name] for name in block.inputs))
            streams = dict(zip(block.outputs, out, strict=True))
            first += block.rows
            made += residual(streams["image"], values["scale"].repeat(branches))
        return (torch.stack(made) + values["residuals"],)

    def program(self) -> Program:
        """See :class:`sd35_trt.export.ports.ComponentModule`."""
        steps = ProgramSteps()
        steps.call("head", ControlBranches(self.head, self.inputs, self.guided), "part.", "head.")
        names: dict[tuple[object, ...], str] = {}
        first = 0
        for k, (block, residual) in enumerate(zip(self.blocks, self.residuals, strict=True)):
            steps.view(View("rows", "modulation", "rows", first, block.rows))
            first += block.rows
            name = names.setdefault(block.signature(), f"block{len(names)}")
            weights, read = f"part.transformer_blocks.{k}.", {"modulation": "rows"}
            steps.call(name, block, weights, "block.", inputs=read)
            name = names.setdefault(residual.signature(), f"residual{len(names)}")
            weights, made = f"part.controlnet_blocks.{k}.", {"residual": f"residual{k}"}
            read = {"scale": "branches_scale"}
            alone = (NOT_CONTROLLED,)
            steps.call(name, residual, weights, "block.", alone, read, made)
            steps.view(View("stack", RESIDUALS, "before", k, 1, conditions=(CONTROLLED,)))
            read["before"] = "before"
            added, beside = residual.after_others(), (CONTROLLED,)
            steps.call(f"{name}_added", added, weights, "block.", beside, read, made)
        steps.stack([f"residual{k}" for k in range(len(self.residuals))], "next_residuals")
        return steps.program()
