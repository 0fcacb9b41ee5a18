"""Draws a prompt set with diffusers and records the amax of what it computes."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from msgspec.structs import asdict, replace

from sd35_trt.checkpoints.controlnets import Net
from sd35_trt.compat.modelopt import is_range_error, restored_functions
from sd35_trt.components import control_part
from sd35_trt.dimensions import T5_TOKENS
from sd35_trt.errors import CheckpointError, Sd35Error, UsageError
from sd35_trt.formats.bundle import Scheduler
from sd35_trt.formats.calibration import DESCRIPTION, Calibration, Provenance
from sd35_trt.policies import Policy
from sd35_trt.progress import Progress, silent
from sd35_trt.store.replacement import write_directory

from .controlnets import hints, run_net
from .diffusers_pipeline import assemble, control_net, diffusers_scheduler
from .latents import LatentBand
from .quantizers import InputCalibrator, needs_quantizers, quiet
from .ranges import RangeRecorder, not_finite
from .state import Amax, Identity, State, calibration_state

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline

    from sd35_trt.checkpoints.merged import AnyCheckpoint

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

TEXT_PARTS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_NEGATIVE = "negative.safetensors"


@dataclass(frozen=True)
class DrawingSettings:
    """How to draw.

    Attributes:
        root: where the model is, for messages.
        source: reads its parts.
        scheduler: in place of the model's own.
        parts: the folders of the parts that it has.
        sizes: (width, height) in pixels; prompts take them in turn.
        seed: prompt ``i`` starts from the noise of ``seed + i``.
        dtype: a key of :data:`DTYPES`.
        batch: prompts drawn at once.
        nets: ControlNets that are calibrated too.
    """

    root: Path
    source: AnyCheckpoint
    scheduler: Scheduler
    parts: tuple[str, ...]
    prompts: tuple[str, ...]
    steps: int
    guidance: float
    sizes: tuple[tuple[int, int], ...]
    seed: int = 0
    device: str = "cpu"
    dtype: str = "fp32"
    batch: int = 1
    nets: tuple[Net, ...] = ()

    def batches(self) -> list[Batch]:
        """The prompts by size, as many at once as asked for.

        Raises:
            UsageError: fewer prompts than sizes.
        """
        count, n = len(self.prompts), len(self.sizes)
        if count < n:
            raise UsageError(f"{n} sizes but {count} prompts", "give more prompts or fewer sizes")
        batches = []
        for k, size in enumerate(self.sizes):
            indices = range(k, count, n)
            for start in range(0, len(indices), self.batch):
                batches.append(Batch(size, tuple(indices[start : start + self.batch])))
        return batches


@dataclass(frozen=True)
class Batch:
    """Prompts, by index, that are drawn at one size (width, height) at once."""

    size: tuple[int, int]
    indices: tuple[int, ...]


def check_device(device: str) -> None:
    """Refuse a device that is not there.

    Raises:
        UsageError: names it.
    """
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"device {device!r} cannot be used: {reason}", "use --device cpu"
        ) from error


def load(settings: DrawingSettings, parts: Sequence[str]) -> StableDiffusion3Pipeline:
    """A pipeline with these parts alone, in the settings' dtype on their device.

    Raises:
        CheckpointError: diffusers cannot load it.
    """
    from transformers.utils import logging as remarks

    remarks.set_verbosity_error()  # before diffusers imports what it warns about
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    try:
        with quiet():
            pipe = assemble(settings.source, settings.scheduler, parts, DTYPES[settings.dtype])
    except Sd35Error:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"diffusers cannot load {settings.root}: {reason}", "download the checkpoint again"
        ) from error
    pipe.set_progress_bar_config(disable=True)
    pipe = pipe.to(settings.device)
    if "transformer" not in parts:
        # Without T5, its part of the text is zeros as wide as the transformer's configuration says.
        config = settings.source.config("transformer")
        pipe.transformer = SimpleNamespace(config=SimpleNamespace(**config))
    return pipe


@contextlib.contextmanager
def diagnosed(recorders: Mapping[str, RangeRecorder]) -> Iterator[None]:
    """Says where when modelopt finds a value that is not finite before a recorder does."""
    try:
        with restored_functions():
            yield
    except AssertionError as error:
        if not is_range_error(error):
            raise
        name = max(recorder.last for recorder in recorders.values())[1]
        raise not_finite(f"what follows {name}") from error


class _Observer:
    """Records ranges, and the inputs of what the policy quantizes, in some parts of a pipeline."""

    def __init__(self, pipe: Any, parts: Sequence[str], policy: Policy) -> None:
        self.recorders: dict[str, RangeRecorder] = {}
        self._calibrators: list[InputCalibrator] = []
        for part in parts:
            model = getattr(pipe, part)
            self.recorders[part] = RangeRecorder(part, model)
            if needs_quantizers(part, model, policy):
                self._calibrators.append(InputCalibrator(part, model, policy))

    def amax(self) -> Amax:
        """Of all that was computed since."""
        values = Amax()
        for recorder in self.recorders.values():
            values.activations.update(recorder.amax)
        for calibrator in self._calibrators:
            values.inputs.update(calibrator.inputs())
            values.bmm.update(calibrator.bmm())
        return values


def t5_tokens(pipe: StableDiffusion3Pipeline) -> int:
    """Length of the T5 part of the text: diffusers' default, or the tokenizer's where shorter."""
    tokenizer = pipe.tokenizer_3
    return min(T5_TOKENS, tokenizer.model_max_length) if tokenizer else T5_TOKENS


def encode(pipe: StableDiffusion3Pipeline, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    """``embeds`` [n, tokens, width] and ``pooled`` [n, width] of prompts, on the CPU."""
    embeds, _, pooled, _ = pipe.encode_prompt(
        prompt=list(prompts),
        prompt_2=None,
        prompt_3=None,
        do_classifier_free_guidance=False,
        max_sequence_length=t5_tokens(pipe),
    )
    return {"embeds": embeds.cpu().contiguous(), "pooled": pooled.cpu().contiguous()}


def draw(
    pipe: StableDiffusion3Pipeline,
    settings: DrawingSettings,
    batch: Batch,
    text: Mapping[str, torch.Tensor],
    negative: Mapping[str, torch.Tensor],
    on_step: Callable[[int], None] = lambda step: None,
    on_latents: Callable[[int, float, torch.Tensor], None] = lambda *_: None,
) -> torch.Tensor:
    """The final latents [n, 16, height / 8, width / 8] of one batch.

    Args:
        text: of the batch's prompts, as :func:`encode` gives it.
        negative: of the empty prompt.
        on_step: called with the number of steps done.
        on_latents: called after each step with its index, the noise level after it and the
            latents there.
    """
    count = len(batch.indices)
    guided = settings.guidance > 1.0
    move = {"device": pipe.transformer.device, "dtype": pipe.transformer.dtype}
    unconditional = {
        "negative_prompt_embeds": negative["embeds"].expand(count, -1, -1).to(**move),
        "negative_pooled_prompt_embeds": negative["pooled"].expand(count, -1).to(**move),
    }

    def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_latents(step, float(pipe.scheduler.sigmas[step + 1]), tensors["latents"])
        on_step(step + 1)
        return {}

    return pipe(
        prompt_embeds=text["embeds"].to(**move),
        pooled_prompt_embeds=text["pooled"].to(**move),
        **(unconditional if guided else {}),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        width=batch.size[0],
        height=batch.size[1],
        generator=[torch.Generator("cpu").manual_seed(settings.seed + i) for i in batch.indices],
        output_type="latent",
        callback_on_step_end=callback,
    ).images


def _through_autoencoder(vae: Any, latents: torch.Tensor) -> None:
    """Decode and encode again, one picture at a time: both directions get their ranges."""
    for one in latents.split(1):
        scaled = one / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        image = vae.decode(scaled.to(vae.dtype)).sample
        vae.encode(image.clamp(-1, 1))


def calibrate(
    settings: DrawingSettings,
    policy: Policy,
    provenance: Provenance,
    out: Path,
    progress: Progress = silent,
) -> Calibration:
    """Draw every prompt and write the calibration.

    The text encoders go first and are then dropped, so that they and the transformer are never in
    memory together. After every batch the values so far are kept beside ``out``: a run that was
    stopped goes on there when it is started again with the same settings.

    Args:
        provenance: of the artifact; a run goes on only from the state of an equal one, its
            ``command`` aside.

    Raises:
        Sd35Error: an activation is not finite; names the module.
        UsageError: the settings contradict each other.
    """
    batches = settings.batches()
    identity = Identity(**asdict(replace(provenance, command=None)), batch=settings.batch)
    with calibration_state(out, identity) as state, torch.inference_mode():
        _encode_all(settings, policy, state, batches, progress)
        _draw_all(settings, policy, state, batches, progress)
        for net in settings.nets:
            _run_net(settings, policy, state, batches, net, progress)
        amax, latents = state.findings.amax, state.findings.latents
        calibration = Calibration(
            amax.inputs, amax.activations, amax.bmm, replace(provenance, latents=latents)
        )
        write_directory(out, DESCRIPTION, calibration.files())
    return calibration


def _text_file(batch: int) -> str:
    return f"text-{batch:05d}.safetensors"


def _picture_file(batch: int) -> str:
    return f"pictures-{batch:05d}.safetensors"


def _encode_all(
    settings: DrawingSettings,
    policy: Policy,
    state: State,
    batches: Sequence[Batch],
    progress: Progress,
) -> None:
    """Encode the empty prompt, then every batch's."""
    stage, total = "encoding", len(batches) + 1
    first = state.findings.done.get(stage, 0)
    progress(stage, first, total)
    if first == total:
        return
    parts = [part for part in TEXT_PARTS if part in settings.parts]
    pipe = load(settings, parts)
    observer = _Observer(pipe, parts, policy)
    for k in range(first, total):
        prompts = [settings.prompts[i] for i in batches[k - 1].indices] if k else [""]
        with diagnosed(observer.recorders):
            text = encode(pipe, prompts)
        state.save_tensors(_text_file(k - 1) if k else _NEGATIVE, text)
        state.finish(stage, observer.amax(), state.findings.latents)
        progress(stage, k + 1, total)
    del pipe, observer
    gc.collect()


def _draw_all(
    settings: DrawingSettings,
    policy: Policy,
    state: State,
    batches: Sequence[Batch],
    progress: Progress,
) -> None:
    stage, total = "drawing", len(settings.prompts) * settings.steps
    first = state.findings.done.get(stage, 0)
    done = sum(len(batch.indices) for batch in batches[:first]) * settings.steps
    progress(stage, done, total)
    if first == len(batches):
        return
    parts = ("transformer", "vae")
    pipe = load(settings, parts)
    observer = _Observer(pipe, parts, policy)
    band = LatentBand(state.findings.latents)
    negative = state.load_tensors(_NEGATIVE)
    for k, batch in enumerate(batches[first:], first):
        size, before = len(batch.indices), done

        def on_step(step: int, size: int = size, before: int = before) -> None:
            progress(stage, before + size * step, total)

        with diagnosed(observer.recorders):
            text = state.load_tensors(_text_file(k))
            latents = draw(pipe, settings, batch, text, negative, on_step, band.add)
            _through_autoencoder(pipe.vae, latents)
            if settings.nets:
                found = hints(pipe.vae, latents, settings.nets)
                state.save_tensors(_picture_file(k), {"latents": latents.float().cpu(), **found})
        state.finish(stage, observer.amax(), band.statistics())
        done += size * settings.steps


def _noise(settings: DrawingSettings, batch: Batch, latents: torch.Tensor) -> torch.Tensor:
    """What the pictures of a batch began with."""
    seeds = (settings.seed + i for i in batch.indices)
    generators = (torch.Generator("cpu").manual_seed(seed) for seed in seeds)
    return torch.cat([torch.randn(latents[:1].shape, generator=g) for g in generators])


def _run_net(
    settings: DrawingSettings,
    policy: Policy,
    state: State,
    batches: Sequence[Batch],
    net: Net,
    progress: Progress,
) -> None:
    part = control_part(net.name)
    first = state.findings.done.get(part, 0)
    progress(part, first, len(batches))
    if first == len(batches):
        return
    with quiet():
        model = control_net(settings.source, part, DTYPES[settings.dtype]).to(settings.device)
    observer = _Observer(SimpleNamespace(**{part: model}), [part], policy)
    scheduler = diffusers_scheduler(settings.scheduler)
    scheduler.set_timesteps(settings.steps)
    steps = list(zip(scheduler.sigmas.tolist(), scheduler.timesteps.tolist(), strict=False))
    negative = state.load_tensors(_NEGATIVE) if settings.guidance > 1.0 else {}
    for k, batch in enumerate(batches[first:], first):
        text, pictures = (state.load_tensors(file(k)) for file in (_text_file, _picture_file))
        latents, count = pictures["latents"], len(batch.indices)
        branches = {
            name: torch.cat([negative[name].expand(count, *own.shape[1:]), own])
            if negative
            else own
            for name, own in text.items()
        }
        with diagnosed(observer.recorders):
            run_net(
                model, steps, branches, latents, _noise(settings, batch, latents), pictures[part]
            )
        state.finish(part, observer.amax(), state.findings.latents)
        progress(part, k + 1, len(batches))
    del model, observer
    gc.collect()
