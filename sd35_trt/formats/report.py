"""The quality report: how far what a bundle draws is from what a reference draws.

What ``report/report.json`` in the compared bundle holds; :mod:`sd35_trt.quality` writes it.
"""

from __future__ import annotations

import json
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from .reading import Count, Digest, Name, Positive, Text

#: Version of the file.
FORMAT = 1

#: A relative error of latents for each step.
Steps = Annotated[tuple[float, ...], Meta(max_length=4096)]


class ComparedModel(Struct, frozen=True):
    """The checkpoint behind both bundles; see :class:`sd35_trt.formats.bundle.ModelRecord`."""

    name: Text
    variant: Name


class Side(Struct, frozen=True):
    """One of the two bundles.

    Attributes:
        bundle: as it was named: its directory, or ``half`` for a reference built on the spot.
        manifest_sha256: of the bytes of its manifest.
        weight_bytes: component → bytes of weights as stored.
        made: when it was built.
    """

    bundle: Text
    manifest_sha256: Digest
    policy: Text
    policy_sha256: Digest
    target: Name
    builder: Name
    weight_bytes: dict[Name, Count]
    made: Text


class Run(Struct, frozen=True):
    """What both bundles drew.

    Attributes:
        prompts: where they come from; ``prompts_sha256`` is of the prompts themselves.
        images: number of pictures; picture i has the seed ``seed + i``.
        size: (width, height) in pixels.
        batch: pictures at a time.
    """

    prompts: Text
    prompts_sha256: Digest
    images: Positive
    seed: Count
    steps: Positive
    guidance: float
    size: tuple[Positive, Positive]
    batch: Positive


class LinearError(Struct, frozen=True):
    """One linear of a component.

    Attributes:
        precision: how the compared bundle stores the weight, ``reference_precision`` how the
            reference does; names as in a policy.
        own_error: ‖y' − y‖ / ‖y‖ on the same input; None where it is not finite.
        in_place_error: the same with each bundle's own input.
    """

    component: Name
    layer: Name
    precision: Name
    reference_precision: Name
    own_error: float | None
    in_place_error: float | None


class FreeRunning(Struct, frozen=True):
    """‖z' − z‖ / ‖z‖ after each step, over the pictures, each bundle going on from its own latents.

    Attributes:
        p10, p90: the 10th and the 90th percentile.
    """

    mean: Steps
    p10: Steps
    median: Steps
    p90: Steps


class TeacherForced(Struct, frozen=True):
    """‖v' − v‖ / ‖v‖ of the velocity that each step predicts from the reference's latents.

    Attributes:
        mean: over ``images`` pictures.
    """

    mean: Steps
    images: Positive


class FinalError(Struct, frozen=True):
    """‖z' − z‖ / ‖z‖ after the last step, over the pictures."""

    mean: float
    median: float
    max: float


class LatentErrors(Struct, frozen=True):
    """How far the latents are apart.

    Attributes:
        sigma: noise level after each step.
    """

    sigma: Steps
    free_running: FreeRunning
    teacher_forced: TeacherForced
    final: FinalError


class Psnr(Struct, frozen=True):
    """Peak signal-to-noise ratio in dB; None where it is infinite, that of equal pictures.

    Attributes:
        all: of the mean squared error of all pictures.
        median, worst: of a picture.
    """

    all: float | None
    median: float | None
    worst: float | None


class Spread(Struct, frozen=True):
    """A figure over the pictures."""

    mean: float
    median: float
    worst: float


class Likeness(Struct, frozen=True):
    """How alike the pictures are.

    Attributes:
        identical: number of pairs without any difference.
        ssim: structural similarity, 1 for equal pictures.
        lpips: perceptual distance, 0 for equal pictures; None where it is not installed.
        lpips_note: the network behind it, or why there is none.
    """

    identical: Count
    psnr: Psnr
    ssim: Spread
    lpips: Spread | None
    lpips_note: Text


class Share(Struct, frozen=True):
    """A share of ``count`` (0 to 1) with its 95 % Wilson interval."""

    value: float
    low: float
    high: float
    count: Count


class PairedDifference(Struct, frozen=True):
    """Candidate minus reference, on the same captions and seeds.

    Attributes:
        difference: of the shares, −1 to 1, with its 95 % interval ``low`` to ``high`` (adjusted
            Wald; Bonett and Price, 2012).
        lost: right by the reference alone; ``gained``: by the candidate alone.
        p: exact McNemar test: how likely so uneven a split of these is by chance.
    """

    difference: float
    low: float
    high: float
    lost: Count
    gained: Count
    p: float


class SceneShares(Struct, frozen=True):
    """How many of some captions' scenes each bundle gets right as a whole."""

    reference: Share
    candidate: Share
    paired: PairedDifference


class StatementShares(Struct, frozen=True):
    """Shares (0 to 1) of single statements that hold."""

    reference: float
    candidate: float


class Scenes(Struct, frozen=True):
    """How many of mini's scenes are right.

    Attributes:
        whole: over all captions.
        kinds: kind of caption → over these.
        attributes: kind of statement, or ``all``.
    """

    whole: SceneShares
    kinds: dict[Name, SceneShares]
    attributes: dict[Name, StatementShares]


class PicturePair(Struct, frozen=True, omit_defaults=True):
    """One prompt, drawn by both.

    Attributes:
        squared_error: mean squared difference, in squared levels of 8 bits.
        psnr: in dB; None for equal pictures.
        ssim, lpips: see :class:`Likeness`.
        latent_error: ‖z' − z‖ / ‖z‖ after the last step.
        reference_right, candidate_right: whether every statement of the caption holds; of mini
            alone, absent otherwise.
    """

    prompt: str
    seed: Count
    squared_error: float
    psnr: float | None
    ssim: float
    lpips: float | None
    latent_error: float
    reference_right: bool | None = None
    candidate_right: bool | None = None


class Check(Struct, frozen=True):
    """One figure and its bound; ``value`` None is that of equal pictures, an infinite PSNR."""

    figure: Name
    unit: Text
    option: Name
    value: float | None
    threshold: float
    passed: bool


class Report(Struct, frozen=True, kw_only=True):
    """Everything in ``report.json``.

    Attributes:
        made: when.
        command: that made it; ``versions``: of the libraries that took part.
        linears: in the order of the graphs; empty where they were not compared, and
            ``linears_note`` says why.
        scenes: None where the prompts are not mini's own captions.
        each: picture by picture.
        gate: the bounds that were set; ``passed`` where all of them hold.
        seconds: that it took.
    """

    format: int = FORMAT
    made: Text
    command: Text
    versions: dict[Name, Text]
    model: ComparedModel
    reference: Side
    candidate: Side
    run: Run
    linears: tuple[LinearError, ...]
    linears_note: Text
    latents: LatentErrors
    images: Likeness
    scenes: Scenes | None
    each: tuple[PicturePair, ...]
    gate: tuple[Check, ...]
    passed: bool
    seconds: float

    def to_json(self) -> str:
        """Content of the file; mappings keep their order.

        Raises:
            ValueError: a figure is NaN or infinite.
        """
        # msgspec would write null for such a figure.
        data = msgspec.to_builtins(self)
        return json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
