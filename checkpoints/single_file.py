"""Checkpoints in one file of the original layout, with what is beside it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sd35_trt.components import COMPONENTS, OPTIONAL_PARTS
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.store.hub import fetch_tokenizers, telling_name

from .comfy import TensorFile
from .diffusers import Checkpoint, Weights, tokenizer_files
from .gguf import SUFFIX, GgufFile
from .original import LAYOUTS, Layout

if TYPE_CHECKING:
    import torch

_FETCH = "download the file again"

#: Part → the names its own file has, without suffix, the most precise first.
FILE_NAMES = {
    "text_encoder": ("clip_l",),
    "text_encoder_2": ("clip_g",),
    "text_encoder_3": (
        "t5xxl_fp16",
        "t5xxl_bf16",
        "t5xxl",
        "t5xxl_fp8_e4m3fn_scaled",
        "t5xxl_fp8_e4m3fn",
    ),
    # Not "ae": that is FLUX's autoencoder, which has the same shapes.
    "vae": ("sd3_vae", "sd3.5_vae", "sd35_vae"),
}

# Of GGUF files, in lower case: ComfyUI's, and those of llama.cpp's converter.
_GGUF_T5 = re.compile(r"(t5xxl|t5-v1_1-xxl-encoder).*\.gguf")

# Where they are, seen from the checkpoint: in Stability's repositories and in ComfyUI's folders.
_TEXT_FOLDERS = (".", "text_encoders", "clip", "../text_encoders", "../clip")
_VAE_FOLDERS = (".", "vae", "../vae")

# In Stability's repositories, whose other folders are not the original layout's.
_REPOSITORY_VAE = "vae/diffusion_pytorch_model.safetensors"

# Keys of other models, for the message.
_FOREIGN = {
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    "input_blocks.0.0.weight": "Stable Diffusion 1, 2 or XL",
    "transformer_blocks.0.attn.to_q.weight": "one part of a diffusers model",
    "lora": "a LoRA",
    "encoder.block.0.layer.0.SelfAttention.q.weight": "T5, a text encoder",
}

_NOT_READ = {
    ".ckpt": "take the model's .safetensors file: a pickle can run code",
    ".pt": "take the model's .safetensors file: a pickle can run code",
    ".pth": "take the model's .safetensors file: a pickle can run code",
    ".bin": "take the model's .safetensors file: a pickle can run code",
}


class SingleFileWeights(Weights):
    """A part's tensors by their diffusers names, each made when it is read.

    Args:
        file: what they are in.
        prefix: in front of the part's names there.
        others: prefixes of the other parts in the file, where all else is the part's; None where
            only what has the prefix is.

    Raises:
        CheckpointError: a quantization that is not read here.
    """

    advice = _FETCH

    def __init__(
        self,
        file: TensorFile | GgufFile,
        prefix: str,
        layout: Layout,
        others: Collection[str] | None = None,
    ) -> None:
        self.folder = file.path
        self.files = [file.path]
        self.quantization = file.quantization
        self._in = file
        self._prefix = prefix
        file.check(prefix)
        names = {name.removeprefix(prefix) for name in file.names if name.startswith(prefix)}
        self._origin = layout.origins(names)
        if others is None:
            self._own = {prefix + name for name in names}
        else:
            self._own = {name for name in file.names if not name.startswith(tuple(others))}

    def __contains__(self, name: str) -> bool:
        return self.source(name) in self._in

    def source(self, name: str) -> str:
        """The name of the tensor in the file that a diffusers tensor is made from."""
        return self._prefix + self._origin(name).source

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a diffusers tensor, from the header.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        import torch

        source = torch.empty(self._in.shape(self._stored_name(name)), device="meta")
        return tuple(self._origin(name).take(source).shape)

    def dtype(self, name: str) -> str:
        """Type of the tensor that a diffusers tensor is made from."""
        return self._in.dtype(self._stored_name(name))

    def unused(self, names: Iterable[str]) -> list[str]:
        """See :meth:`Weights.unused`."""
        return sorted(self._own - {self.source(name) for name in names})

    def read(self, name: str) -> torch.Tensor:
        """A diffusers tensor: a view of the file where it can be, FP32 where it was quantized.

        Raises:
            CheckpointError: names the tensor that is not there.
        """
        return self._origin(name).take(self._in.values(self._stored_name(name)))

    def fp8(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """See :meth:`Weights.fp8`. A fused projection has one scale for queries, keys, values."""
        origin = self._origin(name)
        pair = self._in.fp8(self._stored_name(name)) if origin.scaled else None
        return None if pair is None else (origin.take(pair[0]), pair[1])

    def input_amax(self, layer: str) -> float | None:
        """The largest input magnitude by the file's input scale; None where it has none."""
        return self._in.input_amax(self.source(f"{layer}.weight"))

    def _stored_name(self, name: str) -> str:
        source = self.source(name)
        if source not in self._in:
            raise CheckpointError(f"{self.folder} has no tensor {source!r}", _FETCH)
        return source

    def _file(self, name: str) -> Path:
        return self.folder


class SingleFileCheckpoint:
    """A model in one file of the original layout; its interface is that of :class:`Checkpoint`.

    Text encoders and the autoencoder may be in files beside it. The parts' configurations come
    from their shapes.

    Args:
        path: the file with the transformer.
        tokenizers: a directory with the folders ``tokenizer``, ``tokenizer_2``, ``tokenizer_3``;
            None looks beside the file, then on the hub.

    Raises:
        CheckpointError: no SD3.5, or a file that cannot be read.
    """

    def __init__(self, path: Path, tokenizers: Path | None = None) -> None:
        self.root = path
        self._tokenizers = tokenizers
        file = _open(path)
        self._parts: dict[str, SingleFileWeights] = {}
        self._configs: dict[str, dict[str, Any]] = {}
        inside = {
            part: prefix
            for part, layout in LAYOUTS.items()
            if (prefix := _prefix(file, layout.prefixes, layout)) is not None
        }
        if "transformer" not in inside:
            raise CheckpointError(
                f"{path} is not Stable Diffusion 3.5{_describe(file)}",
                "give an SD3.5 file with joint_blocks, or a diffusers model directory",
            )
        others = [prefix for part, prefix in inside.items() if part != "transformer"]
        # What is wrong with a part is told when the part is asked for.
        self._failures: dict[str, CheckpointError] = {}
        for part, layout in LAYOUTS.items():
            try:
                weights: SingleFileWeights | None
                if part in inside:
                    all_else = others if part == "transformer" else None
                    weights = SingleFileWeights(file, inside[part], layout, all_else)
                else:
                    weights = _beside(path, part)
                if weights is not None:
                    self._configs[part] = _configure(weights, layout)
                    self._parts[part] = weights
            except CheckpointError as error:
                self._failures[part] = error

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process maps the files itself.
        return SingleFileCheckpoint, (self.root, self._tokenizers)

    @property
    def hint(self) -> str:
        """The name that tells the variant, for :func:`sd35_trt.variants.recognise`."""
        return telling_name(self.root)

    def has(self, part: str) -> bool:
        """Whether the part was found; only T5 may be missing."""
        return part in self._parts or part in self._failures

    def place(self, part: str) -> Path:
        """The file with the part."""
        return self._parts[part].folder

    def class_name(self, part: str) -> None:
        """Files name no classes."""

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration.

        Raises:
            CheckpointError: see :meth:`weights`.
        """
        self.weights(part)
        return dict(self._configs[part])

    def weights(self, part: str) -> SingleFileWeights:
        """The part's tensors.

        Raises:
            CheckpointError: the part is not found, or its file cannot be read.
        """
        if part in self._failures:
            raise self._failures[part]
        return self._parts[part]

    def tokenizer(self, folder: str) -> Path:
        """The directory of a tokenizer; fetched from the hub where it is not here.

        Raises:
            CheckpointError: it is neither.
        """
        if self._tokenizers is None and not (self.root.parent / folder).is_dir():
            return self._fetched / folder
        path = (self._tokenizers or self.root.parent) / folder
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is missing", "give the folder that has it: --tokenizers DIR"
            )
        return path

    def files(self, folder: str) -> list[Path]:
        """What a folder's result depends on, beside its configuration.

        Raises:
            CheckpointError: a tokenizer is missing.
        """
        if folder.startswith("tokenizer"):
            return tokenizer_files(self.tokenizer(folder))
        return self.weights(folder).files

    def input_amax(self, layers: list[str]) -> dict[str, float]:
        """The largest input magnitudes that the file's input scales stand for.

        Args:
            layers: ``component/layer``.

        Returns:
            By layer; empty where the file has none of them.

        Raises:
            CheckpointError: the file has some of them.
        """
        values = {}
        for key in layers:
            component, _, layer = key.partition("/")
            amax = self.weights(COMPONENTS[component].part).input_amax(layer)
            if amax is not None:
                values[key] = amax
        without = [key for key in layers if key not in values]
        if values and without:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            raise CheckpointError(
                f"{self.root} has input scales, but none for {without[0]}{more}",
                f"measure them: sd35-trt calibrate --model {self.root} --out DIR",
            )
        return values

    @cached_property
    def _fetched(self) -> Path:
        return fetch_tokenizers(self.root)


def _configure(weights: SingleFileWeights, layout: Layout) -> dict[str, Any]:
    try:
        return layout.configure(weights)
    except (ValueError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{weights.folder}: the shapes of its {layout.title} are not those of an SD3.5 model",
            _FETCH,
        ) from error


#: What :func:`open_checkpoint` gives.
AnyCheckpoint: TypeAlias = Checkpoint | SingleFileCheckpoint


def open_checkpoint(path: Path, tokenizers: Path | None = None) -> AnyCheckpoint:
    """Open a diffusers model directory, or a file in the original layout.

    Args:
        tokenizers: see :class:`SingleFileCheckpoint`.

    Raises:
        CheckpointError: it is neither.
        UsageError: tokenizers for a directory, which has its own.
    """
    if path.suffix in _NOT_READ and not path.is_dir():
        raise CheckpointError(f"{path}: {path.suffix} files are not read", _NOT_READ[path.suffix])
    if path.is_file() or path.suffix.lower() in (".safetensors", SUFFIX):
        return SingleFileCheckpoint(path, tokenizers)
    checkpoint = Checkpoint(path)
    if tokenizers is not None:
        raise UsageError(f"{path} has tokenizers of its own", "leave out --tokenizers")
    return checkpoint


def _open(path: Path) -> TensorFile | GgufFile:
    return GgufFile(path) if path.suffix.lower() == SUFFIX else TensorFile(path)


def _prefix(file: TensorFile | GgufFile, prefixes: tuple[str, ...], layout: Layout) -> str | None:
    return next((prefix for prefix in prefixes if prefix + layout.anchor in file), None)


def _describe(file: TensorFile | GgufFile) -> str:
    for key, title in _FOREIGN.items():
        if any(key in name for name in file.names):
            return f" but {title}"
    return ""


def _gguf_t5(folder: Path) -> Path | None:
    """The GGUF file of T5 beside a checkpoint; None where there is none.

    Raises:
        CheckpointError: there are several.
    """
    folders = [folder / name for name in _TEXT_FOLDERS if (folder / name).is_dir()]
    files = {
        file.resolve(): file
        for place in folders
        for file in sorted(place.iterdir())
        if _GGUF_T5.fullmatch(file.name.lower()) and file.is_file()
    }
    if len(files) > 1:
        listed = ", ".join(str(file) for file in files.values())
        raise CheckpointError(f"{len(files)} files of T5 are there: {listed}", "leave one of them")
    return next(iter(files.values()), None)


def _beside(path: Path, part: str) -> SingleFileWeights | None:
    """A part in a file of its own; None for one that may be missing.

    Raises:
        CheckpointError: it is missing, or holds something else.
    """
    layout = LAYOUTS[part]
    folders = _VAE_FOLDERS if part == "vae" else _TEXT_FOLDERS
    names = [f"{name}.safetensors" for name in FILE_NAMES[part]]
    places = [path.parent / folder / name for name in names for folder in folders]
    if part == "vae":
        places.append(path.parent / _REPOSITORY_VAE)
    place = next((place for place in places if place.is_file()), None)
    if place is None and part == "text_encoder_3":
        place = _gguf_t5(path.parent)
    if place is None:
        if part in OPTIONAL_PARTS:
            return None
        raise CheckpointError(
            f"{path} has no {layout.title}, and there is no {' or '.join(names)} in {path.parent} "
            f"or its {', '.join(folders[1:])}",
            f"put {names[0]} beside it",
        )
    file = _open(place)
    prefix = _prefix(file, (*layout.prefixes, ""), layout)
    if prefix is None:
        raise CheckpointError(
            f"{place} holds no {layout.title} (no tensor {layout.anchor!r})", _FETCH
        )
    return SingleFileWeights(file, prefix, layout)
