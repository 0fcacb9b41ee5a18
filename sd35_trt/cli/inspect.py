"""``sd35-trt inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .options import bundle_argument, json_option
from .output import print_json

if TYPE_CHECKING:
    from sd35_trt.formats.bundle import Bundle


@click.command()
@bundle_argument
@click.option(
    "--engines",
    is_flag=True,
    help="Look into the engines: layers by type and precision. Plans take their library and GPU.",
)
@json_option("Print the manifest as JSON; with --engines, what they consist of.")
def command(bundle: Path, engines: bool, as_json: bool) -> None:
    """Show what a BUNDLE holds and how it was made.

    \b
    Examples:
      sd35-trt inspect bundles/mini-cpu
      sd35-trt inspect bundles/mini-cpu --json | jq .components
      sd35-trt inspect bundles/mini-cpu --engines
    """
    from sd35_trt.formats.bundle import MANIFEST, Bundle

    contents = Bundle.open(bundle)
    if engines:
        _look_inside(contents, as_json)
        return
    if as_json:
        click.echo((contents.root / MANIFEST).read_text("utf-8"), nl=False)
        return
    from .tables.manifest import print_manifest

    print_manifest(contents)


def _look_inside(bundle: Bundle, as_json: bool) -> None:
    """The part of ``inspect`` that opens the engines."""
    from dataclasses import asdict

    from msgspec import to_builtins

    from sd35_trt.quality.contents import look_inside

    contents = look_inside(bundle)
    if as_json:
        components = bundle.manifest.components
        ports = {c.name: to_builtins({"inputs": c.inputs, "outputs": c.outputs, "bounds": c.bounds})
                 for c in components}  # fmt: skip
        print_json({name: {**ports[name], **asdict(inside)} for name, inside in contents.items()})
        return
    from .tables.engines import print_contents

    print_contents(bundle, contents)
