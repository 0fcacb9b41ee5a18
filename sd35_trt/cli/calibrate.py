"""``sd35-trt calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import BYTES, SIZE, invocation, json_option, model_options
from .output import print_json
from .step_cache import Key, step_cache_options, write_step_cache


@click.command()
@model_options
@click.option(
    "--policy",
    default="fp8",
    show_default=True,
    metavar="NAME|FILE",
    help="What it is for: the policy's FP8 layers get scales.",
)
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="UTF-8 text, one prompt per line. Default: the 128 of this project.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=None, metavar="N", help="Take only N of the prompts."
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    default=None,
    help="Denoising steps. Default: the model's.",
)
@click.option("--guidance", type=float, default=None, help="Guidance scale. Default: the model's.")
@click.option(
    "--size",
    "sizes",
    type=SIZE,
    multiple=True,
    metavar="WxH",
    help="Picture size in pixels; given more than once, prompts take the sizes in turn. "
    "Default: the model's native size.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first prompt.")
@click.option(
    "--device", default="cpu", show_default=True, metavar="cpu|cuda", help="Where to compute."
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    default=None,
    help="Arithmetic. Default: fp32 on the CPU, bf16 elsewhere.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Prompts drawn at once. Default: by size, 1 from 512x512.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR|FILE",
    help="The calibration to write; with --step-cache a JSON file.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Instead, quantize one group of the MMDiT's linears at a time and write what each does "
    "to the prediction, against the bytes it saves.",
)
@click.option(
    "--budget",
    type=BYTES,
    default=None,
    help="With --sensitivity: also write a policy that keeps the most sensitive groups half while "
    "the MMDiT's linears take no more than this, e.g. 5.5GB.",
)
@step_cache_options
@json_option("Print the result as JSON.")
@click.pass_context
def command(
    context: click.Context,
    as_json: bool,
    sensitivity: bool,
    budget: int | None,
    step_cache: Path | None,
    step_cache_error: float | None,
    plans: tuple[Key, ...],
    **arguments: Any,
) -> None:
    """Measure the scales and ranges that a build with an FP8 policy needs; or, with --step-cache,
    which steps of a bundle built with --short-steps can be short.

    Draws a set of prompts with diffusers, all steps and both guidance branches, and keeps the
    largest magnitude of every activation. A run that was stopped goes on where it was when the
    same command is given again.

    \b
    Examples:
      sd35-trt calibrate --out calibrations/mini
      sd35-trt calibrate --model ~/models/stable-diffusion-3.5-large --device cuda
        --size 1024x1024 --size 1344x768 --out calibrations/large
      sd35-trt calibrate --sensitivity --budget 9MB --out sensitivity
      sd35-trt calibrate --step-cache bundles/short --out step_cache.json
    """
    if step_cache is not None:
        write_step_cache(context, step_cache, step_cache_error, plans, as_json)
        return
    if plans or step_cache_error is not None:
        raise click.UsageError("--plan and --step-cache-error need --step-cache BUNDLE")
    from msgspec import to_builtins

    from sd35_trt.calibration.calibrate import CalibrateOptions, analyse_sensitivity
    from sd35_trt.calibration.calibrate import calibrate as run

    from .bars import CountBars

    options = CalibrateOptions(command=invocation(), **arguments)
    if sensitivity:
        with CountBars(quiet=as_json) as progress:
            result, notes = analyse_sensitivity(options, budget, progress)
        if as_json:
            print_json({"folder": str(options.out), **to_builtins(result.record())})
            return
        from .tables.sensitivity import print_sensitivity

        print_sensitivity(result)
        for note in notes:
            click.echo(f"note: {note}", err=True)
        click.echo(str(options.out))
        return
    if budget is not None:
        raise click.UsageError("--budget needs --sensitivity")
    try:
        with CountBars(quiet=as_json) as progress:
            calibration = run(options, progress)
    except KeyboardInterrupt:
        click.echo("the same command goes on from here", err=True)
        raise
    scales = len(calibration.inputs) + len(calibration.bmm)
    if as_json:
        data = {"calibration": str(options.out), "digest": calibration.digest(), "scales": scales}
        print_json({**data, "ranges": len(calibration.activations)})
        return
    if not scales:
        click.echo(f"note: policy {options.policy} has no FP8 layer: ranges alone", err=True)
    click.echo(f"{options.out}  {scales} scales, {len(calibration.activations)} ranges")
