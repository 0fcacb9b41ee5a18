"""The components of the ONNX contract and where in a checkpoint each comes from.

Those of :data:`COMPONENTS` are in every model. A ControlNet is a part that a build adds, with two
components of its own. The denoiser of short steps, and those of two GPUs, are components that a
build adds, of a part that is there.
"""

from __future__ import annotations

import fnmatch
import re
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ComponentRow:
    """One component.

    Attributes:
        name: as in the bundle.
        part: folder of its weights in the diffusers layout.
        tokenizer: folder of its tokenizer, for a text encoder.
        layers: globs over the part's module names that say which of them are its own.
    """

    name: str
    part: str
    tokenizer: str | None = None
    layers: tuple[str, ...] = ("*",)

    def owns(self, layer: str) -> bool:
        """Whether a layer of the part belongs to this component."""
        return any(fnmatch.fnmatchcase(layer, glob) for glob in self.layers)


# What depends on the prompt and the timestep alone: embedders and adaLN linears.
_CONDITIONING = (
    "time_text_embed.*",
    "context_embedder",
    "*norm1.linear",
    "*norm1_context.linear",
    "norm_out.linear",
)
_STEP = ("pos_embed*", "*attn*", "*.ff*", "proj_out")
_CONTROL_STEP = ("pos_embed*", "*attn*", "*.ff*", "controlnet_blocks.*")


COMPONENTS = {
    row.name: row
    for row in (
        ComponentRow("clip_l", "text_encoder", "tokenizer"),
        ComponentRow("clip_g", "text_encoder_2", "tokenizer_2"),
        ComponentRow("t5", "text_encoder_3", "tokenizer_3", layers=("encoder.*",)),
        ComponentRow("conditioner", "transformer", layers=_CONDITIONING),
        ComponentRow("denoiser", "transformer", layers=_STEP),
        ComponentRow("vae_decoder", "vae", layers=("decoder*", "post_quant_conv")),
        ComponentRow("vae_encoder", "vae", layers=("encoder*", "quant_conv")),
    )
}


#: The denoiser of short steps, which a build adds: it computes the first blocks of the other's.
SHORT_DENOISER = "denoiser_short"

#: The denoiser of one branch of guidance, which a build adds: two GPUs compute a branch each.
BRANCH_DENOISER = "denoiser_branch"

#: What both compute of the two branches: guidance and the sampler's update. It has no layers.
COMBINE = "combine"

# Components that a build adds, which compute with the layers of another.
_BORROWERS = {SHORT_DENOISER: "denoiser", BRANCH_DENOISER: "denoiser"}

_COMBINE = ComponentRow(COMBINE, "transformer", layers=())


def layer_holder(component: str) -> str:
    """The component by whose name a component's layers go: itself, mostly."""
    return _BORROWERS.get(component, component)


#: The kind of part that a ControlNet is; its own part is ``control_NAME``.
CONTROLNET = "controlnet"

#: What the names of a ControlNet's part and components begin with.
CONTROL_PREFIX = "control_"

_CONDITIONER = "_conditioner"

# A net named so would have the component that is another's conditioner.
_NET = re.compile(r"(?!.*conditioner$)[a-z0-9_]{1,40}")


def is_net_name(name: str) -> bool:
    """Whether a ControlNet can be called so."""
    return _NET.fullmatch(name) is not None


def control_part(name: str) -> str:
    """The part, and the component of every step, of the ControlNet of a name."""
    return CONTROL_PREFIX + name


def control_conditioner(name: str) -> str:
    """The component of a ControlNet that depends on the prompt and the timestep alone."""
    return CONTROL_PREFIX + name + _CONDITIONER


def control_name(component: str) -> str | None:
    """The ControlNet that a component, or a part, is of; None where it is of none."""
    if not component.startswith(CONTROL_PREFIX):
        return None
    name = component.removeprefix(CONTROL_PREFIX).removesuffix(_CONDITIONER)
    return name if is_net_name(name) else None


def runs_every_step(component: str) -> bool:
    """Whether a component runs in the steps of a picture: denoisers, what combines their branches,
    and ControlNets."""
    return layer_holder(component) in ("denoiser", COMBINE) or (
        control_name(component) is not None and not component.endswith(_CONDITIONER)
    )


def policy_names(component: str) -> tuple[str, ...]:
    """The names that a policy's rules may have a component by.

    A ControlNet's blocks are the transformer's, and what is said of these holds for them too.
    """
    if control_name(component) is None:
        return (layer_holder(component),)
    role = "conditioner" if component.endswith(_CONDITIONER) else "denoiser"
    return component, role


def part_kind(part: str) -> str:
    """What a part is: itself, or one of several ControlNets."""
    return CONTROLNET if control_name(part) is not None else part


def component_row(name: str) -> ComponentRow:
    """The row of a component.

    Raises:
        KeyError: there is no such component.
    """
    net = control_name(name)
    if name == COMBINE:
        return _COMBINE
    if net is None:
        return replace(COMPONENTS[layer_holder(name)], name=name)
    layers = _CONDITIONING if name.endswith(_CONDITIONER) else _CONTROL_STEP
    return ComponentRow(name, control_part(net), layers=layers)


def part_rows(part: str) -> tuple[ComponentRow, ...]:
    """The components of a part, in the contract's order."""
    net = control_name(part)
    if net is not None:
        return component_row(control_conditioner(net)), component_row(part)
    return tuple(row for row in COMPONENTS.values() if row.part == part)


def layer_owner(part: str, layer: str) -> str | None:
    """The component that has a layer of a checkpoint's part as its own; None where none does.

    Args:
        part: the part's folder in the checkpoint.
        layer: name of a module that has parameters of its own.
    """
    return next((row.name for row in part_rows(part) if row.owns(layer)), None)


def module_owner(part: str, module: str) -> str | None:
    """The component that computes a module of a checkpoint's part; None where none does.

    A module that is not a layer of its own (a block, an adaptive norm) belongs to the part's last
    component unless all of it is another's.
    """
    owner = layer_owner(part, module) or layer_owner(part, f"{module}.")
    names = [row.name for row in part_rows(part)]
    return owner or (names[-1] if len(names) > 1 else None)


#: Components whose linears take adapters as inputs, where a bundle has them.
ADAPTED = ("clip_l", "clip_g", "conditioner", "denoiser", SHORT_DENOISER, BRANCH_DENOISER)

#: Image pixels per latent pixel, in each direction: the autoencoder halves the size three times.
LATENT_SCALE = 8

#: Parts that a checkpoint may lack: SD3.5 draws without T5, its text features then being zero.
OPTIONAL_PARTS = ("text_encoder_3",)

#: What users are told of a model that lacks it.
NO_T5 = "no T5: prompts are read by CLIP alone"
