"""``sd35-trt gpus``."""

from __future__ import annotations

import click

from .options import json_option
from .output import print_json


@click.command()
@json_option("Print them as JSON.")
def command(as_json: bool) -> None:
    """List what --gpu takes: families, and products with their memory and speed.

    \b
    Examples:
      sd35-trt gpus
      sd35-trt gpus --json | jq '.[] | select(.fp8) | .name'
    """
    from dataclasses import asdict

    from sd35_trt.targets import targets

    rows = list(targets().values())
    if as_json:
        derived = ("compute_capability", "builder", "policies", "bus_bandwidth")
        data = [{**asdict(t), **{name: getattr(t, name) for name in derived}} for t in rows]
        print_json(data, indent=1)
        return
    from .tables.targets import print_targets

    print_targets(rows)
