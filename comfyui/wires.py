"""What goes along the wires between these nodes, and their names in ComfyUI."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from comfy_api.latest import io

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Control, Pipeline

from .pipelines import OpenPipeline

CATEGORY = "sd35-trt"

ModelWire = io.Custom("SD35_TRT_MODEL")
PromptWire = io.Custom("SD35_TRT_PROMPT")


@dataclass(frozen=True)
class Prompt:
    """What is to be seen.

    Attributes:
        arguments: those of :meth:`sd35_trt.runtime.Pipeline.request` that are about text.
    """

    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A bundle, with what a graph adds to it.

    Attributes:
        opened: its pipeline, open as long as this is kept.
        adapters: path → strength.
        skips: arguments of skip-layer guidance; empty is without.
        controls: what is asked for of ControlNets, by name.
    """

    opened: OpenPipeline
    adapters: Mapping[str, float] = field(default_factory=dict)
    skips: Mapping[str, Any] = field(default_factory=dict)
    controls: Mapping[str, Control] = field(default_factory=dict)

    @property
    def pipe(self) -> Pipeline:
        return self.opened.pipe

    @property
    def most(self) -> int:
        """Images that are drawn, encoded or decoded in one run."""
        return self.pipe.manifest.ranges.batch[1]

    def with_adapter(self, path: str, strength: float) -> Model:
        """The same with an adapter more; strengths of one that it has add up.

        Raises:
            UsageError: the bundle does not take it.
        """
        own = {**self.adapters, path: self.adapters.get(path, 0.0) + strength}
        return replace(self, adapters=own)._checked()

    def with_skips(self, **arguments: Any) -> Model:
        """The same with skip-layer guidance.

        Raises:
            UsageError: the bundle does not have it, or not these layers.
        """
        return replace(self, skips=arguments)._checked()

    def with_control(self, name: str, control: Control) -> Model:
        """The same with a ControlNet more.

        Raises:
            UsageError: the bundle does not have it, or it follows a picture already.
        """
        if name in self.controls:
            raise UsageError(f"the ControlNet {name} follows a picture already", "give it one")
        return replace(self, controls={**self.controls, name: control})._checked()

    def arguments(self) -> dict[str, Any]:
        """Those of :meth:`sd35_trt.runtime.Pipeline.request` that are about the model."""
        return {
            "adapters": self.adapters or None,
            "controls": self.controls or None,
            **self.skips,
        }

    def _checked(self) -> Model:
        least = self.pipe.manifest.ranges.batch[0]
        self.pipe.request([""] * least, **self.arguments())
        return self
