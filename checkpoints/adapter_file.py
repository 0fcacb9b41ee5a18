"""A file of a LoRA, or of another adapter, of SD3.5: which layers of a model it changes, and how.

Every tensor of the file is used, or the file is refused with a tensor's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sd35_trt.errors import CheckpointError

from .adapter_names import PEFT, FileLayer, LayerNames, split_name
from .adapter_scaling import CONFIG, Scaling
from .adapter_updates import KINDS, BiasUpdate, Kind, Update, WeightUpdate
from .configuration import KINDS as PART_KINDS
from .contents import refusal
from .hub import resolve_lora
from .plain_tensors import PlainTensors
from .tensor_names import MODEL, adapter_kind

if TYPE_CHECKING:
    import torch

_WANTED = f"a LoRA for {MODEL}"

# What PEFT and diffusers call the file in a folder of theirs.
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

_OTHER = "take a LoRA that was trained on this model"
_DAMAGED = "download it again, or take another"

# Titles in :mod:`.tensor_names` of what is read here.
_READ = ("a LoRA", "a DoRA", "a LoHa", "a LoKr")


class _LayerTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of a layer by role, each read when it is asked for."""

    def __init__(self, tensors: PlainTensors, names: Mapping[str, str]) -> None:
        self._tensors = tensors
        self._names = names

    def __getitem__(self, role: str) -> torch.Tensor:
        import torch

        return torch.from_numpy(self._tensors.values(self._names[role]))

    def __contains__(self, role: object) -> bool:
        return role in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class AdaptedLayer:
    """A layer that a file changes.

    Attributes:
        key: its name in the file.
        names: role → tensor's name in the file.
        shapes: role → shape.
        kind: what is done to it.
        layer: what it is of the model.
        scaling: the file's own.
    """

    key: str
    names: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    kind: type[Kind]
    layer: FileLayer
    scaling: float


class AdapterFile:
    """A LoRA, DoRA, LoHa or LoKr in one file.

    Args:
        path: the file, a folder that PEFT or diffusers saved it in, or ``mini:NAME``.

    Attributes:
        path: of the file.
        files: that its result depends on.
        roles: layer, as the file calls it → role → tensor's name.

    Raises:
        CheckpointError: missing, damaged, something else, or of another model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path = _file(resolve_lora(path))
        self.tensors = PlainTensors(path, _WANTED)
        names = self.tensors.names
        kind = adapter_kind(names)
        if kind is None:
            raise refusal(path, _WANTED)
        if " for " in kind.title:
            raise CheckpointError(f"{path} is {kind.title}, not for {MODEL}", f"take {_WANTED}")
        if not kind.title.startswith(_READ):
            raise CheckpointError(f"{path} is {kind.title}, not {_WANTED}", kind.advice)
        peft = any(name.startswith(PEFT) for name in names)
        self.files = [path, path.parent / CONFIG] if peft else [path]
        self._scaling = Scaling(path, self.tensors.metadata, peft)
        self.roles = self._split()

    def layers(self, names: LayerNames) -> list[AdaptedLayer]:
        """The layers of a model that the file changes.

        Args:
            names: of the model's layers.

        Raises:
            CheckpointError: names a tensor that is of no layer of the model, does not fit it, is
                not finite, or of no use.
        """
        layers = [self._layer(key, roles, names) for key, roles in self.roles.items()]
        first: dict[tuple[str, str], str] = {}
        for layer in layers:
            for target in layer.layer.targets:
                other = first.setdefault((target.part, target.module), layer.key)
                if other != layer.key:
                    raise CheckpointError(
                        f"{self.path} has {other!r} and {layer.key!r}, which are one layer of the "
                        "model",
                        "take out one of the two",
                    )
        for name in self.tensors.names:
            self.tensors.values(name)  # refuses what is not finite
        return layers

    def layer_tensors(self, layer: AdaptedLayer) -> Mapping[str, torch.Tensor]:
        """A layer's tensors by role in FP32, each read when it is asked for."""
        return _LayerTensors(self.tensors, layer.names)

    def updates(self, layer: AdaptedLayer, scale: float) -> Iterator[tuple[str, str, Update]]:
        """What a layer's tensors do to the model's.

        Args:
            scale: the user's.

        Yields:
            The part, the tensor's name in diffusers, and what is done to it.
        """
        tensors, total = self.layer_tensors(layer), layer.scaling * scale
        magnitude = "magnitude" in layer.names
        for target in layer.layer.targets:
            yield (
                target.part,
                f"{target.module}.weight",
                WeightUpdate(layer.kind, tensors, layer.layer.shape, target.take, total, magnitude),
            )
            if "bias" in layer.names:
                yield target.part, f"{target.module}.bias", BiasUpdate(tensors, target.take, total)

    def _split(self) -> dict[str, dict[str, str]]:
        """Layer → role → tensor's name."""
        layers: dict[str, dict[str, str]] = {}
        for name in sorted(self.tensors.names):
            split = split_name(name)
            if split is None:
                raise CheckpointError(
                    f"{self.path}: {name!r} is of no adapter that is read here",
                    "merge it into the model with the tool that trained it, and give the model",
                )
            key, role = split
            other = layers.setdefault(key, {}).setdefault(role, name)
            if other != name:
                raise CheckpointError(
                    f"{self.path} has {other!r} and {name!r}, which are one tensor",
                    "take out one of the two",
                )
        return layers

    def _layer(self, key: str, roles: Mapping[str, str], names: LayerNames) -> AdaptedLayer:
        layer, first = names.find(key), min(roles.values())
        if layer is None:
            raise self._foreign(key, first, names)
        shapes = {role: self.tensors.shape(name) for role, name in roles.items()}
        kind = self._kind(roles, first)
        if not all(all(shape) for shape in shapes.values()) or not kind.fits(shapes, layer.shape):
            listed = ", ".join(f"{roles[r]} {list(s)}" for r, s in shapes.items() if r != "alpha")
            raise CheckpointError(
                f"{self.path}: {listed}: not a {kind.title} for the model's layer, whose weight is "
                f"{list(layer.shape)}",
                _OTHER,
            )
        alpha = float(self.tensors.values(roles["alpha"]).item()) if "alpha" in roles else None
        scaling = self._scaling.of(key, kind.rank(shapes), alpha)
        return AdaptedLayer(key, roles, shapes, kind, layer, scaling)

    def _kind(self, roles: Mapping[str, str], first: str) -> type[Kind]:
        present = roles.keys()
        for kind in KINDS:
            own = kind.needed | kind.allowed - {"alpha"}
            if present & own:
                if missing := kind.needed - present:
                    role = min(missing)
                    raise CheckpointError(
                        f"{self.path}: {first!r} has no {role} beside it", _DAMAGED
                    )
                if surplus := present - kind.needed - kind.allowed:
                    name = roles[min(surplus)]
                    raise CheckpointError(
                        f"{self.path}: {name!r} is of no use to a {kind.title}",
                        "merge it into the model in ComfyUI: LoraLoader, then CheckpointSave",
                    )
                return kind
        raise CheckpointError(f"{self.path}: {first!r} has no matrices beside it", _DAMAGED)

    def _foreign(self, key: str, name: str, names: LayerNames) -> CheckpointError:
        part = names.absent_part(key)
        if part is not None:
            title = PART_KINDS[part].title
            return CheckpointError(
                f"{self.path}: {name!r} is of {title}, which is left out of the model",
                "leave out --no-t5, or take a LoRA without it",
            )
        return CheckpointError(f"{self.path}: {name!r} is of no layer of the model", _OTHER)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in _FILES if (path / name).is_file()]
    if len(found) != 1:
        listed = " or ".join(_FILES)
        raise CheckpointError(f"{path} is a folder without {listed}", "name the file itself")
    return found[0]
