"""A plan: what a model takes of a GPU's memory."""

from __future__ import annotations

from sd35_trt.planning.plan import DISK_BANDWIDTH, Plan
from sd35_trt.planning.record import plan_record
from sd35_trt.units import format_bytes

from .console import fact_table, open_console, plain_table


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f} s"


def _second(plan: Plan) -> str:
    names = ", ".join(plan.components)
    return f"{format_bytes(plan.residency.peak_bytes)} for {names}: {plan.verdict}"


def print_plan(plan: Plan) -> None:
    """Print what a model takes of a GPU's memory, by component and by stage."""
    data = plan_record(plan)
    console = open_console()
    guidance = "guidance" if plan.guided else "no guidance"
    width, height = plan.size
    console.print(
        f"{plan.model} for {plan.target.name}, {plan.policy}, {width}x{height}, "
        f"batch {plan.batch}, {guidance}, {plan.steps} steps\n"
    )
    table = plain_table(["stage", "component"], ["weights", "activations"])
    table.add_column("held")
    for column in ("in memory", "peak", "from disk", "from host"):
        table.add_column(column, justify="right")
    stage = ""
    for c in data["components"]:
        table.add_row(
            "" if c["stage"] == stage else c["stage"],
            c["name"],
            format_bytes(c["weight_bytes"]),
            format_bytes(c["activation_bytes"]),
            c["kind"],
            format_bytes(c["device_bytes"]),
            format_bytes(c["peak_bytes"]),
            _seconds(c["disk_seconds"]),
            _seconds(c["bus_seconds"]),
        )
        stage = c["stage"]
    console.print(table)
    fullest = max(data["stages"], key=lambda stage: stage["peak_bytes"])
    per_image = f"{format_bytes(data['bus_bytes_per_image'])} of weights"
    if plan.bus_bandwidth is not None:
        per_image += f" over the bus, {_seconds(data['load_seconds_per_image'])}"
    second = plan.second
    facts = {
        "weights": f"{format_bytes(data['weight_bytes'])}, of which "
        f"{format_bytes(data['resident_bytes'])} stay in memory",
        "peak": f"{format_bytes(data['peak_bytes'])}, {fullest['name']}",
        "first load": f"{_seconds(data['first_load_seconds'])} from a disk of "
        f"{DISK_BANDWIDTH / 1e9:g} GB/s",
        "per picture": per_image,
        "verdict": plan.verdict,
        **({"second GPU": _second(second)} if second is not None else {}),
    }
    console.print()
    console.print(fact_table(facts))
