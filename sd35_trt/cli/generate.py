"""``sd35-trt generate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd35_trt.checkpoints.model_options import Lora
from sd35_trt.errors import UsageError

from .options import (
    BLOCKS,
    CONTROL,
    INTERVAL,
    LORA,
    bundle_argument,
    device_options,
    guidance_option,
    json_option,
    size_option,
    step_cache_option,
    steps_option,
)
from .output import print_json

if TYPE_CHECKING:
    from sd35_trt.runtime import Control


@click.command()
@bundle_argument
@click.argument("prompt")
@click.option("--negative", default="", metavar="TEXT", help="What to steer away from.")
@click.option("--prompt-2", metavar="TEXT", help="What CLIP-G reads. Default: PROMPT.")
@click.option("--prompt-3", metavar="TEXT", help="What T5 reads. Default: PROMPT.")
@click.option("--negative-2", metavar="TEXT", help="The same of --negative, for CLIP-G.")
@click.option("--negative-3", metavar="TEXT", help="The same of --negative, for T5.")
@click.option(
    "--weighting",
    is_flag=True,
    help="Read weights in prompts, as ComfyUI does: (word:1.3), (word) for 1.1.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image.")
@steps_option
@guidance_option
@click.option("--shift", type=float, default=None, help="Timestep shift. Default: the model's.")
@size_option
@click.option(
    "--batch",
    type=int,
    default=1,
    show_default=True,
    help="Images to draw at once, with consecutive seeds.",
)
@click.option(
    "--sampler",
    default=None,
    metavar="euler|dpmpp-2m",
    help="Default: euler. dpmpp-2m needs fewer steps.",
)
@click.option("--t5-tokens", type=int, default=None, help="Length of the T5 part of the text.")
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Start from this picture (image to image).",
)
@click.option(
    "--strength",
    type=float,
    default=0.6,
    show_default=True,
    help="With --image: how much of it is redrawn, 0 to 1.",
)
@click.option(
    "--mask",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="With --image: draw anew only where this picture is light. For bundles built with "
    "--inpainting.",
)
@click.option(
    "--paste", is_flag=True, help="With --mask: keep the picture's own pixels everywhere else."
)
@click.option(
    "--skip-guidance-layers",
    type=BLOCKS,
    default=None,
    metavar="N,N,…",
    help="Skip-layer guidance: steer away from what the model draws without these blocks. For "
    "bundles built with --skip-layer-guidance.",
)
@click.option(
    "--skip-layer-guidance-scale",
    type=float,
    default=2.8,
    show_default=True,
    help="How much of it.",
)
@click.option(
    "--skip-layer-guidance-start",
    type=float,
    default=0.01,
    show_default=True,
    help="Fraction of the steps after which it begins.",
)
@click.option(
    "--skip-layer-guidance-stop",
    type=float,
    default=0.2,
    show_default=True,
    help="Fraction of the steps before which it ends.",
)
@step_cache_option
@click.option(
    "--adapter",
    "adapters",
    type=LORA,
    multiple=True,
    metavar="FILE[:SCALE]",
    help="An adapter, of sd35-trt adapter convert, and how much of it; may be given more than "
    "once. For bundles built with --adapters.",
)
@click.option(
    "--control",
    "controls",
    type=CONTROL,
    multiple=True,
    metavar="NAME=FILE[:SCALE]",
    help="The picture that a ControlNet of the bundle follows, and how much; may be given more "
    "than once. For bundles built with --controlnet.",
)
@click.option(
    "--edges",
    multiple=True,
    metavar="NAME",
    help="With --control: the net takes edges, and they are to be found in its picture.",
)
@click.option(
    "--control-interval",
    "intervals",
    type=INTERVAL,
    multiple=True,
    metavar="NAME=START:END",
    help="With --control: the share of the steps after which the net begins, and at which it "
    "ends. Default: 0:1.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    metavar="FILE",
    help="PNG to write; with a batch, the seed is added to the name.",
)
@device_options
@click.option("--verify", is_flag=True, help="Check the hashes of the large files first.")
@json_option("Print files, parameters, timings and memory as JSON.")
def command(
    bundle: Path,
    prompt: str,
    image: Path | None,
    mask: Path | None,
    out: Path,
    device: str | None,
    vram_budget: int | None,
    trust_kernels: bool,
    verify: bool,
    as_json: bool,
    adapters: tuple[Lora, ...],
    controls: tuple[tuple[str, Lora], ...],
    edges: tuple[str, ...],
    intervals: tuple[tuple[str, tuple[float, float]], ...],
    **arguments: Any,
) -> None:
    """Draw PROMPT with a BUNDLE.

    The parameters are kept in the PNG's metadata.

    \b
    Examples:
      sd35-trt generate bundles/mini-cpu "two large green squares" --seed 7 --out squares.png
      sd35-trt generate bundles/mini-cpu "a red star" --steps 14 --sampler dpmpp-2m
      sd35-trt generate bundles/mini-cpu "a blue star" --image squares.png --strength 0.7
      sd35-trt generate bundles/inpainting "a blue star" --image squares.png --mask mask.png
      sd35-trt generate bundles/adapted "a red star" --adapter adapters/style.safetensors:0.8
      sd35-trt generate bundles/control "a red star" --control canny=photo.png:0.7 --edges canny
    """
    from sd35_trt.runtime import Pipeline
    from sd35_trt.runtime.picture import check_output, load_picture, save_picture

    from .bars import StepBar

    check_output(out)
    if mask is not None and image is None:
        raise UsageError("--mask says what of a picture is drawn anew", "give it with --image")
    picture = None if image is None else load_picture(image)
    drawn = None if mask is None else load_picture(mask)
    nets = _controls(controls, edges, dict(intervals))
    pipe = Pipeline.load(
        bundle,
        verify=verify,
        device=device,
        vram_budget=vram_budget,
        trust_kernels=trust_kernels,
    )
    scales: dict[str, float] = {}
    for own in adapters:
        scales[str(own.path)] = scales.get(str(own.path), 0.0) + own.scale
    with pipe, StepBar(quiet=as_json) as on_step:
        result = pipe.generate(
            prompt, image=picture, mask=drawn, callback=on_step, adapters=scales or None,
            controls=nets or None, **arguments,
        )  # fmt: skip
        memory = pipe.memory()
    files = []
    for i, (seed, drawing) in enumerate(zip(result.seeds, result.pil(), strict=True)):
        path = out if len(result.seeds) == 1 else out.with_stem(f"{out.stem}-{seed}")
        save_picture(drawing, path, result.parameters, i)
        files.append(str(path))
    if as_json:
        data = {
            "files": files,
            "parameters": result.parameters,
            "seconds": {k: round(v, 4) for k, v in result.timings.items()},
            "short_steps": result.short_steps,
            "notes": result.notes,
            "memory": memory,
        }
        print_json(data)
        return
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    for file in files:
        click.echo(file)


def _controls(
    given: Sequence[tuple[str, Lora]],
    edges: Sequence[str],
    intervals: Mapping[str, tuple[float, float]],
) -> dict[str, Control]:
    """What ControlNets are asked for, by name.

    Raises:
        UsageError: two pictures for one net, or an option for a net without a picture.
    """
    from sd35_trt.runtime import Control
    from sd35_trt.runtime.picture import load_picture

    names = [name for name, _ in given]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"--control {name} has two pictures", "give one")
    for option, others in (("--edges", edges), ("--control-interval", intervals)):
        for name in others:
            if name not in names:
                raise UsageError(
                    f"{option} {name} is of no --control", f"give --control {name}=FILE, too"
                )
    return {
        name: Control(
            load_picture(own.path), own.scale, *intervals.get(name, (0.0, 1.0)), name in edges
        )
        for name, own in given
    }
