"""``sd35-trt policy``."""

from __future__ import annotations

import click

from .options import json_option, model_option, without_t5_option
from .output import print_json


@click.group()
def command() -> None:
    """Look at precision policies.

    \b
    Example:
      sd35-trt policy show --policy int8-weight
    """


@command.command()
@model_option
@without_t5_option
@click.option(
    "--policy",
    "name",
    default="half",
    show_default=True,
    metavar="NAME|FILE",
    help="fp32, half, fp8, int8-weight, int4-weight, or a TOML file.",
)
@json_option("Print every layer as JSON.")
def show(model: str, without_t5: bool, name: str, as_json: bool) -> None:
    """Show what a policy means for a model: each linear with its precision, rule and bytes.

    Blocks that are alike share a line.

    \b
    Examples:
      sd35-trt policy show --policy int8-weight
      sd35-trt policy show --model ~/models/stable-diffusion-3.5-large --policy mine.toml --json
    """
    from sd35_trt.checkpoints.hub import resolve_model
    from sd35_trt.compat.requirement import requirement
    from sd35_trt.policies import load_policy

    policy = load_policy(name)
    root = resolve_model(model)
    with requirement("showing a policy's layers", "build"):
        from sd35_trt.checkpoints.single_file import open_checkpoint
        from sd35_trt.export.inventory import inventory

    entries = inventory(open_checkpoint(root, without_t5=without_t5), policy)
    if as_json:
        print_json(entries)
        return
    from .tables.inventory import print_inventory

    print_inventory(entries)
