"""``sd35-trt policy``."""

from __future__ import annotations

from typing import Any

import click

from .options import json_option, structure_options
from .output import print_json


@click.group()
def command() -> None:
    """Look at precision policies.

    \b
    Example:
      sd35-trt policy show --policy int8-weight
    """


@command.command()
@structure_options
@click.option(
    "--policy",
    "name",
    default="half",
    show_default=True,
    metavar="NAME|FILE",
    help="fp32, half, fp8, int8-weight, int4-weight, or a TOML file.",
)
@json_option("Print every layer as JSON.")
def show(name: str, as_json: bool, **model: Any) -> None:
    """Show what a policy means for a model: each linear with its precision, rule and bytes.

    Blocks that are alike share a line.

    \b
    Examples:
      sd35-trt policy show --policy int8-weight
      sd35-trt policy show --model ~/models/stable-diffusion-3.5-large --policy mine.toml --json
    """
    from sd35_trt.checkpoints.model_options import ModelOptions
    from sd35_trt.compat.requirement import requirement
    from sd35_trt.policies import load_policy

    policy = load_policy(name)
    with requirement("showing a policy's layers", "build"):
        from sd35_trt.checkpoints.look import look_at_structure
        from sd35_trt.export.inventory import inventory

    entries = inventory(look_at_structure(ModelOptions(**model)).checkpoint, policy)
    if as_json:
        print_json(entries)
        return
    from .tables.inventory import print_inventory

    print_inventory(entries)
