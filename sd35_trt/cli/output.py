"""What commands print for machines."""

from __future__ import annotations

from typing import Any

import click


def print_json(data: Any, indent: int | None = None) -> None:
    """Print JSON; dataclasses in it become objects."""
    import dataclasses
    import json

    click.echo(json.dumps(data, indent=indent, default=dataclasses.asdict))
