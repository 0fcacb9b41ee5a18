"""What each group of linears suffers from FP8."""

from __future__ import annotations

from sd35_trt.calibration.sensitivity import Sensitivity
from sd35_trt.units import format_bytes

from .console import open_console, plain_table


def print_sensitivity(result: Sensitivity) -> None:
    """Print each group's error alone against the bytes it saves, the worst per byte first."""
    console = open_console()
    table = plain_table(["group"], ["linears", "error alone", "saves"])
    table.add_column("kept")
    rows = zip(result.groups, result.errors, strict=True)
    for group, error in sorted(rows, key=lambda row: -(row[1] ** 2) / row[0].saved_bytes):
        half = result.half is not None and group in result.half
        saving = format_bytes(group.saved_bytes)
        count = str(len(group.layers))
        table.add_row(group.name, count, f"{error:.5f}", saving, "half" if half else "")
    console.print(table)
    smallest = sum(group.fp8_bytes for group in result.groups)
    largest = sum(group.half_bytes for group in result.groups)
    console.print(f"\nall in FP8: error {result.everything:.5f}, {format_bytes(smallest)}")
    console.print(f"none in FP8: {format_bytes(largest)}")
    size = format_bytes(result.base_bytes)
    console.print(f"the policy given: error {result.base:.5f}, {size}")
    if result.chosen is not None and result.chosen_bytes is not None:
        size = format_bytes(result.chosen_bytes)
        console.print(f"within the budget: error {result.chosen:.5f}, {size}")
