"""Short steps in plain PyTorch, on diffusers' transformer: what ours are compared with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from torch import nn


@dataclass(frozen=True)
class Kind:
    """What a step is.

    Attributes:
        coefficients: of a short one.
        remembered: whether a full one's change is kept.
    """

    coefficients: tuple[float, float] | None = None
    remembered: bool = True


@dataclass
class _State:
    first_blocks: int
    blocks: int
    kinds: list[Kind]
    step: int = -1
    records: bool = True
    kept: torch.Tensor | None = None
    changes: list[torch.Tensor] = field(default_factory=list)

    @property
    def kind(self) -> Kind:
        return self.kinds[self.step]


class _Block(nn.Module):
    """One of the transformer's, computed or left out."""

    def __init__(self, block: nn.Module, number: int, state: _State) -> None:
        super().__init__()
        self.block = block
        self.context_pre_only = block.context_pre_only
        self._number, self._state = number, state

    def forward(self, hidden_states: torch.Tensor, **others: Any) -> Any:
        state, number = self._state, self._number
        if number == state.first_blocks:
            state.kept = hidden_states
        coefficients = state.kind.coefficients if state.records else None
        last = number == state.blocks - 1
        if coefficients is None or number < state.first_blocks:
            context, image = self.block(hidden_states=hidden_states, **others)
            if last and state.records and state.kind.remembered:
                state.changes.append(image - state.kept)
            return context, image
        if last:
            earlier, latest = state.changes[-2:]
            change = coefficients[0] * latest + coefficients[1] * earlier
            return None, state.kept + change
        return others["encoder_hidden_states"], hidden_states


@contextlib.contextmanager
def short_steps(
    transformer: SD3Transformer2DModel, first_blocks: int, kinds: Sequence[Kind]
) -> Iterator[None]:
    """While a picture is drawn, its steps are these."""
    own = transformer.transformer_blocks
    state = _State(first_blocks, len(own), list(kinds))

    def begin(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        # The branch of skip-layer guidance is a call of its own, and computes what it computes.
        state.records = kwargs.get("skip_layers") is None
        state.step += state.records

    handle = transformer.register_forward_pre_hook(begin, with_kwargs=True)
    transformer.transformer_blocks = nn.ModuleList(
        _Block(block, number, state) for number, block in enumerate(own)
    )
    try:
        yield
    finally:
        transformer.transformer_blocks = own
        handle.remove()
    assert state.step == len(kinds) - 1
