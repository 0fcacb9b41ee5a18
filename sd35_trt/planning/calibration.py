"""The calibration that a build takes: the one given, mini's own, or the checkpoint's scales."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sd35_trt.checkpoints.identity import file_hashes
from sd35_trt.checkpoints.input_scales import stored_magnitudes
from sd35_trt.checkpoints.look import Model
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.components import control_name, control_part
from sd35_trt.errors import UsageError
from sd35_trt.export.provenance import tool_versions
from sd35_trt.formats.calibration import Calibration, Provenance
from sd35_trt.policies import Policy
from sd35_trt.store.cache import StageCache


def decide_calibration(
    model: Model[AnyCheckpoint], policy: Policy, path: Path | None, cache: StageCache, advice: str
) -> Calibration | None:
    """The calibration to build with; None where the policy needs none and none is given.

    Args:
        path: what ``sd35-trt calibrate`` wrote.
        cache: remembers the hashes of files.
        advice: the command that makes the calibration which is missing.

    Raises:
        CheckpointError: the checkpoint has input scales for a part of what the policy quantizes.
        UsageError: the policy needs one and none was given, or it cannot be read; or it has none of
            a ControlNet.
    """
    calibration = _find(model, policy, path, cache, advice)
    if calibration is not None:
        _check_nets(calibration, model, policy)
    return calibration


def _find(
    model: Model[AnyCheckpoint], policy: Policy, path: Path | None, cache: StageCache, advice: str
) -> Calibration | None:
    if path is not None:
        return Calibration.load(path)
    fp8 = [rule.component for rule in policy.rules if rule.precision == "fp8"]
    if not any(fnmatch.filter(model.components, component) for component in fp8):
        return None
    if model.packaged:
        from sd35_trt.mini import calibration_path

        return Calibration.load(calibration_path())
    if own_scales := _stored_scales(model, policy, cache):
        return own_scales
    raise UsageError(f"policy {policy.name!r} needs a calibration", advice)


def _stored_scales(
    model: Model[AnyCheckpoint], policy: Policy, cache: StageCache
) -> Calibration | None:
    """The input scales that a checkpoint has itself, for all that the policy quantizes.

    None where it has none, or where the policy asks for the operands of attention matmuls.

    Raises:
        CheckpointError: it has a part of them.
    """
    from sd35_trt.export.component import fp8_layers

    components = [name for name in model.components if control_name(name) is None]
    linears, attentions = fp8_layers(model.checkpoint, components, policy)
    amax = stored_magnitudes(model.checkpoint, linears)
    if attentions or not amax:
        return None
    provenance = Provenance(
        method="the checkpoint's input scales",
        versions=tool_versions(),
        files=file_hashes(
            model.checkpoint, [p for p in model.parts if control_name(p) is None], cache
        ),
    )
    return Calibration(amax, {}, {}, provenance)


def _absent_nets(calibration: Calibration, model: Model[AnyCheckpoint]) -> list[str]:
    """ControlNets of a model that a calibration was made without."""
    made_with = {name.split("/")[0] for name in calibration.provenance.files or ()}
    return [net.name for net in model.nets if control_part(net.name) not in made_with]


def _of_components(calibration: Calibration, components: list[str]) -> Calibration:
    """Without what was measured of ControlNets that are not built."""

    def own(values: Mapping[str, float]) -> dict[str, float]:
        return {
            name: value
            for name, value in values.items()
            if control_name(component := name.partition("/")[0]) is None or component in components
        }

    return replace(
        calibration,
        inputs=own(calibration.inputs),
        activations=own(calibration.activations),
        bmm=own(calibration.bmm),
    )


def _check_nets(calibration: Calibration, model: Model[AnyCheckpoint], policy: Policy) -> None:
    """Refuse ControlNets that a policy computes in FP8 and a calibration was made without."""
    from sd35_trt.export.component import fp8_layers

    for name in _absent_nets(calibration, model):
        linears, _ = fp8_layers(model.checkpoint, [control_part(name)], policy)
        if linears:
            raise UsageError(
                f"policy {policy.name!r} computes the ControlNet {name} in FP8, and the "
                "calibration has no scales of it",
                "calibrate with the same --controlnet, or keep it half by a policy with a rule for "
                f"{control_part(name)}",
            )


def check_calibration(
    calibration: Calibration, model: Model[AnyCheckpoint], policy: Policy, files: Mapping[str, str]
) -> None:
    """Refuse a calibration that is not of this checkpoint and policy.

    A policy without FP8 takes the ranges of any calibration of the checkpoint.

    Args:
        files: hashes of the checkpoint's parts, see :func:`file_hashes`.

    Raises:
        UsageError: names what differs.
    """
    from sd35_trt.export.component import fp8_layers

    calibration = _of_components(calibration, model.components)
    absent = {control_part(name) for name in _absent_nets(calibration, model)}
    files = {name: digest for name, digest in files.items() if name.split("/")[0] not in absent}
    linears, attentions = fp8_layers(model.checkpoint, model.components, policy)
    if not linears and not attentions:
        linears = list(calibration.inputs)
        attentions = list(dict.fromkeys(name.rpartition(".")[0] for name in calibration.bmm))
    calibration.check(files, linears, attentions)
