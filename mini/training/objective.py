"""What mini is trained on: rectified flow with condition dropout, and reading the caption.

The flow objective is that of the SD3 paper (Esser et al. 2024, https://arxiv.org/abs/2403.03206):
``x_t = (1 - t) x_0 + t noise``, velocity target ``noise - x_0``, t from a logit-normal law. The
text encoders of SD3 come pretrained; here a second loss stands in for that: small heads, dropped
after training, tell from T5's output what the caption states of each object, and from the CLIPs'
pooled vectors which shapes and colours are in it. A third loss ties the MMDiT's image tokens to
what is to be drawn, in the spirit of REPA (Yu et al. 2024, https://arxiv.org/abs/2410.06940):
from the tokens between two blocks another head tells what stands where in the clean picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from sd35_trt.mini.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZE, SIZES

from .batches import PAIRS, SLOTS
from .model import CLIP_G, CLIP_L, T5

_FIELDS = (len(SHAPES), len(COLOURS), len(SIZES), 1)

# Of the law of t.
_MEAN, _SPREAD = 1.1, 1.0


@dataclass(frozen=True)
class Dropout:
    """Probabilities with which a sample loses its caption or the output of one encoder."""

    caption: float = 0.1
    t5: float = 0.1
    # That of the SD3 paper, for each; T5 keeps more, since only it can tell relations well.
    clip_l: float = 0.464
    clip_g: float = 0.464


class Reader(nn.Module):
    """Heads that read what a caption states from the text encoders' outputs."""

    def __init__(self) -> None:
        super().__init__()
        queries = SLOTS + len(PAIRS) + 1
        self.queries = nn.Parameter(torch.randn(1, queries, T5) * 0.5)
        self.attention = nn.MultiheadAttention(T5, 4, batch_first=True)
        self.norm = nn.LayerNorm(T5)
        self.slot = nn.Linear(T5, sum(_FIELDS))
        self.relation = nn.Linear(T5, len(RELATIONS) + 1)
        self.ground = nn.Linear(T5, len(BACKGROUNDS))
        self.gist = nn.Linear(CLIP_L + CLIP_G, len(SHAPES) + len(COLOURS))

    def forward(self, hidden: Tensor, pooled: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Mean loss per sample [n] of reading ``batch`` from T5's ``hidden`` and ``pooled``."""
        queries = self.queries.expand(len(hidden), -1, -1)
        context = self.attention(queries, hidden, hidden, need_weights=False)[0]
        answers = self.norm(context + queries)
        slots = batch["slots"].float()
        slot = F.binary_cross_entropy_with_logits(
            self.slot(answers[:, :SLOTS]).float(), slots, reduction="none"
        )
        relation = F.cross_entropy(
            self.relation(answers[:, SLOTS:-1]).float().flatten(0, 1),
            batch["relations"].long().flatten(),
            reduction="none",
        ).view(len(hidden), -1)
        grounds = batch["grounds"].float()
        ground = F.binary_cross_entropy_with_logits(
            self.ground(answers[:, -1]).float(), grounds, reduction="none"
        )
        # The gist: what any object must be, so "not red" says nothing.
        shapes, colours = slots[..., : _FIELDS[0]], slots[..., _FIELDS[0] :][..., : _FIELDS[1]]
        must = [x * (x.sum(-1, keepdim=True) == 1) for x in (shapes, colours)]
        gist = F.binary_cross_entropy_with_logits(
            self.gist(pooled).float(), torch.cat(must, -1).amax(1), reduction="none"
        )
        return slot.mean((1, 2)) * 3 + relation.mean(1) + ground.mean(1) + gist.mean(1)


def whereabouts(things: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """What stands at each cell of a grid of ``side`` by ``side`` over a scene.

    ``things`` float32 [n, 3, 5] are as in :func:`batches.describe`. Returns shape and colour rows,
    int64 [n, side²], one past the last where no object reaches into the cell, and the way from
    the cell's middle to the object's, in cells, float32 [n, side², 2].
    """
    cell = SIZE / side
    axis = (torch.arange(side, device=things.device) + 0.5) * cell
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)
    way = things[:, None, :, 2:4] - grid[:, None]
    beyond = way.norm(dim=-1) - things[:, None, :, 4]
    beyond = beyond.masked_fill(things[:, None, :, 0] < 0, torch.inf)
    nearest, which = beyond.min(-1)
    reached = nearest < 0.4 * cell
    shape, colour = (
        torch.where(reached, things[:, :, k].gather(1, which).long(), last)
        for k, last in ((0, len(SHAPES)), (1, len(COLOURS)))
    )
    way = way.gather(2, which[..., None, None].expand(-1, -1, 1, 2)).squeeze(2)
    return shape, colour, way / cell


class LayoutHead(nn.Module):
    """Head that reads from image tokens what stands where."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.parts = (len(SHAPES) + 1, len(COLOURS) + 1, len(BACKGROUNDS), 2)
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, sum(self.parts)),
        )

    def forward(self, tokens: Tensor, things: Tensor, background: Tensor) -> Tensor:
        """Mean loss (scalar) over tokens [n, side², width] of what :func:`whereabouts` says."""
        side = round(tokens.shape[1] ** 0.5)
        shape, colour, way = whereabouts(things, side)
        parts = self.layers(tokens).float().split(self.parts, -1)
        ground = background.long()[:, None].expand(-1, side * side)
        classes = zip(parts, (shape, colour, ground), strict=False)
        named = sum(F.cross_entropy(x.flatten(0, 1), y.flatten()) for x, y in classes)
        there = (shape < len(SHAPES)).float()
        distance = (parts[3] - way).square().sum(-1) * there
        return named + distance.sum() / there.sum().clamp(min=1)


class Noised(NamedTuple):
    """Latents on their way to noise, [n, 16, h, w]; their timesteps, 0..1000 [n]; the velocity."""

    latents: Tensor
    timestep: Tensor
    velocity: Tensor


def noised(latents: Tensor) -> Noised:
    """Latents [n, 16, h, w] with noise, each as much as a logit-normal law says.

    A mean of about log 3 has the effect of the shift of 3 that SD3.5 trains and samples with: here
    too the layout is settled at high noise.
    """
    t = torch.sigmoid(_MEAN + _SPREAD * torch.randn(len(latents), device=latents.device))
    noise = torch.randn_like(latents)
    at = t[:, None, None, None]
    return Noised((1 - at) * latents + at * noise, 1000 * t, noise - latents)


class FlowPass(NamedTuple):
    """What came of one batch: the error of the velocity (scalar) and what led to it.

    ``tokens`` float [n, side², width] are the image's half-way through the blocks, ``t5`` float
    [n, L, T5] and ``pooled`` float [n, L + G] the encoders' outputs; ``readable`` [n] is 1 where
    all of the caption is in ``pooled``.
    """

    error: Tensor
    tokens: Tensor
    t5: Tensor
    pooled: Tensor
    readable: Tensor


class Flow(nn.Module):
    """The pipeline's parts (all but the VAE) and the error of their velocity."""

    def __init__(self, pipe: StableDiffusion3Pipeline, dropout: Dropout | None = None) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2
        self.text_encoder_3 = pipe.text_encoder_3
        self.dropout = dropout or Dropout()
        self.watched = len(self.transformer.transformer_blocks) // 2
        for index, name in enumerate(("tokenizer", "tokenizer_2", "tokenizer_3")):
            ids = getattr(pipe, name)([""], padding="max_length", return_tensors="pt").input_ids
            self.register_buffer(f"empty_{index}", ids, persistent=False)

    def encode(self, ids: list[Tensor], masks: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt embeddings [n, 2 L, T5], pooled [n, L + G] and T5's own output [n, L, T5].

        ``ids`` are the three encoders' tokens [n, L]; ``masks`` are 1 or 0 [n] for each. The layout
        is that of diffusers' ``StableDiffusion3Pipeline.encode_prompt``.
        """
        hidden, pooled = [], []
        for encoder, tokens, mask in zip(
            (self.text_encoder, self.text_encoder_2), ids, masks, strict=False
        ):
            out = encoder(tokens, output_hidden_states=True)
            hidden.append(out.hidden_states[-2] * mask[:, None, None])
            pooled.append(out.text_embeds * mask[:, None])
        clip = torch.cat(hidden, -1)
        clip = F.pad(clip, (0, T5 - clip.shape[-1]))
        t5 = self.text_encoder_3(ids[2])[0]
        prompt = torch.cat([clip, t5 * masks[2][:, None, None]], 1)
        return prompt, torch.cat(pooled, -1), t5

    def denoise(
        self, noisy: Tensor, prompt: Tensor, pooled: Tensor, timestep: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The transformer's velocity [n, 16, h, w], and its image tokens half-way."""
        model = self.transformer
        image = model.pos_embed(noisy).contiguous()
        temb = model.time_text_embed(timestep, pooled)
        context = model.context_embedder(prompt)
        for index, block in enumerate(model.transformer_blocks):
            context, image = block(hidden_states=image, encoder_hidden_states=context, temb=temb)
            if index == self.watched:
                watched = image
        patches = model.proj_out(model.norm_out(image, temb))
        size, (height, width) = model.config.patch_size, noisy.shape[-2:]
        patches = patches.reshape(len(noisy), height // size, width // size, size, size, -1)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(noisy.shape), watched

    def flow(self, latents: Tensor, batch: dict[str, Tensor]) -> FlowPass:
        """Noise latents [n, 16, h, w] and find the velocity by a table's rows."""
        n, device = len(latents), latents.device
        captioned = torch.rand(n, device=device) >= self.dropout.caption
        ids = [
            torch.where(captioned[:, None], batch[name].long(), getattr(self, f"empty_{index}"))
            for index, name in enumerate(("tokenizer", "tokenizer_2", "tokenizer_3"))
        ]
        rates = (self.dropout.clip_l, self.dropout.clip_g, self.dropout.t5)
        masks = [(torch.rand(n, device=device) >= rate).float() for rate in rates]
        prompt, pooled, t5 = self.encode(ids, masks)

        own = noised(latents)
        velocity, image = self.denoise(own.latents, prompt, pooled, own.timestep)
        error = F.mse_loss(velocity.float(), own.velocity)
        # Pooled vectors that were dropped cannot be read.
        return FlowPass(error, image, t5, pooled, captioned * masks[0] * masks[1])


class Objective(Flow):
    """The flow with the heads that help it, and the losses of one batch."""

    def __init__(self, pipe: StableDiffusion3Pipeline, dropout: Dropout | None = None) -> None:
        super().__init__(pipe, dropout)
        self.reader = Reader()
        self.reading_weight, self.layout_weight = 0.15, 0.3
        self.layout = LayoutHead(self.transformer.inner_dim)

    def forward(self, latents: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses (scalars) of latents [n, 16, h, w] and a table's rows; ``total`` to minimize.

        ``flow`` is the error of the velocity, ``reading`` that of :class:`Reader` and ``layout``
        that of :class:`LayoutHead`.
        """
        own = self.flow(latents, batch)
        layout = self.layout(own.tokens, batch["things"], batch["background"])
        reading = self.reader(own.t5, own.pooled, batch)
        reading = (reading * own.readable).sum() / own.readable.sum().clamp(min=1)
        total = own.error + self.reading_weight * reading + self.layout_weight * layout
        return {"total": total, "flow": own.error, "reading": reading, "layout": layout}
