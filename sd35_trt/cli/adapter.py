"""``sd35-trt adapter``."""

from __future__ import annotations

from pathlib import Path

import click

from sd35_trt.units import format_bytes

from .options import json_option
from .output import print_json


@click.group()
def command() -> None:
    """LoRAs as inputs of a bundle: convert them, and look into them.

    \b
    Examples:
      sd35-trt build --gpu ada --adapters 64 --out bundles/adapted
      sd35-trt adapter convert style.safetensors --for bundles/adapted --out adapter.safetensors
      sd35-trt adapter inspect adapter.safetensors
      sd35-trt generate bundles/adapted "a red star" --adapter adapter.safetensors:0.8
    """


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--for",
    "bundle",
    type=click.Path(path_type=Path),
    required=True,
    metavar="BUNDLE",
    help="A bundle of the same model, built with --adapters.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE",
    help="The adapter to write, a .safetensors file.",
)
@json_option("Print the result as JSON.")
def convert(file: Path, bundle: Path, out: Path, as_json: bool) -> None:
    """Convert a LoRA into an adapter for bundles of one model.

    FILE is a LoRA of SD3.5 in the names of diffusers, PEFT, kohya's scripts or ComfyUI, or one
    that comes with mini, mini:night or mini:moon. Every tensor of it is used, or it is refused.

    \b
    Examples:
      sd35-trt adapter convert mini:night --for bundles/adapted --out night.safetensors
      sd35-trt adapter convert style.safetensors --for bundles/large --out style-large.safetensors
    """
    from sd35_trt.compat.requirement import requirement
    from sd35_trt.formats.adapter import write_adapter
    from sd35_trt.formats.bundle import Bundle
    from sd35_trt.store.disk import file_errors

    with requirement("converting adapters", "build"):
        from sd35_trt.checkpoints.adapter_convert import convert_adapter

        adapter = convert_adapter(file, Bundle.open(bundle))
    with file_errors(out, "choose another --out"):
        write_adapter(out, adapter)
    facts = {"adapter": str(out), "rank": adapter.rank, "layers": adapter.parts()}
    if as_json:
        print_json({**facts, "bytes": out.stat().st_size})
        return
    click.echo(f"{out}  rank {adapter.rank}, {format_bytes(out.stat().st_size)}")


@command.command()
@click.argument("file", type=click.Path(path_type=Path))
@json_option("Print the facts as JSON.")
def inspect(file: Path, as_json: bool) -> None:
    """Print what an adapter changes."""
    from sd35_trt.formats.adapter import read_adapter

    adapter = read_adapter(file)
    facts = {
        "adapter": str(file),
        "rank": adapter.rank,
        "layers": adapter.parts(),
        "bytes": adapter.nbytes,
        "source": adapter.source,
    }
    if as_json:
        print_json(facts)
        return
    click.echo(f"{file}  rank {adapter.rank}, {format_bytes(adapter.nbytes)}")
    for part, count in adapter.parts().items():
        click.echo(f"{part}  {count} layers")
    click.echo(f"made from the file with the SHA-256 {adapter.source}")
