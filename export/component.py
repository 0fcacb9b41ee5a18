"""The components of the ONNX contract: what each computes, its ports, and how it is exported."""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sd35_trt.checkpoints.controlnets import part_source
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.structure import Structure
from sd35_trt.checkpoints.weights import Weights
from sd35_trt.compat.torch import FakeTensorMode
from sd35_trt.components import (
    BRANCH_DENOISER,
    COMBINE,
    CONTROLNET,
    SHORT_DENOISER,
    component_row,
    layer_holder,
    part_kind,
)
from sd35_trt.dialects import DIALECTS, ONNX, Dialect
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.features import PLAIN, Features
from sd35_trt.formats.calibration import ATTENTION_OPERANDS
from sd35_trt.formats.component import MODEL_FILE, WEIGHTS_FILE, ComponentFacts
from sd35_trt.policies import Policy
from sd35_trt.policies.fp8 import fp8_attentions, fp8_linears

from .controlnet import ControlConditioner, ControlNet
from .denoiser import Denoiser
from .explicit_layers import use_explicit_layers
from .fp8 import Fp8Linear, quantize_attention
from .fused_block import fuse_blocks
from .graphs import GraphCache
from .layers import ExportLinear, replace_layers
from .modules import (
    ClipEncoder,
    Conditioner,
    T5Encoder,
    VaeDecoder,
    VaeEncoder,
    build_clip,
    build_controlnet,
    build_t5,
    build_transformer,
    build_vae,
)
from .part_layers import (
    StoredSize,
    component_attentions,
    component_layers,
    is_within,
    part_layers,
)
from .ports import ComponentModule
from .program_writer import write_program
from .quantized import WEIGHT_ONLY, weight_only_linear
from .range_guard import guard
from .scales import Scales
from .split_guidance import Combine
from .torch_layers import use_torch_layers
from .weights import stream_weights

DTYPES = {"fp32": torch.float32, "half": torch.float16}


@dataclass(frozen=True)
class ExportOptions:
    """What a component's graph depends on besides checkpoint and policy.

    Attributes:
        clip_tokens: length of CLIP's token ids, the tokenizers' ``model_max_length``.
        guided: whether the denoiser computes the unconditional branch too.
        features: what the component takes besides what every bundle's takes.
        dialect: what is written, a key of :data:`sd35_trt.dialects.DIALECTS`.
        join: whether a program computes query, key and value of a stream as one FP8 product.
        fuse: whether a program has the joined products, and others, as one operator each with what
            follows them.
    """

    clip_tokens: int
    guided: bool = True
    dialect: str = ONNX
    join: bool = True
    fuse: bool = True
    features: Features = PLAIN


# Builds the part's module from its configuration on fake tensors.
_PARTS: dict[str, Callable[[dict[str, Any], Weights | None], nn.Module]] = {
    "text_encoder": build_clip,
    "text_encoder_2": build_clip,
    "text_encoder_3": build_t5,
    "transformer": build_transformer,
    "vae": build_vae,
    CONTROLNET: build_controlnet,
}


def _adapted(options: ExportOptions, component: str) -> str | None:
    return component if options.features.adapter_ranks else None


#: Gives the part's module the component's signature.
MODULES: dict[str, Callable[[nn.Module, ExportOptions], ComponentModule]] = {
    "clip_l": lambda part, options: ClipEncoder(
        part, options.clip_tokens, _adapted(options, "clip_l")
    ),
    "clip_g": lambda part, options: ClipEncoder(
        part, options.clip_tokens, _adapted(options, "clip_g")
    ),
    "t5": lambda part, options: T5Encoder(part),
    "conditioner": lambda part, options: Conditioner(part, bool(options.features.adapter_ranks)),
    "denoiser": lambda part, options: Denoiser(part, options.guided, options.features),
    BRANCH_DENOISER: lambda part, options: Denoiser(part, False, options.features, branch=True),
    COMBINE: lambda part, options: Combine(part, options.features.inpainting),
    SHORT_DENOISER: lambda part, options: Denoiser(
        part, options.guided, options.features, short=True
    ),
    "vae_decoder": lambda part, options: VaeDecoder(part),
    "vae_encoder": lambda part, options: VaeEncoder(part, bool(options.features.control_blocks)),
}


def component_module(name: str, part: nn.Module, options: ExportOptions) -> ComponentModule:
    """A component's module around its part's.

    Args:
        part: with the policy applied, and the layers of the dialect.
    """
    if name in MODULES:
        return MODULES[name](part, options)
    if name == component_row(name).part:
        return ControlNet(part, options.guided)
    return ControlConditioner(part)


def apply_policy(
    part: nn.Module,
    component: str,
    policy: Policy,
    scales: Scales | None = None,
    weights: Weights | None = None,
    first_blocks: int = 0,
) -> dict[str, float]:
    """Give every layer of a component the precision that the policy asks for.

    Args:
        scales: of the part, from a calibration; without, FP8 layers have the right shapes and
            types but cannot be written, and nothing guards FP16's range.
        weights: of the part: integer weights have scales that suit them; without, FP16's.
        first_blocks: of a transformer's, those that the component computes; 0 is all.

    Returns:
        ``component/module`` → amax of what the range guard computes in FP32, of all the part.

    Raises:
        UsageError: a rule of the policy matches nothing, or no rule matches a layer.
    """
    own = component_layers(part, component, first_blocks)
    attentions = component_attentions(part, component)
    policy.check(
        component, {name: isinstance(m, ExportLinear) for name, m in own.items()}, attentions
    )
    # The part's other layers too: where two components meet, both read their dtypes from them.
    for name, (owner, module) in part_layers(part, component_row(component).part).items():
        precision = policy.rule(owner, name, isinstance(module, ExportLinear)).precision
        if precision in DTYPES:
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(DTYPES[precision])
            continue
        if not isinstance(module, ExportLinear):
            raise TypeError(f"{precision} for {name}, which is a {type(module).__name__}")
        if precision in WEIGHT_ONLY:
            read = None
            if weights is not None and name in own:
                read = partial(weights.read, f"{name}.weight")
            layer: nn.Module = weight_only_linear(module, precision, read)
        else:
            amax = None if scales is None else scales.inputs[f"{owner}/{name}"]
            layer = Fp8Linear(module, amax)
        parent, _, child = name.rpartition(".")
        setattr(part.get_submodule(parent), child, layer)
    for name, attention in attentions.items():
        rule = policy.attention_rule(component, name)
        if rule and rule.precision not in ("fp8", "half"):
            raise UsageError(
                f"policy {policy.name!r}: {rule.precision} for the matmuls of {name}",
                "an attention takes fp8 or half",
            )
        if rule and rule.precision == "fp8":
            key = f"{layer_holder(component)}/{name}"
            operands = None
            if scales is not None:
                operands = {x: scales.bmm[f"{key}.{x}"] for x in ATTENTION_OPERANDS}
            quantize_attention(attention, operands)
    return guard(part, component_row(component).part, scales) if scales else {}


def use_dialect(part: nn.Module, options: ExportOptions) -> Dialect:
    """Give a part the layers that its dialect takes; the policy is applied before."""
    dialect = DIALECTS[options.dialect]
    if dialect.opset is None:
        use_torch_layers(part, options.join)
        if options.fuse:
            fuse_blocks(part)
    elif not dialect.composite:
        use_explicit_layers(part)
    return dialect


def _precisions(
    part: nn.Module, component: str, policy: Policy, first_blocks: int
) -> dict[str, int]:
    """How many of a component's layers have each precision; before the policy is applied."""
    layers = component_layers(part, component, first_blocks).items()
    rules = (
        policy.rule(component, name, isinstance(layer, ExportLinear)) for name, layer in layers
    )
    return dict(Counter(rule.precision for rule in rules))


def build_part(folder: str, checkpoint: AnyCheckpoint | Structure) -> nn.Module:
    """A part's module in FP32 on fake tensors, its layers replaced by the exporter's own.

    Raises:
        CheckpointError: the configuration is unusable, or does not fit the weights.
    """
    config, weights = part_source(checkpoint, folder)
    try:
        part = _PARTS[part_kind(folder)](config, weights)
    except (TypeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{checkpoint.root}: the configuration of its {folder} is not usable: {error}",
            "use the config.json that belongs to these weights",
        ) from error
    replace_layers(part)
    return part


def fp8_layers(
    checkpoint: AnyCheckpoint, components: Iterable[str], policy: Policy
) -> tuple[list[str], list[str]]:
    """``component/layer`` of the linears, and of the attentions, that a policy computes in FP8."""
    linears, attentions = [], []
    for component in components:
        rules = [r for r in policy.rules if r.names(component)]
        if all(rule.precision != "fp8" for rule in rules):
            continue
        folder = component_row(component).part
        with fake_tensors():
            part = build_part(folder, checkpoint)
        layers = component_layers(part, component).items()
        names = [name for name, layer in layers if isinstance(layer, ExportLinear)]
        linears += fp8_linears(folder, names, policy)
        attentions += fp8_attentions(folder, component_attentions(part, component), policy)
    return linears, attentions


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Everything made inside has shapes but no storage; the libraries' chatter is silenced."""
    with warnings.catch_warnings(), FakeTensorMode(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def export_component(
    name: str,
    checkpoint: AnyCheckpoint,
    policy: Policy,
    options: ExportOptions,
    out: Path,
    progress: Callable[[float, str], None] = lambda fraction, note: None,
    scales: Scales | None = None,
    graphs: GraphCache | None = None,
) -> None:
    """Write one component: ``model.onnx`` and ``weights.data``, or ``program.json`` and
    ``weights.safetensors``; and ``component.json``.

    The graph is traced without weights; these are then converted and written one tensor at a
    time, so peak memory is the traced graph plus the largest tensor.

    Args:
        name: one that :func:`sd35_trt.components.component_row` knows.
        out: an existing directory.
        progress: called with the fraction done (0 to 1) and what is being done.
        scales: of the component's part, where it was calibrated.
        graphs: where to take the traced graph from; None traces it.

    Raises:
        CheckpointError: a tensor is missing, misshapen or not finite in the stored precision.
        UsageError: the policy does not fit the component.
    """
    folder = component_row(name).part
    _, weights = part_source(checkpoint, folder)
    if weights is None:
        raise TypeError(f"{checkpoint.root} has no tensors")
    progress(0.0, "tracing")
    first_blocks = options.features.first_blocks(name)
    with fake_tensors():
        part = build_part(folder, checkpoint)
        precisions = _precisions(part, name, policy, first_blocks)
        places = apply_policy(part, name, policy, scales, weights, first_blocks)
        dialect = use_dialect(part, options)
        size = StoredSize.of(part, name, first_blocks)
        module = component_module(name, part, options).eval()
        if dialect.opset is None:
            program = graphs.program(name, module) if graphs else module.program()
        else:
            model = graphs.model(name, module, dialect) if graphs else module.trace(dialect)
        ports = module.declared_ports()
    progress(0.5, "writing weights")

    def written(fraction: float) -> None:
        progress(0.5 + 0.5 * fraction, "writing weights")

    if dialect.opset is None:
        total = write_program(program, module, weights, out, written)
    else:
        total = stream_weights(model, module, weights, out / MODEL_FILE, WEIGHTS_FILE, written)
    ComponentFacts(
        name=name,
        weight_bytes=total,
        largest_layer_bytes=size.largest_layer,
        allocated_bytes=size.allocated,
        inputs=tuple(port for port in ports if port.name in module.inputs),
        outputs=tuple(port for port in ports if port.name in module.outputs),
        precisions=precisions,
        fp32_places=_own_places(places, name, first_blocks),
        adapters=module.adapters,
    ).write(out)


def _own_places(places: Mapping[str, float], component: str, first_blocks: int) -> dict[str, float]:
    """Of a part's places that the range guard computes in FP32, a component's."""
    prefix = f"{layer_holder(component)}/"
    return {
        key: amax
        for key, amax in places.items()
        if key.startswith(prefix) and is_within(f"{key.removeprefix(prefix)}.", first_blocks)
    }
