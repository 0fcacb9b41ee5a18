"""``sd35-trt plan``."""

from __future__ import annotations

from typing import Any

import click

from .options import (
    BYTES,
    cache_dir_option,
    guided_option,
    json_option,
    scheduler_option,
    size_option,
    structure_options,
    variant_option,
)
from .output import print_json


@click.command()
@structure_options
@scheduler_option
@variant_option
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
    type=BYTES,
    default=None,
    help="Memory to stay within, e.g. 8GiB. Default: all that the GPU has.",
)
@size_option
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures at once.")
@guided_option("With or without classifier-free guidance. Default: with, except for Turbo models.")
@click.option(
    "--short-steps", type=int, default=None, metavar="K", help="As for build. Default: none."
)
@click.option(
    "--split-guidance",
    is_flag=True,
    help="Two GPUs draw one picture, each a branch of guidance; what each takes.",
)
@click.option(
    "--exact",
    is_flag=True,
    help="Ask TensorRT for RTX what working memory its engines take: a minute or two the first "
    "time, then kept.",
)
@cache_dir_option("With --exact: as for build.")
@json_option("Print the plan as JSON.")
def command(as_json: bool, **arguments: Any) -> None:
    """Say whether a model fits a GPU, what stays in its memory, and what loads or streams.

    Builds nothing and reads no weights.

    \b
    Examples:
      sd35-trt plan --model large --gpu rtx4060
      sd35-trt plan --model large --gpu rtx4060 --exact
      sd35-trt plan --model medium --gpu ampere --vram 8GiB --size 1344x768 --batch 2
      sd35-trt plan --model large --gpu rtx4070 --json | jq .fits
    """
    from sd35_trt.planning.options import PlanOptions
    from sd35_trt.planning.run import plan

    from .bars import StageBars

    with StageBars(quiet=as_json or not arguments["exact"]) as progress:
        result = plan(PlanOptions(**arguments), progress)
    if as_json:
        from sd35_trt.planning.record import plan_record

        print_json(plan_record(result))
        return
    from .tables.plan import print_plan

    print_plan(result)
