"""``sd35-trt bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .options import (
    bundle_argument,
    device_options,
    guidance_option,
    invocation,
    json_option,
    size_option,
    step_cache_option,
    steps_option,
)
from .output import print_json


@click.command()
@bundle_argument
@click.option(
    "--runs", type=click.IntRange(1), default=7, show_default=True, help="Runs that are measured."
)
@click.option(
    "--warmup", type=click.IntRange(1), default=2, show_default=True, help="Runs before them."
)
@steps_option
@size_option
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures in a run.")
@guidance_option
@step_cache_option
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
@device_options
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
@json_option("Print the result as JSON.")
def command(as_json: bool, out: Path | None, prompt: str | None, **arguments: Any) -> None:
    """Measure how fast a BUNDLE draws, stage by stage, and what memory and energy it takes.

    Times are medians of the runs, with the bounds of the middle 80 %; those of a step are over
    the steps of all runs. With --step-cache fast, what BUNDLE is measured against draws exactly.

    \b
    Examples:
      sd35-trt bench bundles/mini-cpu
      sd35-trt bench bundles/mini-cpu --against diffusers --out bench.json
      sd35-trt bench bundles/short --step-cache fast --against bundles/short
      sd35-trt bench bundles/int8 --against bundles/half --size 192x128 --batch 2
      sd35-trt bench bundles/large --against diffusers --model ~/models/stable-diffusion-3.5-large
    """
    from sd35_trt.bench.options import BenchOptions
    from sd35_trt.bench.result import check_result_file, save_result
    from sd35_trt.bench.run import bench

    from .bars import CountBars
    from .tables.bench import print_bench

    if out is not None:
        check_result_file(out)
    if prompt is not None:
        arguments["prompt"] = prompt
    options = BenchOptions(command=invocation(), **arguments)
    with CountBars(quiet=as_json) as progress:
        result = bench(options, progress)
    if out is not None:
        save_result(result, out)
    if as_json:
        print_json(result)
    else:
        print_bench(result)
    for note in result["notes"]:
        click.echo(f"note: {note}", err=True)
