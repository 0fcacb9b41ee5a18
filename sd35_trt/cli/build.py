"""``sd35-trt build``."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import click

from sd35_trt.units import format_bytes

from .options import RANGE, cache_dir_option, guided_option, invocation, json_option, model_options
from .output import print_json


@click.command()
@model_options
@click.option(
    "--gpu",
    "target",
    default="cpu",
    show_default=True,
    metavar="TARGET",
    help="What to build for: a GPU family or product (see sd35-trt gpus), several with commas "
    "between, cpu, or auto.",
)
@click.option(
    "--policy",
    default=None,
    metavar="NAME|FILE",
    help="Precision policy: fp32, half, fp8, int8-weight, int4-weight, or a TOML file. "
    "Default: the target's.",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="What sd35-trt calibrate wrote: the scales of fp8, and ranges: what comes near FP16's "
    "limit is computed in FP32. mini has its own.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="The bundle to write. Default: bundles/MODEL-TARGET.",
)
@guided_option(
    "Build the denoiser with or without classifier-free guidance. Without, a step "
    "is half the work. Default: with, except for Turbo models."
)
@click.option(
    "--batch", type=RANGE, default=None, metavar="MIN:MAX", help="Images per run. Default: 1:4."
)
@click.option(
    "--size",
    type=RANGE,
    default=None,
    metavar="MIN:MAX",
    help="Width and height in pixels. Default: half to one and a half times the "
    "model's native size (512:1536).",
)
@click.option(
    "--size-step",
    type=int,
    default=64,
    show_default=True,
    metavar="PX",
    help="Sizes are multiples of this.",
)
@click.option(
    "--adapters",
    type=int,
    default=None,
    metavar="RANK",
    help="Take LoRAs as inputs, of together this rank at most: see sd35-trt adapter. Default: "
    "none.",
)
@click.option(
    "--inpainting", is_flag=True, help="A denoiser that draws anew what a mask says of a picture."
)
@click.option("--skip-layer-guidance", is_flag=True, help="A denoiser for skip-layer guidance.")
@click.option(
    "--split-guidance",
    is_flag=True,
    help="A denoiser of one branch of guidance too: two GPUs then draw one picture, each a branch.",
)
@click.option(
    "--short-steps",
    type=int,
    default=None,
    metavar="K",
    help="Steps that compute the first K blocks alone, where a step cache says so: see "
    "generate --step-cache. Default: none.",
)
@click.option(
    "--step-cache",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="What sd35-trt calibrate --step-cache wrote: which steps are short.",
)
@click.option(
    "--builder",
    default=None,
    metavar="NAME",
    help="tensorrt-rtx, tensorrt, inductor or onnxruntime. Default: the target's.",
)
@click.option(
    "--weight-streaming",
    is_flag=True,
    help="Engines that can keep part of their weights in the host's memory.",
)
@click.option("--refit", is_flag=True, help="Engines whose weights can be exchanged.")
@click.option("--autotune", is_flag=True, help="With inductor: try more kernels, for minutes.")
@click.option(
    "--optimization-level",
    type=click.IntRange(0, 5),
    default=None,
    metavar="0-5",
    help="With tensorrt: how many kernels are tried. Default: 3.",
)
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=None,
    metavar="N",
    help="Components that are made at the same time. Default: what processors and memory allow.",
)
@cache_dir_option("Where finished stages are kept. Default: $SD35_TRT_CACHE or ~/.cache/sd35-trt.")
@json_option("Print the result as JSON.")
def command(as_json: bool, cache_dir: Path | None, **arguments: Any) -> None:
    """Compile a model into a bundle.

    A stage whose inputs are unchanged is taken from the cache. The bundle appears under its name
    in one step when it is complete; an older one there is replaced.

    \b
    Examples:
      sd35-trt build --gpu cpu
      sd35-trt build --gpu ada
      sd35-trt build --gpu cpu --model ~/models/stable-diffusion-3.5-medium --policy half
      sd35-trt build --gpu ada --model sd3.5_large_fp8_scaled.safetensors --tokenizers tokenizers
      sd35-trt build --gpu ada --model sd3.5-large --controlnet canny=sd3.5-large-controlnet-canny
    """
    from sd35_trt.build import BuildOptions, build
    from sd35_trt.formats.bundle import Bundle
    from sd35_trt.measurements import faster_builder
    from sd35_trt.targets import find_target

    from .bars import StageBars

    options = BuildOptions(
        cache_dir=cache_dir,
        command=invocation(),
        **arguments,
    )
    start = perf_counter()

    def tell(line: str) -> None:
        if not as_json:
            click.echo(line, err=True)

    with StageBars(quiet=as_json) as progress:
        out = build(options, progress, tell)
    seconds = perf_counter() - start
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    manifest = Bundle.open(out).manifest
    places = manifest.fp32_places()
    if as_json:
        result = {"bundle": str(out), "bytes": size, "seconds": round(seconds, 3)}
        print_json({**result, "fp32_places": places})
        return
    click.echo(f"{out}  {format_bytes(size)}  in {seconds:.1f} s")
    if options.builder is None:
        target = find_target(options.target)
        hint = faster_builder(target, manifest.builder, manifest.policy.name)
        if hint is not None:
            click.echo(hint)
    if places:
        click.echo(f"near FP16's limit when calibrated, in FP32 instead: {', '.join(places)}")
