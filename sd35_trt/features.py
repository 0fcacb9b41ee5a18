"""What a bundle's engines take besides what every bundle's take: it is fixed when they are built.

A graph that does not ask for a feature does not pay for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from .components import ADAPTED, BRANCH_DENOISER, COMBINE, SHORT_DENOISER

#: What a manifest requires of its reader, by the feature.
ADAPTERS = "adapters"
INPAINTING = "inpainting"
SKIP_LAYER_GUIDANCE = "skip-layer-guidance"
CONTROL = "control"
STEP_CACHE = "step-cache"
SPLIT_GUIDANCE = "split-guidance"


@dataclass(frozen=True)
class Features:
    """Features of a bundle, or of one component.

    Attributes:
        adapter_ranks: that adapters are padded to; none where it takes no adapters.
        inpainting: whether a step keeps what a mask leaves of a picture.
        skip_layer_guidance: whether a step can compute a third branch, without some blocks.
        control_blocks: of each ControlNet, whose outputs a step takes; 0 where there are none.
        short_steps: blocks that a short step computes; 0 where all steps are full ones.
        split_guidance: whether two GPUs can compute a branch of guidance each.
    """

    adapter_ranks: tuple[int, ...] = ()
    inpainting: bool = False
    skip_layer_guidance: bool = False
    control_blocks: int = 0
    short_steps: int = 0
    split_guidance: bool = False

    @classmethod
    def of(
        cls,
        requires: Collection[str],
        adapter_ranks: tuple[int, ...],
        control_blocks: int,
        short_steps: int,
    ) -> Features:
        """Those of a manifest, by its fields of these names."""
        return cls(
            adapter_ranks,
            INPAINTING in requires,
            SKIP_LAYER_GUIDANCE in requires,
            control_blocks if CONTROL in requires else 0,
            short_steps if STEP_CACHE in requires else 0,
            SPLIT_GUIDANCE in requires,
        )

    @property
    def requires(self) -> tuple[str, ...]:
        """What a reader of the bundle must know."""
        named = {
            ADAPTERS: bool(self.adapter_ranks),
            INPAINTING: self.inpainting,
            SKIP_LAYER_GUIDANCE: self.skip_layer_guidance,
            CONTROL: bool(self.control_blocks),
            STEP_CACHE: bool(self.short_steps),
            SPLIT_GUIDANCE: self.split_guidance,
        }
        return tuple(name for name, there in named.items() if there)

    @property
    def has_tokens(self) -> bool:
        """Whether a port of a step has a row for each token of the image."""
        return bool(self.control_blocks or self.short_steps)

    def of_component(self, name: str) -> Features:
        """Those that a component has."""
        own = replace(self, split_guidance=False)
        if name not in ("denoiser", SHORT_DENOISER):
            own = Features(self.adapter_ranks, inpainting=self.inpainting and name == COMBINE)
        if name == SHORT_DENOISER:
            own = replace(own, skip_layer_guidance=False)
        if name in ("vae_encoder", BRANCH_DENOISER):
            own = replace(own, control_blocks=self.control_blocks)
        return own if name in ADAPTED else replace(own, adapter_ranks=())

    def describe(self) -> dict[str, Any]:
        """What a graph depends on, for the key of its stage: how large ranks may be is no part."""
        counts = {CONTROL: self.control_blocks, STEP_CACHE: self.short_steps}
        return {**dict.fromkeys(self.requires, True), **{k: v for k, v in counts.items() if v}}

    def first_blocks(self, component: str) -> int:
        """How many blocks a component computes, where it leaves the later ones out; 0 for all."""
        return self.short_steps if component == SHORT_DENOISER else 0


#: A bundle without any.
PLAIN = Features()
