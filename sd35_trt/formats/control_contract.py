"""What a manifest has to state of ControlNets; see :mod:`.contract`."""

from __future__ import annotations

from collections.abc import Iterator

from sd35_trt.components import control_conditioner, control_name, control_part, is_net_name

from .bundle import RESIDUALS, Component, Manifest

#: Dimensions of latents.
LATENTS = "batch channels height width"

#: Dimensions of what nets make, as the denoiser and further nets take it.
CONTROL_RESIDUALS = "control_blocks residual_samples residual_pixels modulation"

#: Ports of a component: name → dimensions.
Dims = dict[str, str]


def control_ports(component: Component) -> tuple[Dims, Dims]:
    """Inputs and outputs that a ControlNet's component has to have.

    Those of the text are where the net has a text stream.
    """
    name = control_name(component.name) or ""
    rows = f"{control_part(name)}.rows"
    given = {port.name for port in component.inputs}
    context = {"context": "samples tokens context"}
    if component.name == control_conditioner(name):
        inputs = {"pooled": "samples pooled", "timesteps": "steps"}
        outputs = {"modulation": f"steps samples {rows} modulation"}
        if "prompt_embeds" not in given:
            return inputs, outputs
        return {**inputs, "prompt_embeds": "samples tokens embeds"}, {**outputs, **context}
    inputs = {
        "latents": LATENTS,
        "hint": LATENTS,
        "scale": "batch",
        RESIDUALS: CONTROL_RESIDUALS,
        "modulation": f"samples {rows} modulation",
        **(context if "context" in given else {}),
    }
    return inputs, {"next_residuals": "control_blocks samples pixels modulation"}


def control_faults(manifest: Manifest) -> Iterator[str]:
    """What is wrong with what is said of ControlNets, where each component is as it has to be."""
    names = [control.name for control in manifest.controls]
    yield from (f"it has two ControlNets {name}" for name in names if names.count(name) > 1)
    yield from (f"{name!r} is no ControlNet's name" for name in names if not is_net_name(name))
    if bool(names) is not bool(manifest.features.control_blocks):
        yield f"it has the ControlNets {names} and requires {sorted(manifest.requires)}"
    listed = [
        component(name) for name in names for component in (control_conditioner, control_part)
    ]
    wanted = [*listed, "vae_encoder"] if names else []
    yield from (f"it has no {name}" for name in wanted if manifest.component(name) is None)
    yield from (
        f"{c.name} is of no ControlNet that it lists"
        for c in manifest.components
        if control_name(c.name) is not None and c.name not in listed
    )
    for name in names:
        yield from _mismatches(manifest, name)


def _mismatches(manifest: Manifest, name: str) -> Iterator[str]:
    """Types in which components that hand over to each other differ."""
    net, conditioner, denoiser = (
        manifest.component(component)
        for component in (control_part(name), control_conditioner(name), "denoiser")
    )
    if net is None or conditioner is None or denoiser is None:
        return
    taken = {port.name: port.dtype for port in net.inputs}
    for port in conditioner.outputs:
        if taken.get(port.name) != port.dtype:
            yield f"{conditioner.name} makes {port.name} in {port.dtype}, {net.name} takes another"
    if denoiser.input(RESIDUALS).dtype != taken[RESIDUALS]:
        yield f"{net.name} makes {taken[RESIDUALS]}, the denoiser takes another"
