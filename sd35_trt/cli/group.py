"""The command group: commands are imported when they are used, and errors become one line."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from sd35_trt.errors import Sd35Error

from .streams import degrade_output


class CommandGroup(click.Group):
    """Commands in modules of one package, each as its ``command``.

    Args:
        package: dotted name.
        modules: those that hold a command, which has the module's name, with dashes.
    """

    def __init__(self, *args: Any, package: str, modules: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._package = package
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names, in the alphabet's order."""
        return sorted(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command; None where there is no such."""
        if cmd_name not in self._modules:
            return None
        module = importlib.import_module(f"{self._package}.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **kwargs: Any) -> Any:
        """Run a command and exit.

        An error is one line on standard error; the exit status is the one that it carries, 1 for
        what nobody foresaw. ``--debug``, wherever it stands, shows the traceback.
        """
        degrade_output()
        # Read when ONNX Runtime is imported; else it names this machine to its makers.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        words = list(sys.argv[1:] if args is None else args)
        # What follows "--" are no options.
        end = words.index("--") if "--" in words else len(words)
        debug = "--debug" in words[:end]
        if debug:
            options = [word for word in words[:end] if word != "--debug"]
            words = ["--debug", *options, *words[end:]]
        # Messages name the command, however it was started.
        kwargs = {"prog_name": "sd35-trt", **kwargs, "standalone_mode": False}
        try:
            result = super().main(words, *rest, **kwargs)
            # Outside standalone mode, click returns the status of --help, --version and exit().
            sys.exit(result if isinstance(result, int) else 0)
        except click.exceptions.Abort:
            click.echo("interrupted", err=True)
            sys.exit(130)
        except click.ClickException as error:
            click.echo(f"error: {error.format_message()}{_fix(error)}", err=True)
            sys.exit(error.exit_code)
        except Sd35Error as error:
            if debug:
                import traceback

                traceback.print_exc()
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            sys.exit(error.exit_status)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception as error:
            if debug:
                raise
            kind = type(error).__name__
            text = " ".join(str(error).split())
            click.echo(f"error: {kind}: {text} — run again with --debug for a traceback", err=True)
            sys.exit(1)


def _fix(error: click.ClickException) -> str:
    """What to do about wrong use of a command."""
    context = getattr(error, "ctx", None)
    if context is None:
        return ""
    fix = f" — see: {context.command_path} --help"
    # A text that begins with a dash is taken for an option.
    misread = (click.NoSuchOption, click.MissingParameter)
    if isinstance(error, misread) and any(p.name == "prompt" for p in context.command.params):
        usage = " ".join(context.command.collect_usage_pieces(context)[1:-1])
        fix += (
            f'; a prompt that begins with a dash follows --: {context.command_path} {usage} -- "-…"'
        )
    return fix
