"""``sd35-trt export-triton``."""

from __future__ import annotations

from pathlib import Path

import click

from .options import engine_options, named_adapters_option


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--repository",
    type=click.Path(path_type=Path),
    required=True,
    metavar="DIR",
    help="Triton's model repository; made where there is none.",
)
@click.option("--name", default=None, help="Of the model. Default: the bundle's directory.")
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=None,
    help="CPU threads of each engine. Default: all cores.",
)
@named_adapters_option
@engine_options
def command(
    bundle: Path,
    repository: Path,
    name: str | None,
    threads: int | None,
    adapters: tuple[str, ...],
    vram_budget: int | None,
    trust_kernels: bool,
) -> None:
    """Write models for NVIDIA Triton that draw from BUNDLE.

    NAME answers once, over HTTP and gRPC. NAME_stream answers gRPC streams with each step too, and
    holds the engines of both. The bundle stays where it is; Triton's Python needs sd35-trt.

    \b
    Example:
      sd35-trt export-triton bundles/h100 --repository models
      tritonserver --model-repository models
    """
    from sd35_trt.serving.names import named_files
    from sd35_trt.serving.triton.export import export_triton

    given = {
        "threads": threads,
        "vram_budget": vram_budget,
        "trust_kernels": trust_kernels or None,
    }
    options = {key: str(value) for key, value in given.items() if value is not None}
    names = export_triton(bundle, repository, name, options, named_files(adapters, "--adapter"))
    click.echo(f"{repository / names.once}  answers once")
    click.echo(f"{repository / names.stream}  draws, and answers with a stream")
