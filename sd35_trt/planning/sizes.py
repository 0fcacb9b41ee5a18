"""Bytes of a model's components at the shapes that a picture needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING

from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.checkpoints.look import Model
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.checkpoints.weight_files import read_json
from sd35_trt.components import LATENT_SCALE, component_row
from sd35_trt.dimensions import MAX_STEPS_AT_ONCE, T5_TOKENS, Bounds
from sd35_trt.features import Features
from sd35_trt.policies import Policy
from sd35_trt.residency import phases_of

from .decide import bundle_components

if TYPE_CHECKING:
    from sd35_trt.export.component import ExportOptions
    from sd35_trt.export.sizes import Sizes

#: A model that a plan can be made for.
AnyModel = Model[AnyCheckpoint | Structure]


def measure(
    model: AnyModel,
    policy: Policy,
    size: tuple[int, int],
    batch: int,
    guided: bool,
    features: Features,
) -> dict[str, Sizes]:
    """Sizes of every component of a model, by name.

    Args:
        size: of the pictures, width and height in pixels.
        batch: pictures at once.
        features: of the bundle.

    Raises:
        CheckpointError: a tensor is missing or misshapen.
        UsageError: the policy does not fit the model.
    """
    from sd35_trt.export.sizes import component_sizes

    return {
        name: component_sizes(name, model.checkpoint, policy, options, dims)
        for name, options, dims in component_shapes(model, size, batch, guided, features)
    }


def component_shapes(
    model: AnyModel, size: tuple[int, int], batch: int, guided: bool, features: Features
) -> Iterator[tuple[str, ExportOptions, dict[str, int]]]:
    """Every component of a model, how it is exported, and its dynamic dimensions by name.

    Args:
        size: of the pictures, width and height in pixels.
        batch: pictures at once.
        features: of the bundle.
    """
    from sd35_trt.export.component import ExportOptions

    clip_tokens, t5_tokens = _text_lengths(model.checkpoint)
    texts = 2 * batch if guided else batch
    width, height = size
    common = {
        "samples": texts,
        "steps": min(model.variant.steps, MAX_STEPS_AT_ONCE),
        "height": height // LATENT_SCALE,
        "width": width // LATENT_SCALE,
        "image_height": height,
        "image_width": width,
    }
    patches = (height // LATENT_SCALE // 2) * (width // LATENT_SCALE // 2)
    if features.control_blocks:
        common |= {"residual_samples": texts, "residual_pixels": patches}
    if features.short_steps:
        common["pixels"] = patches
    names = bundle_components(model, features)
    for name in chain.from_iterable(phases_of(names).values()):
        row = component_row(name)
        encoder = row.tokenizer is not None
        dims = {
            **common,
            "batch": texts if encoder else batch,
            "tokens": t5_tokens if encoder else clip_tokens + t5_tokens,
        }
        yield name, ExportOptions(clip_tokens, guided, features=features.of_component(name)), dims


def picture_bounds(dims: Mapping[str, int], guided: bool) -> dict[str, Bounds]:
    """Of an engine whose usual and largest shapes are these, but for the batch.

    Like a build's, it takes single pictures, shorter texts and half the size too: with a dimension
    that is fixed it would be another engine.
    """
    texts = 2 if guided else 1
    bounds: dict[str, Bounds] = {}
    for name, largest in dims.items():
        if name in ("height", "width", "image_height", "image_width"):
            unit = 2 if name in ("height", "width") else 2 * LATENT_SCALE
            low = max(largest // (2 * unit) * unit, unit)
        else:
            low = {"batch": 1, "samples": texts, "steps": 1}.get(name, (largest + 1) // 2)
        usual = low if name in ("batch", "samples") else largest
        bounds[name] = (low, usual, largest)
    return bounds


def _text_lengths(source: AnyCheckpoint | Structure) -> tuple[int, int]:
    """Tokens of CLIP's part of the text and of T5's.

    A single file has no tokenizers: the published ones are as long as the models allow.
    """
    clip = int(source.config("text_encoder").get("max_position_embeddings", 77))
    if not isinstance(source, Checkpoint):
        return clip, T5_TOKENS
    limits = []
    for name, most in (("clip_l", clip), ("t5", T5_TOKENS)):
        row = component_row(name)
        if source.has(row.part):
            data = read_json(source.root / str(row.tokenizer) / "tokenizer_config.json")
            most = int(min(most, data.get("model_max_length", most)))
        limits.append(most)
    return limits[0], limits[1]
