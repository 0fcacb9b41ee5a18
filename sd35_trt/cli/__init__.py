"""The command line, one module a command. Heavy modules are imported when a command runs."""

from __future__ import annotations

import click

from sd35_trt import __version__

from .group import CommandGroup

#: Every command, by its module in this package.
COMMANDS = (
    "build",
    "calibrate",
    "generate",
    "plan",
    "inspect",
    "verify",
    "bench",
    "serve",
    "export-triton",
    "policy",
    "gpus",
    "doctor",
    "cache",
    "adapter",
)


@click.group(
    cls=CommandGroup,
    package=__name__,
    modules=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="sd35-trt")
@click.option("--debug", is_flag=True, help="Show tracebacks.")
def main(debug: bool) -> None:
    """Compile Stable Diffusion 3.5 ahead of time and draw with it, without PyTorch.

    \b
    Build the small model that comes with the package, and draw with it:
      sd35-trt build --gpu cpu
      sd35-trt generate bundles/mini-cpu "a small red circle on a blue background"
    """
    import logging

    logging.basicConfig(level=logging.DEBUG if debug else logging.ERROR)
