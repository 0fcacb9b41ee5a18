"""Which steps of mini can be short, and what that costs: block evaluations against scenes right.

    python benchmarks/step_cache.py --device cuda --out benchmarks/results/step_cache.json

draws held-out captions in PyTorch, FP32, with short steps that were chosen on the calibration
captions in several ways, and pairs every way with exact steps caption by caption. Beside them stand
pictures of fewer steps, the choice of short steps at run time by a threshold, and with
``--cache-dit`` that of the package cache-dit, which draws with diffusers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from msgspec.structs import asdict
from rich.console import Console
from short_transformer import Captions, Drawing, inner_products
from torch import Tensor

from sd35_trt.calibration.step_extrapolation import Rule, held, least_squares, line_over, missed
from sd35_trt.calibration.step_search import Schedule, best_schedules, full_steps, schedule_of
from sd35_trt.mini import calibration_prompts_path, checkpoint_path
from sd35_trt.mini.checker import judge
from sd35_trt.mini.scenes import Example
from sd35_trt.mini.scoring import heldout
from sd35_trt.quality.evaluate import load
from sd35_trt.quality.metrics import psnr, squared_error
from sd35_trt.quality.scenes import paired_difference, share

_BLOCKS = 6
# Apart from the seeds of what is judged.
_CALIBRATION_SEED = 100_000
_GOAL = 1.7


class Judge:
    """Compares pictures with those of exact steps.

    Args:
        latents: of exact steps, [n, 16, h, w].
    """

    def __init__(
        self, pipe: StableDiffusion3Pipeline, examples: Sequence[Example], pool: ProcessPoolExecutor
    ) -> None:
        self._vae = pipe.vae
        self._specs = [example.spec for example in examples]
        self._pool = pool

    def take(self, latents: Tensor) -> None:
        """What follows is compared with these."""
        self._latents = latents
        self._images = self.decode(latents)
        self._right = self.right(self._images)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        """Pictures uint8 [n, 128, 128, 3]."""
        config = self._vae.config
        scaled = latents / config.scaling_factor + config.shift_factor
        parts = [self._vae.decode(part).sample for part in scaled.split(64)]
        images = (torch.cat(parts) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        return np.round(255 * images).astype(np.uint8)

    def right(self, images: np.ndarray) -> list[bool]:
        """Whether each picture shows its scene."""
        return [v.whole for v in self._pool.map(judge, images, self._specs, chunksize=16)]

    def latent_errors(self, latents: Tensor) -> dict[str, float]:
        """Of the last latents, relative."""
        return summary(relative_errors(latents, self._latents))

    def figures(self, images: np.ndarray) -> dict[str, Any]:
        """Of pictures: whole scenes and PSNR."""
        right = self.right(images)
        errors = [squared_error(a, b) for a, b in zip(images, self._images, strict=True)]
        return {
            "scenes": asdict(share(sum(right), len(right))),
            "difference": asdict(paired_difference(self._right, right)),
            "psnr": psnr(float(np.mean(errors))),
            "psnr_median": psnr(float(np.median(errors))),
        }


def relative_errors(latents: Tensor, reference: Tensor) -> np.ndarray:
    """Of each picture: float64 [n]."""
    difference = (latents - reference).flatten(1).norm(dim=1)
    return (difference / reference.flatten(1).norm(dim=1)).double().cpu().numpy()


def summary(errors: np.ndarray) -> dict[str, float]:
    """Of relative errors."""
    return {
        "mean": float(errors.mean()),
        "median": float(np.median(errors)),
        "worst": float(errors.max()),
    }


@dataclass(frozen=True)
class Setting:
    """Number of steps and sampler."""

    steps: int
    sampler: str

    def __str__(self) -> str:
        return f"{self.steps} {self.sampler}"

    def speed(self, full: float, first: int) -> float:
        """How many times fewer blocks are computed than by exact steps."""
        blocks = full * _BLOCKS + (self.steps - full) * first
        return self.steps * _BLOCKS / blocks

    def most_full(self, first: int) -> int:
        """Full steps with which the goal is reached."""
        counts = range(2, self.steps + 1)
        return max((c for c in counts if self.speed(c, first) >= _GOAL), default=2)


class Calibrated:
    """What is known of calibration captions: from which short steps are chosen.

    Args:
        drawing: of calibration captions.
    """

    def __init__(self, drawing: Drawing, setting: Setting) -> None:
        self._drawing = drawing
        self._steps = setting.steps
        self._latents, changes = drawing.exact()
        self._products = [inner_products(changes, guided) for guided in (False, True)]

    @property
    def products(self) -> np.ndarray:
        """Of the changes as guidance joins them."""
        return self._products[1]

    @cached_property
    def rules(self) -> dict[str, Rule]:
        """Coefficients, by name."""
        return {
            "held": held,
            "line over steps": line_over(np.arange(self._steps, dtype=float)),
            "line over sigmas": line_over(self._drawing.sigmas),
            "least squares": least_squares(self._products[0]),
            "least squares, guided": least_squares(self._products[1]),
        }

    def error(self, schedule: Schedule) -> dict[str, float]:
        """Of the last latents, measured."""
        return summary(relative_errors(self._drawing.short(schedule), self._latents))

    @cached_property
    def measured_weights(self) -> np.ndarray:
        """Error of the latents by what is missed in a step, from one short step at a time."""
        weights = np.zeros(self._steps)
        for step in range(2, self._steps):
            full = tuple(other for other in range(self._steps) if other != step)
            schedule = schedule_of(full, self._steps, held)
            wrong = missed(self.products, (1.0, 0.0), (step, step - 1, step - 2))
            weights[step] = self.error(schedule)["median"] / wrong
        return weights

    def evenly(self, count: int, rule: Rule) -> Schedule:
        """Full steps evenly spaced, and the first two."""
        later = np.linspace(1, self._steps, count - 1, endpoint=False).round().astype(int)
        return schedule_of((0, *later.tolist()), self._steps, rule)

    def estimated(self, count: int, rule: Rule) -> Schedule:
        """The least error, as the sampler's weights estimate it."""
        return best_schedules(self.products, self._drawing.weights, rule)[count]

    def weighed(self, count: int, rule: Rule) -> Schedule:
        """The least error, as measured weights estimate it."""
        return best_schedules(self.products, self.measured_weights, rule)[count]

    def greedy(self, count: int, rule: Rule) -> Schedule:
        """One short step more at a time, the one that costs least, measured."""
        full = tuple(range(self._steps))
        while len(full) > count:
            choices = [tuple(s for s in full if s != step) for step in full[2:]]
            schedules = [schedule_of(choice, self._steps, rule) for choice in choices]
            errors = [self.error(schedule)["median"] for schedule in schedules]
            full = choices[int(np.argmin(errors))]
        return schedule_of(full, self._steps, rule)

    def fitted(self, schedule: Schedule) -> Schedule:
        """With coefficients by least squares along the way with short steps."""
        return self._drawing.fitted(schedule, guided=True)


_CHOICES: dict[str, Callable[[Calibrated, int, Rule], Schedule]] = {
    "evenly": Calibrated.evenly,
    "estimated": Calibrated.estimated,
    "measured weights": Calibrated.weighed,
    "greedy": Calibrated.greedy,
}


_BEST = "measured weights", "least squares, guided"
_FAST_CHOICES = "evenly", "estimated", "measured weights"
_THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3)


class Study:
    """All attempts at one setting."""

    def __init__(self, pipe: Any, setting: Setting, captions: Captions, calibration: Captions,
                 judge_: Judge) -> None:  # fmt: skip
        self._pipe = pipe
        self._setting = setting
        self._captions = captions
        self._calibration = calibration
        self._judge = judge_
        self._calibrated: dict[int, Calibrated] = {}

    def attempts(self, thorough: bool) -> Iterator[dict[str, Any]]:
        """All rows."""
        setting = self._setting
        self._judge.take(self._drawing(1).short((None,) * setting.steps))
        yield from self.exact()
        yield from self.fewer(sorted({round(setting.steps / s) for s in (1.3, 1.7, 2, 2.5, 3, 4)}))
        shares = np.linspace(0.2, 0.9, 15 if thorough else 8)
        counts = {min(max(2, round(setting.steps * each)), setting.steps - 1) for each in shares}
        for count in sorted(counts | {setting.most_full(1)}):
            yield from self.scheduled(1, *_BEST, count)
        for rule in ("held", "line over sigmas"):
            yield from self.thresholds(_THRESHOLDS, rule)
        for first in (1, 2, 3) if thorough else (1,):
            count = setting.most_full(first)
            for rule in self.calibrated(first).rules:
                for choice in _FAST_CHOICES if thorough else _BEST[:1]:
                    yield from self.scheduled(first, choice, rule, count)
            yield from self.scheduled(first, *_BEST, count, fitted=True)
        if thorough:
            yield from self.scheduled(1, "greedy", _BEST[1], setting.most_full(1))

    def _drawing(self, first: int, steps: int | None = None) -> Drawing:
        setting = self._setting
        return Drawing(
            self._pipe.transformer, self._captions, first, steps or setting.steps, setting.sampler
        )

    def calibrated(self, first: int) -> Calibrated:
        """What is known of the calibration captions with short steps of some blocks."""
        if first not in self._calibrated:
            setting = self._setting
            drawing = Drawing(
                self._pipe.transformer, self._calibration, first, setting.steps, setting.sampler
            )
            self._calibrated[first] = Calibrated(drawing, setting)
        return self._calibrated[first]

    def _row(self, way: str, latents: Tensor, **facts: Any) -> dict[str, Any]:
        return {
            "setting": str(self._setting), "way": way, **facts,
            "latents": self._judge.latent_errors(latents),
            **self._judge.figures(self._judge.decode(latents)),
        }  # fmt: skip

    def exact(self) -> Iterator[dict[str, Any]]:
        """All steps full."""
        latents = self._drawing(1).short((None,) * self._setting.steps)
        yield self._row("exact", latents, speed=1.0, full=self._setting.steps)

    def fewer(self, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
        """Fewer steps, all of them full."""
        for count in counts:
            latents = self._drawing(1, count).short((None,) * count)
            speed = self._setting.steps / count
            yield self._row("fewer steps", latents, speed=speed, full=count)

    def scheduled(
        self, first: int, choice: str, rule: str, count: int, fitted: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Steps that were chosen on the calibration captions."""
        calibrated = self.calibrated(first)
        schedule = _CHOICES[choice](calibrated, count, calibrated.rules[rule])
        if fitted:
            schedule = calibrated.fitted(schedule)
        yield self._row(
            "short steps", self._drawing(first).short(schedule),
            first_blocks=first, choice=choice, coefficients=rule + (", refitted" if fitted else ""),
            full=count, speed=self._setting.speed(count, first),
            calibration=calibrated.error(schedule), full_steps=full_steps(schedule),
        )  # fmt: skip

    def thresholds(self, values: Sequence[float], rule: str) -> Iterator[dict[str, Any]]:
        """Steps that each picture decides for at run time, with short steps of one block."""
        for value in values:
            found = self.calibrated(1).rules[rule]
            latents, full = self._drawing(1).threshold(value, found)
            yield self._row(
                "threshold", latents, first_blocks=1, coefficients=rule, threshold=value,
                full=float(full.mean()), speed=self._setting.speed(float(full.mean()), 1),
            )  # fmt: skip

    def cache_dit(
        self, captions: Sequence[str], values: Sequence[tuple[float, int]], device: str,
        workers: int,
    ) -> Iterator[dict[str, Any]]:  # fmt: skip
        """First-Block-Cache of cache-dit."""
        from first_block_cache import first_block_cache

        self._judge.take(self._drawing(1).short((None,) * self._setting.steps))
        drawn = first_block_cache(captions, values, self._setting.steps, device, workers)
        for (value, warmup), (images, full) in zip(values, drawn, strict=True):
            yield {
                "setting": str(self._setting), "way": "cache-dit", "threshold": value,
                "warmup": warmup, "full": float(full.mean()),
                "speed": self._setting.speed(float(full.mean()), 1),
                **self._judge.figures(images),
            }  # fmt: skip


def printed(row: dict[str, Any]) -> str:
    """A row of the table."""
    names = ("first_blocks", "choice", "coefficients", "threshold", "warmup")
    what = " ".join(str(row[name]) for name in names if name in row)
    latents, difference = row.get("latents", {}), row["difference"]
    return (
        f"{row['setting']:12} {row['way']:12} {what:48} {row['full']:5.1f} {row['speed']:.2f}x  "
        f"{row['scenes']['value']:.1%} {difference['difference']:+.1%} "
        f"-{difference['lost']}+{difference['gained']}  {row['psnr'] or 99:.1f} "
        f"{row['psnr_median'] or 99:.1f} dB  {latents.get('median', 0):.4f} "
        f"{latents.get('mean', 0):.4f}"
    )


@click.command()
@click.option("--captions", default=500, show_default=True, type=click.IntRange(2))
@click.option("--calibration", default=64, show_default=True, type=click.IntRange(1, 128))
@click.option("--setting", "settings", multiple=True, type=(int, str), show_default=True,
              default=((28, "euler"), (28, "dpmpp-2m"), (14, "euler"), (14, "dpmpp-2m")),
              help="Steps and sampler; the first is tried most thoroughly.")  # fmt: skip
@click.option("--cache-dit", multiple=True, type=(float, int), metavar="THRESHOLD FIRST",
              help="Also First-Block-Cache with this threshold, and that many full steps first; "
              "at the first setting.")  # fmt: skip
@click.option("--peer-only", is_flag=True, help="Draw with cache-dit alone.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--workers", default=2, show_default=True, help="Processes for what is not torch's.")
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@torch.no_grad()
def main(
    captions: int,
    calibration: int,
    settings: tuple[tuple[int, str], ...],
    cache_dit: tuple[tuple[float, int], ...],
    peer_only: bool,
    device: str,
    workers: int,
    out: Path | None,
) -> None:
    """Draw with short steps of every kind and print what share of the scenes is right."""
    examples = heldout(captions)
    texts = [example.caption for example in examples]
    prompts = calibration_prompts_path().read_text().splitlines()[:calibration]
    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        judge_ = Judge(pipe := load(checkpoint_path(), device), examples, pool)
        shown = Captions.of(pipe, texts, 0)
        drawn = Captions.of(pipe, prompts, _CALIBRATION_SEED)
        studies = [Study(pipe, Setting(*pair), shown, drawn, judge_) for pair in settings]

        def keep(found: Iterator[dict[str, Any]]) -> None:
            for row in found:
                rows.append(row)
                Console().print(printed(row), highlight=False, soft_wrap=True)
            if out:
                facts = {"captions": captions, "calibration": calibration, "rows": rows}
                out.write_text(json.dumps(facts, indent=1) + "\n")

        for number, study in enumerate(() if peer_only else studies):
            keep(study.attempts(number == 0))
        if cache_dit:
            keep(studies[0].cache_dit(texts, cache_dit, device, workers))


if __name__ == "__main__":
    main()
