"""What a cache holds, by kind."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.store.contents import FILES, Contents, Entry
from sd35_trt.units import format_bytes

from .console import open_console, plain_table

# What the folders of files hold.
_TITLES = {"kernels": "compiled kernels", "timings": "timings of kernels"}


@dataclass(frozen=True)
class Row:
    """Entries of one kind: how many, their bytes, and when one was last used."""

    kind: str
    count: int
    bytes: int
    used: float


def summarize(entries: Iterable[Entry]) -> list[Row]:
    """Entries by kind, in the alphabet's order, files after stages."""
    kinds: dict[str, list[Entry]] = {}
    for entry in entries:
        kinds.setdefault(entry.kind, []).append(entry)
    return [
        Row(kind, len(own), sum(e.bytes for e in own), max(e.used for e in own))
        for kind, own in sorted(kinds.items(), key=lambda item: (item[0] in FILES, item[0]))
    ]


def print_contents(folder: Path, contents: Contents) -> None:
    """Print a cache's folder, what it holds, and the sum."""
    console = open_console()
    table = plain_table(["kind"], ["count", "bytes", "last used"])
    for row in summarize(contents.entries):
        title = _TITLES.get(row.kind, row.kind)
        table.add_row(title, str(row.count), format_bytes(row.bytes), _ago(row.used))
    notes, note_bytes = contents.notes
    if notes:
        table.add_row("notes of hashes", str(notes), format_bytes(note_bytes), "")
    if contents.work:
        work = str(len(contents.work))
        table.add_row("being made, or left behind", work, format_bytes(contents.work_bytes), "")
    if table.row_count:
        console.print(table)
        console.print()
    console.print(f"{folder}: {format_bytes(contents.bytes)}", soft_wrap=True)


def _ago(seconds: float) -> str:
    """How long ago, in the largest unit: ``3 days ago``."""
    passed = int(time.time() - seconds)
    for name, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if passed >= length:
            number = passed // length
            return f"{number} {name}{'s' if number > 1 else ''} ago"
    return "now"
