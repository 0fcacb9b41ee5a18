"""The segments of a denoiser that are traced on their own: head, blocks, and tail.

Blocks repeat: those with the same signature have the same graph, with other weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sd35_trt.formats.bundle import RESIDUALS

from .adapters import AdaptedLinears, Group, take_adapters
from .fused_block import FusedBlock
from .layers import ModulationRows, PlainLayerNorm, cast
from .modules import modulation_rows
from .ports import Ports
from .range_guard import carries_fp32
from .whole import WholeModule

# What the tail reads of the denoiser's inputs, where it has them.
_UPDATE = (
    "latents",
    "sigma",
    "coefficients",
    "previous_denoised",
    "guidance",
    "skip_guidance",
    "mask",
    "source",
    "source_noise",
    "next_sigma",
)

# Of these, the one that is of the third branch.
_THIRD = "skip_guidance"

# Attributes of a layer that change its graph.
_FLAGS = ("wide", "follows", "output_dtype")


class Head(WholeModule):
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


class Segment(WholeModule):
    """What repeats: its layers are ``block``'s."""

    block: nn.Module

    def signature(self) -> tuple[object, ...]:
        """Equal for segments whose graphs differ in the values of their weights alone."""
        modules = tuple(
            (name, type(m).__name__, *(getattr(m, flag, None) for flag in _FLAGS))
            for name, m in self.block.named_modules()
        )
        ports = tuple(dtype for dtype, _ in [*self.inputs.values(), *self.outputs.values()])
        weights = tuple(
            (name, tuple(p.shape), p.dtype) for name, p in self.block.named_parameters()
        )
        return type(self), modules, weights, ports


class BlockSegment(Segment):
    """A block of a transformer, fed with the rows of the modulation that are its own.

    Attributes:
        stream: dtype of what it hands on.
        rows: of the modulation.
    """

    stream: torch.dtype
    rows: int

    def _read_rows(self, *norms: Any) -> None:
        """Let adaptive norms read their rows where their linears were."""
        self.rows = 0
        for norm in norms:
            count = modulation_rows(norm)
            norm.silu = nn.Identity()
            norm.linear = ModulationRows(self.rows, count)
            self.rows += count


class Block(BlockSegment):
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
        self._read_rows(block.norm1, block.norm1_context)
        self.block = block
        shapes: Any = {
            "image": ("samples", "pixels", width),
            "context": ("samples", "tokens", width),
            "modulation": ("samples", self.rows, width),
        }
        self.inputs = {name: (dtypes[name], shape) for name, shape in shapes.items()}
        names = ("image",) if self.last else ("context", "image")
        self.outputs = {name: (self.stream, shapes[name]) for name in names}
        self.adapted: AdaptedLinears | None = None

    def take_adapters(self, groups: Sequence[Group], number: int, dtype: torch.dtype) -> None:
        """Add inputs for adapters of its linears.

        Args:
            groups: the denoiser's.
            number: of the block.
        """
        place = (number, f"transformer_blocks.{number}.")
        self.adapted = AdaptedLinears(self.block, groups, place)
        take_adapters(self, self.adapted.groups, dtype, "samples", blocks=1)

    def variant(self, adapted: bool, residual: torch.dtype | None) -> Block:
        """The same block for steps that take less, or more, than it does.

        Args:
            adapted: whether it takes adapters, as this one does.
            residual: dtype of what ControlNets add to the image after it; None where they do not.
        """
        other = copy.copy(self)
        other.inputs = dict(self.inputs)
        if not adapted:
            for name in self.adapter_inputs:
                del other.inputs[name]
            other.adapter_inputs = ()
        if residual is not None:
            # What adapters take comes last.
            own = {name: other.inputs.pop(name) for name in other.adapter_inputs}
            _, shape = self.inputs["image"]
            other.inputs |= {RESIDUALS: (residual, (1, *shape)), **own}
        return other

    def forward(
        self,
        image: torch.Tensor,
        context: torch.Tensor,
        modulation: torch.Tensor,
        residuals: torch.Tensor | None = None,
        adapters: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, ...]:
        if self.adapted is not None:
            self.adapted.feed(self.adapter_inputs, adapters)
        if carries_fp32(self.block):
            image, context = image.float(), context.float()
        streams = {"hidden_states": image, "encoder_hidden_states": context, "temb": modulation}
        added = residuals is not None and isinstance(self.block, FusedBlock)
        if residuals is not None and added:
            streams["added"] = residuals[0]
        context, image = self.block(**streams)
        image = cast(image, self.stream)
        if residuals is not None and not added:
            image = image + cast(residuals[0], self.stream)
        return (image,) if self.last else (cast(context, self.stream), image)


class SingleBlock(BlockSegment):
    """One of diffusers' SD3SingleTransformerBlock, which has no text stream; as :class:`Block`."""

    def __init__(
        self, block: Any, dtypes: dict[str, torch.dtype], dtype: torch.dtype, width: int
    ) -> None:
        super().__init__()
        self.stream = torch.float32 if carries_fp32(block) else dtype
        _narrow_norms(block, [*dtypes.values(), self.stream], dtype)
        self._read_rows(block.norm1)
        self.block = block
        image: Any = ("samples", "pixels", width)
        self.inputs = {
            "image": (dtypes["image"], image),
            "modulation": (dtypes["modulation"], ("samples", self.rows, width)),
        }
        self.outputs = {"image": (self.stream, image)}

    def forward(self, image: torch.Tensor, modulation: torch.Tensor) -> tuple[torch.Tensor]:
        if carries_fp32(self.block):
            image = image.float()
        return (cast(self.block(image, modulation), self.stream),)


def _narrow_norms(module: nn.Module, dtypes: Iterable[torch.dtype], dtype: torch.dtype) -> None:
    """Where a stream is wider than ``dtype``, let what is normalized go on in ``dtype``."""
    if any(other != dtype for other in dtypes):
        for norm in module.modules():
            if isinstance(norm, PlainLayerNorm) and norm.output_dtype is None:
                norm.output_dtype = dtype


class Tail(WholeModule):
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
        self.skipping = _THIRD in inputs
        self.completes = False
        branches = "three_branches" if self.skipping else "branches"
        samples, width = branches if guided else "batch", transformer.inner_dim
        self.inputs = {
            "image": (dtypes["image"], (samples, "patch_rows", "patch_columns", width)),
            "modulation": (dtypes["modulation"], (samples, self.rows, width)),
        }
        self.inputs |= {name: inputs[name] for name in _UPDATE if name in inputs}
        self.outputs = outputs

    def without_third(self) -> Tail:
        """The same for steps without a third branch."""
        if not self.skipping:
            return self
        other = self._of_samples("branches")
        del other.inputs[_THIRD]
        return other

    def completing(self) -> Tail:
        """The same where images without a third branch, which are the last, have it yet to get:
        for them it is the one with text.
        """
        other = self._of_samples("computed")
        other.completes = True
        return other

    def _of_samples(self, samples: str) -> Tail:
        other = copy.copy(self)
        other.inputs = dict(self.inputs)
        for name in ("image", "modulation"):
            dtype, (_, *shape) = self.inputs[name]
            other.inputs[name] = (dtype, (samples, *shape))
        return other

    def forward(
        self,
        image: torch.Tensor,
        modulation: torch.Tensor,
        latents: torch.Tensor,
        sigma: torch.Tensor,
        coefficients: torch.Tensor,
        previous_denoised: torch.Tensor,
        guidance: torch.Tensor | None = None,
        skip_guidance: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        source: torch.Tensor | None = None,
        source_noise: torch.Tensor | None = None,
        next_sigma: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.completes:
            batch, computed = latents.shape[0], image.shape[0]
            # By index: a length of a slice would be fixed while tracing.
            index = torch.arange(3 * batch, device=image.device)
            index = torch.where(index < computed, index, index - batch)
            image, modulation = (values.index_select(0, index) for values in (image, modulation))
        velocity = self.velocity(image, modulation)
        if guidance is not None:
            # Sliced apart, not chunked: chunk() would fix the batch at the example's.
            count = latents.shape[0]
            branches = velocity
            uncond, cond = branches[:count], branches[count : 2 * count]
            velocity = uncond + each(guidance) * (cond - uncond)
            if skip_guidance is not None:
                velocity = velocity + each(skip_guidance) * (cond - branches[2 * count :])
        denoised = latents - each(sigma) * velocity
        return update(
            latents, denoised, coefficients, previous_denoised, mask, source, source_noise,
            next_sigma,
        )  # fmt: skip

    def velocity(self, image: torch.Tensor, modulation: torch.Tensor) -> torch.Tensor:
        """[samples, C, h, w] in FP32."""
        rows, columns = image.shape[1:3]
        patches = self.proj_out(self.norm_out(image.flatten(1, 2), modulation)).float()
        patches = patches.reshape(-1, rows, columns, self.patch**2, self.channels)
        channels = patches.permute(0, 4, 3, 1, 2).flatten(1, 2)
        return nn.functional.pixel_shuffle(channels, self.patch)


class BranchTail(Tail):
    """Image tokens → what one branch of guidance denoised; another component goes on."""

    def forward(  # type: ignore[override]
        self,
        image: torch.Tensor,
        modulation: torch.Tensor,
        latents: torch.Tensor,
        sigma: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        return (latents - each(sigma) * self.velocity(image, modulation),)


def update(
    latents: torch.Tensor,
    denoised: torch.Tensor,
    coefficients: torch.Tensor,
    previous_denoised: torch.Tensor,
    mask: torch.Tensor | None,
    source: torch.Tensor | None,
    source_noise: torch.Tensor | None,
    next_sigma: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sampler's update: next latents, and what was denoised, as a mask says."""
    a, b, c = (each(coefficients[:, i]) for i in range(3))
    following = a * latents + b * denoised + c * previous_denoised
    if mask is None or source is None or source_noise is None or next_sigma is None:
        return following, denoised
    # Selected, not mixed: what was not asked for stays out also where it is not finite.
    kept = source + each(next_sigma) * (source_noise - source)
    drawn = mask > 0.5
    return torch.where(drawn, following, kept), torch.where(drawn, denoised, source)


def each(values: torch.Tensor) -> torch.Tensor:
    """A value for each image [batch], to compute with latents."""
    return values.view(-1, 1, 1, 1)
