"""The loop that optimizes: its rate, gradients, and average of weights."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable

import click
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from sd35_trt.compat.torch import lerp_each

from .muon import Muon
from .run import Optimizers, TrainingRun

#: Leaves gradients, and returns the losses by name: what is optimized is ``total``.
Step = Callable[[], dict[str, Tensor]]


def rate(share: float, step: int, warmup: int = 300, decay: float = 0.35) -> float:
    """Factor on the learning rate: a linear start, a plateau, a linear end to zero."""
    return min((step + 1) / warmup, 1.0) * min((1 - share) / decay, 1.0)


class Average:
    """Exponential moving average of modules' weights, kept in copies of them."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules = {
            n: copy.deepcopy(m).eval().requires_grad_(False) for n, m in modules.items()
        }
        self.decay = decay
        self.into: list[Tensor] = [p for m in self.modules.values() for p in m.parameters()]
        self.source: list[Tensor] = [p for m in modules.values() for p in m.parameters()]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move toward the present weights; quickly during the first steps."""
        decay = min(self.decay, (1 + step) / (10 + step))
        lerp_each(self.into, [p.detach() for p in self.source], 1 - decay)


def autocast(device: torch.device) -> torch.autocast:
    # Without its cache: weights cast once would be stale in a replayed graph.
    return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)


def optimizers(
    parameters: Iterable[nn.Parameter],
    lr: float,
    decay: float,
    device: torch.device,
    hidden: Iterable[Tensor] = (),
) -> Optimizers:
    """AdamW, and Muon for the matrices in ``hidden``."""
    matrices = {id(p): p for p in hidden}
    others = [p for p in parameters if id(p) not in matrices]
    groups = [
        {"params": [p for p in others if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = device.type == "cuda"
    adamw = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.97), fused=fused)
    if not matrices:
        return [adamw]
    return [adamw, Muon(matrices.values(), lr, decay)]


def gradients(losses: Step, optimizers: Optimizers, graph: bool) -> Step:
    """``losses`` followed by their backward pass; leaves fresh gradients at each call.

    Args:
        graph: replay it all as one CUDA graph, since launching kernels one by one would leave
            the GPU idle half of the time.
    """

    def eager() -> dict[str, Tensor]:
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        values = losses()
        values["total"].backward()
        return values

    eager()  # compiles
    if not graph:
        return eager
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            eager()
    torch.cuda.current_stream().wait_stream(aside)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        values = losses()
        values["total"].backward()

    def replay() -> dict[str, Tensor]:
        captured.replay()
        return values

    return replay


def loop(
    run: TrainingRun,
    optimizers: Optimizers,
    peak: float,
    step: Step,
    average: Average,
    every: tuple[float, Callable[[], dict[str, float]]] | None = None,
    warmup: int = 300,
) -> None:
    """Optimize until the piece is over. ``step`` leaves gradients and returns the losses."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [p for group in groups for p in group["params"]]
    sums: dict[str, Tensor] = {}
    steps, logged_at, looked_at = 0, run.spent, run.spent
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[loss]}")) as progress:
        bar = progress.add_task(run.name, total=1.0, loss="")
        run.start()
        while not run.over:
            for group in groups:
                group["lr"] = peak * rate(run.share, run.step, warmup)
            losses = step()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            average.update(run.step)
            for name, value in (losses | {"norm": norm}).items():
                sums[name] = sums.get(name, torch.zeros((), device=run.device)) + value.detach()
            run.step, steps = run.step + 1, steps + 1
            run.tick()
            if run.step % 50 == 0 or run.over:
                means = {name: float(value) / steps for name, value in sums.items()}
                if not math.isfinite(means["total"]):
                    raise click.ClickException(f"{run.name}: loss is not finite at step {run.step}")
                run.tick()
                speed = steps / max(run.spent - logged_at, 1e-6)
                run.log(**means, lr=groups[0]["lr"], steps_per_second=speed)
                text = " ".join(f"{k} {v:.4f}" for k, v in means.items()) + f" {speed:.1f}/s"
                progress.update(bar, completed=run.share, loss=text)
                sums, steps, logged_at = {}, 0, run.spent
            if every and (run.spent - looked_at >= every[0]):
                run.log(**every[1]())
                run.tick()
                looked_at = logged_at = run.spent
