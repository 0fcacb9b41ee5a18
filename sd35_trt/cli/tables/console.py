"""What all tables share: the console, and how a table looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 120


def open_console() -> Console:
    """Standard output. Brackets are printed as they are: names of files have them."""
    console = Console(highlight=False, markup=False)
    # A pipe has no width: give it one that fits the tables.
    if not console.is_terminal:
        console.width = _WIDTH
    return console


def plain_table(left: Iterable[str] = (), right: Iterable[str] = ()) -> Table:
    """A table without lines.

    Args:
        left: titles of its first columns, whose cells stand left.
        right: of those after them, whose cells stand right.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for title in left:
        table.add_column(title)
    for title in right:
        table.add_column(title, justify="right")
    return table


def fact_table(facts: Mapping[str, str]) -> Table:
    """One line a fact, its name in bold."""
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, style="bold"), value)
    return table


def sm_names(compute_capabilities: Iterable[str]) -> str:
    """``8.9`` and ``12.0`` as ``sm89, sm120``."""
    return ", ".join("sm" + capability.replace(".", "") for capability in compute_capabilities)
