"""The components of the ONNX contract: what each computes, its ports, and how it is exported."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from sd35_trt.components import COMPONENTS
from sd35_trt.errors import CheckpointError, Sd35Error
from sd35_trt.policy import Policy

from .checkpoint import Checkpoint, Weights
from .denoiser import Denoiser
from .layers import Linear, replace_layers
from .modules import (
    ComponentModule,
    Conditioner,
    T5Encoder,
    TextEncoder,
    VaeDecoder,
    VaeEncoder,
    build_clip,
    build_t5,
    build_transformer,
    build_vae,
)
from .quantized import WEIGHT_ONLY
from .weights import stream_weights

DTYPES = {"fp32": torch.float32, "half": torch.float16}

MODEL_FILE = "model.onnx"
WEIGHTS_FILE = "weights.data"
DESCRIPTION_FILE = "component.json"


@dataclass(frozen=True)
class ExportOptions:
    """What a component's graph depends on besides checkpoint and policy.

    Attributes:
        clip_tokens: length of CLIP's token ids, the tokenizers' ``model_max_length``.
        guided: whether the denoiser computes the unconditional branch too.
    """

    clip_tokens: int
    guided: bool = True


# Builds the part's module from its configuration on fake tensors.
_PARTS: dict[str, Callable[[dict[str, Any], Weights], nn.Module]] = {
    "text_encoder": build_clip,
    "text_encoder_2": build_clip,
    "text_encoder_3": build_t5,
    "transformer": build_transformer,
    "vae": build_vae,
}

# Gives the part's module the component's signature.
_MODULES: dict[str, Callable[[nn.Module, ExportOptions], ComponentModule]] = {
    "clip_l": lambda part, options: TextEncoder(part, options.clip_tokens),
    "clip_g": lambda part, options: TextEncoder(part, options.clip_tokens),
    "t5": lambda part, options: T5Encoder(part),
    "conditioner": lambda part, options: Conditioner(part),
    "denoiser": lambda part, options: Denoiser(part, options.guided),
    "vae_decoder": lambda part, options: VaeDecoder(part),
    "vae_encoder": lambda part, options: VaeEncoder(part),
}


def component_layers(part: nn.Module, component: str) -> dict[str, nn.Module]:
    """The component's layers that have parameters of their own, by name in the part."""
    return {
        name: module
        for name, module in part.named_modules()
        if COMPONENTS[component].owns(name)
        and next(module.parameters(recurse=False), None) is not None
    }


def apply_policy(part: nn.Module, component: str, policy: Policy) -> None:
    """Give every layer of a component the precision that the policy asks for.

    Raises:
        UsageError: a rule of the policy matches nothing, or no rule matches a layer.
        Sd35Error: a precision that this exporter does not write.
    """
    own = component_layers(part, component)
    policy.check(component, {name: isinstance(m, Linear) for name, m in own.items()})
    # The part's other layers too: where two components meet, both read their dtypes from them.
    owners = {
        name: (row.name, module)
        for row in COMPONENTS.values()
        if row.part == COMPONENTS[component].part
        for name, module in component_layers(part, row.name).items()
    }
    for name, (owner, module) in owners.items():
        precision = policy.rule(owner, name, isinstance(module, Linear)).precision
        if precision in WEIGHT_ONLY:
            assert isinstance(module, Linear)
            parent, _, child = name.rpartition(".")
            setattr(part.get_submodule(parent), child, WEIGHT_ONLY[precision](module))
            continue
        if precision not in DTYPES:
            raise Sd35Error(
                f"policy {policy.name!r} asks for {precision} in {owner}/{name}, "
                "which this version does not export",
                f"use a policy with {', '.join([*DTYPES, *WEIGHT_ONLY])}",
            )
        for parameter in module.parameters(recurse=False):
            parameter.data = parameter.data.to(DTYPES[precision])


def build_part(folder: str, checkpoint: Checkpoint) -> nn.Module:
    """A part's module in FP32 on fake tensors, its layers replaced by the exporter's own.

    Raises:
        CheckpointError: the configuration is unusable, or does not fit the weights.
    """
    config = checkpoint.config(folder)
    try:
        part = _PARTS[folder](config, checkpoint.weights(folder))
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.root / folder / 'config.json'} is not usable: {error}",
            "use the config.json that belongs to these weights",
        ) from error
    replace_layers(part)
    return part


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Everything made inside has shapes but no storage; the libraries' chatter is silenced."""
    with warnings.catch_warnings(), FakeTensorMode(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def export_component(
    name: str,
    checkpoint: Checkpoint,
    policy: Policy,
    options: ExportOptions,
    out: Path,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
) -> None:
    """Write one component: ``model.onnx``, ``weights.data`` and ``component.json``.

    The graph is traced without weights; these are then converted and written one tensor at a
    time, so peak memory is the traced graph plus the largest tensor.

    Args:
        name: a key of :data:`sd35_trt.components.COMPONENTS`.
        out: an existing directory.
        progress: called with the fraction done (0 to 1) and what is being done.

    Raises:
        CheckpointError: a tensor is missing, misshapen or not finite in the stored precision.
        UsageError: the policy does not fit the component.
    """
    folder = COMPONENTS[name].part
    weights = checkpoint.weights(folder)
    progress(0.0, "tracing")
    with fake_tensors():
        part = build_part(folder, checkpoint)
        apply_policy(part, name, policy)
        module = _MODULES[name](part, options).eval()
        model, ports = module.trace()
    progress(0.5, "writing weights")
    total = stream_weights(
        model,
        module,
        weights,
        out / MODEL_FILE,
        WEIGHTS_FILE,
        lambda fraction: progress(0.5 + 0.5 * fraction, "writing weights"),
    )
    description = {
        "name": name,
        "weight_bytes": total,
        "inputs": [asdict(port) for port in ports if port.name in module.inputs],
        "outputs": [asdict(port) for port in ports if port.name in module.outputs],
    }
    (out / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n")
