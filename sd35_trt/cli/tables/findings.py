"""What this machine can build and run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd35_trt.units import format_memory

from .console import open_console, plain_table


def print_findings(findings: Mapping[str, Any]) -> None:
    """Print the findings of :func:`sd35_trt.cli.diagnosis.examine`."""
    console = open_console()
    console.print(
        f"sd35-trt {findings['sd35-trt']}, Python {findings['python']}, "
        f"{findings['cores']} CPU cores, cache in {findings['cache']}"
    )
    packages = ", ".join(f"{k} {v or 'missing'}" for k, v in findings["packages"].items())
    console.print(f"to build: {packages}")
    for engine in findings["engines"].values():
        works = f"{engine['library']} {engine['version']}"
        console.print(engine["problem"] or works, soft_wrap=True)
    gpus = (
        f"{gpu['name']} (compute capability {gpu['compute_capability']}, "
        f"{format_memory(gpu['memory_bytes'])})"
        for gpu in findings["gpus"]
    )
    console.print(f"GPUs: {', '.join(gpus) or findings['no gpu']}\n")
    table = plain_table(["target", "builds here", "runs here", "note"])
    for name, target in findings["targets"].items():
        why_not = "no" if target["gpu"] or name == "cpu" else "no such GPU"
        table.add_row(
            name,
            f"yes, {target['builder']}" if target["builds"] else "no",
            f"yes, {target['runtime']}" if target["runs"] else why_not,
            target["note"],
        )
    console.print(table)
