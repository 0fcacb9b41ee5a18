"""Training data as tensors: examples become integer tables, and scenes are drawn in batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer, T5TokenizerFast

from sd35_trt.mini.rendering import distance_atlas
from sd35_trt.mini.scenes import Example, sample
from sd35_trt.mini.world import (
    BACKGROUNDS,
    COLOURS,
    DRAWN_SHAPES,
    OPPOSITE,
    RELATIONS,
    SHAPES,
    SIZE,
    SIZES,
    Spec,
)

SLOTS = 3
PAIRS = ((0, 1), (1, 2), (0, 2))
"""The pairs of slots whose relation :func:`targets` names."""

Table = dict[str, np.ndarray]
_COLOUR_ROWS, _BACKGROUND_ROWS = list(COLOURS), list(BACKGROUNDS)


def describe(examples: list[Example]) -> Table:
    """Scenes and what their captions state, as arrays of one row per example.

    ``things`` float32 [n, 3, 5] holds shape, colour (rows of the tables; -1 where there is no
    object), x, y and radius; ``background`` int64 [n]. ``slots`` uint8 [n, 3, 19] tells which
    shapes, colours and sizes each object of the caption may have, and in the last column whether
    there is one; ``grounds`` uint8 [n, 6] the allowed backgrounds; ``relations`` uint8 [n, 3] the
    relation of each of :data:`PAIRS`, 4 for none.
    """
    n = len(examples)
    things = np.full((n, SLOTS, 5), -1, np.float32)
    slots = np.zeros((n, SLOTS, len(SHAPES) + len(COLOURS) + len(SIZES) + 1), np.uint8)
    relations = np.full((n, len(PAIRS)), len(RELATIONS), np.uint8)
    for row, e in enumerate(examples):
        for i, t in enumerate(e.scene.things):
            colour = _COLOUR_ROWS.index(t.colour)
            things[row, i] = DRAWN_SHAPES.index(t.shape), colour, t.x, t.y, t.radius
        _fill(e.spec, slots[row], relations[row])
    return {
        "things": things,
        "background": np.array([_BACKGROUND_ROWS.index(e.scene.background) for e in examples]),
        "slots": slots,
        "grounds": np.array(
            [[b in e.spec.backgrounds for b in BACKGROUNDS] for e in examples], np.uint8
        ),
        "relations": relations,
    }


def _fill(spec: Spec, slots: np.ndarray, relations: np.ndarray) -> None:
    for i, o in enumerate(spec.objects):
        allowed = [s in o.shapes for s in SHAPES] + [c in o.colours for c in COLOURS]
        slots[i] = [*allowed, *(s in o.sizes for s in SIZES), True]
    for i, name, j in spec.relations:
        if (i, j) not in PAIRS:
            i, j, name = j, i, OPPOSITE[name]
        relations[PAIRS.index((i, j))] = RELATIONS.index(name)


def tokenize(tokenizer: CLIPTokenizer | T5TokenizerFast, captions: list[str]) -> np.ndarray:
    """Token ids, padded and cut to the tokenizer's length; int16 [n, length]."""
    ids = tokenizer(captions, padding="max_length", truncation=True).input_ids
    return np.array(ids, np.int16)


def _shard(first: int, count: int, split: str, checkpoint: Path) -> Table:
    return tabulate([sample(seed, split) for seed in range(first, first + count)], checkpoint)


def tabulate(examples: list[Example], checkpoint: Path) -> Table:
    """The table of some examples: :func:`describe`, and their captions' token ids.

    ``checkpoint`` is a diffusers directory, for its tokenizers.
    """
    captions = [e.caption for e in examples]
    table = describe(examples)
    for name in ("tokenizer", "tokenizer_2"):
        table[name] = tokenize(CLIPTokenizer.from_pretrained(checkpoint / name), captions)
    t5 = T5TokenizerFast.from_pretrained(checkpoint / "tokenizer_3")
    return table | {"tokenizer_3": tokenize(t5, captions)}


def tables(
    number: int, checkpoint: Path, workers: int, split: str = "train", shard: int = 20_000
) -> Iterator[Table]:
    """Tables of the first ``number`` examples of a split, in shards, made by worker processes.

    ``checkpoint`` is a diffusers directory, for its tokenizers.
    """
    starts = range(0, number, shard)
    counts = [min(shard, number - start) for start in starts]
    make = partial(_shard, split=split, checkpoint=checkpoint)
    # Forked workers would inherit locked thread pools of torch and tokenizers.
    with get_context("spawn").Pool(workers) as pool:
        results = [pool.apply_async(make, pair) for pair in zip(starts, counts, strict=True)]
        for result in results:
            yield result.get()


def join(parts: list[Table]) -> Table:
    """One table out of several."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class SceneRenderer:
    """Draws batches of scenes on a device, as :func:`sd35_trt.mini.rendering.render` draws one."""

    def __init__(self, device: torch.device, size: int = SIZE) -> None:
        self.extent = 1.6
        self.atlas = torch.from_numpy(distance_atlas(extent=self.extent)).to(device)[:, None]
        self.colours = torch.tensor(list(COLOURS.values()), device=device) / 127.5 - 1
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 127.5 - 1
        axis = torch.arange(size, device=device) + 0.5
        self.grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)

    def __call__(self, things: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
        """Pictures float32 [n, 3, size, size] in -1..1 of ``things`` [n, 3, 5] as in describe."""
        n, slots = things.shape[:2]
        flat = things.reshape(n * slots, 5)
        there = flat[:, 0] >= 0
        shape, colour = flat[:, 0].clamp(min=0).long(), flat[:, 1].clamp(min=0).long()
        centre, radius = flat[:, 2:4], flat[:, 4].abs()
        at = (self.grid - centre[:, None, None]) / (self.extent * radius)[:, None, None, None]
        # Outside the atlas the border value still says "outside the shape".
        distance = F.grid_sample(
            self.atlas[shape], at, padding_mode="border", align_corners=True
        ).squeeze(1)
        cover = (0.5 - radius[:, None, None] * distance).clamp(0, 1) * there[:, None, None]
        cover = cover.reshape(n, slots, 1, *cover.shape[1:])
        fill = self.colours[colour].reshape(n, slots, 3, 1, 1)
        picture = self.backgrounds[background][:, :, None, None].expand(-1, -1, *cover.shape[3:])
        for slot in range(slots):
            picture = picture + cover[:, slot] * (fill[:, slot] - picture)
        return picture
