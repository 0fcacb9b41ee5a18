"""What the manifest says of a build, besides its engines and files."""

from __future__ import annotations

from collections.abc import Mapping

from sd35_trt.checkpoints.look import Model
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.components import LATENT_SCALE
from sd35_trt.engines.builder import Builder
from sd35_trt.formats.bundle import (
    ControlRecord,
    LoraRecord,
    Manifest,
    ModelRecord,
    PolicyRecord,
    PolicyRule,
)
from sd35_trt.planning.decide import Decision
from sd35_trt.policies import Policy

from .export import Export


def manifest_facts(
    decision: Decision, export: Export, builder: Builder, versions: Mapping[str, str], command: str
) -> Manifest:
    """The manifest without components, tokenizers, files and calibration.

    Args:
        versions: of the libraries that exported.
        command: that makes the bundle.
    """
    model = decision.model
    return Manifest(
        model=ModelRecord(
            model.name,
            model.variant.name,
            dict(export.files),
            model.quantization,
            model.origin,
            _loras(model, export),
        ),
        target=decision.target.name,
        builder=builder.backend.name,
        engine_options=builder.describe(),
        policy=_record(decision.policy),
        latent_channels=decision.latent_channels,
        latent_scale=LATENT_SCALE,
        guided=decision.guided,
        scheduler=model.scheduler.values,
        versions={**versions, **builder.versions()},
        command=command,
        ranges=decision.ranges(export.t5_tokens),
        defaults=decision.defaults(export.t5_tokens),
        adapter_ranks=decision.features.adapter_ranks,
        requires=decision.features.requires,
        short_steps=decision.features.short_steps,
        controls=tuple(ControlRecord(net.name, net.kind, net.encoding) for net in model.nets),
        # What follows is known when the bundle is assembled.
        tokenizers={},
        components=(),
        files=(),
        calibration=None,
        created="",
    )


def _loras(model: Model[AnyCheckpoint], export: Export) -> tuple[LoraRecord, ...]:
    """The LoRAs in the model; their hashes are among those of its files."""
    return tuple(
        LoraRecord(
            merged.file.name,
            merged.lora.scale,
            export.files[f"{next(iter(merged.parts))}/{merged.listed(number)}"],
        )
        for number, merged in enumerate(model.loras, 1)
    )


def _record(policy: Policy) -> PolicyRecord:
    rules = (PolicyRule(r.component, r.match, r.precision, r.reason) for r in policy.rules)
    return PolicyRecord(policy.name, policy.digest(), tuple(rules))
