"""Which published model fits which GPU, by ``sd35-trt plan``: docs/planning.md has the table.

    python benchmarks/plan_matrix.py

Prints a Markdown table for native sizes, one picture at a time, each target's default policy.
"""

from __future__ import annotations

from sd35_trt.checkpoints.structure import PUBLISHED
from sd35_trt.planning.options import PlanOptions
from sd35_trt.planning.plan import Plan
from sd35_trt.planning.run import plan, replan
from sd35_trt.residency import STREAMED
from sd35_trt.targets import targets
from sd35_trt.units import format_memory


def cell(result: Plan) -> str:
    """Peak, and what crosses the bus for each picture."""
    if not result.residency.fits:
        return f"no: {result.least_bytes / 1e9:.1f} GB"
    text = f"{result.residency.peak_bytes / 1e9:.1f} GB"
    if not result.residency.bus_bytes:
        return f"{text}, all resident"
    seconds = result.seconds_from_host(result.residency.bus_bytes)
    streams = result.residency.placements["denoiser"].kind == STREAMED
    return f"{text}, {'denoiser streams, ' if streams else ''}+{seconds:.2f} s"


def main() -> None:
    products = [target for target in targets().values() if target.memory_bytes is not None]
    plans: dict[tuple[str, str], Plan] = {}
    print(f"| GPU | memory | policy | {' | '.join(PUBLISHED)} |")
    print(f"|---|---|---|{'---|' * len(PUBLISHED)}")
    for target in products:
        cells = []
        for model in PUBLISHED:
            key = (model, target.policy)
            if key not in plans:
                plans[key] = plan(PlanOptions(model, target.name))
            cells.append(cell(replan(plans[key], target)))
        memory = format_memory(target.memory_bytes or 0)
        print(f"| {target.name} | {memory} | `{target.policy}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
