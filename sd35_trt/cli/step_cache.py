"""``sd35-trt calibrate --step-cache``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from .bars import CountBars
from .options import invocation
from .output import print_json

if TYPE_CHECKING:
    from sd35_trt.quality.step_cache import Errors, Found

#: Steps, sampler, shift.
Key = tuple[int, str, float]

# Of ``calibrate``'s options, those that it takes besides its own.
_TAKEN = {"prompts", "limit", "guidance", "sizes", "seed", "device", "out", "as_json"}
_OWN = {"step_cache", "step_cache_error", "plans"}


def step_cache_options(command: Callable[..., None]) -> Callable[..., None]:
    """The options of ``calibrate`` that find short steps."""
    options = (
        click.option(
            "--step-cache",
            type=click.Path(path_type=Path),
            default=None,
            metavar="BUNDLE",
            help="Instead, find which steps of this bundle's pictures can be short. It was built "
            "with --short-steps.",
        ),
        click.option(
            "--step-cache-error",
            type=float,
            default=None,
            help="With --step-cache: of the last latents against those of full steps, relative, "
            "the median over pictures. Default: 0.032.",
        ),
        click.option(
            "--plan",
            "plans",
            type=(int, str, float),
            multiple=True,
            metavar="STEPS SAMPLER SHIFT",
            help="With --step-cache: what to find short steps for; may be given more than once. "
            "Default: the bundle's steps, sampler and shift.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def write_step_cache(
    context: click.Context,
    bundle: Path,
    error: float | None,
    plans: tuple[Key, ...],
    as_json: bool,
) -> None:
    """Find a bundle's short steps and write them.

    Args:
        context: of the command, with all its arguments.

    Raises:
        click.UsageError: an option that it does not take.
    """
    given = _given(context)
    out: Path = given["out"]
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise click.UsageError(f"--out {out}: with --step-cache it is a file in a folder there is")
    sizes = given.get("sizes", ())
    if len(sizes) > 1:
        raise click.UsageError("--step-cache takes one --size")
    from sd35_trt.quality.step_cache import ERROR, StepCacheOptions, find_step_cache

    taken = {name: given[name] for name in ("prompts", "limit", "guidance", "seed", "device")
             if name in given}  # fmt: skip
    options = StepCacheOptions(
        bundle=bundle,
        plans=plans,
        error=ERROR if error is None else error,
        size=sizes[0] if sizes else None,
        command=invocation(),
        **taken,
    )
    with CountBars(quiet=as_json) as progress:
        found = find_step_cache(options, progress)
    out.write_bytes(found.cache.encode())
    _print(found, out, as_json)


def _given(context: click.Context) -> dict[str, Any]:
    """The arguments that were given, by parameter.

    Raises:
        click.UsageError: one that finding short steps does not take.
    """
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    if other := next((name for name in given if name not in _TAKEN | _OWN), None):
        raise click.UsageError(
            f"--step-cache draws with a bundle and takes no {flags[other]}: leave it out"
        )
    return given


def _print(found: Found, out: Path, as_json: bool) -> None:
    rows = [
        _row(plan.key, plan.short, found.cache.speed(plan), errors)
        for plan, errors in zip(found.cache.plans, found.errors, strict=True)
    ]
    if as_json:
        print_json({"step_cache": str(out), "plans": rows})
        return
    for row in rows:
        click.echo(
            f"{row['steps']} steps of {row['sampler']} with shift {row['shift']:g}: "
            f"{row['short_steps']} are short, {row['speed']:.2f} times fewer blocks; error "
            f"{row['error_median']:.3f} (mean {row['error_mean']:.3f}, "
            f"worst {row['error_worst']:.3f})"
        )
    click.echo(str(out))


def _row(key: Key, short: int, speed: float, errors: Errors) -> dict[str, Any]:
    steps, sampler, shift = key
    return {
        "steps": steps, "sampler": sampler, "shift": shift, "short_steps": short, "speed": speed,
        "error_median": errors.median, "error_mean": errors.mean, "error_worst": errors.worst,
    }  # fmt: skip
