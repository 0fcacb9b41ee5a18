"""``sd35-trt inspect``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import bundle_argument, json_option


@click.command()
@bundle_argument
@json_option("Print the manifest as JSON.")
def command(bundle: Path, as_json: bool) -> None:
    """Show what a BUNDLE holds and how it was made.

    \b
    Examples:
      sd35-trt inspect bundles/mini-cpu
      sd35-trt inspect bundles/mini-cpu --json | jq .components
    """
    from sd35_trt.formats.bundle import MANIFEST, Bundle

    contents = Bundle.open(bundle)
    if as_json:
        click.echo((contents.root / MANIFEST).read_text("utf-8"), nl=False)
        return
    from .tables.manifest import print_manifest

    print_manifest(contents)
