"""Options that several commands take, and the types of their values."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from sd35_trt.checkpoints.model_options import HINT_KINDS, PACKAGED, ControlNet, Lora
from sd35_trt.errors import UsageError
from sd35_trt.units import parse_bytes, parse_duration
from sd35_trt.variants import CUSTOM, VARIANTS

_Command = TypeVar("_Command", bound=Callable[..., Any])


class _Pair(click.ParamType):
    """``A<separator>B`` as two integers; ``A`` alone means both."""

    def __init__(self, name: str, pattern: str) -> None:
        self.name = name
        self._pattern = re.compile(pattern)

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = self._pattern.fullmatch(str(value))
        if match:
            return int(match[1]), int(match[2])
        if str(value).isdigit():
            return int(value), int(value)
        self.fail(f"{value!r} is not {self.name}", param, ctx)


class _Bytes(click.ParamType):
    name = "BYTES"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return parse_bytes(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class _Duration(click.ParamType):
    name = "TIME"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return parse_duration(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


class _Lora(click.ParamType):
    """``FILE:SCALE``, or ``FILE`` alone for a scale of 1."""

    name = "FILE[:SCALE]"

    def convert(self, value: Any, param: Any, ctx: Any) -> Lora:
        if isinstance(value, Lora):
            return value
        path, colon, scale = str(value).rpartition(":")
        if not colon or Path(value).exists():
            return Lora(Path(value))
        try:
            number = float(scale)
        except ValueError:
            return Lora(Path(value))
        if not path or not math.isfinite(number):
            self.fail(f"{value!r} is not FILE:SCALE with a finite number", param, ctx)
        return Lora(Path(path), number)


class _Blocks(click.ParamType):
    """Numbers with commas between."""

    name = "N,N,…"

    def convert(self, value: Any, param: Any, ctx: Any) -> list[int]:
        if isinstance(value, list):
            return value
        try:
            return [int(number) for number in str(value).split(",")]
        except ValueError:
            self.fail(f"{value!r} is not numbers with commas between", param, ctx)


def _after_equals(value: str) -> tuple[str, str] | None:
    name, equals, rest = value.partition("=")
    return (name, rest) if equals and name and rest else None


class _ControlNet(click.ParamType):
    """``NAME=DIR:KIND``, or ``NAME=DIR`` where the names tell the kind."""

    name = "NAME=DIR[:KIND]"

    def convert(self, value: Any, param: Any, ctx: Any) -> ControlNet:
        if isinstance(value, ControlNet):
            return value
        pair = _after_equals(str(value))
        if pair is None:
            self.fail(f"{value!r} is not NAME=DIR", param, ctx)
        model, _, kind = pair[1].rpartition(":")
        if model and kind in HINT_KINDS and f"{model}:" != PACKAGED:
            return ControlNet(pair[0], model, kind)
        return ControlNet(*pair)


class _Control(click.ParamType):
    """``NAME=FILE:SCALE``, or ``NAME=FILE`` alone for a scale of 1."""

    name = "NAME=FILE[:SCALE]"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, Lora]:
        if isinstance(value, tuple):
            return value
        pair = _after_equals(str(value))
        if pair is None:
            self.fail(f"{value!r} is not NAME=FILE", param, ctx)
        return pair[0], LORA.convert(pair[1], param, ctx)


class _Interval(click.ParamType):
    """``NAME=START:END`` as a name and two numbers."""

    name = "NAME=START:END"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[str, tuple[float, float]]:
        if isinstance(value, tuple):
            return value
        name, _, both = str(value).partition("=")
        start, _, end = both.partition(":")
        try:
            return name, (float(start), float(end))
        except ValueError:
            self.fail(f"{value!r} is not NAME=START:END, such as canny=0:0.6", param, ctx)


#: Width and height: ``1344x768``.
SIZE = _Pair("WxH", r"(\d+)[xX](\d+)")

#: Inclusive bounds: ``512:1536``.
RANGE = _Pair("MIN:MAX", r"(\d+):(\d+)")

#: A number of bytes: ``6000000``, ``5.5GB``, ``800 MB``, ``8GiB``.
BYTES = _Bytes()

#: Seconds of a time in words: ``90m``, ``12h``, ``30d``, ``2w``.
DURATION = _Duration()

#: A file and a scale: ``style.safetensors:0.8``.
LORA = _Lora()

#: Blocks of a transformer: ``7,8,9``.
BLOCKS = _Blocks()

#: A ControlNet for a build: ``canny=nets/canny``.
CONTROLNET = _ControlNet()

#: A ControlNet's picture, and how much of it: ``canny=edges.png:0.7``.
CONTROL = _Control()

#: A ControlNet's part of the steps: ``canny=0:0.6``.
INTERVAL = _Interval()

#: What ``--model`` takes where a checkpoint is read.
MODELS = "mini|DIR|FILE|HUB_ID"


def invocation() -> str:
    """The command as it was given, for the record of what it makes."""
    import shlex

    return shlex.join(["sd35-trt", *sys.argv[1:]])


bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))

model_option = click.option(
    "--model",
    default="mini",
    show_default=True,
    metavar=MODELS,
    help="The packaged mini, a diffusers model directory, a .safetensors or .gguf file in SD3.5's "
    "original layout (ComfyUI's fp8_scaled too), or a hub id.",
)

tokenizers_option = click.option(
    "--tokenizers",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="For a model in a file: where the folders tokenizer, tokenizer_2 and tokenizer_3 are. "
    "Default: beside it, else from the hub.",
)


scheduler_option = click.option(
    "--scheduler",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE|DIR",
    help="A scheduler_config.json, or a folder with one, in place of the model's own.",
)

variant_option = click.option(
    "--model-variant",
    "variant",
    default=None,
    metavar="|".join([*(variant.name for variant in VARIANTS), CUSTOM]),
    help="Which model it is: this sets steps, guidance and size. Default: by its structure, and "
    "the word turbo in its name.",
)

without_t5_option = click.option(
    "--no-t5",
    "without_t5",
    is_flag=True,
    help="Leave out T5, whether or not the model has it: prompts are read by CLIP alone.",
)


def part_options(command: _Command) -> _Command:
    """Parts in place of a model's own: ``clip_l``, ``clip_g``, ``t5`` and ``vae``."""
    for option, title in reversed(_PARTS.items()):
        command = click.option(
            option,
            type=click.Path(path_type=Path),
            default=None,
            metavar="FILE|DIR",
            help=f"{title} in place of the model's own: a .safetensors file, or a folder that "
            "diffusers or transformers saved.",
        )(command)
    return command


def lora_option(command: _Command) -> _Command:
    """``loras``: what is merged into the model's weights."""
    return click.option(
        "--lora",
        "loras",
        type=LORA,
        multiple=True,
        metavar="FILE[:SCALE]",
        help="A LoRA, DoRA, LoHa or LoKr to merge into the weights, or mini:night or mini:moon, "
        "which come with mini; may be given more than once.",
    )(command)


def named_adapters_option(command: _Command) -> _Command:
    """``adapters``: what requests of a server may use."""
    return click.option(
        "--adapter",
        "adapters",
        multiple=True,
        metavar="NAME=FILE",
        help="An adapter that requests may use by its name, for bundles built with --adapters.",
    )(command)


def controlnet_option(command: _Command) -> _Command:
    """``controlnets``: nets beside the model."""
    return click.option(
        "--controlnet",
        "controlnets",
        type=CONTROLNET,
        multiple=True,
        metavar="NAME=DIR[:KIND]",
        help="A ControlNet, under the name that requests have it by: a folder of diffusers' "
        "SD3ControlNetModel, a hub id, or mini:canny, which comes with mini; may be given more "
        f"than once. KIND is of its pictures: {', '.join(HINT_KINDS)}. Default: what NAME or DIR "
        "says.",
    )(command)


_PARTS = {"--clip-l": "CLIP-L", "--clip-g": "CLIP-G", "--t5": "T5", "--vae": "Autoencoder"}


def model_options(command: _Command) -> _Command:
    """The checkpoint: ``model``, its parts, ``loras``, ``controlnets``, ``tokenizers``,
    ``scheduler``, ``variant`` and ``without_t5``.
    """
    rest = tokenizers_option(scheduler_option(variant_option(command)))
    return model_option(lora_option(controlnet_option(part_options(without_t5_option(rest)))))


def structure_options(command: _Command) -> _Command:
    """The checkpoint, of which weights are not read: ``model``, ``loras``, ``controlnets``, its
    parts, ``without_t5``.
    """
    option = click.option(
        "--model",
        default="mini",
        show_default=True,
        metavar=f"large|large-turbo|medium|{MODELS}",
        help="A published model (no checkpoint needed), the packaged mini, a diffusers model "
        "directory, a .safetensors or .gguf file in SD3.5's original layout, or a hub id.",
    )
    return option(lora_option(controlnet_option(part_options(without_t5_option(command)))))


def guided_option(text: str) -> Callable[[_Command], _Command]:
    """``guidance``: whether the denoiser computes both branches; None asks the model.

    Args:
        text: the help.
    """
    return click.option("--guidance/--no-guidance", default=None, help=text)


def device_options(command: _Command) -> _Command:
    """Where and how a bundle runs: ``device``, ``vram_budget`` and ``trust_kernels``."""
    two = "Two, as cuda:0,cuda:1, draw one picture, each a branch of guidance: see build "
    return device_option(f"{two}--split-guidance.")(engine_options(command))


def device_option(more: str = "") -> Callable[[_Command], _Command]:
    """``device``: where a bundle runs.

    Args:
        more: what several devices do, for the help.
    """
    return click.option(
        "--device",
        default=None,
        metavar="cpu|cuda|cuda:N" + (",..." if more else ""),
        help="Where to run. Default: what the bundle was built for; onnxruntime's engines run on "
        f"both.{more and ' '}{more}",
    )


def engine_options(command: _Command) -> _Command:
    """How engines load: ``vram_budget`` and ``trust_kernels``."""
    budget = click.option(
        "--vram-budget",
        type=BYTES,
        default=None,
        help="Memory of the device to stay within, e.g. 8GiB: engines then load for their stage, "
        "or stream their weights. Default: all engines stay.",
    )
    trust = click.option(
        "--trust-kernels",
        is_flag=True,
        help="Load compiled kernels that are in the bundle: they are code. For bundles whose "
        "builder you trust.",
    )
    return budget(trust(command))


# What a picture is drawn with; None takes the model's.
steps_option = click.option(
    "--steps", type=int, default=None, help="Denoising steps. Default: the model's."
)
step_cache_option = click.option(
    "--step-cache",
    type=click.Choice(["exact", "fast"]),
    default="exact",
    show_default=True,
    help="fast: steps that the bundle's step cache calls short compute the first blocks alone. "
    "For bundles built with --short-steps.",
)
guidance_option = click.option(
    "--guidance",
    type=float,
    default=None,
    help="Classifier-free guidance scale; 1 is off. Default: the model's.",
)
size_option = click.option(
    "--size",
    type=SIZE,
    default=None,
    metavar="WxH",
    help="Picture size in pixels. Default: the model's native size.",
)


def cache_dir_option(text: str) -> Callable[[_Command], _Command]:
    """``cache_dir``: where finished stages are kept; None takes the default.

    Args:
        text: the help.
    """
    return click.option(
        "--cache-dir", type=click.Path(path_type=Path), default=None, metavar="DIR", help=text
    )


def json_option(text: str) -> Callable[[_Command], _Command]:
    """``as_json``: whether the result is printed for a machine.

    Args:
        text: the help.
    """
    return click.option("--json", "as_json", is_flag=True, help=text)
