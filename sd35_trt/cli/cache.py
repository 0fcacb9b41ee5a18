"""``sd35-trt cache``."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sd35_trt.errors import Sd35Error
from sd35_trt.units import format_bytes

from .options import BYTES, DURATION, cache_dir_option, json_option
from .output import print_json

if TYPE_CHECKING:
    from sd35_trt.store.contents import Entry
    from sd35_trt.store.pruning import Pruned

_FOLDER = "The cache. Default: $SD35_TRT_CACHE or ~/.cache/sd35-trt."


@click.group(invoke_without_command=True)
@cache_dir_option(_FOLDER)
@json_option("Print the list as JSON.")
@click.pass_context
def command(context: click.Context, cache_dir: Path | None, as_json: bool) -> None:
    """List what builds keep for later ones, by kind, and delete it.

    \b
    Examples:
      sd35-trt cache
      sd35-trt cache prune --older 30d
      sd35-trt cache prune --max-size 50GB --dry-run
    """
    context.obj = cache_dir
    if context.invoked_subcommand is not None:
        if as_json:
            raise click.UsageError("--json stands behind the command", context)
        return
    from sd35_trt.store.cache import cache_dir as find_folder
    from sd35_trt.store.contents import survey
    from sd35_trt.store.disk import CACHE, file_errors

    from .tables.cache import print_contents, summarize

    folder = find_folder(cache_dir)
    with file_errors(folder, CACHE.way, {folder: CACHE}):
        contents = survey(folder)
    if not as_json:
        print_contents(folder, contents)
        return
    rows = [
        {"kind": row.kind, "count": row.count, "bytes": row.bytes, "last_used": _time(row.used)}
        for row in summarize(contents.entries)
    ]
    notes, note_bytes = contents.notes
    print_json(
        {
            "folder": str(folder),
            "kinds": rows,
            "hash_notes": {"count": notes, "bytes": note_bytes},
            "work": {"count": len(contents.work), "bytes": contents.work_bytes},
            "bytes": contents.bytes,
        }
    )


@command.command()
@click.option(
    "--older",
    type=DURATION,
    default=None,
    help="Delete what was not used for longer: 90m, 12h, 30d, 2w.",
)
@click.option(
    "--max-size",
    "max_bytes",
    type=BYTES,
    default=None,
    help="Delete what was unused for longest until no more is left, e.g. 50GB.",
)
@click.option("--dry-run", is_flag=True, help="Delete nothing, say what would be.")
@cache_dir_option(_FOLDER)
@json_option("Print what was deleted as JSON.")
@click.pass_obj
def prune(
    above: Path | None,
    older: int | None,
    max_bytes: int | None,
    dry_run: bool,
    cache_dir: Path | None,
    as_json: bool,
) -> None:
    """Delete what is not used any more.

    Without options, that is only what no build can use: work of processes that died, and notes of
    files that are gone. --older and --max-size delete finished stages as well, and kept kernels,
    timings and graphs, the longest unused first. Every build that takes a stage from the cache
    counts as its use. What a running build makes or uses is kept.

    \b
    Examples:
      sd35-trt cache prune
      sd35-trt cache prune --older 30d
      sd35-trt cache prune --max-size 50GB --dry-run
    """
    from sd35_trt.store.cache import cache_dir as find_folder
    from sd35_trt.store.disk import CACHE, file_errors
    from sd35_trt.store.pruning import prune as prune_cache

    folder = find_folder(cache_dir or above)
    with file_errors(folder, CACHE.way, {folder: CACHE}):
        result = prune_cache(folder, older, max_bytes, dry_run)
    if as_json:
        print_json({"folder": str(folder), "dry_run": dry_run, **_as_json(result)})
    else:
        _tell(result, dry_run)
    if result.failures:
        error = result.failures[0]
        more = f", and {len(result.failures) - 1} more" if len(result.failures) > 1 else ""
        raise Sd35Error(
            f"cannot delete {error.filename}: {error.strerror}{more}", "run it as who owns them"
        )


def _as_json(result: Pruned) -> dict[str, Any]:
    def listed(entries: list[Entry]) -> list[dict[str, Any]]:
        return [
            {"kind": e.kind, "path": str(e.path), "bytes": e.bytes, "last_used": _time(e.used)}
            for e in entries
        ]

    return {
        "deleted": listed(result.entries),
        "bytes": result.bytes,
        "freed_bytes": result.freed,
        "work": {"count": len(result.work), "bytes": result.work_bytes},
        "hash_notes": result.notes,
        "in_use": listed(result.in_use),
        "left_bytes": result.left,
    }


def _tell(result: Pruned, dry: bool) -> None:
    verb = "would delete" if dry else "deleted"
    if result.entries:
        line = f"{verb} {_count(result)}: {format_bytes(result.bytes)}"
        if result.freed < result.bytes:
            line += f"; that frees {format_bytes(result.freed)}, bundles have links to the rest"
        click.echo(line)
    if result.work:
        size = format_bytes(result.work_bytes)
        click.echo(f"{verb} what {_number(len(result.work), 'build')} left behind: {size}")
    if result.notes:
        notes = _number(result.notes, "note")
        click.echo(f"{verb} {notes} of files that are gone or have changed")
    if result.in_use:
        click.echo(f"kept {_number(len(result.in_use), 'stage')} in use")
    would = "would have" if dry else "has"
    click.echo(f"the cache {would} {format_bytes(result.left)}")


def _count(result: Pruned) -> str:
    stages = sum(entry.is_stage for entry in result.entries)
    files = len(result.entries) - stages
    words = [_number(stages, "stage")] if stages else []
    return " and ".join([*words, _number(files, "file")] if files else words)


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _time(seconds: float) -> str:
    """UTC, as ISO 8601 has it."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
