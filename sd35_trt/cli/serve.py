"""``sd35-trt serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sd35_trt.compat.requirement import requirement

from .options import BYTES, device_option, engine_options, named_adapters_option


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="[NAME=]BUNDLE...")
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to listen on. One that other machines reach needs --token-file.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 takes a free one.",
)
@click.option(
    "--queue",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Requests that may wait; the next one is answered with 429.",
)
@click.option(
    "--traffic",
    default="",
    metavar="NAME=PERCENT,...",
    help="Split of the requests that name no model. Default: all to the first bundle.",
)
@click.option(
    "--fallback",
    "fallbacks",
    multiple=True,
    metavar="[NAME=]BUNDLE",
    help="Bundle that draws when pictures are anomalous; with NAME for that bundle alone.",
)
@named_adapters_option
@click.option(
    "--control",
    "controls",
    multiple=True,
    metavar="NAME=FILE",
    help="A picture that requests may have a ControlNet follow by its name, for bundles built with "
    "--controlnet.",
)
@click.option(
    "--key-header",
    default=None,
    metavar="HEADER",
    help="Header that names a user, who stays on one bundle. Default: the body's user.",
)
@click.option(
    "--token-file",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="File with the token that clients send as Authorization: Bearer.",
)
@click.option(
    "--admin-token-file",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="The same for the admin endpoints, which are closed without it.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0.1, max=86400),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Of a request, waiting and drawing together.",
)
@click.option(
    "--body-limit",
    type=BYTES,
    default="32MiB",
    show_default=True,
    help="Of a request's body, pictures included.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    default=None,
    help="CPU threads of each engine. Default: all cores.",
)
@device_option("Several, as cuda:0,cuda:1, draw requests side by side.")
@engine_options
def command(
    token_file: Path | None,
    admin_token_file: Path | None,
    key_header: str | None,
    time_limit: float,
    body_limit: int,
    **options: Any,
) -> None:
    """Serve pictures over HTTP in OpenAI's form, drawn with BUNDLEs.

    A bundle's name is what requests call model; without NAME= it is the directory's. SIGTERM
    ends the server when what was accepted is drawn, after 8 seconds at most.

    \b
    Examples:
      sd35-trt serve bundles/mini-cpu
      sd35-trt serve half=bundles/half fp8=bundles/fp8 --traffic half=90,fp8=10
      sd35-trt serve bundles/h100 --device cuda:0,cuda:1
      sd35-trt serve bundles/h100 --host 0.0.0.0 --token-file token
    """
    with requirement("serving", "serve"):
        from sd35_trt.serving.launch import Launch, launch
    from sd35_trt.serving.settings import Settings, read_token

    settings = Settings(
        token=None if token_file is None else read_token(token_file, "--token-file"),
        admin_token=None
        if admin_token_file is None
        else read_token(admin_token_file, "--admin-token-file"),
        key_header=key_header,
        time_limit=time_limit,
        body_limit=body_limit,
    )
    launch(Launch(settings=settings, **options), lambda url: click.echo(f"listening on {url}"))
