"""What names a model: its place, parts in place of its own, and what overrides its facts."""

from __future__ import annotations

import shlex
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from typing import Any

#: Part → the option that names its file.
OPTIONS = {
    "text_encoder": "--clip-l",
    "text_encoder_2": "--clip-g",
    "text_encoder_3": "--t5",
    "vae": "--vae",
}


#: What names of things begin with that come with mini.
PACKAGED = "mini:"


@dataclass(frozen=True)
class Lora:
    """A LoRA that is merged into the model.

    Attributes:
        path: the file, a folder that PEFT or diffusers saved, or ``mini:NAME``.
        scale: that its update is multiplied by, besides the file's own.
    """

    path: Path
    scale: float = 1.0

    @property
    def factor(self) -> str:
        """The scale in as many digits as tell it from others."""
        return repr(float(self.scale)).removesuffix(".0")


#: What the pictures of a ControlNet are; the last is what no name tells.
HINT_KINDS = ("canny", "depth", "blur", "other")


@dataclass(frozen=True)
class ControlNet:
    """A ControlNet beside the model.

    Attributes:
        name: that requests have it by.
        model: its folder, a file beside its ``config.json``, a hub id, or ``mini:NAME``.
        kind: one of :data:`HINT_KINDS`; None asks the names.
    """

    name: str
    model: str
    kind: str | None = None

    @property
    def word(self) -> str:
        """As on the command line."""
        return f"{self.name}={self.model}" + (f":{self.kind}" if self.kind else "")


@dataclass(frozen=True)
class ModelOptions:
    """Which model is looked at.

    Attributes:
        model: ``mini``, a diffusers directory, a file in the original layout, or a hub id.
        clip_l, clip_g, t5, vae: what replaces a part of it; None takes its own. A
            ``.safetensors`` file in original or transformers' names, a ``.gguf`` file, a folder
            that diffusers or transformers saved, or a model directory with such a folder.
        without_t5: leave out T5, whether or not the model has it.
        tokenizers: a directory with the tokenizers' folders, for a model in a file; None looks
            beside it, then on the hub.
        scheduler: a ``scheduler_config.json``, or a folder with one; None takes the model's.
        variant: ``large``, ``large-turbo``, ``medium``, ``mini`` or ``custom``; None asks the
            model's structure and its name.
        loras: merged into the weights, in turn.
        controlnets: that are built with it.
    """

    model: str = "mini"
    _: KW_ONLY
    clip_l: Path | None = None
    clip_g: Path | None = None
    t5: Path | None = None
    vae: Path | None = None
    without_t5: bool = False
    tokenizers: Path | None = None
    scheduler: Path | None = None
    variant: str | None = None
    loras: tuple[Lora, ...] = ()
    controlnets: tuple[ControlNet, ...] = ()

    @property
    def parts(self) -> dict[str, Path]:
        """Part → what replaces it."""
        paths = (self.clip_l, self.clip_g, self.t5, self.vae)
        pairs = zip(OPTIONS, paths, strict=True)
        return {part: path for part, path in pairs if path is not None}

    @property
    def model_words(self) -> str:
        """The model as on the command line."""
        options = {
            "--model": self.model,
            **{OPTIONS[part]: path for part, path in self.parts.items()},
            "--tokenizers": self.tokenizers,
            "--scheduler": self.scheduler,
            "--model-variant": self.variant,
        }
        words = [word for name, value in options.items() if value for word in (name, str(value))]
        for lora in self.loras:
            words += ["--lora", f"{lora.path}:{lora.factor}"]
        for net in self.controlnets:
            words += ["--controlnet", net.word]
        return shlex.join([*words, *(["--no-t5"] if self.without_t5 else [])])

    def model_fields(self) -> dict[str, Any]:
        """What of it says which model, for other options that do."""
        return {field.name: getattr(self, field.name) for field in fields(ModelOptions)}
