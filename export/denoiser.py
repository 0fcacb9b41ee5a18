"""The denoiser: one sampling step of the MMDiT.

``denoised = latents - sigma * velocity`` and
``next = a * latents + b * denoised + c * previous_denoised`` with the step's coefficients
(a, b, c), all in FP32. Sigma, guidance and coefficients are per sample, so that samples at
different steps can share a batch.

It is traced in segments, of which the blocks repeat: 38 blocks cost what one costs, and the graph
is put together from copies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from sd35_trt.formats.program import Call, Graph, Program, View

from .layers import ModulationRows, PlainLayerNorm, cast
from .modules import modulated_norms, modulation_dtype, modulation_rows
from .ports import ComponentModule, Ports
from .program_writer import traced_graph
from .range_guard import carries_fp32
from .trace import empty_model, trace
from .whole import WholeModule

# Attributes of a layer that change its graph.
_FLAGS = ("wide", "follows", "output_dtype")


class _Head(WholeModule):
    """Latents → image tokens on their grid."""

    def __init__(self, transformer: Any, dtype: torch.dtype, latents: Any) -> None:
        super().__init__()
        self.pos_embed = transformer.pos_embed
        self.dtype = dtype
        self.output_dtype = torch.float32 if transformer.pos_embed.proj.wide else dtype
        self.inputs = {"latents": latents}
        grid = ("batch", "patch_rows", "patch_columns", transformer.inner_dim)
        self.outputs = {"image": (self.output_dtype, grid)}

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        embed: Any = self.pos_embed
        image = embed.proj(cast(latents, self.dtype))
        rows, columns = image.shape[-2:]
        positions = embed.pos_embed(rows, columns).unflatten(1, (rows, columns))
        return ((image.permute(0, 2, 3, 1) + cast(positions, image.dtype)),)


class _Block(WholeModule):
    """One of diffusers' JointTransformerBlock, its adaptive norms fed from the modulation.

    Args:
        block: its layers replaced and its policy applied.
        dtypes: of what it is given: image, context, modulation.
        dtype: of the streams between blocks, unless this one's exceed FP16.
        width: channels.
    """

    def __init__(
        self, block: Any, dtypes: dict[str, torch.dtype], dtype: torch.dtype, width: int
    ) -> None:
        super().__init__()
        self.stream = torch.float32 if carries_fp32(block) else dtype
        _narrow_norms(block, [*dtypes.values(), self.stream], dtype)
        self.last = block.context_pre_only
        self.rows = 0
        for norm in (block.norm1, block.norm1_context):
            count = modulation_rows(norm)
            norm.silu = nn.Identity()
            norm.linear = ModulationRows(self.rows, count)
            self.rows += count
        self.block = block
        shapes: Any = {
            "image": ("samples", "pixels", width),
            "context": ("samples", "tokens", width),
            "modulation": ("samples", self.rows, width),
        }
        self.inputs = {name: (dtypes[name], shape) for name, shape in shapes.items()}
        names = ("image",) if self.last else ("context", "image")
        self.outputs = {name: (self.stream, shapes[name]) for name in names}

    def forward(
        self, image: torch.Tensor, context: torch.Tensor, modulation: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        if carries_fp32(self.block):
            image, context = image.float(), context.float()
        context, image = self.block(
            hidden_states=image, encoder_hidden_states=context, temb=modulation
        )
        image = cast(image, self.stream)
        return (image,) if self.last else (cast(context, self.stream), image)

    def signature(self) -> tuple[object, ...]:
        """Equal for blocks whose graphs differ in the values of their weights alone."""
        modules = tuple(
            (name, type(m).__name__, *(getattr(m, flag, None) for flag in _FLAGS))
            for name, m in self.block.named_modules()
        )
        ports = tuple(dtype for dtype, _ in [*self.inputs.values(), *self.outputs.values()])
        weights = tuple(
            (name, tuple(p.shape), p.dtype) for name, p in self.block.named_parameters()
        )
        return modules, weights, ports


def _narrow_norms(module: nn.Module, dtypes: Iterable[torch.dtype], dtype: torch.dtype) -> None:
    """Where a stream is wider than ``dtype``, let what is normalized go on in ``dtype``."""
    if any(other != dtype for other in dtypes):
        for norm in module.modules():
            if isinstance(norm, PlainLayerNorm) and norm.output_dtype is None:
                norm.output_dtype = dtype


class _Tail(WholeModule):
    """Image tokens → velocity, guidance, and the sampler's update."""

    def __init__(
        self,
        transformer: Any,
        dtypes: dict[str, torch.dtype],
        dtype: torch.dtype,
        inputs: Ports,
        outputs: Ports,
        guided: bool,
    ) -> None:
        super().__init__()
        _narrow_norms(transformer.norm_out, dtypes.values(), dtype)
        self.norm_out = transformer.norm_out
        self.proj_out = transformer.proj_out
        self.patch = transformer.config.patch_size
        self.channels = transformer.out_channels
        self.norm_out.silu = nn.Identity()
        self.rows = modulation_rows(self.norm_out)
        self.norm_out.linear = ModulationRows(0, self.rows)
        samples, width = "branches" if guided else "batch", transformer.inner_dim
        self.inputs = {
            "image": (dtypes["image"], (samples, "patch_rows", "patch_columns", width)),
            "modulation": (dtypes["modulation"], (samples, self.rows, width)),
        }
        for name in ("latents", "sigma", "coefficients", "previous_denoised"):
            self.inputs[name] = inputs[name]
        if guided:
            self.inputs["guidance"] = inputs["guidance"]
        self.outputs = outputs

    def forward(
        self,
        image: torch.Tensor,
        modulation: torch.Tensor,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        coefficients: torch.Tensor,
        previous_denoised: torch.Tensor,
        guidance: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, columns = image.shape[1:3]
        patches = self.proj_out(self.norm_out(image.flatten(1, 2), modulation)).float()
        patches = patches.reshape(-1, rows, columns, self.patch**2, self.channels)
        channels = patches.permute(0, 4, 3, 1, 2).flatten(1, 2)
        velocity = nn.functional.pixel_shuffle(channels, self.patch)
        if guidance is not None:
            # Sliced apart, not chunked: chunk() would fix the batch at the example's.
            uncond, cond = velocity[: latents.shape[0]], velocity[latents.shape[0] :]
            velocity = uncond + guidance.view(-1, 1, 1, 1) * (cond - uncond)
        denoised = latents - sigma.view(-1, 1, 1, 1) * velocity
        a, b, c = (coefficients[:, i].view(-1, 1, 1, 1) for i in range(3))
        return a * latents + b * denoised + c * previous_denoised, denoised


class Denoiser(ComponentModule):
    """The component; with ``guided``, both guidance branches run as one batch inside the graph."""

    def __init__(self, transformer: Any, guided: bool) -> None:
        super().__init__()
        self.part = transformer
        self.guided = guided
        self.dtype = transformer.context_embedder.dtype
        context_dtype = transformer.context_embedder.output_dtype
        modulated = modulation_dtype(transformer)
        config, width = transformer.config, transformer.inner_dim
        rows = sum(map(modulation_rows, modulated_norms(transformer)))
        latents = (torch.float32, ("batch", config.in_channels, "height", "width"))
        per_sample = (torch.float32, ("batch",))
        self.inputs = {
            "latents": latents,
            "sigma": per_sample,
            "coefficients": (torch.float32, ("batch", 3)),
            "previous_denoised": latents,
            "context": (context_dtype, ("batch", "tokens", config.caption_projection_dim)),
            "modulation": (modulated, ("batch", rows, width)),
        }
        if guided:
            self.inputs["uncond_context"] = self.inputs["context"]
            self.inputs["uncond_modulation"] = self.inputs["modulation"]
            self.inputs["guidance"] = per_sample
        self.outputs = {"next_latents": latents, "denoised": latents}
        self.head = _Head(transformer, self.dtype, latents)
        dtypes = {
            "image": self.head.output_dtype,
            "context": context_dtype,
            "modulation": modulated,
        }
        self.blocks = []
        for layers in transformer.transformer_blocks:
            block = _Block(layers, dtypes, self.dtype, width)
            dtypes = {"image": block.stream, "context": block.stream, "modulation": modulated}
            self.blocks.append(block)
        self.tail = _Tail(transformer, dtypes, self.dtype, self.inputs, self.outputs, guided)

    def trace(self) -> ir.Model:
        """See :func:`sd35_trt.export.trace.trace`."""
        model = empty_model(self)
        link = _Linker(model.graph)
        values: dict[str, ir.Value] = {str(v.name): v for v in model.graph.inputs}
        context, modulation = values["context"], values["modulation"]
        latents = values["latents"]
        if self.guided:
            context = link.node("Concat", values["uncond_context"], context, axis=0)
            modulation = link.node("Concat", values["uncond_modulation"], modulation, axis=0)
        head = trace(self.head).graph
        (image,) = link.segment(head, {"latents": latents}, "head", "part.")
        if self.guided:
            image = link.node("Concat", image, image, axis=0)
        grid = link.node("Shape", image)
        image = link.node("Reshape", image, link.constant([0, -1, int(self.part.inner_dim)]))  # type: ignore[arg-type]
        traced: dict[tuple[object, ...], ir.Graph] = {}
        first = 0
        for k, block in enumerate(self.blocks):
            signature = block.signature()
            if signature not in traced:
                traced[signature] = trace(block).graph
            rows = link.rows(modulation, first, block.rows)
            inputs = {"image": image, "context": context, "modulation": rows}
            *_, image = out = link.segment(
                traced[signature], inputs, f"block{k}", f"part.transformer_blocks.{k}.", "block."
            )
            context = out[0]
            first += block.rows
        inputs = {
            **values,
            "image": link.node("Reshape", image, grid),
            "modulation": link.rows(modulation, first, self.tail.rows),
        }
        outputs = link.segment(trace(self.tail).graph, inputs, "tail", "part.")
        for value, port in zip(outputs, self.declared_ports()[-len(outputs) :], strict=True):
            value.name = port.name
            value.shape = ir.Shape(port.shape)
            model.graph.outputs.append(value)
        return model

    def program(self) -> Program:
        """See :class:`sd35_trt.export.ports.ComponentModule`."""
        graphs: dict[str, Graph] = {}
        steps: list[Call | View] = []
        names: dict[tuple[object, ...], str] = {}

        def call(
            name: str, module: ComponentModule, weights: str, local: str = "", **given: str
        ) -> None:
            if name not in graphs:
                graphs[name] = traced_graph(module)
            graph = graphs[name]
            stored = tuple(weights + weight.removeprefix(local) for weight in graph.weights)
            inputs = tuple(given.get(port, port) for port in graph.inputs)
            steps.append(Call(name, stored, inputs, tuple(module.outputs)))

        head = _GuidedHead(self) if self.guided else _PlainHead(self)
        call("head", head, "part.", "head.")
        modulation = "branches_modulation" if self.guided else "modulation"
        steps.append(View("tokens", "grid", "image"))
        first = 0
        for k, block in enumerate(self.blocks):
            steps.append(View("rows", modulation, "rows", first, block.rows))
            name = names.setdefault(block.signature(), f"block{len(names)}")
            weights = f"part.transformer_blocks.{k}."
            call(name, block, weights, "block.", modulation="rows")
            first += block.rows
        steps.append(View("rows", modulation, "rows", first, self.tail.rows))
        steps.append(View("grid", "image", "image", like="grid"))
        call("tail", self.tail, "part.", modulation="rows")
        return Program(torch.__version__, graphs, tuple(steps))


def _by_tokens(image: torch.Tensor) -> torch.Tensor:
    """The same, a token's channels beside each other in memory, not as the convolution left them.

    A copy that a compiler merges with what comes before; ``contiguous`` is none where tracing
    takes another layout for granted than there will be.
    """
    return image.clone(memory_format=torch.contiguous_format)


class _PlainHead(WholeModule):
    """What the blocks read that is not given: image tokens on their grid."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.head = denoiser.head
        self.inputs = {"latents": denoiser.inputs["latents"]}
        self.outputs = {"grid": denoiser.head.outputs["image"]}

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        (image,) = self.head(latents)
        return (_by_tokens(image),)


class _GuidedHead(WholeModule):
    """What all blocks read, of both branches: image tokens on their grid, text, modulation."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.head = denoiser.head
        names = ("latents", "context", "modulation", "uncond_context", "uncond_modulation")
        self.inputs = {name: denoiser.inputs[name] for name in names}
        single = {
            "grid": self.head.outputs["image"],
            "context": self.inputs["context"],
            "branches_modulation": self.inputs["modulation"],
        }
        self.outputs = {
            n: (dtype, ("branches", *shape[1:])) for n, (dtype, shape) in single.items()
        }

    def forward(
        self,
        latents: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        uncond_context: torch.Tensor,
        uncond_modulation: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        (image,) = self.head(latents)
        context = torch.cat([uncond_context, context])
        both = _by_tokens(torch.cat([image, image]))
        return both, context, torch.cat([uncond_modulation, modulation])


class _Linker:
    """Appends nodes and copies of traced segments to a graph."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._count = 0

    def _name(self) -> str:
        self._count += 1
        return f"link_{self._count}"

    def constant(self, values: list[int]) -> ir.Value:
        """A one-dimensional int64 constant."""
        name = self._name()
        tensor = ir.tensor(values, dtype=ir.DataType.INT64, name=name)
        value = ir.Value(
            name=name,
            shape=ir.Shape([len(values)]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=tensor,
        )
        self._graph.register_initializer(value)
        return value

    def node(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        """Append one operator; returns its output."""
        output = ir.Value(name=self._name())
        dtype = ir.DataType.INT64 if operator == "Shape" else inputs[0].dtype
        assert dtype is not None
        output.type = ir.TensorType(dtype)
        self._graph.append(
            ir.node(operator, inputs, attributes=attributes, outputs=[output], name=output.name)
        )
        return output

    def rows(self, modulation: ir.Value, first: int, count: int) -> ir.Value:
        """``modulation[:, first : first + count]``."""
        ends = (self.constant([first]), self.constant([first + count]), self.constant([1]))
        return self.node("Slice", modulation, *ends)

    def segment(
        self,
        segment: ir.Graph,
        inputs: dict[str, ir.Value],
        prefix: str,
        weights: str,
        local: str = "",
    ) -> list[ir.Value]:
        """Append a copy of a traced segment.

        Args:
            inputs: the values for its ports, by name.
            prefix: put before the names of its nodes and values.
            weights: put before the names of its weights, in place of ``local``; they become
                inputs of the graph.

        Returns:
            Its outputs.
        """
        copy = segment.clone()
        outputs = list(copy.outputs)
        copy.outputs.clear()
        for value in list(copy.inputs):
            assert value.name is not None
            copy.inputs.remove(value)
            # Ports come first, weights have a dot in their names.
            if "." not in value.name:
                ir.convenience.replace_all_uses_with(value, inputs[value.name])
            else:
                value.name = weights + value.name.removeprefix(local)
                self._graph.inputs.append(value)
        for name, value in list(copy.initializers.items()):
            del copy.initializers[name]
            value.name = f"{prefix}/{name}"
            self._graph.register_initializer(value)
        nodes = list(copy)
        copy.remove(nodes)
        for node in nodes:
            node.name = f"{prefix}/{node.name}"
            for value in node.outputs:
                value.name = f"{prefix}/{value.name}"
        self._graph.extend(nodes)
        return outputs
