"""What the manifest says of a build, besides its engines and files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd35_trt.components import LATENT_SCALE
from sd35_trt.engines.builder import Builder
from sd35_trt.planning.decide import Decision

from .export import Export


def manifest_facts(
    decision: Decision, export: Export, builder: Builder, versions: Mapping[str, str], command: str
) -> dict[str, Any]:
    """Fields of :class:`sd35_trt.formats.bundle.Manifest`.

    Args:
        versions: of the libraries that exported.
        command: that makes the bundle.
    """
    model = decision.model
    return {
        "model": {"name": model.name, "variant": model.variant.name, "files": dict(export.files)},
        "target": decision.target.name,
        "builder": builder.backend.name,
        "engine_options": builder.describe(),
        "policy": decision.policy.as_dict(),
        "latent_channels": decision.latent_channels,
        "latent_scale": LATENT_SCALE,
        "guided": decision.guided,
        "scheduler": dict(decision.scheduler),
        "versions": {**versions, **builder.versions()},
        "command": command,
        "ranges": decision.ranges(export.t5_tokens),
        "defaults": decision.defaults(export.t5_tokens),
    }
