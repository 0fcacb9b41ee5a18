"""What quantizing one group of linears at a time does to the denoised prediction."""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from msgspec import Struct, to_builtins
from torch import nn

from sd35_trt.compat.modelopt import quantizers
from sd35_trt.components import layer_owner
from sd35_trt.errors import UsageError
from sd35_trt.formats.calibration import Provenance
from sd35_trt.formats.reading import Count, Name
from sd35_trt.policies import Policy
from sd35_trt.progress import Progress, silent
from sd35_trt.store.replacement import replacement

from .groups import Group, LinearSize, choose_half, group_linears, make_policy, policy_toml
from .quantizers import insert_quantizers, quantized_linears
from .ranges import RangeRecorder
from .run import TEXT_PARTS, DrawingSettings, diagnosed, draw, encode, load

RESULT, PLOT, POLICY = "sensitivity.json", "sensitivity.png", "policy.toml"

#: Steps of each prompt at which the prediction is looked at, evenly spread.
_STEPS = 4


class Outcome(Struct, frozen=True):
    """Relative error of the prediction, and bytes of all the MMDiT's linears."""

    error: float
    bytes: Count


class GroupOutcome(Struct, frozen=True):
    """One group of linears in FP8, all others in half precision; see :class:`Group`.

    Attributes:
        error: of the prediction, relative.
        layers: ``component/layer``.
    """

    name: Name
    kind: Name
    depth: str
    error: float
    saved_bytes: Count
    layers: tuple[Name, ...]


class Choice(Struct, frozen=True):
    """The names of the groups that a budget keeps half, and what that gives."""

    half: tuple[Name, ...]
    error: float
    bytes: Count


class SensitivityRecord(Struct, frozen=True, omit_defaults=True):
    """What ``sensitivity.json`` holds beside the provenance.

    Attributes:
        everything, nothing: with every linear in FP8, and with none.
        base_policy: with what the base policy puts in FP8.
        chosen: absent without a budget.
    """

    everything: Outcome
    nothing: Outcome
    base_policy: Outcome
    groups: tuple[GroupOutcome, ...]
    chosen: Choice | None = None


@dataclass(frozen=True)
class Sensitivity:
    """Relative errors ‖denoised − reference‖ / ‖reference‖ over some prompts and steps.

    Attributes:
        groups: with ``errors``, each of a model where that group alone is in FP8.
        everything: error with every linear in FP8.
        base: error with what the base policy puts in FP8, ``base_bytes`` the bytes of all linears.
        half: the groups that a budget keeps half; None without a budget.
        chosen: error with that choice, ``chosen_bytes`` its bytes.
    """

    groups: tuple[Group, ...]
    errors: tuple[float, ...]
    everything: float
    base: float
    base_bytes: int
    half: tuple[Group, ...] | None = None
    chosen: float | None = None
    chosen_bytes: int | None = None

    def record(self) -> SensitivityRecord:
        """As ``sensitivity.json`` has it."""
        chosen = None
        if self.half is not None and self.chosen is not None and self.chosen_bytes is not None:
            names = tuple(group.name for group in self.half)
            chosen = Choice(names, self.chosen, self.chosen_bytes)
        return SensitivityRecord(
            everything=Outcome(self.everything, sum(g.fp8_bytes for g in self.groups)),
            nothing=Outcome(0.0, sum(g.half_bytes for g in self.groups)),
            base_policy=Outcome(self.base, self.base_bytes),
            groups=tuple(
                GroupOutcome(
                    name=group.name,
                    kind=group.kind,
                    depth=group.depth,
                    error=error,
                    saved_bytes=group.saved_bytes,
                    layers=tuple(layer.name for layer in group.layers),
                )
                for group, error in zip(self.groups, self.errors, strict=True)
            ),
            chosen=chosen,
        )


@dataclass(frozen=True)
class _Captured:
    """One call of the transformer: its arguments, and how its output becomes the prediction."""

    arguments: Mapping[str, Any]
    guidance: float

    def denoised(self, transformer: Any) -> torch.Tensor:
        """latents − σ·velocity in FP32, with guidance where it is on."""
        velocity = transformer(**self.arguments)[0].float()
        latents = self.arguments["hidden_states"].float()
        if self.guidance > 1.0:
            uncond, cond = velocity.chunk(2)
            velocity = uncond + self.guidance * (cond - uncond)
            latents = latents[: len(velocity)]
        sigma = self.arguments["timestep"][: len(velocity)].float().view(-1, 1, 1, 1) / 1000
        return latents - sigma * velocity


def _linears(model: nn.Module) -> list[LinearSize]:
    return [
        LinearSize(
            f"{layer_owner('transformer', name)}/{name}",
            module.weight.numel(),
            0 if module.bias is None else module.bias.numel(),
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]


def _quantizers(linears: Iterable[LinearSize]) -> set[str]:
    layers = [linear.name.partition("/")[2] for linear in linears]
    return {f"{layer}.{kind}_quantizer" for layer in layers for kind in ("input", "weight")}


@contextlib.contextmanager
def _capturing(transformer: nn.Module, steps: int, guidance: float) -> Iterator[list[_Captured]]:
    """Keeps the arguments of some of the calls while pictures are drawn."""
    chosen = {steps * (2 * k + 1) // (2 * _STEPS) for k in range(_STEPS)}
    captured: list[_Captured] = []
    calls = 0

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal calls
        if calls % steps in chosen:
            # The pipeline makes a new tensor for every step, so none needs to be copied.
            captured.append(_Captured({**kwargs, "return_dict": False}, guidance))
        calls += 1

    handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
    yield captured
    handle.remove()


class _Meter:
    """The error of a transformer in which some quantizers are on."""

    def __init__(self, transformer: Any, captured: Sequence[_Captured]) -> None:
        self._transformer = transformer
        self._captured = captured
        self._switch(set())
        self._reference = [call.denoised(transformer) for call in captured]

    def _switch(self, on: set[str]) -> None:
        for name, quantizer in quantizers(self._transformer).items():
            (quantizer.enable if name in on else quantizer.disable)()

    def error(self, linears: Iterable[LinearSize]) -> float:
        """With these linears in FP8."""
        self._switch(_quantizers(linears))
        difference = reference = 0.0
        for call, expected in zip(self._captured, self._reference, strict=True):
            value = call.denoised(self._transformer)
            difference += float((value - expected).double().square().sum())
            reference += float(expected.double().square().sum())
        return (difference / reference) ** 0.5


def measure(
    settings: DrawingSettings,
    base: Policy,
    budget: int | None = None,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantize group after group.

    Activations are calibrated on the same few pictures, drawn unquantized.

    Args:
        base: a policy to compare with.
        budget: bytes of all the MMDiT's linears; the most sensitive groups are kept half within it.

    Raises:
        Sd35Error: the model computes values that are not finite.
        UsageError: the budget is smaller than everything in FP8.
    """
    batches = settings.batches()
    with torch.inference_mode():
        progress("encoding", 0, 1)
        parts = [part for part in TEXT_PARTS if part in settings.parts]
        pipe = load(settings, parts)
        negative = encode(pipe, [""])
        texts = [encode(pipe, [settings.prompts[i] for i in b.indices]) for b in batches]
        progress("encoding", 1, 1)
        del pipe
        gc.collect()
        pipe = load(settings, ("transformer",))
        transformer: Any = pipe.transformer
        linears = _linears(transformer)
        groups = group_linears(linears, len(transformer.transformer_blocks))
        smallest = sum(group.fp8_bytes for group in groups)
        if budget is not None and budget < smallest:
            raise UsageError(
                f"--budget {budget:,} is less than the {smallest:,} bytes of everything in FP8",
                "give a larger budget",
            )
        in_base = set(quantized_linears("transformer", transformer, base))
        recorder = RangeRecorder("transformer", transformer)  # names a module that computes NaN
        insert_quantizers(transformer, _quantizers(linears))
        total, done = len(settings.prompts) * settings.steps, 0

        def forward_loop(model: nn.Module) -> None:
            nonlocal done
            for batch, text in zip(batches, texts, strict=True):
                size, before = len(batch.indices), done

                def on_step(step: int, size: int = size, before: int = before) -> None:
                    progress("drawing", before + size * step, total)

                draw(pipe, settings, batch, text, negative, on_step)
                done += size * settings.steps

        import modelopt.torch.quantization as mtq

        calls = _capturing(transformer, settings.steps, settings.guidance)
        with calls as captured, diagnosed({"transformer": recorder}):
            mtq.calibrate(transformer, "max", forward_loop)
        recorder.remove()
        meter = _Meter(transformer, captured)
        errors = []
        for k, group in enumerate(groups):
            progress("groups", k, len(groups))
            errors.append(meter.error(group.layers))
        progress("groups", len(groups), len(groups))
        result = Sensitivity(
            groups=tuple(groups),
            errors=tuple(errors),
            everything=meter.error(linears),
            base=meter.error(x for x in linears if x.name in in_base),
            base_bytes=sum(x.fp8_bytes if x.name in in_base else x.half_bytes for x in linears),
        )
        if budget is None:
            return result
        half = choose_half(groups, errors, budget)
        rest = [group for group in groups if group not in half]
        chosen = meter.error(layer for group in rest for layer in group.layers)
    return replace(
        result,
        half=tuple(half),
        chosen=chosen,
        chosen_bytes=sum(g.half_bytes if g in half else g.fp8_bytes for g in groups),
    )


def plot(result: Sensitivity, path: Path) -> None:
    """Error against bytes saved, one point per group; needs matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    markers = dict(zip(("first third", "middle third", "last third", ""), "<o>s", strict=True))
    colours = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(g.kind for g in result.groups))}
    for group, error in zip(result.groups, result.errors, strict=True):
        in_half = result.half is not None and group in result.half
        axes.plot(
            group.saved_bytes / 1e6,
            error,
            markers[group.depth],
            color=colours[group.kind],
            fillstyle="none" if in_half else "full",
            label=group.name + (" (kept half)" if in_half else ""),
        )
    axes.set(xscale="log", yscale="log", xlabel="bytes saved, MB", ylabel="relative error, alone")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    axes.set_title("Quantizing one group of linears to FP8")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize="small", frameon=False)
    figure.savefig(path, dpi=120)


def write(
    result: Sensitivity,
    base: Policy,
    provenance: Provenance,
    out: Path,
    plotter: Callable[[Sensitivity, Path], None] | None,
) -> None:
    """Write ``sensitivity.json``, the plot, and with a budget ``policy.toml``, in one step.

    Args:
        plotter: :func:`plot`, or None where matplotlib is not installed.
    """
    with replacement(out, RESULT) as work:
        data = {"provenance": provenance.known(), **to_builtins(result.record())}
        text = json.dumps(data, indent=1, ensure_ascii=False)
        (work / RESULT).write_text(text + "\n", "utf-8")
        if plotter is not None:
            plotter(result, work / PLOT)
        if result.half is not None:
            policy = make_policy(out.name, base, result.groups, result.errors, result.half)
            (work / POLICY).write_text(policy_toml(policy), "utf-8")
