"""ControlNets beside a model: where they are, what they are, and whether they fit it.

A net is a part of its own, ``control_NAME``, in a folder that diffusers' SD3ControlNetModel saved,
or in one of Stability's files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd35_trt.components import CONTROLNET, control_part, is_net_name, part_kind
from sd35_trt.errors import CheckpointError, UsageError

from .borrowed import BorrowedWeights
from .configuration import class_name, complete
from .contents import describe
from .diffusers import Part, read_config
from .findings import Findings
from .hub import resolve_net
from .merged import AnyCheckpoint
from .model_options import HINT_KINDS, ControlNet
from .original_controlnet import is_original, net_config, net_origins
from .structure import Structure
from .tensor_files import TensorFiles
from .tensor_values import TensorValues
from .weight_files import read_json, weight_files
from .weights import PartWeights, Weights
from .wrappers import common_prefix

# What of the transformer's a net without an embedding of patches computes with.
_SHARED = "pos_embed."

# A picture's bytes as the autoencoder takes them: multiplied, and added to.
_USUAL = (1 / 127.5, -1.0)
# Stability's net for edges was trained on 127.5·x + 0.5 of pictures within 0 and 1, see its card:
# huggingface.co/stabilityai/stable-diffusion-3.5-large-controlnet-canny.
_EDGES_OF_LARGE = (0.5, 0.5)


@dataclass(frozen=True)
class Net:
    """A ControlNet of a model.

    Attributes:
        name: that requests have it by.
        kind: of its pictures, one of :data:`~sd35_trt.checkpoints.model_options.HINT_KINDS`.
        place: its folder.
        encoding: how the autoencoder takes its picture: the factor of bytes, what is added, and
            how much of the autoencoder's shift is subtracted from the latents.
    """

    name: str
    kind: str
    place: Path
    encoding: tuple[float, float, float]


def open_nets(nets: Sequence[ControlNet]) -> dict[str, Part]:
    """The parts of some nets; what is wrong with them is told together.

    Raises:
        CheckpointError: a line for each that is not to be had, or no ControlNet of SD3.
        UsageError: a name that is none, or that two have.
    """
    names = [net.name for net in nets]
    for name in names:
        if not is_net_name(name):
            raise UsageError(
                f"--controlnet: {name!r} is no name of a ControlNet",
                "use a to z, 0 to 9 and _, not conditioner at the end: canny=DIR",
            )
        if names.count(name) > 1:
            raise UsageError(f"--controlnet: two are called {name}", "give each its own name")
    findings, parts = Findings(), {}
    for net in nets:
        with findings.part():
            part = control_part(net.name)
            parts[part] = open_net(part, resolve_net(net.model))
    findings.tell()
    return parts


def open_net(part: str, path: Path) -> Part:
    """A net in a folder, in the file beside a ``config.json``, or in one of Stability's files.

    Raises:
        CheckpointError: there is none.
    """
    single = path.is_file()
    place = (path.parent if single else path) / "config.json"
    if not single and not place.is_file():
        raise _none(path, f"is {describe(path).title}")
    files = [path] if single else weight_files(path)
    tensors = TensorFiles(path, files, "a ControlNet")
    tensors.strip(common_prefix(tensors.names))
    weights = PartWeights(TensorValues(tensors), files, "", net_origins)
    if is_original(tensors.names):
        config, name = complete(part, net_config(weights)), None
        return Part(part, path, open_net, path, name, config, weights, files)
    if not place.is_file():
        raise _none(path, "has no config.json beside it")
    data = read_json(place)
    config, name = read_config(part, place, data), class_name(data)
    own = None if name is None else str(name)
    return Part(part, path, open_net, place, own, config, weights, [place, *files])


def _none(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"--controlnet: {path} {what}",
        "give a folder that diffusers' SD3ControlNetModel saved, one of Stability's files, or a "
        "hub id",
    )


def describe_nets(nets: Iterable[ControlNet], given: Mapping[str, Part]) -> tuple[Net, ...]:
    """What nets that were opened are."""
    return tuple(_describe(net, given[control_part(net.name)]) for net in nets)


def _describe(net: ControlNet, part: Part) -> Net:
    kind = net.kind or _guess(net.name, part.path.name, net.model)
    large = part.config["joint_attention_dim"] is None
    factor, offset = _EDGES_OF_LARGE if large and kind == "canny" else _USUAL
    shift = 0.0 if part.config["force_zeros_for_pooled_projection"] else 1.0
    return Net(net.name, kind, part.path, (factor, offset, shift))


def _guess(*names: str) -> str:
    """The kind that the first of some names tells."""
    found = (kind for name in names for kind in HINT_KINDS if kind in name.lower())
    return next(found, HINT_KINDS[-1])


def part_source(
    checkpoint: AnyCheckpoint | Structure, part: str
) -> tuple[dict[str, Any], Weights | None]:
    """Configuration and tensors that a part is built from.

    A ControlNet without an embedding of patches has the transformer's.

    Raises:
        CheckpointError: see :meth:`Checkpoint.config`, :meth:`Checkpoint.weights`.
    """
    config, weights = checkpoint.config(part), checkpoint.weights(part)
    if part_kind(part) != CONTROLNET or config["use_pos_embed"]:
        return config, weights
    size = checkpoint.config("transformer")["pos_embed_max_size"]
    config |= {"use_pos_embed": True, "pos_embed_type": "sincos", "pos_embed_max_size": size}
    transformer = checkpoint.weights("transformer")
    if weights is not None and transformer is not None:
        weights = BorrowedWeights(weights, transformer, _SHARED)
    return config, weights


def part_folders(part: str) -> tuple[str, ...]:
    """The parts whose files a part's components are made from."""
    return (part, "transformer") if part_kind(part) == CONTROLNET else (part,)


def check_nets(
    checkpoint: AnyCheckpoint | Structure, nets: Mapping[str, Mapping[str, Any]]
) -> dict[str, CheckpointError]:
    """What of some nets does not fit the model, by part.

    Args:
        nets: part → configuration.
    """
    errors: dict[str, CheckpointError] = {}
    transformer = checkpoint.config("transformer")
    blocks = {config["num_layers"] for config in nets.values()}
    for part, net in nets.items():
        place = checkpoint.given[part].place
        if faults := _misfits(net, transformer):
            errors[part] = CheckpointError(
                f"{place} is of another model: {'; '.join(faults)}",
                "take a ControlNet that was trained for this model",
            )
        elif len(blocks) > 1:
            errors[part] = CheckpointError(
                f"{place} has {net['num_layers']} blocks, another ControlNet of this bundle has "
                f"{max(blocks - {net['num_layers']})}",
                "build a bundle for each",
            )
    return errors


def _misfits(net: Mapping[str, Any], transformer: Mapping[str, Any]) -> list[str]:
    def width(config: Mapping[str, Any]) -> int:
        return int(config["num_attention_heads"] * config["attention_head_dim"])

    pairs = [
        ("channels", width(net), width(transformer)),
        *(
            (key, net[key], transformer[key])
            for key in ("in_channels", "patch_size", "pooled_projection_dim")
        ),
    ]
    if net["joint_attention_dim"] is not None:
        key = "joint_attention_dim"
        pairs.append((key, net[key], transformer[key]))
    return [f"{name} = {own}, the transformer has {its}" for name, own, its in pairs if own != its]
