"""``sd35-trt verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.units import format_bytes

from .options import (
    MODELS,
    bundle_argument,
    cache_dir_option,
    invocation,
    json_option,
    part_options,
    steps_option,
    tokenizers_option,
)
from .output import print_json


@click.command()
@bundle_argument
@click.option(
    "--against",
    metavar="BUNDLE|half",
    help="Also draw with this bundle, or with a half-precision one built of the same "
    "checkpoint, and report how far the pictures are apart.",
)
@click.option(
    "--model",
    default=None,
    metavar=MODELS,
    help="With --against half: the checkpoint behind BUNDLE. Default: mini, where it is.",
)
@part_options
@tokenizers_option
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    default=None,
    metavar="FILE",
    help="What to draw, one prompt per line. Default: mini's held-out captions, or 24 prompts "
    "that come with the package.",
)
@click.option(
    "--captions",
    type=int,
    default=None,
    metavar="N",
    help="How many of them. Default: 100 of mini's, all of a file.",
)
@click.option("--seed", type=int, default=None, help="Seed of the first picture. Default: 0.")
@steps_option
@click.option("--min-psnr", type=float, metavar="DB", help="Fail below this PSNR.")
@click.option("--min-ssim", type=float, metavar="SSIM", help="Fail below this mean SSIM.")
@click.option(
    "--max-latent-error",
    type=float,
    metavar="ERROR",
    help="Fail above this mean relative error of the final latents.",
)
@click.option(
    "--max-accuracy-drop",
    type=float,
    metavar="POINTS",
    help="Fail when this many percentage points more of mini's scenes are wrong.",
)
@cache_dir_option("With --against half: as for build.")
@json_option("Print the findings as JSON.")
def command(bundle: Path, against: str | None, as_json: bool, **arguments: Any) -> None:
    """Check every file of a BUNDLE against its hash; with --against, compare what it draws.

    The comparison is kept in BUNDLE/report as a page, index.html, and as report.json. With a
    threshold the exit status is 1 when it is missed.

    \b
    Examples:
      sd35-trt verify bundles/mini-cpu
      sd35-trt verify bundles/int8 --against half --captions 500 --max-accuracy-drop 1
      sd35-trt verify bundles/int8 --against bundles/half --prompts prompts.txt --min-psnr 30
    """
    if against is not None:
        _compare(bundle, against, as_json, arguments)
        return
    wishes = [name for name, value in arguments.items() if value is not None]
    if wishes:
        option = "--" + wishes[0].replace("_", "-")
        raise UsageError(f"{option} needs --against", "add: --against half")
    from sd35_trt.formats.bundle import Bundle

    files = list(Bundle.open(bundle, verify=True).manifest.all_files())
    total = sum(file.bytes for file in files)
    if as_json:
        print_json({"bundle": str(bundle), "files": len(files), "bytes": total})
    else:
        click.echo(f"{bundle}: {len(files)} files, {format_bytes(total)}, all as the manifest says")


def _compare(bundle: Path, against: str, as_json: bool, arguments: dict[str, Any]) -> None:
    """The part of ``verify`` that draws."""
    from dataclasses import fields

    from msgspec import to_builtins

    from sd35_trt.compat.requirement import requirement

    with requirement("comparing bundles", "report"):
        from sd35_trt.quality.compare import verify
        from sd35_trt.quality.gate import Thresholds, failures
        from sd35_trt.quality.options import VerifyOptions
    from .bars import CountBars
    from .tables.quality import print_quality

    bounds = {f.name: arguments.pop(f.name) for f in fields(Thresholds)}
    options = VerifyOptions(
        bundle,
        against,
        seed=arguments.pop("seed") or 0,
        thresholds=Thresholds(**bounds),
        command=invocation(),
        **arguments,
    )
    with CountBars(quiet=as_json) as progress:
        report = verify(options, progress)
    page = bundle / "report" / "index.html"
    if as_json:
        print_json(to_builtins(report))
    else:
        print_quality(report, str(page))
    if missed := failures(report.gate):
        raise Sd35Error("; ".join(missed), f"see {page}")
