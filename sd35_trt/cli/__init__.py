"""The command line. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from sd35_trt import __version__
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.units import parse_bytes

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Commands(click.Group):
    """Turns errors into one line on standard error and the exit status they carry."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        if debug:  # wherever it was put
            words = ["--debug", *(word for word in words if word != "--debug")]
        kwargs["standalone_mode"] = False
        try:
            result = super().main(words, *rest, **kwargs)
            # Outside standalone mode, click returns the status of --help, --version and exit().
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.Abort:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except click.ClickException as error:
            context = getattr(error, "ctx", None)
            hint = f" — see: {context.command_path} --help" if context else ""
            click.echo(f"error: {error.format_message()}{hint}", err=True)
            sys.exit(error.exit_code)
        except Sd35Error as error:
            if debug:
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_status)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception as error:
            if debug:
                raise
            kind = type(error).__name__
            text = " ".join(str(error).split())
            click.echo(f"error: {kind}: {text} — run again with --debug for a traceback", err=True)
            sys.exit(1)


class _Pair(click.ParamType):
    """``A<separator>B`` as two integers; ``A`` alone means both where that makes sense."""

    def __init__(self, name: str, pattern: str, single: bool) -> None:
        self.name = name
        self._pattern = re.compile(pattern)
        self._single = single

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        match = self._pattern.fullmatch(str(value))
        if match:
            return int(match[1]), int(match[2])
        if self._single and str(value).isdigit():
            return int(value), int(value)
        self.fail(f"{value!r} is not {self.name}", param, ctx)


_SIZE = _Pair("WxH", r"(\d+)[xX](\d+)", single=True)
_RANGE = _Pair("MIN:MAX", r"(\d+):(\d+)", single=True)


class _Bytes(click.ParamType):
    """A number of bytes: ``6000000``, ``5.5GB``, ``800 MB``, ``8GiB``."""

    name = "BYTES"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        try:
            return parse_bytes(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)


_bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))

_model_option = click.option(
    "--model",
    default="mini",
    show_default=True,
    metavar="mini|DIR|FILE|HUB_ID",
    help="The packaged mini, a diffusers model directory, a .safetensors file in SD3.5's original "
    "layout (ComfyUI's fp8_scaled too), or a hub id.",
)

_device_option = click.option(
    "--device",
    default=None,
    metavar="cpu|cuda|cuda:N",
    help="Where to run. Default: what the bundle was built for; onnxruntime's engines run on both.",
)

_vram_budget_option = click.option(
    "--vram-budget",
    type=_Bytes(),
    default=None,
    help="Memory of the device to stay within, e.g. 8GiB: engines then load for their stage, or "
    "stream their weights. Default: all engines stay.",
)

_trust_kernels_option = click.option(
    "--trust-kernels",
    is_flag=True,
    help="Load compiled kernels that are in the bundle: they are code. For bundles whose builder "
    "you trust.",
)

_tokenizers_option = click.option(
    "--tokenizers",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="For a model in a file: where the folders tokenizer, tokenizer_2 and tokenizer_3 are. "
    "Default: beside it, else from the hub.",
)


@click.group(cls=_Commands, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="sd35-trt")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Compile Stable Diffusion 3.5 ahead of time and draw with it, without PyTorch.

    \b
    Build the small model that comes with the package, and draw with it:
      sd35-trt build --gpu cpu
      sd35-trt generate bundles/mini-cpu "a small red circle on a blue background"
    """
    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR)


@main.command()
@_model_option
@_tokenizers_option
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
@click.option(
    "--guidance/--no-guidance",
    default=None,
    help="Build the denoiser with or without classifier-free guidance. Without, a step "
    "is half the work. Default: with, except for Turbo models.",
)
@click.option(
    "--batch", type=_RANGE, default=None, metavar="MIN:MAX", help="Images per run. Default: 1:4."
)
@click.option(
    "--size",
    type=_RANGE,
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
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="Where finished stages are kept. Default: $SD35_TRT_CACHE or ~/.cache/sd35-trt.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(as_json: bool, cache_dir: Path | None, **arguments: Any) -> None:
    """Compile a model into a bundle.

    A stage whose inputs are unchanged is taken from the cache. The bundle appears under its name
    in one step when it is complete; an older one there is replaced.

    \b
    Examples:
      sd35-trt build --gpu cpu
      sd35-trt build --gpu ada
      sd35-trt build --gpu cpu --model ~/models/stable-diffusion-3.5-medium --policy half
      sd35-trt build --gpu ada --model sd3.5_large_fp8_scaled.safetensors --tokenizers tokenizers
    """
    from sd35_trt.build import BuildOptions
    from sd35_trt.build import build as run
    from sd35_trt.formats.bundle import Bundle
    from sd35_trt.store.cache import default_cache_dir

    from .progress import StageBars

    options = BuildOptions(
        cache_dir=cache_dir or default_cache_dir(),
        command=shlex.join(["sd35-trt", *sys.argv[1:]]),
        **arguments,
    )
    start = time.perf_counter()
    with StageBars(quiet=as_json) as report:
        out = run(options, report)
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    places = Bundle.open(out).manifest.fp32_places()
    if as_json:
        result = {"bundle": str(out), "bytes": size, "seconds": round(seconds, 3)}
        click.echo(json.dumps({**result, "fp32_places": places}))
        return
    click.echo(f"{out}  {_bytes(size)}  in {seconds:.1f} s")
    if places:
        click.echo(f"near FP16's limit when calibrated, in FP32 instead: {', '.join(places)}")


@main.command()
@_model_option
@_tokenizers_option
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
    type=_SIZE,
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
    metavar="DIR",
    help="The calibration to write.",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Instead, quantize one group of the MMDiT's linears at a time and write what each does "
    "to the prediction, against the bytes it saves.",
)
@click.option(
    "--budget",
    type=_Bytes(),
    default=None,
    help="With --sensitivity: also write a policy that keeps the most sensitive groups half while "
    "the MMDiT's linears take no more than this, e.g. 5.5GB.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def calibrate(as_json: bool, sensitivity: bool, budget: int | None, **arguments: Any) -> None:
    """Measure the scales and ranges that a build with an FP8 policy needs.

    Draws a set of prompts with diffusers, all steps and both guidance branches, and keeps the
    largest magnitude of every activation. A run that was stopped goes on where it was when the
    same command is given again.

    \b
    Examples:
      sd35-trt calibrate --out calibrations/mini
      sd35-trt calibrate --model ~/models/stable-diffusion-3.5-large --device cuda
        --size 1024x1024 --size 1344x768 --out calibrations/large
      sd35-trt calibrate --sensitivity --budget 9MB --out sensitivity
    """
    from sd35_trt.calibration.calibrate import CalibrateOptions, analyse_sensitivity
    from sd35_trt.calibration.calibrate import calibrate as run

    from .progress import CountBars
    from .report import print_sensitivity

    options = CalibrateOptions(command=shlex.join(["sd35-trt", *sys.argv[1:]]), **arguments)
    if sensitivity:
        with CountBars(quiet=as_json) as report:
            result, notes = analyse_sensitivity(options, budget, report)
        if as_json:
            click.echo(json.dumps({"folder": str(options.out), **result.as_dict()}))
            return
        print_sensitivity(result)
        for note in notes:
            click.echo(f"note: {note}", err=True)
        click.echo(str(options.out))
        return
    if budget is not None:
        raise click.UsageError("--budget needs --sensitivity")
    try:
        with CountBars(quiet=as_json) as report:
            made = run(options, report)
    except KeyboardInterrupt:
        click.echo("the same command goes on from here", err=True)
        raise
    scales = len(made.inputs) + len(made.bmm)
    if as_json:
        data = {"calibration": str(options.out), "digest": made.digest(), "scales": scales}
        click.echo(json.dumps({**data, "ranges": len(made.activations)}))
        return
    if not scales:
        click.echo(f"note: policy {options.policy} has no FP8 layer: ranges alone", err=True)
    click.echo(f"{options.out}  {scales} scales, {len(made.activations)} ranges")


@main.command()
@_bundle_argument
@click.argument("prompt")
@click.option("--negative", default="", metavar="TEXT", help="What to steer away from.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the first image.")
@click.option("--steps", type=int, default=None, help="Denoising steps. Default: the model's.")
@click.option(
    "--guidance",
    type=float,
    default=None,
    help="Classifier-free guidance scale; 1 is off. Default: the model's.",
)
@click.option("--shift", type=float, default=None, help="Timestep shift. Default: the model's.")
@click.option(
    "--size",
    type=_SIZE,
    default=None,
    metavar="WxH",
    help="Picture size in pixels. Default: the model's native size.",
)
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
    "--out",
    type=click.Path(path_type=Path),
    default=Path("out.png"),
    show_default=True,
    metavar="FILE",
    help="PNG to write; with a batch, the seed is added to the name.",
)
@_device_option
@_vram_budget_option
@_trust_kernels_option
@click.option("--verify", is_flag=True, help="Check the hashes of the large files first.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print files, parameters, timings and memory as JSON."
)
def generate(
    bundle: Path,
    prompt: str,
    image: Path | None,
    out: Path,
    device: str | None,
    vram_budget: int | None,
    trust_kernels: bool,
    verify: bool,
    as_json: bool,
    **arguments: Any,
) -> None:
    """Draw PROMPT with a BUNDLE.

    The parameters are kept in the PNG's metadata.

    \b
    Examples:
      sd35-trt generate bundles/mini-cpu "two large green squares" --seed 7 --out squares.png
      sd35-trt generate bundles/mini-cpu "a red star" --steps 14 --sampler dpmpp-2m
      sd35-trt generate bundles/mini-cpu "a blue star" --image squares.png --strength 0.7
    """
    from sd35_trt.runtime import Pipeline
    from sd35_trt.runtime.picture import check_output, load_picture, save_picture

    from .progress import StepBar

    check_output(out)
    picture = None if image is None else load_picture(image)
    opened = Pipeline.load(
        bundle,
        verify=verify,
        device=device,
        vram_budget=vram_budget,
        trust_kernels=trust_kernels,
    )
    with opened as pipe, StepBar(quiet=as_json) as on_step:
        result = pipe.generate(prompt, image=picture, callback=on_step, **arguments)
        memory = dataclasses.asdict(pipe.memory())
    files = []
    for i, (seed, drawn) in enumerate(zip(result.seeds, result.pil(), strict=True)):
        path = out if len(result.seeds) == 1 else out.with_stem(f"{out.stem}-{seed}")
        save_picture(drawn, path, result.parameters, i)
        files.append(str(path))
    if as_json:
        data = {
            "files": files,
            "parameters": result.parameters,
            "seconds": {k: round(v, 4) for k, v in result.timings.items()},
            "notes": result.notes,
            "memory": memory,
        }
        click.echo(json.dumps(data))
        return
    for note in result.notes:
        click.echo(f"note: {note}", err=True)
    for file in files:
        click.echo(file)


@main.command()
@_bundle_argument
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def inspect(bundle: Path, as_json: bool) -> None:
    """Show what a BUNDLE holds and how it was made.

    \b
    Examples:
      sd35-trt inspect bundles/mini-cpu
      sd35-trt inspect bundles/mini-cpu --json | jq .components
    """
    from sd35_trt.formats.bundle import MANIFEST, Bundle

    opened = Bundle.open(bundle)
    if as_json:
        click.echo((opened.root / MANIFEST).read_text("utf-8"), nl=False)
        return
    from .report import print_manifest

    print_manifest(opened)


@main.command()
@_bundle_argument
@click.option(
    "--against",
    metavar="BUNDLE|half",
    help="Also draw with this bundle, or with a half-precision one built of the same "
    "checkpoint, and report how far the pictures are apart.",
)
@click.option(
    "--model",
    default=None,
    metavar="mini|DIR|FILE|HUB_ID",
    help="With --against half: the checkpoint behind BUNDLE. Default: mini, where it is.",
)
@_tokenizers_option
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="What to draw, one prompt per line. Default: mini's held-out captions, or 24 prompts "
    "that come with the package.",
)
@click.option(
    "--captions",
    type=int,
    default=None,
    metavar="N",
    help="How many of them. Default: 100 of mini's, all of a file.",
)
@click.option("--seed", type=int, default=None, help="Seed of the first picture. Default: 0.")
@click.option("--steps", type=int, default=None, help="Denoising steps. Default: the model's.")
@click.option("--min-psnr", type=float, metavar="DB", help="Fail below this PSNR.")
@click.option("--min-ssim", type=float, metavar="SSIM", help="Fail below this mean SSIM.")
@click.option(
    "--max-latent-error",
    type=float,
    metavar="ERROR",
    help="Fail above this mean relative error of the final latents.",
)
@click.option(
    "--max-accuracy-drop",
    type=float,
    metavar="POINTS",
    help="Fail when this many percentage points more of mini's scenes are wrong.",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="With --against half: as for build.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def verify(bundle: Path, against: str | None, as_json: bool, **arguments: Any) -> None:
    """Check every file of a BUNDLE against its hash; with --against, compare what it draws.

    The comparison is kept in BUNDLE/report as a page, index.html, and as report.json. With a
    threshold the exit status is 1 when it is missed.

    \b
    Examples:
      sd35-trt verify bundles/mini-cpu
      sd35-trt verify bundles/int8 --against half --captions 500 --max-accuracy-drop 1
      sd35-trt verify bundles/int8 --against bundles/half --prompts prompts.txt --min-psnr 30
    """
    if against is not None:
        _compare(bundle, against, as_json, arguments)
        return
    given = [name for name, value in arguments.items() if value is not None]
    if given:
        option = "--" + given[0].replace("_", "-")
        raise UsageError(f"{option} needs --against", "add: --against half")
    from sd35_trt.formats.bundle import Bundle

    opened = Bundle.open(bundle, verify=True)
    files = list(opened.manifest.all_files())
    total = sum(file.bytes for file in files)
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "files": len(files), "bytes": total}))
    else:
        click.echo(f"{bundle}: {len(files)} files, {_bytes(total)}, all as the manifest says")


def _compare(bundle: Path, against: str, as_json: bool, arguments: dict[str, Any]) -> None:
    """The part of ``verify`` that draws."""
    try:
        from sd35_trt.quality.compare import VerifyOptions
        from sd35_trt.quality.compare import verify as run
        from sd35_trt.quality.gate import Thresholds, failures
    except ImportError as error:
        raise Sd35Error(
            f"comparing bundles needs {error.name}", "pip install 'sd35-trt[report]'"
        ) from error
    from .progress import CountBars
    from .report import print_quality

    bounds = {f.name: arguments.pop(f.name) for f in dataclasses.fields(Thresholds)}
    options = VerifyOptions(
        bundle,
        against,
        seed=arguments.pop("seed") or 0,
        thresholds=Thresholds(**bounds),
        command=shlex.join(["sd35-trt", *sys.argv[1:]]),
        **arguments,
    )
    with CountBars(quiet=as_json) as progress:
        report = run(options, progress)
    page = bundle / "report" / "index.html"
    if as_json:
        click.echo(json.dumps(report))
    else:
        print_quality(report, str(page))
    if missed := failures(report):
        raise Sd35Error("; ".join(missed), f"see {page}")


@main.command()
@_bundle_argument
@click.option(
    "--runs", type=click.IntRange(1), default=7, show_default=True, help="Runs that are measured."
)
@click.option(
    "--warmup", type=click.IntRange(1), default=2, show_default=True, help="Runs before them."
)
@click.option("--steps", type=int, default=None, help="Denoising steps. Default: the model's.")
@click.option(
    "--size",
    type=_SIZE,
    default=None,
    metavar="WxH",
    help="Picture size in pixels. Default: the model's native size.",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures in a run.")
@click.option(
    "--guidance",
    type=float,
    default=None,
    help="Classifier-free guidance scale; 1 is off. Default: the model's.",
)
@click.option(
    "--prompt",
    default=None,
    metavar="TEXT",
    help="What to draw. The number of the run is added, so that no run finds its prompt's "
    "embeddings kept from an earlier one.",
)
@click.option(
    "--against",
    metavar="diffusers|diffusers-compiled|BUNDLE",
    help="Also measure diffusers on the bundle's checkpoint (as it is, or the transformer's blocks "
    "compiled by PyTorch), or another bundle of it, in the same "
    "process on the same device, in turns.",
)
@click.option(
    "--model",
    default=None,
    metavar="mini|DIR|HUB_ID",
    help="With --against diffusers: the checkpoint behind BUNDLE. Default: mini, where it is.",
)
@_device_option
@_vram_budget_option
@_trust_kernels_option
@click.option(
    "--threads",
    type=click.IntRange(1),
    default=None,
    help="CPU threads, of the engines and of the peer alike. Default: one per core.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="Keep the result as JSON, single runs included.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def bench(as_json: bool, out: Path | None, prompt: str | None, **arguments: Any) -> None:
    """Measure how fast a BUNDLE draws, stage by stage, and what memory and energy it takes.

    Times are medians of the runs, with the bounds of the middle 80 %; those of a step are over
    the steps of all runs.

    \b
    Examples:
      sd35-trt bench bundles/mini-cpu
      sd35-trt bench bundles/mini-cpu --against diffusers --out bench.json
      sd35-trt bench bundles/int8 --against bundles/half --size 192x128 --batch 2
      sd35-trt bench bundles/large --against diffusers --model ~/models/stable-diffusion-3.5-large
    """
    from sd35_trt.bench.bench import BenchOptions, check_result_file, save_result
    from sd35_trt.bench.bench import bench as run

    from .progress import CountBars
    from .report import print_bench

    if out is not None:
        check_result_file(out)
    if prompt is not None:
        arguments["prompt"] = prompt
    options = BenchOptions(command=shlex.join(["sd35-trt", *sys.argv[1:]]), **arguments)
    with CountBars(quiet=as_json) as progress:
        result = run(options, progress)
    if out is not None:
        save_result(result, out)
    if as_json:
        click.echo(json.dumps(result))
    else:
        print_bench(result)
    for note in result["notes"]:
        click.echo(f"note: {note}", err=True)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(as_json: bool) -> None:
    """Say what this machine can build and run, and what is missing for the rest.

    \b
    Example:
      sd35-trt doctor
    """
    from .report import examine, print_findings

    findings = examine()
    if as_json:
        click.echo(json.dumps(findings, indent=1))
    else:
        print_findings(findings)


@main.command()
@click.option(
    "--model",
    default="mini",
    show_default=True,
    metavar="large|large-turbo|medium|mini|DIR|FILE|HUB_ID",
    help="A published model (no checkpoint needed), the packaged mini, a diffusers model "
    "directory, a .safetensors file in SD3.5's original layout, or a hub id.",
)
@click.option(
    "--gpu",
    "target",
    required=True,
    metavar="TARGET",
    help="A GPU product or family (see sd35-trt gpus), cpu, or auto.",
)
@click.option(
    "--policy",
    default=None,
    metavar="NAME|FILE",
    help="Precision policy, as for build. Default: the target's.",
)
@click.option(
    "--vram",
    type=_Bytes(),
    default=None,
    help="Memory to stay within, e.g. 8GiB. Default: all that the GPU has.",
)
@click.option(
    "--size",
    type=_SIZE,
    default=None,
    metavar="WxH",
    help="Picture size in pixels. Default: the model's native size.",
)
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures at once.")
@click.option(
    "--guidance/--no-guidance",
    default=None,
    help="With or without classifier-free guidance. Default: with, except for Turbo models.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Ask TensorRT for RTX what working memory its engines take: a minute or two the first "
    "time, then kept.",
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=None,
    metavar="DIR",
    help="With --exact: as for build.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
def plan(as_json: bool, **arguments: Any) -> None:
    """Say whether a model fits a GPU, what stays in its memory, and what loads or streams.

    Builds nothing and reads no weights.

    \b
    Examples:
      sd35-trt plan --model large --gpu rtx4060
      sd35-trt plan --model large --gpu rtx4060 --exact
      sd35-trt plan --model medium --gpu ampere --vram 8GiB --size 1344x768 --batch 2
      sd35-trt plan --model large --gpu rtx4070 --json | jq .fits
    """
    from sd35_trt.planning.plan import PlanOptions
    from sd35_trt.planning.plan import plan as run

    from .progress import StageBars

    with StageBars(quiet=as_json or not arguments["exact"]) as progress:
        result = run(PlanOptions(**arguments), progress)
    if as_json:
        click.echo(json.dumps(result.as_dict()))
        return
    from .report import print_plan

    print_plan(result)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print them as JSON.")
def gpus(as_json: bool) -> None:
    """List what --gpu takes: families, and products with their memory and speed.

    \b
    Examples:
      sd35-trt gpus
      sd35-trt gpus --json | jq '.[] | select(.fp8) | .name'
    """
    from sd35_trt.targets import targets

    rows = list(targets().values())
    if as_json:
        extra = ("compute_capability", "builder", "policies", "bus_bandwidth")
        data = [
            {**dataclasses.asdict(t), **{name: getattr(t, name) for name in extra}} for t in rows
        ]
        click.echo(json.dumps(data, indent=1))
        return
    from .report import print_targets

    print_targets(rows)


@main.group()
def policy() -> None:
    """Look at precision policies.

    \b
    Example:
      sd35-trt policy show --policy int8-weight
    """


@policy.command()
@_model_option
@click.option(
    "--policy",
    "name",
    default="half",
    show_default=True,
    metavar="NAME|FILE",
    help="fp32, half, fp8, int8-weight, int4-weight, or a TOML file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print every layer as JSON.")
def show(model: str, name: str, as_json: bool) -> None:
    """Show what a policy means for a model: each linear with its precision, rule and bytes.

    Blocks that are alike share a line.

    \b
    Examples:
      sd35-trt policy show --policy int8-weight
      sd35-trt policy show --model ~/models/stable-diffusion-3.5-large --policy mine.toml --json
    """
    from sd35_trt.policies import load_policy
    from sd35_trt.store.hub import resolve_model

    from .report import print_inventory

    chosen = load_policy(name)
    root = resolve_model(model)
    try:
        from sd35_trt.checkpoints.single_file import open_checkpoint
        from sd35_trt.export.inventory import inventory
    except ImportError as error:
        raise Sd35Error(f"this needs {error.name}", "pip install 'sd35-trt[build]'") from error
    entries = inventory(open_checkpoint(root), chosen)
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(entry) for entry in entries]))
    else:
        print_inventory(entries)


def _bytes(count: float) -> str:
    from .report import format_bytes

    return format_bytes(count)
