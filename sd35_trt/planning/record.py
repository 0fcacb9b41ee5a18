"""A plan for machines: JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from sd35_trt.backends import BACKENDS
from sd35_trt.residency import phases_of
from sd35_trt.targets import choose_builder

from .footprints import activation_bytes, reserve
from .plan import BUS_EFFICIENCY, DISK_BANDWIDTH, Plan


def plan_record(plan: Plan) -> dict[str, Any]:
    """A plan, JSON-serializable; sizes in bytes, times in seconds."""
    result, backend = plan.residency, BACKENDS[choose_builder(plan.target)]
    weights = sum(sizes.weights for sizes in plan.components.values())
    phases = {name: phase for phase, names in phases_of(plan.components).items() for name in names}
    return {
        "model": plan.model,
        "variant": plan.variant,
        "target": plan.target.name,
        "policy": plan.policy,
        "size": list(plan.size),
        "batch": plan.batch,
        "steps": plan.steps,
        "guided": plan.guided,
        "exact": plan.exact,
        "budget_bytes": plan.budget,
        "fits": None if plan.budget is None else result.fits,
        "verdict": plan.verdict,
        "peak_bytes": result.peak_bytes,
        "least_bytes": plan.least_bytes,
        "weight_bytes": weights,
        "resident_bytes": result.resident_bytes,
        "bus_bytes_per_image": result.bus_bytes,
        "first_load_seconds": plan.seconds_from_disk(weights),
        "load_seconds_per_image": plan.seconds_from_host(result.bus_bytes),
        "assumed": {
            "cuda_context_bytes": reserve(plan.target),
            "disk_bandwidth": DISK_BANDWIDTH,
            "bus_efficiency": BUS_EFFICIENCY,
        },
        "components": [
            {
                "name": name,
                "stage": phases[name],
                "weight_bytes": sizes.weights,
                "activation_bytes": activation_bytes(sizes, backend),
                **asdict(result.placements[name]),
                "disk_seconds": plan.seconds_from_disk(sizes.weights),
                "bus_seconds": plan.seconds_from_host(sizes.weights),
            }
            for name, sizes in plan.components.items()
        ],
        "second": None if plan.second is None else plan_record(plan.second),
        "stages": [{"name": phase, "peak_bytes": peak} for phase, peak in plan.phase_peaks.items()],
    }
