"""Muon for many small matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from sd35_trt.compat.torch import add_each, multiply_each

_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalized(matrices: Tensor, steps: int = 5) -> Tensor:
    """The orthogonal matrices nearest to [k, m, n], roughly, by Newton-Schulz.

    In BF16 on a GPU, in FP32 on a CPU, where BF16 is slow.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """``torch.optim.Muon`` with ``match_rms_adamw``, all matrices of one shape at a time.

    torch's own takes them one by one, and launching that many small kernels took twice as long
    as the rest of a step. Jordan 2024, https://kellerjordan.github.io/posts/muon/; scaled as in
    Liu et al. 2025, https://arxiv.org/abs/2502.16982.
    """

    def __init__(
        self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95
    ) -> None:
        shapes: dict[torch.Size, list[Tensor]] = {}
        for matrix in matrices:
            shapes.setdefault(matrix.shape, []).append(matrix)
        groups = [{"params": alike} for alike in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every matrix from its gradient; ``closure`` is not called."""
        for group in self.param_groups:
            matrices, lr = group["params"], group["lr"]
            gradient = torch.stack([matrix.grad for matrix in matrices])
            state = self.state[matrices[0]]  # of the whole group
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(gradient)
            state["momentum"].lerp_(gradient, 1 - group["momentum"])
            update = orthogonalized(gradient.lerp_(state["momentum"], group["momentum"]))
            multiply_each(matrices, 1 - lr * group["weight_decay"])
            scale = 0.2 * max(gradient.shape[1:]) ** 0.5
            add_each(matrices, list(update.float().unbind()), -lr * scale)
