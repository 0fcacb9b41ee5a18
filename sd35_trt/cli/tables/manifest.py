"""What a bundle holds."""

from __future__ import annotations

from sd35_trt.components import NO_T5
from sd35_trt.features import ADAPTERS
from sd35_trt.formats.bundle import Bundle, Manifest, Port
from sd35_trt.formats.step_cache import StepCache
from sd35_trt.units import format_bytes

from .console import fact_table, open_console, plain_table, sm_names


def _ports(ports: tuple[Port, ...]) -> str:
    short = {"float32": "f32", "float16": "f16", "int64": "i64", "uint8": "u8"}
    return "\n".join(
        f"{p.name} {short.get(p.dtype, p.dtype)} {'×'.join(map(str, p.shape))}" for p in ports
    )


def _target(manifest: Manifest) -> str:
    options = manifest.engine_options
    sm = sm_names(manifest.option_names("compute_capabilities"))
    features = [
        name.replace("_", " ") for name in ("weight_streaming", "refit") if options.get(name)
    ]
    name = f"{manifest.target} ({sm})" if sm else manifest.target
    return ", ".join([name, f"by {manifest.builder}", *features])


def _sources(manifest: Manifest) -> str:
    """The files of each part, a line each."""
    model = manifest.model
    lines = []
    for name, digest in model.files.items():
        if not name.startswith("tokenizer") and not name.endswith(".json"):
            types = model.quantization.get(name)
            lines.append(f"{name} ({digest[:12]}{f', {types}' if types else ''})")
    if manifest.component("t5") is None:
        lines.append(NO_T5)
    return "\n".join(lines)


def _short_steps(bundle: Bundle) -> str:
    """How many blocks they compute, and the plans of the step cache, a line each."""
    lines = [f"of the first {bundle.manifest.features.short_steps} blocks"]
    cache = StepCache.of(bundle)
    if cache is None:
        return f"{lines[0]}; no step cache says which"
    lines[0] += f" of {cache.blocks}"
    lines += [
        f"{plan.short} of {plan.steps} steps of {plan.sampler} with shift {plan.shift:g}, "
        f"error {plan.error:.3g}"
        for plan in cache.plans
    ]
    return "\n".join(lines)


def print_manifest(bundle: Bundle) -> None:
    """Print a bundle's manifest as tables."""
    m = bundle.manifest
    console = open_console()
    facts = {
        "bundle": str(bundle.root),
        "model": f"{m.model.name} ({m.model.variant})",
        "target": _target(m),
        "policy": f"{m.policy.name} ({m.policy.sha256[:12]})",
        "calibration": m.calibration[:12] if m.calibration else "none",
        "in FP32": ", ".join(f"{k} (amax {v:.3g})" for k, v in m.fp32_places().items()) or "none",
        "guidance": f"in the graph, default {m.defaults.guidance:g}" if m.guided else "none",
        "batch": f"{m.ranges.batch[0]} to {m.ranges.batch[1]}",
        "size": f"{m.ranges.size[0]} to {m.ranges.size[1]} px in steps of {m.ranges.size_step}, "
        f"default {m.defaults.size[0]}x{m.defaults.size[1]}",
        "steps": f"default {m.defaults.steps}, shift {m.scheduler.shift:g}",
        "text": ", ".join(f"{k} {t.length} tokens" for k, t in m.tokenizers.items()),
        "made": m.created,
        "with": ", ".join(f"{k} {v}" for k, v in m.versions.items()),
        "command": m.command,
    }
    if others := [name for name in m.requires if name != ADAPTERS]:
        facts["features"] = ", ".join(others)
    if m.adapter_ranks:
        facts["adapters"] = f"of rank {m.adapter_ranks[-1]} together, as inputs"
    if m.controls:
        nets = (f"{control.name} ({control.kind})" for control in m.controls)
        facts["ControlNets"] = ", ".join(nets)
    if m.features.short_steps:
        facts["short steps"] = _short_steps(bundle)
    if m.model.origin:
        facts["from the hub"] = m.model.origin
    if m.model.loras:
        facts["LoRA"] = "\n".join(f"{lora.name} at {lora.scale:g}" for lora in m.model.loras)
    facts["made from"] = _sources(m)
    console.print(fact_table(facts))
    sizes = {"weights": [format_bytes(c.weight_bytes) for c in m.components]}
    if all(c.activation_bytes is not None for c in m.components):
        sizes["working"] = [format_bytes(c.activation_bytes or 0) for c in m.components]
    table = plain_table(["component"], sizes)
    for column in ("inputs", "outputs", "sha256"):
        table.add_column(column)
    for c, *row in zip(m.components, *sizes.values(), strict=True):
        table.add_row(
            c.name, *row, _ports(c.inputs), _ports(c.outputs),
            "\n".join(f.sha256[:12] for f in c.files),
        )  # fmt: skip
    console.print()
    console.print(table)
    total = sum(f.bytes for f in m.all_files())
    console.print(f"\n{len(list(m.all_files()))} files, {format_bytes(total)}")
