"""Everything that the runtime promises, executed with one kind of engine, on mini.

    python benchmarks/conformance.py --work /tmp/conformance --out conformance.json
    python benchmarks/conformance.py --gpu cpu --builder onnxruntime --section pictures

Bundles of mini are built for the GPU at hand, and drawn from; each check is a line with its figure
and its bound. Pictures are compared with those of ONNX Runtime on the CPU from a bundle with the
same policy. The file is written after every section, and sections that it has are not run again.
The exit status is 1 where a bound is missed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from conformance_bench import Bench
from conformance_sections import SECTIONS

from sd35_trt.errors import Sd35Error
from sd35_trt.targets import choose_builder, find_target


@click.command()
@click.option("--gpu", "target", default="auto", show_default=True, help="As for build.")
@click.option("--builder", default=None, help="As for build. Default: the target's.")
@click.option("--section", "names", multiple=True, type=click.Choice(list(SECTIONS)))
@click.option("--quick", is_flag=True, help="Fewer requests, loads and closes.")
@click.option("--work", type=click.Path(path_type=Path), help="For bundles. Default: temporary.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="JSON.")
def main(
    target: str, builder: str | None, names: tuple[str, ...], quick: bool, work: Path | None,
    out: Path | None,
) -> None:  # fmt: skip
    """Run the sections, print their checks, and write them."""
    record: dict[str, Any] = {"sections": {}}
    if out is not None and out.exists():
        record = json.loads(out.read_text("utf-8"))
    with tempfile.TemporaryDirectory() as temporary:
        folder = work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        builder = choose_builder(find_target(target), builder)
        bench = Bench(target, builder, folder, quick)
        for name in names or SECTIONS:
            if name in record["sections"]:
                continue
            print(f"{name}:", flush=True)
            start = time.perf_counter()
            rows = []
            try:
                for check in SECTIONS[name](bench):
                    print(f"  {check}", flush=True)
                    rows.append({**asdict(check), "passed": check.passed})
            except Sd35Error as error:
                rows.append({"what": "the section itself", "note": str(error), "passed": False})
                print(f"  stopped: {error}", flush=True)
            seconds = round(time.perf_counter() - start, 1)
            record["sections"][name] = {"seconds": seconds, "checks": rows}
            record |= {"builder": builder, "machine": bench.machine(), "builds": bench.seconds}
            if out is not None:
                out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    rows = [row for section in record["sections"].values() for row in section["checks"]]
    missed = [row["what"] for row in rows if not row["passed"]]
    print(f"{len(rows)} checks, {len(missed)} missed" + "".join(f"\n  {what}" for what in missed))
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
