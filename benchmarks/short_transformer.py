"""mini's transformer in two parts, and pictures that are drawn with short steps, in PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from sd35_trt.calibration.step_extrapolation import Rule
from sd35_trt.calibration.step_search import Schedule
from sd35_trt.mini.scoring import GUIDANCE
from sd35_trt.runtime.schedule import coefficients, make_sigmas

_SHIFT = 3.0


@dataclass(frozen=True)
class Stream:
    """What goes through the blocks: image and text tokens, [2n, tokens, D], and the embedding of
    timestep and pooled text, [2n, D]."""

    image: Tensor
    text: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class Captions:
    """What is drawn, n pictures: noise [n, 16, h, w]; conditions [2n, …], unconditional first."""

    noise: Tensor
    prompts: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, pipe: StableDiffusion3Pipeline, captions: Sequence[str], seed: int) -> Captions:
        """Caption i from seed ``seed + i``."""
        prompts, negative, pooled, negative_pooled = pipe.encode_prompt(
            list(captions), None, None, negative_prompt="", max_sequence_length=32
        )
        size = pipe.transformer.config.sample_size
        noise = [
            torch.randn(16, size, size, generator=torch.Generator().manual_seed(seed + i))
            for i in range(len(captions))
        ]
        return cls(
            torch.stack(noise).to(prompts.device),
            torch.cat([negative, prompts]),
            torch.cat([negative_pooled, pooled]),
        )


class Blocks:
    """The transformer, cut behind its first blocks."""

    def __init__(self, transformer: Any, first: int) -> None:
        self._transformer = transformer
        self._first = first

    def enter(self, latents: Tensor, sigma: float, captions: Captions) -> Stream:
        """Embed latents [n, 16, h, w], once for each branch of guidance."""
        both = torch.cat([latents, latents])
        times = torch.full((len(both),), 1000 * sigma, device=both.device)
        return Stream(
            self._transformer.pos_embed(both),
            self._transformer.context_embedder(captions.prompts),
            self._transformer.time_text_embed(times, captions.pooled),
        )

    def first(self, stream: Stream) -> Stream:
        """The first blocks."""
        return self._through(stream, self._transformer.transformer_blocks[: self._first])

    def others(self, stream: Stream) -> Stream:
        """All others."""
        return self._through(stream, self._transformer.transformer_blocks[self._first :])

    @staticmethod
    def _through(stream: Stream, blocks: Sequence[Any]) -> Stream:
        image, text = stream.image, stream.text
        for block in blocks:
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb=stream.embedding
            )
        return Stream(image, text, stream.embedding)

    def velocity(self, image: Tensor, embedding: Tensor) -> Tensor:
        """Guided velocity [n, 16, h, w] of the image's stream behind all blocks."""
        out = self._transformer.proj_out(self._transformer.norm_out(image, embedding))
        side = int(out.shape[1] ** 0.5)
        out = out.reshape(len(out), side, side, 2, 2, -1)
        out = torch.einsum("nhwpqc->nchpwq", out).reshape(len(out), -1, 2 * side, 2 * side)
        without, with_ = out.chunk(2)
        return without + GUIDANCE * (with_ - without)


#: What is added to the stream behind the first blocks; see :meth:`Drawing.walk`.
Choose = Callable[[int, Stream, Stream], Tensor]


class Drawing:
    """Draws captions with mini, some steps of them short.

    Args:
        first: blocks that a short step computes.
        steps: of a picture.
        sampler: a key of :data:`sd35_trt.runtime.schedule.SAMPLERS`.
    """

    def __init__(
        self, transformer: Any, captions: Captions, first: int, steps: int, sampler: str
    ) -> None:
        self._blocks = Blocks(transformer, first)
        self._captions = captions
        self.sigmas = make_sigmas(steps, _SHIFT)
        self.table = coefficients(sampler, self.sigmas)

    @property
    def weights(self) -> np.ndarray:
        """How far an error of a step's velocity moves the latents: float64 [steps]."""
        own, following = self.table[:, 1], np.append(self.table[1:, 2], 0.0)
        return np.abs(own + following).astype(np.float64) * self.sigmas[:-1]

    @torch.no_grad()
    def walk(self, choose: Choose) -> Tensor:
        """Draw, and return the latents.

        Args:
            choose: what the other blocks change of the image's stream, of the number of the step,
                the stream before the first blocks and that behind them.
        """
        latents, before = self._captions.noise, torch.zeros_like(self._captions.noise)
        for step, row in enumerate(self.table.tolist()):
            sigma = float(self.sigmas[step])
            entered = self._blocks.enter(latents, sigma, self._captions)
            kept = self._blocks.first(entered)
            image = kept.image + choose(step, entered, kept)
            denoised = latents - sigma * self._blocks.velocity(image, kept.embedding)
            latents = row[0] * latents + row[1] * denoised + row[2] * before
            before = denoised
        return latents

    def change(self, kept: Stream) -> Tensor:
        """What the other blocks change."""
        return self._blocks.others(kept).image - kept.image

    def exact(self) -> tuple[Tensor, Tensor]:
        """Latents, and the change of every step: [steps, 2n, tokens, D]."""
        changes: list[Tensor] = []

        def choose(step: int, entered: Stream, kept: Stream) -> Tensor:
            changes.append(self.change(kept))
            return changes[-1]

        return self.walk(choose), torch.stack(changes)

    def short(self, schedule: Schedule) -> Tensor:
        """Latents, with the steps short that a schedule says."""
        changes: list[Tensor] = []

        def choose(step: int, entered: Stream, kept: Stream) -> Tensor:
            pair = schedule[step]
            if pair is None:
                changes.append(self.change(kept))
                return changes[-1]
            return pair[0] * changes[-1] + pair[1] * changes[-2]

        return self.walk(choose)

    def fitted(self, schedule: Schedule, guided: bool) -> Schedule:
        """The schedule with coefficients by least squares along its own way.

        Args:
            guided: whether what counts is the change in guidance's direction.
        """
        changes: list[Tensor] = []
        found: list[tuple[float, float] | None] = []

        def choose(step: int, entered: Stream, kept: Stream) -> Tensor:
            change = self.change(kept)
            if schedule[step] is None:
                changes.append(change)
                found.append(None)
                return change
            pair = _fit(change, changes[-1], changes[-2], guided)
            found.append(pair)
            return pair[0] * changes[-1] + pair[1] * changes[-2]

        self.walk(choose)
        return tuple(found)

    def threshold(self, most: float, rule: Rule) -> tuple[Tensor, np.ndarray]:
        """Latents where each picture decides for itself, and how many full steps each had.

        A step is short where what the first blocks change differs by less than ``most`` from what
        they changed in the last full step, mean magnitudes, relative: First-Block-Cache's test.

        Args:
            rule: coefficients; before a second full step, the last change is held.
        """
        return _Thresholds(self, most, rule).draw()


def guided_direction(change: Tensor) -> Tensor:
    """Of both branches' changes [2n, …], as guidance joins them."""
    without, with_ = change.chunk(2)
    return without + GUIDANCE * (with_ - without)


def inner_products(changes: Tensor, guided: bool) -> np.ndarray:
    """Of the steps' changes [steps, 2n, tokens, D], float64 [steps, steps]."""
    rows = [guided_direction(c) if guided else c for c in changes]
    flat = torch.stack([row.flatten() for row in rows])
    parts = [part.double() for part in flat.split(1 << 20, dim=1)]
    return torch.stack([part @ part.T for part in parts]).sum(0).cpu().numpy()


def _fit(change: Tensor, last: Tensor, earlier: Tensor, guided: bool) -> tuple[float, float]:
    from sd35_trt.calibration.step_extrapolation import least_squares

    products = inner_products(torch.stack([earlier, last, change]), guided)
    return least_squares(products)(2, 1, 0)


class _Thresholds:
    """One drawing of :meth:`Drawing.threshold`."""

    def __init__(self, drawing: Drawing, most: float, rule: Rule) -> None:
        self._drawing = drawing
        self._most = most
        self._rule = rule

    def draw(self) -> tuple[Tensor, np.ndarray]:
        """Latents, and full steps of each picture."""
        self._full: list[list[int]] = []
        latents = self._drawing.walk(self._choose)
        return latents, np.array([len(steps) for steps in self._full])

    def _choose(self, step: int, entered: Stream, kept: Stream) -> Tensor:
        residual, change = kept.image - entered.image, self._drawing.change(kept)
        if step == 0:
            self._full = [[0] for _ in range(len(residual) // 2)]
            self._residual, self._last, self._earlier = residual, change, change
            return change
        short = self._near(residual)
        pairs = [
            self._rule(step, full[-1], full[-2]) if len(full) > 1 else (1.0, 0.0)
            for full in self._full
        ]
        factors = torch.tensor(pairs + pairs, device=change.device)[:, :, None, None]
        guess = factors[:, 0] * self._last + factors[:, 1] * self._earlier
        choice = torch.cat([short, short])[:, None, None]
        self._earlier = torch.where(choice, self._earlier, self._last)
        self._last = torch.where(choice, self._last, change)
        self._residual = torch.where(choice, self._residual, residual)
        for full, is_short in zip(self._full, short.tolist(), strict=True):
            full += [] if is_short else [step]
        return torch.where(choice, guess, change)

    def _near(self, residual: Tensor) -> Tensor:
        """Of each picture, over both branches: bool [n]."""
        difference, before = (residual - self._residual).abs(), self._residual.abs()
        shares = [
            torch.stack([part.mean((1, 2)) for part in x.chunk(2)]).sum(0)
            for x in (difference, before)
        ]
        near: Tensor = shares[0] / shares[1] < self._most
        return near
