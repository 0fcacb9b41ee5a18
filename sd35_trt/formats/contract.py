"""What a manifest has to state so that a runtime can draw: components, their ports, tokenizers.

docs/bundle-format.md specifies it for readers in other languages. What a bundle states besides is
tolerated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sd35_trt.components import ADAPTED, BRANCH_DENOISER, COMBINE, SHORT_DENOISER, control_name
from sd35_trt.errors import BundleError

from .bundle import ADAPTER_SCALES, RESIDUALS, Component, Manifest, Port, Tokenizer
from .control_contract import CONTROL_RESIDUALS, LATENTS, control_faults, control_ports
from .short_step_contract import short_step_faults

_REBUILD = "build it again with: sd35-trt build"

# No width of a network, and no number of its tokens, is larger.
_LARGEST = 1 << 20

# What a port holds. Those that are not named hold what was computed, in the policy's precision.
_DTYPES = {
    "input_ids": ("int64",),
    "image": ("uint8",),
    **dict.fromkeys(
        ("timesteps", "latents", "sigma", "coefficients", "previous_denoised", "guidance",
         "next_latents", "denoised", "mask", "source", "source_noise", "next_sigma", "layer_mask",
         "skip_guidance", "hint", "scale", "encoding", "change_coefficients", "uncond_denoised",
         "cond_denoised"),
        ("float32",),
    ),
}  # fmt: skip
_HALF = ("float16", "float32")

# Names of dynamic dimensions, which a builder may have pinned to a number. All other names are of
# one number each, the same wherever the name stands.
_DYNAMIC = frozenset(
    (
        "batch",
        "samples",
        "tokens",
        "steps",
        "height",
        "width",
        "image_height",
        "image_width",
        "rank",
        "skipped",
        "residual_samples",
        "residual_pixels",
        "pixels",
    )
)

# Those that may be none.
_EMPTY = frozenset(("skipped", "rank"))


@dataclass(frozen=True)
class _Ports:
    """Ports of a component: name → dimensions."""

    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


_GUIDANCE = {
    "uncond_context": "batch tokens context",
    "uncond_modulation": "batch rows modulation",
    "guidance": "batch",
}

_INPAINTING = {
    "mask": "batch 1 height width",
    "source": LATENTS,
    "source_noise": LATENTS,
    "next_sigma": "batch",
}

_SKIP_LAYER_GUIDANCE = {"layer_mask": "skipped layers", "skip_guidance": "batch"}

_CHANGE = "samples pixels modulation"

_SHORT_STEP = {
    "change_coefficients": "batch 2",
    "last_change": _CHANGE,
    "earlier_change": _CHANGE,
}

_ENCODING = {"encoding": "batch 3"}

_CONTRACT = {
    "clip_l": _Ports(
        {"input_ids": "batch clip"},
        {"hidden": "batch clip clip_l", "pooled": "batch clip_l_pooled"},
    ),
    "clip_g": _Ports(
        {"input_ids": "batch clip"},
        {"hidden": "batch clip clip_g", "pooled": "batch clip_g_pooled"},
    ),
    "t5": _Ports({"input_ids": "batch tokens"}, {"hidden": "batch tokens embeds"}),
    "conditioner": _Ports(
        {
            "prompt_embeds": "samples tokens embeds",
            "pooled": "samples pooled",
            "timesteps": "steps",
        },
        {"context": "samples tokens context", "modulation": "steps samples rows modulation"},
    ),
    "denoiser": _Ports(
        {
            "latents": LATENTS,
            "sigma": "batch",
            "coefficients": "batch 3",
            "previous_denoised": LATENTS,
            "context": "batch tokens context",
            "modulation": "batch rows modulation",
        },
        {"next_latents": LATENTS, "denoised": LATENTS},
    ),
    "vae_decoder": _Ports({"latents": LATENTS}, {"image": "batch image_height image_width 3"}),
    "vae_encoder": _Ports({"image": "batch image_height image_width 3"}, {"latents": LATENTS}),
}

_CONTRACT[SHORT_DENOISER] = _CONTRACT["denoiser"]
_CONTRACT[BRANCH_DENOISER] = _Ports(
    {
        "latents": LATENTS,
        "sigma": "batch",
        "context": "batch tokens context",
        "modulation": "batch rows modulation",
    },
    {"denoised": LATENTS},
)
_CONTRACT[COMBINE] = _Ports(
    {
        "uncond_denoised": LATENTS,
        "cond_denoised": LATENTS,
        "latents": LATENTS,
        "coefficients": "batch 3",
        "previous_denoised": LATENTS,
        "guidance": "batch",
    },
    {"next_latents": LATENTS, "denoised": LATENTS},
)

_REQUIRED = ("clip_l", "clip_g", "conditioner", "denoiser", "vae_decoder")
_TEXT_ENCODERS = ("clip_l", "clip_g", "t5")


def check_contract(manifest: Manifest, where: object) -> None:
    """Refuse a manifest that cannot be drawn from, whatever its engines are.

    Args:
        where: the bundle is, for the message.

    Raises:
        BundleError: names the component and what is wrong with it.
    """
    for fault in _faults(manifest):
        raise BundleError(f"{where}: {fault}", _REBUILD)


def _faults(manifest: Manifest) -> Iterator[str]:
    names = [component.name for component in manifest.components]
    yield from (f"it has two components {name}" for name in names if names.count(name) > 1)
    yield from (f"it has no {name}" for name in _REQUIRED if name not in names)
    # What a bundle says that it is comes first: ports follow from it.
    yield from short_step_faults(manifest)
    sizes = {"channels": manifest.latent_channels}
    for component in manifest.components:
        if (ports := _ports(component)) is None:
            continue  # a later version's; the manifest would require it
        inputs, outputs = dict(ports.inputs), dict(ports.outputs)
        if component.name in ("denoiser", SHORT_DENOISER) and manifest.guided:
            inputs |= _GUIDANCE
        if component.name == "denoiser" and manifest.features.short_steps:
            outputs["change"] = _CHANGE
        inputs |= _feature_ports(component.name, manifest)
        if component.adapters:
            yield from _adapter_faults(component, manifest)
            inputs |= _adapter_ports(component)
        yield from _port_faults(component, "input", component.inputs, inputs, sizes)
        yield from _port_faults(component, "output", component.outputs, outputs, sizes)
        yield from _bound_faults(component)
        # Inputs that nobody would feed; further outputs may be left out.
        yield from (
            f"{component.name} has an input {port.name}, which is unknown"
            for port in component.inputs
            if port.name not in inputs
        )
    yield from control_faults(manifest)
    if manifest.features.split_guidance:
        yield from (f"it has no {x}" for x in (BRANCH_DENOISER, COMBINE) if x not in names)
        if not manifest.guided:
            yield "it splits guidance without guidance"
    if manifest.features.skip_layer_guidance and not manifest.guided:
        yield "it has skip-layer guidance without guidance"
    if (together := sizes["clip_l_pooled"] + sizes["clip_g_pooled"]) != sizes["pooled"]:
        yield f"conditioner takes pooled of {sizes['pooled']}, CLIP has {together}"
    if (together := sizes["clip_l"] + sizes["clip_g"]) > sizes["embeds"]:
        yield f"conditioner takes prompt_embeds of {sizes['embeds']}, CLIP alone has {together}"
    for name in _TEXT_ENCODERS:
        if name in names:
            yield from _tokenizer_faults(name, manifest.tokenizers.get(name), sizes["clip"])


def _feature_ports(component: str, manifest: Manifest) -> dict[str, str]:
    """Inputs of a component for features besides adapters, and their dimensions."""
    features = manifest.features.of_component(component)
    ports = dict(_INPAINTING) if features.inpainting else {}
    if features.first_blocks(component):
        ports |= _SHORT_STEP
    if features.control_blocks:
        ports |= _ENCODING if component == "vae_encoder" else {RESIDUALS: CONTROL_RESIDUALS}
    return ports | (_SKIP_LAYER_GUIDANCE if features.skip_layer_guidance else {})


def _ports(component: Component) -> _Ports | None:
    """What a component has to have besides features; None of one that is unknown here."""
    if control_name(component.name) is not None:
        return _Ports(*control_ports(component))
    return _CONTRACT.get(component.name)


def _adapter_faults(component: Component, manifest: Manifest) -> Iterator[str]:
    """What is wrong with what is said of a component's adapters."""
    ranks = manifest.adapter_ranks
    if component.name not in ADAPTED:
        yield f"{component.name} takes adapters"
    if not ranks or list(ranks) != sorted(set(ranks)) or ranks[-1] > _LARGEST:
        yield f"{component.name} takes adapters of the ranks {list(ranks)}"
    for group in component.adapters:
        if len({len(layers) for layers in group.layers}) > 1:
            yield f"{component.name} has blocks of different linears in {group.down}"
    layers = [x for group in component.adapters for block in group.layers for x in block]
    yield from (
        f"{component.name} takes two adapters of {layer}"
        for layer in dict.fromkeys(layers)
        if layers.count(layer) > 1
    )
    bounds = component.bounds.get("rank", (1, ranks[-1] if ranks else 1))
    if ranks and not (bounds[0] <= 1 and bounds[1] >= ranks[-1]):
        yield f"bounds of rank of {component.name} are {bounds[0]} to {bounds[1]}"


def _adapter_ports(component: Component) -> dict[str, str]:
    """Inputs of a component for adapters, and their dimensions."""
    samples = "samples" if component.name == "conditioner" else "batch"
    ports = {ADAPTER_SCALES: f"{samples} rank"}
    for group in component.adapters:
        blocks, linears = len(group.layers), len(group.layers[0])
        own = f"{component.name}.{group.down}"
        ports[group.down] = f"{blocks} {own}.in {linears} rank"
        ports[group.up] = f"{blocks} {linears} rank {own}.out"
    return ports


def _port_faults(
    component: Component,
    kind: str,
    found: tuple[Port, ...],
    wanted: Mapping[str, str],
    sizes: dict[str, int],
) -> Iterator[str]:
    """What is wrong with a component's inputs or outputs.

    Args:
        kind: ``input`` or ``output``.
        sizes: what names of dimensions stood for so far; completed.
    """
    ports = {port.name: port for port in found}
    for name, text in wanted.items():
        port, dims = ports.get(name), text.split()
        if port is None:
            yield f"{component.name} has no {kind} {name}"
            return
        dtypes = _DTYPES.get(name, _HALF)
        if port.dtype not in dtypes:
            named = " or ".join(dtypes)
            yield f"{kind} {name} of {component.name} is {port.dtype}, not {named}"
        if len(port.shape) != len(dims) or not all(
            _fits(length, dim, sizes) for length, dim in zip(port.shape, dims, strict=True)
        ):
            is_shape = f"{kind} {name} of {component.name} is {list(port.shape)}"
            yield f"{is_shape}, not [{', '.join(str(sizes.get(dim, dim)) for dim in dims)}]"
            return


def _fits(length: int | str, dim: str, sizes: dict[str, int]) -> bool:
    """Whether a dimension is as the contract says; a name that is new gets its number."""
    if dim in _DYNAMIC and length == dim:
        return True
    if not isinstance(length, int) or not 1 <= length <= _LARGEST:
        return False
    if dim in _DYNAMIC:
        return True
    return length == (int(dim) if dim.isdigit() else sizes.setdefault(dim, length))


def _bound_faults(component: Component) -> Iterator[str]:
    for dim, (low, high) in component.bounds.items():
        least = 0 if dim in _EMPTY else 1
        if not least <= low <= high <= _LARGEST:
            yield f"bounds of {dim} of {component.name} are {low} to {high}"


def _tokenizer_faults(name: str, tokenizer: Tokenizer | None, clip: int) -> Iterator[str]:
    if tokenizer is None:
        yield f"it has no tokenizer of {name}"
    elif tokenizer.length > _LARGEST or tokenizer.pad_id >= 1 << 31:
        yield f"the tokenizer of {name} pads to {tokenizer.length} with {tokenizer.pad_id}"
    elif name != "t5" and tokenizer.length != clip:
        yield f"the tokenizer of {name} pads to {tokenizer.length}, the encoder reads {clip}"
