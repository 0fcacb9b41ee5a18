"""What a model, a target and a user's wishes come to, before anything is made."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sd35_trt.checkpoints.look import Model
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.components import BRANCH_DENOISER, COMBINE, SHORT_DENOISER
from sd35_trt.dialects import Dialect
from sd35_trt.dimensions import Defaults, Ranges, whole_number
from sd35_trt.errors import UsageError
from sd35_trt.features import PLAIN, Features
from sd35_trt.formats.step_cache import StepCache, read_step_cache
from sd35_trt.mini import step_cache_path
from sd35_trt.policies import Policy, load_policy
from sd35_trt.targets import Target
from sd35_trt.variants import Variant

#: Images per run where none are named.
_BATCH = (1, 4)

#: More images in a run, with guidance, would be more than 126 texts.
_LARGEST_BATCH = 63


def decide_policy(target: Target, name: str | None) -> Policy:
    """The policy named, else the target's.

    Args:
        name: of a policy or its file.

    Raises:
        UsageError: there is none, or the target cannot run it.
    """
    policy = load_policy(name or target.policy)
    target.check(policy)
    return policy


def check_dialect(policy: Policy, dialect: Dialect, library: str) -> None:
    """Refuse a policy whose graphs a library would compute wrongly.

    Args:
        library: that reads the dialect, for the message.

    Raises:
        UsageError: names the precision.
    """
    for rule in policy.rules:
        if rule.precision in dialect.miscomputed:
            raise UsageError(
                f"policy {policy.name!r} asks for {rule.precision}: {library} computes it wrongly",
                "use --policy half, or another --builder",
            )


def decide_features(
    adapters: int | None = None,
    inpainting: bool = False,
    skip_layer_guidance: bool = False,
    short_steps: int | None = None,
    split_guidance: bool = False,
) -> Features:
    """The features that were asked for.

    Args:
        adapters: the largest rank of adapters together; None is without.
        short_steps: blocks that a short step computes; None is without.

    Raises:
        UsageError: a rank that is none of adapters, or no number of blocks.
    """
    if short_steps is not None and short_steps < 1:
        raise UsageError(f"--short-steps {short_steps} computes nothing", "use 1 or more")
    return Features(
        () if adapters is None else _adapter_ranks(adapters),
        inpainting,
        skip_layer_guidance,
        short_steps=short_steps or 0,
        split_guidance=split_guidance,
    )


def decide_short_steps(wish: int | None, cache: StepCache | None) -> int | None:
    """Blocks that a short step computes: as wished, else as the step cache says; None is without.

    Raises:
        UsageError: the two differ.
    """
    if cache is None:
        return wish
    if wish not in (None, cache.short_blocks):
        raise UsageError(
            f"--short-steps {wish}, and the step cache is of short steps of {cache.short_blocks} "
            "blocks",
            "leave out --short-steps",
        )
    return cache.short_blocks


def packaged_step_cache(model: Model[AnyCheckpoint], blocks: int | None) -> StepCache | None:
    """mini's own, where a build with short steps of its number of blocks was given none."""
    if blocks is None or not model.packaged:
        return None
    cache = read_step_cache(step_cache_path())
    return cache if cache.short_blocks == blocks else None


def decide_guidance(variant: Variant, wish: bool | None) -> bool:
    """Whether both branches of guidance are computed: as wished, else as the model needs."""
    return variant.guidance != 1.0 if wish is None else wish


# Ranks that adapters are padded to; beyond the largest, matrices are no longer low-rank.
_RANKS = (16, 32, 64, 128, 256)
_LARGEST_RANK = 512


@dataclass(frozen=True)
class Decision:
    """What a bundle will be.

    Attributes:
        guided: whether the denoiser computes both branches of guidance.
        batch: inclusive range of images per run.
        size: inclusive range of width and height in pixels, multiples of ``size_step``.
        latent_channels: of the latents.
        features: that its engines have.
    """

    model: Model[AnyCheckpoint]
    target: Target
    policy: Policy
    guided: bool
    batch: tuple[int, int]
    size: tuple[int, int]
    size_step: int
    latent_channels: int
    features: Features = PLAIN

    def ranges(self, t5_tokens: int) -> Ranges:
        """What the engines accept.

        Args:
            t5_tokens: the usual length of T5's part of the text.
        """
        tokens = (min(77, t5_tokens), max(512, t5_tokens))
        return Ranges(self.batch, self.size, self.size_step, tokens)

    @property
    def components(self) -> list[str]:
        """Those of the bundle: the model's, and what features add."""
        return bundle_components(self.model, self.features)

    @property
    def steps_and_guidance(self) -> tuple[int, float]:
        """What a picture is drawn with where nothing else is asked for."""
        return self.model.variant.steps, self.model.variant.guidance if self.guided else 1.0

    def defaults(self, t5_tokens: int) -> Defaults:
        """The manifest's: what a picture is drawn with where nothing else is asked for.

        Args:
            t5_tokens: as of :meth:`ranges`.
        """
        variant, (low, high) = self.model.variant, self.size
        width, height = (min(max(side, low), high) for side in variant.size)
        steps, guidance = self.steps_and_guidance
        return Defaults(steps, guidance, (width, height), "euler", t5_tokens)


def decide(
    model: Model[AnyCheckpoint],
    target: Target,
    policy: Policy,
    *,
    guidance: bool | None = None,
    batch: tuple[int, int] | None = None,
    size: tuple[int, int] | None = None,
    size_step: int = 64,
    features: Features = PLAIN,
) -> Decision:
    """Fill in what the user left open, and refuse what the model cannot draw.

    Args:
        guidance: None asks the model's variant.
        batch: None is 1 to 4.
        size: None is half to one and a half times the model's native size.
        features: see :func:`decide_features`.

    Raises:
        CheckpointError: a configuration that is not SD3.5's.
        UsageError: a range outside what the model can draw, or a feature that needs guidance.
    """
    transformer = model.checkpoint.config("transformer")
    guided = decide_guidance(model.variant, guidance)
    if features.skip_layer_guidance and not guided:
        raise UsageError(
            "--skip-layer-guidance steers guidance, and this bundle has none",
            "leave it out, or build with: --guidance",
        )
    if features.split_guidance:
        check_split_guidance(features, guided)
    features = decide_model_features(model, features)
    return Decision(
        model=model,
        target=target,
        policy=policy,
        guided=guided,
        batch=_batch_range(batch),
        size=_size_range(model, size, size_step),
        size_step=size_step,
        latent_channels=whole_number(transformer, "in_channels"),
        features=features,
    )


def check_split_guidance(features: Features, guided: bool) -> None:
    """Refuse to give two GPUs a branch of guidance each where there are not two.

    Raises:
        UsageError: there is none, or a third.
    """
    if not guided:
        raise UsageError(
            "--split-guidance gives two GPUs a branch of guidance each, and this bundle has none",
            "leave it out, or build with: --guidance",
        )
    if features.skip_layer_guidance:
        raise UsageError(
            "--split-guidance has two branches, --skip-layer-guidance needs a third",
            "build two bundles",
        )


def decide_model_features(model: Model[AnyCheckpoint | Structure], features: Features) -> Features:
    """The features that were asked for, and those of the model's ControlNets.

    Raises:
        UsageError: short steps of as many blocks as the model has.
    """
    first = features.short_steps
    blocks = whole_number(model.checkpoint.config("transformer"), "num_layers")
    if first >= blocks:
        raise UsageError(
            f"--short-steps {first}: a full step of this model computes {blocks} blocks",
            f"use less, for example --short-steps {max(1, blocks // 4)}",
        )
    return replace(features, control_blocks=model.control_blocks)


def bundle_components(model: Model[AnyCheckpoint | Structure], features: Features) -> list[str]:
    """The components of a model's bundle, those that features add last."""
    short = [SHORT_DENOISER] if features.short_steps else []
    split = [BRANCH_DENOISER, COMBINE] if features.split_guidance else []
    return [*model.components, *short, *split]


def _adapter_ranks(most: int) -> tuple[int, ...]:
    """Powers of two from 16 up to a rank, and it."""
    if not 1 <= most <= _LARGEST_RANK:
        raise UsageError(f"--adapters {most} is not within 1:{_LARGEST_RANK}", "use for example 64")
    return (*(rank for rank in _RANKS if rank < most), most)


def _batch_range(wish: tuple[int, int] | None) -> tuple[int, int]:
    low, high = wish or _BATCH
    if not 1 <= low <= high <= _LARGEST_BATCH:
        raise UsageError(
            f"--batch {low}:{high} is not within 1:{_LARGEST_BATCH}",
            "choose both bounds among those",
        )
    return low, high


def _size_range(
    model: Model[AnyCheckpoint], wish: tuple[int, int] | None, step: int
) -> tuple[int, int]:
    unit = model.sizes.unit
    if step < unit or step % unit:
        raise UsageError(f"--size-step must be a multiple of {unit}, not {step}", "use 64")
    largest = model.sizes.largest // step * step
    native = max(model.variant.size)
    low, high = wish or (
        max(step, native // 2 // step * step),
        min(native * 3 // 2 // step * step, largest),
    )
    if not (step <= low <= high <= largest) or low % step or high % step:
        raise UsageError(
            f"--size {low}:{high} is not within {step}:{largest} in steps of {step}",
            "choose both bounds among those, or another --size-step",
        )
    return low, high
