"""A random transformer of SD3.5's structure on a device, as the exporter takes a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from sd35_trt.checkpoints.weights import Weights


class RandomTransformer:
    """The checkpoint.

    Args:
        config: of the transformer.
        device: where it is made, in FP32.
    """

    root = Path("random")

    def __init__(self, config: dict[str, Any], device: str) -> None:
        from diffusers import SD3Transformer2DModel

        self._config = config
        torch.manual_seed(0)
        with torch.device(device):
            self.module = SD3Transformer2DModel(**config).eval()
        self.tensors = StateWeights(self.module.state_dict())

    def config(self, part: str) -> dict[str, Any]:
        return dict(self._config)

    def weights(self, part: str) -> Weights:
        return self.tensors

    def attentions(self) -> list[str]:
        """Names of its attentions."""
        from sd35_trt.compat.diffusers import Attention

        return [name for name, part in self.module.named_modules() if isinstance(part, Attention)]


class StateWeights(Weights):
    """A state dictionary.

    Attributes:
        on_host: whether tensors are read as the host's.
    """

    folder = Path("random")
    files: list[Path] = []  # noqa: RUF012 (as declared by the base)
    on_host = False

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self._state = state

    def __contains__(self, name: str) -> bool:
        return name in self._state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._state[name].shape)

    def dtype(self, name: str) -> str:
        return "F32"

    def unused(self, names: Iterable[str]) -> list[str]:
        return sorted(self._state.keys() - set(names))

    def read(self, name: str) -> torch.Tensor:
        tensor = self._state[name]
        return tensor.cpu() if self.on_host else tensor

    def _file(self, name: str) -> Path:
        return self.folder
