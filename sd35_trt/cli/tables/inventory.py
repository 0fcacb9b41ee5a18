"""A policy's layers."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sd35_trt.export.inventory import LayerEntry
from sd35_trt.units import format_bytes

from .console import open_console, plain_table


def print_inventory(entries: Sequence[LayerEntry]) -> None:
    """Print every linear with its precision, rule and bytes; layers that differ only in their
    numbers share a line, and other layers are summed up by component and precision."""
    console = open_console()
    table = plain_table()
    for column in ("component", "linear", "n", "in×out", "precision", "bytes", "rule"):
        table.add_column(column, justify="right" if column in ("n", "bytes") else "left")
    groups: dict[tuple[str, ...], list[LayerEntry]] = {}
    for e in entries:
        pattern = re.sub(r"\b\d+\b", "N", e.layer, count=1) if e.linear else "other layers"
        shape = ("×".join(map(str, e.shape)) or "Q·Kᵀ, P·V") if e.linear else ""
        key = (e.component, pattern, shape, e.precision, e.rule if e.linear else "")
        groups.setdefault(key, []).append(e)
    for (component, pattern, shape, kind, rule), members in groups.items():
        size = format_bytes(sum(e.bytes for e in members))
        table.add_row(component, pattern, str(len(members)), shape, kind, size, rule)
    console.print(table)
    console.print()
    totals = plain_table(["precision"], ["layers", "bytes"])
    for precision in dict.fromkeys(e.precision for e in entries):
        members = [e for e in entries if e.precision == precision]
        totals.add_row(precision, str(len(members)), format_bytes(sum(e.bytes for e in members)))
    totals.add_row("all", str(len(entries)), format_bytes(sum(e.bytes for e in entries)))
    console.print(totals)
