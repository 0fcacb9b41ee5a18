"""``sd35-trt verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.units import format_bytes

from .options import (
    MODELS,
    bundle_argument,
    cache_dir_option,
    controlnet_option,
    invocation,
    json_option,
    lora_option,
    part_options,
    steps_option,
    tokenizers_option,
)
from .output import print_json

#: Word of ``--against`` that compares engines, not pictures.
ONNXRUNTIME = "onnxruntime"

# What each kind of comparison takes.
_OF_MODEL = frozenset(
    {"model", "loras", "controlnets", "clip_l", "clip_g", "t5", "vae", "tokenizers"}
)
_OF_BOTH = _OF_MODEL | {"seed", "steps", "cache_dir"}
_OF_ENGINES = _OF_BOTH | {"device", "bisect"}
_OF_PICTURES = _OF_BOTH | {
    "prompts", "captions", "min_psnr", "min_ssim", "max_latent_error", "max_accuracy_drop",
}  # fmt: skip


@click.command()
@bundle_argument
@click.option(
    "--against",
    metavar="BUNDLE|half|onnxruntime",
    help="Also draw with this bundle, or with a half-precision one built of the same "
    "checkpoint, and report how far the pictures are apart. With onnxruntime: run each engine "
    "beside the ONNX graph behind it.",
)
@click.option(
    "--model",
    default=None,
    metavar=MODELS,
    help="With --against half or onnxruntime: the checkpoint behind BUNDLE. Default: mini, where "
    "it is; with onnxruntime, first the graphs in the bundle or the cache.",
)
@lora_option
@controlnet_option
@part_options
@tokenizers_option
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
@steps_option
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
    "--device",
    default=None,
    metavar="cpu|cuda|cuda:N",
    help="With --against onnxruntime: where the engines run. Default: what BUNDLE was built for.",
)
@click.option(
    "--bisect/--no-bisect",
    default=None,
    help="With --against onnxruntime: where an engine is off, look for the first layer that is, "
    "by compiling the graph with more outputs. Default: look.",
)
@cache_dir_option("With --against half or onnxruntime: as for build.")
@json_option("Print the findings as JSON.")
def command(bundle: Path, against: str | None, as_json: bool, **arguments: Any) -> None:
    """Check every file of a BUNDLE against its hash; with --against, compare what it draws.

    The comparison of pictures is kept in BUNDLE/report as a page, index.html, and as report.json.
    With a threshold the exit status is 1 when it is missed; with --against onnxruntime, when an
    engine is further off than its precision accounts for.

    \b
    Examples:
      sd35-trt verify bundles/mini-cpu
      sd35-trt verify bundles/int8 --against half --captions 500 --max-accuracy-drop 1
      sd35-trt verify bundles/int8 --against bundles/half --prompts prompts.txt --min-psnr 30
      sd35-trt verify bundles/h100 --against onnxruntime --model ~/models/sd3.5-large
    """
    for several in ("loras", "controlnets"):
        arguments[several] = arguments[several] or None
    wishes = {name for name, value in arguments.items() if value is not None}
    if against == ONNXRUNTIME:
        if foreign := sorted(wishes - _OF_ENGINES):
            raise UsageError(f"{_option(foreign[0])} compares pictures", "add: --against half")
        _compare_engines(bundle, as_json, arguments)
        return
    if foreign := sorted(wishes & (_OF_ENGINES - _OF_PICTURES)):
        raise UsageError(f"{_option(foreign[0])} compares engines", "add: --against onnxruntime")
    if against is not None:
        pictures = {name: value for name, value in arguments.items() if name in _OF_PICTURES}
        _compare(bundle, against, as_json, pictures)
        return
    if wishes:
        raise UsageError(f"{_option(min(wishes))} needs --against", "add: --against half")
    from sd35_trt.formats.bundle import Bundle

    files = list(Bundle.open(bundle, verify=True).manifest.all_files())
    total = sum(file.bytes for file in files)
    if as_json:
        print_json({"bundle": str(bundle), "files": len(files), "bytes": total})
    else:
        click.echo(f"{bundle}: {len(files)} files, {format_bytes(total)}, all as the manifest says")


def _option(name: str) -> str:
    if name in ("loras", "controlnets"):
        name = name.removesuffix("s")
    return "--" + name.replace("_", "-")


def _source(arguments: dict[str, Any]) -> ModelOptions | None:
    """The checkpoint that was named; None where none was."""
    given = {n: v for n, v in arguments.items() if n in _OF_MODEL and v is not None}
    if "tokenizers" in given and "model" not in given:
        raise UsageError("--tokenizers needs --model", "name the checkpoint with --model FILE")
    return ModelOptions(**given) if given else None


def _compare_engines(bundle: Path, as_json: bool, arguments: dict[str, Any]) -> None:
    """The part of ``verify`` that runs engines beside their graphs."""
    from dataclasses import asdict

    from sd35_trt.backends import BACKENDS
    from sd35_trt.compat.library import load_library
    from sd35_trt.compat.requirement import requirement
    from sd35_trt.formats.bundle import Bundle
    from sd35_trt.store.cache import open_cache

    load_library(BACKENDS[ONNXRUNTIME])
    with requirement("comparing engines", "compare"):
        from sd35_trt.quality.engines import STEPS, compare_engines
        from sd35_trt.quality.graph_source import find_graphs
    from .bars import CountBars
    from .tables.engines import failures, print_comparison

    contents = Bundle.open(bundle, verify=True)
    cache = open_cache(arguments["cache_dir"])
    with CountBars(quiet=as_json) as progress:
        graphs = find_graphs(contents, _source(arguments), cache, progress)
        comparison = compare_engines(
            contents,
            graphs,
            STEPS if arguments["steps"] is None else arguments["steps"],
            arguments["seed"] or 0,
            arguments["device"],
            arguments["bisect"] is not False,
            progress,
        )
    if as_json:
        print_json({**asdict(comparison), "passed": comparison.passed})
    else:
        print_comparison(comparison)
    if missed := failures(comparison):
        raise Sd35Error("; ".join(missed), "build again, or with --policy half or fp32")


def _compare(bundle: Path, against: str, as_json: bool, arguments: dict[str, Any]) -> None:
    """The part of ``verify`` that draws."""
    from dataclasses import fields

    from msgspec import to_builtins

    from sd35_trt.compat.requirement import requirement

    with requirement("comparing bundles", "report"):
        from sd35_trt.quality.compare import verify
        from sd35_trt.quality.gate import Thresholds, failures
        from sd35_trt.quality.options import VerifyOptions
    from .bars import CountBars
    from .tables.quality import print_quality

    bounds = {f.name: arguments.pop(f.name) for f in fields(Thresholds)}
    source = _source(arguments)
    rest = {name: value for name, value in arguments.items() if name not in _OF_MODEL}
    options = VerifyOptions(
        bundle,
        against,
        source,
        seed=rest.pop("seed") or 0,
        thresholds=Thresholds(**bounds),
        command=invocation(),
        **rest,
    )
    with CountBars(quiet=as_json) as progress:
        report = verify(options, progress)
    page = bundle / "report" / "index.html"
    if as_json:
        print_json(to_builtins(report))
    else:
        print_quality(report, str(page))
    if missed := failures(report.gate):
        raise Sd35Error("; ".join(missed), f"see {page}")
