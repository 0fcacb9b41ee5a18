"""What mini is trained on: rectified flow with condition dropout, and reading the caption.

The flow objective is that of the SD3 paper (Esser et al. 2024, https://arxiv.org/abs/2403.03206):
``x_t = (1 - t) x_0 + t noise``, velocity target ``noise - x_0``, t from a logit-normal law. The
text encoders of SD3 come pretrained; here a second loss stands in for that: small heads, dropped
after training, tell from T5's output what the caption states of each object, and from the CLIPs'
pooled vectors which shapes and colours are in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn

from .batches import PAIRS, SLOTS
from .model import CLIP_G, CLIP_L, T5
from .scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES

_FIELDS = (len(SHAPES), len(COLOURS), len(SIZES), 1)


@dataclass(frozen=True)
class Dropout:
    """Probabilities with which a sample loses its caption or the output of one encoder."""

    caption: float = 0.1
    t5: float = 0.1
    clip_l: float = 0.15
    clip_g: float = 0.15


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
        read = self.norm(self.attention(queries, hidden, hidden, need_weights=False)[0] + queries)
        slots = batch["slots"].float()
        slot = F.binary_cross_entropy_with_logits(
            self.slot(read[:, :SLOTS]).float(), slots, reduction="none"
        )
        relation = F.cross_entropy(
            self.relation(read[:, SLOTS:-1]).float().flatten(0, 1),
            batch["relations"].long().flatten(),
            reduction="none",
        ).view(len(hidden), -1)
        grounds = batch["grounds"].float()
        ground = F.binary_cross_entropy_with_logits(
            self.ground(read[:, -1]).float(), grounds, reduction="none"
        )
        # The gist: what any object must be, so "not red" says nothing.
        shapes, colours = slots[..., : _FIELDS[0]], slots[..., _FIELDS[0] :][..., : _FIELDS[1]]
        must = [x * (x.sum(-1, keepdim=True) == 1) for x in (shapes, colours)]
        gist = F.binary_cross_entropy_with_logits(
            self.gist(pooled).float(), torch.cat(must, -1).amax(1), reduction="none"
        )
        return slot.mean((1, 2)) * 3 + relation.mean(1) + ground.mean(1) + gist.mean(1)


class Objective(nn.Module):
    """The pipeline's trained parts (all but the VAE) and the loss of one batch."""

    def __init__(self, pipe: StableDiffusion3Pipeline, dropout: Dropout | None = None) -> None:
        super().__init__()
        self.transformer = pipe.transformer
        self.text_encoder = pipe.text_encoder
        self.text_encoder_2 = pipe.text_encoder_2
        self.text_encoder_3 = pipe.text_encoder_3
        self.reader = Reader()
        self.dropout = dropout or Dropout()
        self.mean, self.spread = 0.3, 1.0  # of the logit-normal law
        self.reading_weight = 0.15
        for index, name in enumerate(("tokenizer", "tokenizer_2", "tokenizer_3")):
            ids = getattr(pipe, name)([""], padding="max_length", return_tensors="pt").input_ids
            self.register_buffer(f"empty_{index}", ids, persistent=False)

    def encode(self, ids: list[Tensor], keep: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Prompt embeddings [n, 2 L, T5], pooled [n, L + G] and T5's own output [n, L, T5].

        ``ids`` are the three encoders' tokens [n, L]; ``keep`` is 1 or 0 [n] for each. The layout
        is that of diffusers' ``StableDiffusion3Pipeline.encode_prompt``.
        """
        hidden, pooled = [], []
        for encoder, tokens, kept in zip(
            (self.text_encoder, self.text_encoder_2), ids, keep, strict=False
        ):
            out = encoder(tokens, output_hidden_states=True)
            hidden.append(out.hidden_states[-2] * kept[:, None, None])
            pooled.append(out.text_embeds * kept[:, None])
        clip = torch.cat(hidden, -1)
        clip = F.pad(clip, (0, T5 - clip.shape[-1]))
        t5 = self.text_encoder_3(ids[2])[0]
        prompt = torch.cat([clip, t5 * keep[2][:, None, None]], 1)
        return prompt, torch.cat(pooled, -1), t5

    def forward(self, latents: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Flow loss and reading loss (scalars) of latents [n, 16, h, w] and a table's rows."""
        n, device = len(latents), latents.device
        captioned = torch.rand(n, device=device) >= self.dropout.caption
        ids = [
            torch.where(captioned[:, None], batch[name].long(), getattr(self, f"empty_{index}"))
            for index, name in enumerate(("tokenizer", "tokenizer_2", "tokenizer_3"))
        ]
        rates = (self.dropout.clip_l, self.dropout.clip_g, self.dropout.t5)
        keep = [(torch.rand(n, device=device) >= rate).float() for rate in rates]
        prompt, pooled, t5 = self.encode(ids, keep)

        t = torch.sigmoid(self.mean + self.spread * torch.randn(n, device=device))
        noise = torch.randn_like(latents)
        at = t[:, None, None, None]
        velocity = self.transformer(
            hidden_states=(1 - at) * latents + at * noise,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=1000 * t,
            return_dict=False,
        )[0]
        flow = F.mse_loss(velocity.float(), noise - latents)
        reading = self.reader(t5, pooled, batch)
        # Pooled vectors that were dropped cannot be read.
        readable = captioned * keep[0] * keep[1]
        return flow, (reading * readable).sum() / readable.sum().clamp(min=1)

    def loss(self, latents: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Total, flow and reading loss."""
        flow, reading = self(latents, batch)
        return flow + self.reading_weight * reading, flow.detach(), reading.detach()
