"""One stage of training under way: its budget of time, its saved state, and its log."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

Optimizers = list[torch.optim.Optimizer]


@dataclass
class TrainingRun:
    """One stage under way: its folder, device, budget and position.

    ``budget`` is in seconds; where ``steps`` are given, they are the budget, and the result does
    not depend on the machine's speed.
    """

    name: str
    out: Path
    device: torch.device
    budget: float
    stop_after: float
    seed: int
    steps: int | None = None
    step: int = 0
    spent: float = 0.0
    """Seconds of the budget used in earlier pieces and this one."""
    started: float = field(default_factory=time.monotonic)
    before: float = 0.0

    def restore(self, modules: dict[str, nn.Module], optimizers: Optimizers) -> bool:
        """Take up a saved state. Returns whether there was one."""
        path = self.out / f"{self.name}.state"
        if not path.exists():
            return False
        state = torch.load(path, map_location=self.device, weights_only=True)
        for name, module in modules.items():
            module.load_state_dict(state["modules"][name])
        for optimizer, values in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        self.step, self.before = state["step"], state["spent"]
        self.spent = self.before
        return True

    def save(self, modules: dict[str, nn.Module], optimizers: Optimizers) -> None:
        """Save the state, beside the final name first."""
        path = self.out / f"{self.name}.state"
        partial = path.with_suffix(".partial")
        state = {
            "modules": {name: module.state_dict() for name, module in modules.items()},
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": self.step,
            "spent": self.spent,
        }
        torch.save(state, partial)
        partial.rename(path)

    def start(self) -> None:
        """Begin a piece: its time counts from now."""
        self.started, self.before = time.monotonic(), self.spent

    def tick(self) -> None:
        """Advance the clock."""
        self.spent = self.before + time.monotonic() - self.started

    @property
    def share(self) -> float:
        """Share of the budget used, 0..1."""
        used = self.spent / self.budget if self.steps is None else self.step / self.steps
        return min(used, 1.0)

    @property
    def over(self) -> bool:
        """Whether this piece has to end."""
        return self.share >= 1 or self.spent - self.before >= self.stop_after

    def log(self, **figures: float) -> None:
        """Append a line to ``log.jsonl``."""
        row = {"stage": self.name, "step": self.step, "seconds": round(self.spent, 1)}
        row |= {name: round(float(value), 6) for name, value in figures.items()}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")
