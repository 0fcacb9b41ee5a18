"""How far healthy images leave the band that calibration recorded, to choose the guard's margin.

    sd35-trt build --gpu cpu --policy fp8 --out bundles/mini-fp8
    python benchmarks/guard_margin.py bundles/mini-fp8

Prompts of the calibration set with other seeds, drawn with other guidance, steps, schedules and
sizes than calibration. Of each, the table has the farthest that any image was outside the band
after any step: how many times the largest deviation (or the smallest, below it), and the mean in
units of the largest deviation.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import numpy as np

from sd35_trt.calibration.prompts import read_prompts
from sd35_trt.mini import calibration_prompts_path
from sd35_trt.runtime import Pipeline, Step
from sd35_trt.runtime.latent_guard import Band

RESULTS = Path(__file__).parent / "results" / "guard_margin.json"

_FIRST_SEED = 1000

_SETTINGS: dict[str, dict[str, Any]] = {
    "as calibrated": {},
    **{f"guidance {g:g}": {"guidance": g} for g in (1.0, 1.5, 5.0, 7.0)},
    **{f"{n} steps": {"steps": n} for n in (1, 2, 4, 8, 50)},
    **{f"{n} steps, guidance 7": {"steps": n, "guidance": 7.0} for n in (1, 2, 4)},
    **{f"shift {s:g}": {"shift": s} for s in (1.0, 6.0)},
    "dpmpp-2m, 14 steps": {"sampler": "dpmpp-2m", "steps": 14},
    **{f"{w}x{h}": {"size": (w, h)} for w, h in ((64, 64), (192, 192), (192, 64))},
}


def farthest(pipe: Pipeline, band: Band, prompts: list[str], **settings: Any) -> dict[str, float]:
    """The farthest of any image after any step."""
    factor, mean = 1.0, 0.0

    def look(step: Step) -> None:
        nonlocal factor, mean
        values = step.latents.reshape(len(step.latents), -1)
        low, high = (np.interp(step.sigma, band.sigma, side) for side in band.deviation.T)
        deviations = values.std(axis=1)
        factor = max(factor, deviations.max() / high, low / deviations.min())
        left, right = (np.interp(step.sigma, band.sigma, side) for side in band.mean.T)
        means = values.mean(axis=1)
        mean = max(mean, (left - means.min()) / high, (means.max() - right) / high)

    most = pipe.manifest.ranges.batch[1]
    for start in range(0, len(prompts), most):
        pipe.generate(
            prompts[start : start + most], seed=_FIRST_SEED + start, callback=look, **settings
        )
    return {"deviation, times": float(factor), "mean, deviations": float(mean)}


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path, exists=True))
@click.option("--prompts", "count", default=8, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS)
def main(bundle: Path, count: int, out: Path) -> None:
    """Measure with a BUNDLE that holds a calibration of mini."""
    every = read_prompts(calibration_prompts_path())
    prompts = every[:: max(1, len(every) // count)][:count]
    rows = {}
    with Pipeline.load(bundle, threads=1) as pipe:
        band = Band.of(pipe.bundle)
        if band is None:
            raise click.UsageError(f"{bundle} holds no calibration")
        print(f"{'':22}{'deviation':>10}{'mean':>10}")
        for name, settings in _SETTINGS.items():
            rows[name] = farthest(pipe, band, prompts, **settings)
            print(f"{name:22}" + "".join(f"{value:>10.3f}" for value in rows[name].values()))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"prompts": len(prompts), "farthest": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
