"""What the nodes use of ComfyUI, for tests without it, and what they did with it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch


class Interrupted(Exception):
    """ComfyUI's own."""


@dataclass
class Declared:
    """An input or an output of a node.

    Attributes:
        kind: ComfyUI's name of its type.
        options: as the node gives them.
    """

    kind: str
    id: str | None
    options: dict[str, Any]


class Kind:
    """A type of what goes along wires."""

    def __init__(self, name: str) -> None:
        self.name = name

    def Input(self, id: str, **options: Any) -> Declared:
        return Declared(self.name, id, options)

    def Output(self, **options: Any) -> Declared:
        return Declared(self.name, None, options)


class NodeOutput:
    def __init__(self, *args: Any) -> None:
        self.args = args


class SD3:
    """The latent format, with the numbers of Stable Diffusion 3's VAE."""

    latent_channels = 16

    def process_in(self, latent: torch.Tensor) -> torch.Tensor:
        return (latent - 0.0609) * 1.5305

    def process_out(self, latent: torch.Tensor) -> torch.Tensor:
        return latent / 1.5305 + 0.0609


@dataclass
class ComfyUI:
    """A ComfyUI without a server.

    Attributes:
        nodes: the package.
        models: its folder.
        interrupt_at: step of progress after which the user interrupts.
        progress: (value, most, preview) of each report.
        previewed: what previews were made of; None turns them off.
        unloaded: how often its own models were moved off the GPU.
    """

    models: Path
    nodes: Any = None
    interrupt_at: int | None = None
    interrupted: bool = False
    progress: list[tuple[int, int, Any]] = field(default_factory=list)
    previewed: list[torch.Tensor] | None = field(default_factory=list)
    unloaded: int = 0
    folders: dict[str, list[str]] = field(default_factory=dict)

    def run(self, node: Any, **inputs: Any) -> Any:
        """The one output of a node."""
        (output,) = node.execute(**inputs).args
        return output

    def modules(self) -> dict[str, ModuleType]:
        """Its modules, by name."""
        kinds = ("Boolean", "Combo", "Float", "Image", "Int", "Latent", "Mask", "String")
        io = SimpleNamespace(
            **{kind: Kind(kind.upper()) for kind in kinds},
            Custom=Kind, ComfyNode=object, Schema=SimpleNamespace, NodeOutput=NodeOutput,
        )  # fmt: skip
        management = _module(
            "comfy.model_management",
            InterruptProcessingException=Interrupted,
            throw_exception_if_processing_interrupted=self._throw,
            intermediate_device=lambda: torch.device("cpu"),
            unload_all_models=self._unload,
            soft_empty_cache=lambda: None,
        )
        return {
            "comfy": _module("comfy", model_management=management),
            "comfy.model_management": management,
            "comfy.latent_formats": _module("comfy.latent_formats", SD3=SD3),
            "comfy.utils": _module("comfy.utils", ProgressBar=self._progress_bar),
            "comfy_api": _module("comfy_api"),
            "comfy_api.latest": _module("comfy_api.latest", io=io, ComfyExtension=object),
            "folder_paths": _module(
                "folder_paths",
                models_dir=str(self.models),
                add_model_folder_path=lambda kind, path: self.folders.setdefault(kind, [path]),
                get_folder_paths=lambda kind: list(self.folders[kind]),
            ),
            "latent_preview": _module("latent_preview", get_previewer=self._previewer),
        }

    def _throw(self) -> None:
        if self.interrupted:
            self.interrupted = False
            raise Interrupted

    def _unload(self) -> None:
        self.unloaded += 1

    def _progress_bar(self, total: int) -> Any:
        def update_absolute(value: int, total: int, preview: Any) -> None:
            self.progress.append((value, total, preview))
            self.interrupted = value == self.interrupt_at

        return SimpleNamespace(update_absolute=update_absolute)

    def _previewer(self, device: torch.device, latent_format: SD3) -> Any:
        if self.previewed is None:
            return None

        def decode(image_format: str, latents: torch.Tensor) -> tuple[str, int]:
            assert self.previewed is not None
            self.previewed.append(latents.clone())
            return image_format, len(self.previewed)

        return SimpleNamespace(decode_latent_to_preview_image=decode)


@contextmanager
def stand_in(folder: Path) -> Iterator[ComfyUI]:
    """The nodes, imported as by a ComfyUI whose models are in a folder."""
    comfy = ComfyUI(folder)
    own = comfy.modules()
    assert not own.keys() & sys.modules.keys()
    sys.modules.update(own)
    try:
        comfy.nodes = importlib.import_module("comfyui")
        yield comfy
    finally:
        for name in [*own, *(n for n in sys.modules if n.partition(".")[0] == "comfyui")]:
            del sys.modules[name]


def _module(name: str, **attributes: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    return module
