"""What ``--gpu`` takes."""

from __future__ import annotations

from collections.abc import Iterable

from sd35_trt.targets import Target
from sd35_trt.units import format_memory

from .console import open_console, plain_table, sm_names


def print_targets(rows: Iterable[Target]) -> None:
    """Print GPU families, then products."""
    families = plain_table(["family", "", "for", "FP8", "FP4", "policy", "also", "builders"])
    products = plain_table(["product", "family", ""], ["memory", "bandwidth"])
    for column in ("bus", "builders"):
        products.add_column(column)
    for t in rows:
        sm = sm_names(t.compute_capabilities)
        if t.memory_bytes is None or t.bandwidth is None or t.bus is None:
            ability = ("yes" if able else "no" for able in (t.fp8, t.fp4))
            also = ", ".join(t.policies[1:])
            families.add_row(t.name, sm, t.title, *ability, t.policy, also, ", ".join(t.builders))
        else:
            memory = format_memory(t.memory_bytes)
            speed = f"{t.bandwidth / 1e9:,.0f} GB/s"
            products.add_row(t.name, t.family, sm, memory, speed, t.bus, ", ".join(t.builders))
    console = open_console()
    console.print(families)
    console.print()
    console.print(products)
