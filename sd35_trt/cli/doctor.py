"""``sd35-trt doctor``."""

from __future__ import annotations

import click

from .options import json_option
from .output import print_json


@click.command()
@json_option("Print the findings as JSON.")
def command(as_json: bool) -> None:
    """Say what this machine can build and run, and what is missing for the rest.

    \b
    Example:
      sd35-trt doctor
    """
    from .diagnosis import examine

    findings = examine()
    if as_json:
        print_json(findings, indent=1)
    else:
        from .tables.findings import print_findings

        print_findings(findings)
